"""`modelforge cache`: what the cache holds, and how to make it smaller."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from modelforge.cli.console import Console, size_text

if TYPE_CHECKING:
    from modelforge.store import StepRecord, Store

DESCRIPTION = """The cache keeps what steps gave, by content: a rebuild takes from it what has not changed.

ls      what is in it, newest first
prune   remove what was not used for --days (0: everything); a running build keeps what it uses
verify  hash every blob again; damaged ones are removed, so that the next build makes them anew"""
EXAMPLE = "modelforge cache prune --days 30"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "prune", "verify"))
    parser.add_argument("--days", type=float, default=30.0, metavar="N", help="for prune; default 30")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError
    from modelforge.store import Store

    store = Store()
    if args.action == "ls":
        return _ls(store, console)
    if args.action == "prune":
        if args.days < 0:
            raise InputError("must not be negative", where="--days")
        removed = store.prune(args.days)
        document = {
            "home": str(store.home),
            "removed_steps": removed.steps,
            "removed_blobs": removed.blobs,
            "freed": removed.freed,
        }
        console.result(document, f"removed {removed.steps} steps and {removed.blobs} blobs, {size_text(removed.freed)}")
        return 0
    return _verify(store, console)


def _ls(store: Store, console: Console) -> int:
    entries = store.entries()
    blobs, size = store.usage()
    console.result(
        {
            "home": str(store.home),
            "blobs": blobs,
            "size": size,
            "steps": [
                {
                    "key": entry.record.key,
                    "step": entry.record.step,
                    "seconds": entry.record.seconds,
                    "used": entry.used,
                }
                | {"size": sum(blob.size for blob in entry.record.files.values())}
                for entry in entries
            ],
        }
    )
    if not console.json:
        rows = [_row(entry.record, entry.used) for entry in entries]
        console.table(["key", "step", "size", "took", "last used"], rows)
        console.text(f"\n{store.home}: {len(entries)} steps, {blobs} blobs, {size_text(size)}")
    return 0


def _row(record: StepRecord, used: str) -> list[str]:
    size = sum(blob.size for blob in record.files.values())
    return [record.key[:12], record.step, size_text(size), f"{record.seconds:.1f} s", used]


def _verify(store: Store, console: Console) -> int:
    from modelforge.errors import IntegrityError

    damaged = store.verify()
    blobs, size = store.usage()
    console.result(
        {"home": str(store.home), "blobs": blobs, "size": size, "damaged": damaged},
        f"{blobs} blobs, {size_text(size)}: all as they were written" if not damaged else None,
    )
    if damaged:
        error = IntegrityError(
            f"{len(damaged)} blobs were not what their names say, and are removed: {', '.join(damaged[:3])}",
            where=str(store.home),
            fix="build again: the steps that made them run anew; check the disk if this happens twice",
        )
        error.reported = True
        raise error
    return 0
