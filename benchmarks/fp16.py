"""FP16 of 14 real models on real inputs: does it load, is it valid, how near to FP32 is it, what stays FP32 and why.

    python benchmarks/fp16.py [model ...]

Thirteen files that Python packages carry (PP-OCR v4 and v6, the direction classifier, Magika, NudeNet's YOLOv8n, six of
Silero VAD), and a ResNet-50 with seeded weights. Inputs: rendered text, bytes of real files, photographs, a synthetic
voice with the states that it leaves. Every other sample calibrates and says which nodes must stay in FP32, the others
judge. A page of six lines and a page of one are two cases of the text detector: on the latter its error sits on the few
pixels of steep edges. "plain": the file in ONNX Runtime, which computes FP16 in FP32 on a CPU;
"rounded": every FP16 tensor rounded explicitly, which is what hardware gives. SQNR is the lowest of all outputs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import int8_tasks
import numpy as np
import onnx
import onnxruntime
from int8_tasks import Array, packaged
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.onnxruntime_worker import run_model
from modelforge.forge import worker
from modelforge.graph.prepare import prepare
from modelforge.verify.metrics import compare

WANTED_DB = 45.0
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Case:
    """A model and its samples: arrays ``[count, ...]`` by input name; those that calibrate, and judge, in turn."""

    model: Path
    shapes: Mapping[str, Shape]
    samples: Mapping[str, Array]


def main(names: list[str]) -> None:
    print(
        f"{'model':26}{'valid':>6}{'plain dB':>10}{'rounded dB':>12}{'FP16':>6}{'FP32':>6}{'seconds':>9}  kept in FP32"
    )
    right = 0
    chosen = [name for name in CASES if not names or name in names]
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            right += measure(name, CASES[name](Path(folder)), Path(folder))
    print(f"{right} of {len(chosen)} load, are valid and reach {WANTED_DB:.0f} dB with every tensor rounded")


def measure(name: str, case: Case, work: Path) -> bool:
    started = time.perf_counter()
    prepare(case.model, work / "fp32", dict(case.shapes))
    np.savez(work / "calibration.npz", allow_pickle=False, **{key: array[::2] for key, array in case.samples.items()})
    np.savez(work / "samples.npz", allow_pickle=False, **{key: array[1::2] for key, array in case.samples.items()})
    model, ranges = str(work / "fp32" / "model.onnx"), str(work / "ranges.json")
    samples = str(work / "calibration.npz")
    worker.calibrate({"model": model, "samples": samples, "out": ranges, "data_digest": "benchmark"})
    request = {"model": model, "folder": str(work / "fp16"), "precision": "fp16", "half_ranges": ranges}
    request["samples"] = samples
    report = worker.lower(request)["fp16"]
    lowered = work / "fp16" / "model.onnx"
    valid = _valid(lowered)
    exact = _run(Path(model), work)
    plain = _lowest(exact, _run(lowered, work))
    emulated = worker.emulate({"model": str(lowered), "folder": str(work / "emulated")})["model"]
    rounded = _lowest(exact, _run(Path(emulated or lowered), work))
    kept = Counter(_short(reason) for reason in report["kept"].values())
    told = "; ".join(f"{count} {reason}" for reason, count in kept.most_common()) or "nothing"
    print(
        f"{name:26}{'yes' if valid else 'NO':>6}{plain:10.1f}{rounded:12.1f}{report['converted']:6}"
        f"{len(report['kept']):6}{time.perf_counter() - started:9.1f}  {told}",
        flush=True,
    )
    return valid and rounded >= WANTED_DB


def _valid(model: Path) -> bool:
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except Exception as error:  # what it raises is the result
        print(f"  {' '.join(str(error).split())[:200]}")
        return False
    return True


def _short(reason: str) -> str:
    """Without the name and the number, so that reasons can be counted."""
    if "beyond half of what FP16 holds" in reason:
        return "beyond half of what FP16 holds"
    if "on calibration data" in reason:
        return reason.partition(" in FP16 ")[2]
    return reason.rsplit(": ", maxsplit=1)[-1] if "a value of" in reason else reason


def _run(model: Path, work: Path) -> dict[str, Array]:
    request = {"model": str(model), "inputs": str(work / "samples.npz"), "outputs": str(work / "outputs.npz")}
    run_model({**request, "batch": 4, "threads": 1})
    with np.load(work / "outputs.npz", allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def _lowest(exact: Mapping[str, Array], value: Mapping[str, Array]) -> float:
    found = [compare(exact[name], value[name]) for name in exact]
    if any(each.fault for each in found):
        return float("-inf")
    return min((each.sqnr_db for each in found if each.sqnr_db is not None), default=float("inf"))


def _lines(count: int, width: int) -> Array:
    return int8_tasks._rendered(count, seed=51, width=width)[0]


def _page(index: int, lines: int, size: int = 320) -> Array:
    """Up to six lines of text below each other, as a text detector sees a page; normalized as PP-OCR does."""
    found = int8_tasks._rendered(lines, seed=60 + index, width=size)[0] * 0.5 + 0.5
    page = np.ones((3, size, size), np.float32) * 0.9
    for place, line in enumerate(found, start=0 if lines > 1 else index % 6):
        page[:, 4 + place * 52 : 52 + place * 52] = np.where(line == 0.5, 0.9, line)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((page - mean[:, None, None]) / std[:, None, None]).astype(np.float32)


def _text(path: str, shape: Shape, samples: Callable[[], Array]) -> Callable[[Path], Case]:
    return lambda _: Case(packaged(path), {"x": shape}, {"x": samples()})


def _magika(_: Path) -> Case:
    task = int8_tasks.magika_task(1, each=2)
    return Case(task.model, task.shapes, {"bytes": task.calibration})


def _yolo(_: Path) -> Case:
    task = int8_tasks.yolo_task(1)
    return Case(task.model, task.shapes, {"images": task.calibration[:8]})


def _resnet(folder: Path) -> Case:
    """ResNet-50 v1 (He et al. 2015), He-initialised with a seed: no package carries a trained one."""
    random = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def conv(source: str, before: int, behind: int, kernel: int, stride: int, gain: float = 1.0) -> str:
        index = len(weights)
        size = (behind, before, kernel, kernel)
        weight = random.normal(size=size) * gain * np.sqrt(2 / (before * kernel * kernel))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
        pads = [kernel // 2] * 4
        out = f"conv{index}"
        nodes.append(helper.make_node("Conv", [source, f"w{index}"], [out], out, pads=pads, strides=[stride] * 2))
        return out

    def relu(source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{source}/relu"], f"{source}/relu"))
        return f"{source}/relu"

    value, width = relu(conv("x", 3, 64, 7, 2)), 64
    nodes.append(
        helper.make_node("MaxPool", [value], ["pool"], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    )
    value = "pool"
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inside = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage else 1
            branch = relu(conv(relu(conv(value, width, inside, 1, 1)), inside, inside, 3, stride))
            branch = conv(branch, inside, inside * 4, 1, 1, gain=0.3)
            short = conv(value, width, inside * 4, 1, stride) if block == 0 else value
            nodes.append(helper.make_node("Add", [branch, short], [f"{branch}/add"], f"{branch}/add"))
            value, width = relu(f"{branch}/add"), inside * 4
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["mean"], "mean"),
        helper.make_node("Flatten", ["mean"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "fc"], ["y"], "fc"),
    ]
    weights.append(numpy_helper.from_array((random.normal(size=(2048, 1000)) / 45).astype(np.float32), "fc"))
    graph = helper.make_graph(
        nodes,
        "resnet50",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1000])],
        weights,
    )
    path = folder / "resnet50.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    photos = [photo.resize((224, 224)) for photo in int8_tasks._photographs()]
    stack = np.stack([np.asarray(photo, np.float32).transpose(2, 0, 1) / 127.5 - 1 for photo in photos])
    return Case(path, {"x": ("n", 3, 224, 224)}, {"x": stack})


def _voice(seconds: float = 2.0, rate: int = 16000) -> Array:
    """Syllables of a gliding voice with formants, pauses of noise between them."""
    random = np.random.default_rng(7)
    time_ = np.arange(int(seconds * rate)) / rate
    pitch = np.cumsum(120 + 25 * np.sin(2 * np.pi * 0.9 * time_)) / rate
    voice = np.zeros_like(time_)
    for harmonic in range(1, 30):
        loud = sum(np.exp(-(((harmonic * 120 - formant) / 180) ** 2)) for formant in (600, 1200, 2500))
        voice += (0.05 + loud) * np.sin(2 * np.pi * harmonic * pitch)
    syllables = np.clip(np.sin(2 * np.pi * 3 * time_), 0, 1) * (np.sin(2 * np.pi * 0.5 * time_) > -0.2)
    sound = 0.12 * voice * syllables + random.normal(size=time_.size) * 0.01
    return sound.clip(-1, 1).astype(np.float32)


def _silero(file: str, step: int) -> Callable[[Path], Case]:
    """Chunks of a voice with the state that the FP32 model was in, as a caller would hand them in."""

    def case(_: Path) -> Case:
        model = packaged(f"silero_vad/data/{file}")
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        has_rate = any(each.name == "sr" for each in session.get_inputs())
        state, chunks, states = np.zeros((2, 1, 128), np.float32), [], []
        sound = np.concatenate([np.zeros(64, np.float32), _voice()])
        for start in range(0, len(sound) - step, 512):
            chunk = sound[start : start + step][None]
            chunks.append(chunk[0])
            states.append(state)
            feeds = {"input": chunk, "state": state} | ({"sr": np.array(16000, np.int64)} if has_rate else {})
            state = session.run(None, feeds)[1]
        samples = {"input": np.stack(chunks), "state": np.stack(states)}
        shapes: dict[str, Shape] = {"input": (1, step), "state": (2, 1, 128)}
        if has_rate:
            samples["sr"] = np.full(len(chunks), 16000, np.int64)
        return Case(model, shapes, samples)

    return case


def _sequence(_: Path) -> Case:
    sound = np.concatenate([np.zeros(64, np.float32), _voice()])
    frames = [sound[start : start + 576] for start in range(0, len(sound) - 576, 512)]
    zeros = np.zeros((4, 1, 1, 128), np.float32)
    parts = np.stack([np.stack(frames[place : place + 15]) for place in range(0, 60, 15)])
    model = packaged("silero_vad/data/silero_vad_16k_sequence.onnx")
    shapes: dict[str, Shape] = {"input": (15, 576), "h": (1, 1, 128), "c": (1, 1, 128)}
    return Case(model, shapes, {"input": parts, "h": zeros[:, 0], "c": zeros[:, 0]})


def _pages(lines: int = 6) -> Array:
    return np.stack([_page(index, lines) for index in range(8)])


OLD, NEW = "rapidocr_onnxruntime/models/", "rapidocr/models/"
CASES: dict[str, Callable[[Path], Case]] = {
    "cls": _text(f"{OLD}ch_ppocr_mobile_v2.0_cls_infer.onnx", ("n", 3, 48, 192), lambda: _lines(16, 192)),
    "PP-OCRv4 det": _text(f"{OLD}ch_PP-OCRv4_det_infer.onnx", ("n", 3, 320, 320), _pages),
    "PP-OCRv4 det, one line": _text(f"{OLD}ch_PP-OCRv4_det_infer.onnx", ("n", 3, 320, 320), lambda: _pages(1)),
    "PP-OCRv4 rec": _text(f"{OLD}ch_PP-OCRv4_rec_infer.onnx", ("n", 3, 48, 320), lambda: _lines(16, 320)),
    "PP-OCRv6 det": _text(f"{NEW}PP-OCRv6_det_small.onnx", ("n", 3, 320, 320), _pages),
    "PP-OCRv6 rec": _text(f"{NEW}PP-OCRv6_rec_small.onnx", ("n", 3, 48, 320), lambda: _lines(16, 320)),
    "magika": _magika,
    "yolov8n 320n": _yolo,
    "silero": _silero("silero_vad.onnx", 576),
    "silero 16k op15": _silero("silero_vad_16k_op15.onnx", 576),
    "silero half": _silero("silero_vad_half.onnx", 576),
    "silero op18 ifless": _silero("silero_vad_op18_ifless.onnx", 576),
    "silero openvino 16k": _silero("silero_vad_openvino_16k.onnx", 576),
    "silero 16k sequence": _sequence,
    "resnet50 seeded": _resnet,
}

if __name__ == "__main__":
    main(sys.argv[1:])
