"""Tiers and links as the user writes them, into the problem that :mod:`modelforge.graph.split_tiers` solves."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from modelforge.bundle.links import TIERS, parse_link
from modelforge.errors import InputError, RecipeError, nearest
from modelforge.forge.efficiency import FLOAT_BYTES, PRECISIONS, factor_for, machine_for
from modelforge.graph.roofline import layer_seconds
from modelforge.graph.split_graph import LayerGraph
from modelforge.graph.split_tiers import TRANSPORTS, Link, Tier, TierProblem
from modelforge.schema import explain
from modelforge.target import Registry, SchemaVersion, Target

TierName = Literal["device", "edge", "cloud"]
_EXAMPLE = "for example --tier device=cortex-a76 --tier cloud=a100:fp16 --link device-cloud=10ms,1.25MB/s"


@dataclass(frozen=True)
class TierWish:
    """One tier: its place, a target's tag, and the precision that it runs (None: the widest that the target has)."""

    name: str
    target: str
    precision: str | None = None


@dataclass(frozen=True)
class TierSetup:
    """Tiers from near to far, the links between them, and how tensors travel.

    Attributes:
        links: latency in seconds and bandwidth in bytes per second, by the tiers at its ends, the nearer one first.
    """

    tiers: tuple[TierWish, ...]
    links: dict[tuple[str, str], Link]
    transport: str = "fp32"
    return_outputs: bool = True


def setup_from_options(
    tiers: Sequence[str], links: Sequence[str], transport: str = "fp32", *, return_outputs: bool = True
) -> TierSetup:
    """``["device=cortex-a76", "cloud=a100:fp16"]`` and ``["device-cloud=10ms,1.25MB/s"]``.

    Raises:
        InputError: not of that form, or they do not fit together.
    """
    wishes = []
    for text in tiers:
        name, sign, rest = text.partition("=")
        tag, _, precision = rest.partition(":")
        if not sign or not tag:
            raise InputError(f'"{text}" is not TIER=TARGET', where="--tier", fix=_EXAMPLE)
        wishes.append(TierWish(name, tag, precision or None))
    found = {}
    for text in links:
        ends, sign, rest = text.partition("=")
        near, dash, far = ends.partition("-")
        if not sign or not dash:
            raise InputError(f'"{text}" is not TIER-TIER=LATENCY,BANDWIDTH', where="--link", fix=_EXAMPLE)
        link = parse_link(f"{far}={rest}")
        found[near, far] = Link(link.latency_ms / 1e3, link.bandwidth)
    return _checked(TierSetup(tuple(wishes), found, transport, return_outputs), "--tier")


def setup_from_file(path: Path) -> TierSetup:
    """Read a TOML file with ``[[tier]]`` and ``[[link]]`` tables.

    Raises:
        RecipeError: with the file, the line and the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot be read as TOML: {error}", where=str(path)) from error
    try:
        file = _DevicesFile.model_validate(data)
    except ValidationError as error:
        what, where, fix = explain(error, _DevicesFile, path, data)
        raise RecipeError(what, where=where, fix=fix) from None
    return file.setup(str(path))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class TierSection(_Strict):
    """``[[tier]]``: a place and the target there."""

    name: TierName
    target: str
    precision: Literal["fp32", "fp16", "int8"] | None = None


class LinkSection(_Strict):
    """``[[link]]``: ``latency = "10ms"``, ``bandwidth = "1.25MB/s"``."""

    near: Annotated[TierName, Field(alias="from")]
    far: Annotated[TierName, Field(alias="to")]
    latency: Annotated[str, Field(description='a time with its unit: "10ms"')]
    bandwidth: Annotated[str, Field(description='an amount a second: "1.25MB/s", "10Mbit/s"')]


class _DevicesFile(_Strict):
    schema_: SchemaVersion
    tier: Annotated[tuple[TierSection, ...], Field(min_length=1)]
    link: tuple[LinkSection, ...] = ()
    transport: Literal["fp32", "fp16", "int8"] = "fp32"
    return_outputs: StrictBool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({tier.name for tier in self.tier}) < len(self.tier):
            raise ValueError("a tier stands twice")
        return self

    def setup(self, where: str) -> TierSetup:
        return setup_from_sections(
            self.tier, self.link, self.transport, return_outputs=self.return_outputs, where=where
        )


def setup_from_sections(
    tiers: Sequence[TierSection],
    links: Sequence[LinkSection],
    transport: str = "fp32",
    *,
    return_outputs: bool = True,
    where: str,
) -> TierSetup:
    """Tables of a devices file, or of a recipe's ``[split]``."""
    found: dict[tuple[str, str], Link] = {}
    for each in links:
        link = parse_link(f"{each.far}={each.latency},{each.bandwidth}")
        found[each.near, each.far] = Link(link.latency_ms / 1e3, link.bandwidth)
    wishes = tuple(TierWish(each.name, each.target, each.precision) for each in tiers)
    return _checked(TierSetup(wishes, found, transport, return_outputs), where)


def tier_problem(graph: LayerGraph, setup: TierSetup, registry: Registry, *, memory: bool = True) -> TierProblem:
    """Estimate every layer on every tier.

    Args:
        memory: hold each tier's weights against the share of its memory that a model may take.

    Raises:
        TargetError, InputError: an unknown target, or one without a peak rate for the precision.
    """
    from modelforge.forge.placement import MEMORY_SHARE

    tiers = []
    for wish in setup.tiers:
        target = registry.get(wish.target, where="--tier")
        precision = wish.precision or _widest(target)
        machine = machine_for(target, precision, target.compilers[0])
        if machine is None:
            has = [each for each in PRECISIONS if getattr(target.peak, each) is not None]
            raise InputError(
                f"the profile of {target.tag} knows no peak rate for {precision}, so its time cannot be estimated",
                where=f"--tier {wish.name}={wish.target}",
                fix=f"choose {' or '.join(has)}" if has else "choose another target",
            )
        factor = factor_for(target.tag, target.compilers[0], precision).value
        seconds = [each * factor for each in layer_seconds(graph, machine)]
        share = int(target.memory.bytes * MEMORY_SHARE[target.tier]) if memory else None
        tiers.append(Tier(wish.name, seconds, share, FLOAT_BYTES[precision]))
    assert all(second < inf for tier in tiers for second in tier.seconds), "the roofline is finite"
    return TierProblem(graph, tuple(tiers), setup.links, setup.transport, setup.return_outputs)


def _widest(target: Target) -> str:
    for precision in PRECISIONS:
        if precision in target.precisions and getattr(target.peak, precision) is not None:
            return precision
    return "int8"


def _checked(setup: TierSetup, where: str) -> TierSetup:
    """Known names, each tier once and near to far, links between them that reach every tier."""
    names = [tier.name for tier in setup.tiers]
    for name in names:
        if name not in TIERS:
            raise InputError(f'there is no tier "{name}"; {nearest(name, TIERS)}', where=where, fix=_EXAMPLE)
    if len(set(names)) < len(names) or len(names) < 2:
        raise InputError("give two or three different tiers", where=where, fix=_EXAMPLE)
    tiers = tuple(sorted(setup.tiers, key=lambda tier: TIERS.index(tier.name)))
    names = [tier.name for tier in tiers]
    for near, far in setup.links:
        if near not in names or far not in names or names.index(near) >= names.index(far):
            raise InputError(
                f'the link "{near}-{far}" does not lead from a nearer tier to a farther one',
                where="--link",
                fix=f"the tiers are {', '.join(names)}",
            )
    for far in names[1:]:
        if not any(end == far for _, end in setup.links):
            raise InputError(f'no link leads to the tier "{far}"', where="--link", fix=_EXAMPLE)
    if not any(start == names[0] for start, _ in setup.links):
        raise InputError(f'no link leads from the tier "{names[0]}"', where="--link", fix=_EXAMPLE)
    for tier in tiers:
        if tier.precision is not None and tier.precision not in PRECISIONS:
            raise InputError(
                f'there is no precision "{tier.precision}"; {nearest(tier.precision, PRECISIONS)}', where=where
            )
    if setup.transport not in TRANSPORTS:
        raise InputError(
            f'there is no transport "{setup.transport}"; {nearest(setup.transport, TRANSPORTS)}', where="--transport"
        )
    return TierSetup(tiers, setup.links, setup.transport, setup.return_outputs)
