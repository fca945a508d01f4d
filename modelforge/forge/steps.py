"""What each step does. Every function takes a :class:`~modelforge.forge.step.Context` and gives a Result.

Heavy work (graph surgery, vendor compilers, running models) happens in child processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelforge.compilers import get_compiler
from modelforge.compilers.protocol import CompileJob, RunJob
from modelforge.errors import BuildError
from modelforge.forge.step import Context, Result
from modelforge.recipe import Dim
from modelforge.target import load_target
from modelforge.toolchains import worker

GOLDEN_SAMPLES = 4

CODE_VERSIONS = {"prepare": 1, "reference": 1, "baseline": 1, "lower": 1, "compile": 1, "verify": 1}
"""Part of each step's content key: raised whenever a function gives another result for the same inputs."""


def prepare(context: Context) -> Result:
    """Model -> the FP32 model that everything is lowered from. Params: model (file
    name), inputs, sizes (of symbols, to run it with), timeout."""
    out = context.workdir / "prepared"
    request = {
        "model": str(context.folder("model") / context.params["model"]),
        "folder": str(out),
        "inputs": context.params["inputs"],
        "sizes": context.params["sizes"],
    }
    facts = worker.call(
        "modelforge.forge.worker:prepare",
        request,
        workdir=context.workdir / "prepare",
        timeout=context.params["timeout"],
        what="preparing the model",
    )
    return Result(facts, _files_in(out))


def reference(context: Context) -> Result:
    """Run the user's own FP32 model in ONNX Runtime on the evaluation data. Params: model, batch, timeout."""
    outputs = context.workdir / "outputs.npz"
    _run_onnx(context.folder("model") / context.params["model"], context, outputs, "the FP32 reference")
    return Result({}, {"outputs.npz": outputs})


def baseline(context: Context) -> Result:
    """Check that the FP32 reference meets the user's metric. Params: rules, metric, golden."""
    out = context.workdir / "golden"
    out.mkdir()
    request = {
        "samples": str(context.files("samples")["samples.npz"]),
        "reference": str(context.files("reference")["outputs.npz"]),
        "metric": _metric(context),
        "folder": str(out),
        "golden": GOLDEN_SAMPLES,
    }
    facts = worker.call(
        "modelforge.forge.worker:baseline",
        request,
        workdir=context.workdir / "baseline",
        timeout=context.params["timeout"],
        what="checking the FP32 baseline",
    )
    return Result(facts, _files_in(out))


def lower(context: Context) -> Result:
    """Prepared model -> the lowered model at one precision. Params: precision, timeout."""
    out = context.workdir / "lowered"
    request = {
        "model": str(context.folder("prepared") / "model.onnx"),
        "folder": str(out),
        "precision": context.params["precision"],
    }
    facts = worker.call(
        "modelforge.forge.worker:lower",
        request,
        workdir=context.workdir / "lower",
        timeout=context.params["timeout"],
        what=f"lowering to {context.params['precision']}",
    )
    return Result(facts, _files_in(out))


def compile(context: Context) -> Result:
    """Lowered model -> artifact. Params: compiler, target (profile text), precision, inputs, dims, timeout."""
    params = context.params
    compiler = get_compiler(params["compiler"])
    workdir = context.workdir / "compile"
    workdir.mkdir()
    job = CompileJob(
        model=context.folder("lowered") / "model.onnx",
        target=_target(context),
        precision=params["precision"],
        inputs={name: tuple(shape) for name, shape in params["inputs"].items()},
        dims={symbol: Dim.model_validate(dim) for symbol, dim in params["dims"].items()},
        workdir=workdir,
        timeout=params["timeout"],
    )
    compiled = compiler.compile(job)
    for name, path in compiled.files.items():
        if not path.is_file() or path.stat().st_size == 0:
            raise BuildError(f"{compiler.title} said it was done, and {name} is not there or empty")
    facts = {
        "artifact": compiled.artifact,
        "commands": [list(command) for command in compiled.commands],
        "requires": compiled.requires,
        "notes": list(compiled.notes),
        "report": dict(compiled.report),
    }
    return Result(facts, {**compiled.files, **_log(workdir, context)})


def _log(workdir: Path, context: Context) -> dict[str, Path]:
    """The compiler's log, with the places of this machine taken out; nothing where it said nothing."""
    log = workdir / "worker.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    places = {str(context.workdir): "WORK", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON", str(Path.home()): "HOME"}
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    if not text.strip():
        return {}
    path = context.workdir / "compile.log"
    path.write_text(text, encoding="utf-8")
    return {"compile.log": path}


def verify(context: Context) -> Result:
    """Run the artifact with the best evidence this machine gives, and judge it.

    Params: compiler, target, precision, evidence, batch, samples, metric, timeout. Evidence ``reference`` means that
    the artifact cannot run here: the lowered model, exactly what the compiler got, runs in ONNX Runtime instead.
    """
    params = context.params
    outputs = context.workdir / "outputs.npz"
    ran: dict[str, Any] = {"evidence": params["evidence"], "notes": [], "latency": {}}
    samples = context.files("samples")["samples.npz"]
    if params["evidence"] == "reference":
        model = context.folder("lowered") / "model.onnx"
        _run_onnx(model, context, outputs, f"the {params['precision']} model in ONNX Runtime", params["samples"])
    else:
        workdir = context.workdir / "run"
        workdir.mkdir()
        compiled = context.facts("compiled")
        job = RunJob(
            files={name: context.folder("compiled") / name for name in context.files("compiled")},
            artifact=compiled["artifact"],
            target=_target(context),
            inputs=_subset(samples, params["samples"], context),
            batch=params["batch"],
            outputs=outputs,
            workdir=workdir,
            timeout=params["timeout"],
        )
        result = get_compiler(params["compiler"]).run(job)
        ran = {"evidence": result.evidence, "notes": list(result.notes), "latency": dict(result.latency)}
    request = {
        "samples": str(samples),
        "reference": str(context.files("reference")["outputs.npz"]),
        "value": str(outputs),
        "metric": _metric(context),
        "precision": params["precision"],
        "count": params["samples"],
    }
    verdict = worker.call(
        "modelforge.forge.worker:judge",
        request,
        workdir=context.workdir / "judge",
        timeout=params["timeout"],
        what="judging the outputs",
    )
    return Result({**ran, "accuracy": verdict})


def _metric(context: Context) -> dict[str, Any]:
    """The metric's facts, with the folder of the user's own metric module where there is one."""
    has_module = "metric" in context.needs
    return {**context.params["metric"], "folder": str(context.folder("metric") if has_module else context.workdir)}


def _target(context: Context) -> Any:
    """The profile travels with the task: another machine may have other target folders."""
    path = context.workdir / f"{context.params['tag']}.toml"
    if not path.exists():
        path.write_text(context.params["target"], encoding="utf-8")
    return load_target(path)


def _run_onnx(model: Path, context: Context, outputs: Path, what: str, count: int | None = None) -> None:
    samples = context.files("samples")["samples.npz"]
    request = {
        "model": str(model),
        "inputs": str(_subset(samples, count, context)),
        "outputs": str(outputs),
        "batch": context.params["batch"],
        "threads": 1,
    }
    worker.call(
        "modelforge.compilers.onnxruntime_worker:run_model",
        request,
        workdir=context.workdir / "onnxruntime",
        timeout=context.params["timeout"],
        what=f"running {what}",
    )


def _subset(samples: Path, count: int | None, context: Context) -> Path:
    """The inputs alone (no labels), the first ``count`` samples of them."""
    out = context.workdir / "inputs.npz"
    worker.call(
        "modelforge.forge.worker:subset",
        {"samples": str(samples), "count": count, "out": str(out)},
        workdir=context.workdir / "subset",
        timeout=context.params["timeout"],
        what="reading the samples",
    )
    return out


def _files_in(folder: Path) -> Mapping[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
