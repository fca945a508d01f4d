"""Qualcomm's Hexagon tensor processors through ONNX Runtime's QNN provider, in an environment of its own.

Imports nothing of the vendor's: what QNN does, it does in its worker (``toolchain.toml``, ``worker.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modelforge.compilers.isolated import probe_environment
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain
from modelforge.compilers.qualcomm import building, preflight, running
from modelforge.compilers.qualcomm.manifest import FILE_NAME
from modelforge.compilers.qualcomm.socs import soc_named
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.store import canonical_json
from modelforge.target import QualcommArchitecture, Target
from modelforge.toolchains.definition import DEFINITION, Definition, load_definition
from modelforge.toolchains.environments import Environment, find, install_command, require

NAME = "qualcomm"


@cache
def toolchain() -> Definition:
    """The definition beside this file."""
    return load_definition(NAME, Path(__file__).parent / DEFINITION)


@dataclass(frozen=True)
class QualcommCompiler:
    """QNN behind :class:`modelforge.compilers.protocol.Compiler`."""

    name: str = NAME
    title: str = "Qualcomm QNN"
    section = "qualcomm"
    code_version: str = "1"

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        del target  # what it builds for one, it builds for all
        return probe_environment(toolchain())

    def dialect(self, target: Target) -> str:
        del target
        return "qualcomm"

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        del options  # what may be said is said by their schema
        return preflight.refusals(facts, target, precision, inputs, dims)

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        del model, target, options  # its facts say all that is known
        return []

    def compile(self, job: CompileJob) -> Compiled:
        """One context for each gear, and ``qualcomm.json`` that says which is which."""
        built = building.build(job, require(toolchain()))
        manifest = built.manifest
        path = job.workdir / FILE_NAME
        path.write_bytes(canonical_json(manifest.facts()))
        release = ".".join(manifest.qnn.split(".")[:2])
        return Compiled(
            artifact=manifest.gears[0].context or manifest.gears[0].file,
            files={**built.files, FILE_NAME: path},
            commands=tuple(_command(gear.file, built, job.options) for gear in manifest.gears),
            requires=f"QNN runtime (QAIRT) {release} or newer, on {manifest.soc} (Hexagon v{manifest.htp_arch})",
            needs={"qnn": f">={release}", "htp_arch": manifest.htp_arch, "soc_model": manifest.soc_model},
            notes=tuple(_notes(built, job.precision)),
            report=_report(built),
        )

    def runner(self, target: Target) -> str | None:
        is_ours = isinstance(target.arch, QualcommArchitecture)
        return "emulator" if is_ours and isinstance(find(toolchain()), Environment) else None

    def runner_hint(self, target: Target) -> str:
        if self.runner(target) is None:
            return f"its emulator comes with the toolchain: {install_command(toolchain())}"
        return "emulated on x86, no chip: check the golden samples on the device before you rely on it"

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """The emulator says nothing of a chip's speed."""
        del first, second
        return None

    def run(self, job: RunJob) -> Ran:
        return running.emulate(job, require(toolchain()))


def _command(file: str, built: building.Built, options: Options) -> tuple[str, ...]:
    """What the worker did, as the options of an ONNX Runtime session."""
    manifest = built.manifest
    soc = soc_named(manifest.soc)
    provider = building.provider_options(soc, options)
    return (
        "onnxruntime.InferenceSession",
        *(f"--{name}={value}" for name, value in sorted(provider.items())),
        "--session.disable_cpu_ep_fallback=1",
        "--ep.context_enable=1",
        f"--ep.context_embed_mode={int(manifest.gears[0].context is None)}",
        f"--ep.context_file_path={file}",
    )


def _notes(built: building.Built, precision: str) -> list[str]:
    gears, floats = built.manifest.gears, built.described["float_nodes"]
    notes = ["load the .onnx, which names its context: ONNX Runtime with the QNN provider runs it as any model"]
    if len(gears) > 1:
        sizes = ", ".join(f"{gear.file} for {gear.batch}" for gear in gears)
        notes.append(f"a context has fixed shapes: {sizes}; {FILE_NAME} lists them")
    if floats and precision != "fp16":
        named = ", ".join(floats[:3]) + (" ..." if len(floats) > 3 else "")
        notes.append(f"{len(floats)} nodes were not quantized; HTP computes them in FP16: {named}")
    return notes


def _report(built: building.Built) -> dict[str, Any]:
    manifest, described = built.manifest, built.described
    return {
        "soc": manifest.soc,
        "qnn": manifest.qnn,
        "gears": [{"batch": gear.batch, "file": gear.context or gear.file} for gear in manifest.gears],
        "float_nodes": list(described["float_nodes"]),
        "delegation": {
            "operators": {"npu": described["operators"], "cpu": 0},
            "macs": {"npu": described["macs"], "cpu": 0},
            "off_npu": [],
            "source": "one EPContext node and no other in the saved file; operators and MACs of the lowered model",
        },
    }


__all__ = ["QualcommCompiler", "toolchain"]
