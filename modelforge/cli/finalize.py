"""`modelforge finalize`: compile a deferred variant where its toolchain is."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelforge.cli.console import Console, figure, size_text

DESCRIPTION = """Compile a deferred variant of a bundle with the toolchain that is installed here (on the device, or on
a host of its kind), run the golden samples on it, and write the finished variant as a bundle of its own beside the
first. All digests are verified before anything is compiled or loaded. The ladder is gone down as in a build."""
EXAMPLE = "modelforge finalize dist/digits-1.0.0 --target jetson-agx-orin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", required=True, metavar="TAG")
    parser.add_argument("--stage", metavar="NAME", help="only this stage of a split model")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="the finished bundle; default: BUNDLE's folder/NAME-VERSION-TAG",
    )
    parser.add_argument("--force", action="store_true", help="replace another bundle that stands there")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.forge.finalize import finalize
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    done = finalize(args.bundle, args.target, stage=args.stage, output=args.output, force=args.force)
    written = done.written
    console.result(
        {"path": str(written.path), "digest": written.digest, "variants": [dict(each) for each in done.records]}
    )
    if not console.json:
        console.table(
            ["target", "stage", "status", "precision", "size", "SQNR dB", "evidence", "p50 ms"],
            [
                [
                    each["target"], each["stage"], each["status"], each["precision"],
                    size_text(each["artifact"]["size"]), figure(each["accuracy"]["sqnr_db"], 1),
                    each["accuracy"]["evidence"],
                    figure(each["latency"].get("p50_ms"), 3),
                ]
                for each in done.records
            ],
        )  # fmt: skip
        console.text(f"\n{written.path}  {written.digest}{'  (unchanged)' if written.unchanged else ''}")
    for note in dict.fromkeys(note for each in done.records for note in each["notes"]):
        console.note(f"note: {note}")
    return 0
