"""Real models on the NPU compilers that run here: what `modelforge build` gives, beside the same INT8 in ONNX Runtime.

    python benchmarks/npu.py [model ...] [--targets TAG ...] [--images N]

PP-OCR cls, PP-OCR det, ResNet-50 and YOLOv8n for rk3588 and qualcomm-htp-v73 with the ladder int8, mixed, fp16, in
Rockchip's PC simulator and QNN's HTP emulation. ``SQNR`` is the artifact's against FP32, ``ORT`` that of its lowered
model in ONNX Runtime on the same samples: the peer, and what INT8 itself costs. YOLOv8n is shared between NPU and ARM
cores, and its chain judged by its AP at IoU 0.5 against FP32's own detections: by the build's gate, then on N images of
``int8_accuracy.py``, which nothing before has seen.
ResNet-50 is ONNX's light model with random weights, which no real data teaches anything: its figures are of mechanics.
Takes half an hour on two cores, most of it in HTP's emulation (2 s an image); needs `modelforge toolchain install
rockchip` and `qualcomm`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from int8_tasks import Array, detection_agreement, packaged, yolo_task
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))

from make_coverage import light

from modelforge.bundle.read import Bundle, export_files, open_bundle
from modelforge.compilers import get_compiler
from modelforge.forge.golden import run_artifact, running_target

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("rk3588", "qualcomm-htp-v73")
LADDER = ["int8", "mixed", "fp16"]
CALIBRATION, EVALUATION = 32, 24
HELD_OUT, GATE, EMULATED, ALLOWED = 160, 320, 160, 0.01
"""Images of YOLOv8n: those of ``int8_accuracy.py``; those behind them, by which the build decides; how many of these
are emulated at least; and what the gate lets the AP drop by. 160 images tell an AP to about 0.01: half of the 0.02 that
is promised is left to that."""
AT_ONCE = 40
"""Images of one run: an emulator that is asked for more may be stopped by the time limit of a golden check."""
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Case:
    """A model, and ``[count, ...]`` of its only input, calibration first."""

    name: str
    model: Callable[[Path], Path]
    input: str
    samples: Callable[[], Array]
    partition: bool = False


def main() -> None:
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(cases))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--images", type=int, default=HELD_OUT)
    options = parser.parse_args()
    columns = ("model", "target", "precision", "gate", "evidence", "SQNR", "ORT", "bytes", "on NPU", "seconds")
    print("{:9}{:18}{:10}{:9}{:11}{:>7}{:>7}{:>12}{:>9}{:>9}  fell from".format(*columns))
    for name in options.models or cases:
        for tag in options.targets:
            with tempfile.TemporaryDirectory(prefix="modelforge-bench-") as folder:
                run(cases[name], tag, Path(folder), options.images)


def run(case: Case, tag: str, folder: Path, images: int) -> None:
    recipe = write_recipe(case, tag, folder / case.name)
    begun = time.perf_counter()
    command = [sys.executable, "-m", "modelforge.cli.main", "build", str(recipe), "-o", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    document = json.loads(done.stdout) if done.stdout else {"variants": []}
    if done.returncode:
        print(f"{case.name:9}{tag:18}exit {done.returncode}: {done.stderr.strip().splitlines()[-1][:200]}", flush=True)
    bundle = open_bundle(Path(document["path"])) if document.get("path") else None
    for record in document["variants"]:
        if record["compiler"] == "tvm":
            continue
        accuracy, told = record["accuracy"], record.get("delegation") or {}
        macs = told.get("macs") or {}
        share = f"{macs.get('npu', 0) / max(sum(macs.values()), 1):.1%}" if macs else "-"
        fell = "; ".join(f"{each['precision']}: {each.get('reason')}" for each in record["ladder"][:-1])
        size = record["artifact"]["size"] if record["artifact"] else 0
        lowered = reference_sqnr(case, bundle, record, folder) if bundle else None
        print(
            f"{case.name:9}{tag:18}{record['precision'] or '-':10}{accuracy['gate']:9}{accuracy['evidence']:11}"
            f"{decibels(accuracy['sqnr_db']):>7}{decibels(lowered):>7}{size:12,}{share:>9}{seconds:9.1f}  {fell[:160]}",
            flush=True,
        )
    if bundle is not None and case.partition:
        (chain,) = document["partitions"][tag]["chains"]
        gated, lowered, value = chain["accuracy"], chain.get("lowered"), agreement(bundle, tag, images, folder)
        told = f"; its lowered models {lowered['value']:.4f} on {lowered['samples']}" if lowered else ""
        print(
            f"{'':9}chain: gate {gated['gate']}, agreement {gated['value']:.4f} on {gated['samples']} images{told}; "
            f"{value:.4f} on {images} held out",
            flush=True,
        )


def write_recipe(case: Case, tag: str, folder: Path) -> Path:
    folder.mkdir()
    model = case.model(folder)
    samples = case.samples()
    shape = [1, *samples.shape[1:]]
    np.savez(folder / "calibration.npz", **{case.input: samples[:CALIBRATION]})
    labels, metric = {}, 'metric = "sqnr"'
    if case.partition:
        labels = {"label": infer(model, case.input, samples[CALIBRATION:])}
        metric = f'metric = "agreement:with_fp32"\nmax_drop = {ALLOWED}\nemulated = {EMULATED}'
        source = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        source += "from int8_tasks import detection_agreement\n"
        source += "def with_fp32(outputs, labels):\n    return detection_agreement(outputs['output0'], labels)\n"
        (folder / "agreement.py").write_text(source)
    np.savez(folder / "evaluation.npz", **{case.input: samples[CALIBRATION:]}, **labels)
    shutil.copyfile(model, folder / "model.onnx") if model != folder / "model.onnx" else None
    (folder / "recipe.toml").write_text(
        f'schema = 1\nname = "{case.name}"\nversion = "1.0.0"\n[model]\npath = "model.onnx"\n'
        f'[inputs."{case.input}"]\nshape = {shape}\n[calibration]\ndata = "calibration.npz"\n'
        f'[accuracy]\ndata = "evaluation.npz"\n{metric}\n'
        f'[[target]]\ntag = "{tag}"\nprecision = {json.dumps(LADDER)}\n' + 'partition = "npu"\n' * case.partition
    )
    return folder


def reference_sqnr(case: Case, bundle: Bundle, record: dict[str, Any], folder: Path) -> float:
    """Of the lowered model in ONNX Runtime on the samples that the gate had, the lowest of all outputs."""
    (variant,) = bundle.select(record["target"], record["stage"])[:1]
    files = export_files(bundle, variant, folder / "lowered")
    samples = np.load(folder / case.name / "evaluation.npz")[case.input][: record["accuracy"]["samples"]]
    model = onnx.load(folder / case.name / "model.onnx")
    lowered = onnxruntime.InferenceSession(str(files["model.onnx"]), providers=["CPUExecutionProvider"])
    names = [each.name for each in lowered.get_outputs()]
    known = {each.name for each in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    exact = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    energy, noise = np.zeros(len(names)), np.zeros(len(names))
    for sample in samples:
        both = [session.run(names, {case.input: sample[None]}) for session in (exact, lowered)]
        for place, (wanted, given) in enumerate(zip(*both, strict=True)):
            energy[place] += np.square(wanted, dtype=np.float64).sum()
            noise[place] += np.square(np.subtract(wanted, given, dtype=np.float64)).sum()
    return float((10 * np.log10(energy / np.maximum(noise, 1e-30))).min())


def agreement(bundle: Bundle, tag: str, count: int, folder: Path) -> float:
    """Of the chain that ships with FP32, on images that calibration and gate have not seen."""
    images = yolo_task(count).evaluation
    parts = [images[start : start + AT_ONCE] for start in range(0, count, AT_ONCE)]
    found = [run_chain(bundle, tag, part, folder / f"more-{place}") for place, part in enumerate(parts)]
    return detection_agreement(np.concatenate(found), infer(packaged("nudenet/320n.onnx"), "images", images))


def run_chain(bundle: Bundle, tag: str, images: Array, folder: Path) -> Array:
    """Its detections, each stage run as its variant can run here."""
    tensors: dict[str, Array] = {"images": images}
    for stage in bundle.about["partitions"][tag]["stages"]:
        (variant,) = bundle.select(tag, stage["name"])[:1]
        record, place = variant.record, folder / stage["name"]
        place.mkdir(parents=True)
        np.savez(place / "inputs.npz", **{each["name"]: tensors[each["name"]] for each in stage["inputs"]})
        files = export_files(bundle, variant, place / "files")
        assert record.artifact is not None
        target = running_target(bundle, record)
        outputs = place / "outputs.npz"
        compiler = get_compiler(record.compiler or "")
        run_artifact(compiler, target, record.artifact.file, files, place / "inputs.npz", outputs, place)
        with np.load(outputs) as archive:
            tensors |= dict(archive)
    return tensors["output0"]


def infer(model: Path, name: str, inputs: Array) -> Array:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {name: each[None]})[0]) for each in inputs])


def decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def lines() -> Array:
    """Rendered lines of text, half of them upside down: those of the recipe for this very model."""
    sys.path.insert(0, str(ROOT / "recipes" / "ppocr-cls"))
    import lines as recipe

    both = [*recipe.calibration()][:CALIBRATION] + [*recipe.evaluation()][:EVALUATION]
    return np.stack([each["x"] for each in both])


def pages() -> Array:
    """Pages of rendered text, normalised as ImageNet's photographs are."""
    dice = np.random.default_rng(1)
    return np.stack([_page(dice) for _ in range(CALIBRATION + EVALUATION)])


def _page(dice: np.random.Generator) -> Array:
    image = Image.new("RGB", (320, 320), tuple(int(each) for each in dice.integers(180, 256, 3)))
    draw, down = ImageDraw.Draw(image), int(dice.integers(5, 30))
    while down < 300:
        size = int(dice.integers(12, 28))
        text = "".join(chr(int(each)) for each in dice.integers(65, 123, int(dice.integers(5, 18))))
        ink = tuple(int(each) for each in dice.integers(0, 110, 3))
        draw.text((int(dice.integers(2, 60)), down), text, fill=ink, font=ImageFont.load_default(size))
        down += size + int(dice.integers(6, 30))
    pixels = np.asarray(image, np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)


def photographs(count: int = EVALUATION) -> Array:
    """Compositions of photographs, 320 x 320 in 0..1."""
    task = yolo_task(count)
    return np.concatenate([task.calibration, task.evaluation])


def many_photographs() -> Array:
    """Calibration, and behind what is held out the gate's."""
    task = yolo_task(HELD_OUT + GATE)
    return np.concatenate([task.calibration, task.evaluation[HELD_OUT:]])


def crops() -> Array:
    """Of them, 224 x 224, normalised."""
    middle = photographs()[:, :, 48:272, 48:272]
    return np.asarray((middle - MEAN[:, None, None]) / STD[:, None, None], np.float32)


def carried(path: str) -> Callable[[Path], Path]:
    return lambda _: packaged(path)


CASES = (
    Case("cls", carried("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"), "x", lines),
    Case("det", carried("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"), "x", pages),
    Case("resnet50", light("resnet50"), "gpu_0/data_0", crops),
    Case("yolov8n", carried("nudenet/320n.onnx"), "images", many_photographs, partition=True),
)


if __name__ == "__main__":
    main()
