"""Cuts that the user names: which layers lie before a set of tensors, and whether the set separates the graph at all.

Arithmetic on shapes is left out of the question: its few numbers cross, or are repeated, by themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from modelforge.errors import ModelError
from modelforge.graph.split_graph import LayerGraph

_TRIES = 20


def labels_at(graph: LayerGraph, cuts: Sequence[Sequence[str]]) -> list[int]:
    """The stage of each layer, 0 to ``len(cuts)``, for cuts in the order in which data passes them.

    What lies before a cut is whatever its tensors are made from; what reads none of its tensors, directly or not,
    stays with its neighbours.

    Raises:
        ModelError: an unknown tensor, one that cannot be cut, a cut that does not separate the graph (with the tensors
            that are missing), two cuts that are not one after the other, or an empty stage.
    """
    labels = [0] * len(graph.layers)
    earlier: set[int] = set()
    for index, names in enumerate(cuts):
        _check_names(graph, names)
        before = _before(graph, names)
        if index and not earlier < before:
            raise _wrong_order(graph, cuts, index, same=earlier == before)
        for position in range(len(graph.layers)):
            labels[position] += position not in before
        earlier = before
    return labels


def _check_names(graph: LayerGraph, names: Sequence[str]) -> None:
    if not names:
        raise ModelError("a cut names no tensor", where="--at", fix="give tensor[,tensor][;tensor...]")
    for name in names:
        if name in graph.inner:
            raise ModelError(
                f'the tensor "{name}" lies in a body of node {graph.inner[name]}: bodies are kept whole',
                where=graph.where,
                fix="cut before or after that node",
            )
        if name in graph.weights or name in graph.constant_outputs:
            raise ModelError(
                f'"{name}" is a constant: each stage gets its own copy of the constants that it needs',
                where=graph.where,
                fix="name a tensor that depends on the inputs",
            )
        if name not in graph.tensors:
            close = difflib.get_close_matches(name, graph.tensors, n=3, cutoff=0.6)
            hint = f"did you mean {_listed(close)}?" if close else "`--stages 2 --plan-only` lists tensors to cut at"
            raise ModelError(f'the model has no tensor "{name}"', where=graph.where, fix=hint)
        if not graph.tensors[name].can_cross:
            raise ModelError(
                f'the tensor "{name}" cannot be the input of a stage: it is a sequence, an optional, or of a type '
                "or rank that shape inference does not find",
                where=graph.where,
                fix="cut at another tensor",
            )


def _before(graph: LayerGraph, names: Sequence[str]) -> set[int]:
    """Positions of the layers before the cut."""
    before, missing, crossed = _separate(graph, set(names))
    if missing:
        complete = _completed(graph, set(names))
        fix = "cut elsewhere: `--stages 2 --plan-only` lists cuts that separate it"
        if complete is not None:
            fix = f"--at {','.join([*names, *sorted(complete - set(names))])}"
        raise ModelError(
            f"the cut {_listed(names)} does not separate the graph: {_listed(sorted(missing)[:5])} "
            f"{'goes' if len(missing) == 1 else 'go'} past it",
            where=graph.where,
            fix=fix,
        )
    heavy = {position for position, layer in enumerate(graph.layers) if not layer.light}
    if not before & heavy or not heavy - before:
        raise ModelError(
            f"nothing lies {'after' if before & heavy else 'before'} the cut {_listed(names)}: a stage would be empty",
            where=graph.where,
            fix="cut between two layers",
        )
    idle = sorted(set(names) - crossed - {name for name in names if graph.is_light(name)})
    if idle:
        raise ModelError(
            f"the cut names {_listed(idle)}, which nothing after the cut reads",
            where=graph.where,
            fix=f"--at {','.join(name for name in names if name not in idle)}",
        )
    return before


def _separate(graph: LayerGraph, names: set[str]) -> tuple[set[int], set[str], set[str]]:
    """Layers before the cut, tensors that go past it, and tensors that cross at it."""
    before = _ancestors(graph, names)
    seen = {name for position in before if not graph.layers[position].light for name in graph.layers[position].reads}
    missing: set[str] = set()
    crossed: set[str] = set()
    for part in _parts(graph, before, seen | names):
        reads = {name for position in part for name in graph.layers[position].reads if not graph.is_light(name)}
        # Inputs that nothing before the cut reads come to the later stage from outside.
        reads = {name for name in reads if name in names or name in seen or graph.producer.get(name) in before}
        if reads <= names:
            crossed |= reads
            if not reads and part:
                before |= part
        elif reads & names:
            missing |= reads - names
        else:
            before |= part
    light = [position for position, layer in enumerate(graph.layers) if layer.light]
    for position in light:
        makers = {graph.producer[name] for name in graph.layers[position].reads if name in graph.producer}
        if makers <= before:
            before.add(position)
    return before, missing, crossed


def _ancestors(graph: LayerGraph, names: Iterable[str]) -> set[int]:
    waiting = [graph.producer[name] for name in names if name in graph.producer]
    found: set[int] = set()
    while waiting:
        position = waiting.pop()
        if position not in found:
            found.add(position)
            waiting += [graph.producer[name] for name in graph.layers[position].reads if name in graph.producer]
    return found


def _parts(graph: LayerGraph, before: set[int], known: set[str]) -> list[set[int]]:
    """The layers that are not before the cut, in groups that share tensors which the cut does not bring."""
    neighbours: dict[str, list[int]] = {}
    rest = [
        position for position, layer in enumerate(graph.layers) if position not in before and not layer.light
    ]  # fmt: skip
    for position in rest:
        layer = graph.layers[position]
        for name in (*layer.reads, *layer.writes):
            if name not in known and graph.producer.get(name) not in before and not graph.is_light(name):
                neighbours.setdefault(name, []).append(position)
    links: dict[int, list[int]] = {position: [] for position in rest}
    for group in neighbours.values():
        for position in group[1:]:
            links[group[0]].append(position)
            links[position].append(group[0])
    parts, seen = [], set[int]()
    for position in rest:
        part, waiting = set[int](), [position]
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                part.add(at)
                waiting += links[at]
        if part:
            parts.append(part)
    return parts


def _completed(graph: LayerGraph, names: set[str]) -> set[str] | None:
    """The cut with what it lacks, if that separates the graph."""
    for _ in range(_TRIES):
        _, missing, crossed = _separate(graph, names)
        if not missing:
            return crossed if crossed and all(graph.tensors[name].can_cross for name in crossed) else None
        names = names | missing
    return None


def _wrong_order(graph: LayerGraph, cuts: Sequence[Sequence[str]], index: int, *, same: bool) -> ModelError:
    first, second = _listed(cuts[index - 1]), _listed(cuts[index])
    if same:
        return ModelError(
            f"nothing lies between the cuts {first} and {second}: a stage would be empty",
            where=graph.where,
            fix="leave one of them out",
        )
    return ModelError(
        f"the stages would form a cycle: the cut {second} does not lie after {first}",
        where=graph.where,
        fix="give the cuts in the order in which data passes them",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
