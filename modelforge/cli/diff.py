"""`modelforge diff`: what differs between two bundles."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.cli.console import Console, size_text

if TYPE_CHECKING:
    from modelforge.bundle.difference import Change

DESCRIPTION = """Show what differs between two bundles: variants added and removed; status, precision, artifact,
accuracy, latency, toolchain of the others; inputs, outputs, serving. Exit code 0 whether they differ or not; with
--exit-code 1 if they do."""
EXAMPLE = "modelforge diff dist/ppocr-cls-1.1.0 dist/ppocr-cls-1.2.0"
_SHORT, _LONG = 12, 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if they differ")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle.difference import compare
    from modelforge.bundle.read import open_bundle

    difference = compare(open_bundle(args.before), open_bundle(args.after))
    console.result(difference.to_json())
    if not console.json:
        for sign, bundle in (("-", difference.before), ("+", difference.after)):
            console.text(f"{sign} {bundle.name} {bundle.version}  {bundle.digest}")
        if difference.is_same:
            console.text("\nthe same bundle")
        rows = [["", change.key, *_cells(change)] for change in difference.about]
        rows += [[name, "variant", "-", "added", ""] for name in difference.added]
        rows += [[name, "variant", "removed", "-", ""] for name in difference.removed]
        rows += [[each.name, change.key, *_cells(change)] for each in difference.changed for change in each.changes]
        if rows:
            console.text("")
            console.table(["variant", "key", "A", "B", "change"], rows)
        if difference.not_compared:
            console.text(f"\nnot compared, since not pulled on both sides: {', '.join(difference.not_compared)}")
    return 1 if args.exit_code and not difference.is_same else 0


def _cells(change: Change) -> list[str]:
    is_size = change.key.rpartition(".")[2] == "size"
    return [_shown(change.before, is_size), _shown(change.after, is_size), _delta(change, is_size)]


def _shown(value: Any, is_size: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value[: len("sha256:") + _SHORT] if value.startswith("sha256:") else _cut(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return size_text(value) if is_size else f"{value:.6g}"
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str) -> str:
    """The whole is in ``--json``."""
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


def _delta(change: Change, is_size: bool) -> str:
    if change.delta is None:
        return ""
    text = f"{'-' if change.delta < 0 else '+'}{size_text(abs(change.delta))}" if is_size else f"{change.delta:+.6g}"
    return text + (f" ({change.delta / change.before:+.1%})" if change.before else "")
