"""`modelforge bom`: a bundle's bill of materials, for tools that take stock of what is deployed."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelforge.cli.console import Console

DESCRIPTION = """Write a bundle as a CycloneDX 1.6 ML-BOM: its variants and files with their hashes, the tools that made
them, and their accuracy figures as the records have them. Every digest is checked first."""
EXAMPLE = "modelforge bom dist/digits-1.0.0 -o digits-1.0.0.cdx.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME-VERSION.cdx.json here")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle import parts
    from modelforge.bundle.bom import FILE_END, bill_of_materials
    from modelforge.bundle.read import open_bundle, verify_integrity
    from modelforge.errors import InputError
    from modelforge.store import digest_bytes

    verify_integrity(args.bundle)
    bundle = open_bundle(args.bundle)
    document = bill_of_materials(bundle)
    output = args.output or Path(f"{bundle.name}-{bundle.version}{FILE_END}")
    if args.bundle.resolve() in (parent.resolve() for parent in output.parents):
        raise InputError("lies inside the bundle", where=str(output), fix="write it beside the bundle")
    if not output.parent.is_dir() or output.is_dir():
        what = "is a folder" if output.is_dir() else "its folder is not there"
        raise InputError(what, where=str(output), fix="give another file with -o")
    with parts.writing_to(output.parent, instead="give another file with -o"):
        parts.replace_file(output, document)
    console.result(
        {"path": str(output), "digest": digest_bytes(document), "bundle": bundle.digest},
        f"{output}: {bundle.name} {bundle.version}, {len(bundle.variants)} variants",
    )
    return 0
