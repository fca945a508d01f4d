"""`modelforge ascend`: would atc take this command line, and why did that run fail?"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from modelforge.cli.console import Console

if TYPE_CHECKING:
    from modelforge.compilers.ascend.check import Verdict
    from modelforge.compilers.ascend.failures import Diagnosis

DESCRIPTION = """Both work without CANN.

check TEXT         would atc take this line? Explains each option, gives the reason where atc refuses it, and the
                   corrected line. TEXT is shell text with an atc command in it, as pasted from a script or a README
explain-log FILE   why did atc fail? Finds the code of the root cause, whose fault it is, what to do, and the operators

- for TEXT or FILE reads standard input. check ends with 0 (accepted) or 2 (refused)."""
EXAMPLE = 'modelforge ascend check "atc --model=a.onnx --framework=5 --output=a --soc_version=Ascend310P3"'

_LONGEST_LOG = 8 << 20
"""Bytes of a log that are read, from its end: atc at --log=debug writes gigabytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check", "explain-log"))
    parser.add_argument("subject", metavar="TEXT|FILE")
    parser.add_argument("--cann", metavar="VERSION", help="for check: the CANN that it is for, such as 8.2.RC1")
    parser.add_argument(
        "--help-text",
        type=Path,
        metavar="FILE",
        help="for check: what `atc --help` of that CANN prints; options it lacks are refused",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    if args.action == "explain-log":
        return _explain(args.subject, console)
    from modelforge.compilers.ascend.check import check
    from modelforge.errors import InputError

    text = sys.stdin.read() if args.subject == "-" else args.subject
    help_text = None if args.help_text is None else _read(args.help_text)
    verdict = check(text, cann=args.cann, help_text=help_text)
    _tell_verdict(verdict, console)
    if verdict.reason is None:
        return 0
    error = InputError(
        f"atc refuses this line: {verdict.reason.what}", where=verdict.reason.code, fix=verdict.reason.fix
    )
    error.reported = True
    raise error


def _tell_verdict(verdict: Verdict, console: Console) -> None:
    from modelforge.compilers.ascend.command import shell_text
    from modelforge.compilers.ascend.option_table import option_table

    corrected = ["atc", *verdict.argv]
    console.result(
        {
            "accepted": verdict.accepted,
            "reason": None if verdict.reason is None else asdict(verdict.reason),
            "findings": [asdict(each) for each in verdict.findings],
            "options": dict(verdict.given),
            "corrected": corrected if verdict.argv else None,
        }
    )
    table = option_table()
    about = {name: table[name].about if name in table else "known to the installed atc only" for name in verdict.given}
    console.table(
        ["option", "value", "meaning"],
        [["--" + name, _short(text), about[name]] for name, text in verdict.given.items()],
    )
    if verdict.findings:
        console.text("")
        rows = [[_level(each.level, refuses=each.refuses), each.code, each.what, each.fix] for each in verdict.findings]
        console.table(["", "code", "finding", "what to do"], rows)
    if not verdict.argv:
        return
    wrong = any(each.level == "error" for each in verdict.findings)
    changed = any(each.level == "fixed" for each in verdict.findings)
    if wrong or changed:
        console.text(f"\n{'corrected as far as possible' if wrong else 'corrected'}:\n{shell_text(corrected)}")
    elif verdict.accepted:
        console.text("\naccepted")


def _explain(subject: str, console: Console) -> int:
    from modelforge.compilers.ascend.failures import diagnose

    diagnosis = diagnose(sys.stdin.read() if subject == "-" else _read(Path(subject)))
    if diagnosis is None:
        console.result({"failed": False}, "the log tells of success and of no failure")
        return 0
    _tell_diagnosis(diagnosis, console)
    return 0


def _tell_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    fields = asdict(diagnosis)
    console.result({"failed": True, "class": fields.pop("failure_class"), **fields})
    code = diagnosis.code or "no code"
    console.text(f"{code}{f' ({diagnosis.title})' if diagnosis.title else ''}: {diagnosis.failure_class}")
    console.table(
        ["", ""],
        [
            ["said", _short(diagnosis.message)],
            ["cause", diagnosis.cause],
            ["to mend", diagnosis.fix],
            ["all codes", ", ".join(diagnosis.codes) or "none"],
        ],
    )
    if diagnosis.ops:
        console.text("")
        rows = [
            [each.name or "-", each.type or "-", "-" if each.opset is None else str(each.opset)]
            for each in diagnosis.ops
        ]
        console.table(["operator", "type", "opset"], rows)


def _level(level: str, *, refuses: bool) -> str:
    return (
        {"error": "refused", "fixed": "corrected", "warning": "note"}[level] if refuses or level != "error" else level
    )


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _read(path: Path) -> str:
    from modelforge.errors import InputError

    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _LONGEST_LOG))
            return stream.read().decode("utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
