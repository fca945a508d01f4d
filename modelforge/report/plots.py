"""Drawings of time: latency by batch size, and the ways over tiers and links as stacked bars. Inline SVG.

Colours come from the page's style sheet by class. Every drawing has a label, and its figures stand in text beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelforge.report.axes import Frame, clamped, name_axis, round_ticks, value_axis
from modelforge.report.markup import Html, coordinate, element, milliseconds, scaled

_LATENCY = Frame(360.0, 160.0)
_SWEEP = Frame(360.0, 210.0, margin_top=20.0, margin_bottom=32.0)
_WIDEST_BAR = 24.0
MOST_BARS = 24
MOST_SIZES = 64


@dataclass(frozen=True)
class Piece:
    """One share of a stacked bar: milliseconds, and the class that colours it."""

    name: str
    milliseconds: float
    kind: str


@dataclass(frozen=True)
class Stack:
    """A stacked bar at ``place`` on a logarithmic axis; ``marked`` puts an arrow under it."""

    place: float
    name: str
    pieces: Sequence[Piece]
    said: str
    marked: bool = False

    @property
    def total(self) -> float:
        return sum(piece.milliseconds for piece in self.pieces)


def latency_plot(
    measured: Mapping[int, float], estimated: Mapping[int, float], budget: float | None, title: str
) -> Html | None:
    """Milliseconds of one execution over the batch size, which stands on a logarithmic scale.

    Measured: dots on a line. Estimated: hollow squares on a dashed line. The budget is drawn where it is near.
    None where there are not two sizes to draw.
    """
    sizes = sorted({*measured, *estimated})[:MOST_SIZES]
    if len(sizes) < 2:
        return None
    most = max(0.0, *measured.values(), *estimated.values())
    near = is_budget_near((measured, estimated), budget)
    ticks = round_ticks(0.0, max(most, budget or 0.0) if near else most)
    low, high = math.log2(sizes[0]), math.log2(sizes[-1])
    x = {size: _LATENCY.x((math.log2(size) - low) / (high - low)) for size in sizes}
    limit = _LATENCY.y(budget, ticks) if near and budget is not None else None
    drawn = []
    for curve, kind, words in ((estimated, "estimated", "estimated"), (measured, "measured", "measured")):
        points = [(size, x[size], _LATENCY.y(curve[size], ticks)) for size in sizes if size in curve]
        if not points:
            continue
        line = "M" + "L".join(f"{coordinate(across)} {coordinate(y)}" for _, across, y in points)
        drawn.append(element("path", d=Html(line), class_=f"line {kind}"))
        drawn += [
            element(
                "g", element("title", f"batch {size}: {milliseconds(curve[size])}, {words}"), _mark(kind, across, y)
            )
            for size, across, y in points
        ]
    return element(
        "svg",
        value_axis(_LATENCY, ticks),
        None
        if limit is None
        else element("line", x1=_LATENCY.left, x2=_LATENCY.right, y1=limit, y2=limit, class_="allowed"),
        drawn,
        name_axis(_LATENCY, [(x[size], str(size)) for size in sizes], "batch size; milliseconds of one execution"),
        class_="curve",
        viewBox=f"0 0 {coordinate(_LATENCY.width)} {coordinate(_LATENCY.height)}",
        role="img",
        aria_label=title,
    )


def is_budget_near(curves: Sequence[Mapping[int, float]], budget: float | None) -> bool:
    """Whether the budget is drawn: far above the curves it would press them flat."""
    most = max((time for curve in curves for time in curve.values()), default=0.0)
    return budget is not None and budget <= 2 * most


def _mark(kind: str, x: float, y: float) -> Html:
    if kind == "measured":
        return element("circle", cx=x, cy=y, r=4, class_="dot")
    return element("rect", x=x - 3.5, y=y - 3.5, width=7, height=7, class_="square")


def sweep_plot(stacks: Sequence[Stack], axis: str, title: str) -> Html | None:
    """Stacked bars over a logarithmic axis, with what each adds up to above it. None where there is nothing to draw."""
    shown = sorted(stacks, key=lambda stack: stack.place)[:MOST_BARS]
    most = max((stack.total for stack in shown), default=0.0)
    if most <= 0:
        return None
    ticks = round_ticks(0.0, most)
    places = [math.log10(stack.place) for stack in shown]
    span = places[-1] - places[0]
    frame = _SWEEP
    # Half a bar's room on both sides: the first does not stand on the axis.
    inset = 0.5 if not span else 0.5 / len(shown)
    xs = [frame.x(inset + (1 - 2 * inset) * ((place - places[0]) / span if span else 0.0)) for place in places]
    gaps = [after - before for before, after in itertools.pairwise(xs)]
    width = min([_WIDEST_BAR, *(max(1.0, 0.7 * gap) for gap in gaps)])
    return element(
        "svg",
        value_axis(frame, ticks),
        [_bar(frame, stack, x, width, ticks) for stack, x in zip(shown, xs, strict=True)],
        _totals(frame, shown, xs, ticks),
        name_axis(frame, [(x, stack.name) for stack, x in zip(shown, xs, strict=True)], axis),
        class_="curve sweep",
        viewBox=f"0 0 {coordinate(frame.width)} {coordinate(frame.height)}",
        role="img",
        aria_label=title,
    )


def _bar(frame: Frame, stack: Stack, x: float, width: float, ticks: Sequence[float]) -> Html:
    drawn, below = [], 0.0
    for piece in stack.pieces:
        top, foot = frame.y(below + piece.milliseconds, ticks), frame.y(below, ticks)
        below += piece.milliseconds
        if piece.milliseconds > 0:
            height = max(0.6, foot - top)
            drawn.append(element("rect", x=x - width / 2, y=top, width=width, height=height, class_=piece.kind))
    arrow = f"M{coordinate(x)} {coordinate(frame.bottom + 1)}l4 5h-8z"
    return element(
        "g",
        element("title", stack.said),
        drawn,
        element("path", d=Html(arrow), class_="here") if stack.marked else None,
    )


def _totals(frame: Frame, stacks: Sequence[Stack], xs: Sequence[float], ticks: Sequence[float]) -> list[Html]:
    drawn, free = [], -math.inf
    for stack, x in zip(stacks, xs, strict=True):
        shown = scaled(stack.total)
        half = 3.2 * len(shown)
        if x - half >= free:
            y = frame.y(stack.total, ticks) - 4
            drawn.append(element("text", shown, x=x, y=y, text_anchor="middle", class_="total"))
            free = x + half + 2
    return drawn


def stacked(pieces: Sequence[Piece], full: float) -> Html:
    """A horizontal bar of pieces one after the other, as long as ``full``."""
    drawn, start = [], 0.0
    for piece in pieces:
        share = clamped(piece.milliseconds / full) if full > 0 else 0.0
        if share > 0:
            drawn.append(element("rect", x=100 * start, width=100 * share, height=10, class_=piece.kind))
        start += share
    return element(
        "svg",
        element("rect", width=100, height=10, class_="track"),
        drawn,
        class_="bar",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
