"""The card of one variant: figures, ladder, outputs, layers, what stayed higher and why, sensitivity, build, files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from modelforge.bundle.record import Accuracy
from modelforge.report.collect import VariantReport
from modelforge.report.delegation import delegation
from modelforge.report.documents import OutputFigures
from modelforge.report.latency import latency, layer_times
from modelforge.report.layers import kept_higher, layer_bars, sensitivity
from modelforge.report.markup import (
    Cell,
    Child,
    Drawing,
    Html,
    Limits,
    Row,
    badge,
    bytes_text,
    cosine_text,
    decibels,
    digest,
    drop_text,
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
    shortened,
    table,
)


def card(variant: VariantReport, anchor: str, limits: Limits) -> Html:
    record = variant.record
    return element(
        "article",
        element(
            "header",
            element("h3", variant.title, id=f"{anchor}-title"),
            element(
                "p",
                badge(record.status),
                badge(record.precision, "precision") if record.precision else None,
                badge(f"gate {record.accuracy.gate}", _gate_kind(record.accuracy.gate)),
                [badge(said, kind) for said, kind in variant.faster_or_slower()],
                element("span", record.compiler or "no compiler", class_="soft"),
                class_="badges",
            ),
        ),
        _reasons(variant),
        _figures(variant),
        _ladder(variant),
        latency(variant, limits),
        layer_times(variant, limits),
        delegation(variant, limits),
        kept_higher(variant, limits),
        sensitivity(variant, limits),
        layer_bars(variant, limits),
        _outputs(variant, limits),
        _notes(variant, limits),
        _build(variant, limits),
        _provenance(variant, limits),
        class_="card",
        id=anchor,
        aria_labelledby=f"{anchor}-title",
    )


def _gate_kind(gate: str | None) -> str:
    return {"passed": "good", "failed": "bad", "overridden": "warn"}.get(gate or "", "plain")


def _reasons(variant: VariantReport) -> Html | None:
    if not variant.reasons:
        return None
    return element(
        "div",
        element("strong", f"Gate {variant.record.accuracy.gate}"),
        element("ul", [element("li", reason) for reason in variant.reasons[:20]]),
        class_="callout",
    )


def _figures(variant: VariantReport) -> Html:
    record, accuracy = variant.record, variant.record.accuracy
    batch = record.batch.model_dump(exclude_none=True) if record.batch else None
    return facts(
        [
            *_accuracy_figures(accuracy),
            ("samples", None if accuracy.samples is None else str(accuracy.samples)),
            ("evidence", accuracy.evidence),
            ("latency", _latency(variant)),
            ("size", bytes_text(record.artifact.size) if record.artifact else None),
            ("batch", None if batch is None else _batch(batch)),
        ]
    )


def _accuracy_figures(accuracy: Accuracy) -> list[tuple[str, Child]]:
    """What was measured; nothing for what was not."""
    metric = accuracy.metric or "metric"
    rows: list[tuple[str, float | None, Child]] = [
        (f"{metric}, FP32", accuracy.reference, number(accuracy.reference)),
        (f"{metric}, this variant", accuracy.value, element("strong", number(accuracy.value))),
        ("change", accuracy.drop, drop_text(accuracy.drop)),
        ("allowed to drop", accuracy.max_drop, number(accuracy.max_drop)),
        (
            "SQNR",
            0.0 if accuracy.identical else accuracy.sqnr_db,
            decibels(accuracy.sqnr_db, identical=accuracy.identical),
        ),
        ("cosine", accuracy.cosine, cosine_text(accuracy.cosine)),
        ("agreement", accuracy.agreement, percent(accuracy.agreement)),
    ]
    return [(name, shown) for name, value, shown in rows if value is not None]


def _batch(batch: Mapping[str, Any]) -> str:
    if "values" in batch:
        return ", ".join(map(str, batch["values"][:16]))
    return f"{batch['min']} to {batch['max']}, best at {batch['opt']}"


def _latency(variant: VariantReport) -> Child:
    if variant.latency_ms is None:
        return "not measured"
    said = variant.record.latency.model_dump()
    more = ", ".join(
        f"{name.removesuffix('_ms')} {number(said[name], 2)}"
        for name in ("min_ms", "p90_ms", "p99_ms")
        if isinstance(said.get(name), int | float) and not isinstance(said.get(name), bool)
    )
    return [milliseconds(variant.latency_ms), element("small", f" ({more})") if more else None]


def _ladder(variant: VariantReport) -> Html | None:
    rungs = variant.rungs
    if not rungs:
        return None
    timed = any(rung.latency_ms is not None for rung in rungs)
    kept = any(rung.kept is not None for rung in rungs)
    columns = ["rung", "gate", "value", "change", "SQNR", "agreement"]
    columns += ["kept higher"] * kept + ["latency"] * timed + ["why"]
    rows: list[Row] = []
    for rung in rungs:
        row: list[Child | Cell | Drawing] = [
            [rung.precision, element("small", " taken") if rung.precision == variant.record.precision else None],
            badge(rung.gate or "none"),
            figure_cell(rung.value, number(rung.value)),
            figure_cell(rung.drop, drop_text(rung.drop)),
            figure_cell(rung.sqnr_db, decibels(rung.sqnr_db, identical=rung.identical)),
            figure_cell(rung.agreement, percent(rung.agreement)),
        ]
        row += [figure_cell(rung.kept, number(None) if rung.kept is None else str(rung.kept))] * kept
        row += [figure_cell(rung.latency_ms, milliseconds(rung.latency_ms))] * timed
        rows.append([*row, element("span", rung.reason or "", class_="why")])
    return headed("Ladder", table(f"Ladder of {variant.title}, in the order tried", columns, rows))


def _outputs(variant: VariantReport, limits: Limits) -> Html | None:
    """Each output, and under it its channel groups where it mixes meanings (boxes and scores)."""
    names = {row.output: at for at, row in reversed(list(enumerate(variant.outputs)))}
    grouped = sorted(variant.outputs, key=lambda row: (names[row.output], row.group is not None))
    rows: list[Row] = [
        [
            _output_name(row),
            figure_cell(row.sqnr_db, decibels(row.sqnr_db, identical=row.identical)),
            figure_cell(row.cosine, cosine_text(row.cosine)),
            figure_cell(row.max_abs, number(row.max_abs)),
            figure_cell(row.agreement, percent(row.agreement)),
        ]
        for row in grouped[: limits.rows]
    ]
    if not rows:
        return None
    columns = ["output", "SQNR", "cosine", "largest error", "agreement"]
    groups = sum(row.group is not None for row in grouped)
    counted = f"{len(names)}, {plural(groups, 'channel group')}" if groups else str(len(names))
    return folded(
        f"Outputs against FP32 ({counted})",
        table(f"Outputs of {variant.title} against FP32", columns, rows),
        left_out(len(grouped) - len(rows), "row"),
        open_=bool(groups),
    )


def _output_name(row: OutputFigures) -> Child:
    """A group keeps its output's name beside it: a table that was sorted otherwise still says whose it is."""
    if row.group is None:
        return row.output
    return element("span", row.group, element("small", f" of {row.output}"), class_="group")


def _notes(variant: VariantReport, limits: Limits) -> Html | None:
    notes = variant.record.notes[: limits.rows]
    if not notes:
        return None
    return headed("Notes", element("ul", [element("li", note) for note in notes]))


def _build(variant: VariantReport, limits: Limits) -> Html | None:
    """What the steps reported: open facts, each compiler has its own."""
    build = variant.build
    if build is None:
        return None
    lower = {key: value for key, value in build.lower.items() if key != "kept"}
    parts = [
        [element("h4", title), _open_facts(found, limits)]
        for title, found in (("Prepared", build.prepare), ("Lowered", lower), ("Compiled", build.compile))
        if found
    ]
    return folded("How it was built", parts) if parts else None


def _open_facts(found: Mapping[str, Any], limits: Limits) -> Html:
    return facts((key.replace("_", " "), _value(value, limits)) for key, value in list(found.items())[: limits.rows])


def _value(value: Any, limits: Limits) -> Child:
    """Any JSON: plain values as text, switches by what is on, rules by name as a list, the rest as JSON."""
    if value is None or isinstance(value, str):
        return element("pre", value) if value and "\n" in value else value or number(None)
    if isinstance(value, dict) and value and all(isinstance(each, bool) for each in value.values()):
        return ", ".join(f"{name}{'' if on else ' (nothing to do)'}" for name, on in value.items())
    if isinstance(value, dict) and len(value) > 1 and all(isinstance(each, str) for each in value.values()):
        named = list(value.items())[: limits.layers]
        lines = [element("li", element("code", name), " ", each) for name, each in named]
        return folded(plural(len(value), "entry").replace("entrys", "entries"), element("ul", lines))
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return folded(str(len(value)), element("ul", [element("li", each) for each in value[: limits.layers]]))
    return json.dumps(value, ensure_ascii=False)[:2000]


def _provenance(variant: VariantReport, limits: Limits) -> Html:
    record = variant.record
    commands = [element("pre", _command(command)) for command in record.commands[: limits.rows]]
    toolchain = [f"{name} {version}" for name, version in list(record.toolchain.items())[: limits.rows]]
    files: list[Row] = [
        [element("code", title), entry.role, figure_cell(entry.size, bytes_text(entry.size)), digest(entry.digest)]
        for title, entry in list(variant.files.items())[: limits.rows]
    ]
    calibration = record.calibration
    return folded(
        "Provenance: digests, toolchain, commands, files",
        facts(
            [
                ("manifest", digest(variant.digest)),
                ("artifact", digest(record.artifact.digest) if record.artifact else None),
                ("toolchain", ", ".join(toolchain) or None),
                ("runs on", record.runtime.requires if record.runtime else None),
                ("calibrated with", None if calibration is None else plural(calibration.samples, "sample")),
                ("calibration data", None if calibration is None else digest(calibration.digest)),
            ]
        ),
        [element("h4", "Commands"), commands] if commands else None,
        table(f"Files of {variant.title}", ["file", "role", "size", "digest"], files) if files else None,
    )


def _command(command: Iterable[str]) -> Html:
    """A command on one line; longer than other text, as its end matters too."""
    return element("code", shortened(" ".join(command), 1200)) if command else Html("")
