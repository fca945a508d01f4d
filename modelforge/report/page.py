"""The HTML page of a bundle: one file that needs nothing else and forbids all network; the same for the same bundle.

Style and script are package data; the policy names them by digest, so that nothing else on the page can run.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import secrets
from importlib.resources import files
from pathlib import Path

from modelforge.errors import BuildError, InputError
from modelforge.report.calibration import range_table, range_tables
from modelforge.report.card import card
from modelforge.report.collect import Report
from modelforge.report.delegation import partitions
from modelforge.report.markup import (
    Child,
    Html,
    Limits,
    digest,
    element,
)
from modelforge.report.overview import deltas, left_out_parts, provenance, summary, text_at, tiles
from modelforge.report.placement import placement
from modelforge.report.stages import stages

SIZE_LIMIT = 3_000_000
"""Bytes of a page: what a phone opens at once."""

GENERATOR = "modelforge report"
_LAYERS_IN_ALL, _HISTOGRAMS_IN_ALL = 4000, 600


def render_html(report: Report) -> str:
    """The page, less than :data:`SIZE_LIMIT` bytes: where all would be more, rows are left out, and that is said."""
    variants = max(1, len(report.variants))
    layers, histograms, rows = _LAYERS_IN_ALL // variants, _HISTOGRAMS_IN_ALL // max(1, len(range_tables(report))), 200
    while True:
        page = _page(report, Limits(min(layers, 500), min(histograms, 200), rows))
        if len(page.encode()) < SIZE_LIMIT or not layers + histograms + rows:
            return page
        layers, histograms, rows = layers // 2, histograms // 2, rows // 2


def write_html(report: Report, file: Path, *, bundle: Path) -> int:
    """Write the page as ``file``, whole or not at all, replacing a file that stands there; gives its size in bytes.

    Raises:
        InputError: ``file`` lies inside the bundle, is no plain file, or cannot be written.
        BuildError: no space.
    """
    place = file.resolve()
    if place.is_relative_to(bundle.resolve()):
        raise InputError("lies inside the bundle, which holds nothing but its blobs", where=str(file), fix=_ELSEWHERE)
    if place.exists() and not place.is_file():
        raise InputError("is not a file, and is not replaced", where=str(file), fix=_ELSEWHERE)
    data = render_html(report).encode()
    part = place.parent / f".part-report-{secrets.token_hex(8)}"
    try:
        with part.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError("no space left on the device", where=str(file), fix=_ELSEWHERE) from error
        raise InputError(f"cannot be written: {error.strerror}", where=str(file), fix=_ELSEWHERE) from error
    finally:
        part.unlink(missing_ok=True)
    return len(data)


def is_report(file: Path) -> bool:
    """Whether a file is a page that :func:`write_html` wrote."""
    try:
        with file.open("rb") as stream:
            return f'content="{GENERATOR}"'.encode() in stream.read(4096)
    except OSError:
        return False


_ELSEWHERE = "give another file with --html FILE"


def _page(report: Report, limits: Limits) -> str:
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    title = f"{report.name} {report.version}"
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=Html(policy)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content=GENERATOR),
        # Browsers ask a server for an icon unless they are given one.
        element("link", rel="icon", href="data:,"),
        element("title", f"{title} – ModelForge report"),
        Html(f"<style>{style}</style>"),
    )
    body = element(
        "body",
        element("a", "Skip to the summary", href="#summary", class_="skip"),
        _header(report),
        element("main", *_sections(report, limits)),
        element(
            "footer",
            "Digests of the index, the manifests, the records and the report files were checked when this page was "
            "written; ",
            element("code", "modelforge verify"),
            " hashes every blob.",
        ),
        Html(f"<script>{script}</script>"),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def _sections(report: Report, limits: Limits) -> list[Html]:
    anchors = [f"v{at}" for at in range(len(report.variants))]
    cards = [card(variant, anchor, limits) for variant, anchor in zip(report.variants, anchors, strict=True)]
    parts = [
        _section("summary", "Summary", tiles(report), left_out_parts(report, limits), summary(report, anchors)),
        _section("deltas", "Accuracy and latency against FP32", deltas(report)),
    ]
    if split := stages(report, anchors, limits):
        parts.append(_section("stages", "Stages", split))
    if shared := partitions(report, anchors, limits):
        parts.append(_section("partitions", "NPU and CPU", shared))
    if placed := placement(report, anchors):
        parts.append(_section("placement", "Placement and batches", placed))
    parts.append(_section("targets", "Targets", element("div", cards, class_="cards")))
    if tables := range_tables(report):
        drawn = [range_table(document, used, limits) for document, used in tables.values()]
        parts.append(_section("calibration", "Calibration", drawn))
    return [*parts, _section("provenance", "Provenance", provenance(report))]


def _section(anchor: str, title: str, *children: Child) -> Html:
    return element(
        "section", element("h2", title, id=f"{anchor}-title"), *children, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def _header(report: Report) -> Html:
    links = [("summary", "Summary"), ("deltas", "Deltas")]
    links += [("stages", "Stages")] if report.facts.split is not None else []
    links += [("partitions", "NPU and CPU")] if report.facts.partitions else []
    links += [("placement", "Placement")] if placement(report, [""] * len(report.variants)) else []
    links += [("targets", "Targets")]
    links += [("calibration", "Calibration")] if range_tables(report) else []
    links += [("provenance", "Provenance")]
    task = text_at(report.about, "serving", "task")
    return element(
        "header",
        element("p", "ModelForge report", class_="eyebrow"),
        element("h1", report.name, " ", element("small", report.version)),
        element("p", f"{task}. " if task else None, digest(report.digest), class_="soft"),
        element("nav", [element("a", name, href=f"#{anchor}") for anchor, name in links], aria_label="Sections"),
        class_="top",
    )


def _resource(name: str) -> str:
    return (files("modelforge.report") / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """The digest by which a content security policy names an inline block."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
