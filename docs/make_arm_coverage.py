"""Runs real models on every Arm profile under QEMU, and writes the section of docs/coverage.md about it.

    python docs/make_arm_coverage.py                     # what has no result yet, then the section: half an hour
    python docs/make_arm_coverage.py squeezenet bert     # only these models, printed; docs/coverage.md stays

Compiled by the driver that `modelforge build` uses, run by the runner that ships, one real sample each. A result is
kept under the digest of the code that it depends on: a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from make_coverage import light, package_file, photographs, put_section

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from tvm_models import MODELS, Model  # benchmarks/ is no package

from modelforge.compilers.protocol import CompileJob, RunJob
from modelforge.compilers.tvm import TvmCompiler
from modelforge.errors import ModelForgeError
from modelforge.graph.fp16 import convert_fp16
from modelforge.graph.fp16_emulation import emulate_fp16
from modelforge.graph.inspect import inspect_model
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.half import overflowing
from modelforge.target import Registry
from modelforge.toolchains import qemu
from modelforge.verify.gate import FLOORS
from modelforge.verify.metrics import compare

HEADING = "## Arm: every profile under QEMU"
ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "arm-coverage"
COLUMNS = (
    *((tag, "fp32") for tag in ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "armv8")),
    ("cortex-a76", "fp16"),
    ("cortex-a76", "int8"),
    ("cortex-a53", "int8"),
)
"""FP16 and SDOT are the same code on Cortex-A76 and Neoverse N1; cores without dot products multiply by SMLAL."""
SUMS_IN_HALF = 6.0
"""Decibels that sums in FP16 may cost, where FP16 with exact sums is near the gate's floor or below it itself. Blocks
of 32 products err by four roundings, beside those of weights, inputs and the result."""
SECONDS = 1800.0
SLOWEST = ("vgg19", "densenet121", "resnet50", "inception_v2", "inception_v1", "ppocr-det", "zfnet512", "yolov8n")
"""Begun first, so that no process is left alone with the longest at the end."""


@dataclass(frozen=True)
class Result:
    """What became of one model on one profile: ``reason`` where it has no figures, seconds to compile and to run.

    ``itself_db``: how far the lowered model is from FP32 where another computes it, FP16 with exact sums.
    """

    sqnr_db: float | None = None
    wanted_db: float = 0.0
    itself_db: float | None = None
    identical: bool = False
    max_error: float | None = None
    reason: str = ""
    compiled_s: float = 0.0
    ran_s: float = 0.0

    @property
    def is_right(self) -> bool:
        if self.reason:
            return False
        return self.identical or (self.sqnr_db is not None and self.sqnr_db >= self.wanted_db)

    def cell(self) -> str:
        said = "failed" if self.reason else "identical" if self.identical else f"{self.sqnr_db:.0f}"
        return said if self.is_right else f"**{said}**"


def models() -> list[Model]:
    """Those of the benchmarks, and the rest of ONNX's light ones, with random weights for their constant fills."""
    found = {model.name: replace(model, source=logits(model.source)) for model in MODELS}
    for path in sorted(package_file("onnx", "backend/test/data/light").glob("*.onnx")):
        name = path.stem.removeprefix("light_")
        if name not in found:
            graph = onnx.load(path).graph
            weights = {each.name for each in graph.initializer}
            given = next(each.name for each in graph.input if each.name not in weights)
            found[name] = Model(name, logits(light(name)), given, (1, 3, 224, 224), photographs(224))
    rank = {name: place for place, name in enumerate(SLOWEST)}
    return sorted(found.values(), key=lambda model: rank.get(model.name, len(rank)))


def logits(source: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """Without the Softmax at the end of ONNX's light models. Random weights make it 1 for one class, when any
    comparison would succeed, or nearly even, of which FP16 and INT8 leave nothing."""

    def cut(folder: Path) -> Path:
        path = source(folder)
        model = onnx.load(path)
        makers = {name: node for node in model.graph.node for name in node.output}
        last = makers[model.graph.output[0].name]
        if path.parent != folder or last.op_type != "Softmax":
            return path  # a package's own file, or no such network
        model.graph.node.remove(last)
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None))
        onnx.save(model, folder / "logits.onnx")
        return folder / "logits.onnx"

    return cut


def columns(model: Model, tags: Sequence[str] = ()) -> Iterator[tuple[str, str]]:
    """The profiles and precisions of a model, or those of some profiles."""
    for tag, precision in COLUMNS:
        if (precision != "int8" or model.integer) and (not tags or f"{tag}:{precision}" in tags or tag in tags):
            yield tag, precision


def run_model(model: Model, tags: Sequence[str], kept: Path) -> Iterator[tuple[tuple[str, str], Result]]:
    """Every profile and precision that has no result in ``kept`` yet, and its result, which is kept there."""
    wanted = [column for column in columns(model, tags) if not _file(kept, model, column).exists()]
    if not wanted:
        return
    with tempfile.TemporaryDirectory(prefix="arm-coverage-") as name:
        work = Path(name)
        for column in wanted:
            try:
                result = run_one(model, *column, work)
            except ModelForgeError as error:
                result = Result(reason=f"{error.what}{f' ({error.where})' if error.where else ''}")
            _file(kept, model, column).write_text(json.dumps(asdict(result)), encoding="utf-8")
            yield column, result


def run_one(model: Model, tag: str, precision: str, work: Path) -> Result:
    """Lower, compile, run and judge. ``work`` holds what is lowered.

    Raises:
        ModelForgeError: one of these failed.
    """
    target = Registry().get(tag)
    source = _lowered(model, precision, work)
    compiler = TvmCompiler()
    inputs = {model.input: model.shape}
    refused = compiler.supports(inspect_model(source, cost=False), target, precision, inputs, {})
    refused = [*refused, *compiler.supports_model(source, target)]
    if what := [each.what for each in refused if each.rule != "precision"]:
        return Result(reason=f"refused: {what[0]}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        compiled = compiler.compile(CompileJob(source, target, precision, inputs, {}, folder, SECONDS))
        np.savez(folder / "in.npz", **{model.input: feed(model)})
        done = time.monotonic()
        job = RunJob(compiled.files, compiled.artifact, target, folder / "in.npz", 1, folder / "out.npz",
                     folder / "run", SECONDS)  # fmt: skip
        ran = compiler.run(job)
        assert ran.evidence == "emulator", ran
        took = {"compiled_s": round(done - begun, 1), "ran_s": round(time.monotonic() - done, 1)}
        with np.load(folder / "out.npz") as outputs:
            return replace(_judged_as(model, precision, dict(outputs), work), **took)


def _judged_as(model: Model, precision: str, got: Mapping[str, Any], work: Path) -> Result:
    exact = _reference(model, work / model.name / "fp32" / "model.onnx")
    if precision == "fp32":
        return replace(judged(exact, got), wanted_db=FLOORS["fp32"][0])
    lowered = _lowered(model, precision, work)
    if precision == "fp16":
        lowered = emulate_fp16(lowered, work / model.name / "fp16-rounded") or lowered
    stands_for = _reference(model, lowered)
    itself = judged(exact, stands_for).sqnr_db
    wanted = itself if precision == "int8" else min(FLOORS["fp16"][0], (itself or math.inf) - SUMS_IN_HALF)
    return replace(judged(stands_for if precision == "int8" else exact, got), wanted_db=wanted or 0.0, itself_db=itself)


def _lowered(model: Model, precision: str, work: Path) -> Path:
    if precision == "int8":
        return model.int8(work, "tvm")
    source = model.fp32(work)
    if precision == "fp32":
        return source
    half = work / model.name / "fp16"
    if not half.exists():
        table = calibrate(source, [{model.input: sample[None]} for sample in model.samples()])
        convert_fp16(source, half, keep_fp32=set(overflowing(source, table)))  # as a recipe without calibration data
    return half / "model.onnx"


def _reference(model: Model, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What a model gives in ONNX Runtime, which computes it as it is written, and fuses nothing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {model.input: feed(model)}), strict=True))


def feed(model: Model) -> np.ndarray[Any, Any]:
    """One sample, with the batch in front. Clean text saturates the softmax of PP-OCR's classifier, and any comparison
    would succeed: it gets faint text in noise."""
    sample = model.feed()
    if model.name != "ppocr-cls":
        return sample
    noise = np.random.default_rng(0).normal(size=sample.shape)
    return (0.2 * sample + 0.8 * noise).astype(np.float32)


def judged(expected: Mapping[str, Any], got: Mapping[str, Any]) -> Result:
    """The worst of all outputs; the largest error as a share of the output's largest magnitude."""
    found = [(compare(array, got[name]), float(np.abs(array).max())) for name, array in expected.items()]
    if faults := [each.fault for each, _ in found if each.fault]:
        return Result(reason=f"an output {faults[0]}")
    noisy = [each.sqnr_db for each, _ in found if each.sqnr_db is not None]
    return Result(
        sqnr_db=min(noisy) if noisy else None,
        identical=all(each.identical for each, _ in found),
        max_error=max(each.max_abs / max(largest, 1e-30) for each, largest in found),
    )


def _file(kept: Path, model: Model, column: tuple[str, str]) -> Path:
    return kept / f"{model.name}-{'-'.join(column)}.json"


@cache
def code_digest() -> str:
    """Of all that a result depends on: TVM's driver, what lowers, the profiles, and these scripts."""
    hasher = hashlib.sha256()
    folders = [ROOT / "modelforge" / name for name in ("compilers/tvm", "graph", "quantize")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")]
    files += [ROOT / "targets" / f"{tag}.toml" for tag, _ in COLUMNS]
    for path in sorted({*files, ROOT / "benchmarks" / "tvm_models.py", Path(__file__).parent / "make_coverage.py"}):
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def section(chosen: Sequence[Model], tags: Sequence[str], kept: Path) -> str:
    """The part of docs/coverage.md, out of the results that are kept."""
    emulator = qemu.find()
    assert emulator is not None
    rows, wrong, missing, count = [], [], [], 0
    for model in sorted(chosen, key=lambda model: model.name):
        cells = {}
        for tag, precision in columns(model, tags):
            path = _file(kept, model, (tag, precision))
            if not path.exists():
                missing.append(f"{model.name} on {tag} in {precision}")
                continue
            cells[tag, precision] = result = Result(**json.loads(path.read_text(encoding="utf-8")))
            count += 1
            if not result.is_right:
                said = result.reason or f"{result.sqnr_db:.1f} dB, at least {result.wanted_db:.1f} wanted"
                wrong.append(f"- {model.name}, {tag}, {precision}: {said}")
        own = {kind: each.itself_db for (_, kind), each in cells.items() if each.itself_db is not None}
        selves = [f"{own[kind]:.0f}" if kind in own else "" for kind in ("fp16", "int8")]
        asked = set(columns(model, tags))
        shown = [cells[each].cell() if each in cells else "not run" if each in asked else "" for each in COLUMNS]
        rows.append([model.name, *shown, *selves])
    heads = ["model", *(f"{tag} {precision}" for tag, precision in COLUMNS), "fp16 itself", "int8 itself"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])
    return f"""{HEADING}

Compiled by TVM as `modelforge build` does and run under qemu-aarch64 {emulator.version()} by the runner that ships,
with one real sample. Written by `python docs/make_arm_coverage.py`. Figures are decibels of signal to noise, the worst
of all outputs: *fp32* and *fp16* against the FP32 model in ONNX Runtime, *int8* against the quantized model (QDQ, `tvm`
dialect, all layers) in ONNX Runtime, computed as it is written. What misses what is wanted is bold:

- {FLOORS["fp32"][0]:.0f} dB for FP32. Most reach 110 and more, networks of large 3x3 convolutions 85 to 95: Winograd's
  algorithm, of which the kernels make use, adds and multiplies in another order.
- {FLOORS["fp16"][0]:.0f} dB for FP16, or {SUMS_IN_HALF:.0f} dB below what FP16 with exact sums reaches (*fp16 itself*,
  the lowered model with its rounding made explicit in ONNX Runtime), if that is less. Convolutions and products sum 32
  or so in FP16, and these sums in FP32.
- INT8 must be nearer to the quantized model than that is to FP32 (*int8 itself*): a step here and there is handed on
  to all layers behind it.

- Neoverse N1 has the FP16 arithmetic and the dot products of Cortex-A76: FP16 and INT8 are run once for both. The
  profile of Cortex-A53 offers no INT8, as it would be no faster; the code for cores without dot products is right all
  the same.
- QEMU emulates the very CPU where it can (Cortex-A53 and A72, Armv8.0), and stops at what it cannot execute.
- INT8 is empty for models that are no convolutional networks. ONNX's light models have seeded random weights in place
  of their constant fills, and give their logits: their softmax would be 1 for one class, or nearly even.

{table}

{chr(10).join(wrong) if wrong else f"All {count} that were run are within their tolerance."}
{f"{len(missing)} were not run with this code." if missing else ""}
"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    known = models()
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(model.name for model in known))
    parser.add_argument("--on", nargs="+", default=[], metavar="TAG[:PRECISION]", help="only there")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kept", action="store_true", help="run nothing; the section from results that are kept")
    parser.add_argument("--again", action="store_true", help="forget the results that are kept")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - {model.name for model in known}:
        parser.error(f"unknown: {min(unknown)}; known: {', '.join(model.name for model in known)}")
    chosen = [model for model in known if not options.models or model.name in options.models]
    kept = WORK / code_digest()[:16]
    if options.again:
        shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    to_run = [] if options.kept else chosen
    with ThreadPoolExecutor(options.jobs) as pool:
        for running in as_completed([pool.submit(_told, model, options.on, kept) for model in to_run]):
            running.result()
    text = section(chosen, options.on, kept)
    print(f"\n{text}\n{(time.monotonic() - begun) / 60:.1f} minutes")
    if not options.models and not options.on:
        put_section(HEADING, text)
    return int("**" in text)


def _told(model: Model, tags: Sequence[str], kept: Path) -> None:
    for (tag, precision), result in run_model(model, tags, kept):
        error = "" if result.max_error is None else f", max error {result.max_error:.1e}"
        print(
            f"{model.name:14}{tag:12}{precision:5} {result.cell():>9}{error}, compiled in "
            f"{result.compiled_s} s, ran {result.ran_s} s {result.reason}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
