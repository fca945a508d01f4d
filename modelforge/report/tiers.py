"""What a split over tiers and links was chosen among: the fastest ways, and how the choice changes with bandwidth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from modelforge.report.documents import TierChoices, TierCut, TransportBytes
from modelforge.report.latency import approximate
from modelforge.report.markup import (
    Cell,
    Child,
    Drawing,
    Html,
    Limits,
    Row,
    badge,
    bytes_text,
    element,
    figure_cell,
    headed,
    left_out,
    milliseconds,
    number,
    rate,
    scaled,
    significant,
    table,
)
from modelforge.report.plots import Piece, Stack, stacked, sweep_plot

_KINDS = ("tier0", "tier1", "tier2")
"""Colours of tiers in their order; links have one of their own."""


def tier_choices(choices: TierChoices, limits: Limits) -> Html:
    return element(
        "div",
        headed(
            "Ways over tiers and links ",
            _estimate(choices),
            _links(choices, limits),
            _legend(choices),
            _cuts(choices, limits),
        ),
        _sweep(choices, limits),
    )


def _estimate(choices: TierChoices) -> Html | None:
    if not choices.estimate:
        return None
    return element(
        "p",
        badge("estimated", "warn"),
        " All times are of a model of the devices and links; none of them was measured.",
        class_="soft",
    )


def _links(choices: TierChoices, limits: Limits) -> Html:
    back = "outputs go back" if choices.return_outputs else "outputs stay where they are made"
    said = [
        f"{link.source} to {link.target}: {milliseconds(link.latency_ms)}, {rate(link.bandwidth)}"
        for link in choices.links[: limits.rows]
    ]
    return element("p", f"{'; '.join(said)}. Floats cross as {choices.transport}; {back}.", class_="soft")


def _legend(choices: TierChoices) -> Html:
    named = [(tier, _kind(choices, tier)) for tier in choices.tiers[:12]]
    return element(
        "p",
        [[element("span", class_=f"key {kind}"), f" {name} "] for name, kind in [*named, ("links", "links")]],
        class_="soft",
    )


def _kind(choices: TierChoices, tier: str) -> str:
    return _KINDS[choices.tiers.index(tier) % len(_KINDS)]


def _pieces(choices: TierChoices, cut: TierCut) -> list[Piece]:
    tiers = [Piece(name, cut.tier_ms[name], _kind(choices, name)) for name in choices.tiers if name in cut.tier_ms]
    return [*tiers, Piece("links", sum(cut.link_ms.values()), "links")]


# -- the fastest ways


def _cuts(choices: TierChoices, limits: Limits) -> list[Child]:
    ranked = sorted(choices.cuts, key=lambda cut: cut.total_ms)
    if not ranked:
        return []
    shown = ranked[: limits.rows]
    full = max(sum(piece.milliseconds for piece in _pieces(choices, cut)) for cut in shown)
    chosen = next((cut for cut in ranked if cut.fits), None)
    rows: list[Row] = [
        [
            element("span", cut.kind, [" ", badge("fastest", "good")] if cut is chosen else None, class_="way"),
            figure_cell(cut.total_ms, _time(cut.total_ms, choices)),
            Drawing(stacked(_pieces(choices, cut), full)),
            *(_milliseconds_cell(cut.tier_ms.get(tier)) for tier in choices.tiers[:12]),
            _milliseconds_cell(sum(cut.link_ms.values())),
            element("span", _sent(cut), class_="why"),
            *_bytes_cells(cut.bytes),
            "yes" if cut.fits else badge("no", "bad"),
        ]
        for cut in shown
    ]
    times = [f"{tier} ms" for tier in choices.tiers[:12]]
    scale = f"0 to {_time(full, choices)}"
    columns = ["way", "total", scale, *times, "links ms", "sent", "FP32", "FP16", "INT8", "fits"]
    return [
        table("The fastest ways, fastest first; bytes sent as FP32, FP16 and INT8", columns, rows),
        left_out(len(ranked) - len(shown), "way"),
    ]


def _sent(cut: TierCut) -> Child:
    if not cut.sent:
        return "nothing"
    more = len(cut.sent) - 3
    listed = [[", " if at else None, element("code", name)] for at, name in enumerate(cut.sent[:3])]
    return [listed, f" and {more} more" if more > 0 else None]


def _bytes_cells(sent: TransportBytes) -> list[Cell]:
    return [figure_cell(size, bytes_text(size)) for size in (sent.fp32, sent.fp16, sent.int8)]


def _milliseconds_cell(value: float | None) -> Cell:
    return figure_cell(value, number(None) if value is None else "0" if not value else f"{value:.3g}")


def _time(value: float, choices: TierChoices) -> str:
    return approximate(value) if choices.estimate else milliseconds(value)


# -- by bandwidth


def _sweep(choices: TierChoices, limits: Limits) -> Html | None:
    points = sorted(choices.sweep, key=lambda point: point.factor)
    if not points:
        return None
    shown = points[: limits.rows]
    link = choices.links[0]
    named = f"{link.source} to {link.target}"
    stacks = [
        Stack(
            place=link.bandwidth * point.factor,
            name=scaled(link.bandwidth * point.factor),
            pieces=_pieces(choices, point),
            said=f"{rate(link.bandwidth * point.factor)}: {point.kind}, {_time(point.total_ms, choices)}",
            marked=point.factor == 1.0,
        )
        for point in shown
    ]
    label = f"Least time by the bandwidth of {named}, {'estimated' if choices.estimate else 'in milliseconds'}"
    drawing = sweep_plot(stacks, "bytes a second, logarithmic; milliseconds in all", label)
    others = "; the other links alike" if len(choices.links) > 1 else ""
    caption = [f"{label}{others}. ", "▲ as given. " if any(stack.marked for stack in stacks) else None]
    return headed(
        "How the choice changes with bandwidth ",
        element("ul", [element("li", said) for said in _told(choices, shown)]),
        element("div", element("figure", drawing, element("figcaption", *caption)), class_="curves")
        if drawing is not None
        else None,
        _sweep_table(choices, shown, named),
        left_out(len(points) - len(shown), "bandwidth"),
    )


def _told(choices: TierChoices, points: Sequence[TierCut]) -> list[Child]:
    """One sentence for each run of bandwidths with the same best way."""
    bandwidth = choices.links[0].bandwidth
    found: list[Child] = []
    for _, run in itertools.groupby(points, key=lambda point: (point.kind, point.sent)):
        members = list(run)
        first, last = rate(bandwidth * members[0].factor), rate(bandwidth * members[-1].factor)
        span = f"at {first}" if first == last else f"{first} to {last}"
        sent: Child = [" at ", _sent(members[0])] if members[0].kind == "cut" else None
        found.append([f"{span}: ", element("strong", members[0].kind), sent])
    return found


def _sweep_table(choices: TierChoices, points: Sequence[TierCut], named: str) -> Html:
    bandwidth = choices.links[0].bandwidth
    rows: list[Row] = [
        [
            Cell(rate(bandwidth * point.factor), bandwidth * point.factor),
            Cell([f"{significant(point.factor)}x", " (as given)" if point.factor == 1.0 else None], point.factor),
            element("span", point.kind, class_="way"),
            figure_cell(point.total_ms, _time(point.total_ms, choices)),
            *(_milliseconds_cell(point.tier_ms.get(tier)) for tier in choices.tiers[:12]),
            _milliseconds_cell(sum(point.link_ms.values())),
            element("span", _sent(point), class_="why"),
            figure_cell(getattr(point.bytes, choices.transport), bytes_text(getattr(point.bytes, choices.transport))),
        ]
        for point in points
    ]
    times = [f"{tier} ms" for tier in choices.tiers[:12]]
    columns = [named, "bandwidth", "best way", "total", *times, "links ms", "sent", f"as {choices.transport}"]
    return table("The fastest way by bandwidth", columns, rows)
