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
    lines = [line for variant in report.variants for line in _told(variant)]
    if lines:
        console.text("\n" + "\n".join(lines))
    console.note("note: `--html` shows layers, histograms and curves")


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
