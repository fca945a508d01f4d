"""Puts real models through `modelforge build` for three targets, and writes docs/coverage.md from what comes out.

    nox -s docs                 # all of it: about half an hour on two cores, most of it under qemu
    nox -s docs -- squeezenet   # only some models; prints the table and leaves docs/coverage.md alone

The models come out of Python packages: ONNX's own "light" test models, RapidOCR, NudeNet (a YOLOv8n) and Magika.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from PIL import Image, ImageDraw, ImageFont

TARGETS = ("x86-64", "cortex-a76", "a100")
PRECISIONS = ("fp32", "fp16")
SAMPLES = 4
PAGE = Path(__file__).parent / "coverage.md"
Make = Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One model: where it comes from, what goes in."""

    name: str
    model: Callable[[Path], Path]
    input: str
    shape: tuple[int | str, ...]
    samples: Make


def package_file(package: str, path: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / path


def carried(package: str, path: str) -> Callable[[Path], Path]:
    """A model that a package carries, used where it lies."""
    return lambda folder: package_file(package, path)


def light(name: str) -> Callable[[Path], Path]:
    """One of ONNX's light models. Their weights are constant fills, so that every output is the same number and any
    comparison would succeed: they are filled with seeded random weights first, and the statistics of their batch
    normalisations with what those weights give on a photograph. The graph stays as it is."""

    def fill(folder: Path) -> Path:
        model = onnx.load(package_file("onnx", f"backend/test/data/light/light_{name}.onnx"))
        graph, dice = model.graph, np.random.RandomState(0)
        known = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        uses = {used: (node.op_type, place) for node in graph.node for place, used in enumerate(node.input)}
        filled = {}
        for node in [node for node in graph.node if node.op_type == "ConstantOfShape"]:
            filled[node.output[0]] = tuple(int(size) for size in known[node.input[0]])
            graph.node.remove(node)
        for each in list(graph.initializer):
            array = known[each.name]
            if array.dtype == np.float32 and array.size > 1 and (array == array.flat[0]).all():
                filled[each.name] = array.shape
                graph.initializer.remove(each)
        for weight, shape in filled.items():
            values = _weights(dice, shape, *uses.get(weight, ("", 0))).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(values, weight))
        for each in [each for each in graph.initializer if each.name.endswith("__SHAPE")]:
            graph.initializer.remove(each)
        kept = {each.name for each in graph.initializer}
        inputs = [each for each in graph.input if each.name not in kept and each.name not in known]
        del graph.input[:]
        graph.input.extend(inputs)
        model.ir_version = 8
        _normalise(model)
        path = folder / f"{name}.onnx"
        onnx.save(model, path)
        return path

    return fill


def _weights(dice: np.random.RandomState, shape: tuple[int, ...], op: str, place: int) -> np.ndarray:
    """Values of a sensible size for where they are used."""
    noise = dice.randn(*shape)
    if op in ("Conv", "Gemm", "MatMul") and len(shape) > 1:
        return noise * np.sqrt(2 / np.prod(shape[1:]))
    if op == "BatchNormalization":
        return {1: 1 + noise / 10, 4: 1 + np.abs(noise) / 10}.get(place, noise / 10)
    return 1 + noise / 10 if op == "Mul" else noise / 10


def _normalise(model: onnx.ModelProto) -> None:
    """Give every BatchNormalization the mean and variance of its own input, as training would. Without it, activations
    of a deep random network grow beyond any FP16 number. Front to back: each round settles at least one layer more."""
    layers = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    if not layers:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    statistics = [name for node in layers for name in node.input[3:5]]
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer if each.name in statistics}
    kept = [each for each in probe.graph.initializer if each.name not in values]
    data = probe.graph.input[0].name
    del probe.graph.initializer[:], probe.graph.output[:]
    probe.graph.initializer.extend(kept)
    value_info = onnx.helper.make_tensor_value_info
    probe.graph.input.extend(value_info(name, onnx.TensorProto.FLOAT, array.shape) for name, array in values.items())
    probe.graph.output.extend(value_info(node.input[0], onnx.TensorProto.FLOAT, None) for node in layers)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    photograph = next(iter(photographs(224)()))[None]
    for _ in layers:
        found = session.run(None, {data: photograph, **values})
        after = {}
        for node, array in zip(layers, found, strict=True):
            after[node.input[3]] = array.mean((0, 2, 3), dtype=np.float64).astype(np.float32)
            after[node.input[4]] = (array.var((0, 2, 3), dtype=np.float64) + 1e-3).astype(np.float32)
        settled = all(np.allclose(after[name], values[name], rtol=0.02, atol=0.02) for name in after)
        values = after
        if settled:
            break
    for each in model.graph.initializer:
        if each.name in values:
            each.CopyFrom(numpy_helper.from_array(values[each.name].astype(np.float32), each.name))


def photographs(size: int, *, normalise: bool = True) -> Make:
    """Crops of the two photographs that scikit-learn carries: float32 [3, size, size]."""

    def make() -> Iterable[np.ndarray]:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
        for index in range(SAMPLES):
            image = Image.fromarray(images[index % len(images)])
            left = 40 * index
            crop = image.crop((left, 20, left + 400, 420)).resize((size, size))
            array = np.asarray(crop, np.float32) / 255
            array = (array - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225] if normalise else array
            yield np.ascontiguousarray(array.astype(np.float32).transpose(2, 0, 1))

    return make


def text(height: int, width: int, lines: int) -> Make:
    """Rendered text: float32 [3, height, width], -1 to 1."""

    def make() -> Iterable[np.ndarray]:
        font = ImageFont.load_default(30)
        words = ["invoice", "total", "amount", "delivery", "harbour", "engine", "number", "station", "paper", "quality"]
        for index in range(SAMPLES):
            image = Image.new("RGB", (width, height), "white")
            for line in range(lines):
                said = " ".join(words[(index + 3 * line + each) % len(words)] for each in range(2))
                ImageDraw.Draw(image).text((6, 6 + line * 52), said, "black", font)
            yield np.ascontiguousarray((np.asarray(image, np.float32) / 127.5 - 1).transpose(2, 0, 1))

    return make


def files() -> Iterable[np.ndarray]:
    """What Magika reads of a file: the first and the last 1,024 bytes as int32 [2048], 256 where there are none."""
    sources = [__file__, np.__file__, package_file("sklearn", "datasets/images/china.jpg"), sys.executable]
    for source in sources[:SAMPLES]:
        data = np.frombuffer(Path(source).read_bytes(), np.uint8).astype(np.int32)
        sample = np.full(2048, 256, np.int32)
        head, tail = data[:1024], data[-1024:]
        sample[: len(head)], sample[2048 - len(tail) :] = head, tail
        yield sample


CASES = [
    Case("resnet50", light("resnet50"), "gpu_0/data_0", (1, 3, 224, 224), photographs(224)),
    Case("squeezenet", light("squeezenet"), "data_0", (1, 3, 224, 224), photographs(224)),
    Case("shufflenet", light("shufflenet"), "gpu_0/data_0", (1, 3, 224, 224), photographs(224)),
    Case("densenet121", light("densenet121"), "data_0", (1, 3, 224, 224), photographs(224)),
    Case(
        "ppocr-v4-det",
        carried("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
        "x",
        (1, 3, 320, 320),
        text(320, 320, 5),
    ),
    Case(
        "ppocr-v4-rec",
        carried("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
        "x",
        (1, 3, 48, 320),
        text(48, 320, 1),
    ),
    Case("yolov8n", carried("nudenet", "320n.onnx"), "images", (1, 3, 320, 320), photographs(320, normalise=False)),
    Case("magika", carried("magika", "models/standard_v3_3/model.onnx"), "bytes", (1, 2048), files),
]


def main(names: list[str]) -> None:
    rows: list[list[str]] = []
    for case in CASES:
        if names and case.name not in names:
            continue
        for precision in PRECISIONS:
            rows += build(case, precision)
            print("\n".join(" | ".join(row) for row in rows[-len(TARGETS) :]), flush=True)
    if not names:
        write(rows)


def build(case: Case, precision: str) -> list[list[str]]:
    """One build for all three targets; a target that cannot have the model is skipped with its reason."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = case.model(folder)
        np.savez(folder / "evaluation.npz", **{case.input: np.stack(list(case.samples()))})
        (folder / "recipe.toml").write_text(recipe(case, model, precision))
        argv = [sys.executable, "-m", "modelforge.cli.main", "build", str(folder), "-o", str(folder / "dist"), "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        document = json.loads(done.stdout)
    if "variants" not in document:
        what = document["error"]["what"]
        return [[case.name, precision, tag, "refused", "-", "-", "-", "-", what] for tag in TARGETS]
    records = {record["target"]: record for record in document["variants"]}
    return [row(case, precision, records[tag]) for tag in TARGETS]


def row(case: Case, precision: str, record: dict[str, Any]) -> list[str]:
    accuracy, artifact = record["accuracy"], record["artifact"]
    reasons = [rung["reason"] for rung in record["ladder"] if "reason" in rung] or record["notes"]
    compiled = record["status"] == "compiled"
    sqnr = "identical" if accuracy.get("identical") else f"{accuracy['sqnr_db']:.1f}" if compiled else "-"
    return [
        case.name,
        precision,
        record["target"],
        record["status"] if record["status"] != "skipped" else "refused",
        accuracy["evidence"] if compiled else "-",
        sqnr,
        "-" if accuracy["agreement"] is None else f"{accuracy['agreement']:.3f}",
        f"{artifact['size'] / 1e6:.1f}" if artifact else "-",
        "" if compiled else "; ".join(reasons),
    ]


def recipe(case: Case, model: Path, precision: str) -> str:
    targets = "".join(f'[[target]]\ntag = "{tag}"\nprecision = ["{precision}"]\nrequired = false\n' for tag in TARGETS)
    return (
        f'schema = 1\nname = "{case.name}"\nversion = "1.0.0"\n[model]\npath = {json.dumps(str(model))}\n'
        f"[inputs.{json.dumps(case.input)}]\nshape = {json.dumps(case.shape)}\n"
        f'[accuracy]\ndata = "evaluation.npz"\nmetric = "cosine"\nmax_drop = 0.001\n{targets}'
    )


def write(rows: list[list[str]]) -> None:
    from importlib.metadata import version

    tools = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "apache-tvm", "tensorrt-rtx-cu13", "onnx"))
    head = ["model", "precision", "target", "status", "evidence", "SQNR dB", "agreement", "MB", "why not"]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
    # What the other scripts wrote behind the table stays.
    others = "".join(PAGE.read_text(encoding="utf-8").partition("\n## ")[1:]) if PAGE.exists() else ""
    PAGE.write_text(
        f"""# Coverage

What `modelforge build` makes of real models. Written by `nox -s docs` (docs/make_coverage.py), not by hand;
on {platform.machine()}, with {tools}.

- **SQNR, agreement**: against the user's own FP32 model in ONNX Runtime on the same inputs ({SAMPLES} of them, fewer
  under qemu for large models); photographs, rendered text and real files. A variant passes at 60 dB for fp32, 30 dB for
  fp16, and a cosine that drops by no more than 0.001.
- **evidence**: `device`, the artifact itself ran on such a machine; `emulator`, it ran under qemu; `reference`, it was
  not run: the model that the compiler was given ran in ONNX Runtime, FP16 with every tensor's rounding made explicit.
  No GPU has run any of these engines.
- **refused**: told at plan time, before any compile, with the reason given. **failed**: the compiler did not make it,
  or it missed its gate.
- ResNet-50, SqueezeNet, ShuffleNet and DenseNet-121 are ONNX's light test models with seeded random weights in place
  of their constant fills: with those, every output is the same number and any comparison would succeed.
- Nothing here is a speed.

{table}
{others}""",
        encoding="utf-8",
    )


def put_section(heading: str, text: str, page: Path = PAGE) -> None:
    """Put a section that begins with ``heading`` into the page, in the place of the one that is there, else last."""
    parts = re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    place = next((index for index, part in enumerate(parts) if part.startswith(heading)), len(parts))
    parts[place : place + 1] = [text]
    page.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
