"""The way to another place: what it costs to send a model's inputs there and to get its outputs back.

Bytes come from what a bundle says of its tensors; times from a link's latency and bandwidth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelforge.errors import InputError

TIERS = ("device", "edge", "cloud")
"""From near to far: the order of the fallback path."""

BYTES = {
    "float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2,
    "bfloat16": 2, "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes an element, by the dtype's name; strings have no fixed size."""

_LINK = re.compile(r"([a-z]+)=([0-9.]+)(us|ms|s),([0-9.]+)([kMG]i?)?(B|bit)/s\Z")
_SCALE = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@dataclass(frozen=True)
class Link:
    """From this device to a tier: one-way latency in milliseconds, bandwidth in bytes a second."""

    tier: str
    latency_ms: float
    bandwidth: float

    def milliseconds(self, size: int) -> float:
        """How long ``size`` bytes take, one way."""
        return self.latency_ms + size * 1000 / self.bandwidth


@dataclass(frozen=True)
class Transfer:
    """Bytes that go there and come back; None where a shape or dtype is not known, and ``reasons`` say which."""

    input_bytes: int | None
    output_bytes: int | None
    reasons: tuple[str, ...] = ()

    def milliseconds(self, link: Link) -> float | None:
        """Both ways; None where a size is not known."""
        if self.input_bytes is None or self.output_bytes is None:
            return None
        return link.milliseconds(self.input_bytes) + link.milliseconds(self.output_bytes)


@dataclass(frozen=True)
class Tensor:
    """An input or output as "about" tells it: sizes and symbols; ``shape`` is None where it is not recorded."""

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


def parse_link(text: str) -> Link:
    """Read ``edge=5ms,100MB/s``: a tier, the one-way latency (us, ms, s), the bandwidth (B or bit, k M G, ki Mi Gi).

    Raises:
        InputError: not of that form.
    """
    found = _LINK.match(text)
    try:
        if found is None or found[1] not in TIERS:
            raise ValueError(text)
        latency = float(found[2]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[3]]
        bandwidth = float(found[4]) * _SCALE[found[5] or ""] / (8 if found[6] == "bit" else 1)
        if not bandwidth > 0 or not math.isfinite(bandwidth) or not math.isfinite(latency):
            raise ValueError(text)
    except ValueError:
        raise InputError(
            f'"{text}" is not TIER=LATENCY,BANDWIDTH',
            where="--link",
            fix=f"for example --link edge=5ms,100MB/s or --link cloud=20ms,50Mbit/s; tiers: {', '.join(TIERS)}",
        ) from None
    return Link(found[1], latency, bandwidth)


def transfer(about: Mapping[str, Any], stage: str, batch: int) -> Transfer:
    """What one request of ``batch`` samples sends and gets.

    Sizes come from ``inputs`` and ``outputs`` of ``about`` (of a split model, from ``about.stages``). A symbol of the
    first dimension is the batch; another one counts with its largest size (``about.dims``).
    """
    tensors = stage_tensors(about, stage)
    if tensors is None:
        return Transfer(None, None, (f'the bundle does not tell the tensors of the stage "{stage}"',))
    dims = about.get("dims")
    sizes, reasons = [], []
    for kind, group in (("input", tensors[0]), ("output", tensors[1])):
        told = [_bytes(tensor, batch, dims if isinstance(dims, dict) else {}) for tensor in group]
        reasons += [f"the size of the {kind} {name} is not known: {why}" for name, size, why in told if size is None]
        whole = [size for _, size, _ in told if size is not None]
        sizes.append(sum(whole) if len(whole) == len(told) else None)
    return Transfer(sizes[0], sizes[1], tuple(reasons))


def stage_tensors(about: Mapping[str, Any], stage: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """Inputs and outputs of a stage; None where the bundle does not tell them."""
    place: Any = about
    if stage != "main":
        stages = about.get("stages")
        given = stages if isinstance(stages, list) else []
        place = next((each for each in given if isinstance(each, dict) and each.get("name") == stage), {})
    inputs, outputs = _tensors(place.get("inputs")), _tensors(place.get("outputs"))
    return None if inputs is None or outputs is None else (inputs, outputs)


def _tensors(given: Any) -> tuple[Tensor, ...] | None:
    if not isinstance(given, list):
        return None
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in given):
        return None
    return tuple(Tensor(each["name"], str(each.get("dtype")), _shape(each.get("shape"))) for each in given)


def _shape(given: Any) -> tuple[int | str, ...] | None:
    """Sizes and symbols; None where anything else stands there: "about" is JSON of somebody else."""
    if not isinstance(given, list):
        return None
    is_sound = all(isinstance(part, str) or (type(part) is int and part >= 0) for part in given)
    return tuple(given) if is_sound else None


def _bytes(tensor: Tensor, batch: int, dims: Mapping[str, Any]) -> tuple[str, int | None, str]:
    width = BYTES.get(tensor.dtype)
    if width is None:
        return tensor.name, None, f"elements of {tensor.dtype} have no fixed size"
    if tensor.shape is None:
        return tensor.name, None, "no shape is recorded"
    total = width
    for position, part in enumerate(tensor.shape):
        size = part if isinstance(part, int) else batch if position == 0 else _largest(dims.get(part))
        if size is None:
            return tensor.name, None, f"dimension {position} ({part}) has no bound"
        total *= size
    return tensor.name, total, ""


def _largest(dim: Any) -> int | None:
    if not isinstance(dim, dict):
        return None
    values = dim.get("values")
    sizes = values if isinstance(values, list) and values else [dim.get("max")]
    return max(sizes) if all(type(size) is int and size > 0 for size in sizes) else None
