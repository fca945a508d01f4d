"""One build: a user's int8 .tflite file in, Vela's form of it read back from disk, and what Vela says of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.ethos_u.configurations import CONFIG_FILE
from modelforge.compilers.ethos_u.ports import Port, match_ports
from modelforge.compilers.ethos_u.summary import read_delegation, read_summary
from modelforge.compilers.protocol import CompileJob
from modelforge.errors import BuildError, UnsupportedError
from modelforge.target import EthosUArchitecture
from modelforge.toolchains import environments
from modelforge.toolchains.environments import Environment

ARTIFACT = "main_vela.tflite"
SUMMARY = "vela.csv"
_IDENTIFIER = b"TFL3"
"""At bytes 4 to 8 of a .tflite file: its schema's file_identifier."""
_CUSTOM = b"ethos-u"
"""The custom operator that stands for what the NPU runs."""


@dataclass(frozen=True)
class Built:
    """``given`` is the user's own file, ``arguments`` what Vela was called with."""

    files: Mapping[str, Path]
    given: Path
    arguments: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    summary: Mapping[str, float]
    delegation: Mapping[str, Any]


def build(job: CompileJob, environment: Environment) -> Built:
    """Run Vela on the file that the recipe names.

    Raises:
        UnsupportedError: the file is float, is of another model, or nothing of it is on the NPU.
        BuildError: Vela failed, crashed or ran out of time, or left no file for this NPU.
    """
    arch = job.target.arch
    if not isinstance(arch, EthosUArchitecture):
        raise UnsupportedError(f"{job.target.tag} is no Ethos-U")
    given = Path(job.options["model"])
    if _head(given)[4:8] != _IDENTIFIER:
        raise UnsupportedError(
            "is no .tflite file", where=given.name, fix="give the int8 .tflite form of the recipe's model"
        )
    inputs, outputs = _ports(job, environment, given)
    arguments = _arguments(arch, job.options)
    request = {"action": "compile", "model": str(given), "options": list(arguments)}
    what = f"Vela, compiling for {job.target.tag}"
    answer = environments.call(environment, request, workdir=job.workdir, timeout=job.timeout, what=what)
    artifact, summary = job.workdir / answer["artifact"], _only(job.workdir, answer["summaries"])
    log = (job.workdir / "worker.log").read_text(encoding="utf-8", errors="replace")
    figures = read_summary(summary.read_text(encoding="utf-8"))
    delegation = read_delegation(log, int(figures["macs"]))
    _require_npu(delegation, job.target.tag)
    if not artifact.is_file() or _head(artifact)[4:8] != _IDENTIFIER or _CUSTOM not in artifact.read_bytes():
        raise BuildError("Vela said it was done, and there is no file with an ethos-u operator", where=ARTIFACT)
    files = {ARTIFACT: artifact, SUMMARY: summary}
    return Built(files, given, arguments, inputs, outputs, figures, delegation)


def _ports(job: CompileJob, environment: Environment, given: Path) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    request = {"action": "inspect", "model": str(given)}
    what = f"LiteRT, reading {given.name}"
    told = environments.call(environment, request, workdir=job.workdir / "read", timeout=job.timeout, what=what)
    from modelforge.graph.inspect import inspect_model  # heavy: onnx

    facts = inspect_model(job.model, cost=False)
    outputs = {tensor.name: tensor.shape or () for tensor in facts.outputs}
    inputs = {tensor.name: job.inputs[tensor.name] for tensor in facts.inputs}
    return match_ports(inputs, told["inputs"], inputs=True), match_ports(outputs, told["outputs"], inputs=False)


def _arguments(arch: EthosUArchitecture, options: Mapping[str, Any]) -> tuple[str, ...]:
    words = [f"--accelerator-config={arch.accelerator}", f"--config={CONFIG_FILE}"]
    words += [f"--system-config={arch.system_config}", f"--memory-mode={arch.memory_mode}"]
    words += [f"--optimise={options['optimise'].capitalize()}"] if "optimise" in options else []
    return (*words, "--show-cpu-operations")


def _only(workdir: Path, summaries: list[str]) -> Path:
    if len(summaries) != 1:
        raise BuildError(f"Vela left {len(summaries)} summaries, not one")
    return workdir / summaries[0]


def _require_npu(delegation: Mapping[str, Any], tag: str) -> None:
    """Vela ends well where it leaves all of a model to the CPU."""
    if delegation["operators"]["npu"] == 0 or delegation["macs"] == {"npu": 0, "cpu": 0}:
        named = ", ".join(delegation["off_npu"][:5])
        raise UnsupportedError(
            f"Vela leaves the whole model to the CPU, nothing is on the NPU: {named}",
            where=tag,
            fix="give an int8 model of operators that the NPU has; `vela --supported-ops-report` lists them",
        )


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(8)
