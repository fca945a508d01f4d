"""What a split is, as plain values that JSON can hold, and how stages follow from giving each layer a stage.

Pure: reads a :class:`LayerGraph`, writes nothing. A stage is a part of the model that runs whole, after those before
it; what it reads from them, and only that, crosses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelforge.errors import ModelError
from modelforge.graph.split_graph import LayerGraph

INPUT = "input"
"""Where a tensor comes from that the model is given."""


@dataclass(frozen=True)
class CutTensor:
    """A tensor that a stage takes or gives.

    Attributes:
        dtype: NumPy's name.
        shape: in the model's symbols; ``"?"`` where a size has no name, None where the rank is unknown.
        bytes: at the plan's ``sizes`` and in ``dtype``; None where unknown.
        source: the stage that makes it, or :data:`INPUT`.
        readers: stages that read it from outside.
        is_output: whether it is an output of the model.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None
    bytes: int | None
    source: str
    readers: tuple[str, ...]
    is_output: bool


@dataclass(frozen=True)
class KnownValue:
    """A small tensor that is written into a stage as a constant, because it follows from the declared shapes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: tuple[Any, ...]

    def array(self) -> NDArray[Any]:
        return np.array(self.values, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        nodes: indices among the model's nodes, rising; nodes that make constants, and repeated arithmetic on shapes,
            may stand in several stages.
        known: constants to write in.
        weights: names of the initializers that it needs.
        layers: nodes that do work on data.
        flops, weight_bytes, activation_bytes: of one run at the plan's sizes, in the types of the model; the last is
            the peak while the stage runs by itself.
        seconds: as estimated or measured; None where the plan knows no time.
    """

    name: str
    nodes: tuple[int, ...]
    known: tuple[KnownValue, ...]
    weights: tuple[str, ...]
    inputs: tuple[CutTensor, ...]
    outputs: tuple[CutTensor, ...]
    layers: int
    flops: int
    weight_bytes: int
    activation_bytes: int
    seconds: float | None = None

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"


@dataclass(frozen=True)
class SplitPlan:
    """How a model is split.

    Attributes:
        method: ``at``, ``balance``, ``memory``, ``support`` or ``tiers``.
        outputs: the model's outputs in its order, each with the stage that gives it (or :data:`INPUT`).
        sizes: of open dimensions, for bytes and FLOPs.
        shapes: input shapes that were given in place of the model's own.
        duplicated: weights that several stages carry, with their bytes.
        notes: what a reader must know.
    """

    method: str
    stages: tuple[StagePlan, ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, str], ...]
    sizes: Mapping[str, int]
    shapes: Mapping[str, tuple[int | str, ...]]
    duplicated: Mapping[str, int]
    notes: tuple[str, ...] = ()

    @property
    def crossing(self) -> tuple[CutTensor, ...]:
        """Each tensor that goes from one stage to another, once."""
        return tuple(tensor for stage in self.stages for tensor in stage.outputs if tensor.readers)

    def facts(self) -> dict[str, Any]:
        """The plan as JSON; :func:`plan_from_facts` reads it back."""
        return asdict(self)


def plan_from_facts(facts: Mapping[str, Any]) -> SplitPlan:
    """What :meth:`SplitPlan.facts` gave, through JSON or not."""

    def tensor(entry: Mapping[str, Any]) -> CutTensor:
        shape = entry["shape"]
        return CutTensor(
            **{**entry, "shape": None if shape is None else tuple(shape), "readers": tuple(entry["readers"])}
        )

    def stage(entry: Mapping[str, Any]) -> StagePlan:
        changed = {
            "nodes": tuple(entry["nodes"]),
            "weights": tuple(entry["weights"]),
            "known": tuple(
                KnownValue(value["name"], value["dtype"], tuple(value["shape"]), tuple(value["values"]))
                for value in entry["known"]
            ),
            "inputs": tuple(map(tensor, entry["inputs"])),
            "outputs": tuple(map(tensor, entry["outputs"])),
        }
        return StagePlan(**{**entry, **changed})

    changed = {
        "stages": tuple(map(stage, facts["stages"])),
        "inputs": tuple(facts["inputs"]),
        "outputs": tuple((name, source) for name, source in facts["outputs"]),
        "shapes": {name: tuple(shape) for name, shape in facts["shapes"].items()},
        "notes": tuple(facts["notes"]),
    }
    return SplitPlan(**{**facts, **changed})


def assemble(
    graph: LayerGraph,
    labels: Sequence[int],
    names: Sequence[str],
    *,
    method: str,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    seconds: Sequence[Sequence[float]] | None = None,
    notes: Sequence[str] = (),
) -> SplitPlan:
    """Make stages from a label for each layer; a label that no layer has gives no stage.

    Args:
        labels: for each layer, which of ``names`` it belongs to; must not fall along any tensor.
        seconds: for each of ``names`` the time of every layer there.

    Raises:
        ModelError: a tensor would go back to an earlier stage, or cannot be the input of a stage.
    """
    return _Assembly(graph, labels, names).plan(method, shapes or {}, seconds, notes)


class _Assembly:
    """Decides, from the last stage to the first, what each stage holds, takes and gives."""

    def __init__(self, graph: LayerGraph, labels: Sequence[int], names: Sequence[str]) -> None:
        self.graph, self.names = graph, names
        self.labels = _settled_labels(graph, labels)
        _check_order(graph, self.labels, names)
        self.members: dict[int, list[int]] = {}
        for position, label in enumerate(self.labels):
            self.members.setdefault(label, []).append(position)
        # What each stage runs, reads from outside, and has to give to later ones.
        self.runs: dict[int, set[int]] = {}
        self.takes: dict[int, set[str]] = {}
        self.gives: dict[int, set[str]] = {label: set() for label in self.members}
        self.known: dict[int, set[str]] = {}
        for name in graph.outputs:
            if name in graph.producer:
                self.gives[self.labels[graph.producer[name]]].add(name)
        for label in sorted(self.members, reverse=True):
            self._resolve(label)

    def plan(
        self,
        method: str,
        shapes: Mapping[str, Sequence[int | str]],
        seconds: Sequence[Sequence[float]] | None,
        notes: Sequence[str],
    ) -> SplitPlan:
        graph = self.graph
        used = sorted(label for label in self.members if self.runs[label])
        last = used[-1]
        stages = tuple(self._stage(label, last, seconds[label] if seconds else None) for label in used)
        outputs = []
        for name in graph.outputs:
            if name in graph.producer:
                outputs.append((name, self.names[self.labels[graph.producer[name]]]))
            else:
                outputs.append((name, self.names[last] if name in graph.constant_outputs else INPUT))
        carried: dict[str, int] = {}
        for stage in stages:
            for name in stage.weights:
                carried[name] = carried.get(name, 0) + 1
        duplicated = {name: graph.weights[name].bytes for name, count in carried.items() if count > 1}
        return SplitPlan(
            method=method,
            stages=stages,
            inputs=graph.inputs,
            outputs=tuple(outputs),
            sizes=dict(graph.sizes),
            shapes={name: tuple(shape) for name, shape in shapes.items()},
            duplicated=duplicated,
            notes=(*notes, *_duplication_note(duplicated)),
        )

    def _resolve(self, label: int) -> None:
        """Fix what a stage runs and takes; later stages have said already what they want of it."""
        graph, takes, known = self.graph, set[str](), set[str]()
        runs = {position for position in self.members[label] if not graph.layers[position].light}
        foreign: set[str] = set()
        waiting = [name for position in runs for name in graph.layers[position].reads]
        waiting += list(self.gives[label])
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            producer = graph.producer.get(name)
            if producer is not None and self.labels[producer] == label:
                if producer not in runs:
                    runs.add(producer)
                    waiting += graph.layers[producer].reads
            elif producer is not None and graph.layers[producer].light:
                foreign.add(name)
            else:
                takes.add(name)
        here = takes | {name for position in runs for name in graph.layers[position].writes}
        for name in sorted(foreign):
            if name in graph.known:
                known.add(name)
                continue
            repeated = self._repeatable(name, here)
            if repeated is None:
                takes.add(name)
            else:
                runs |= repeated
                here.add(name)
        self.runs[label], self.takes[label], self.known[label] = runs, takes, known
        self._ask_for(takes, label)

    def _ask_for(self, takes: set[str], label: int) -> None:
        """Let earlier stages give what a stage takes."""
        graph = self.graph
        for name in sorted(takes):
            if not graph.tensors[name].can_cross:
                raise ModelError(
                    f'the tensor "{name}" would cross into {self.names[label]}, and cannot: it is a sequence, an '
                    "optional, or of a type or rank that shape inference does not find",
                    where=graph.where,
                    fix="cut elsewhere, so that it is made and read in one stage",
                )
            if name in graph.producer:
                self.gives[self.labels[graph.producer[name]]].add(name)

    def _repeatable(self, name: str, here: set[str]) -> set[int] | None:
        """The light layers that make ``name`` from what the stage has; None where something else is needed."""
        graph, found, waiting = self.graph, set[int](), [name]
        while waiting:
            wanted = waiting.pop()
            if wanted in here:
                continue
            producer = graph.producer.get(wanted)
            if producer is None or not graph.layers[producer].light:
                return None
            if producer not in found:
                found.add(producer)
                waiting += graph.layers[producer].reads
        return found

    def _stage(self, label: int, last: int, seconds: Sequence[float] | None) -> StagePlan:
        graph = self.graph
        order = sorted(self.runs[label])
        layers = [graph.layers[position] for position in order]
        weights = {name for layer in layers for name in layer.weights}
        nodes = {layer.node for layer in layers} | {node for layer in layers for node in layer.constants}
        outputs = [name for name in graph.tensors if name in self.gives[label]]
        if label == last:
            for name, (names, makers) in graph.constant_outputs.items():
                weights |= set(names)
                nodes |= set(makers)
                outputs.append(name)
        inputs = [name for name in graph.tensors if name in self.takes[label]]
        return StagePlan(
            name=self.names[label],
            nodes=tuple(sorted(nodes)),
            known=tuple(_known_value(name, graph.known[name]) for name in sorted(self.known[label])),
            weights=tuple(name for name in graph.weights if name in weights),
            inputs=tuple(self._tensor(name) for name in inputs),
            outputs=tuple(self._tensor(name) for name in outputs),
            layers=len(layers),
            flops=sum(layer.flops or 0 for layer in layers),
            weight_bytes=sum(graph.weights[name].bytes for name in weights),
            activation_bytes=_peak(graph, order, inputs, set(outputs)),
            seconds=None if seconds is None else sum(seconds[position] for position in order),
        )

    def _tensor(self, name: str) -> CutTensor:
        graph = self.graph
        producer = graph.producer.get(name)
        source = INPUT if producer is None else self.names[self.labels[producer]]
        readers = tuple(self.names[label] for label in sorted(self.takes) if name in self.takes[label])
        tensor = graph.tensors[name]
        if name in graph.constant_outputs:
            source = self.names[max(label for label in self.members if self.runs[label])]
        return CutTensor(name, tensor.dtype, tensor.shape, tensor.bytes, source, readers, name in graph.outputs)


def _settled_labels(graph: LayerGraph, labels: Sequence[int]) -> list[int]:
    """Light layers go as early as what they read allows; those that read inputs only, to their first reader."""
    found = list(labels)
    free: set[int] = set()
    for position, layer in enumerate(graph.layers):
        if not layer.light:
            continue
        found[position] = 0
        before = [found[graph.producer[name]] for name in layer.reads if name in graph.producer]
        if any(graph.producer[name] not in free for name in layer.reads if name in graph.producer):
            found[position] = max(before)
        else:
            free.add(position)
    for position in sorted(free, reverse=True):
        after = [found[reader] for name in graph.layers[position].writes for reader in graph.readers.get(name, ())]
        if after:
            found[position] = min(after)
    return found


def _check_order(graph: LayerGraph, labels: Sequence[int], names: Sequence[str]) -> None:
    for position, layer in enumerate(graph.layers):
        for name in layer.reads:
            producer = graph.producer.get(name)
            if producer is not None and labels[producer] > labels[position]:
                raise ModelError(
                    f'the stages would form a cycle: {names[labels[position]]} reads "{name}" (node {layer.name}), '
                    f"which {names[labels[producer]]} makes",
                    where=graph.where,
                    fix="cut at tensors that follow each other from the inputs to the outputs",
                )


def _peak(graph: LayerGraph, order: Sequence[int], inputs: Sequence[str], outputs: set[str]) -> int:
    """Peak of live bytes while a stage runs alone: inputs are there from the start, outputs stay to the end."""
    last = {name: step for step, position in enumerate(order) for name in graph.layers[position].reads}
    live = {name: graph.tensors[name].bytes or 0 for name in inputs}
    total = peak = sum(live.values())
    for step, position in enumerate(order):
        layer = graph.layers[position]
        for name in layer.writes:
            live[name] = graph.tensors[name].bytes or 0
            total += live[name]
        peak = max(peak, total)
        for name in {*layer.reads, *layer.writes} - outputs:
            if last.get(name, -1) <= step:
                total -= live.pop(name, 0)
    return peak


def _known_value(name: str, value: NDArray[Any]) -> KnownValue:
    return KnownValue(name, str(value.dtype), tuple(value.shape), tuple(value.reshape(-1).tolist()))


def _duplication_note(duplicated: Mapping[str, int]) -> list[str]:
    total = sum(duplicated.values())
    if total < 1 << 20:
        return []
    largest = max(duplicated, key=lambda name: duplicated[name])
    return [f"several stages carry the same weights: {total} bytes more in all, the largest is {largest}"]
