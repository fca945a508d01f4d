"""`modelforge pull`: the variants that a device needs out of a registry, as plain files."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelforge.cli.connection import Transfers, add_connection, connection
from modelforge.cli.console import Console, size_text

DESCRIPTION = """Pull variants of a bundle by target tag: only their files are fetched, each held against its digest,
and put under DIR/TARGET/ as plain files. The folder opens in `inspect` and `verify` as the bundle does.

REF is HOST/REPO:VERSION, HOST/REPO:latest, a range of versions (HOST/REPO:1.x, "HOST/REPO:>=1.2,<2"),
HOST/REPO@sha256:..., or oci:DIR. The same command goes on where a broken download stopped."""
EXAMPLE = "modelforge pull registry.example.com/models/digits:1.0.0 --target t4 --require-signature release.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REF")
    parser.add_argument("--target", action="append", default=[], metavar="TAG", help="which variant (repeatable)")
    parser.add_argument("--stage", metavar="STAGE", help="of a split model: this stage only")
    parser.add_argument("--all", action="store_true", help="the whole bundle, as `build` writes it")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="the folder; default ./NAME-VERSION")
    parser.add_argument(
        "--require-signature",
        action="append",
        default=[],
        type=Path,
        metavar="KEY.pub",
        help="refuse what none of these keys has signed (repeatable)",
    )
    parser.add_argument(
        "--check", action="store_true", help="refuse what cannot run on this device, before it is fetched"
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle in DIR that was changed since")
    add_connection(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle.match import summary
    from modelforge.errors import InputError
    from modelforge.registry import reference
    from modelforge.registry.pull import Wanted, pull

    if args.all and (args.target or args.stage):
        raise InputError("--all takes every target and stage", where="modelforge pull", fix="leave --target out")
    source = connection(args).source(reference.parse(args.reference))
    with Transfers(console) as transfers:
        done = pull(
            source,
            Wanted(args.target, args.stage, args.all),
            args.output,
            keys=args.require_signature,
            check=args.check,
            force=args.force,
            reporter=transfers,
        )
    targets = ", ".join(entry.annotations.get("io.modelforge.target", "?") for entry in done.variants)
    how = "was there already" if done.unchanged else f"fetched {size_text(done.fetched)}, had {size_text(done.reused)}"
    console.result(
        {"reference": args.reference, **done.to_json()},
        f"{done.name} {done.version}  {done.digest}\n{done.path}: {targets}; {how}",
    )
    if done.asked not in (None, done.version):
        console.note(f'note: the tag "{done.asked}" stands for version {done.version}')
    for name, check in done.checks.items():
        console.note(f"{name}: {check.verdict}: {summary(check)}")
    for each in done.verified:
        console.note(f"signed by {each.key} ({each.key_id[:16]})")
    if not done.verified:
        signed = f"{done.signatures} signatures, not checked" if done.signatures else "not signed"
        console.note(f"note: {signed}; --require-signature KEY.pub refuses what you do not trust")
    return 0
