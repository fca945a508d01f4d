"""What each step does. Every function takes a :class:`~modelforge.forge.step.Context` and gives a Result.

Heavy work (graph surgery, vendor compilers, running models) happens in child processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelforge.compilers import get_compiler
from modelforge.compilers.protocol import CompileJob, RunJob, Tuner
from modelforge.errors import UnsupportedError
from modelforge.forge.compiling import compile_model
from modelforge.forge.step import Context, Result
from modelforge.options import PreprocessSection
from modelforge.recipe import Dim
from modelforge.target import Target, load_target
from modelforge.toolchains import worker

GOLDEN_SAMPLES = 4

CODE_VERSIONS = {
    "prepare": 3, "reference": 1, "baseline": 1, "calibrate": 3, "rank": 4, "search": 5, "lower": 10, "tune": 1,
    "compile": 2, "verify": 5, "describe": 1, "race": 1, "estimate": 1,
    "placement": 2,
}  # fmt: skip
"""Part of each step's content key: raised whenever a function gives another result for the same inputs."""


EMULATED_HALF = "FP16 was emulated: every FP16 tensor rounded, sums within one operator in FP32"


def prepare(context: Context) -> Result:
    """Model -> the FP32 model that everything is lowered from.

    Params: model (file name), inputs, sizes (of symbols, to run it with), timeout.
    """
    out = context.workdir / "prepared"
    request = {
        "model": str(context.folder("model") / context.params["model"]),
        "folder": str(out),
        "inputs": context.params["inputs"],
        "sizes": context.params["sizes"],
    }
    facts = call("prepare", request, context, "preparing the model")
    return Result(facts, files_in(out))


def reference(context: Context) -> Result:
    """Run the user's own FP32 model in ONNX Runtime on the evaluation data. Params: model, batch, timeout."""
    outputs = context.workdir / "outputs.npz"
    inputs = _subset(context.files("samples")["samples.npz"], None, context)
    _run_onnx(context.folder("model") / context.params["model"], inputs, context, outputs, "the FP32 reference")
    return Result({}, {"outputs.npz": outputs})


def baseline(context: Context) -> Result:
    """Check that the FP32 reference meets the user's metric. Params: rules, metric, golden."""
    out = context.workdir / "golden"
    out.mkdir()
    request = {
        "samples": str(context.files("samples")["samples.npz"]),
        "reference": str(context.files("reference")["outputs.npz"]),
        "metric": metric(context),
        "folder": str(out),
        "golden": GOLDEN_SAMPLES,
    }
    facts = call("baseline", request, context, "checking the FP32 baseline")
    return Result(facts, files_in(out))


def calibrate(context: Context) -> Result:
    """Calibration data -> ranges.json, one table for all dialects. Params: data_digest, timeout."""
    ranges = context.workdir / "ranges.json"
    request = {
        "model": str(context.folder("prepared") / "model.onnx"),
        "samples": str(context.files("calibration")["samples.npz"]),
        "data_digest": context.params["data_digest"],
        "out": str(ranges),
    }
    facts = call("calibrate", request, context, "calibrating")
    return Result(facts, {"ranges.json": ranges})


def rank(context: Context) -> Result:
    """How much each layer loses by INT8, in one pass. Params: dialect, reduce_range, method,
    timeout. Facts: ranking, worst first; blocks, names that stay in float together."""
    request = {
        "model": str(context.folder("prepared") / "model.onnx"),
        "ranges": str(context.files("ranges")["ranges.json"]),
        "samples": str(context.files("calibration")["samples.npz"]),
        **_how(context),
    }
    return Result(call("rank", request, context, "ranking the layers"))


def search(context: Context) -> Result:
    """The fewest layers that must stay in float for the gate. Params: dialect, reduce_range, batch, metric, timeout.

    ``onward``, of a stage: stages after it (name, tensors), outputs ([name, stage]), own (its name), metric of the
    whole; its needs are ``onward-STAGE``, ``from-STAGE``, ``whole-samples`` and ``whole-reference``.
    Facts: curve, chosen (how many, or None), exclude (their names), worst.
    """
    request = {
        "model": str(context.folder("prepared") / "model.onnx"),
        "ranges": str(context.files("ranges")["ranges.json"]),
        "samples": str(context.files("samples")["samples.npz"]),
        "reference": str(context.files("reference")["outputs.npz"]),
        "blocks": context.facts("ranking")["blocks"],
        "metric": metric(context),
        "folder": str(context.workdir / "search"),
        "batch": context.params["batch"],
        **_how(context),
    }
    if "onward" in context.params:
        request["onward"] = _onward(context)
    return Result(call("search", request, context, "searching the layers to keep"))


def lower(context: Context) -> Result:
    """Prepared model -> the lowered model at one precision. Params: precision, timeout; dialect, reduce_range."""
    out = context.workdir / "lowered"
    request = {
        "model": str(context.folder("prepared") / "model.onnx"),
        "folder": str(out),
        "precision": context.params["precision"],
    }
    if "half_ranges" in context.needs:
        request["half_ranges"] = str(context.files("half_ranges")["ranges.json"])
        if "calibration" in context.needs:
            request["samples"] = str(context.files("calibration")["samples.npz"])
        request["floor_db"] = context.params.get("floor_db")
    if "ranges" in context.needs:
        request |= {
            "ranges": str(context.files("ranges")["ranges.json"]),
            "exclude": _excluded(context) if "search" in context.needs else [],
            "samples": str(context.files("calibration")["samples.npz"]) if "calibration" in context.needs else None,
            **_how(context),
        }
    facts = call("lower", request, context, f"lowering to {context.params['precision']}")
    return Result(facts, files_in(out))


def compile(context: Context) -> Result:
    """Lowered model -> artifact.

    Params: compiler, target (profile text), precision, inputs, dims, options, preprocess, timeout.
    """
    compiler = get_compiler(context.params["compiler"])
    facts, files = compile_model(compiler, _job(context, "compile"), {str(context.workdir): "WORK"})
    return Result(facts, files)


def _job(context: Context, folder: str) -> CompileJob:
    params = context.params
    workdir = context.workdir / folder
    workdir.mkdir()
    return CompileJob(
        model=context.folder("lowered") / "model.onnx",
        target=target_of(context.params, context.workdir),
        precision=params["precision"],
        inputs={name: tuple(shape) for name, shape in params["inputs"].items()},
        dims={symbol: Dim.model_validate(dim) for symbol, dim in params["dims"].items()},
        workdir=workdir,
        timeout=params["timeout"],
        options={**params.get("options", {}), **_own_files(context)},
        preprocess={
            name: PreprocessSection.model_validate(each) for name, each in params.get("preprocess", {}).items()
        },
        calibration=_calibration(context),
    )


def _calibration(context: Context) -> Path | None:
    """The samples, where the compiler makes INT8 itself."""
    return context.files("calibration")["samples.npz"] if "calibration" in context.needs else None


def _own_files(context: Context) -> dict[str, str]:
    """Options that name a file of the user's own, as paths."""
    own = {need.removeprefix("own-"): need for need in context.needs if need.startswith("own-")}
    return {option: str(context.folder(need) / next(iter(context.files(need)))) for option, need in own.items()}


def tune(context: Context) -> Result:
    """Lowered model -> tuning.json. Params: those of :func:`compile`; on, what is measured."""
    compiler = get_compiler(context.params["compiler"])
    if not isinstance(compiler, Tuner):
        raise UnsupportedError(f"{compiler.title} cannot be tuned")
    tuned = compiler.tune(_job(context, "tune"))
    return Result(tuned.facts, {tuned.database.name: tuned.database})


def verify(context: Context) -> Result:
    """Run the artifact with the best evidence this machine gives, and judge it.

    Params: compiler, target, precision, evidence, batch, samples, metric, timed, timeout. Evidence ``reference`` means
    that the artifact cannot run here: the lowered model, exactly what the compiler got, runs in ONNX Runtime instead.
    """
    params = context.params
    outputs = context.workdir / "outputs.npz"
    ran: dict[str, Any] = {"evidence": params["evidence"], "notes": [], "latency": {}}
    files: Mapping[str, Path] = {}
    samples = context.files("samples")["samples.npz"]
    if params["evidence"] == "reference" and not params.get("own"):
        model = context.folder("lowered") / "model.onnx"
        inputs = _subset(samples, params["samples"], context)
        ran["notes"] = run_lowered(model, inputs, outputs, context.workdir, context)
    else:
        workdir = context.workdir / "run"
        workdir.mkdir()
        compiled = context.facts("compiled")
        job = RunJob(
            files={
                name: context.folder(need) / name for need in ("lowered", "compiled") for name in context.files(need)
            },
            artifact=compiled["artifact"],
            target=target_of(context.params, context.workdir),
            inputs=_subset(samples, params["samples"], context),
            batch=params["batch"],
            outputs=outputs,
            workdir=workdir,
            timeout=params["timeout"],
            timed=tuple(params.get("timed", ())),
            calibration=_calibration(context),
        )
        result = get_compiler(params["compiler"]).run(job)
        ran = {"evidence": result.evidence, "notes": list(result.notes), "latency": dict(result.latency)}
        ran |= {"own": True} if params.get("own") else {}
        files = result.files
    request = {
        "samples": str(samples),
        "reference": str(context.files("reference")["outputs.npz"]),
        "value": str(outputs),
        "metric": metric(context),
        "precision": params["precision"],
        "count": params["samples"],
        "models": [str(context.files("lowered")["model.onnx"])],
    }
    verdict = call("judge", request, context, "judging the outputs")
    return Result({**ran, "accuracy": verdict}, files)


def _onward(context: Context) -> dict[str, Any]:
    """What follows the stage, by path."""
    asked = context.params["onward"]
    outputs = {
        need.removeprefix("from-"): str(context.files(need)["outputs.npz"])
        for need in context.needs
        if need.startswith("from-")
    }
    samples = str(context.files("whole-samples")["samples.npz"])
    stages = [
        {**each, "model": str(context.folder(f"onward-{each['name']}") / "model.onnx")} for each in asked["stages"]
    ]
    return {
        "stages": stages,
        "outputs": dict(asked["outputs"]),
        "own": asked["own"],
        "archives": {**outputs, "input": samples},
        "samples": samples,
        "reference": str(context.files("whole-reference")["outputs.npz"]),
        "metric": {**metric(context), **asked["metric"]},
    }


def _how(context: Context) -> dict[str, Any]:
    """How to quantize: parameters that go down to the emitter as they are."""
    return {name: context.params[name] for name in ("dialect", "reduce_range", "method")}


def _excluded(context: Context) -> list[str]:
    """The layers that a search chose to keep in float.

    Raises:
        UnsupportedError: no set that it tried met the gate.
    """
    found = context.facts("search")
    if found["chosen"] is None:
        raise UnsupportedError(
            f"no set of layers kept in float met the gate ({len(found['curve'])} tried); "
            f"the layers that lose most: {', '.join(found['worst'][:3])}"
        )
    if found["chosen"] == 0:
        raise UnsupportedError("no layer needs to stay in float: the int8 rung is the same")
    return list(found["exclude"])


def call(function: str, request: Mapping[str, Any], context: Context, what: str) -> dict[str, Any]:
    """Run a function of :mod:`modelforge.forge.worker` in a child process."""
    return worker.call(
        f"modelforge.forge.worker:{function}",
        request,
        workdir=context.workdir / "child",
        timeout=context.params["timeout"],
        what=what,
    )


def metric(context: Context) -> dict[str, Any]:
    """The metric's facts, with the folder of the user's own metric module where there is one."""
    has_module = "metric" in context.needs
    return {**context.params["metric"], "folder": str(context.folder("metric") if has_module else context.workdir)}


def race(context: Context) -> Result:
    """Time an artifact beside the next float rung's. Params: compiler, tag, target, precision, rival, batch, timeout.

    Facts: evidence and medians in milliseconds; evidence ``none`` where the compiler cannot time them here.
    """
    params = context.params
    workdir = context.workdir / "race"
    workdir.mkdir()
    inputs = _subset(context.files("samples")["samples.npz"], params["batch"], context)
    jobs = [
        RunJob(
            files={name: context.folder(need) / name for name in context.files(need)},
            artifact=context.facts(need)["artifact"],
            target=target_of(context.params, context.workdir),
            inputs=inputs,
            batch=params["batch"],
            outputs=context.workdir / "outputs.npz",
            workdir=workdir,
            timeout=params["timeout"],
        )
        for need in ("compiled", "rival")
    ]
    timed = get_compiler(params["compiler"]).race(*jobs)
    if timed is None:
        return Result({"evidence": "none"})
    ours, rival = timed
    facts = {"evidence": "device", "p50_ms": ours, "batch": params["batch"], "threads": 1}
    return Result({**facts, "rival": {"precision": params["rival"], "p50_ms": rival}, "ratio": round(ours / rival, 3)})


def estimate(context: Context) -> Result:
    """What a roofline of the target's profile says of the latency. Params: compiler, tag, target, precision, batches,
    inputs, timeout. Facts: by_batch (milliseconds), empty where the profile knows no rate; method."""
    target_of(context.params, context.workdir)
    request = {
        "model": str(context.folder("prepared") / "model.onnx"),
        "target": str(context.workdir / f"{context.params['tag']}.toml"),
        **{name: context.params[name] for name in ("compiler", "precision", "batches", "inputs")},
    }
    return Result(call("estimate", request, context, "estimating the latency"))


def placement(context: Context) -> Result:
    """The model beside every target profile. Params: model, inputs, targets (profile texts), budget_ms, timeout."""
    params = context.params
    request = {
        "model": str(context.folder("model") / params["model"]),
        **{name: params[name] for name in ("inputs", "targets", "budget_ms")},
    }
    return Result(call("placement", request, context, "estimating where the model can run"))


def describe(context: Context) -> Result:
    """What the reports say of a quantization: calibration.json, sensitivity.json. Params: dialect, metric, timeout."""
    out = context.workdir / "described"
    out.mkdir()
    request = {
        "ranges": str(context.files("ranges")["ranges.json"]),
        "quantize": context.facts("lowered")["quantize"],
        "ranking": context.facts("ranking")["ranking"],
        "search": dict(context.facts("search")) if "search" in context.needs else None,
        "dialect": context.params["dialect"],
        "metric": context.params["metric"],
        "folder": str(out),
    }
    return Result(call("describe", request, context, "describing the quantization"), files_in(out))


def target_of(profile: Mapping[str, Any], folder: Path) -> Target:
    """The profile (tag and TOML text) travels with the task: another machine may have other target folders."""
    path = folder / f"{profile['tag']}.toml"
    if not path.exists():
        path.write_text(profile["target"], encoding="utf-8")
    return load_target(path)


def run_lowered(model: Path, inputs: Path, outputs: Path, folder: Path, context: Context) -> list[str]:
    """Run a lowered model in ONNX Runtime, as its hardware would round; gives notes on what was emulated."""
    places = {"model": str(model), "folder": str(folder / "emulated")}
    answer = call("emulate", places, context, "making FP16 rounding explicit")
    emulated = answer["model"]
    _run_onnx(Path(emulated or model), inputs, context, outputs, "the lowered model in ONNX Runtime")
    return [answer.get("note", EMULATED_HALF)] if emulated else []


def _run_onnx(model: Path, inputs: Path, context: Context, outputs: Path, what: str) -> None:
    request = {
        "model": str(model),
        "inputs": str(inputs),
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
    call("subset", {"samples": str(samples), "count": count, "out": str(out)}, context, "reading the samples")
    return out


def files_in(folder: Path) -> Mapping[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
