"""`modelforge calibrate`: the range table of a model, made or merged."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelforge.cli.console import Console
from modelforge.cli.quantize import add_shape, shapes

DESCRIPTION = """Measure the range of every activation on real inputs, and keep it as JSON: one table serves all
dialects (`modelforge quantize --ranges`). With --merge, join tables of one model that were made from different data."""
EXAMPLE = "modelforge calibrate model.onnx --data calibration.npz -o ranges.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--data", metavar="DATA", help="an .npz, a folder or glob, or module:function")
    parser.add_argument("--samples", type=int, metavar="N", help="use the first N samples")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="range tables to join")
    add_shape(parser)
    parser.add_argument("--allow", action="append", default=[], metavar="WORD", help="few, random, constant")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError
    from modelforge.forge import alone
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    if bool(args.merge) == bool(args.model and args.data):
        raise InputError("give either a model with --data, or --merge with tables", where="modelforge calibrate")
    if args.merge:
        samples = alone.merge_ranges(args.merge, args.output)
    else:
        from modelforge.quantize.ranges import RangeTable

        with alone.prepared(args.model, shapes(args.shape)) as ready:
            text = alone.calibrate(ready, args.data, limit=args.samples, allow=args.allow).read_text(encoding="utf-8")
            samples = RangeTable.from_json(text).samples
            alone.put(args.output, text.encode())
    console.result({"path": str(args.output), "samples": samples}, f"{args.output}: ranges of {samples} samples")
    return 0
