"""The part of a card about time: one execution by batch size, measured beside estimated, and the batches to gather."""

from __future__ import annotations

import math

from modelforge.report.collect import VariantReport
from modelforge.report.markup import (
    Cell,
    Child,
    Html,
    Limits,
    Row,
    badge,
    element,
    facts,
    figure_cell,
    folded,
    headed,
    left_out,
    milliseconds,
    number,
    percent,
    plural,
    scaled,
    table,
)
from modelforge.report.plots import is_budget_near, latency_plot
from modelforge.report.timing import Timing


def latency(variant: VariantReport, limits: Limits) -> Html | None:
    timing = variant.timing
    if not timing.sizes:
        return None
    measured, estimated = timing.measured, timing.estimated
    label = f"Latency of {variant.title} by batch size: {', '.join(_curves(timing))}"
    drawing = latency_plot(measured.milliseconds, estimated.milliseconds, timing.budget_ms, label)
    return headed(
        "Latency by batch size",
        element("div", element("figure", drawing, element("figcaption", _legend(timing))), class_="curves")
        if drawing is not None
        else None,
        _recommended(variant),
        folded("Measured and estimated, by batch size", _rows(variant, limits), open_=drawing is None),
    )


def layer_times(variant: VariantReport, limits: Limits) -> Html | None:
    """The time of each layer on the device, in the order of execution."""
    found = variant.layer_times
    if found is None or not found.layers:
        return None
    whole = sum(layer.ms for layer in found.layers)
    shown = found.layers[: limits.layers]
    rows: list[Row] = [
        [
            Cell(str(place), place),
            element("code", layer.name),
            figure_cell(layer.ms, milliseconds(layer.ms)),
            figure_cell(layer.ms / whole if whole else None, percent(layer.ms / whole) if whole else number(None)),
        ]
        for place, layer in enumerate(shown, start=1)
    ]
    batch = "" if found.batch is None else f", batch {found.batch}"
    return folded(
        f"Time of {plural(len(found.layers), 'layer')} on the device{batch}",
        table(f"Time of the layers of {variant.title}", ["#", "layer", "time", "share"], rows),
        left_out(len(found.layers) - len(shown), "layer"),
    )


def _curves(timing: Timing) -> list[str]:
    return [curve.source for curve in (timing.measured, timing.estimated) if curve.milliseconds]


def _legend(timing: Timing) -> list[Child]:
    """What the signs mean, and where the figures come from."""
    curves = (timing.measured.milliseconds, timing.estimated.milliseconds)
    said: list[Child] = []
    if timing.measured.milliseconds:
        detail = f" ({timing.measured.detail})" if timing.measured.detail else ""
        said.append([element("span", class_="key dot"), f" measured on the device{detail}. "])
    if timing.estimated.milliseconds:
        method = f": {timing.estimated.detail}" if timing.estimated.detail else ""
        said.append([element("span", class_="key square"), f" estimated{method}. "])
    if timing.budget_ms is not None:
        sign = element("span", class_="key budget") if is_budget_near(curves, timing.budget_ms) else None
        said.append([sign, f" The budget of an answer is {milliseconds(timing.budget_ms)}."])
    return said


def _rows(variant: VariantReport, limits: Limits) -> list[Child]:
    timing = variant.timing
    shown = timing.sizes[: limits.rows]
    rows: list[Row] = []
    for size in shown:
        measured, estimated = timing.measured.milliseconds.get(size), timing.estimated.milliseconds.get(size)
        off, best = timing.estimate_is_off(size), timing.best.milliseconds.get(size)
        rows.append(
            [
                Cell(str(size), size),
                figure_cell(measured, milliseconds(measured)),
                figure_cell(estimated, approximate(estimated)),
                figure_cell(off, signed_percent(off)),
                throughput_cell(size * 1000 / best if best else None, is_estimate=timing.best is timing.estimated),
            ]
        )
    columns = ["batch", "measured", "estimated", "estimate is off by", "answers a second"]
    return [
        table(f"Latency of {variant.title} by batch size", columns, rows),
        left_out(len(timing.sizes) - len(shown), "batch size"),
    ]


def _recommended(variant: VariantReport) -> Html | None:
    """The batches to gather, where there is a budget to hold them against."""
    timing, found = variant.timing, variant.timing.batching
    if found is None or timing.budget_ms is None:
        return None
    is_estimate = found.source == "estimated"
    part = "" if variant.record.stage == "main" else "the budget is that of the whole chain, of which this is one stage"
    reasons = [*found.reasons, *([part] if part else [])]
    return element(
        "div",
        element(
            "p",
            element("strong", f"Batches for {milliseconds(timing.budget_ms)} "),
            budget_badge(found.meets_budget),
            badge("estimated", "warn") if is_estimate else None,
        ),
        facts(
            [
                ("gather", ", ".join(map(str, found.preferred[:16]))),
                ("at most", str(found.max_batch)),
                ("wait at most", delay_text(found.max_queue_delay_us)),
                ("execution at most", _said(found.milliseconds, is_estimate=is_estimate)),
                ("answers a second", throughput(found.throughput, is_estimate=is_estimate)),
            ]
        ),
        element("ul", [element("li", reason) for reason in reasons], class_="soft") if reasons else None,
        class_="advice",
    )


def _said(value: float | None, *, is_estimate: bool) -> str:
    return approximate(value) if is_estimate else milliseconds(value)


def budget_badge(meets: bool | None) -> Html | None:
    if meets is None:
        return None
    return badge("within the budget", "good") if meets else badge("above the budget", "bad")


def delay_text(microseconds: int) -> str:
    return milliseconds(microseconds / 1000) if microseconds else "not at all"


def approximate(value: float | None) -> str:
    """Milliseconds that were estimated: ``~8.24 ms``."""
    return milliseconds(value) if value is None else f"~{milliseconds(value)}"


def signed_percent(share: float | None) -> str:
    """``+43 %``: how far an estimate lies above what was measured."""
    if share is None or not math.isfinite(share):
        return number(None)
    return f"{'+' if share >= 0 else '−'}{percent(abs(share))}"


def throughput(per_second: float | None, *, is_estimate: bool) -> str:
    if per_second is None or not math.isfinite(per_second):
        return number(None)
    return f"{'~' if is_estimate else ''}{scaled(per_second)}"


def throughput_cell(per_second: float | None, *, is_estimate: bool) -> Cell:
    return figure_cell(per_second, throughput(per_second, is_estimate=is_estimate))
