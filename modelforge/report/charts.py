"""Drawings as inline SVG: bars, histograms with their clip range, the sensitivity curve.

Colours come from the page's style sheet by class. Every drawing has a label, and its figures stand in text beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from modelforge.report.axes import Frame, clamped, name_axis, position, round_ticks, value_axis
from modelforge.report.documents import Bins, CurvePoint, TensorRange
from modelforge.report.markup import Html, coordinate, element, number, percent, significant

_HISTOGRAM = (256.0, 72.0)
_CURVE = Frame(360.0, 150.0)
MOST_BINS = 128
MOST_POINTS = 200


def bar(share: float, kind: str, mark: float | None = None) -> Html:
    """A horizontal bar over ``share`` of its width; ``mark`` is a limit drawn across it. Both 0 to 1."""
    return element(
        "svg",
        element("rect", width=100, height=10, class_="track"),
        element("rect", width=100 * clamped(share), height=10, class_=kind),
        None if mark is None else element("rect", x=100 * clamped(mark) - 0.6, width=1.2, height=10, class_="limit"),
        class_="bar",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def skyline(bars: Sequence[tuple[float, bool, str]], label: str) -> Html:
    """Upright bars side by side: (share of the height, whether it was kept higher, what it says when pointed at)."""
    step = 1000 / len(bars)
    gap = min(2.0, step * 0.15)
    drawn = [
        element(
            "rect",
            element("title", said),
            x=step * at,
            width=round(step - gap, 2),
            y=100 * (1 - max(0.01, clamped(share))),
            height=100 * max(0.01, clamped(share)),
            class_="higher" if higher else "lower",
        )
        for at, (share, higher, said) in enumerate(bars)
    ]
    return element(
        "svg",
        drawn,
        class_="skyline",
        viewBox="0 0 1000 100",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{label}: {len(bars)} bars",
    )


def clipped_share(tensor: TensorRange) -> float | None:
    """Share of the counted values in bins whose middle lies outside the clip range; None without a histogram."""
    total = sum(tensor.bins.counts) if tensor.bins else 0
    if tensor.bins is None or not total:
        return None
    return (
        sum(count for count, out in zip(tensor.bins.counts, _outside(tensor, tensor.bins), strict=True) if out) / total
    )


def histogram(tensor: TensorRange, bins: Bins) -> Html:
    """Counts on a logarithmic scale over the values; what the clip range leaves out is shaded and in another colour."""
    width, height = _HISTOGRAM
    low, high = min(bins.low, tensor.low), max(bins.high, tensor.high)
    counts, outside = _merged(bins.counts, _outside(tensor, bins))
    start, end = width * position(bins.low, low, high), width * position(bins.high, low, high)
    step = (end - start) / len(counts)
    top = math.log1p(max(counts)) or 1.0
    tops = [height - (height - 4) * math.log1p(count) / top for count in counts]
    edges = [start + step * at for at in range(len(counts) + 1)]
    columns = list(zip(tops, counts, outside, strict=True))
    paths = [
        element("path", d=Html(drawn), class_=kind)
        for kind, wanted in (("inside", False), ("outside", True))
        if (drawn := _outline([y if count and out is wanted else None for y, count, out in columns], edges))
    ]
    left, right = width * position(tensor.low, low, high), width * position(tensor.high, low, high)
    said = f"Histogram of {tensor.name}, clipped to {significant(tensor.low)} … {significant(tensor.high)}"
    return element(
        "svg",
        element("rect", width=left, height=height, class_="shade") if left > 0.5 else None,
        element("rect", x=right, width=width - right, height=height, class_="shade") if right < width - 0.5 else None,
        paths,
        [element("line", x1=x, x2=x, y1=0, y2=height, class_="clip") for x in (left, right)],
        class_="histogram",
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{said}; {percent(clipped_share(tensor))} of the values lie outside.",
    )


def curve(
    points: Sequence[CurvePoint], name: str, chosen: int | None, limit: float | None = None, *, unit: str = ""
) -> Html | None:
    """``name`` ("drop" or "sqnr_db") over the number of layers kept higher, which stands on a logarithmic scale.

    Dots passed the gate, crosses did not; the chosen one has a ring. None where there is nothing to draw.
    """
    known = [(point, value) for point in points if (value := getattr(point, name)) is not None]
    known = sorted(known, key=lambda each: each[0].excluded)[:MOST_POINTS]
    if not known:
        return None
    values = [value for _, value in known] + ([limit] if limit is not None else [])
    ticks = round_ticks(min(0.0, *values) if name == "drop" else min(values), max(values))
    most = max(1, known[-1][0].excluded)
    places = [
        (_CURVE.x(math.log2(1 + point.excluded) / math.log2(1 + most)), _CURVE.y(value, ticks))
        for point, value in known
    ]
    limit_y = None if limit is None else _CURVE.y(limit, ticks)
    line = "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in places)
    ends = f"{_shown(known[0][1], unit)} with {known[0][0].excluded} to {_shown(known[-1][1], unit)}"
    return element(
        "svg",
        value_axis(_CURVE, ticks, unit),
        None
        if limit_y is None
        else element("line", x1=_CURVE.left, x2=_CURVE.right, y1=limit_y, y2=limit_y, class_="allowed"),
        element("path", d=Html(line), class_="line"),
        [
            _point(x, y, point, point.excluded == chosen, _shown(value, unit))
            for (x, y), (point, value) in zip(places, known, strict=True)
        ],
        name_axis(
            _CURVE,
            [(x, str(point.excluded)) for (x, _), (point, _) in zip(places, known, strict=True)],
            "layers kept higher",
        ),
        class_="curve",
        viewBox=f"0 0 {coordinate(_CURVE.width)} {coordinate(_CURVE.height)}",
        role="img",
        aria_label=f"{name} by layers kept higher: from {ends} with {known[-1][0].excluded}",
    )


def _point(x: float, y: float, point: CurvePoint, chosen: bool, shown: str) -> Html:
    failed = point.gate == "failed"
    cross = f"M{coordinate(x - 4)} {coordinate(y - 4)}l8 8m0-8l-8 8"
    return element(
        "g",
        element("title", f"{point.excluded} kept higher: {shown}" + (f", {point.gate}" if point.gate else "")),
        element("circle", cx=x, cy=y, r=8, class_="ring") if chosen else None,
        element("path", d=cross, class_="cross") if failed else element("circle", cx=x, cy=y, r=4, class_="dot"),
    )


def _shown(value: float, unit: str) -> str:
    return f"{number(value, 1)}{unit}" if unit else significant(value)


def _outside(tensor: TensorRange, bins: Bins) -> list[bool]:
    size = len(bins.counts)
    middles = [bins.low + (bins.high / size - bins.low / size) * (at + 0.5) for at in range(size)]
    return [not tensor.low <= middle <= tensor.high for middle in middles]


def _merged(counts: Sequence[int], outside: Sequence[bool]) -> tuple[list[int], list[bool]]:
    """Neighbouring bins added up until they are few enough to draw; one is outside if all of its parts are."""
    group = -(-len(counts) // MOST_BINS)
    starts = range(0, len(counts), group)
    return [sum(counts[at : at + group]) for at in starts], [all(outside[at : at + group]) for at in starts]


def _outline(tops: Sequence[float | None], edges: Sequence[float]) -> str:
    """One closed outline for each run of bins that are drawn: no seams between them."""
    drawn: list[str] = []
    before: float | None = None
    for at, top in enumerate([*tops, None]):
        if top is not None:
            if before is None:
                drawn.append(f"M{coordinate(edges[at])} {coordinate(_HISTOGRAM[1])}")
            drawn.append(f"V{coordinate(top)}H{coordinate(edges[at + 1])}")
        elif before is not None:
            drawn.append(f"V{coordinate(_HISTOGRAM[1])}z")
        before = top
    return "".join(drawn)
