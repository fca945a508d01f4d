"""Toolchain definitions: one small TOML beside a worker file, found by the entry point group ``modelforge.toolchains``.

A toolchain whose pins conflict with ours gets an environment of its own (:mod:`modelforge.toolchains.environments`).
What it is, is data: packages with pins, Python versions, licence, and how its worker is started.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from modelforge.errors import ToolchainMissing, nearest
from modelforge.schema import explain
from modelforge.target import SchemaVersion

GROUP = "modelforge.toolchains"
DEFINITION = "toolchain.toml"
_PIN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(\[[a-z0-9,]+\])?==[A-Za-z0-9][A-Za-z0-9.+!_-]*$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Licence(_Strict):
    """The vendor's terms. ``accept`` means that the user must say so before anything is fetched."""

    name: str
    read: Annotated[str, Field(description="where the text can be read")]
    accept: StrictBool = False


class _DefinitionFile(_Strict):
    schema_: SchemaVersion
    title: str
    packages: Annotated[
        tuple[Annotated[str, Field(pattern=_PIN)], ...],
        Field(min_length=1, description="every package is pinned: name==version"),
    ]
    python: Annotated[
        tuple[Annotated[str, Field(pattern=r"^3\.[0-9]+$")], ...],
        Field(min_length=1, description='Python versions: "3.11"'),
    ]
    probe: Annotated[str, Field(description="the package whose version is the toolchain's")]
    platforms: tuple[str, ...] = ()
    worker: str = "worker.py"
    licence: Licence
    flags: tuple[str, ...] = ("-I",)
    environment: dict[str, str] = {}
    fixed_addresses: StrictBool = False
    install_bytes: Annotated[int, Field(gt=0, description="what the environment takes on disk, about")]


@dataclass(frozen=True)
class Definition:
    """One toolchain.

    Attributes:
        packages: all of them, pinned; installed as they stand, without looking for dependencies.
        python: versions that it runs on, best first: ``3.11``.
        probe: the package whose version is the toolchain's.
        platforms: ``linux-x86_64`` ...; any if empty.
        worker: the stdlib-only file that speaks for it.
        flags: of the interpreter. ``-I`` unless the vendor's results depend on a variable that it would hide.
        environment: variables that the worker is started with.
        fixed_addresses: start without address space randomisation (``setarch -R``), where results depend on addresses.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    python: tuple[str, ...]
    probe: str
    platforms: tuple[str, ...]
    worker: Path
    licence: Licence
    flags: tuple[str, ...]
    environment: dict[str, str]
    fixed_addresses: bool
    install_bytes: int
    path: Path


def toolchain_names() -> list[str]:
    """The toolchains that are defined: ours, and those that other installed packages add."""
    return sorted({point.name for point in entry_points(group=GROUP)})


@cache
def get_definition(name: str) -> Definition:
    """The definition of that name. Imports nothing of the vendor's, and nothing of the package that holds it.

    Raises:
        ToolchainMissing: there is none of that name, or its file is wrong.
    """
    for point in entry_points(group=GROUP):
        if point.name == name:
            spec = importlib.util.find_spec(point.value)
            folders = list(spec.submodule_search_locations or ()) if spec else []
            if not folders:
                raise ToolchainMissing(f"{point.value} is not a package", where=f"entry point {GROUP}: {name}")
            return load_definition(name, Path(folders[0]) / DEFINITION)
    raise ToolchainMissing(
        f'there is no toolchain "{name}"; {nearest(name, toolchain_names())}', fix="`modelforge toolchain list`"
    )


def load_definition(name: str, path: Path) -> Definition:
    """Read one definition.

    Raises:
        ToolchainMissing: the file, or the worker beside it, is missing or wrong.
    """
    if not re.match(r"^[a-z0-9][a-z0-9-]*$", name):
        raise ToolchainMissing(f'"{name}" is no name for a toolchain: lower-case letters, digits, hyphens')
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        file = _DefinitionFile.model_validate(data)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ToolchainMissing(f"cannot be read as TOML: {error}", where=str(path)) from error
    except ValidationError as error:
        what, where, fix = explain(error, _DefinitionFile, path, data)
        raise ToolchainMissing(what, where=where, fix=fix) from None
    worker = path.parent / file.worker
    if not worker.is_file():
        raise ToolchainMissing(f"there is no worker file {file.worker}", where=str(path))
    names = [package.partition("==")[0].lower() for package in file.packages]
    if file.probe.lower() not in names:
        raise ToolchainMissing(f'`probe` names "{file.probe}", which is not among the packages', where=str(path))
    fields = {key: getattr(file, key) for key in _DefinitionFile.model_fields if key not in ("schema_", "worker")}
    return Definition(name=name, worker=worker, path=path, **fields)
