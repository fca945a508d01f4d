"""What a device is and which runtimes it has: read here, or from a JSON file that was written on it.

Three answers are kept apart everywhere: a value is known, something is known not to be there (an empty list, or a
version that is null), or it is not known (the key is absent). Nothing is guessed. Imports no vendor module.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from modelforge.bundle import probes
from modelforge.bundle.parts import open_regular
from modelforge.errors import InputError, nearest
from modelforge.toolchains import host

SOFTWARE = {
    "nvidia_driver": "the NVIDIA driver",
    "cuda": "CUDA (as far as the driver goes)",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "l4t": "Jetson Linux (L4T)",
    "jetpack": "JetPack",
    "cann": "CANN",
    "rknn": "the RKNN runtime (librknnrt)",
    "rknpu_driver": "the RKNPU driver",
    "qnn": "the Qualcomm QNN runtime (QAIRT)",
    "onnxruntime": "ONNX Runtime",
    "glibc": "glibc",
    "glibcxx": "libstdc++ (GLIBCXX symbol version)",
}
"""What ``versions`` may name, and how messages call it."""

_FILE_LIMIT = 1 << 20


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Gpu(_Facts):
    """An NVIDIA GPU; ``sm`` is its compute capability without the dot (75 is 7.5)."""

    name: str = ""
    sm: Annotated[int, Field(ge=10, le=999)]
    memory_bytes: Annotated[int, Field(gt=0)] | None = None


class Hexagon(_Facts):
    """A Qualcomm Hexagon tensor processor: its version (73), QNN's number for the SoC, the SoC's name (``sm8550``)."""

    soc: str = ""
    htp_arch: Annotated[int, Field(ge=60, le=99)]
    soc_model: Annotated[int, Field(gt=0)] | None = None


class DeviceFacts(_Facts):
    """One device.

    Attributes:
        isa: ``x86-64``, ``aarch64``, or the kernel's own word.
        cpuinfo: flags that every core has, in the kernel's words.
        gpus, ascend, rockchip, qualcomm: what accelerators there are; ``soc_version`` words for Ascend
            (``Ascend310P3``), ``target_platform`` words for Rockchip (``rk3588``). Empty: none; None: not known.
        versions: by key of :data:`SOFTWARE`, all that are installed; in JSON a string, a list of them, or null: known
            not to be installed. An absent key: not known.
        notes: what the probe could not tell, in words.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    name: str = ""
    isa: str | None = None
    cpuinfo: tuple[str, ...] | None = None
    cores: Annotated[int, Field(gt=0)] | None = None
    memory_bytes: Annotated[int, Field(gt=0)] | None = None
    gpus: tuple[Gpu, ...] | None = None
    ascend: tuple[str, ...] | None = None
    rockchip: tuple[str, ...] | None = None
    qualcomm: tuple[Hexagon, ...] | None = None
    versions: dict[str, tuple[str, ...]] = {}
    notes: tuple[str, ...] = ()

    @field_validator("versions", mode="before")
    @classmethod
    def _listed(cls, versions: Any) -> Any:
        if not isinstance(versions, dict):
            return versions
        return {key: () if value is None else _tuple(value) for key, value in versions.items()}

    def to_json(self) -> dict[str, Any]:
        """The document of ``select --print-device-facts``; what is not known is left out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        spelled = {key: value[0] if len(value) == 1 else list(value) or None for key, value in self.versions.items()}
        data["versions"] = dict(sorted(spelled.items()))
        return data


def this_device(root: Path = Path("/"), *, npu_smi: str = "npu-smi") -> DeviceFacts:
    """Look at this machine. Costs milliseconds, but where an Ascend driver must be asked (``npu-smi``, a second).

    Args:
        root: another root folder stands for a machine: files are read below it, and what only this process can tell
            (its instruction set, its C library, its Python packages) is left out.
        npu_smi: the program that tells the name of an Ascend processor.
    """
    here = root == Path("/")
    isa = host.isa_of(platform.machine()) if here else None
    compatible = probes.device_tree(root)
    nvidia = probes.nvidia(root, compatible)
    ascend = probes.ascend(root, npu_smi)
    flags = host.parse_flags(probes.text(root / "proc/cpuinfo"))
    told = [probes.libraries(root), nvidia.versions, ascend.versions]
    told += [probes.rockchip_versions(root), probes.qualcomm_versions(root)]
    if here:
        told.append(probes.of_this_process())
    return DeviceFacts(
        name=probes.model(root) or (platform.node() if here else ""),
        isa=isa,
        cpuinfo=tuple(sorted(flags)) or None,
        cores=host.this_host().cores if here else None,
        memory_bytes=probes.memory(root),
        gpus=None if nvidia.found is None else tuple(Gpu(**gpu) for gpu in nvidia.found),
        ascend=ascend.found,
        rockchip=probes.rockchip(compatible, isa),
        qualcomm=_hexagons(probes.qualcomm(compatible, isa)),
        versions=together(told),
        notes=tuple(note for note in (nvidia.note, ascend.note) if note),
    )


def read_device_facts(path: Path) -> DeviceFacts:
    """Read a JSON file in the form that :meth:`DeviceFacts.to_json` writes.

    Raises:
        InputError: it cannot be read, is no such document, or has a key that is not known.
    """
    try:
        with open_regular(path) as stream:
            data = stream.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if len(data) > _FILE_LIMIT:
        raise InputError(f"is larger than {_FILE_LIMIT} bytes", where=str(path), fix=_FIX)
    try:
        facts = DeviceFacts.model_validate_json(data)
    except ValidationError as error:
        raise InputError(_explain(error), where=str(path), fix=_FIX) from None
    if unknown := sorted(set(facts.versions) - set(SOFTWARE)):
        what = f'unknown key "versions.{unknown[0]}"; {nearest(unknown[0], SOFTWARE)}'
        raise InputError(what, where=str(path), fix=_FIX)
    return facts


_FIX = "`modelforge select --print-device-facts` on the device writes such a file; docs/guides/deploying.md explains it"


def _explain(error: ValidationError) -> str:
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    keys = [str(key) for key in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        known = ["schema" if name == "schema_" else name for name in DeviceFacts.model_fields]
        return f'unknown key "{".".join(keys)}"' + (f"; {nearest(keys[-1], known)}" if len(keys) == 1 else "")
    return f"{'.'.join(keys) + ': ' if keys else ''}{fault['msg'][:1].lower()}{fault['msg'][1:]}"


def together(told: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """All versions of each; one that another says more exactly (10.3.0.30 beside 10.3.0) is left out."""
    keys = dict.fromkeys(key for each in told for key in each)
    found = {key: list(dict.fromkeys(each[key] for each in told if key in each)) for key in keys}
    return {
        key: tuple(one for one in all_ if not any(other != one and other.startswith(f"{one}.") for other in all_))
        for key, all_ in found.items()
    }


def _tuple(value: Any) -> Any:
    # A tuple is what strict validation takes; what is no text is left for it to refuse.
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _hexagons(found: tuple[dict[str, Any], ...] | None) -> tuple[Hexagon, ...] | None:
    return None if found is None else tuple(Hexagon(**each) for each in found)


def load(path: Path | None) -> DeviceFacts:
    """The facts of a file, or of this machine where none is given."""
    return this_device() if path is None else read_device_facts(path)


def dump(facts: DeviceFacts) -> str:
    return json.dumps(facts.to_json(), indent=2, ensure_ascii=False)
