"""What calibration costs beside ONNX Runtime's MinMax calibrator and a bare FP32 forward pass of the same samples.

    python benchmarks/calibration.py [rounds]

PP-OCR rec v4 and cls (from rapidocr-onnxruntime; lines rendered by Pillow) and ResNet-50 (from onnx). Each measurement
is a process of its own, interleaved, medians over the rounds; CPU seconds and peak resident memory are of the whole
process, imports included. Limits: 1.0 of MinMax's CPU and 2 of the forward's; memory at most 2 of the forward's, and
growing under 10 % from 32 to 1024 samples. `marginal` is the cost of the samples beyond the first 32: what is left
when loading and importing no longer count.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
MODELS: dict[str, tuple[str, dict[str, tuple[int | str, ...]], tuple[int, ...]]] = {
    "cls": (
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        {"x": ("batch", 3, 48, 192)},
        (32, 256, 1024),
    ),
    "rec4": (
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        {"x": ("batch", 3, 48, "width")},
        (32, 256, 1024),
    ),
    "resnet50": ("onnx/backend/test/data/light/light_resnet50.onnx", {}, (32, 64)),
}
BATCHED = {"cls": 4}
"""Samples that `calibrate` runs together of itself: the forward pass is measured that way too."""
LINE_WIDTH = {"cls": 192, "rec4": 320}


def main(rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        for model in MODELS:
            _measure(model, Path(name), rounds)


def _measure(name: str, folder: Path, rounds: int) -> None:
    _child("make", name, folder, 0)
    counts = MODELS[name][2]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for count in counts:
            for what in ("forward", "batched", "minmax", "calibrate"):
                if what == "batched" and name not in BATCHED:
                    continue
                if what == "minmax" and count > 256:
                    continue  # its cost is proportional, and it keeps all it finds
                found.setdefault((what, count), []).append(_child(what, name, folder, count))
    cpu = {key: statistics.median(each[0] for each in values) for key, values in found.items()}
    memory = {key: statistics.median(each[1] for each in values) for key, values in found.items()}
    print(f"{name}, medians of {rounds}")
    for count in counts:
        ours = ("calibrate", count)
        line = f"  {count:5} samples: CPU {cpu[ours]:6.2f} s"
        line += f" = {cpu[ours] / cpu['forward', count]:4.2f} of a forward"
        if name in BATCHED:
            line += f", {cpu[ours] / cpu['batched', count]:4.2f} of one in batches of {BATCHED[name]}"
        if ("minmax", count) in cpu:
            line += f", {cpu[ours] / cpu['minmax', count]:4.2f} of MinMax"
        line += f"; RSS {memory[ours]:4.0f} MB = {memory[ours] / memory['forward', count]:4.2f} of a forward"
        if ("minmax", count) in memory:
            line += f", {memory[ours] / memory['minmax', count]:4.2f} of MinMax"
        print(line)
    first, last = counts[0], counts[-1]
    growth = {what: memory[what, last] / memory[what, first] - 1 for what in ("forward", "calibrate")}
    marginal = {what: cpu[what, last] - cpu[what, first] for what in ("forward", "calibrate")}
    print(
        f"  {first} -> {last}: RSS {growth['calibrate']:+.1%} (forward {growth['forward']:+.1%}); "
        f"marginal CPU {marginal['calibrate'] / marginal['forward']:.2f} of a forward"
    )


def _child(what: str, model: str, folder: Path, count: int) -> tuple[float, float]:
    """(CPU seconds, peak resident MB) of one piece of work in a process of its own."""
    argv = [sys.executable, __file__, "--child", what, model, str(folder), str(count)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} {model} {count} failed:\n{done.stderr[-2000:]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    return facts["cpu"], facts["rss"]


def _run_child(what: str, model: str, folder: str, count: str) -> None:
    WORK[what](model, Path(folder), int(count))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss / 1024}))


def _make(name: str, folder: Path, _: int) -> None:
    """The prepared model, and one .npz for each number of samples."""
    from modelforge.graph.prepare import prepare

    package, _, inside = MODELS[name][0].partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package} is not installed")
    prepare(Path(spec.submodule_search_locations[0]) / inside, folder / name, MODELS[name][1])
    key = "x" if name in LINE_WIDTH else "gpu_0/data_0"
    rows = _lines(LINE_WIDTH[name]) if name in LINE_WIDTH else _pictures()
    for count in MODELS[name][2]:
        np.savez(_samples(folder, name, count), **{key: np.concatenate([rows] * -(-count // len(rows)))[:count]})


def _lines(width: int) -> np.ndarray[Any, Any]:
    spec = importlib.util.spec_from_file_location("lines", ROOT / "recipes" / "ppocr-cls" / "lines.py")
    assert spec is not None
    assert spec.loader is not None
    lines = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lines)
    lines.WIDTH = width
    return np.stack([sample["x"] for sample in lines.calibration()])


def _pictures() -> np.ndarray[Any, Any]:
    noise = np.random.default_rng(0).normal(size=(32, 3, 224, 224))
    return (np.cumsum(noise, axis=-1) / 10).astype(np.float32)


def _samples(folder: Path, name: str, count: int) -> Path:
    return folder / f"{name}-{count}.npz"


def _batched(name: str, folder: Path, count: int) -> None:
    _forward(name, folder, count, BATCHED[name])


def _forward(name: str, folder: Path, count: int, batch: int = 1) -> None:
    """ONNX Runtime with all its optimisations, one thread, samples streamed."""
    import onnxruntime

    from modelforge.samples import stream_samples

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / name / "model.onnx"), options)
    names = [value.name for value in session.get_inputs()]
    for _, feeds in stream_samples(_samples(folder, name, count), names, batch):
        session.run(None, feeds)


def _minmax(name: str, folder: Path, count: int) -> None:
    """ONNX Runtime's MinMax calibrator over all operators that it quantizes, as quantize_static calls it."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    from modelforge.samples import stream_samples

    key = "x" if name in LINE_WIDTH else "gpu_0/data_0"
    feeds = (arrays for _, arrays in stream_samples(_samples(folder, name, count), [key]))

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def get_next(self) -> Any:
            return next(feeds, None)

    calibrator = create_calibrator(
        folder / name / "model.onnx",
        list({*QLinearOpsRegistry, *QDQRegistry}),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
    )
    calibrator.collect_data(Reader())
    calibrator.compute_data()


def _calibrate(name: str, folder: Path, count: int) -> None:
    from modelforge.quantize.calibrate import calibrate

    table = calibrate(folder / name / "model.onnx", _samples(folder, name, count))
    (folder / "ranges.json").write_text(table.to_json())


WORK: dict[str, Callable[[str, Path, int], None]] = {
    "make": _make,
    "forward": _forward,
    "batched": _batched,
    "minmax": _minmax,
    "calibrate": _calibrate,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _run_child(*sys.argv[2:])
    else:
        main(*(int(word) for word in sys.argv[1:]))
