"""How long an engine takes beside a bare script that calls the same builder; and which models get one without a GPU.

    python benchmarks/tensorrt_build.py [rounds]     # ResNet-50 for the A100, the ratio
    python benchmarks/tensorrt_build.py table [MODEL ...]   # T4, A100 and one engine for both; FP16 and INT8

Both sides of the ratio are whole processes that start Python, load TensorRT-RTX, parse, build and write the file; ours
also holds the model against what is known to fail, reads the engine back and hashes it. Rounds are interleaved.
Limit: 1.3 (issue 4). No engine is run: there is no GPU in any of this.
"""

from __future__ import annotations

import compileall
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import modelforge
from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.tensorrt.driver import TensorRtRtxCompiler
from modelforge.target import Registry

sys.path.append(str(Path(__file__).parent.parent / "docs"))
from make_coverage import CASES, Case, package_file, text  # docs/ is no package

LIMIT = 1.3
SAMPLES = 24

BARE = """
import sys, tensorrt_rtx as trt
class Silent(trt.ILogger):
    def __init__(self): trt.ILogger.__init__(self)
    def log(self, severity, message): pass
logger = Silent()
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM80, 0)
open(sys.argv[2], "wb").write(builder.build_serialized_network(network, config))
"""


def ratio(rounds: int) -> None:
    # As pip leaves an installed package: without it every child compiles our sources anew.
    compileall.compile_dir(Path(modelforge.__file__).parent, quiet=2)
    load = os.getloadavg()[0]
    print(f"ResNet-50 for SM80, {rounds} interleaved rounds, {os.cpu_count()} cores, load {load:.1f}")
    for precision in ("fp16", "int8"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = lowered(precision, folder)
            taken: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
            for index in range(rounds + 1):
                for side in ("ours", "bare") if index % 2 else ("bare", "ours"):
                    begun = _clocks()
                    (ours if side == "ours" else bare)(model, precision, folder / f"{side}-{index}")
                    spent = tuple(after - before for before, after in zip(begun, _clocks(), strict=True))
                    taken[side] += [spent] if index else []  # the first round warms the disk
                    shutil.rmtree(folder / f"{side}-{index}")
            _tell(precision, taken)


def _tell(precision: str, taken: dict[str, list[tuple[float, float]]]) -> None:
    """Medians of each side, and of the ratios of single rounds: what slows both sides of a round cancels out."""
    for side, times in taken.items():
        wall, processor = (statistics.median(each) for each in zip(*times, strict=True))
        told = " ".join(f"{each:.2f}" for each, _ in times)
        print(f"  {precision} {side}  {wall:6.3f} s, {processor:5.3f} s of processor time   {told}")
    pairs = [(a / c, b / d) for (a, b), (c, d) in zip(taken["ours"], taken["bare"], strict=True)]
    wall, processor = (statistics.median(each) for each in zip(*pairs, strict=True))
    low, high = min(each for each, _ in pairs), max(each for each, _ in pairs)
    print(
        f"  {precision} ratio {wall:.2f} ({low:.2f} to {high:.2f}), {processor:.2f} in processor time (limit {LIMIT})"
    )
    sys.stdout.flush()


def _clocks() -> tuple[float, float]:
    """Seconds on the wall, and of processor time: this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)


def lowered(precision: str, folder: Path) -> Path:
    """ResNet-50 as `modelforge build` gives it to the builder, out of a bundle."""
    (folder / "recipe").mkdir()
    _recipe(next(case for case in CASES if case.name == "resnet50"), precision, folder / "recipe")
    env = {**os.environ, "MODELFORGE_HOME": str(folder / "home")}
    modelforge_cli = [sys.executable, "-m", "modelforge.cli.main"]
    argv = [*modelforge_cli, "build", str(folder / "recipe"), "-o", str(folder), "--target", "a100", "--json"]
    bundle = Path(json.loads(subprocess.run(argv, capture_output=True, check=True, env=env).stdout)["path"])
    argv = [*modelforge_cli, "inspect", str(bundle), "--target", "a100", "--json"]
    files = json.loads(subprocess.run(argv, capture_output=True, check=True, env=env).stdout)["files"]
    (digest,) = [each["digest"] for each in files if each["role"] == "lowered-model"]
    path = folder / "model" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes((bundle / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes())
    return path


def ours(model: Path, precision: str, workdir: Path) -> None:
    workdir.mkdir()
    shapes = {"gpu_0/data_0": (1, 3, 224, 224)}
    job = CompileJob(model, Registry().get("a100"), precision, shapes, {}, workdir, timeout=600)
    TensorRtRtxCompiler().compile(job)


def bare(model: Path, precision: str, workdir: Path) -> None:
    del precision  # the model says it
    workdir.mkdir()
    subprocess.run([sys.executable, "-c", BARE, str(model), str(workdir / "bare.engine")], check=True)


PPOCR_CLS = Case(
    "ppocr-cls",
    lambda folder: package_file("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    "x",
    (1, 3, 48, 192),
    text(48, 192, 1),
)


def table(names: list[str]) -> None:
    """`modelforge build` for each model and precision; prints a Markdown table."""
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    wanted = ("resnet50", "squeezenet", "ppocr-v4-det", "ppocr-v4-rec", "yolov8n")
    for case in [PPOCR_CLS, *(case for case in CASES if case.name in wanted)]:
        if not names or case.name in names:
            for precision in ("fp16", "int8"):
                _build(case.name, lambda folder, case=case, precision=precision: _recipe(case, precision, folder))
    if not names or "digits" in names:
        for precision in ("fp16", "int8"):
            _build("digits", lambda folder, precision=precision: _digits(precision, folder))


HEAD = "model|precision|target|for SM|made by|MB|build s|layers|SQNR dB (lowered model)|engine".split("|")


def _build(name: str, write: Any) -> None:
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write(folder)
        argv = [sys.executable, "-m", "modelforge.cli.main", "build", str(folder), "-o", str(folder / "dist"), "--json"]
        env = {**os.environ, "MODELFORGE_HOME": str(folder / "home")}
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env)
        document = json.loads(done.stdout)
        if "variants" not in document:
            print(f"| {name} | {document['error']['what']} |", flush=True)
            return
        for record in document["variants"]:
            print(f"| {' | '.join([name, *_row(record, Path(document['path']))])} |", flush=True)


def _row(record: dict[str, Any], bundle: Path) -> list[str]:
    if record["status"] != "compiled":
        reasons = [rung["reason"] for rung in record["ladder"] if "reason" in rung]
        tried = ", ".join(rung["precision"] for rung in record["ladder"])
        return [tried, record["target"], "-", record["status"], "-", "-", "-", "-", "; ".join(reasons)]
    report = _report(bundle, record)
    accuracy = record["accuracy"]
    return [
        record["precision"], record["target"], ", ".join(str(sm) for sm in _capabilities(record)), record["compiler"],
        f"{record['artifact']['size'] / 1e6:.1f}", f"{report['seconds']['build']:.1f}", str(report["layers"]),
        "identical" if accuracy.get("identical") else f"{accuracy['sqnr_db']:.1f}",
        record["artifact"]["digest"][7:15] + (", shared" if report["shared"] else ""),
    ]  # fmt: skip


def _capabilities(record: dict[str, Any]) -> list[int]:
    sm = record["runtime"]["needs"]["sm"]
    return sm if isinstance(sm, list) else [sm]


def _report(bundle: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The build report of a variant, out of the bundle."""
    index = json.loads((bundle / "index.json").read_text())
    todo = [each["digest"] for each in index["manifests"]]
    while todo:
        data = json.loads((bundle / "blobs" / "sha256" / todo.pop()[7:]).read_text())
        todo += [each["digest"] for each in data.get("manifests", [])]
        layers = data.get("layers", [])
        if record["artifact"]["digest"] in [each["digest"] for each in layers] and _is_of(bundle, data, record):
            for each in layers:
                if each.get("annotations", {}).get("org.opencontainers.image.title") == "report.json":
                    document = json.loads((bundle / "blobs" / "sha256" / each["digest"][7:]).read_text())
                    return dict(document["compile"])
    raise KeyError("report.json")


def _is_of(bundle: Path, manifest: dict[str, Any], record: dict[str, Any]) -> bool:
    config = json.loads((bundle / "blobs" / "sha256" / manifest["config"]["digest"][7:]).read_text())
    return bool(config.get("target") == record["target"])


TARGETS = """
[[target]]
tag = "t4"
precision = ["{precision}"]
compiler = "tensorrt-rtx"
required = false
{shared}
[[target]]
tag = "a100"
precision = ["{precision}"]
compiler = "tensorrt-rtx"
required = false
{shared}
"""
SHARED = '[target.tensorrt]\ncompute_capabilities = ["7.5", "8.0"]\n'


def _targets(precision: str) -> str:
    return TARGETS.format(precision=precision, shared=SHARED if os.environ.get("SHARED") else "")


def _recipe(case: Case, precision: str, folder: Path) -> None:
    """The gate is open wide: this is about what is built, and the SQNR stands beside it."""
    arrays = _samples(case)
    for name, part in (("calibration", arrays[: SAMPLES // 2]), ("evaluation", arrays[SAMPLES // 2 :])):
        np.savez(folder / f"{name}.npz", **{case.input: part})
    model = case.model(folder)
    (folder / "recipe.toml").write_text(
        f'schema = 1\nname = "{case.name}"\nversion = "1.0.0"\n[model]\npath = {json.dumps(str(model))}\n'
        f"[inputs.{json.dumps(case.input)}]\nshape = {json.dumps(case.shape)}\n"
        '[calibration]\ndata = "calibration.npz"\nfloor = 4\nallow = ["few"]\n'
        '[accuracy]\ndata = "evaluation.npz"\nmetric = "sqnr"\nmin_sqnr_db = 1.0\nmin_agreement = 0.0\n'
        f"{_targets(precision)}"
    )


def _samples(case: Case) -> np.ndarray[Any, Any]:
    """The case's own samples and shifted copies of them."""
    found = list(case.samples())
    while len(found) < SAMPLES:
        found.append(np.roll(found[len(found) - 4], 7, axis=-1))
    return np.stack(found)


def _digits(precision: str, folder: Path) -> None:
    source = Path(__file__).parent.parent / "recipes" / "digits"
    for path in source.iterdir():
        if path.suffix in (".npz", ".onnx"):
            (folder / path.name).write_bytes(path.read_bytes())
    head = (source / "recipe.toml").read_text().split("[[target]]")[0]
    (folder / "recipe.toml").write_text(head + _targets(precision))


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        table(sys.argv[2:])
    else:
        ratio(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
