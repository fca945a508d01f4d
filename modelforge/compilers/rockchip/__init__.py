"""Rockchip's NPUs through RKNN-Toolkit2, which lives in an environment of its own (``toolchain.toml``, ``worker.py``).

Imports nothing of the vendor's: what the toolkit does, it does in its worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modelforge.compilers.isolated import probe_environment
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain
from modelforge.compilers.rockchip import building, preflight, running
from modelforge.compilers.rockchip.manifest import FILE_NAME, Manifest
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.store import canonical_json
from modelforge.target import RockchipArchitecture, Target
from modelforge.toolchains.definition import DEFINITION, Definition, load_definition
from modelforge.toolchains.environments import Environment, find, install_command, require

NAME = "rockchip"


@cache
def toolchain() -> Definition:
    """The definition beside this file."""
    return load_definition(NAME, Path(__file__).parent / DEFINITION)


@dataclass(frozen=True)
class RockchipCompiler:
    """RKNN-Toolkit2 behind :class:`modelforge.compilers.protocol.Compiler`."""

    name: str = NAME
    title: str = "RKNN-Toolkit2"
    section = "rockchip"
    code_version: str = "2"

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        del target  # what it builds for one, it builds for all
        return probe_environment(toolchain())

    def dialect(self, target: Target) -> str:
        del target
        return "rockchip"

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        return preflight.refusals(facts, target, precision, inputs, dims, options)

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        del model, target, options  # its facts say all that is known
        return []

    def compile(self, job: CompileJob) -> Compiled:
        """One .rknn for each gear, and ``rockchip.json`` that says which is which."""
        built = building.build(job, require(toolchain()))
        manifest = job.workdir / FILE_NAME
        manifest.write_bytes(canonical_json(built.manifest.facts()))
        version = built.manifest.toolkit
        return Compiled(
            artifact=built.manifest.gears[0].file,
            files={**built.files, FILE_NAME: manifest},
            commands=tuple(_commands(built.manifest)),
            requires=f"librknnrt {version} or newer, on {built.manifest.platform}",
            needs={"librknnrt": f">={version}", "platform": built.manifest.platform},
            notes=tuple(_notes(built)),
            report=_report(built),
        )

    def runner(self, target: Target) -> str | None:
        is_ours = isinstance(target.arch, RockchipArchitecture)
        return "simulator" if is_ours and isinstance(find(toolchain()), Environment) else None

    def runner_hint(self, target: Target) -> str:
        if self.runner(target) is None:
            return f"its simulator comes with the toolchain: {install_command(toolchain())}"
        return "a simulator on a PC, no board: check the golden samples on the device before you rely on it"

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """The simulator says nothing of a board's speed."""
        del first, second
        return None

    def run(self, job: RunJob) -> Ran:
        return running.simulate(job, require(toolchain()))


_QUANTIZES = {"modelforge": "do_quantization=False", building.NATIVE: "do_quantization=True dataset=dataset.txt"}


def _commands(manifest: Manifest) -> list[tuple[str, ...]]:
    """What the worker did, as calls of the toolkit's Python interface."""
    config = [f"{name}={value}" for name, value in sorted(manifest.config.items())]
    commands: list[tuple[str, ...]] = []
    for gear in manifest.gears:
        sizes = [port.sized(gear.batch) for port in manifest.inputs]
        commands.append(
            (
                f"RKNN.config target_platform={manifest.platform} {' '.join(config)}".strip(),
                f"RKNN.load_onnx model.onnx inputs={[port.name for port in manifest.inputs]} input_size_list={sizes}",
                f"RKNN.build {_QUANTIZES[manifest.quantizer]}",
                f"RKNN.export_rknn {gear.file}",
            )
        )
    return commands


def _notes(built: building.Built) -> list[str]:
    manifest = built.manifest
    notes = []
    if manifest.quantizer == building.NATIVE:
        notes.append("INT8 is the toolkit's own quantization of the FP32 model, from the calibration samples")
    if len(manifest.gears) > 1:
        sizes = ", ".join(f"{gear.file} for {gear.batch}" for gear in manifest.gears)
        notes.append(f"a .rknn has fixed shapes: {sizes}; {FILE_NAME} lists them")
    notes += [
        f"input {port.name} takes raw pixels: uint8, NHWC, 0 to 255; mean {list(port.pixels['mean'])} and deviation "
        f"{list(port.pixels['std'])} are built in"
        for port in manifest.inputs
        if port.pixels
    ]
    found = built.delegation[str(manifest.gears[0].batch)]
    if found["operators"] is None:
        notes.append("how much runs on the NPU is unknown")
    elif off := found["off_npu"]:
        total = sum(found["operators"].values())
        named = ", ".join(off[:3]) + (" ..." if len(off) > 3 else "")
        notes.append(f"{len(off)} of {total} operators run on the CPU: {named}")
    if built.complaints:
        notes.append(f"the toolkit logged errors and went on: {built.complaints[0]}")
    return notes


def _report(built: building.Built) -> dict[str, Any]:
    manifest, container = built.manifest, built.container
    return {
        "platform": list(container.platforms),
        "toolkit": container.version,
        "layout": container.layout,
        "config": dict(manifest.config),
        "quantizer": manifest.quantizer,
        "gears": [{"batch": gear.batch, "file": gear.file, "size": gear.size} for gear in manifest.gears],
        "complaints": list(built.complaints),
        "delegation": built.delegation[str(manifest.gears[0].batch)],
    }


__all__ = ["RockchipCompiler", "toolchain"]
