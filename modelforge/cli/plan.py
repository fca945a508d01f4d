"""`modelforge plan`: what a build would do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelforge.cli.console import Console

if TYPE_CHECKING:
    from modelforge.forge.plan import Plan, VariantPlan
    from modelforge.store import Store

DESCRIPTION = "Show what a build would do: which steps run and which are in the cache already. Writes nothing."
EXAMPLE = "modelforge plan recipes/digits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, help="a folder with recipe.toml, or a TOML file; with --matrix a model too"
    )
    parser.add_argument("--target", action="append", default=[], metavar="TAG", help="only this target (repeatable)")
    parser.add_argument(
        "--allow-deferred", action="store_true", help="defer a target whose toolchain is missing instead of refusing it"
    )
    matrix = parser.add_argument_group("where can it run")
    matrix.add_argument("--matrix", action="store_true", help="hold the model against every target, by estimate")
    matrix.add_argument("--task", metavar="TASK", help="whose latency budget holds; default interactive, 50 ms")
    matrix.add_argument("--latency-budget", type=float, metavar="MS", help="for one inference")
    matrix.add_argument("--size", action="append", default=[], metavar="NAME=N", help="size of an open dimension")


def run(args: argparse.Namespace, console: Console) -> int:
    if args.matrix:
        from modelforge.cli.matrix import show_matrix

        return show_matrix(args, console)
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    from modelforge.forge.ladder import known_failures
    from modelforge.forge.plan import make_plan
    from modelforge.store import Store

    plan = make_plan(args.recipe, tags=args.target, allow_deferred=args.allow_deferred)
    store = Store()
    console.result(_document(plan, store))
    if console.json:
        return 0
    certain = plan.certain()
    console.text(f"{plan.recipe.name} {plan.recipe.version}: {plan.intake.count} samples judge each variant\n")
    console.table(
        ["target", "compiler", "precision", "evidence", "will be", "why"],
        [_row(variant, left) for variant, left in zip(plan.variants, known_failures(plan, store), strict=True)],
    )
    console.text("")
    console.table(
        ["step", "key", "state"],
        [[step.title, step.key[:12], _state(step.key, certain, store)] for step in plan.steps()],
    )
    _tell_delegation(plan, store, console)
    for chain in plan.chains:
        members = [plan.variants[place] for place in chain.members]
        able = " or ".join(each.stage for each in members if len(each.rungs) > 1)
        falls = f"; where it misses the gate, {able} falls to its next rung" if able else ""
        console.text(f"\nthen the chain {plan.title(chain)} is judged as the whole model{falls}")
    for variant in plan.variants:
        if variant.hint and variant.rungs[0].evidence == "reference":
            console.note(f"note: {variant.target.tag} will not be run here; {variant.hint}")
    return 0


def _tell_delegation(plan: Plan, store: Store, console: Console) -> None:
    """What runs on an NPU and what on the CPU beside it, and what handing over costs."""
    from modelforge.cli.delegation import COLUMNS, delegation_row
    from modelforge.forge.delegation import known_delegation

    known = [(variant, known_delegation(plan, variant, store)) for variant in plan.variants]
    rows = [delegation_row(variant.target.tag, variant.stage, told) for variant, told in known if told is not None]
    if rows:
        console.text("")
        console.table(COLUMNS, rows, title="NPU and CPU")
    costs = [(tag, cost) for tag, split in plan.partitions.items() for cost in split.costs]
    if costs:
        console.text("")
        columns = ["target", "on the NPU", "tensors", "bytes", "crossing ms", "NPU ms", "CPU ms", "saved ms"]
        console.table(columns, [_cost(tag, cost) for tag, cost in costs], title="crossing, estimated")


def _cost(tag: str, cost: Mapping[str, Any]) -> list[str]:
    seconds = [cost["seconds"][name] for name in ("crossing", "npu", "cpu", "saved")]
    times = ["-" if each is None else f"{each * 1e3:.2f}" for each in seconds]
    return [tag, cost["stage"], str(cost["tensors"]), str(cost["bytes"]), *times]


def _state(key: str, certain: frozenset[str], store: Store) -> str:
    if store.read(key):
        return "cached"
    return "to run" if key in certain else "if a rung above fails"


def _row(variant: VariantPlan, left: Mapping[str, Mapping[str, Any]]) -> list[str]:
    tried = [rung.precision for rung in variant.rungs]
    reasons = [variant.reason] if variant.reason else []
    reasons += [f"{entry['precision']}: {entry['reason']}" for entry in variant.refused]
    reasons += [f"{precision} was left: {entry['reason']}" for precision, entry in left.items()]
    return [
        variant.target.tag,
        variant.compiler or "-",
        ", then ".join(tried) or "-",
        variant.rungs[0].evidence if variant.rungs else "-",
        variant.outcome,
        "; ".join(reasons),
    ]


def _chains(plan: Plan) -> list[list[dict[str, str]]]:
    members = [[plan.variants[place] for place in chain.members] for chain in plan.chains]
    return [[{"stage": each.stage, "target": each.target.tag} for each in chain] for chain in members]


def _document(plan: Plan, store: Store) -> dict[str, Any]:
    from modelforge.forge.delegation import known_delegation
    from modelforge.forge.ladder import known_failures

    certain = plan.certain()
    shown = ("gate", "reason", "chain")
    return {
        "name": plan.recipe.name,
        "version": plan.recipe.version,
        "samples": plan.intake.count,
        "variants": [
            {
                "target": variant.target.tag,
                "stage": variant.stage,
                "required": variant.required,
                "compiler": variant.compiler,
                "toolchain": dict(variant.toolchain or {}),
                "outcome": variant.outcome,
                "reason": variant.reason,
                "rungs": [
                    {
                        "precision": rung.precision,
                        "evidence": rung.evidence,
                        "steps": [step.key for step in rung.steps],
                        **{name: each for name, each in left.get(rung.precision, {}).items() if name in shown},
                    }
                    for rung in variant.rungs
                ],
                "refused": [dict(entry) for entry in variant.refused],
                "hint": variant.hint,
                **({"delegation": shared} if (shared := known_delegation(plan, variant, store)) else {}),
            }
            for variant, left in zip(plan.variants, known_failures(plan, store), strict=True)
        ],
        **({} if plan.split is None else {"split": plan.split.facts()}),
        **({"partitions": {tag: split.facts() for tag, split in plan.partitions.items()}} if plan.partitions else {}),
        **({"chains": _chains(plan)} if plan.chains else {}),
        "steps": [
            {
                "key": step.key,
                "step": step.name,
                "title": step.title,
                "cached": store.read(step.key) is not None,
                "certain": step.key in certain,
            }
            for step in plan.steps()
        ],
    }
