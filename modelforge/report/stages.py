"""The section of a split model: the stages, what crosses between them, chains of variants, where else to cut.

What was chosen over tiers and links is in :mod:`modelforge.report.tiers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelforge.report.about import Split
from modelforge.report.collect import Report, VariantReport
from modelforge.report.documents import Candidate, ChainDocument, ChainFigures, StageDocument, StageTensor, Way
from modelforge.report.latency import approximate
from modelforge.report.markup import (
    Cell,
    Child,
    Html,
    Limits,
    Row,
    badge,
    bytes_text,
    cosine_text,
    decibels,
    drop_text,
    element,
    figure_cell,
    headed,
    left_out,
    milliseconds,
    number,
    percent,
    plural,
    scaled,
    table,
)
from modelforge.report.tiers import tier_choices

INPUT = "input"
"""Where the model's own inputs come from, in `about.split`."""

_FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of one value of the types that may cross narrower; all others cross as they are."""

_NAMED = 8
"""Tensors that are named between two boxes; the table has the rest."""


def stages(report: Report, anchors: Sequence[str], limits: Limits) -> list[Child]:
    return [] if report.facts.split is None else split_parts(report.facts.split, report.variants, anchors, limits)


def split_parts(split: Split, variants: Sequence[VariantReport], anchors: Sequence[str], limits: Limits) -> list[Child]:
    """The stages of one split, or of one partition between NPU and CPU."""
    links = dict(zip([_key(variant) for variant in variants], anchors, strict=True))
    return [
        _chain(split, links, limits),
        _notes(split, limits),
        _crossing(split, limits),
        _chains(split, variants, limits),
        tier_choices(split.tiers, limits) if split.tiers is not None else None,
        _candidates(split, limits),
    ]


def _key(variant: VariantReport) -> tuple[str, str]:
    return variant.record.stage, variant.record.target


# -- the boxes


def _chain(split: Split, links: Mapping[tuple[str, str], str], limits: Limits) -> Html | None:
    if not split.stages:
        return None
    shown = split.stages[: limits.rows]
    items: list[Html] = [element("li", element("span", "input", class_="end"))]
    before = INPUT
    for stage in shown:
        items.append(_between(stage.inputs, split.transport, before, stage.name))
        items.append(_box(stage, links))
        before = stage.name
    if len(shown) == len(split.stages):
        items.append(_between(_outputs(split), {}, before, "the output"))
        items.append(element("li", element("span", "output", class_="end")))
    sizes = ", ".join(f"{name} = {size}" for name, size in list(split.sizes.items())[:8])
    said = f"Bytes and times hold at {sizes}. " if sizes else ""
    estimated = any(stage.seconds is not None for stage in shown)
    return element(
        "div",
        element("ol", items, class_="chain", aria_label="The stages in order, and what crosses between them"),
        element("p", f"{said}{'Times marked ~ are estimates.' if estimated else ''}", class_="soft"),
        left_out(len(split.stages) - len(shown), "stage"),
    )


def _outputs(split: Split) -> tuple[StageTensor, ...]:
    given = {(stage.name, tensor.name): tensor for stage in split.stages for tensor in stage.outputs}
    found = (given.get((output.source or "", output.name)) for output in split.outputs)
    return tuple(tensor for tensor in found if tensor is not None)


def _box(stage: StageDocument, links: Mapping[tuple[str, str], str]) -> Html:
    targets = [(target, anchor) for (name, target), anchor in links.items() if name == stage.name]
    figures = [
        None if stage.layers is None else plural(stage.layers, "layer"),
        None if stage.flops is None else f"{scaled(stage.flops, ' ')}FLOP",
        None if stage.weight_bytes is None else f"{bytes_text(stage.weight_bytes)} of weights",
        None if stage.activation_bytes is None else f"{bytes_text(stage.activation_bytes)} of activations",
        None if stage.seconds is None else approximate(stage.seconds * 1e3),
    ]
    return element(
        "li",
        element(
            "div",
            element("h3", stage.name),
            element("ul", [element("li", figure) for figure in figures if figure is not None]),
            element("p", "for ", _listed([element("a", target, href=f"#{anchor}") for target, anchor in targets[:12]]))
            if targets
            else None,
            class_="stage",
        ),
    )


def _listed(items: Sequence[Html]) -> list[Child]:
    return [[", " if at else None, item] for at, item in enumerate(items)]


def _between(tensors: Sequence[StageTensor], transport: Mapping[str, Way], before: str, to: str) -> Html:
    """An arrow with the tensors that go over it: as they are, and as they cross; those that passed a stage say so."""
    lines = []
    for tensor in tensors[:_NAMED]:
        way = transport.get(tensor.name) if tensor.source != INPUT else None
        narrow = None if way is None else _sent(tensor, _WIDTHS.get(way.dtype))
        lines.append(
            element(
                "li",
                element("code", tensor.name),
                element("small", f"from {tensor.source}") if tensor.source not in (None, before) else None,
                element("span", NONE if tensor.bytes is None else bytes_text(tensor.bytes)),
                None
                if way is None
                else element(
                    "b", f"{NONE if narrow is None else bytes_text(narrow)} as {_CALLED.get(way.dtype, way.dtype)}"
                ),
            )
        )
    more = len(tensors) - len(lines)
    return element(
        "li",
        element("ul", lines, element("li", f"and {more} more") if more else None),
        class_="between",
        aria_label=f"to {to}",
    )


NONE = number(None)
_WIDTHS = {"float16": 2, "uint8": 1}
_CALLED = {"float16": "FP16", "uint8": "INT8"}


def _sent(tensor: StageTensor, width: int | None) -> int | None:
    """Bytes where floats cross with so many bytes a value; what is no float, or is smaller, goes as it is."""
    own = _FLOATS.get(tensor.dtype or "")
    if tensor.bytes is None or width is None or own is None:
        return tensor.bytes
    return min(tensor.bytes, tensor.bytes // own * width)


# -- tables


def _notes(split: Split, limits: Limits) -> Html | None:
    if not split.notes:
        return None
    return element("ul", [element("li", note) for note in split.notes[: limits.rows]])


def _crossing(split: Split, limits: Limits) -> Html | None:
    """Every tensor that one stage takes of another, once for each that takes it."""
    crossing = [(stage.name, tensor) for stage in split.stages for tensor in stage.inputs if tensor.source != INPUT]
    if not crossing:
        return None
    rows: list[Row] = []
    for taker, tensor in crossing[: limits.rows]:
        way = split.transport.get(tensor.name)
        rows.append(
            [
                element("code", tensor.name),
                tensor.source or NONE,
                taker,
                element("span", _typed(tensor), class_="way"),
                figure_cell(tensor.bytes, _bytes(tensor.bytes)),
                *(figure_cell(size, _bytes(size)) for size in (_sent(tensor, 2), _sent(tensor, 1))),
                "as it is" if way is None else way.dtype,
                figure_cell(
                    way.scale if way else None, NONE if way is None or way.scale is None else f"{way.scale:.4g}"
                ),
                Cell(NONE, None)
                if way is None or way.zero_point is None
                else Cell(str(way.zero_point), way.zero_point),
            ]
        )
    columns = ["tensor", "from", "to", "type", "as it is", "FP16", "INT8", "crosses as", "scale", "zero point"]
    return headed(
        "What crosses",
        table("Tensors that cross from stage to stage", columns, rows),
        left_out(len(crossing) - len(rows), "tensor"),
    )


def _typed(tensor: StageTensor) -> str:
    sizes = "?" if tensor.shape is None else " x ".join("?" if size is None else str(size) for size in tensor.shape)
    return f"{tensor.dtype or '?'} {sizes}"


def _bytes(size: int | None) -> str:
    return NONE if size is None else bytes_text(size)


def _chains(split: Split, variants: Sequence[VariantReport], limits: Limits) -> Html | None:
    if not split.chains:
        return None
    known = {_key(variant): variant for variant in variants}
    shown = split.chains[: limits.rows]
    timed = any(_chain_time(chain, known)[0] is not None for chain in shown)
    rows = [row for chain in shown for row in _chain_rows(chain, known, timed=timed)]
    metrics = dict.fromkeys(chain.accuracy.metric for chain in shown if chain.accuracy and chain.accuracy.metric)
    columns = ["chain", "gate"] + ["one sample"] * timed
    columns += "FP32 value change allowed SQNR cosine agreement samples".split()
    said = "The time is that of the stages alone, one after the other, without links."
    return headed(
        "Chains of variants, judged as the whole model",
        table(f"Chains of variants against FP32{'; metric: ' if metrics else ''}{', '.join(metrics)}", columns, rows),
        left_out(len(split.chains) - len(shown), "chain"),
        element("p", said, class_="soft") if timed else None,
    )


def _chain_rows(chain: ChainDocument, known: Mapping[tuple[str, str], VariantReport], *, timed: bool) -> list[Row]:
    """What ran, and under it its lowered models where these were judged on more samples."""
    steps = [
        element(
            "li", f"{step.stage} on {step.target}", [" ", badge(step.evidence)] if step.evidence is not None else None
        )
        for step in chain.stages[:64]
    ]
    name = element("ol", steps, class_="steps")
    time = [figure_cell(*_chain_time(chain, known))] * timed
    if chain.accuracy is None:
        reason = element("span", f"not run: {chain.reason or 'no reason was recorded'}", class_="why")
        return [[element("div", name, reason), badge("none"), *time, *[Cell(NONE, None) for _ in range(8)]]]
    rows = [_chain_row(name, time, chain.accuracy)]
    if chain.lowered is not None:
        stands_in = element("span", "the lowered models ", badge("reference"))
        rows.append(_chain_row(stands_in, [Cell(NONE, None)] * timed, chain.lowered))
    return rows


def _chain_row(name: Html, time: Sequence[Cell], accuracy: ChainFigures) -> Row:
    return [
        name,
        badge(accuracy.gate or "none"),
        *time,
        figure_cell(accuracy.reference, number(accuracy.reference)),
        figure_cell(accuracy.value, number(accuracy.value)),
        figure_cell(accuracy.drop, drop_text(accuracy.drop)),
        figure_cell(accuracy.max_drop, number(accuracy.max_drop)),
        figure_cell(accuracy.sqnr_db, decibels(accuracy.sqnr_db, identical=accuracy.identical)),
        figure_cell(accuracy.cosine, cosine_text(accuracy.cosine)),
        figure_cell(accuracy.agreement, percent(accuracy.agreement)),
        Cell(NONE if accuracy.samples is None else str(accuracy.samples), accuracy.samples),
    ]


def _chain_time(chain: ChainDocument, known: Mapping[tuple[str, str], VariantReport]) -> tuple[float | None, str]:
    """The stages' times for one sample added up, and whether all of them were measured."""
    found = [known.get((step.stage, step.target)) for step in chain.stages]
    times = [None if variant is None else variant.timing.best.at(1) for variant in found]
    known_times = [time for time in times if time is not None and time.milliseconds is not None]
    if not times or len(known_times) < len(times):
        return None, NONE
    total = sum(time.milliseconds or 0.0 for time in known_times)
    measured = all(time.source == "measured" for time in known_times)
    return total, milliseconds(total) if measured else approximate(total)


def _candidates(split: Split, limits: Limits) -> Html | None:
    if not split.candidates:
        return None
    taken = {tensor.name for stage in split.stages for tensor in stage.inputs if tensor.source != INPUT}
    ranked = sorted(split.candidates, key=lambda each: (each.bytes.fp32, each.flops_before, each.tensors))
    if not any(set(each.tensors) <= taken for each in ranked):
        return None  # between NPU and CPU: where the cut is, their operators say, not the bytes
    rows = [_candidate_row(each, is_taken=set(each.tensors) <= taken) for each in ranked[: limits.rows]]
    columns = ["after", "here", "FLOPs before", "FP32", "FP16", "INT8"]
    return headed(
        "Where it could be cut",
        table("Places to cut, fewest bytes first", columns, rows),
        left_out(len(ranked) - len(rows), "place"),
    )


def _candidate_row(candidate: Candidate, *, is_taken: bool) -> Row:
    sizes = (candidate.bytes.fp32, candidate.bytes.fp16, candidate.bytes.int8)
    return [
        element("span", _names(candidate.tensors), class_="why"),
        badge("taken", "good") if is_taken else None,
        figure_cell(candidate.flops_before, percent(candidate.flops_before)),
        *(figure_cell(size, bytes_text(size)) for size in sizes),
    ]


def _names(tensors: Sequence[str]) -> Child:
    more = len(tensors) - 3
    return [_listed([element("code", name) for name in tensors[:3]]), f" and {more} more" if more > 0 else None]
