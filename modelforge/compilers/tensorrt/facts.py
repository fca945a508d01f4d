"""``engine.json``: what is known of an engine, beside it in the bundle. Read before the engine is, and without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.engine_header import EngineHeader, read_header
from modelforge.compilers.tensorrt.product import PRODUCTS, Product
from modelforge.compilers.tensorrt.profiles import Profile
from modelforge.compilers.tensorrt.switches import Switches
from modelforge.errors import IntegrityError
from modelforge.store import canonical_json, digest_file

FILE_NAME = "engine.json"
WEIGHTS = "weights.onnx"
"""The lowered model, in the bundle of a weight-stripped engine."""


@dataclass(frozen=True)
class EngineFacts:
    """Attributes:
    version: of the product that built it, as its module says it.
    digest: ``sha256:<hex>`` of the engine file; nothing loads a file that has another.
    capabilities: compute capabilities that it was built for, without the dot.
    profiles: its optimisation profiles; empty where every input is of fixed size.
    """

    product: str
    version: str
    digest: str
    size: int
    capabilities: tuple[int, ...]
    profiles: tuple[Profile, ...]
    version_compatible: bool
    hardware: str | None
    weights: str | None

    def gears(self) -> tuple[int, ...]:
        """Batch sizes worth timing: what the profiles are tuned for, and the ends of their ranges."""
        firsts = [
            [shape[0] for shape in shapes] for profile in self.profiles for shapes in profile.values() if shapes[0]
        ]
        sizes = {size for each in firsts for size in each}
        if len(sizes) < 2:  # one size, or none: the batch is fixed
            return ()
        return tuple(sorted({usual for _, usual, _ in firsts} | {min(sizes), max(sizes)}))


def write_facts(
    folder: Path, engine: Path, product: Product, version: str, switches: Switches, profiles: list[Profile]
) -> Path:
    """Describe an engine that was just built."""
    blob = digest_file(engine)
    document = {
        "schema": 1,
        "product": product.name,
        "version": version,
        "digest": blob.digest,
        "size": blob.size,
        "capabilities": list(switches.capabilities),
        "profiles": profiles,
        "version_compatible": switches.version_compatible,
        "hardware": switches.hardware,
        "weights": WEIGHTS if switches.strip_plan else None,
    }
    path = folder / FILE_NAME
    path.write_bytes(canonical_json(document))  # in the job's private folder: nothing waits for the disk
    return path


def read_facts(files: Mapping[str, Path], artifact: str) -> tuple[EngineFacts, EngineHeader]:
    """The facts of an engine, its file held against them: header and size. The digest is checked where it is loaded.

    Raises:
        IntegrityError: the facts are missing or damaged, or the file is not the engine that they describe.
    """
    if FILE_NAME not in files:
        raise IntegrityError(
            f"there is no {FILE_NAME} beside the engine: its digest is not known, so it is not loaded",
            where=artifact,
            fix="build the variant again",
        )
    try:
        data: dict[str, Any] = json.loads(files[FILE_NAME].read_text(encoding="utf-8"))
        if data.pop("schema") != 1:
            raise ValueError("another schema")
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        facts = EngineFacts(**plain)
        product = PRODUCTS[facts.product]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{FILE_NAME} cannot be read: {error}", where=artifact, fix="get it again") from error
    header = read_header(files[artifact], magic=product.magic, version=facts.version)
    if header.size != facts.size:
        kind = "truncated" if header.size < facts.size else "longer than it was"
        raise IntegrityError(
            f"the engine is {kind}: {header.size} bytes, built with {facts.size}", where=artifact, fix="get it again"
        )
    return facts, header
