"""`modelforge inspect`: what a bundle, a bare ONNX model or a TensorRT engine holds."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modelforge.cli.console import Console, figure, size_text

DESCRIPTION = """Show what is in a bundle (a folder), an ONNX model or a TensorRT engine (a file). Reads, and loads
nothing that could run: of an engine its header only."""
EXAMPLE = "modelforge inspect dist/digits-1.0.0 --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="BUNDLE|MODEL.onnx|ENGINE")
    parser.add_argument("--target", metavar="TAG", help="of a bundle: this variant in full")
    parser.add_argument(
        "--dim",
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="of a model: bind a symbol, for FLOPs and memory",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    if args.path.is_file() and _is_engine(args.path):
        return _engine(args.path, console)
    if args.path.is_file():
        return _model(args.path, args.dim, console)
    return _bundle(args.path, args.target, console)


def _bundle(path: Path, target: str | None, console: Console) -> int:
    import json

    from modelforge.bundle.read import open_bundle

    bundle = open_bundle(path)
    if target:
        variants = bundle.select(target)
        document = {
            "name": bundle.name,
            "version": bundle.version,
            "digest": bundle.digest,
            "path": str(path),
            "variants": [variant.record.to_json() for variant in variants],
            "files": [
                {
                    "stage": variant.record.stage,
                    "file": name,
                    "role": entry.role,
                    "digest": entry.digest,
                    "size": entry.size,
                }
                for variant in variants
                for name, entry in variant.files.items()
            ],
        }
        console.result(document)
        for variant in variants:
            console.text(json.dumps(variant.record.to_json(), indent=2, ensure_ascii=False))
            console.table(
                ["file", "role", "size", "digest"],
                [[name, entry.role, size_text(entry.size), entry.digest] for name, entry in variant.files.items()],
            )
        return 0
    summary = bundle.summary()
    console.result(summary)
    if not console.json:
        console.text(f"{bundle.name} {bundle.version}  {bundle.digest}\n")
        console.table(
            ["target", "stage", "status", "precision", "compiler", "size", "metric", "reference", "value", "evidence"],
            [_row(record) for record in summary["variants"]],
        )
    return 0


def _row(record: dict[str, Any]) -> list[str]:
    accuracy, artifact = record["accuracy"], record["artifact"]
    return [
        record["target"], record["stage"], record["status"], record["precision"] or "-", record["compiler"] or "-",
        size_text(artifact["size"]) if artifact else "-", accuracy["metric"] or "-", figure(accuracy["reference"]),
        figure(accuracy["value"]), accuracy["evidence"],
    ]  # fmt: skip


def _is_engine(path: Path) -> bool:
    """By its first bytes; by its name too, so that a damaged engine is told as one."""
    from modelforge.compilers.engine_header import is_engine

    return is_engine(path) or path.suffix in (".engine", ".plan", ".trt")


def _engine(path: Path, console: Console) -> int:
    from modelforge.compilers.engine_header import read_header
    from modelforge.compilers.tensorrt.installation import find
    from modelforge.compilers.tensorrt.product import PRODUCTS, parse_version

    header = read_header(path)
    product = next(each for each in PRODUCTS.values() if each.magic == header.magic)
    installed = find(product)
    numbers = parse_version(installed.version) if installed else ()
    document = {
        "path": str(path),
        "product": header.product,
        "magic": header.magic,
        "version": header.version_text,
        "size": header.size,
        "is_whole": header.is_whole,
        "installed": installed.version if installed else None,
        "same_version": header.version[: len(numbers)] == numbers[:4] if installed else None,
    }
    console.result(document)
    if console.json:
        return 0
    whole = {True: "as its header says", None: "its header does not say how long it should be", False: ""}
    console.text(f"{path}: an engine of {header.product} {header.version_text}; not loaded\n")
    console.text(f"size       {size_text(header.size)} ({header.size:,} bytes), {whole[header.is_whole]}")
    if installed is None:
        console.text(f"installed  no {header.product} here")
    else:
        fits = "the same" if document["same_version"] else f"another: it belongs to {header.version_text}"
        console.text(f"installed  {header.product} {installed.version}, {fits}")
    return 0


def _model(path: Path, dims: list[str], console: Console) -> int:
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    from modelforge.graph.inspect import inspect_model
    from modelforge.graph.load import check_model

    check_model(path)
    facts = inspect_model(path, bound=dict(_dim(text) for text in dims))
    console.result({"path": str(path), **asdict(facts)})
    if console.json:
        return 0
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in facts.opsets.items())
    console.text(f"{path}: {facts.nodes} nodes, opset {opsets}, from {facts.producer or 'an unnamed producer'}\n")
    console.table(
        ["", "name", "dtype", "shape"],
        [
            [kind, tensor.name, tensor.dtype, "?" if tensor.shape is None else " x ".join(map(str, tensor.shape))]
            for kind, tensors in (("input", facts.inputs), ("output", facts.outputs))
            for tensor in tensors
        ],
    )
    bound = "".join(f", {symbol} = {size}" for symbol, size in facts.bound.items())
    flops = "unknown (a shape is)" if facts.flops is None else f"{facts.flops / 1e9:.3f} GFLOP"
    peak = "unknown" if facts.peak_activation_bytes is None else size_text(facts.peak_activation_bytes)
    console.text(f"\nparameters  {facts.parameters:,} ({size_text(facts.parameter_bytes)})")
    console.text(f"arithmetic  {flops} an inference, peak activation {peak}{bound}")
    console.text("operators   " + ", ".join(f"{each.op} {each.count}" for each in facts.ops))
    return 0


def _dim(text: str) -> tuple[str, int]:
    from modelforge.errors import InputError

    name, _, size = text.partition("=")
    if not name or not size.isdecimal() or int(size) < 1:
        raise InputError(f'"{text}" is not NAME=SIZE', where="--dim", fix="for example --dim batch=4")
    return name, int(size)
