"""Gives each kernel the schedule of the rule that made it, or of the first general rule that can have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelforge.compilers.tvm.api import Schedule, block_annotations, blocks, kernels, narrowed
from modelforge.compilers.tvm.kernels import GENERAL, RULES
from modelforge.compilers.tvm.kernels.rule import MACS, RULE, Anchored, General
from modelforge.compilers.tvm.machine import Machine


@dataclass(frozen=True)
class KernelReport:
    """One kernel: which rule scheduled it, its multiply-adds, and what its tile or a refusal was."""

    name: str
    rule: str
    macs: int
    note: str = ""


def schedule_all(module: Any, machine: Machine) -> tuple[Any, list[KernelReport]]:
    """Schedule every kernel. One that no rule can have stays as it is, slow and right, and the report says so."""
    reports = []
    for name, function in kernels(module):
        scheduled, report = schedule_one(name.name_hint, function, machine)
        module[name] = scheduled.with_attrs(dict(function.attrs.items())) if function.attrs else scheduled
        reports.append(report)
    return module, sorted(reports, key=lambda report: report.name)


def schedule_one(name: str, function: Any, machine: Machine) -> tuple[Any, KernelReport]:
    """Schedule one kernel."""
    function = narrowed(function)
    refusals: list[str] = []
    macs = 0
    for rule in _candidates(function):
        sch = Schedule(function)
        try:
            if isinstance(rule, Anchored):
                anchor = next(block for block in blocks(sch) if RULE in block_annotations(sch, block))
                macs = int(block_annotations(sch, anchor).get(MACS, 0))
                note = rule.schedule(sch, anchor, machine)
            elif (said := rule.schedule(sch, machine)) is not None:
                note = said
            else:
                continue
        except Exception as error:  # whatever a primitive refuses (ScheduleError, TypeError ...): the next rule has it
            refusals.append(f"{rule.name}: {_first_line(error)}")
            continue
        return sch.mod["main"], KernelReport(name, rule.name, macs, "; ".join([note, *refusals] if note else refusals))
    return function, KernelReport(name, "none", macs, "; ".join(refusals))


def _candidates(function: Any) -> list[Anchored | General]:
    """The rule that made the kernel, then the general ones."""
    sch = Schedule(function)
    named = [block_annotations(sch, block).get(RULE) for block in blocks(sch)]
    own = [RULES[str(name)] for name in named if name is not None]
    return [*own[:1], *GENERAL]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("Error message", "ScheduleError"))]
    return (told or lines or [""])[0][:300]
