"""`modelforge select`: which variant to run on this device, and the path that an answer can take if not here."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from modelforge.cli.console import Console

if TYPE_CHECKING:
    from modelforge.bundle.select import Place, Selection, StageChoice
    from modelforge.errors import ModelForgeError

DESCRIPTION = """Choose the variant of a bundle to run on this device (or on the one that a facts file describes), and
the fallback path device -> edge -> cloud, with the reasons. Reads the bundle alone; loads and starts nothing of it.
Exit code 2 where no variant runs here and no other place was made reachable with --link."""
EXAMPLE = "modelforge select dist/ppocr-cls-1.2.0 --latency-budget 50 --link edge=5ms,100MB/s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE")
    parser.add_argument("--device-facts", type=Path, metavar="FILE.json", help="another device than this one")
    parser.add_argument(
        "--print-device-facts", action="store_true", help="print what is known of this device as JSON, and stop"
    )
    parser.add_argument("--latency-budget", metavar="MS", help="time for an answer; default: the bundle's own")
    parser.add_argument(
        "--link",
        action="append",
        default=[],
        metavar="TIER=LATENCY,BANDWIDTH",
        help="the way to a tier, one-way latency: edge=5ms,100MB/s (repeatable)",
    )
    parser.add_argument("--batch", default="1", metavar="N", help="samples in one request (default 1)")
    parser.add_argument("--precision", action="append", default=[], metavar="NAME", help="only these (repeatable)")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle import device
    from modelforge.bundle.links import parse_link
    from modelforge.errors import InputError

    facts = device.load(args.device_facts)
    if args.print_device_facts:
        console.result(facts.to_json(), device.dump(facts))
        return 0
    if args.bundle is None:
        raise InputError("no bundle was given", where="modelforge select", fix="`modelforge select --help`")
    from modelforge.bundle.select import select

    selection = select(
        args.bundle,
        facts,
        latency_budget_ms=None if args.latency_budget is None else _milliseconds(args.latency_budget),
        links=[parse_link(text) for text in args.link],
        batch=_count(args.batch),
        precisions=args.precision,
    )
    console.result(selection.to_json())
    if not console.json:
        _show(console, selection)
    if not selection.is_complete:
        error = _nothing(selection)
        error.reported = True
        raise error
    return 0


def _show(console: Console, selection: Selection) -> None:
    bundle, device = selection.bundle, selection.device
    budget = "" if selection.latency_budget_ms is None else f", budget {selection.latency_budget_ms:g} ms"
    console.text(f"{bundle.name} {bundle.version} on {device.name or 'this device'}: batch {selection.batch}{budget}")
    for stage in selection.stages:
        console.text("" if stage.stage == "main" else f"\nstage {stage.stage}")
        if stage.chosen is not None:
            console.text(f"run {_place(stage.chosen)}")
            for reason in stage.chosen.reasons:
                console.text(f"  {reason}")
            batching = stage.chosen.candidate.batching
            if batching is not None:
                sizes = ", ".join(map(str, batching.preferred))
                wait = f"wait at most {batching.max_queue_delay_us / 1000:g} ms for one to fill"
                console.text(f"  batches of {sizes}, {wait} ({_source(batching.source)})")
        _show_tables(console, stage)


def _show_tables(console: Console, stage: StageChoice) -> None:
    if stage.path:
        console.text("")
        console.table(
            ["path", "target", "precision", "execution", "transfer", "total", "why"],
            [
                [
                    place.where + (" *" if place is stage.chosen else ""),
                    place.target,
                    place.candidate.variant.record.precision or "-",
                    _ms(place.candidate.time.milliseconds),
                    _ms(place.transfer_ms),
                    _ms(place.total_ms),
                    "as above" if place is stage.chosen else "; ".join(place.reasons),
                ]
                for place in stage.path
            ],
        )
    console.text("")
    console.table(
        ["variant", "precision", "here", "why"],
        [
            [
                each.variant.record.target,
                each.variant.record.precision or "-",
                "not asked" if each.refused else each.match.verdict,
                each.refused or "; ".join(each.match.cannot or each.match.unknown or each.match.met),
            ]
            for each in stage.candidates
        ],
    )
    for tag, reason in stage.left_out.items():
        console.text(f"not in the path: {tag}: {reason}")


def _nothing(selection: Selection) -> ModelForgeError:
    from modelforge.errors import UnsupportedError

    lines = []
    for stage in selection.stages:
        if stage.chosen is not None:
            continue
        for each in stage.candidates:
            record = each.variant.record
            why = each.refused or "; ".join(each.match.cannot)
            over = next((place for place in stage.path if place.candidate is each), None)
            if not why and over is not None:
                why = "; ".join(over.reasons)
            wants = f"would run on {'; '.join(each.needs)}" if each.needs and record.status == "compiled" else ""
            lines.append(
                f"\n  {record.target} ({record.precision or record.status}): {why}" + (f" - {wants}" if wants else "")
            )
    return UnsupportedError(
        f"no variant of {selection.bundle.name} {selection.bundle.version} can answer for this device:"
        + "".join(lines),
        where=str(selection.bundle.path),
        fix="build for a target that this device is (`modelforge targets`), or name a way to another tier with --link",
    )


def _place(place: Place) -> str:
    record = place.candidate.variant.record
    where = "here" if place.where == "here" else f"on the tier {place.where}"
    return f"{where}: {record.target} ({record.precision}, {record.compiler})"


def _source(source: str) -> str:
    return "not measured" if source == "none" else source


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ms"


def _milliseconds(text: str) -> float:
    from modelforge.errors import InputError

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise InputError(f'"{text}" is not a time in milliseconds', where="--latency-budget", fix="for example 50")
    return value


def _count(text: str) -> int:
    from modelforge.errors import InputError

    if not text.isdecimal() or int(text) < 1:
        raise InputError(f'"{text}" is not a number of samples', where="--batch", fix="for example --batch 4")
    return int(text)
