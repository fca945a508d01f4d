"""The calibration tables of a page: histograms with their clip range, and all ranges as figures."""

from __future__ import annotations

from collections.abc import Sequence

from modelforge.report.charts import clipped_share, histogram
from modelforge.report.collect import Report, VariantReport
from modelforge.report.documents import CalibrationDocument, TensorRange
from modelforge.report.markup import (
    Html,
    Limits,
    Row,
    digest,
    element,
    facts,
    figure_cell,
    folded,
    percent,
    significant,
    table,
)


def range_tables(report: Report) -> dict[str, tuple[CalibrationDocument, list[VariantReport]]]:
    """Range tables by digest: what several variants share is shown once."""
    found: dict[str, tuple[CalibrationDocument, list[VariantReport]]] = {}
    for variant in report.variants:
        if variant.calibration is not None and variant.calibration_digest is not None:
            found.setdefault(variant.calibration_digest, (variant.calibration, []))[1].append(variant)
    return found


def range_table(document: CalibrationDocument, used: Sequence[VariantReport], limits: Limits) -> Html:
    drawable = [tensor for tensor in document.tensors if tensor.bins is not None and any(tensor.bins.counts)]
    most_clipped = sorted(drawable, key=lambda tensor: -(clipped_share(tensor) or 0.0))[: limits.histograms]
    chosen = {id(tensor) for tensor in most_clipped}
    drawn = [_histogram(tensor) for tensor in drawable if id(tensor) in chosen]
    left = len(drawable) - len(drawn)
    which = f"the {len(drawn)} most clipped of {len(drawable)}" if left else f"{len(drawn)}"
    shown = document.tensors[: limits.layers]
    more = len(document.tensors) - len(shown)
    return element(
        "article",
        element("h3", ", ".join(variant.title for variant in used[:12])),
        facts(
            [
                ("samples", str(document.samples)),
                ("method", document.method),
                ("tensors", str(len(document.tensors))),
                ("data", digest(document.data_digest) if document.data_digest else None),
            ]
        ),
        folded(
            f"Activation histograms ({which})",
            element(
                "p",
                "Counts on a logarithmic scale. Lines: the clip range; shaded: what is clipped to its ends.",
                class_="soft",
            ),
            element("ul", drawn, class_="histograms"),
            open_=len(drawn) <= 40,
        )
        if drawn
        else None,
        folded("All ranges", _ranges(shown), f"{more} more are not shown; `--json` has all." if more else None)
        if shown
        else None,
        class_="card",
    )


def _histogram(tensor: TensorRange) -> Html:
    bins = tensor.bins
    assert bins is not None, "only tensors with bins are drawn"
    low, high = min(bins.low, tensor.low), max(bins.high, tensor.high)
    share = clipped_share(tensor)
    return element(
        "li",
        element(
            "figure",
            element("figcaption", element("code", tensor.name)),
            histogram(tensor, bins),
            element("p", element("span", significant(low)), element("span", significant(high)), class_="ends"),
            element(
                "p",
                f"clip {significant(tensor.low)} … {significant(tensor.high)}, ",
                element("b", f"{percent(share)} outside"),
                class_="soft",
            ),
        ),
    )


def _ranges(tensors: Sequence[TensorRange]) -> Html:
    columns = ["tensor", "smallest", "largest", "clip from", "clip to", "outside", "zeros"]
    rows: list[Row] = []
    for tensor in tensors:
        counted = sum(tensor.bins.counts) if tensor.bins else 0
        zeros = min(1.0, tensor.zeros / counted) if counted and tensor.zeros is not None else None
        plain = [tensor.minimum, tensor.maximum, tensor.low, tensor.high]
        shares = [clipped_share(tensor), zeros]
        rows.append(
            [
                element("code", tensor.name),
                *(figure_cell(value, significant(value)) for value in plain),
                *(figure_cell(share, percent(share)) for share in shares),
            ]
        )
    return table("Ranges of all activations", columns, rows)
