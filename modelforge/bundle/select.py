"""Which variant of a bundle to run here, and where to go if not here: from the bundle and the device's facts alone.

The Python call for schedulers; needs neither numpy nor any vendor module, starts nothing, writes nothing.

    >>> from modelforge.bundle.select import select
    >>> chosen = select(Path("dist/ppocr-cls-1.2.0"), latency_budget_ms=50).stages[0].chosen
    >>> chosen.target if chosen else "nothing here"
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.bundle.batching import Batching, Curve, Time, curve_of, latency_budget, recommend, sizes_of
from modelforge.bundle.device import DeviceFacts, this_device
from modelforge.bundle.links import TIERS, Link, stage_tensors, transfer
from modelforge.bundle.match import Match, Profile, match, needed, profile_of, summary
from modelforge.bundle.read import Bundle, Variant, open_bundle
from modelforge.errors import InputError, nearest
from modelforge.target import Registry


@dataclass(frozen=True)
class Candidate:
    """One variant, held against this device.

    Attributes:
        refused: why it was not asked at all (its precision, its batch sizes); empty if it was.
        needs: what a device would have to be, in words.
        time: of one execution of the batch that was asked for.
    """

    variant: Variant
    profile: Profile
    match: Match
    refused: str
    needs: tuple[str, ...]
    time: Time
    curve: Curve
    batching: Batching | None

    @property
    def runs_here(self) -> bool:
        return not self.refused and self.match.verdict != "cannot"

    def to_json(self) -> dict[str, Any]:
        record = self.variant.record
        return {
            "target": record.target,
            "title": self.profile.title,
            "tier": self.profile.tier or None,
            "stage": record.stage,
            "status": record.status,
            "precision": record.precision,
            "batch": record.to_json()["batch"],
            "digest": self.variant.digest,
            "needs": list(self.needs),
            "refused": self.refused or None,
            "match": self.match.to_json(),
            "latency": {"ms": self.time.milliseconds, "source": self.time.source, "detail": self.time.detail},
            "batching": None if self.batching is None else self.batching.to_json(),
        }


@dataclass(frozen=True)
class Place:
    """One step of the path: a variant, where it runs, and what an answer costs there.

    Attributes:
        where: ``here``, or the tier that it would be sent to.
        transfer_ms: both ways; 0 here; None where it is not known.
        total_ms: execution and transfer; None where either is not known.
        meets_budget: None where there is no budget, or the total is not known.
        reachable: here, or a link to that tier was given.
    """

    where: str
    candidate: Candidate
    transfer_ms: float | None
    total_ms: float | None
    meets_budget: bool | None
    reachable: bool
    reasons: tuple[str, ...]

    @property
    def target(self) -> str:
        return self.candidate.variant.record.target

    @property
    def is_possible(self) -> bool:
        return self.reachable and self.meets_budget is not False

    def to_json(self) -> dict[str, Any]:
        record = self.candidate.variant.record
        time = self.candidate.time
        return {
            "where": self.where,
            "target": record.target,
            "stage": record.stage,
            "precision": record.precision,
            "digest": self.candidate.variant.digest,
            "artifact": None if record.artifact is None else record.artifact.model_dump(mode="json"),
            "execution_ms": time.milliseconds,
            "source": time.source,
            "transfer_ms": self.transfer_ms,
            "total_ms": self.total_ms,
            "meets_budget": self.meets_budget,
            "reachable": self.reachable,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class StageChoice:
    """The answer for one stage.

    Attributes:
        chosen: the first place of the path that is reachable and not known to exceed the budget; None if there is none.
        path: here first, then what else runs here, then tiers farther away.
        left_out: tags of ``serving.fallback`` that are not in the path, with the reason.
        candidates: every variant of the stage, with why it runs here or not.
    """

    stage: str
    chosen: Place | None
    path: tuple[Place, ...]
    left_out: Mapping[str, str]
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "chosen": None if self.chosen is None else self.chosen.to_json(),
            "path": [place.to_json() for place in self.path],
            "left_out": dict(self.left_out),
            "variants": [candidate.to_json() for candidate in self.candidates],
        }


@dataclass(frozen=True)
class Selection:
    """The answer for a bundle: one choice a stage (``main`` alone, unless the model was split)."""

    bundle: Bundle
    device: DeviceFacts
    batch: int
    latency_budget_ms: float | None
    links: tuple[Link, ...]
    stages: tuple[StageChoice, ...]

    @property
    def is_complete(self) -> bool:
        return all(stage.chosen is not None for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.bundle.name,
            "version": self.bundle.version,
            "digest": self.bundle.digest,
            "path": str(self.bundle.path),
            "device": self.device.to_json(),
            "batch": self.batch,
            "latency_budget_ms": self.latency_budget_ms,
            "links": [vars(link) for link in self.links],
            "stages": [stage.to_json() for stage in self.stages],
        }


def select(
    bundle: Bundle | Path,
    device: DeviceFacts | None = None,
    *,
    latency_budget_ms: float | None = None,
    links: Sequence[Link] = (),
    batch: int = 1,
    precisions: Collection[str] = (),
    registry: Registry | None = None,
) -> Selection:
    """Choose the variant to run on a device, and the path that an answer can take if not there.

    The path goes from near to far, never back: what runs here (the best first), then the tags of ``serving.fallback``
    in their order, then the best variant of each farther tier that they do not cover and that a link leads to (of every
    farther tier where the bundle gives no tags). Of what runs here, variants
    that are known to run come before those of which something is not known; then the fastest, if all were measured;
    else accelerators before CPUs. Chosen is the first place that is reachable and not known to exceed the budget: a
    time that is not known is no reason to go elsewhere.

    Args:
        bundle: an opened one, or its folder.
        device: None: this machine.
        latency_budget_ms: time for an answer; None: that of the bundle's ``serving``, if it has one.
        links: ways to other tiers. A tier without one is listed and never chosen.
        batch: how many samples a request holds.
        precisions: only variants of these.

    Raises:
        InputError, IntegrityError: no bundle, or a damaged one; a precision that no variant has.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    facts = device or this_device()
    given = {link.tier: link for link in links}
    budget = latency_budget_ms if latency_budget_ms is not None else latency_budget(opened.about)
    _check_precisions(opened, precisions)
    registry = registry or Registry()
    asked = _Asked(opened, facts, budget, given, batch, frozenset(precisions), registry)
    stages = tuple(dict.fromkeys(variant.record.stage for variant in opened.variants))
    return Selection(opened, facts, batch, budget, tuple(given.values()), tuple(_stage(asked, each) for each in stages))


@dataclass(frozen=True)
class _Asked:
    bundle: Bundle
    device: DeviceFacts
    budget: float | None
    links: Mapping[str, Link]
    batch: int
    precisions: frozenset[str]
    registry: Registry

    @property
    def fallback(self) -> list[str]:
        serving = self.bundle.about.get("serving")
        given = serving.get("fallback") if isinstance(serving, dict) else None
        return [tag for tag in given if isinstance(tag, str)] if isinstance(given, list) else []


def _stage(asked: _Asked, stage: str) -> StageChoice:
    candidates = [_candidate(asked, each) for each in asked.bundle.variants if each.record.stage == stage]
    local = _ranked([_here(asked, each) for each in candidates if each.runs_here])
    own = local[0] if local else None
    remote, left_out = _remote(asked, candidates, own, {place.target for place in local})
    path = (*local, *remote)
    chosen = next((place for place in path if place.is_possible), None)
    return StageChoice(stage, chosen, path, left_out, tuple(candidates))


def _candidate(asked: _Asked, variant: Variant) -> Candidate:
    record = variant.record
    profile = profile_of(asked.bundle.about, record.target, asked.registry, stage=record.stage)
    curve = curve_of(record)
    sizes = sizes_of(record)
    refused = ""
    if asked.precisions and record.precision not in asked.precisions:
        refused = f"its precision is {record.precision or 'none'}"
    elif record.status == "compiled":
        refused = _batch_fault(asked, variant, sizes)
    # Sizes that were built one by one: what lies between runs as the next larger one.
    gears = sizes if record.batch is not None and record.batch.values else ()
    size = next((gear for gear in gears if gear >= asked.batch), asked.batch)
    return Candidate(
        variant=variant,
        profile=profile,
        match=match(record, asked.device, profile),
        refused=refused,
        needs=needed(record, profile),
        time=curve.at(size),
        curve=curve,
        batching=recommend(curve, sizes, asked.budget) if record.status == "compiled" else None,
    )


def _batch_fault(asked: _Asked, variant: Variant, sizes: Sequence[int]) -> str:
    if sizes:
        if asked.batch > sizes[-1]:
            return f"it takes at most {sizes[-1]} samples at once"
        has_gears = variant.record.batch is not None and variant.record.batch.values
        return f"it takes at least {sizes[0]} samples at once" if asked.batch < sizes[0] and not has_gears else ""
    tensors = stage_tensors(asked.bundle.about, variant.record.stage)
    firsts = {tensor.shape[0] for tensor in (tensors[0] if tensors else ()) if tensor.shape}
    fixed = {first for first in firsts if isinstance(first, int)}
    # Inputs of several fixed sizes have no batch to speak of.
    if len(fixed) == 1 and len(firsts) == 1 and fixed != {asked.batch} and asked.batch != 1:
        return f"its batch is fixed at {fixed.pop()}"
    return ""


def _here(asked: _Asked, candidate: Candidate) -> Place:
    total = candidate.time.milliseconds
    fits = None if total is None or asked.budget is None else total <= asked.budget
    reasons = [summary(candidate.match), f"execution: {candidate.time.words()}"]
    return Place("here", candidate, 0.0, total, fits, True, (*reasons, *_on_budget(asked, total, fits)))


def _ranked(places: Sequence[Place]) -> list[Place]:
    """The best first; see :func:`select`."""
    are_timed = all(place.total_ms is not None for place in places)

    def rank(place: Place) -> tuple[Any, ...]:
        candidate = place.candidate
        time = math.inf if place.total_ms is None else place.total_ms
        flags = (candidate.profile.arch or {}).get("cpuinfo")
        return (
            place.meets_budget is False,
            candidate.match.verdict != "runs",
            time if are_timed else 0.0,
            not candidate.profile.is_accelerator,
            time,
            -len(flags) if isinstance(flags, list) else 0,
            place.target,
        )

    return sorted(places, key=rank)


def _remote(
    asked: _Asked, candidates: Sequence[Candidate], own: Place | None, here: Collection[str]
) -> tuple[list[Place], dict[str, str]]:
    """Places of farther tiers, and the tags of ``serving.fallback`` that are none of them."""
    compiled = [each for each in candidates if each.variant.record.status == "compiled" and not each.refused]
    nearest_tier = _tier_rank(own.candidate.profile.tier) if own is not None else 0
    chosen: list[Candidate] = []
    left_out: dict[str, str] = {}
    for tag in asked.fallback:
        of_tag = [each for each in compiled if each.variant.record.target == tag]
        if tag in here:
            continue
        if not of_tag:
            left_out[tag] = _why_absent(asked.bundle, candidates, tag)
        elif _tier_rank(of_tag[0].profile.tier) < nearest_tier:
            left_out[tag] = (
                f"it is of the tier {of_tag[0].profile.tier}: nearer than this device, the path never goes back"
            )
        else:
            chosen.append(min(of_tag, key=_speed))
    for tier in TIERS[nearest_tier + (own is not None) :]:
        # The recipe's word comes first; a way that the caller names is one more. Of devices of the nearest tier
        # nobody knows where they are: only a link makes one a place.
        is_covered = any(each.profile.tier == tier for each in chosen)
        if is_covered or (tier not in asked.links and (asked.fallback or tier == TIERS[0])):
            continue
        of_tier = [each for each in compiled if each.profile.tier == tier and each.variant.record.target not in here]
        chosen += [min(of_tier, key=_speed)] if of_tier else []
    return [_there(asked, each) for each in chosen], left_out


def _there(asked: _Asked, candidate: Candidate) -> Place:
    tier, record = candidate.profile.tier, candidate.variant.record
    link = asked.links.get(tier)
    cost = transfer(asked.bundle.about, record.stage, asked.batch)
    moved = None if link is None else cost.milliseconds(link)
    execution = candidate.time.milliseconds
    total = None if moved is None or execution is None else moved + execution
    least = total if total is not None else moved
    fits = None
    if asked.budget is not None and least is not None and (total is not None or least > asked.budget):
        fits = least <= asked.budget
    reasons = [f"execution: {candidate.time.words()}"]
    if link is None:
        reasons.append(
            f"no way to the tier {tier or 'of this target'} was given: --link {tier or 'TIER'}=LATENCY,BANDWIDTH"
        )
    elif moved is None:
        reasons += cost.reasons
    else:
        sizes = f"{cost.input_bytes:,} bytes there, {cost.output_bytes:,} back"
        reasons.append(f"transfer: {moved:.4g} ms ({sizes})")
    reasons += _on_budget(asked, least, fits)
    reasons.append("the device there was not compared with what the variant needs: this is another one")
    return Place(tier or "elsewhere", candidate, moved, total, fits, link is not None, tuple(reasons))


def _on_budget(asked: _Asked, milliseconds: float | None, fits: bool | None) -> list[str]:
    if asked.budget is None:
        return []
    if fits is None:
        return [f"whether it meets {asked.budget:g} ms is not known"]
    return [] if fits else [f"{milliseconds:.4g} ms is above the budget of {asked.budget:g} ms"]


def _why_absent(bundle: Bundle, candidates: Sequence[Candidate], tag: str) -> str:
    of_tag = [each for each in candidates if each.variant.record.target == tag]
    if not of_tag:
        was_left = any(entry.annotations.get("io.modelforge.target") == tag for entry in bundle.absent)
        return "its record was not pulled" if was_left else "the bundle has no variant for it"
    return of_tag[0].refused or summary(of_tag[0].match)


def _speed(candidate: Candidate) -> tuple[float, str]:
    time = candidate.time.milliseconds
    return (math.inf if time is None else time, candidate.variant.digest)


def _tier_rank(tier: str) -> int:
    return TIERS.index(tier) if tier in TIERS else 0


def _check_precisions(bundle: Bundle, precisions: Collection[str]) -> None:
    known = {variant.record.precision for variant in bundle.variants if variant.record.precision}
    for precision in precisions:
        if precision not in known:
            raise InputError(
                f'no variant has the precision "{precision}"; {nearest(precision, known)}', where=str(bundle.path)
            )
