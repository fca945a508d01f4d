"""What the steps of a split model do: cut it, feed each stage, run the shipped chain. As the steps of ``steps``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelforge.errors import BuildError
from modelforge.forge import steps
from modelforge.forge.step import Context, Result

CODE_VERSIONS = {"split": 1, "feed": 1, "joined": 1, "transport": 1, "chain": 3}


def split(context: Context) -> Result:
    """The user's model -> one ONNX file a stage. Params: model, plan (facts of a SplitPlan), timeout."""
    out = context.workdir / "stages"
    out.mkdir()
    request = {
        "model": str(context.folder("model") / context.params["model"]),
        "plan": context.params["plan"],
        "folder": str(out),
    }
    facts = steps.call("split", request, context, "splitting the model")
    return Result(facts, steps.files_in(out))


def feed(context: Context) -> Result:
    """What a stage is fed. Params: tensors (name -> ``input``, or the stage that gives it), labels, timeout.

    Needs: samples; ``from-STAGE``: outputs of a stage before it.
    """
    out = context.workdir / "samples.npz"
    archives = {"input": context.files("samples")["samples.npz"]}
    archives |= {
        need.removeprefix("from-"): context.files(need)["outputs.npz"]
        for need in context.needs
        if need.startswith("from-")
    }
    request = {
        "archives": {name: str(path) for name, path in archives.items()},
        "tensors": context.params["tensors"],
        "labels": context.params["labels"],
        "out": str(out),
    }
    steps.call("feed", request, context, "gathering a stage's inputs")
    return Result({}, {"samples.npz": out})


def joined(context: Context) -> Result:
    """The FP32 stages, one after the other, beside the whole model. Params: outputs ([name, stage]), timeout.

    Raises:
        BuildError: the chain is not the model.
    """
    out = context.workdir / "joined.npz"
    outputs = dict(context.params["outputs"])
    archives = {source: context.files(f"from-{source}")["outputs.npz"] for source in set(outputs.values())}
    request = {
        "archives": {name: str(path) for name, path in archives.items()},
        "tensors": outputs,
        "labels": False,
        "out": str(out),
    }
    steps.call("feed", request, context, "gathering the outputs of the chain")
    asked = {"reference": str(context.files("reference")["outputs.npz"]), "value": str(out), "precision": "fp32"}
    facts = steps.call("compare_golden", asked, context, "comparing the chain with the whole model")
    if facts["reasons"]:
        raise BuildError(
            f"the chain of FP32 stages does not give what the whole model gives: {'; '.join(facts['reasons'])}",
            fix="cut at other tensors, and report this: splitting must not change a model",
        )
    return Result({name: facts[name] for name in ("sqnr_db", "identical", "cosine") if name in facts})


def transport(context: Context) -> Result:
    """How tensors cross from stage to stage. Params: kind (fp16, int8), tensors (name -> stage that reads it), timeout.

    Needs: ``ranges-STAGE``. Facts: ``tensors``: name -> dtype, and for INT8 scale and zero_point.
    """
    request = {
        "kind": context.params["kind"],
        "tensors": context.params["tensors"],
        "ranges": {
            need.removeprefix("ranges-"): str(context.files(need)["ranges.json"])
            for need in context.needs
            if need.startswith("ranges-")
        },
    }
    return Result(steps.call("transport", request, context, "choosing the scales of transport"))


def chain(context: Context) -> Result:
    """Run the shipped variants of all stages one after the other, and judge what comes out as the whole model.

    Where an emulator leaves time for some of the samples only, the lowered models run over all of them in ONNX Runtime
    first, and must meet the gate as well: few samples tell little of a metric. A chain that fails so is not emulated.

    Params: stages (in order: name, tag, target, compiler, precision, evidence, tensors: name -> ``input`` or a stage),
    outputs ([name, stage]), batch, samples, count (of all samples), precision (the coarsest of the stages'), metric,
    timeout. Needs: samples, reference, ``lowered-STAGE``, ``compiled-STAGE``, transport.
    Facts: accuracy, evidence by stage, transport; ``lowered``: the accuracy of the lowered models on all samples.
    """
    params, lowered = context.params, None
    evidence = {stage["name"]: stage["evidence"] for stage in params["stages"]}
    crossing = context.facts("transport")["tensors"] if "transport" in context.needs else {}
    if params["samples"] < params["count"]:
        lowered, _ = _judged_chain(context, dict.fromkeys(evidence, "reference"), params["count"], crossing)
        if lowered["gate"] != "passed":
            stood_in = dict.fromkeys(evidence, "reference")
            return Result({"accuracy": lowered, "evidence": stood_in, "transport": crossing})
    verdict, evidence = _judged_chain(context, evidence, params["samples"], crossing)
    facts = {"accuracy": verdict, "evidence": evidence, "transport": crossing}
    return Result(facts if lowered is None else {**facts, "lowered": lowered})


def _judged_chain(
    context: Context, evidence: Mapping[str, str], count: int, crossing: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The verdict over the first ``count`` samples, each stage run as ``evidence`` says, and the evidence it gave."""
    params = context.params
    folder = context.workdir / f"over-{count}"
    archives: dict[str, Path] = {"input": context.files("samples")["samples.npz"]}
    found: dict[str, str] = {}
    for stage in params["stages"]:
        own = folder / stage["name"]
        own.mkdir(parents=True)
        inputs, outputs = own / "inputs.npz", own / "outputs.npz"
        _gather(archives, stage["tensors"], crossing, inputs, context, count=count)
        asked = {**stage, "evidence": evidence[stage["name"]]}
        found[stage["name"]] = _run_stage(asked, inputs, outputs, own, context)
        archives[stage["name"]] = outputs
    out = folder / "outputs.npz"
    _gather(archives, dict(params["outputs"]), {}, out, context, count=count)
    request = {
        "samples": str(context.files("samples")["samples.npz"]),
        "reference": str(context.files("reference")["outputs.npz"]),
        "value": str(out),
        "metric": steps.metric(context),
        "precision": params["precision"],
        "count": count,
        "models": [str(context.files(f"lowered-{stage['name']}")["model.onnx"]) for stage in params["stages"]],
    }
    return steps.call("judge", request, context, "judging the chain"), found


def _gather(
    archives: Mapping[str, Path], tensors: Mapping[str, str], crossing: Mapping[str, Any], out: Path,
    context: Context, *, count: int,
) -> None:  # fmt: skip
    request = {
        "archives": {name: str(path) for name, path in archives.items()},
        "tensors": dict(tensors),
        "labels": False,
        "transport": {name: crossing[name] for name in tensors if name in crossing},
        "count": count,
        "out": str(out),
    }
    steps.call("feed", request, context, "handing tensors from stage to stage")


def _run_stage(stage: Mapping[str, Any], inputs: Path, outputs: Path, folder: Path, context: Context) -> str:
    """Run one stage's variant the way its own verification did; gives the evidence."""
    name = stage["name"]
    batch, timeout = context.params["batch"], context.params["timeout"]
    if stage["evidence"] == "reference":
        model = context.folder(f"lowered-{name}") / "model.onnx"
        steps.run_lowered(model, inputs, outputs, folder, context)
        return "reference"
    from modelforge.compilers import get_compiler
    from modelforge.compilers.protocol import RunJob

    (folder / "run").mkdir()
    need, samples = f"compiled-{name}", f"calibration-{name}"
    parts = (f"lowered-{name}", need)
    job = RunJob(
        files={title: context.folder(part) / title for part in parts for title in context.files(part)},
        artifact=context.facts(need)["artifact"],
        target=steps.target_of(stage, folder),
        inputs=inputs,
        batch=batch,
        outputs=outputs,
        workdir=folder / "run",
        timeout=timeout,
        calibration=context.files(samples)["samples.npz"] if samples in context.needs else None,
    )
    return get_compiler(stage["compiler"]).run(job).evidence
