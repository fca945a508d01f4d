"""The section on where each variant can run and how to serve it: tier, time of one sample, batches, budget."""

from __future__ import annotations

from collections.abc import Sequence

from modelforge.report.collect import Report, VariantReport
from modelforge.report.documents import Place, PlacementFacts
from modelforge.report.latency import approximate, budget_badge, delay_text, signed_percent, throughput_cell
from modelforge.report.markup import (
    Cell,
    Child,
    Row,
    badge,
    bytes_text,
    element,
    figure_cell,
    milliseconds,
    number,
    table,
)


def placement(report: Report, anchors: Sequence[str]) -> list[Child]:
    """Nothing where the bundle says neither tiers nor times."""
    timed = any(variant.timing.sizes for variant in report.variants)
    elsewhere = _elsewhere(report.facts.placement)
    if not timed and not any(target.tier for target in report.facts.targets.values()):
        return elsewhere
    budget, fallback = report.facts.budget_ms, report.facts.serving.fallback
    rows = [_row(report, variant, anchor) for variant, anchor in zip(report.variants, anchors, strict=True)]
    columns = ["target", "device", "tier", "status", "precision", "one sample", "known by", "estimated",
               "estimate is off by", "gather", "wait at most", "answers a second", "budget"]  # fmt: skip
    caption = "Where each variant runs, and the batches to serve it with" + (
        f"; an answer may take {milliseconds(budget)}" if budget is not None else ""
    )
    path = [
        element("p", "Fallback as the recipe gives it: ", element("strong", " → ".join(fallback[:16])), ".")
        if fallback
        else None,
        element(
            "p",
            "~ marks what was estimated. ",
            element("code", "modelforge select"),
            " chooses on a device, with its facts and links.",
            class_="soft",
        ),
    ]
    return [table(caption, columns, rows), *path, *elsewhere]


def _elsewhere(facts: PlacementFacts | None) -> list[Child]:
    """Every target profile beside the model, by estimate: also those that the bundle has no variant for."""
    if facts is None or not facts.rows:
        return []
    columns = ["target", "tier", "can run it", "at", "one sample", "takes", "may take", "why not better"]
    caption = f"Where the model can run, by estimate; an answer may take {milliseconds(facts.budget_ms)}"
    return [table(caption, columns, [_place(place) for place in facts.rows[:_PLACES]])]


def _place(place: Place) -> Row:
    best = next((each for each in place.estimates if each.precision == place.precision), None)
    best = best or (place.estimates[0] if place.estimates else None)
    time = None if best is None else best.latency_ms
    return [
        place.target,
        place.tier,
        badge(place.verdict),
        place.precision or number(None),
        figure_cell(time, approximate(time)),
        _bytes(best.needed_bytes if best else None),
        _bytes(best.allowed_bytes if best else None),
        element("span", place.why, class_="why") if place.why else number(None),
    ]


def _bytes(size: int | None) -> Cell:
    return figure_cell(size, number(None) if size is None else bytes_text(size))


_PLACES = 200


def _row(report: Report, variant: VariantReport, anchor: str) -> Row:
    record, timing, batching = variant.record, variant.timing, variant.timing.batching
    known = report.facts.targets
    target = known.get(f"{record.target}/{record.stage}", known.get(record.target))
    measured, estimated = timing.measured.at(1).milliseconds, timing.estimated.at(1).milliseconds
    one = estimated if measured is None else measured
    is_estimate = batching is not None and batching.source == "estimated"
    delay = None if batching is None else batching.max_queue_delay_us
    off = timing.estimate_is_off(1)
    return [
        element("a", variant.title, href=f"#{anchor}"),
        element("span", (target.title if target else None) or number(None), class_="why"),
        (target.tier if target else None) or number(None),
        badge(record.status),
        record.precision or number(None),
        figure_cell(one, milliseconds(one) if measured is not None else approximate(one)),
        timing.best.source if one is not None else "nothing",
        figure_cell(estimated, approximate(estimated)),
        figure_cell(off, signed_percent(off)),
        Cell(number(None), None)
        if batching is None
        else Cell(", ".join(map(str, batching.preferred[:8])), batching.max_batch),
        figure_cell(delay, number(None) if delay is None else delay_text(delay)),
        throughput_cell(None if batching is None else batching.throughput, is_estimate=is_estimate),
        (budget_badge(batching.meets_budget) if batching is not None else None) or number(None),
    ]
