"""Arm's Ethos-U NPUs through Vela: a user's own int8 .tflite form of the model, compiled and judged against it.

Vela reads no ONNX. ModelForge converts nothing: ``[target.ethos-u] model`` names the .tflite file, LiteRT runs it as it
was before Vela, and its outputs are held against those of the recipe's FP32 model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from modelforge.compilers.ethos_u import building, configurations
from modelforge.compilers.isolated import probe_environment
from modelforge.compilers.protocol import OWN_FILE, Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain
from modelforge.errors import BuildError
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.store import canonical_json
from modelforge.target import EthosUArchitecture, Target
from modelforge.toolchains import environments
from modelforge.toolchains.definition import DEFINITION, Definition, load_definition
from modelforge.toolchains.environments import Environment, find, install_command, require

NAME = "ethos-u"
MANIFEST = "ethos-u.json"
GIVEN = "given.tflite"
"""The user's own file in the bundle: what is run to judge the variant."""
NOTE = "the artifact itself was not run: the .tflite file that Vela compiled was, in LiteRT's reference kernels"


@cache
def toolchain() -> Definition:
    """The definition beside this file."""
    return load_definition(NAME, Path(__file__).parent / DEFINITION)


@dataclass(frozen=True)
class EthosUCompiler:
    """Vela behind :class:`modelforge.compilers.protocol.Compiler`."""

    name: str = NAME
    title: str = "Arm Vela"
    section = NAME
    code_version: str = "1"

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        del target
        return probe_environment(toolchain())

    def dialect(self, target: Target) -> str:
        del target
        return "onnxruntime-arm"  # named, and never written: the user's own file is quantized already

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        del facts, inputs, dims  # held against the file itself, by LiteRT
        if not isinstance(target.arch, EthosUArchitecture):
            return [Refusal("target", f"{target.tag} is no Ethos-U", "choose another compiler")]
        found = list(configurations.refusals(target.arch))
        if precision != "int8":
            found.append(Refusal("precision", f"Ethos-U has no {precision}", 'give this target the ladder ["int8"]'))
        if "model" not in options:
            what = "Vela reads .tflite files, and ModelForge makes none"
            fix = 'convert and quantize the model yourself, and name it: [target.ethos-u] model = "model.tflite"'
            found.append(Refusal(OWN_FILE, what, fix))
        return found

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        """What is compiled is not the recipe's model; see :func:`building.build`."""
        del model, target, options
        return []

    def compile(self, job: CompileJob) -> Compiled:
        """``main_vela.tflite``, with the file that it was made of and how its tensors stand for the model's."""
        built = building.build(job, require(toolchain()))
        arch = job.target.arch
        assert isinstance(arch, EthosUArchitecture)
        manifest = {
            "schema": 1,
            "accelerator": arch.accelerator,
            "inputs": [asdict(port) for port in built.inputs],
            "outputs": [asdict(port) for port in built.outputs],
        }
        path = job.workdir / MANIFEST
        path.write_bytes(canonical_json(manifest))
        notes = [f"figures of {building.SUMMARY} are Vela's estimates for {arch.system_config}, not measurements"]
        on_cpu = built.delegation["operators"]["cpu"]
        if on_cpu:
            named = ", ".join(built.delegation["off_npu"][:3])
            notes.append(f"{on_cpu} operators run on the CPU beside the NPU: {named}")
        return Compiled(
            artifact=building.ARTIFACT,
            files={**built.files, GIVEN: built.given, MANIFEST: path},
            commands=(("vela", "main.tflite", *built.arguments),),
            requires=f"{arch.accelerator} and firmware with its driver and TFLite Micro's ethos-u kernel",
            notes=tuple(notes),
            report={"estimate": dict(built.summary), "delegation": dict(built.delegation)},
        )

    def runner(self, target: Target) -> str | None:
        """``reference``: the user's .tflite file runs here, Vela's form of it only on the NPU or Arm's FVP."""
        is_ours = isinstance(target.arch, EthosUArchitecture)
        return "reference" if is_ours and isinstance(find(toolchain()), Environment) else None

    def runner_hint(self, target: Target) -> str:
        if self.runner(target) is None:
            return f"LiteRT comes with the toolchain: {install_command(toolchain())}"
        return "Vela's form of the model runs on the NPU or in Arm's FVP only: check the golden samples there"

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """Nothing here runs as the NPU would."""
        del first, second
        return None

    def run(self, job: RunJob) -> Ran:
        """Run the user's own file in LiteRT.

        Raises:
            BuildError: a file of the variant is missing, or LiteRT failed.
        """
        import json

        for name in (MANIFEST, GIVEN):
            if name not in job.files:
                raise BuildError(f"{name} is not among the variant's files", where=job.target.tag)
        manifest = json.loads(job.files[MANIFEST].read_text(encoding="utf-8"))
        request = {
            "action": "run",
            "model": str(job.files[GIVEN]),
            "samples": str(job.inputs),
            "inputs": manifest["inputs"],
            "outputs": manifest["outputs"],
            "result": str(job.outputs),
        }
        what = f"LiteRT, running the model for {job.target.tag}"
        environments.call(require(toolchain()), request, workdir=job.workdir, timeout=job.timeout, what=what)
        if not job.outputs.is_file():
            raise BuildError("LiteRT wrote no outputs", where=GIVEN)
        return Ran("reference", (NOTE,))


__all__ = ["EthosUCompiler", "toolchain"]
