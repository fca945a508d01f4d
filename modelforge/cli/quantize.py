"""`modelforge quantize`: an ONNX model in, its QDQ form in one dialect out."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelforge.cli.console import Console

DESCRIPTION = """Write the INT8 (QDQ) form of a model as one compiler wants it. No bundle and no accuracy gate: nothing
is measured here. `modelforge build` with "int8" in a ladder does both.

Dialects: tensorrt, onnxruntime-x86, onnxruntime-arm, tvm, rockchip, qualcomm, ascend."""
EXAMPLE = "modelforge quantize model.onnx --data calibration.npz --dialect onnxruntime-x86 -o model.int8.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path)
    parser.add_argument("--dialect", required=True, metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DATA", help="an .npz, a folder or glob, or module:function")
    source.add_argument("--ranges", type=Path, metavar="FILE", help="a range table of `modelforge calibrate`")
    parser.add_argument("--samples", type=int, metavar="N", help="use the first N samples")
    parser.add_argument("--method", default="auto", help="auto, minmax, percentile, entropy or mse; default auto")
    parser.add_argument("--exclude", action="append", default=[], metavar="NODE", help="keep this node in float")
    parser.add_argument("--reduce-range", action="store_true", help="7-bit weights, for x86 without VNNI")
    add_shape(parser)
    parser.add_argument("--allow", action="append", default=[], metavar="WORD", help="few, random, constant")


def add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", action="append", default=[], metavar="NAME=SIZES", help="for example x=batch,3,48,192 (repeatable)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError
    from modelforge.forge import alone
    from modelforge.forge.intake import require_build_extra
    from modelforge.quantize.dialects import get_dialect

    require_build_extra()
    dialect = get_dialect(args.dialect).name
    with alone.prepared(args.model, shapes(args.shape)) as ready:
        ranges = args.ranges or alone.calibrate(ready, args.data, limit=args.samples, allow=args.allow)
        model, report = alone.quantize(
            ready, ranges, dialect=dialect, exclude=args.exclude, method=args.method, reduce_range=args.reduce_range
        )
        extra = model.with_name("model.onnx.data")
        if extra.exists():
            raise InputError(
                "the result is over 1.5 GB and needs a second file",
                where=str(args.output),
                fix="build it with a recipe",
            )
        alone.put(args.output, model.read_bytes())
    facts = report["quantize"]
    counts = f"{len(facts['quantized'])} nodes in int8, {len(facts['kept'])} kept in float, opset {facts['opset']}"
    console.result({"path": str(args.output), "dialect": dialect, **report}, f"{args.output}: {counts}")
    for node, reason in facts["kept"].items():
        console.note(f"kept {node}: {reason}")
    return 0


def shapes(texts: list[str]) -> dict[str, tuple[int | str, ...]]:
    """``["x=batch,3,48,192"]`` as ``{"x": ("batch", 3, 48, 192)}``."""
    from modelforge.errors import InputError

    found: dict[str, tuple[int | str, ...]] = {}
    for text in texts:
        name, sign, sizes = text.partition("=")
        words = [word.strip() for word in sizes.split(",")] if sizes else []
        if not sign or not name or not all(word.isdecimal() or word.isidentifier() for word in words):
            raise InputError(f'"{text}" is not NAME=SIZES', where="--shape", fix="for example --shape x=batch,3,48,192")
        found[name] = tuple(int(word) if word.isdecimal() else word for word in words)
    return found
