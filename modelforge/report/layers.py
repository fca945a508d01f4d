"""What a card says of single layers: their SQNR as bars, which stayed higher and why, the sensitivity curve."""

from __future__ import annotations

from modelforge.report.charts import bar, curve, skyline
from modelforge.report.collect import VariantReport
from modelforge.report.documents import CurvePoint, Layer, SensitivityDocument
from modelforge.report.markup import (
    Cell,
    Child,
    Drawing,
    Html,
    Limits,
    Row,
    badge,
    decibels,
    drop_text,
    element,
    figure_cell,
    folded,
    headed,
    left_out,
    number,
    percent,
    plural,
    shortened,
    table,
)

FULL_SQNR_DB = 60.0
"""Where a bar is full, unless a layer has more: an FP16 rounding has 66 dB, quantized layers have 10 to 45."""


def layer_bars(variant: VariantReport, limits: Limits) -> Html | None:
    """All layers at a glance, and as a table to sort."""
    if not variant.layers:
        return None
    worst = sorted(variant.layers, key=lambda layer: (layer.sqnr_db is None, layer.sqnr_db or 0.0, layer.node))
    shown = worst[: limits.layers]
    full = max(FULL_SQNR_DB, *(layer.sqnr_db or 0.0 for layer in shown))
    higher = sum(map(variant.is_higher, variant.layers))
    own = "int8" if variant.record.precision == "mixed" else variant.record.precision or "at the rung"
    rows: list[Row] = [
        [
            element("code", layer.node),
            figure_cell(layer.sqnr_db, decibels(layer.sqnr_db)),
            Drawing(bar((layer.sqnr_db or 0.0) / full, "higher" if variant.is_higher(layer) else "lower")),
            layer.op,
            layer.precision or number(None),
        ]
        for layer in shown
    ]
    columns = ["layer", "SQNR", "0 to " + decibels(full), "operator", "precision"]
    measured = [layer for layer in shown if layer.sqnr_db is not None]
    glance = [((layer.sqnr_db or 0.0) / full, variant.is_higher(layer), _said(layer)) for layer in measured]
    legend = element(
        "p",
        element("span", class_="key lower"),
        f" {own} ",
        [element("span", class_="key higher"), " kept higher "] if higher else None,
        f"– a bar is a layer, worst first; full height is {decibels(full)}.",
        class_="soft",
    )
    counted = plural(len(variant.layers), "layer") + (f", {higher} kept higher" if higher else "")
    return headed(
        f"Signal to noise by layer ({counted})",
        [skyline(glance, f"SQNR of the layers of {variant.title}, worst first"), legend] if glance else None,
        folded(
            "All layers" if len(shown) == len(worst) else f"The {len(shown)} worst layers",
            table(f"SQNR of each layer of {variant.title}", columns, rows),
            left_out(len(worst) - len(shown), "layer", "with a higher SQNR"),
        ),
    )


def _said(layer: Layer) -> str:
    return f"{layer.node} ({layer.op}): {decibels(layer.sqnr_db)}" + (f", {layer.precision}" if layer.precision else "")


def kept_higher(variant: VariantReport, limits: Limits) -> Html | None:
    groups = variant.kept_higher()
    if not groups:
        return None
    count = sum(map(len, groups.values()))
    left = limits.layers
    items = []
    for reason, nodes in list(groups.items())[: limits.rows]:
        named, left = nodes[: max(3, left)], left - len(nodes)
        more = f" and {len(nodes) - len(named)} more" if len(nodes) > len(named) else None
        names = element("p", [[element("code", shortened(node, 120)), " "] for node in named], more, class_="names")
        title: list[Child] = [element("strong", plural(len(nodes), "layer")), " – ", reason]
        items.append(element("li", folded(title, names) if len(nodes) > 3 else [element("p", title), names]))
    return headed(
        f"Stayed higher, and why ({plural(count, 'layer')})",
        element("ul", items, class_="reasons"),
        left_out(len(groups) - len(items), "reason"),
    )


def sensitivity(variant: VariantReport, limits: Limits) -> Html | None:
    found = variant.sensitivity
    if found is None:
        return None
    drawn = [
        element("figure", drawing, element("figcaption", caption))
        for drawing, caption in (
            (
                curve(found.curve, "drop", found.chosen, variant.record.accuracy.max_drop),
                f"Drop of {found.metric or variant.record.accuracy.metric or 'the metric'}; dashed: what is allowed",
            ),
            (curve(found.curve, "sqnr_db", found.chosen, unit=" dB"), "SQNR at the outputs"),
        )
        if drawing is not None
    ]
    parts = [
        element("p", _choice(found), class_="soft"),
        element("div", drawn, class_="curves") if drawn else None,
        _curve_table(variant, found, limits),
        _ranking(variant, found, limits),
    ]
    return headed("Sensitivity", parts)


def _choice(found: SensitivityDocument) -> str:
    if not found.curve:
        return "Layers were ranked; no search was needed."
    if found.chosen is None:
        return f"None of the {plural(len(found.curve), 'set')} of layers tried met the gate."
    if not found.chosen:
        return "The gate was met with no layer kept higher."
    return f"{plural(found.chosen, 'layer')} kept higher is the fewest tried that met the gate (ringed)."


def _curve_table(variant: VariantReport, found: SensitivityDocument, limits: Limits) -> Html | None:
    if not found.curve:
        return None
    rows = [_point_row(point, found.chosen) for point in found.curve[: limits.rows]]
    columns = ["kept higher", "value", "change", "SQNR", "agreement", "gate"]
    return folded(
        f"The {plural(len(found.curve), 'set')} tried",
        table(f"Sets of layers kept higher that were tried for {variant.title}", columns, rows),
        left_out(len(found.curve) - len(rows), "set"),
    )


def _point_row(point: CurvePoint, chosen: int | None) -> Row:
    return [
        Cell(f"{point.excluded}{' (chosen)' if point.excluded == chosen else ''}", point.excluded),
        figure_cell(point.value, number(point.value)),
        figure_cell(point.drop, drop_text(point.drop)),
        figure_cell(point.sqnr_db, decibels(point.sqnr_db)),
        figure_cell(point.agreement, percent(point.agreement)),
        badge(point.gate or "none"),
    ]


def _ranking(variant: VariantReport, found: SensitivityDocument, limits: Limits) -> Html | None:
    shown = found.ranking[: limits.layers]
    if not shown:
        return None
    full = max(FULL_SQNR_DB, *(layer.sqnr_db or 0.0 for layer in shown))
    rows: list[Row] = [
        [
            element("code", layer.node),
            figure_cell(layer.sqnr_db, decibels(layer.sqnr_db)),
            Drawing(bar((layer.sqnr_db or 0.0) / full, "lower")),
            layer.op,
        ]
        for layer in shown
    ]
    caption = f"Layers of {variant.title} by what each alone loses at int8"
    return folded(
        f"Ranking: what each layer alone loses ({plural(len(found.ranking), 'layer')})",
        table(caption, ["layer", "local SQNR", "0 to " + decibels(full), "operator"], rows),
        left_out(len(found.ranking) - len(shown), "layer", "further down"),
    )
