"""`modelforge export`: variants as plain files, or as a Triton model repository."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelforge.cli.console import Console, size_text

DESCRIPTION = """Write variants of a bundle as plain files (`dir`: TARGET/STAGE/ with record.json), or as a model
repository for Triton Inference Server (`triton`: the model, and config.pbtxt with shapes and batching). Every file is
hashed as it is copied; a folder appears whole or not at all."""
EXAMPLE = "modelforge export dist/ppocr-cls-1.2.0 --format triton --target x86-64 -o model_repository"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--format", choices=["dir", "triton"], default="dir", help="default: dir")
    parser.add_argument("--target", action="append", default=[], metavar="TAG", help="only this one (repeatable)")
    parser.add_argument(
        "--lowered",
        action="store_true",
        help="with triton: the lowered ONNX model for ONNX Runtime instead of an artifact that Triton cannot load",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="default: NAME-VERSION-files, or model_repository"
    )
    parser.add_argument("--force", action="store_true", help="replace what an export wrote there")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle.export import default_output, export_bundle
    from modelforge.bundle.read import open_bundle

    bundle = open_bundle(args.bundle)
    done = export_bundle(
        bundle,
        args.output or default_output(bundle, args.format),
        args.format,
        targets=args.target,
        lowered=args.lowered,
        force=args.force,
    )
    size = sum(entry.size for entry in done.files.values())
    console.result(
        {
            "name": bundle.name,
            "version": bundle.version,
            "digest": bundle.digest,
            "format": args.format,
            "folders": [str(folder) for folder in done.folders],
            "files": {name: {"digest": each.digest, "size": each.size} for name, each in done.files.items()},
            "notes": list(done.notes),
        },
        f"wrote {', '.join(map(str, done.folders))}: {size_text(size)} of models and reports",
    )
    for note in done.notes:
        console.note(f"note: {note}")
    return 0
