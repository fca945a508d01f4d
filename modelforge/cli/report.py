"""`modelforge report`: what is known of a bundle's variants, on the terminal or as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.cli.console import Console, figure, size_text

if TYPE_CHECKING:
    from modelforge.report import Report, VariantReport

DESCRIPTION = """Show how each variant of a bundle was judged: accuracy and latency against FP32, the ladder with what
each rung reached, which layers stayed higher and why. With --html as one self-contained page, with histograms, bars and
curves. Reads the bundle, and loads nothing that could run."""
EXAMPLE = "modelforge report dist/digits-1.0.0 --html digits.html"
DEFAULT = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"write one HTML page that needs no network; default: {DEFAULT} beside the bundle",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle.read import open_bundle
    from modelforge.report import collect, write_html

    report = collect(open_bundle(args.bundle))
    document: dict[str, Any] = {"path": str(args.bundle), "html": None, **report.to_json()}
    if args.html is not None:
        file = Path(args.html) if args.html else _default(args.bundle)
        size = write_html(report, file, bundle=args.bundle)
        document["html"] = str(file)
        console.note(f"{size_text(size)}, one file")
        console.result(document, str(file))
        return 0
    console.result(document)
    if not console.json:
        _print(report, console)
    return 0


def _default(bundle: Path) -> Path:
    """Beside the bundle; a page of another make that stands there is somebody's, and is left."""
    from modelforge.errors import InputError
    from modelforge.report.page import is_report

    file = bundle.resolve().parent / DEFAULT
    if file.exists() and not is_report(file):
        raise InputError("is no report of ModelForge, and is not replaced", where=str(file), fix="give --html FILE")
    return file


def _print(report: Report, console: Console) -> None:
    console.text(f"{report.name} {report.version}  {report.digest}\n")
    console.table(
        ["target", "status", "precision", "gate", "metric", "reference", "value", "drop", "allowed", "SQNR dB",
         "agreement", "evidence", "latency ms", "kept higher"],
        [_row(variant) for variant in report.variants],
    )  # fmt: skip
    rungs = [_rung(variant, at) for variant in report.variants for at in range(len(variant.rungs))]
    if any(len(variant.rungs) > 1 for variant in report.variants):
        console.text("")
        columns = ["target", "rung", "gate", "value", "drop", "SQNR dB", "agreement", "why"]
        console.table(columns, rungs, title="ladder")
    _print_batches(report, console)
    _print_split(report, console)
    _print_delegation(report, console)
    lines = [f"left out, as it has another shape than this version knows: {_plain(fault)}" for fault in report.left_out]
    lines += [line for variant in report.variants for line in _told(variant)]
    if lines:
        console.text("\n" + "\n".join(lines))
    console.note("note: `--html` shows layers, histograms and curves")


def _print_batches(report: Report, console: Console) -> None:
    """The batches to serve with, of the variants whose time is known."""
    rows = []
    for variant in report.variants:
        found = variant.timing.batching
        if found is None or found.source == "none":
            continue
        within = {True: "within", False: "above", None: "-"}[found.meets_budget]
        rows.append(
            [
                variant.title, ", ".join(map(str, found.preferred)), figure(found.milliseconds, 3),
                figure(found.max_queue_delay_us / 1000, 3), figure(found.throughput, 1), found.source, within,
            ]
        )  # fmt: skip
    if rows:
        console.text("")
        columns = ["target", "gather", "one execution ms", "wait at most ms", "answers a second", "known by", "budget"]
        console.table(columns, rows, title="batches")


def _print_delegation(report: Report, console: Console) -> None:
    """What runs on an NPU and what on the CPU beside it."""
    from modelforge.cli.delegation import COLUMNS, delegation_row

    told = [(variant.record, variant.record.delegation) for variant in report.variants]
    rows = [delegation_row(record.target, record.stage, each.model_dump()) for record, each in told if each is not None]
    if rows:
        console.text("")
        console.table(COLUMNS, [list(map(_plain, row)) for row in rows], title="NPU and CPU")


def _print_split(report: Report, console: Console) -> None:
    """Chains of variants, and the fastest way over tiers by bandwidth."""
    split, shared = report.facts.split, report.facts.partitions.values()
    chains = [
        [
            " -> ".join(_plain(f"{step.stage} on {step.target}") for step in chain.stages),
            (chain.accuracy.gate if chain.accuracy else None) or "-",
            *([figure(each) for each in (chain.accuracy.value, chain.accuracy.drop)] if chain.accuracy else "--"),
            _sqnr(chain.accuracy.sqnr_db, chain.accuracy.identical) if chain.accuracy else "-",
            ", ".join(_plain(step.evidence) for step in chain.stages),
            _plain(chain.reason),
        ]
        for each in ([split] if split is not None else []) + list(shared)
        for chain in each.chains
    ]
    if chains:
        console.text("")
        columns = ["chain", "gate", "value", "drop", "SQNR dB", "evidence", "why not"]
        console.table(columns, chains, title="chains, judged as the whole model")
    if split is not None and split.tiers is not None and split.tiers.sweep:
        link, rows = split.tiers.links[0], []
        for point in sorted(split.tiers.sweep, key=lambda each: each.factor):
            sent = ", ".join(map(_plain, point.sent[:3])) + (f" and {len(point.sent) - 3} more" * (len(point.sent) > 3))
            size = size_text(getattr(point.bytes, split.tiers.transport))
            rows.append(
                [
                    f"{link.bandwidth * point.factor / 1e6:.4g} MB/s", _plain(point.kind), sent or "-", size,
                    figure(sum(point.tier_ms.values()), 3), figure(sum(point.link_ms.values()), 3),
                    figure(point.total_ms, 3),
                ]
            )  # fmt: skip
        console.text("")
        columns = [
            _plain(f"{link.source}-{link.target}"),
            "fastest",
            "sent",
            "bytes",
            "tiers ms",
            "links ms",
            "total ms",
        ]
        estimated = ", estimated" if split.tiers.estimate else ""
        console.table(columns, rows, title=f"by bandwidth{estimated}")


def _row(variant: VariantReport) -> list[str]:
    record, accuracy = variant.record, variant.record.accuracy
    return [
        variant.title, record.status, record.precision or "-", accuracy.gate, _plain(accuracy.metric),
        figure(accuracy.reference), figure(accuracy.value), figure(accuracy.drop), figure(accuracy.max_drop),
        _sqnr(accuracy.sqnr_db, accuracy.identical), figure(accuracy.agreement), accuracy.evidence,
        figure(variant.latency_ms, 2), str(sum(map(len, variant.kept_higher().values()))),
    ]  # fmt: skip


def _rung(variant: VariantReport, at: int) -> list[str]:
    rung = variant.rungs[at]
    return [
        variant.title, rung.precision, rung.gate or "-", figure(rung.value), figure(rung.drop),
        _sqnr(rung.sqnr_db, rung.identical), figure(rung.agreement), _plain(rung.reason),
    ]  # fmt: skip


def _told(variant: VariantReport) -> list[str]:
    """Why a gate failed, whether the variant is slower than another rung, and why layers stayed higher."""
    lines = [f"{variant.title}: gate {variant.record.accuracy.gate}: {_plain(reason)}" for reason in variant.reasons]
    lines += [f"{variant.title}: {_plain(said)}" for said, kind in variant.faster_or_slower() if kind == "bad"]
    for reason, nodes in variant.kept_higher().items():
        named = ", ".join(_plain(node) for node in nodes[:3]) + (f" and {len(nodes) - 3} more" * (len(nodes) > 3))
        lines.append(f"{variant.title}: kept higher: {named}: {_plain(reason)}")
    return lines


def _sqnr(value: float | None, identical: bool) -> str:
    return "identical" if identical else figure(value, 1)


def _plain(text: str | None) -> str:
    """Names come from outside: no control characters reach the terminal."""
    from modelforge.report.markup import printable, shortened

    return "-" if text is None else shortened(printable(text))
