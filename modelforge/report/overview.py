"""What a page says of all variants at once: tiles, the summary, changes against FP32, where everything comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelforge.report.charts import bar
from modelforge.report.collect import Report, VariantReport
from modelforge.report.markup import (
    Child,
    Drawing,
    Html,
    Limits,
    Row,
    badge,
    bytes_text,
    decibels,
    digest,
    drop_text,
    element,
    facts,
    figure_cell,
    join,
    milliseconds,
    number,
    percent,
    table,
    verdict_kind,
)


def tiles(report: Report) -> Html:
    records = [variant.record for variant in report.variants]
    compiled = sum(record.status == "compiled" for record in records)
    gates = [record.accuracy.gate for record in records]
    passed, failed = gates.count("passed"), gates.count("failed") + sum(record.status == "failed" for record in records)
    worst = max(_losses(report), key=lambda each: each.drop, default=None)
    ran = sum(record.accuracy.evidence in ("device", "emulator") for record in records)
    kept = sum(len(nodes) for variant in report.variants for nodes in variant.kept_higher().values())
    return element(
        "ul",
        _tile(f"{compiled} of {len(records)}", "variants compiled", "good" if compiled == len(records) else "warn"),
        _tile(f"{passed} of {len(records)}", "gates passed", "bad" if failed else "good" if passed else "plain"),
        _tile(drop_text(worst.drop), f"largest change: {worst.title}", "plain") if worst else None,
        _tile(f"{ran} of {len(records)}", "run as compiled, on a device or emulated", "plain"),
        _tile(str(kept), "layers kept higher, in all", "plain") if kept else None,
        class_="tiles",
    )


def _tile(figure: str, meaning: str, kind: str) -> Html:
    return element("li", element("strong", figure), element("span", meaning), class_=kind)


def left_out_parts(report: Report, limits: Limits) -> Html | None:
    """What the bundle says in a shape that this version does not know: told, since it is missing below."""
    told = report.left_out
    if not told:
        return None
    more = len(told) - limits.rows
    return element(
        "div",
        element("strong", "Left out: parts of the bundle have another shape than this version knows"),
        element("ul", [element("li", fault) for fault in told[: limits.rows]]),
        element("p", f"and {more} more") if more > 0 else None,
        class_="callout",
    )


def summary(report: Report, anchors: Sequence[str]) -> Html:
    metrics = sorted({variant.record.accuracy.metric for variant in report.variants if variant.record.accuracy.metric})
    columns = "target status precision gate FP32 value change SQNR agreement evidence latency size".split()
    rows: list[Row] = []
    for variant, anchor in zip(report.variants, anchors, strict=True):
        record, accuracy = variant.record, variant.record.accuracy
        size = record.artifact.size if record.artifact else None
        rows.append(
            [
                element("a", variant.title, href=f"#{anchor}"),
                badge(record.status),
                record.precision or number(None),
                badge(accuracy.gate),
                figure_cell(accuracy.reference, number(accuracy.reference)),
                figure_cell(accuracy.value, number(accuracy.value)),
                figure_cell(accuracy.drop, drop_text(accuracy.drop)),
                figure_cell(accuracy.sqnr_db, decibels(accuracy.sqnr_db, identical=accuracy.identical)),
                figure_cell(accuracy.agreement, percent(accuracy.agreement)),
                accuracy.evidence,
                figure_cell(variant.latency_ms, milliseconds(variant.latency_ms)),
                figure_cell(size, number(None) if size is None else bytes_text(size)),
            ]
        )
    return table(f"All variants; metric: {', '.join(metrics)}" if metrics else "All variants", columns, rows)


def deltas(report: Report) -> list[Html]:
    """Drops against what is allowed, and latencies against the budget and the other rungs."""
    judged = _losses(report)
    timed = [variant for variant in report.variants if variant.latency_ms is not None]
    parts = []
    if judged:
        full = 1.25 * max(*(each.allowed or 0.0 for each in judged), *(each.drop for each in judged)) or 1.0
        rows = [_drop_row(each, full) for each in judged]
        columns = ["target", "change", f"0 to {number(full)}; line: allowed", "allowed", "precision"]
        parts.append(table("Accuracy: loss against FP32", columns, rows))
    else:
        parts.append(element("p", "No variant has a metric to compare.", class_="soft"))
    budget = report.facts.budget_ms
    if timed:
        full = 1.1 * max(*(variant.latency_ms or 0.0 for variant in timed), budget or 0.0) or 1.0
        rows = [_latency_row(variant, full, budget) for variant in timed]
        scale = f"0 to {milliseconds(full)}" + ("; line: budget" if budget else "")
        columns = ["target", "latency", scale, "of the budget", "against other rungs", "measured on", "precision"]
        parts.append(table("Latency: median of one call", columns, rows))
    untimed = len(report.variants) - len(timed)
    if untimed:
        said = "No variant" if not timed else f"{untimed} of {len(report.variants)} variants"
        parts.append(element("p", f"{said} {'was' if not timed else 'were not'} timed.", class_="soft"))
    return parts


@dataclass(frozen=True)
class _Loss:
    """What a variant, or a chain of them as the whole model, loses by the metric; the change is negated."""

    title: str
    drop: float
    allowed: float | None
    gate: str | None
    precision: str | None


def _losses(report: Report) -> list[_Loss]:
    """Of the chains first: they are the model, and their stages only parts of it."""
    found = []
    precisions = {(each.record.stage, each.record.target): each.record.precision for each in report.variants}
    splits = [*([report.facts.split] if report.facts.split else []), *report.facts.partitions.values()]
    for chain in (chain for split in splits for chain in split.chains):
        if chain.accuracy is None or chain.accuracy.drop is None:
            continue
        title = "chain " + ", ".join(dict.fromkeys(step.target for step in chain.stages))
        rungs = [precisions.get((step.stage, step.target)) or number(None) for step in chain.stages]
        accuracy = chain.accuracy
        found.append(_Loss(title, chain.accuracy.drop, accuracy.max_drop, accuracy.gate, " + ".join(rungs)))
    for variant in report.variants:
        judged = variant.record.accuracy
        if judged.drop is not None:
            found.append(_Loss(variant.title, judged.drop, judged.max_drop, judged.gate, variant.record.precision))
    return found


def _drop_row(loss: _Loss, full: float) -> Row:
    mark = None if loss.allowed is None else loss.allowed / full
    return [
        loss.title,
        figure_cell(loss.drop, drop_text(loss.drop)),
        Drawing(bar(max(loss.drop, 0.0) / full, verdict_kind(loss.gate or "none"), mark)),
        figure_cell(loss.allowed, number(loss.allowed)),
        loss.precision or number(None),
    ]


def _latency_row(variant: VariantReport, full: float, budget: float | None) -> Row:
    latency = variant.latency_ms or 0.0
    share = latency / budget if budget else None
    others = [badge(said, kind) for said, kind in variant.faster_or_slower()]
    kind = "ok" if share is None or share <= 1 else "not-ok"
    return [
        variant.title,
        figure_cell(latency, milliseconds(latency)),
        Drawing(bar(latency / full, kind, budget / full if budget else None)),
        figure_cell(share, percent(share)),
        [[each, " "] for each in others] or number(None),
        variant.record.latency.evidence,
        variant.record.precision or number(None),
    ]


def provenance(report: Report) -> list[Child]:
    about = report.about
    opsets = about.get("model", {}).get("opsets") if isinstance(about.get("model"), dict) else None
    said = (
        [f"{domain or 'ai.onnx'} {version}" for domain, version in opsets.items()] if isinstance(opsets, dict) else []
    )
    head = facts(
        [
            ("bundle", digest(report.digest)),
            ("model", _digest_at(about, "model")),
            ("recipe", _digest_at(about, "recipe")),
            ("model's producer", text_at(about, "model", "producer")),
            ("opsets", ", ".join(said[:20]) or None),
            ("inputs", _tensors(about.get("inputs"))),
            ("outputs", _tensors(about.get("outputs"))),
            ("built by", _built_by(about)),
        ]
    )
    rows: list[Row] = [
        [
            variant.title,
            variant.record.compiler or number(None),
            ", ".join(f"{name} {version}" for name, version in list(variant.record.toolchain.items())[:12])
            or number(None),
            digest(variant.digest),
            digest(variant.record.artifact.digest) if variant.record.artifact else number(None),
        ]
        for variant in report.variants
    ]
    columns = ["target", "compiler", "toolchain", "manifest", "artifact"]
    return [head, table("Where each variant comes from", columns, rows)]


def _built_by(about: Mapping[str, Any]) -> str | None:
    version = about.get("modelforge")
    return f"ModelForge {version}" if isinstance(version, str) else None


def _tensors(value: object) -> Child:
    """The tensors of a model as the record gives them; what is of another shape is passed over."""
    if not isinstance(value, list):
        return None
    said = []
    for tensor in value[:20]:
        if isinstance(tensor, dict):
            shape = tensor.get("shape")
            sizes = " x ".join(map(str, shape)) if isinstance(shape, list) else "?"
            said.append(f"{tensor.get('name')}: {tensor.get('dtype')} {sizes}")
    return join([element("code", each), element("br")] for each in said) or None


def _digest_at(about: Mapping[str, Any], key: str) -> Html | None:
    value = text_at(about, key, "digest")
    return digest(value) if value else None


def text_at(about: Mapping[str, Any], *keys: str) -> str | None:
    value = _at(about, *keys)
    return value if isinstance(value, str) and value else None


def _at(about: Mapping[str, Any], *keys: str) -> Any:
    value: Any = about
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
