"""`modelforge push`: a bundle into a registry."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelforge.cli.connection import Transfers, add_connection, connection
from modelforge.cli.console import Console, size_text

DESCRIPTION = """Push a bundle into an OCI registry: under its version, and each variant under VERSION-TARGET, so that
any OCI client can pull one. Signatures beside the bundle go along. What the registry has is not sent again; a push that
was broken off goes on where it stopped."""
EXAMPLE = "modelforge push dist/digits-1.0.0 registry.example.com/models/digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", metavar="HOST/REPO[:VERSION]")
    parser.add_argument("--force", action="store_true", help="move tags that stand for something else")
    parser.add_argument(
        "--mount-from", metavar="REPO", help="another repository of this registry that may have the blobs"
    )
    add_connection(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.registry import reference
    from modelforge.registry.push import push

    place = reference.registry(args.reference)
    client = connection(args).client(place, writing=True)
    with Transfers(console) as transfers:
        done = push(args.bundle, place, client, force=args.force, mount_from=args.mount_from, reporter=transfers)
    document = {
        "reference": f"{done.reference}:{done.version}",
        "name": done.name,
        "version": done.version,
        "digest": done.digest,
        "tags": done.tags,
        "untagged": list(done.untagged),
        "sent": done.sent,
        "present": done.present,
        "signatures": done.signatures,
    }
    console.result(
        document,
        f"{done.reference}:{done.version}  {done.digest}\n"
        f"sent {size_text(done.sent)}; the registry had {size_text(done.present)}; signatures: {done.signatures}",
    )
    if not done.signatures:
        console.note("note: the bundle is not signed; `modelforge sign` before a push")
    return 0
