"""``qualcomm.json``, beside the context files: which file serves which batch, and for which chip they are.

The runner chooses a file by it; a deployer reads which one to load.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.isolated import gear_for
from modelforge.errors import BuildError

FILE_NAME = "qualcomm.json"
SCHEMA = 1


@dataclass(frozen=True)
class Gear:
    """One context: ``file`` is the wrapper to load, ``context`` the binary beside it, None where that is inside."""

    batch: int
    file: str
    context: str | None


@dataclass(frozen=True)
class Manifest:
    """What a variant of this compiler is.

    Attributes:
        qnn: version of QNN that the contexts are for: ``2.51.0``.
        batched: inputs and outputs with the samples along their first axis.
        gears: by batch, rising.
    """

    soc: str
    soc_model: int
    htp_arch: int
    qnn: str
    batched: tuple[str, ...]
    gears: tuple[Gear, ...]

    def gear(self, batch: int) -> Gear:
        """The context for this batch; the smallest where it has none of its own."""
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
        if data.pop("schema") != SCHEMA:
            raise ValueError(f"not schema {SCHEMA}")
        gears = tuple(_gear(each) for each in data.pop("gears"))
        return Manifest(gears=gears, batched=tuple(data.pop("batched")), **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(f"cannot be read: {error}", where=path.name) from error


def _gear(data: Mapping[str, Any]) -> Gear:
    return Gear(int(data["batch"]), str(data["file"]), data["context"])
