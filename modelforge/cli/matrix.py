"""What `modelforge plan --matrix` prints: where a model can run, by estimate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from modelforge.cli.console import Console, size_text

if TYPE_CHECKING:
    from modelforge.forge.placement import Estimate, Matrix
    from modelforge.target import Target


def show_matrix(args: argparse.Namespace, console: Console) -> int:
    """``args.recipe`` is a model, or a recipe whose model, shapes, targets and budget hold."""
    from modelforge.forge.intake import require_build_extra

    require_build_extra()
    from modelforge.forge.placement import DEFAULT_TASK, placement_matrix
    from modelforge.graph.inspect import inspect_model
    from modelforge.graph.load import check_model
    from modelforge.graph.split_graph import read_layers

    model, shapes, bound, targets, task, budget = _subject(args)
    check_model(model)
    bound = {**bound, **sizes(args.size)}
    facts = inspect_model(model, cost=False, shapes=shapes)
    graph = read_layers(model, bound, shapes)
    task, budget = args.task or task or DEFAULT_TASK, args.latency_budget or budget
    matrix = placement_matrix(graph, facts, targets, task=task, budget_ms=budget)
    console.result({"model": str(model), **matrix.facts()})
    if not console.json:
        _print(console, model, matrix)
    return 0


def sizes(texts: list[str]) -> dict[str, int]:
    """``["height=640"]`` as ``{"height": 640}``."""
    from modelforge.errors import InputError

    found: dict[str, int] = {}
    for text in texts:
        name, sign, size = text.rpartition("=")
        if not sign or not name or not size.isdecimal() or int(size) < 1:
            raise InputError(f'"{text}" is not NAME=N', where="--size", fix="for example --size height=640")
        found[name] = int(size)
    return found


def _subject(
    args: argparse.Namespace,
) -> tuple[Path, dict[str, tuple[int | str, ...]], dict[str, int], list[Target], str | None, float | None]:
    """The model, its input shapes and sizes, the targets, and the recipe's task and budget."""
    from modelforge.target import Registry

    path: Path = args.recipe
    if path.is_dir() or path.suffix == ".toml":
        from modelforge.forge.placement import BUDGET_MS
        from modelforge.recipe import load_recipe

        recipe = load_recipe(path)
        registry = Registry([recipe.folder / "targets"])
        tags = args.target or [section.tag for section in recipe.targets]
        bound = {symbol: dim.usual for symbol, dim in recipe.dims.items()}
        task = recipe.serving.task if recipe.serving.task in BUDGET_MS else None
        targets = [registry.get(tag, where="--target") for tag in tags]
        return recipe.model, dict(recipe.inputs), bound, targets, task, recipe.serving.latency_budget_ms
    registry = Registry()
    targets = [registry.get(tag, where="--target") for tag in args.target] or list(registry)
    return path, {}, {}, targets, None, None


def _print(console: Console, model: Path, matrix: Matrix) -> None:
    console.text(
        f"{model.name}: {matrix.flops / 1e9:.2f} GFLOP, weights {size_text(matrix.weight_bytes)}; "
        f"held against {matrix.budget_ms:g} ms for one inference ({matrix.task})\n"
    )
    console.table(
        ["tier", "runs", "widest", "fastest", "targets that do", "of", "no estimate"],
        [
            [
                tier.tier, tier.verdict, tier.widest or "-", tier.fastest or "-", ", ".join(tier.able) or "-",
                str(tier.judged), ", ".join(tier.unknown) or "-",
            ]
            for tier in matrix.tiers
        ],
    )  # fmt: skip
    console.text("")
    console.table(
        ["target", "tier", "runs", "widest", "fastest", "needs", "may take", "estimated", "a second",
         "limit", "compiler", "why"],
        [
            [
                row.target.tag, row.target.tier, row.verdict,
                row.best.precision if row.best else "-", row.fastest.precision if row.fastest else "-",
                *_cells(row.fastest or row.estimates[-1]), row.why or "-",
            ]
            for row in matrix.rows
        ],
    )  # fmt: skip
    for note in matrix.notes:
        console.note(f"note: {note}")


def _cells(estimate: Estimate) -> list[str]:
    error = estimate.factor.error
    corrected = "" if not estimate.factor.measurements else (
        f" (corrected by {estimate.factor.measurements} measured" + (f", ±{error:.0%})" if error is not None else ")")
    )  # fmt: skip
    latency, rate = estimate.latency_ms, estimate.throughput
    return [
        size_text(estimate.needed_bytes),
        size_text(estimate.allowed_bytes),
        "-" if latency is None else f"~{latency:.3g} ms{corrected}",
        "-" if rate is None else f"~{rate:.3g}",
        estimate.limit or "-",
        estimate.compiler,
    ]
