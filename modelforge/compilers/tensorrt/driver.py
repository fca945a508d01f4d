"""TensorRT and TensorRT-RTX behind one driver: strongly typed networks, precision as the ONNX says it.

Knows what the builders can have and how to ask for it; NVIDIA's code is loaded in child processes only
(:mod:`~modelforge.compilers.tensorrt.worker`, :mod:`~modelforge.compilers.tensorrt.running`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain, Wanted
from modelforge.compilers.tensorrt import building, device, preflight, switches
from modelforge.compilers.tensorrt.device import dotted
from modelforge.compilers.tensorrt.facts import FILE_NAME, WEIGHTS, read_facts, write_facts
from modelforge.compilers.tensorrt.installation import Absent, call, find, locate, require
from modelforge.compilers.tensorrt.product import TENSORRT, TENSORRT_RTX, Product, is_tested
from modelforge.compilers.tensorrt.profiles import profiles
from modelforge.errors import BuildError, ToolchainMissing, UnsupportedError
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.target import CudaArchitecture, Target

ARTIFACT = "main.engine"
LAYERS = "layers.json"
NOTE_NOT_RUN = "built without a GPU; compute-capability compatible, not run on one"

# Compute capabilities that the builder of TensorRT-RTX takes and NVIDIA's support matrix does not list.
_UNLISTED_SM = frozenset({80})


class _Driver:
    """Builds and runs ``main.engine``; one for both products, whose differences are rows of ``product.py``.

    Engines are not reproducible: two builds from the same bytes differ in some bytes, across processes even in size
    (measured on TensorRT-RTX 1.7.1). So a digest names one engine, and "the same inputs" is what the content key says,
    not the engine's digest. Engines keep the model's layer names.
    """

    section = "tensorrt"
    code_version = "3"
    product: Product

    @property
    def name(self) -> str:
        return self.product.name

    @property
    def title(self) -> str:
        return self.product.title

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        """Say which version is installed. Classic TensorRT is missing where there is no GPU, or none like the target's:
        it builds on that only."""
        product = self.product
        installed = locate(product)
        if isinstance(installed, Absent):
            return Missing(installed.reason, installed.fix)
        reason = self._why_no_gpu(target)
        if reason is not None:
            fix = "build with --allow-deferred, then `modelforge finalize BUNDLE --target TAG` on the device"
            return Missing(f"{product.title} {installed.version} is here, and builds on the GPU only: {reason}", fix)
        warnings = []
        if not is_tested(product, installed.version):
            lines = " and ".join(product.tested)
            warnings.append(f"{product.title} {installed.version} is untested; {lines} are known to work")
        if installed.python is not None:
            warnings.append(f"{product.title} runs in {installed.python}, as {product.python_variable} says")
        return Toolchain({product.module: installed.version, **installed.versions}, tuple(warnings))

    def _why_no_gpu(self, target: Target | None) -> str | None:
        if not self.product.needs_gpu:
            return None
        if target is not None:
            return device.why_not(target)
        return None if device.gpus() else "no NVIDIA GPU is here"

    def dialect(self, target: Target) -> str:
        del target
        return "tensorrt"

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        """Say what is known to fail: options, precision, and what the preflight knows of each compute capability."""
        if not isinstance(target.arch, CudaArchitecture):
            return [Refusal("architecture", f"{target.tag} is no NVIDIA GPU", "choose another compiler")]
        if precision not in target.precisions:
            return [_refuse_precision(target, precision)]
        installed = find(self.product)
        version = installed.version if installed else None
        refusals = self._refuse_options(options, target, precision, inputs, version)
        if refusals:
            return refusals
        try:
            profiles(inputs, dims)
        except UnsupportedError as error:
            return [Refusal("profiles", str(error.what), error.fix or "", "docs/guides/tensorrt.md")]
        found: dict[str, Refusal] = {}
        for sm in switches.read(options, target.arch).capabilities:
            for refusal in preflight.refusals(facts, sm, precision, inputs, dims, self.name):
                found.setdefault(refusal.what, refusal)
        return list(found.values())

    def supports_recipe(self, wanted: Wanted) -> list[Refusal]:
        """Say which sizes under [dims] contradict the model, or each other."""
        if not isinstance(wanted.target.arch, CudaArchitecture):
            return []
        from modelforge.compilers.tensorrt import preflight_sizes  # needs onnx, which a deployer's install has not

        found = preflight_sizes.one_symbol_two_sizes(wanted.facts, wanted.inputs, wanted.dims)
        if found or wanted.model is None:
            return found
        return preflight_sizes.contradictions(wanted.model, wanted.inputs, wanted.dims)

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        """Say what the preflight knows of the model's own nodes that no lowering mends."""
        if not isinstance(target.arch, CudaArchitecture):
            return []
        found: dict[str, Refusal] = {}
        for sm in switches.read(options, target.arch).capabilities:
            for refusal in preflight.check_source(model, sm, self.name):
                found.setdefault(refusal.what, refusal)
        return list(found.values())

    def compile(self, job: CompileJob) -> Compiled:
        """Build the engine in a child process, then check the file that it left.

        ``job.options`` is the recipe's ``[target.tensorrt]``; docs/guides/tensorrt.md says what each does.

        Raises:
            BuildError: the builder failed, crashed, ran out of time or left no whole engine.
            UnsupportedError: it cannot have this model or these options for this GPU.
            ToolchainMissing: it is not installed here, or builds only on a GPU that is not here.
        """
        asked = self._switches(job)
        ranges = profiles(job.inputs, job.dims)
        installed = require(self.product)
        gpu = device.fitting(job.target)
        if self.product.needs_gpu and gpu is None:
            raise ToolchainMissing(
                f"{self.title} {installed.version} cannot build here: {device.why_not(job.target)}",
                fix=f"run `modelforge finalize BUNDLE --target {job.target.tag}` on such a device",
            )
        preflight.require(job.model, asked.capabilities, self.name)
        from modelforge.compilers.tensorrt import preflight_sizes  # needs onnx, which a deployer's install has not

        if contradicted := preflight_sizes.contradictions(job.model, job.inputs, job.dims):
            raise UnsupportedError(contradicted[0].what, where=job.target.tag, fix=contradicted[0].fix)
        built = building.build(job, self.product, installed, asked, ranges, gpu)
        engine = job.workdir / ARTIFACT
        facts = write_facts(job.workdir, engine, self.product, built.version, asked, ranges)
        files = {ARTIFACT: engine, FILE_NAME: facts}
        if (timing := job.workdir / building.TIMING_CACHE).is_file():
            files[timing.name] = timing
        if asked.strip_plan:
            files[WEIGHTS] = building.copy_weights(job.model, job.workdir / WEIGHTS)
        return Compiled(
            artifact=ARTIFACT,
            files=files,
            commands=(building.command(self.product, asked, ranges),),
            requires=_requires(self.product, asked, built),
            needs=_needs(self.product, asked, built),
            notes=_notes(self.product, asked, job.dims, built),
            report={**built.report, "engine_bytes": engine.stat().st_size, "profiles": ranges},
        )

    def runner(self, target: Target) -> str | None:
        """``device`` where this product and a GPU of the target's compute capability are here."""
        return "device" if find(self.product) is not None and device.fitting(target) is not None else None

    def runner_hint(self, target: Target) -> str:
        if not isinstance(target.arch, CudaArchitecture) or self.runner(target) is not None:
            return ""
        capability = f"compute capability {dotted(target.arch.sm)} with {self.title.removeprefix('NVIDIA ')}"
        return f"engines are not run here: run `modelforge verify` on a GPU of {capability}"

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """Both on the GPU in one child process, round by round, transfers left out; None where no such GPU is here."""
        if self.runner(first.target) is None:
            return None
        timed = call(
            require(self.product),
            "modelforge.compilers.tensorrt.running:race",
            {
                "engines": [self._loading(first), self._loading(second)],
                "inputs": str(first.inputs),
                "batch": first.batch,
            },
            workdir=first.workdir,
            timeout=first.timeout,
            what=f"{self.title}, timing two engines for {first.target.tag}",
            env=device.environment(),
        )
        return timed["p50_ms"][0], timed["p50_ms"][1]

    def run(self, job: RunJob) -> Ran:
        """Run and time the engine on the GPU, in a child process that loads it only if its digest is the recorded one.

        ``layers.json`` among its files holds the time of each layer, at the largest batch that was timed.

        Raises:
            IntegrityError: the engine is not the one that was built.
            BuildError: there is no such GPU here, or the engine failed on it.
        """
        if self.runner(job.target) is None:
            raise BuildError("an engine cannot be run here", where=job.artifact, fix=self.runner_hint(job.target))
        facts, _ = read_facts(job.files, job.artifact)
        layers = job.workdir / LAYERS
        ran = call(
            require(self.product),
            "modelforge.compilers.tensorrt.running:run",
            {
                **self._loading(job),
                "inputs": str(job.inputs),
                "outputs": str(job.outputs),
                "batch": job.batch,
                "gears": list(facts.gears()) or [job.batch],
                "layers": str(layers),
            },
            workdir=job.workdir,
            timeout=job.timeout,
            what=f"{self.title}, running on the GPU for {job.target.tag}",
            env=device.environment(),
        )
        note = f"ran on {ran['gpu']['name']}, driver for CUDA {ran['gpu']['driver']}"
        return Ran("device", (note,), _latency(ran, job), {LAYERS: layers})

    def _loading(self, job: RunJob) -> dict[str, Any]:
        """What the child needs to load the engine of a job."""
        facts, _ = read_facts(job.files, job.artifact)
        arch = job.target.arch
        return {
            "product": self.name,
            "folder": str(require(self.product).folder),
            "engine": str(job.files[job.artifact]),
            "digest": facts.digest,
            "version": facts.version,
            "version_compatible": facts.version_compatible,
            "sm": arch.sm if isinstance(arch, CudaArchitecture) else 0,
            "weights": str(job.files[facts.weights]) if facts.weights else None,
            "profiles": list(facts.profiles),
        }

    def _switches(self, job: CompileJob) -> switches.Switches:
        if not isinstance(job.target.arch, CudaArchitecture):
            raise UnsupportedError(f"{self.title} cannot build for {job.target.tag}", where=str(job.target.path))
        installed = find(self.product)
        version = installed.version if installed else None
        refused = self._refuse_options(job.options, job.target, job.precision, job.inputs, version)
        refused += self._refuse_capabilities(job)
        if refused:
            raise UnsupportedError(refused[0].what, where=job.target.tag, fix=refused[0].fix)
        return switches.read(job.options, job.target.arch)

    def _refuse_capabilities(self, job: CompileJob) -> list[Refusal]:
        arch = job.target.arch
        if not self.product.names_capabilities or not isinstance(arch, CudaArchitecture):
            return []
        unknown = sorted({arch.sm} - preflight.SUPPORTED_SM)
        what = f"{self.title} cannot build for {job.target.tag}: it has no compute capability {dotted(arch.sm)}"
        return [Refusal("compute-capability", what, 'compiler = "tensorrt"')] if unknown else []

    def _refuse_options(
        self,
        options: Options,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        version: str | None,
    ) -> list[Refusal]:
        assert isinstance(target.arch, CudaArchitecture)
        is_dynamic = any(isinstance(size, str) for shape in inputs.values() for size in shape)
        case = switches.Case(self.product, version, target.arch, target.tag, precision, is_dynamic, options)
        return switches.refusals(case)


class TensorRtCompiler(_Driver):
    """Classic TensorRT: builds on the target's own GPU, so mostly on the device (``modelforge finalize``)."""

    product = TENSORRT


class TensorRtRtxCompiler(_Driver):
    """TensorRT-RTX: engines built ahead of time, for named compute capabilities, on a machine that needs no GPU."""

    product = TENSORRT_RTX


def _refuse_precision(target: Target, precision: str) -> Refusal:
    return Refusal(
        rule="precision",
        what=f"{target.tag} has no {precision}",
        fix=f"choose from {', '.join(target.precisions)}",
        source=f"the profile {target.tag}.toml",
    )


def _latency(ran: Mapping[str, Any], job: RunJob) -> dict[str, Any]:
    """The record's latency: the figures of the batch that was asked for (else of the smallest) stand on top."""
    timed = ran["latency"]
    chosen = next((each for each in timed if each["batch"] == job.batch), timed[0])
    return {
        **{key: chosen[key] for key in ("p50_ms", "p90_ms", "p99_ms", "batch")},
        "clock": "CUDA events, without transfers",
        "batches": timed,
        "gpu": ran["gpu"]["name"],
        "device_memory_bytes": ran["device_memory_bytes"],
        "slowest_layers": ran["slowest_layers"],
    }


_HARDWARE_WORDS = {
    "AMPERE_PLUS": "of compute capability 8.0 or newer",
    "SAME_COMPUTE_CAPABILITY": "of the same compute capability",
}


def _gpu_words(asked: switches.Switches) -> str:
    capabilities = " or ".join(dotted(sm) for sm in asked.capabilities)
    words = _HARDWARE_WORDS.get(asked.hardware or "")
    if words is None:
        return f"of compute capability {capabilities}"
    return f"{words} ({capabilities})" if asked.hardware == "SAME_COMPUTE_CAPABILITY" else words


def _requires(product: Product, asked: switches.Switches, built: building.Built) -> str:
    other = "not TensorRT-RTX" if product is TENSORRT else "not classic TensorRT"
    version = f"{built.header.version_text} or newer" if asked.version_compatible else built.header.version_text
    same = "" if product is TENSORRT_RTX or asked.hardware else ", the same model as it was built on"
    return (
        f"{product.title} runtime {version} (built by {built.version}; {other}), "
        f"an NVIDIA GPU {_gpu_words(asked)}{same}, and its driver"
    )


def _needs(product: Product, asked: switches.Switches, built: building.Built) -> dict[str, Any]:
    sign = ">=" if asked.version_compatible else "=="
    sm: Any = list(asked.capabilities) if len(asked.capabilities) > 1 else asked.capabilities[0]
    return {
        product.module: f"{sign}{built.header.version_text}",
        "sm": ">=80" if asked.hardware == "AMPERE_PLUS" else sm,
    }


def _notes(
    product: Product, asked: switches.Switches, dims: Mapping[str, Dim], built: building.Built
) -> tuple[str, ...]:
    notes = ["the engine is not reproducible byte for byte; its inputs are what the content key names"]
    notes.append(f"built on {built.gpu}" if built.gpu else NOTE_NOT_RUN)
    if product is TENSORRT_RTX:
        notes += [
            f"compute capability {dotted(sm)} is accepted by the builder, but not in NVIDIA's support matrix"
            for sm in asked.capabilities
            if sm in _UNLISTED_SM
        ]
    if len(asked.capabilities) > 1:
        notes.append(f"one engine for compute capabilities {', '.join(map(dotted, asked.capabilities))}")
    if asked.version_compatible:
        notes.append("version compatible: slower than an engine for one version, and it carries host code")
    if asked.hardware:
        notes.append(f"hardware compatibility {asked.hardware}: slower than an engine for one GPU")
    if asked.strip_plan:
        notes.append(f"holds no weights: they are put in from {WEIGHTS} as it is loaded")
    if built.report["dla"]:
        on_gpu = built.report["dla"]["on_gpu"]
        notes.append(f"DLA core {asked.dla_core}: {built.report['dla']['layers']} layers, {len(on_gpu)} on the GPU")
    for symbol, dim in sorted(dims.items()):
        if dim.values and len(dim.values) > 1:
            notes.append(f"{symbol}: an optimisation profile each for {', '.join(map(str, dim.values))}")
    return tuple(notes)


__all__ = ["ARTIFACT", "NOTE_NOT_RUN", "TensorRtCompiler", "TensorRtRtxCompiler"]
