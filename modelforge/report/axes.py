"""The frame of a drawing with a scale: its value axis, round ticks, and places between two values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modelforge.report.markup import Html, element, significant


@dataclass(frozen=True)
class Frame:
    """A drawing's size and the margins around what is drawn, in the units of its view box."""

    width: float
    height: float
    margin_left: float = 46.0
    margin_right: float = 14.0
    margin_top: float = 12.0
    margin_bottom: float = 30.0

    @property
    def left(self) -> float:
        return self.margin_left

    @property
    def right(self) -> float:
        return self.width - self.margin_right

    @property
    def top(self) -> float:
        return self.margin_top

    @property
    def bottom(self) -> float:
        return self.height - self.margin_bottom

    def x(self, share: float) -> float:
        return self.left + (self.right - self.left) * share

    def y(self, value: float, ticks: Sequence[float]) -> float:
        return self.bottom - (self.bottom - self.top) * position(value, ticks[0], ticks[-1])


def value_axis(frame: Frame, ticks: Sequence[float], unit: str = "") -> list[Html]:
    """A line across for each tick, with its value to the left."""
    drawn = []
    for value in ticks:
        y = frame.y(value, ticks)
        drawn.append(element("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid-line"))
        drawn.append(element("text", significant(value) + unit, x=frame.left - 6, y=y + 3.5, text_anchor="end"))
    return drawn


def name_axis(frame: Frame, places: Sequence[tuple[float, str]], title: str) -> list[Html]:
    """Names under their places, those left out that would touch the one before, and what they are."""
    drawn = []
    free = -math.inf
    for x, name in sorted(places):
        half = 3.5 * len(name)
        if x - half >= free:
            drawn.append(element("text", name, x=x, y=frame.height - 15, text_anchor="middle"))
            free = x + half + 4
    drawn.append(element("text", title, x=frame.x(0.5), y=frame.height - 2, text_anchor="middle"))
    return drawn


def round_ticks(low: float, high: float) -> list[float]:
    """Three to six round values, from at most ``low`` to at least ``high``."""
    span = high - low
    if not math.isfinite(span) or span <= max(abs(low), abs(high)) * 1e-9:
        room = abs(high) * 0.05 or 1e-3
        return [low - room, high + room] if math.isfinite(span) else [low, high]
    rough = 10.0 ** math.floor(math.log10(span / 4))
    step = next(rough * factor for factor in (1, 2, 2.5, 5, 10, 20) if span / (rough * factor) <= 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [at * step for at in range(first, last + 1)]


def position(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, 0 to 1. Halved first: the span of two doubles may be infinite."""
    span = high / 2 - low / 2
    return clamped((value / 2 - low / 2) / span) if span > 0 else 0.5


def clamped(share: float) -> float:
    return min(1.0, max(0.0, share))
