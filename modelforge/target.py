"""Target profiles: what a device is, read from one TOML file each. Knows no compiler and no model.

The tag of a target is the stem of its file: ``targets/cortex-a76.toml`` is ``cortex-a76``.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool, ValidationError

from modelforge.errors import TargetError, nearest
from modelforge.schema import explain

Precision = Literal["fp32", "fp16", "int8", "mixed"]
Tier = Literal["device", "edge", "cloud"]
TAG_PATTERN = r"^[a-z0-9][a-z0-9-]*$"
# Strict, because TOML has types of its own: `true` is not 1, and "8" is not 8.
PositiveInt = Annotated[int, Strict(), Field(gt=0)]
PositiveFloat = Annotated[float, Strict(), Field(gt=0)]
SchemaVersion = Annotated[
    int, Strict(), Field(alias="schema", ge=1, le=1, description="this ModelForge reads schema 1")
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CudaArchitecture(_Strict):
    """An NVIDIA GPU: ``sm`` is the compute capability without its dot (75 is 7.5)."""

    kind: Literal["cuda"]
    sm: Annotated[int, Strict(), Field(ge=50, le=130, description="the compute capability without its dot: 75 for 7.5")]
    dla: StrictBool = False


class CpuArchitecture(_Strict):
    """A CPU, in LLVM's words: ``mcpu`` and ``mattr`` go to the code generator as they stand.

    ``cpuinfo`` lists the flags that a host must show (Linux ``/proc/cpuinfo``) to run this target's code. ``l1d`` and
    ``l2`` are the bytes of cache that one core may fill: tiles are chosen by them.
    """

    kind: Literal["cpu"]
    isa: Literal["x86-64", "aarch64"]
    mcpu: str
    mattr: tuple[str, ...] = ()
    cpuinfo: tuple[str, ...] = ()
    cores: PositiveInt
    vector_bits: PositiveInt
    l1d: PositiveInt = 32768
    l2: PositiveInt = 524288
    qemu_cpu: str | None = None


class AscendArchitecture(_Strict):
    """A Huawei Ascend processor; ``soc_version`` is the exact word that ATC wants."""

    kind: Literal["ascend"]
    soc_version: str
    cores: PositiveInt


class RockchipArchitecture(_Strict):
    """A Rockchip NPU; ``platform`` is rknn-toolkit2's ``target_platform``."""

    kind: Literal["rockchip"]
    platform: str
    cores: PositiveInt


class QualcommArchitecture(_Strict):
    """A Qualcomm Hexagon tensor processor."""

    kind: Literal["qualcomm"]
    htp_arch: Annotated[int, Strict(), Field(ge=60, le=99, description="the Hexagon version: 73 for v73")]
    soc_model: PositiveInt | None = None


class EthosUArchitecture(_Strict):
    """An Arm Ethos-U in one system: Vela's words for ``--accelerator-config``, ``--system-config``, ``--memory-mode``.

    All three are given: with Vela's defaults a larger NPU comes out slower, and memory is laid out for another system.
    """

    kind: Literal["ethos-u"]
    accelerator: str
    system_config: str
    memory_mode: str


Architecture = Annotated[
    CudaArchitecture
    | CpuArchitecture
    | AscendArchitecture
    | RockchipArchitecture
    | QualcommArchitecture
    | EthosUArchitecture,
    Field(discriminator="kind"),
]


class Memory(_Strict):
    """``bytes`` is what the device has; ``bandwidth`` is its peak in bytes per second."""

    bytes: PositiveInt
    bandwidth: PositiveFloat


class Peak(_Strict):
    """Peak rates without sparsity, in operations per second (a multiply-add counts as two)."""

    fp32: PositiveFloat | None = None
    fp16: PositiveFloat | None = None
    int8: PositiveFloat | None = None


class _TargetFile(_Strict):
    schema_: SchemaVersion
    title: str
    vendor: str
    tier: Tier
    compilers: Annotated[tuple[str, ...], Field(min_length=1)]
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)]
    arch: Architecture
    memory: Memory
    peak: Peak
    host: Annotated[str, Field(pattern=TAG_PATTERN, description="the tag of a CPU's profile")] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """One device profile.

    Attributes:
        compilers: names of the compilers that can serve it, in order of preference.
        precisions: what its hardware computes in; a precision absent here has no hardware support.
        host: the tag of the CPU beside an NPU, which runs what the NPU cannot (``partition = "npu"``).
    """

    tag: str
    title: str
    vendor: str
    tier: Tier
    compilers: tuple[str, ...]
    precisions: tuple[Precision, ...]
    arch: Architecture
    memory: Memory
    peak: Peak
    notes: tuple[str, ...]
    path: Path
    host: str | None = None

    def facts(self) -> dict[str, Any]:
        """What a compiled artifact depends on: everything but the file's place and its prose."""
        return {
            "tag": self.tag,
            "compilers": list(self.compilers),
            "precisions": list(self.precisions),
            "arch": self.arch.model_dump(mode="json"),
        }


def load_target(path: Path) -> Target:
    """Read one profile.

    Raises:
        TargetError: the file is not TOML, has an unknown key, lacks one, or holds a value that is not allowed; or its
            name is no tag.
    """
    if not re.match(TAG_PATTERN, path.stem):
        raise TargetError(
            f'the name of the file is no target tag: "{path.stem}"',
            where=str(path),
            fix="rename it: lower-case letters, digits and hyphens only",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(f"cannot be read as TOML: {error}", where=str(path)) from error
    return parse_target(text, path)


def parse_target(text: str, path: Path) -> Target:
    """A profile out of its text, which a bundle or a task carries; ``path`` names it, and need not be there.

    Raises:
        TargetError: as :func:`load_target`.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"cannot be read as TOML: {error}", where=str(path)) from error
    try:
        file = _TargetFile.model_validate(data)
    except ValidationError as error:
        what, where, fix = explain(error, _TargetFile, path, data)
        raise TargetError(what, where=where, fix=fix) from None
    fields = {name: getattr(file, name) for name in _TargetFile.model_fields if name != "schema_"}
    return Target(tag=path.stem, path=path, **fields)


def builtin_folder() -> Path:
    """The folder of the profiles that ship with ModelForge."""
    installed = Path(__file__).parent / "_targets"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "targets"


def folders(extra: Sequence[Path] = ()) -> list[Path]:
    """Where profiles are looked for, first found wins: ``extra``, ``$MODELFORGE_TARGETS``, the built-in ones.

    Raises:
        TargetError: a folder of ``$MODELFORGE_TARGETS`` does not exist; building with the built-in profile instead of
            the one that the user wrote would be silent.
    """
    from_environment = [Path(part) for part in os.environ.get("MODELFORGE_TARGETS", "").split(os.pathsep) if part]
    for folder in from_environment:
        if not folder.is_dir():
            raise TargetError(
                "there is no such folder", where=f"$MODELFORGE_TARGETS: {folder}", fix="mend the variable"
            )
    return [*extra, *from_environment, builtin_folder()]


class Registry:
    """The profiles that can be named in a recipe.

    Example:
        >>> Registry().get("t4").arch.sm
        75
    """

    def __init__(self, extra: Sequence[Path] = ()) -> None:
        self._paths: dict[str, Path] = {}
        for folder in folders(extra):
            for path in sorted(folder.glob("*.toml")):
                self._paths.setdefault(path.stem, path)

    def tags(self) -> list[str]:
        return sorted(self._paths)

    def get(self, tag: str, *, where: str | None = None) -> Target:
        """The profile of ``tag``; ``where`` is named in the error if there is none."""
        path = self._paths.get(tag)
        if path is None:
            raise TargetError(
                f'there is no target "{tag}"; {nearest(tag, self._paths)}',
                where=where,
                fix="`modelforge targets` lists them; a file TAG.toml in targets/ beside the recipe adds one",
            )
        return _load_once(path)

    def __iter__(self) -> Iterator[Target]:
        return (self.get(tag) for tag in self.tags())


@cache
def _load_once(path: Path) -> Target:
    return load_target(path)
