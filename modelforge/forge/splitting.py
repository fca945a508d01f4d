"""A split as data: what a recipe's ``[split]`` or the command line asks for, planned purely, written by a worker.

``plan_stages`` reads the model and writes nothing. ``write_stages`` is what a step runs in a child process: its inputs
are the model, by path, and the plan's facts, which with the model's digest make the step's content key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modelforge.errors import BuildError, DataError, InputError, nearest
from modelforge.forge.efficiency import factor_for, machine_for
from modelforge.forge.tiers import TierSetup, tier_problem
from modelforge.graph.facts import TensorFacts
from modelforge.graph.roofline import layer_seconds, unpriced
from modelforge.graph.split import BALANCES, At, Balanced, Bounded, OverTiers, Way, plan_split
from modelforge.graph.split_graph import LayerGraph, read_layers
from modelforge.graph.split_plan import SplitPlan, plan_from_facts
from modelforge.graph.split_write import describe, write_files, write_split
from modelforge.target import Registry
from modelforge.toolchains import worker

CODE_VERSION = "1"
"""Raised whenever the same plan would give other stage models: part of the step's content key."""


CHECK_TIMEOUT = 3600.0
"""Seconds that the whole model and its chain may take together."""


@dataclass(frozen=True)
class SplitWish:
    """One of: ``at``, ``stages``, ``max_stage_bytes``, ``tiers``.

    Attributes:
        at: names of tensors, one tuple for each cut.
        balance: what ``stages`` parts are balanced by: ``flops``, ``bytes`` or ``time``.
        time_on: for ``time``: a target's tag, for an estimate.
        profile: for ``time``: a JSON file with measured milliseconds by node name.
        activations: ``max_stage_bytes`` holds for weights and live activations, not for weights alone.
    """

    at: tuple[tuple[str, ...], ...] = ()
    stages: int | None = None
    balance: str = "flops"
    time_on: str | None = None
    profile: Path | None = None
    max_stage_bytes: int | None = None
    activations: bool = False
    tiers: TierSetup | None = None


@dataclass(frozen=True)
class Planned:
    """A plan with the graph it was made on, for who wants to say more about it."""

    graph: LayerGraph
    plan: SplitPlan
    notes: tuple[str, ...]


def plan_stages(
    model: Path,
    wish: SplitWish,
    registry: Registry,
    *,
    sizes: Mapping[str, int] | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
) -> Planned:
    """Plan a split of a model file.

    Args:
        sizes: of open dimensions, for FLOPs, bytes and times; a recipe's ``opt`` sizes.
        shapes: by input name, in place of what the model declares.

    Raises:
        InputError: what was asked for is impossible, with the reason and the way out.
    """
    asked = [wish.at, wish.stages, wish.max_stage_bytes, wish.tiers]
    if sum(bool(each) if not isinstance(each, int) else True for each in asked) != 1:
        raise InputError(
            "say in one way how to split", where="split", fix="give at, stages, max_stage_bytes, or tiers and links"
        )
    graph = read_layers(model, sizes, shapes)
    notes = _notes(graph, wish)
    return Planned(graph, plan_split(graph, _way(graph, wish, registry), shapes), notes)


def split_model(
    model: Path, plan: SplitPlan, folder: Path, check: Callable[[Path], Mapping[str, Any]] | None = None
) -> Mapping[str, Any]:
    """Write the stages into ``folder``, which appears only after ``check`` has passed its judgement on them.

    Args:
        check: is given the folder under its temporary name; as :func:`check_chain` answers.

    Returns:
        the answer of ``check``.

    Raises:
        BuildError: the chain is not the whole model; nothing is left.
    """
    answer: Mapping[str, Any] = {}

    def judge(written: Path) -> None:
        nonlocal answer
        if check is not None:
            answer = check(written)
            if answer["reason"]:
                raise BuildError(
                    f"the chain of stages is not the model: {answer['reason']}",
                    where=str(model),
                    fix="this is a fault of ModelForge: report it with the model and the command",
                )

    write_split(model, plan, folder, judge)
    return answer


@contextmanager
def chain_check(
    model: Path, plan: SplitPlan, *, data: str | None, samples: int
) -> Iterator[Callable[[Path], Mapping[str, Any]]]:
    """A check for :func:`split_model` that runs in a child process, on ``data`` as in a recipe, or on random inputs.

    Raises:
        DataError: the data is wrong.
    """
    from modelforge.graph.inspect import inspect_model
    from modelforge.samples import load_samples, write_samples

    with TemporaryDirectory(prefix="modelforge-") as temporary:
        work = Path(temporary)
        request: dict[str, Any] = {
            "model": str(model.resolve()),
            "sizes": dict(plan.sizes),
            "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        }
        if data is not None:
            inputs = inspect_model(model, cost=False, shapes=plan.shapes).inputs
            named = [TensorFacts(each.name, each.dtype, _named(each)) for each in inputs]
            loaded = load_samples(data, folder=Path.cwd(), inputs=named, dims={}, limit=None, where="--data")
            write_samples(loaded, work / "samples.npz")
            request |= {"feeds": str(work / "samples.npz"), "count": samples}

        def check(folder: Path) -> Mapping[str, Any]:
            request["folder"] = str(folder.resolve())
            return worker.call(
                "modelforge.forge.splitting:check_chain",
                request,
                workdir=work / "child",
                timeout=CHECK_TIMEOUT,
                what="running the chain",
            )

        yield check


def plan_key(plan: SplitPlan) -> dict[str, Any]:
    """What a splitting step's content key holds beside the model's digest. JSON."""
    return {"plan": plan.facts(), "code": CODE_VERSION}


def write_stages(request: dict[str, Any]) -> dict[str, Any]:
    """Worker: write the stages of ``request["plan"]`` (its facts) of ``request["model"]`` to ``request["folder"]``.

    Returns:
        the manifest, and the files: stage name -> file names, the model first.
    """
    plan = plan_from_facts(request["plan"])
    folder = Path(request["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    write_files(Path(request["model"]), plan, folder)
    files = {
        stage.name: [name for name in (stage.file, f"{stage.file}.data") if (folder / name).exists()]
        for stage in plan.stages
    }
    return {"manifest": describe(plan), "files": files}


def check_chain(request: dict[str, Any]) -> dict[str, Any]:
    """Worker: hold the stages in ``request["folder"]`` against ``request["model"]``, in FP32 and bit by bit.

    ``request["feeds"]`` may name an .npz as :func:`modelforge.samples.write_samples` writes it; without it, the
    inputs are random.
    """
    from modelforge.graph.split_chain import compare_chain

    model = Path(request["model"])
    feeds = _feeds(model, Path(request["feeds"]), request["count"]) if request.get("feeds") else ()
    shapes = {name: tuple(shape) for name, shape in request.get("shapes", {}).items()}
    found = compare_chain(model, Path(request["folder"]), feeds=feeds, sizes=request.get("sizes"), shapes=shapes)
    facts = asdict(found)
    facts["max_abs"] = None if found.max_abs == float("inf") else found.max_abs
    return {**facts, "identical": found.identical}


def _feeds(model: Path, path: Path, count: int) -> list[dict[str, Any]]:
    """The first samples as the model takes them: one at a time, or whole where its first dimension is fixed."""
    import numpy as np

    from modelforge.graph.inspect import inspect_model

    shapes = {tensor.name: tensor.shape for tensor in inspect_model(model, cost=False).inputs}
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in shapes}
    most = min((len(array) for array in arrays.values()), default=0)

    def sample(name: str, index: int) -> Any:
        shape = shapes[name]
        fixed = bool(shape) and isinstance(shape[0], int) and shape[0] != 1  # type: ignore[index]  # not None: bool() saw it
        return arrays[name][index] if fixed else arrays[name][index : index + 1]

    return [{name: sample(name, index) for name in arrays} for index in range(min(count, most))]


def _named(tensor: TensorFacts) -> tuple[int | str, ...]:
    """The shape with a name for every open size."""
    return tuple(f"{tensor.name}_{axis}" if size == "?" else size for axis, size in enumerate(tensor.shape or ()))


def _way(graph: LayerGraph, wish: SplitWish, registry: Registry) -> Way:
    if wish.at:
        return At(wish.at)
    if wish.tiers is not None:
        return OverTiers(tier_problem(graph, wish.tiers, registry))
    if wish.max_stage_bytes is not None:
        return Bounded(wish.max_stage_bytes, wish.activations)
    assert wish.stages is not None, "one of them is given"
    if wish.balance not in BALANCES:
        raise InputError(
            f'nothing is balanced by "{wish.balance}"; {nearest(wish.balance, BALANCES)}', where="--balance"
        )
    by = next(each for each in BALANCES if each == wish.balance)
    return Balanced(wish.stages, by, _seconds(graph, wish, registry) if by == "time" else None)


def _seconds(graph: LayerGraph, wish: SplitWish, registry: Registry) -> list[float] | None:
    if wish.profile is not None:
        return read_profile(graph, wish.profile)
    if wish.time_on is None:
        return None
    target = registry.get(wish.time_on, where="--target")
    for precision in ("fp32", "fp16", "int8"):
        machine = machine_for(target, precision, target.compilers[0])
        if machine is not None:
            factor = factor_for(target.tag, target.compilers[0], precision).value
            return [each * factor for each in layer_seconds(graph, machine)]
    raise InputError(f"the profile of {target.tag} knows no peak rate", where="--target", fix="choose another target")


def read_profile(graph: LayerGraph, path: Path) -> list[float]:
    """Seconds of each layer from a JSON object of milliseconds by node name (a node without a name: its first output).

    Raises:
        DataError: no such file, no numbers, or not of this model: less than half of its layers are in it.
    """
    try:
        times = json.loads(path.read_text(encoding="utf-8"))
        found = [float(times.get(layer.name, 0.0)) / 1e3 for layer in graph.layers]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"is no profile: {error}", where=str(path), fix='write {"node name": milliseconds, ...}'
        ) from error
    known = sum(layer.name in times for layer in graph.layers)
    if known * 2 < len(graph.layers) or any(each < 0 for each in found):
        raise DataError(
            f"knows {known} of {len(graph.layers)} layers of this model" if known * 2 < len(graph.layers)
            else "has a time below 0",
            where=str(path),
            fix="measure this very model, and keep its node names",
        )  # fmt: skip
    return found


def _notes(graph: LayerGraph, wish: SplitWish) -> tuple[str, ...]:
    if wish.at:
        return ()
    unknown = unpriced(graph)
    if not unknown:
        return ()
    sizes = ", ".join(graph.sizes) or "open dimensions"
    return (
        f"{len(unknown)} of {len(graph.layers)} layers have unknown sizes and count as nothing; "
        f"--size NAME=N gives those of {sizes}",
    )
