"""ONNX Runtime on CPUs: the lowered model, optimised offline, is the artifact.

Knows what ONNX Runtime's CPU provider can have; ``onnxruntime`` is loaded in a child process only
(:mod:`modelforge.compilers.onnxruntime_worker`).
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain
from modelforge.errors import BuildError, UnsupportedError
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.target import CpuArchitecture, Target
from modelforge.toolchains import host, worker

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Operator domains that the ONNX Runtime wheel has kernels for."""

_KERNELS = "https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md#cpuexecutionprovider"


class OnnxRuntimeCompiler:
    """Optimises the lowered model at level BASIC and saves it as ``main.onnx``.

    Level BASIC keeps to operators that every machine has, so one file serves all CPUs of any instruction set; what
    fits one machine (fused and re-laid-out kernels) ONNX Runtime adds as it loads the file. The bytes are the same in
    every build. Weights above 1.5 GB lie beside it in ``main.onnx.data``.
    """

    name = "onnxruntime"
    title = "ONNX Runtime"
    section = None
    code_version = "1"

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        """Say which ONNX Runtime is installed, from package metadata."""
        del target  # what it builds for one, it builds for all
        try:
            return Toolchain({"onnxruntime": importlib.metadata.version("onnxruntime")})
        except importlib.metadata.PackageNotFoundError:
            return Missing("onnxruntime is not installed", "pip install 'modelforge[build]'")

    def dialect(self, target: Target) -> str:
        is_arm = isinstance(target.arch, CpuArchitecture) and target.arch.isa == "aarch64"
        return "onnxruntime-arm" if is_arm else "onnxruntime-x86"

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        """Say what is known to fail: no CPU, operators of unknown domains, fp16 where it has no kernels."""
        del options  # it has none of its own
        if not isinstance(target.arch, CpuArchitecture):
            return [Refusal("architecture", f"{target.tag} is no CPU", "choose another compiler")]
        refusals = [
            Refusal(
                rule="domain",
                what=f"node {op.example}: ONNX Runtime has no operators of the domain {op.domain}, so no {op.op}",
                fix="export the model with standard ONNX operators",
                source=_KERNELS,
            )
            for op in facts.ops
            if op.domain not in DOMAINS
        ]
        if precision not in target.precisions:
            refusals.append(
                Refusal(
                    rule="precision",
                    what=f"{target.tag} has no {precision}" + _why_no_fp16(precision),
                    fix=f"choose from {', '.join(target.precisions)}",
                    source=f"the profile {target.tag}.toml",
                )
            )
        elif precision == "fp16" and target.arch.isa == "x86-64":
            refusals.append(
                Refusal(
                    rule="fp16-kernels",
                    what=f"fp16 gains nothing on {target.tag}" + _why_no_fp16(precision),
                    fix='give the ladder ["int8", "fp32"]',
                    source=_KERNELS,
                )
            )
        return refusals

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        del model, target, options  # its facts say all that is known
        return []

    def compile(self, job: CompileJob) -> Compiled:
        """Optimise offline in a child process, and load what was saved.

        Raises:
            BuildError: ONNX Runtime refused the model, crashed, ran out of time, or saved what does not load.
            UnsupportedError: it has no kernel for a node; or the job has options (there are none).
        """
        if job.options:
            raise UnsupportedError(f'ONNX Runtime has no option "{min(job.options)}"', fix="it takes none")
        output = job.workdir / "main.onnx"
        optimised = worker.call(
            "modelforge.compilers.onnxruntime_worker:optimise",
            {"model": str(job.model), "output": str(output)},
            workdir=job.workdir,
            timeout=job.timeout,
            what=f"ONNX Runtime, optimising for {job.target.tag}",
        )
        names = [output.name, *([optimised["data"]] if optimised["data"] else [])]
        return Compiled(
            artifact=output.name,
            files={name: job.workdir / name for name in names},
            commands=(("onnxruntime.InferenceSession", "--graph-optimization-level=basic", f"--save={output.name}"),),
            requires=f"ONNX Runtime {_line(optimised['version'])} or later, CPU execution provider",
            needs={"onnxruntime": f">={_line(optimised['version'])}"},
            report={"nodes": optimised["nodes"]},
        )

    def runner(self, target: Target) -> str | None:
        """``device`` where this machine's CPU has all that the target's profile asks for."""
        if not isinstance(target.arch, CpuArchitecture) or host.why_not(target.arch) is not None:
            return None
        return "device"

    def runner_hint(self, target: Target) -> str:
        if not isinstance(target.arch, CpuArchitecture):
            return ""
        reason = host.why_not(target.arch)
        if reason is None:
            return ""
        # Its aarch64 wheel (1.32) ends in a segmentation fault under qemu 7.2, so there is no emulator to offer.
        emulated = "; its aarch64 wheel does not run under qemu" if target.arch.isa == "aarch64" else ""
        return f"{reason}: run `modelforge verify` on such a machine{emulated}"

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """Both in one child process, on one thread, round by round; None where this is no such machine."""
        if self.runner(first.target) is None:
            return None
        models = []
        for name, job in (("first", first), ("second", second)):
            own = job.workdir / name
            own.mkdir(exist_ok=True)
            models.append(str(_model_beside_its_data(replace(job, workdir=own))))
        timed = worker.call(
            "modelforge.compilers.onnxruntime_worker:race",
            {"models": models, "inputs": str(first.inputs), "batch": first.batch, "threads": 1},
            workdir=first.workdir,
            timeout=first.timeout,
            what=f"ONNX Runtime, timing two artifacts for {first.target.tag}",
        )
        return timed["p50_ms"][0], timed["p50_ms"][1]

    def run(self, job: RunJob) -> Ran:
        """Run the artifact in a child process, on one thread.

        Raises:
            BuildError: this machine cannot run it, or ONNX Runtime failed.
        """
        if self.runner(job.target) is None:
            raise BuildError(f"cannot run code for {job.target.tag} here", fix=self.runner_hint(job.target))
        worker.call(
            "modelforge.compilers.onnxruntime_worker:run_model",
            {
                "model": str(_model_beside_its_data(job)),
                "inputs": str(job.inputs),
                "outputs": str(job.outputs),
                "batch": job.batch,
                "threads": 1,
            },
            workdir=job.workdir,
            timeout=job.timeout,
            what=f"ONNX Runtime, running {job.artifact} for {job.target.tag}",
        )
        if not job.outputs.is_file():
            raise BuildError("ONNX Runtime wrote no outputs", where=job.artifact)
        return Ran("device", latency=self._timed(job) if job.timed else {})

    def _timed(self, job: RunJob) -> dict[str, Any]:
        timed = worker.call(
            "modelforge.compilers.onnxruntime_worker:time_batches",
            {"model": str(_model_beside_its_data(job)), "inputs": str(job.inputs), "batches": job.timed, "threads": 1},
            workdir=job.workdir,
            timeout=job.timeout,
            what=f"ONNX Runtime, timing {job.artifact} for {job.target.tag}",
        )
        return {"by_batch": timed["by_batch"], "threads": 1, "rounds": timed["rounds"]}


def _why_no_fp16(precision: str) -> str:
    if precision != "fp16":
        return ""
    return ": ONNX Runtime's CPU kernels compute most operators in fp32, with casts around each"


def _line(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _model_beside_its_data(job: RunJob) -> Path:
    """The artifact as a file that finds its weights: blobs in a store have other names, and links are refused."""
    if len(job.files) == 1:
        return job.files[job.artifact]
    folder = job.workdir / "artifact"
    folder.mkdir(exist_ok=True)
    for name, path in job.files.items():
        shutil.copyfile(path, folder / name)
    return folder / job.artifact
