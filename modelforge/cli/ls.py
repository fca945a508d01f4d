"""`modelforge ls`: what is in a registry."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from modelforge.cli.connection import add_connection, connection
from modelforge.cli.console import Console, size_text

DESCRIPTION = """HOST/REPO lists the tags of a repository; HOST/REPO:VERSION (or a range, or oci:DIR) the variants of
one bundle, with the size of their files. Nothing but documents is fetched."""
EXAMPLE = "modelforge ls registry.example.com/models/digits:1.0.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF")
    add_connection(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.registry import reference

    place = reference.parse(args.reference)
    if isinstance(place, reference.Reference) and not (place.tag or place.digest or place.wanted):
        return _tags(args, place, console)
    from modelforge.registry.listing import list_variants

    source = connection(args).source(place)
    found = source.find()
    variants = list_variants(source, found)
    index = found.index
    document = {
        "reference": args.reference,
        "name": index.name,
        "version": index.version,
        "digest": found.document.digest,
        "variants": variants,
    }
    console.result(document, f"{index.name} {index.version}  {found.document.digest}\n")
    if not console.json:
        console.table(
            ["target", "stage", "status", "precision", "size", "digest"],
            [
                [*(each[key] or "-" for key in ("target", "stage", "status", "precision")), size_text(each["size"]),
                 each["digest"]]
                for each in variants
            ],
        )  # fmt: skip
    return 0


def _tags(args: argparse.Namespace, place: object, console: Console) -> int:
    from modelforge.registry.listing import list_tags
    from modelforge.registry.reference import Reference

    assert isinstance(place, Reference)
    lines = list_tags(connection(args).client(place))
    console.result({"reference": args.reference, "tags": [asdict(line) for line in lines]})
    if not console.json:
        console.table(
            ["tag", "kind", "targets", "digest"],
            [[line.tag, line.kind, ", ".join(line.targets) or "-", line.digest] for line in lines],
        )
    return 0
