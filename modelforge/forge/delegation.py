"""How much of a model runs on an NPU and how much on the CPU beside it, and what the handing over costs.

What really runs where, the vendor's compiler tells with its build; it stands as ``delegation`` in the variant record.
Before that, and for the CPU's own stages, operators are the model's, before any fusion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modelforge.forge.efficiency import factor_for, machine_for
from modelforge.forge.partition import CPU_COMPILER, is_npu
from modelforge.graph.roofline import layer_seconds
from modelforge.graph.split_graph import Layer, LayerGraph, read_layers
from modelforge.graph.split_plan import SplitPlan, StagePlan

if TYPE_CHECKING:
    from modelforge.forge.plan import Plan, VariantPlan
    from modelforge.store import Store
    from modelforge.target import Target

HANDOVER = 200e-6
"""Seconds to give work to another processor and to be told that it is done. An estimate: no vendor publishes it."""
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_PLANNED = "the plan: operators of the model as it came, before any fusion"


def planned_delegation(plan: Plan, variant: VariantPlan) -> dict[str, Any] | None:
    """What a variant's stage has of operators and MACs, all of it where its compiler builds for.

    The shape is that of :class:`modelforge.bundle.record.Delegation`. None where no CPU stands beside the target.
    """
    split = plan.partitions.get(variant.target.tag)
    if split is None and (variant.target.host is None or variant.compiler in (None, CPU_COMPILER)):
        return None
    split = split or plan.split
    if split is None:
        sizes = {symbol: dim.usual for symbol, dim in plan.recipe.dims.items()}
        return _counted(read_layers(plan.recipe.model, sizes, plan.intake.inputs).layers, on_npu=True)
    stage = next(each for each in split.plan.stages if each.name == variant.stage)
    return _counted(_layers(stage, split.planned.graph), on_npu=variant.compiler != CPU_COMPILER)


def known_delegation(plan: Plan, variant: VariantPlan, store: Store) -> dict[str, Any] | None:
    """What the compiler told of the best rung that the cache has; else :func:`planned_delegation`."""
    for rung in variant.rungs:
        record = store.read(rung.compile.key) if rung.compile else None
        if record is not None and (told := record.facts["report"].get("delegation")):
            return dict(told)
    return planned_delegation(plan, variant)


def together(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Of all variants of a chain; None where one of them told nothing."""
    if not parts or any(part is None for part in parts):
        return None
    told = [part for part in parts if part is not None]
    sums: dict[str, Any] = {}
    for kind in ("operators", "macs"):
        counts = [part[kind] for part in told]
        whole: Counter[str] = Counter()
        for count in counts:
            whole.update(count or {})
        sums[kind] = (
            None if None in counts else {place: whole[place] for place in dict.fromkeys(("npu", "cpu", *whole))}
        )
    off = [name for part in told for name in part["off_npu"]]
    return {**sums, "off_npu": off, "source": "; ".join(dict.fromkeys(part["source"] for part in told))}


def crossing_costs(
    plan: SplitPlan, graph: LayerGraph, target: Target, host: Target, precision: str
) -> list[dict[str, Any]]:
    """For each stage on the NPU, what handing its tensors over and taking them back costs, and what that saves.

    Seconds, all estimates by the roofline model. ``crossing``: each tensor written by one side and read by the other
    through their shared memory, and :data:`HANDOVER`; ``npu`` and ``cpu``: the stage's layers on either, in FP32 on
    the CPU; ``saved``: what is left of the difference. None where a profile knows no rate.
    """
    npu = _seconds(graph, target, precision, target.compilers[0])
    cpu = _seconds(graph, host, "fp32", CPU_COMPILER)
    found = []
    for stage in (each for each in plan.stages if is_npu(each.name)):
        nodes = set(stage.nodes)
        places = [place for place, layer in enumerate(graph.layers) if layer.node in nodes]
        tensors = [*stage.inputs, *stage.outputs]
        crossed = sum(tensor.bytes or 0 for tensor in tensors)
        crossing = 2 * crossed / target.memory.bandwidth + HANDOVER
        on_npu, on_cpu = (None if each is None else sum(each[place] for place in places) for each in (npu, cpu))
        saved = None if on_npu is None or on_cpu is None else on_cpu - on_npu - crossing
        figures = {"crossing": crossing, "npu": on_npu, "cpu": on_cpu, "saved": saved}
        found.append({"stage": stage.name, "tensors": len(tensors), "bytes": crossed, "seconds": figures})
    return found


def _layers(stage: StagePlan, graph: LayerGraph) -> list[Layer]:
    nodes = set(stage.nodes)
    return [layer for layer in graph.layers if layer.node in nodes]


def _counted(layers: Sequence[Layer], *, on_npu: bool) -> dict[str, Any]:
    real = [layer for layer in layers if not layer.light]
    weighted = [layer.flops for layer in real if layer.op in _WEIGHTED]
    macs = None if None in weighted else sum(each or 0 for each in weighted) // 2
    return {
        "operators": {"npu": len(real) * on_npu, "cpu": len(real) * (not on_npu)},
        "macs": None if macs is None else {"npu": macs * on_npu, "cpu": macs * (not on_npu)},
        "off_npu": [] if on_npu else [f"{layer.op} {layer.name}" for layer in real],
        "source": _PLANNED,
    }


def _seconds(graph: LayerGraph, target: Target, precision: str, compiler: str) -> list[float] | None:
    machine = machine_for(target, precision, compiler)
    if machine is None:
        return None
    factor = factor_for(target.tag, compiler, precision).value
    return [each * factor for each in layer_seconds(graph, machine)]
