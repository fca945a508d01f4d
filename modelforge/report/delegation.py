"""What runs on an NPU and what on the CPU beside it: a part of the card of a variant, and a section on partitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelforge.bundle.record import Delegation
from modelforge.report.collect import Report, VariantReport
from modelforge.report.documents import PartitionCost
from modelforge.report.latency import approximate
from modelforge.report.markup import (
    Cell,
    Child,
    Html,
    Limits,
    Row,
    bytes_text,
    element,
    figure_cell,
    folded,
    headed,
    left_out,
    number,
    percent,
    plural,
    scaled,
    table,
)
from modelforge.report.stages import split_parts

_COLUMNS = ["place", "operators", "share", "MACs", "share"]


def delegation(variant: VariantReport, limits: Limits) -> Html | None:
    """Nothing where the record tells nothing of an NPU."""
    found = variant.record.delegation
    if found is None:
        return None
    off = found.off_npu[: limits.rows]
    return headed(
        "NPU and CPU",
        table(f"Where {variant.title} runs", _COLUMNS, _rows(found)[: limits.rows]),
        element("p", f"Known from: {found.source}.", class_="soft"),
        folded(
            f"{plural(len(found.off_npu), 'operator')} not on the NPU",
            element("ul", [element("li", element("code", name)) for name in off]),
            left_out(len(found.off_npu) - len(off), "operator"),
        )
        if off
        else None,
    )


def partitions(report: Report, anchors: Sequence[str], limits: Limits) -> list[Child]:
    """For each target whose model its NPU and its CPU share: the stages, what crosses and what that costs."""
    found: list[Child] = []
    for tag, split in list(report.facts.partitions.items())[: limits.rows]:
        found.append(element("h3", tag))
        found += split_parts(split, report.variants, anchors, limits)
        found.append(_costs(tag, split.costs, limits))
    return found


def _rows(found: Delegation) -> list[Row]:
    places = dict.fromkeys(("npu", "cpu", *(found.operators or {}), *(found.macs or {})))
    return [[place.upper(), *_figures(found.operators, place), *_figures(found.macs, place)] for place in places]


def _figures(counts: Mapping[str, int] | None, place: str) -> tuple[Cell, Cell]:
    """How many are in a place, and their share of all."""
    if counts is None:
        return figure_cell(None, number(None)), figure_cell(None, number(None))
    count, total = counts.get(place, 0), sum(counts.values())
    share = count / total if total else None
    return figure_cell(count, scaled(count) if count > 9999 else str(count)), figure_cell(share, percent(share))


def _costs(tag: str, costs: Sequence[PartitionCost], limits: Limits) -> Html | None:
    if not costs:
        return None
    rows: list[Row] = []
    for cost in costs[: limits.rows]:
        seconds = cost.seconds
        times = [seconds.crossing, seconds.npu, seconds.cpu, seconds.saved]
        cells = [figure_cell(each, number(None) if each is None else _milliseconds(each)) for each in times]
        rows.append([cost.stage, str(cost.tensors), figure_cell(cost.bytes, bytes_text(cost.bytes)), *cells])
    columns = ["on the NPU", "tensors", "handed over", "handing over", "on the NPU", "on the CPU", "saved"]
    return headed(
        "What handing over costs, by estimate",
        table(f"Stages on the NPU of {tag}", columns, rows),
        left_out(len(costs) - len(rows), "stage"),
    )


def _milliseconds(seconds: float) -> str:
    return f"-{approximate(-seconds * 1e3)}" if seconds < 0 else approximate(seconds * 1e3)
