"""`modelforge build`: a recipe in, a bundle out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelforge.cli.console import Console, figure, size_text

DESCRIPTION = """Build a bundle: every target of the recipe compiled and held against the FP32 model.

The bundle is DIR/NAME-VERSION/. An existing bundle of that version is replaced only if it is identical, or with
--force. What was built before is taken from the cache; an interrupted build goes on where it was."""
EXAMPLE = "modelforge build recipes/digits --target t4 --target x86-64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a folder with recipe.toml, or a TOML file")
    parser.add_argument("-o", "--output", type=Path, default=Path("dist"), metavar="DIR", help="default: dist")
    parser.add_argument("--target", action="append", default=[], metavar="TAG", help="only this target (repeatable)")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count() or 1, metavar="N", help="steps at once")
    parser.add_argument("--force", action="store_true", help="replace another bundle of this version")
    parser.add_argument(
        "--allow-deferred",
        action="store_true",
        help="a required target whose toolchain is missing may be deferred: prepared, and compiled on the device later",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    from modelforge.cli.progress import Progress
    from modelforge.forge.build import build

    with Progress(console) as progress:
        outcome = build(
            args.recipe,
            output=args.output,
            tags=args.target,
            jobs=args.jobs,
            force=args.force,
            allow_deferred=args.allow_deferred,
            reporter=progress,
        )
    console.result(outcome.document)
    if not console.json:
        stage = ["stage"] if any(record["stage"] != "main" for record in outcome.document["variants"]) else []
        console.table(
            ["target", *stage, "status", "precision", "size", "metric", "reference", "value", "evidence", "built in"],
            [_row(record, outcome.seconds, bool(stage)) for record in outcome.document["variants"]],
        )
        about = outcome.document
        for split in [about.get("split", {}), *about.get("partitions", {}).values()]:
            for chain in split.get("chains", []):
                console.text(_chain(chain))
        if outcome.path is not None:
            console.text(f"\n{outcome.path}  {outcome.digest}{'  (unchanged)' if outcome.unchanged else ''}")
    for note in outcome.notes:
        console.note(f"note: {note}")
    if outcome.error is not None:
        raise outcome.error
    return 0


def _chain(chain: Mapping[str, Any]) -> str:
    told = " -> ".join(f"{each['stage']} on {each['target']}" for each in chain["stages"])
    accuracy = chain.get("accuracy")
    if accuracy is None:
        return f"\nchain {told}: not run, {chain['reason']}"
    value = f"{accuracy['metric']} {figure(accuracy['value'])} (FP32 {figure(accuracy['reference'])})"
    return f"\nchain {told}: {accuracy['gate']}, {value}"


def _row(record: Mapping[str, Any], seconds: Mapping[tuple[str, str], float], staged: bool) -> list[str]:
    accuracy, artifact = record["accuracy"], record["artifact"]
    return [
        record["target"],
        *([record["stage"]] if staged else []),
        record["status"],
        record["precision"] or "-",
        size_text(artifact["size"]) if artifact else "-",
        accuracy["metric"] or "-",
        figure(accuracy["reference"]),
        figure(accuracy["value"]),
        accuracy["evidence"],
        f"{seconds.get((record['target'], record['stage']), 0.0):.1f} s",
    ]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
