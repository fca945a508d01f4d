"""`modelforge prune`: make room in the store, where pulls keep what they fetched."""

from __future__ import annotations

import argparse

from modelforge.cli.console import Console, size_text

DESCRIPTION = """Remove from the store what no pull has wanted for --days, and what broken downloads left; nothing that
is younger than --grace hours. Pulled folders are whole without the store, and a pull that is running loses nothing.
What builds keep there is left alone: `modelforge cache prune`."""
EXAMPLE = "modelforge prune --days 7"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--days", type=float, default=30.0, metavar="N", help="default 30")
    parser.add_argument("--grace", type=float, default=24.0, metavar="HOURS", help="default 24")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError
    from modelforge.registry.cache import Cache

    for name, value in (("--days", args.days), ("--grace", args.grace)):
        if not value >= 0:
            raise InputError("must not be negative", where=name)
    cache = Cache()
    removed = cache.prune(days=args.days, grace=args.grace * 3600)
    document = {
        "home": str(cache.store.home),
        "removed_variants": removed.steps,
        "removed_blobs": removed.blobs,
        "freed": removed.freed,
    }
    console.result(document, f"removed {removed.steps} variants and {removed.blobs} blobs, {size_text(removed.freed)}")
    return 0
