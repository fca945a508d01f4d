"""Make the FP32 canonical model that everything is lowered from: one form, whichever exporter wrote the model.

Every change is checked against the original in ONNX Runtime; what differs is left out and said so. Runs onnxsim,
which may crash: the forge calls this in a child process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir

from modelforge.errors import BuildError
from modelforge.graph.compare import Difference, Sample, compare, reference_samples
from modelforge.graph.load import INLINE_BYTES, load, save
from modelforge.graph.passes import (
    FoldBatchNormalization,
    InferShapes,
    LiftConstants,
    RemoveDeadNodes,
    RemoveIdentities,
    RemoveInitializerInputs,
    RemoveUnusedOpsets,
    SetInputShapes,
    UniqueNames,
    run_passes,
)
from modelforge.graph.passes.input_shapes import read_shape
from modelforge.graph.shapes import Shape
from modelforge.graph.simplify import simplify

LOWEST_OPSET = 13
"""The first with per-channel QuantizeLinear."""
OPSETS = (17, 13)
"""What an older model is raised to, the first that works."""


@dataclass(frozen=True)
class PrepareReport:
    """What preparation did; JSON-able by ``dataclasses.asdict``.

    Attributes:
        passes: of each graph pass, whether it changed the model.
        input_shapes: ``kept``, or ``discarded: reason`` where ONNX Runtime refuses the model with the recipe's sizes
            written into it, as it does where a branch that is never taken at these sizes cannot have them; the inputs
            are as open then as they came.
        simplify: ``kept``, or ``discarded: reason``.
        opset: the standard domain's version in the result, 0 where it uses no standard operator.
        opset_raised: ``no``, ``from N``, or ``discarded: reason``.
        max_abs_diff: largest absolute difference of any output, prepared against original, on random inputs.
        sizes: the sizes that the open dimensions had in that comparison, one entry a sample.
        values: of the inputs that choose the branch of an If, in that comparison, one entry a sample; a branch that is
            not met there is as it was written, but for what onnxsim may have made of it unseen.
        nodes_before, nodes_after: nodes of the graph and its bodies.
    """

    passes: Mapping[str, bool]
    input_shapes: str
    simplify: str
    opset: int
    opset_raised: str
    max_abs_diff: float
    sizes: tuple[Mapping[str, int], ...]
    values: tuple[Mapping[str, int], ...]
    nodes_before: int
    nodes_after: int


def prepare(
    model: Path, folder: Path, inputs: Mapping[str, Shape], *, sizes: Mapping[str, int] | None = None
) -> PrepareReport:
    """Write ``folder/model.onnx``: the model with the recipe's input shapes, in canonical FP32 form.

    Args:
        inputs: shape by input name; an int, a symbol, or ``"?"``. Inputs that are not named keep their shape.
        sizes: sizes of symbols at which the model is known to run; the others are tried from common ones.

    Raises:
        ModelError: ``inputs`` does not fit the model, or the model does not run in ONNX Runtime.
        BuildError: a graph pass failed, or changed what the model computes.
    """
    model, folder = Path(model), Path(folder)
    where = str(model)
    folder.mkdir(parents=True, exist_ok=True)
    graph = load(model)
    nodes_before = count_nodes(graph)
    passes = run_passes(graph, [RemoveInitializerInputs(), SetInputShapes(inputs, where), *_tidy()], where)
    shapes = {str(value.name): read_shape(value) or () for value in graph.graph.inputs if value.shape is not None}
    samples = reference_samples(model, shapes, sizes or {}, where)
    input_shapes = "kept"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".prepare-") as temporary:
        work = Path(temporary)
        current = save(graph, work, "tidy.onnx")[0]
        difference = compare(current, samples)
        if difference.reason and passes["SetInputShapes"]:
            open_graph = load(model)
            passes = run_passes(open_graph, [RemoveInitializerInputs(), *_tidy()], where) | {"SetInputShapes": False}
            current = save(open_graph, work, "tidy.onnx")[0]
            # It is compared at sizes of its own as well: there, other branches run.
            samples += reference_samples(model, {}, {}, where)
            input_shapes, difference = f"discarded: {difference.reason}", compare(current, samples)
        if difference.reason:
            raise BuildError(
                f"the graph passes change what the model computes: {difference.reason}",
                where=where,
                fix="this is a fault of ModelForge: report it with the model, or with the export that gives it",
            )
        current, opset_raised = _raise_opset(current, work, samples)
        current, verdict = simplify_checked(current, work, samples)
        graph = load(current)
        for name, changed in run_passes(graph, [RemoveUnusedOpsets(), UniqueNames(), InferShapes()], where).items():
            passes[name] = changed or passes.get(name, False)
        final = save(graph, work)
        difference = compare(final[0], samples)
        if difference.reason:
            raise BuildError(f"the prepared model is not the original: {difference.reason}", where=where)
        for file in reversed(final):  # the model last: it is what says that its data is complete
            shutil.move(file, folder / file.name)
    return PrepareReport(
        passes=passes,
        input_shapes=input_shapes,
        simplify=verdict,
        opset=graph.opset_imports.get("", 0),
        opset_raised=opset_raised,
        max_abs_diff=difference.max_abs,
        sizes=tuple(sample.sizes for sample in samples),
        values=tuple(sample.values for sample in samples),
        nodes_before=nodes_before,
        nodes_after=count_nodes(graph),
    )


def simplify_checked(model: Path, work: Path, samples: list[Sample]) -> tuple[Path, str]:
    """Simplify into ``work`` and keep the result only where it is right.

    Returns:
        the model to go on with, and the verdict: ``kept``, or ``discarded: reason``.
    """
    if sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*")) > INLINE_BYTES:
        return model, "discarded: the model is too large for onnxsim (2 GiB protobuf)"
    raw = work / "simplified-raw.onnx"
    try:
        simplify(model, raw)
        graph = load(raw)
        run_passes(graph, _tidy(), str(model))
        simplified = save(graph, work, "simplified.onnx")[0]
    except Exception as error:  # onnxsim raises what its C++ raises; the unsimplified model is as good
        return model, f"discarded: {' '.join(str(error).split())[:300] or type(error).__name__}"
    finally:
        raw.unlink(missing_ok=True)
    difference = _same_signature(load(model), graph)
    if not difference.reason:
        difference = compare(simplified, samples)
    if difference.reason:
        return model, f"discarded: {difference.reason}"
    return simplified, "kept"


def count_nodes(model: onnx_ir.Model) -> int:
    """Nodes of the graph and its bodies."""
    return sum(1 for _ in onnx_ir.traversal.RecursiveGraphIterator(model.graph))


def _tidy() -> list[onnx_ir.passes.PassBase]:
    return [
        LiftConstants(),
        RemoveIdentities(),
        FoldBatchNormalization(),
        RemoveDeadNodes(),
        RemoveUnusedOpsets(),
        UniqueNames(),
    ]


def _same_signature(before: onnx_ir.Model, after: onnx_ir.Model) -> Difference:
    """Names, types and input shapes must be as they were: a simplifier may not make a dynamic dimension fixed."""
    for kind in ("inputs", "outputs"):
        old, new = getattr(before.graph, kind), getattr(after.graph, kind)
        if [(value.name, value.dtype) for value in old] != [(value.name, value.dtype) for value in new]:
            return Difference(float("inf"), f"{kind} have other names or types")
    for old, new in zip(before.graph.inputs, after.graph.inputs, strict=True):
        if read_shape(old) != read_shape(new):
            return Difference(float("inf"), f"input {old.name!r} has another shape: {read_shape(new)}")
    for old, new in zip(before.graph.outputs, after.graph.outputs, strict=True):
        # The first dimension is the batch: where it was open, a fixed one is a lost batch.
        was, now = read_shape(old), read_shape(new)
        if was and now and isinstance(was[0], str) and isinstance(now[0], int) and _any_open(before):
            return Difference(float("inf"), f"output {old.name!r} lost a dynamic dimension: {now}")
    return Difference(0.0)


def _any_open(model: onnx_ir.Model) -> bool:
    shapes = [read_shape(value) for value in model.graph.inputs]
    return any(shape and isinstance(shape[0], str) for shape in shapes)


def _raise_opset(model: Path, work: Path, samples: list[Sample]) -> tuple[Path, str]:
    """Convert to a newer opset where the model's is below :data:`LOWEST_OPSET`; keep the model where that fails."""
    opset = load(model).opset_imports.get("", LOWEST_OPSET)
    if opset >= LOWEST_OPSET:
        return model, "no"
    if sum(file.stat().st_size for file in model.parent.glob(f"{model.name}*")) > INLINE_BYTES:
        return model, "discarded: the model is too large for onnx.version_converter (2 GiB protobuf)"
    from onnx import version_converter

    reason = ""
    for target in OPSETS:
        raised = work / f"opset{target}.onnx"
        try:
            converted = version_converter.convert_version(onnx.load(model), target)
            raised.write_bytes(converted.SerializeToString(deterministic=True))
            graph = load(raised)
            run_passes(graph, _tidy(), str(model))
            save(graph, work, raised.name)
        except Exception as error:  # its C++ raises RuntimeError and others; the next target may do
            reason = reason or " ".join(str(error).split())[:300]
            continue
        difference = _same_signature(load(model), graph)
        if not difference.reason:
            difference = compare(raised, samples)
        if not difference.reason:
            return raised, f"from {opset}"
        reason = reason or difference.reason
    return model, f"discarded: {reason}"
