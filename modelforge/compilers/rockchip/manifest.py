"""``rockchip.json``, beside the .rknn files: which file serves which batch, what goes in and comes out, how it is made.

The runner builds again by it; a deployer reads which file to load and whether the input is raw pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.isolated import gear_for
from modelforge.errors import BuildError

FILE_NAME = "rockchip.json"
SCHEMA = 1


@dataclass(frozen=True)
class Port:
    """An input or output of the file.

    Attributes:
        dtype: NumPy's name.
        shape: with None in place of the batch.
        pixels: mean and deviation by channel where they are built in: the input is then uint8, NHWC, from 0 to 255.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    pixels: Mapping[str, Sequence[float]] | None = None

    def sized(self, batch: int) -> list[int]:
        """Its shape at a batch."""
        return [batch if size is None else size for size in self.shape]

    @property
    def is_batched(self) -> bool:
        """Whether samples lie along its first axis: it is the batch, or 1."""
        return bool(self.shape) and self.shape[0] in (None, 1)


@dataclass(frozen=True)
class Gear:
    """One .rknn file; ``batch`` is 1 where the model has a fixed first dimension."""

    batch: int
    file: str
    digest: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What a variant of this compiler is.

    Attributes:
        config: arguments of ``RKNN.config`` beside the platform.
        gears: by batch, rising.
        quantizer: who made INT8: ``modelforge`` (or nobody, in a float variant) or ``native``, the toolkit.
    """

    platform: str
    toolkit: str
    config: Mapping[str, Any]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    gears: tuple[Gear, ...]
    quantizer: str = "modelforge"

    def gear(self, batch: int) -> Gear:
        """The file for this batch; the smallest where it has none of its own."""
        return gear_for(self.gears, batch)

    def facts(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def read_manifest(path: Path) -> Manifest:
    """Read it back.

    Raises:
        BuildError: it is not what this version writes.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, and this ModelForge reads {SCHEMA}")
        return Manifest(
            platform=str(data["platform"]),
            toolkit=str(data["toolkit"]),
            config=dict(data["config"]),
            inputs=tuple(_port(each) for each in data["inputs"]),
            outputs=tuple(_port(each) for each in data["outputs"]),
            gears=tuple(Gear(**each) for each in data["gears"]),
            quantizer=str(data.get("quantizer", "modelforge")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"cannot be read: {error}", where=path.name) from error


def _port(data: Mapping[str, Any]) -> Port:
    return Port(str(data["name"]), str(data["dtype"]), tuple(data["shape"]), data["pixels"])
