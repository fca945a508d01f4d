"""Would atc take this command line? Accepted, or refused with the reason, explained, and corrected where possible.

Judged by what atc's own parser and checks do (see rules.py for the sources); no atc is needed. What only the model
decides (names of inputs, operators) is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelforge.compilers.ascend.arguments import Arguments, Fault, canonical_name, read_arguments
from modelforge.compilers.ascend.command import placeholders_in, read_command
from modelforge.compilers.ascend.findings import Finding, error, fixed, warning
from modelforge.compilers.ascend.limits import parse_version
from modelforge.compilers.ascend.option_table import OptionSpec, installed_options, option_table
from modelforge.compilers.ascend.options import AtcOptions, render, typed
from modelforge.compilers.ascend.rule import Context, Remark
from modelforge.compilers.ascend.rules import RULES
from modelforge.compilers.ascend.shape_rules import shapes_and_gears
from modelforge.errors import InputError


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    accepted: whether atc would take the line as it was written.
    findings: what was found, what atc refuses first.
    given: option -> value as atc reads them, the last of repeated ones.
    options: the options of the corrected line, typed; None if no command line can hold one of the values.
    argv: the corrected arguments (without the program); the given ones where nothing was wrong.
    """

    accepted: bool
    findings: tuple[Finding, ...]
    given: Mapping[str, str]
    options: AtcOptions | None
    argv: tuple[str, ...]

    @property
    def reason(self) -> Finding | None:
        """Why it is refused: the first finding that refuses."""
        return next((each for each in self.findings if each.refuses), None)


def check(text_or_argv: str | Sequence[str], *, cann: str | None = None, help_text: str | None = None) -> Verdict:
    """Check an atc command line.

    Args:
        text_or_argv: shell text with an atc command in it, or the words after ``atc``.
        cann: the CANN release that it is for ("8.2.RC1"); None refuses only what no release from 6.0 on takes.
        help_text: what ``atc --help`` of the installed CANN prints; options that it lacks are refused.

    Raises:
        InputError: there is no atc command in the text, or ``cann`` is no version.
    """
    version = None if cann is None else parse_version(cann)
    if cann is not None and version is None:
        raise InputError(f'"{cann}" is no CANN version', fix="for example 8.2.RC1 or 9.0.0")
    findings: list[Finding] = []
    words: Sequence[str] = text_or_argv if not isinstance(text_or_argv, str) else ()
    if isinstance(text_or_argv, str):
        line = read_command(text_or_argv)
        words, findings = line.words, list(line.findings)
    table = installed_options(help_text)
    arguments = read_arguments(words, table)
    given = arguments.last
    if given.get("help", "no").lower() not in ("0", "f", "false", "n", "no"):
        return Verdict(True, tuple(findings), given, None, ("--help",))

    remarks = _parser_remarks(arguments, table, words)
    opaque = any(placeholders_in(fault.word) for fault in arguments.faults)
    context = Context(given, table, version and version[:2], opaque)
    remarks += [remark for rule in (*RULES, shapes_and_gears) for remark in rule(context)]
    findings += [remark.finding for remark in remarks]
    corrected = dict(given)
    for remark in remarks:
        for name, text in remark.edits.items():
            if text is None:
                corrected.pop(name, None)
            else:
                corrected[name] = text
    options: AtcOptions | None = None
    try:
        options = typed({name: text for name, text in corrected.items() if text and name in option_table()})
        argv = tuple(render(options))
    except InputError as fault:
        findings.append(error("unwritable", None, f"{fault.where}: {fault.what}", fault.fix or ""))
        argv = ()
    # The text and atc's parser come before the rules, as they would stop the run first.
    ordered = sorted(findings, key=lambda each: not each.refuses)
    return Verdict(not any(each.refuses for each in findings), tuple(dict.fromkeys(ordered)), given, options, argv)


def _parser_remarks(arguments: Arguments, table: Mapping[str, OptionSpec], words: Sequence[str]) -> list[Remark]:
    """What atc's parser itself stops at, and what it reads otherwise than it looks."""
    remarks = [_fault(fault, table, words) for fault in arguments.faults]
    seen: set[str] = set()
    for each in arguments.given:
        if each.name in seen:
            remarks.append(
                Remark(warning("repeated", each.name, f"--{each.name} is given twice", "the last one counts"))
            )
        seen.add(each.name)
        if each.abbreviated and each.name != "help":
            what = f"--{canonical_name(each.spelled)} is short for --{each.name}; CANN up to 5.0 did not read that"
            remarks.append(Remark(fixed("abbreviated", each.name, what, "written in full", refuses=False)))
        if each.separate and each.value.startswith("--") and each.value != "--":
            what = f"--{each.name} has no value: it takes the next word, {each.value}, for it"
            finding = error("swallowed", each.name, what, f"write --{each.name}=value")
            remarks.append(Remark(finding, {each.name: None}))
    return remarks


def _fault(fault: Fault, table: Mapping[str, OptionSpec], words: Sequence[str]) -> Remark:
    if fault.code == "non-option":
        return _left_over(fault, words)
    if fault.code == "missing-argument":
        return Remark(error(fault.code, canonical_name(fault.word), fault.what, "write --name=value"))
    name = canonical_name(fault.word.partition("=")[0])
    if name in option_table() and name not in table:
        return Remark(
            error(fault.code, name, f"the installed atc has no --{name}", "leave it out, or use a newer CANN")
        )
    value = fault.word.partition("=")[2]
    if (
        fault.guess is not None
        and value
        and not any(canonical_name(each.partition("=")[0]) == fault.guess for each in words)
    ):
        return Remark(fixed(fault.code, fault.guess, fault.what, f"--{fault.guess}={value}"), {fault.guess: value})
    return Remark(error(fault.code, None, fault.what, "`atc --help` lists them"))


def _left_over(fault: Fault, words: Sequence[str]) -> Remark:
    holes = placeholders_in(fault.word)
    if holes and fault.word.startswith(("$", "`")):
        return Remark(warning("not-filled-in", None, f"{fault.word} may stand for more options", "it was not checked"))
    before = words[list(words).index(fault.word) - 1] if fault.word in words[1:] else ""
    if before.startswith("-") and before.endswith("=") and not fault.word.startswith("-"):
        name = canonical_name(before.rstrip("="))
        what = f'a blank after --{name}= cuts its value off, and "{fault.word}" belongs to no option'
        return Remark(fixed("non-option", name, what, f"--{name}={fault.word}"), {name: fault.word})
    fix = "it was left out"
    if fault.word[:1] in "—–－":
        fix = "it begins with a typographic dash; write --"
    elif "}" in fault.word and any("{" in each and "}" not in each for each in words):
        fix = "a placeholder with a blank in it: fill it in"
    return Remark(fixed("non-option", None, fault.what, fix))
