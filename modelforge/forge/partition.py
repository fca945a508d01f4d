"""A target's model shared out between its NPU and the CPU beside it: what the NPU's compiler takes, and TVM the rest.

Decided at plan time. The NPU gets every operator that its compiler says nothing against, but for an output's last
Concat of parts that mean different things (a detector's boxes and scores): under one INT8 scale the small ones die.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from modelforge.compilers import get_compiler
from modelforge.compilers.protocol import Compiler
from modelforge.errors import UnsupportedError
from modelforge.forge.intake import Intake
from modelforge.graph.facts import OpFacts
from modelforge.graph.output_groups import find_output_groups
from modelforge.graph.split_graph import Layer, LayerGraph
from modelforge.recipe import TargetSection
from modelforge.target import Registry, Target

LEAST_SHARE = 0.02
"""Of all FLOPs: a part of the NPU's with less is not worth handing tensors over and back for."""
CPU_COMPILER = "tvm"


def host_of(target: Target, registry: Registry, where: str) -> Target:
    """The CPU beside the NPU, under the NPU's own tag: one device, one tag.

    Raises:
        UnsupportedError: the profile names none.
    """
    if target.host is None:
        raise UnsupportedError(
            f'the profile of "{target.tag}" names no CPU beside its NPU',
            where=where,
            fix="add `host = TAG` to it, or take `partition` out",
        )
    return replace(registry.get(target.host, where=str(target.path)), tag=target.tag)


def is_npu(stage: str) -> bool:
    """Whether a stage of a partition is the NPU's."""
    return stage.endswith("-npu")


def npu_support(intake: Intake, section: TargetSection, target: Target, graph: LayerGraph) -> Callable[[Layer], bool]:
    """Whether the NPU runs a layer."""
    compilers = [get_compiler(name) for name in target.compilers if section.compiler in (None, name)]
    known: dict[tuple[str, str], bool] = {}
    after = _after_mixed_outputs(intake.recipe.model, graph)

    def supports(layer: Layer) -> bool:
        kind = (layer.domain, layer.op)
        if kind not in known:
            known[kind] = any(_takes(compiler, intake, target, layer) for compiler in compilers)
        return known[kind] and layer.node not in after

    return supports


def _takes(compiler: Compiler, intake: Intake, target: Target, layer: Layer) -> bool:
    """Whether a compiler says nothing against an operator that it says of the model without it."""
    asked = OpFacts(layer.domain, layer.op, 1, layer.name, False)
    inputs, dims, precision = intake.inputs, intake.recipe.dims, target.precisions[0]
    without = compiler.supports(replace(intake.facts, ops=()), target, precision, inputs, dims)
    found = compiler.supports(replace(intake.facts, ops=(asked,)), target, precision, inputs, dims)
    return {each.what for each in found} <= {each.what for each in without}


def _after_mixed_outputs(model: Path, graph: LayerGraph) -> set[int]:
    """Nodes from the last Concat of parts that are not alike to the output that it makes."""
    mixed: dict[str, set[str]] = {}
    for group in find_output_groups(model):
        if not group.alike:
            mixed.setdefault(group.output, set()).add(group.name)
    found: set[int] = set()
    for output, parts in mixed.items():
        waiting = [output]
        while waiting:
            name = waiting.pop()
            if name in parts or name not in graph.producer:
                continue
            layer = graph.layers[graph.producer[name]]
            found.add(layer.node)
            waiting += layer.reads
    return found
