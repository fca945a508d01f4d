"""Takes what was measured on one machine to another: tunings of a store as one file, and back. Imports no TVM.

``{"schema": 1, "tunings": [{"key": …, "database": {…}}]}``. A key says for which kernels, machine, device, trials
and rules a database holds (:mod:`.tuner`): a build that would measure just that finds it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from modelforge.compilers.tvm import database
from modelforge.compilers.tvm.database import Database
from modelforge.errors import InputError
from modelforge.store import StepRecord, Store, canonical_json, write_atomically

STEP: Final = "tuning"
_LIMIT: Final = 256 << 20
"""Bytes: some five hundred databases of the largest models."""
_SHORTEST: Final = 6


@dataclass(frozen=True)
class Kept:
    """A tuning in a store."""

    key: str
    database: Database


class _Tuning(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    database: Database


class _Archive(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Annotated[Literal[1], Field(alias="schema")]
    tunings: tuple[_Tuning, ...]


def kept(store: Store) -> list[Kept]:
    """All tunings of a store, the last used first."""
    records = [entry.record for entry in store.entries() if entry.record.step == STEP]
    return [Kept(record.key, database.read(_path(store, record))) for record in records]


def export(store: Store, keys: Sequence[str], path: Path) -> list[Kept]:
    """Write tunings to a file: those whose keys begin so, or all.

    Raises:
        InputError: there is none, a key is that of none or of several, or the file cannot be written.
    """
    found = kept(store)
    chosen = [_one(found, key) for key in keys] if keys else found
    if not chosen:
        raise InputError("nothing was tuned here: the store holds no tuning", where=str(store.home), fix=_TUNE)
    rows = [{"key": each.key, "database": json.loads(each.database.to_json())} for each in chosen]
    try:
        write_atomically(path, canonical_json({"schema": 1, "tunings": rows}))
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path), fix="give another FILE") from error
    return chosen


def take_in(store: Store, path: Path) -> list[Kept]:
    """Keep the tunings of a file in a store; one of the same key takes the other's place. All of them, or none.

    Raises:
        InputError: the file holds none.
    """
    found = [Kept(each.key, each.database) for each in _read(path).tunings]
    if not found:
        raise InputError("holds no tuning", where=str(path), fix=_MADE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / database.FILE
        for each in found:
            file.write_bytes(each.database.to_json())
            files = {database.FILE: store.add(file)}
            store.write(StepRecord(each.key, STEP, 0.0, {"device": each.database.device}, files))
    return found


_TUNE: Final = "build a recipe with [target.tune] first (docs/guides/tuning.md)"
_MADE: Final = (
    "give what `modelforge tuning export` wrote; a variant's tuning.json goes into a recipe: [target.tune] database"
)


def _path(store: Store, record: StepRecord) -> Path:
    return store.blob_path(record.files[database.FILE].digest)


def _one(found: Sequence[Kept], key: str) -> Kept:
    meant = [each for each in found if each.key.startswith(key)]
    if len(meant) != 1 or len(key) < _SHORTEST:
        what = f"{len(meant)} tunings" if meant else "no tuning"
        fix = f"`modelforge tuning ls` shows the keys; give {_SHORTEST} digits or more"
        raise InputError(f'"{key}" is the key of {what}', where="KEY", fix=fix)
    return meant[0]


def _read(path: Path) -> _Archive:
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"is larger than {_LIMIT >> 20} MiB")
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        return _Archive.model_validate(data)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"is no file of tunings: {place}: {fault['msg']}", where=str(path), fix=_MADE) from None
    except FileNotFoundError:
        raise InputError("there is no such file", where=str(path), fix=_MADE) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"is no file of tunings: {error}", where=str(path), fix=_MADE) from None
