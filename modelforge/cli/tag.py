"""`modelforge tag`: another name for what is in a registry already."""

from __future__ import annotations

import argparse

from modelforge.cli.connection import add_connection, connection
from modelforge.cli.console import Console

DESCRIPTION = """Give a bundle in a registry another tag, such as `stable`. Nothing is copied. Where a signature is
required, pull by the version: that is what was signed."""
EXAMPLE = "modelforge tag registry.example.com/models/digits:1.0.0 stable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF")
    parser.add_argument("tag", metavar="NEW")
    parser.add_argument("--force", action="store_true", help="move the tag if it stands for something else")
    add_connection(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError
    from modelforge.registry import reference
    from modelforge.registry.push import retag

    place = reference.registry(args.reference)
    if not (place.tag or place.digest):
        raise InputError("says no tag and no digest", where=args.reference, fix=f"{place.name}:VERSION")
    digest = retag(connection(args).client(place, writing=True), place, args.tag, force=args.force)
    console.result(
        {"reference": args.reference, "tag": args.tag, "digest": digest}, f"{place.name}:{args.tag}  {digest}"
    )
    return 0
