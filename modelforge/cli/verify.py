"""`modelforge verify`: is a bundle what it was when it was built, and does it give the outputs it gave?"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.cli.console import Console, figure, size_text

if TYPE_CHECKING:
    from modelforge.bundle.read import Bundle
    from modelforge.forge.golden_chain import ChainResult

DESCRIPTION = """Hash every blob of a bundle. Then, where the build extra is installed and a variant can run on this
machine, run its golden samples and hold the outputs against the recorded FP32 ones. Nothing runs before all digests,
and the signature if a key is given, are right."""
EXAMPLE = "modelforge verify dist/digits-1.0.0 --key release.pub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--target", action="append", default=[], metavar="TAG", help="run only this variant (repeatable)"
    )
    parser.add_argument(
        "--chain", action="store_true", help="of a split model: run the stages one after the other, as they ship"
    )
    parser.add_argument("--no-run", action="store_true", help="digests and signature only")
    parser.add_argument(
        "--key",
        action="append",
        default=[],
        type=Path,
        metavar="NAME.pub",
        help="it must be signed with this key, or another one given (repeatable)",
    )
    parser.add_argument(
        "--require-signature", action="store_true", help="refuse to go on without --key: for scripts that fill it in"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle.read import open_bundle, verify_integrity
    from modelforge.errors import AccuracyError

    report = verify_integrity(args.bundle)
    bundle = open_bundle(args.bundle)
    signature = _signature(args, bundle, console)
    variants = [each for tag in args.target for each in bundle.select(tag)] or list(bundle.variants)
    results = []
    if not args.no_run and find_spec("numpy") and find_spec("onnxruntime"):
        from modelforge.forge.golden import check_golden

        results = [check_golden(bundle, variant) for variant in variants]
    chains = _chains(bundle) if args.chain else []
    document = {
        "name": bundle.name,
        "version": bundle.version,
        "digest": bundle.digest,
        "path": str(args.bundle),
        "integrity": "passed",
        "blobs": report.blobs,
        "size": report.size,
        "unreferenced": list(report.unreferenced),
        "strays": list(report.strays),
        "signature": signature,
        "golden": [asdict(result) for result in results],
        **({"chains": [asdict(result) for result in chains]} if args.chain else {}),
    }
    console.result(
        document,
        f"{bundle.name} {bundle.version}: {report.blobs} blobs, {size_text(report.size)}, every digest is right",
    )
    if signature["state"] == "verified":
        console.text(f"signed as {signature['name']} {signature['version']} by the key {signature['key_id']}")
    if report.strays:
        console.note(f"note: no part of the bundle: {', '.join(report.strays)}")
    if results and not console.json:
        console.text("")
        console.table(
            ["target", "golden samples", "evidence", "SQNR dB", "why"],
            [[each.target, each.outcome, each.evidence, _sqnr(each.figures), each.reason] for each in results],
        )
    elif not args.no_run and not results:
        console.note("note: digests only; `pip install 'modelforge[build]'` runs the golden samples too")
    for chain in chains:
        told = " -> ".join(f"{each['stage']} on {each['target']} ({each['evidence']})" for each in chain.stages)
        console.text(f"chain {told}: {chain.outcome}{'; ' + chain.reason if chain.reason else ''}")
    broken = next((each for each in chains if each.outcome == "failed"), None)
    if broken is not None:
        error = AccuracyError(f"the chain failed: {broken.reason}", where=str(args.bundle))
        error.reported = True
        raise error
    failed = [each for each in results if each.outcome == "failed"]
    if failed:
        error = AccuracyError(
            f"the golden samples failed: {failed[0].reason}",
            where=f"target {failed[0].target}",
            fix="do not deploy this variant on such a machine",
        )
        error.reported = True
        raise error
    return 0


def _signature(args: argparse.Namespace, bundle: Bundle, console: Console) -> dict[str, Any]:
    """What `--json` prints under ``signature``; raises where it is required and not there, or bad."""
    from modelforge.bundle.signing import signatures, unchecked, verify_bundle
    from modelforge.errors import InputError

    if args.require_signature and not args.key:
        raise InputError("a signature cannot be checked without a key", where="modelforge verify", fix="give --key")
    if args.key:
        verified = verify_bundle(bundle, args.key)
        return {
            "state": "verified",
            "key_id": verified.key_id,
            "name": verified.name,
            "version": verified.version,
            "builder": verified.statement.builder,
        }
    documents = [document for _, document in signatures(bundle.path)]
    claimed = unchecked(documents, index_digest=bundle.digest)
    if not documents:
        console.note("warning: NOT SIGNED: the digests say that nothing broke, not who made it")
    else:
        console.note("warning: signature NOT CHECKED: give --key NAME.pub, the public key of who released it")
    return {"state": "unchecked" if documents else "unsigned", "claimed_key_ids": claimed}


def _chains(bundle: Bundle) -> list[ChainResult]:
    from modelforge.forge.golden_chain import check_chains
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    return check_chains(bundle)


def _sqnr(figures: Mapping[str, Any]) -> str:
    if not figures:
        return "-"
    return "identical" if figures["identical"] else figure(figures["sqnr_db"], 1)
