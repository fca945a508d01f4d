"""`modelforge tuning`: what was measured for targets, and how it gets to other machines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.cli.console import Console

if TYPE_CHECKING:
    from modelforge.compilers.tvm.archive import Kept

DESCRIPTION = """What `[target.tune]` measured is kept in the cache, and found again by every later build of these
kernels for this target and device.

ls      what was tuned, last used first
export  write it to FILE: all of it, or what the KEYs (their first digits, as `ls` shows them) name
import  keep what is in FILE, so that builds here find it, without the device"""
EXAMPLE = "modelforge tuning export tunings.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "export", "import"))
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="for export and import")
    parser.add_argument("keys", nargs="*", metavar="KEY", help="for export; default: all")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.compilers.tvm import archive
    from modelforge.errors import InputError
    from modelforge.store import Store

    wants_file = args.action != "ls"
    if wants_file != (args.file is not None) or (args.keys and args.action != "export"):
        usage = {"ls": "", "export": " FILE [KEY ...]", "import": " FILE"}[args.action]
        raise InputError(
            f"`tuning {args.action}` takes {'a FILE' if wants_file else 'no words'}"
            + (" alone" if args.action == "import" else ""),
            where="modelforge tuning",
            fix=f"modelforge tuning {args.action}{usage}",
        )
    if args.action == "ls":
        return _list(archive.kept(Store()), console)
    if args.action == "export":
        done = archive.export(Store(), args.keys, args.file)
    else:
        done = archive.take_in(Store(), args.file)
    said = f"{args.file}: {len(done)} tunings {'written' if args.action == 'export' else 'kept'}"
    console.result({"file": str(args.file), "tunings": [_document(each) for each in done]}, said)
    return 0


def _list(found: list[Kept], console: Console) -> int:
    console.result({"tunings": [_document(each) for each in found]})
    if not found:
        console.text("nothing was tuned here; [target.tune] in a recipe does it (docs/guides/tuning.md)")
        return 0
    console.table(["key", "device", "for", "trials", "outcome", "of untuned time"], [_row(each) for each in found])
    return 0


def _row(each: Kept) -> list[str]:
    found = each.database
    outcome = f"{len(found.choices)} choices" if found.kept else "untuned kept"
    ratios = ", ".join(f"{row.ratio:.3f}" for row in found.model) or "-"
    return [each.key[:12], found.device, str(found.machine.get("mcpu")), str(found.trials), outcome, ratios]


def _document(each: Kept) -> dict[str, Any]:
    found = each.database
    return {
        "key": each.key,
        "device": found.device,
        "machine": found.machine,
        "trials": found.trials,
        "kept": found.kept,
        "choices": len(found.choices),
        "model": [row.model_dump(mode="json") for row in found.model],
    }
