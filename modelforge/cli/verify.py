"""`modelforge verify`: is a bundle what it was when it was built, and does it give the outputs it gave?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelforge.cli.console import Console, figure, size_text

DESCRIPTION = """Hash every blob of a bundle. Then, where the build extra is installed and a variant can run on this
machine, run its golden samples and hold the outputs against the recorded FP32 ones. Nothing runs before all digests
are right."""
EXAMPLE = "modelforge verify dist/digits-1.0.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--target", action="append", default=[], metavar="TAG", help="run only this variant (repeatable)"
    )
    parser.add_argument("--no-run", action="store_true", help="digests only")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle.read import open_bundle, verify_integrity
    from modelforge.errors import AccuracyError

    report = verify_integrity(args.bundle)
    bundle = open_bundle(args.bundle)
    variants = [each for tag in args.target for each in bundle.select(tag)] or list(bundle.variants)
    results = []
    if not args.no_run and find_spec("numpy") and find_spec("onnxruntime"):
        from modelforge.forge.golden import check_golden

        results = [check_golden(bundle, variant) for variant in variants]
    document = {
        "name": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "path": str(args.bundle),
        "integrity": "passed",
        "blobs": report.blobs,
        "size": report.size,
        "unreferenced": list(report.unreferenced),
        "golden": [asdict(result) for result in results],
    }
    console.result(
        document,
        f"{bundle.name} {bundle.version}: {report.blobs} blobs, {size_text(report.size)}, every digest is right",
    )
    if results and not console.json:
        console.text("")
        console.table(
            ["target", "golden samples", "evidence", "SQNR dB", "why"],
            [[each.target, each.outcome, each.evidence, _sqnr(each.figures), each.reason] for each in results],
        )
    elif not args.no_run and not results:
        console.note("note: digests only; `pip install 'modelforge[build]'` runs the golden samples too")
    failed = [each for each in results if each.outcome == "failed"]
    if failed:
        error = AccuracyError(
            f"the golden samples failed: {failed[0].reason}",
            where=f"target {failed[0].target}",
            fix="do not deploy this variant on such a machine",
        )
        error.reported = True
        raise error
    return 0


def _sqnr(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "-"
    return "identical" if figures["identical"] else figure(figures["sqnr_db"], 1)
