"""A tuning database: what was measured for one machine, and what that decides. The parent's side of :mod:`.tuning`.

One JSON file, ``tuning.json``: an artifact of the store, a file of the variant, and what a recipe may import. It holds
names of candidates, never code: what it selects, the rules make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from modelforge.errors import InputError
from modelforge.store import canonical_json

FILE: Final = "tuning.json"
_LIMIT: Final = 16 << 20
"""Bytes: a database of a thousand kernels takes half a megabyte."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Kernel(_Part):
    """One kind of kernel: how often the model has it, how many candidates were measured, microseconds of one run."""

    geometry: str
    count: PositiveInt
    candidates: NonNegativeInt
    untuned_us: NonNegativeFloat
    tuned_us: NonNegativeFloat


class Entry(_Part):
    """The whole model, tuned and untuned, medians of rounds that alternate; ``ratio`` is the median of their ratios."""

    entry: str
    tuned_ms: NonNegativeFloat
    untuned_ms: NonNegativeFloat
    ratio: NonNegativeFloat
    rounds: PositiveInt


class Measured(_Part):
    """What became of the candidates."""

    measured: NonNegativeInt
    refused: NonNegativeInt
    wrong: NonNegativeInt
    crashed: NonNegativeInt = 0
    first_refusal: str = ""


class Database(_Part):
    """What a tuning gave.

    Attributes:
        rules: version of the rules whose candidates it names, and of TVM.
        machine: fields of :class:`.machine.Machine`: what it is good for.
        device: on what it was measured.
        choices: label of a candidate by what was asked; empty where the untuned model was kept.
        kept: whether the tuned model was measurably faster; ``reason`` says why it was not.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    rules: str
    machine: dict[str, Any]
    device: str
    trials: NonNegativeInt
    choices: dict[str, str]
    kept: bool
    reason: str
    kernels: tuple[Kernel, ...]
    measured: Measured
    model: tuple[Entry, ...]

    def to_json(self) -> bytes:
        """One spelling for one database."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    def sentence(self) -> str:
        """What it says, for the variant record."""
        figures = "; ".join(
            f"{row.tuned_ms:.3g} ms beside {row.untuned_ms:.3g} ms untuned, {row.ratio:.2f} of its time "
            f"({row.entry}, {row.rounds} rounds)"
            for row in self.model
        )
        crashed = f" ({self.measured.crashed} crashed)" if self.measured.crashed else ""
        counted = f"{self.measured.measured} candidates measured{crashed}"
        if not self.kept:
            return f"tuned on {self.device}, {counted}, and the untuned kernels kept: {self.reason}" + (
                f" ({figures})" if figures else ""
            )
        return f"tuned on {self.device}, {counted}, {len(self.choices)} choices: {figures}"


def read(path: Path) -> Database:
    """Read a database that may come from anywhere.

    Raises:
        InputError: it is none.
    """
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"is larger than {_LIMIT >> 20} MiB")
        return Database.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"is not a tuning database: {place}: {fault['msg']}", where=path.name, fix=_FIX) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"is not a tuning database: {error}", where=path.name, fix=_FIX) from None


_FIX = "give the tuning.json of a variant: `modelforge export` writes it out"


def check(database: Database, machine: Mapping[str, Any], where: str) -> None:
    """Hold a database against what is to be built.

    One of another version of the rules is taken: what it names and they no longer have is left out, and told.

    Raises:
        InputError: it was measured for another machine.
    """
    here = json.loads(json.dumps(machine))
    differs = sorted(name for name in {*here, *database.machine} if here.get(name) != database.machine.get(name))
    if differs:
        told = ", ".join(f"{name} {database.machine.get(name)!r}, not {here.get(name)!r}" for name in differs[:3])
        raise InputError(f"was measured for another machine: {told}", where=where, fix="tune for this target")
