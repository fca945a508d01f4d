"""TensorRT-RTX: engines built ahead of time for one compute capability, on a machine that needs no GPU.

Knows what the builder can have and how to ask for it; NVIDIA's code is loaded in a child process only
(:mod:`modelforge.compilers.tensorrt_rtx_worker`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from modelforge.compilers.engine_header import read_header
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain
from modelforge.errors import BuildError, IntegrityError, UnsupportedError
from modelforge.graph.facts import ModelFacts
from modelforge.recipe import Dim
from modelforge.target import CudaArchitecture, Target
from modelforge.toolchains import worker

SUPPORTED_SM = frozenset({75, 80, 86, 89, 120, 121})
"""The members of ``ComputeCapability`` in 1.7.1 (a test asks the installed one)."""

FP32_GEMM_OPS = ("MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN")
"""Operators that become FP32 matrix products at fp32; the builder refuses each for SM75 (measured on 1.7.1)."""

NOTE_NOT_RUN = "built without a GPU; compute-capability compatible, not run on one"

_DISTRIBUTIONS = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12")
_DOCS = "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html"
_MEASURED = "measured on TensorRT-RTX 1.7.1.116"
_OPTIONS = ("workspace_bytes",)

# GPUs that people ask for and that this product leaves out -> what they are.
_LEFT_OUT = {
    70: "V100",
    72: "Jetson Xavier",
    87: "Jetson Orin",
    90: "H100 and H200",
    100: "B200",
    101: "Jetson Thor",
    103: "B300",
    110: "Jetson Thor",
}

# Smallest compute capability with a data type (support matrix). What is absent here every listed GPU has.
_DTYPE_SINCE = {"bfloat16": 80, "float8_e4m3fn": 89, "float4_e2m1fn": 120}

# What the parser takes as a graph input or output as it stands. float64 is not among them: it parses, and silently
# becomes FP32, so that the caller's buffers would have the wrong size.
_DTYPES = frozenset({"float32", "float16", "int64", "int32", "int8", "uint8", "bool", *_DTYPE_SINCE})

# Compute capabilities that the builder takes and NVIDIA's support matrix does not list.
_UNLISTED_SM = frozenset({80})


class TensorRtRtxCompiler:
    """Builds ``main.engine`` with TensorRT-RTX 1.7.

    The network is strongly typed (precision is what the ONNX says) and the compute capability always explicit. One
    optimisation profile spans ``min``, ``opt`` and ``max`` of every symbol.

    Engines are not reproducible: two builds from the same bytes differ in some bytes, across processes even in size
    (measured on 1.7.1). So a digest names one engine, and "the same inputs" is what the content key says, not the
    engine's digest. Engines keep the model's layer names.
    """

    name = "tensorrt-rtx"
    title = "NVIDIA TensorRT-RTX"
    code_version = "1"

    def probe(self) -> Toolchain | Missing:
        """Say which TensorRT-RTX is installed, from package metadata."""
        fix = "pip install 'modelforge[tensorrt-rtx]'"
        version = _installed_version()
        if version is None:
            return Missing(f"none of {', '.join(_DISTRIBUTIONS)} is installed", fix)
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return Missing("its package is here without the module tensorrt_rtx", f"{fix} --force-reinstall")
        untested = () if version.startswith("1.7.") else (f"TensorRT-RTX {version} is untested; 1.7 is known to work",)
        return Toolchain({"tensorrt_rtx": version}, warnings=untested)

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
    ) -> list[Refusal]:
        """Say what is known to fail: compute capability, data types, operators without a parser, FP32 on SM75."""
        arch = target.arch
        if not isinstance(arch, CudaArchitecture):
            return [Refusal("architecture", f"{target.tag} is no NVIDIA GPU", "choose another compiler")]
        if arch.sm not in SUPPORTED_SM:
            return [_refuse_capability(arch.sm)]
        refusals = _refuse_dtypes(facts, arch.sm)
        refusals += _refuse_operators(facts)
        if precision not in target.precisions:
            refusals.append(_refuse_precision(target, precision))
        if arch.sm == 75 and precision == "fp32":
            refusals += _refuse_fp32_products(facts)
        return refusals

    def compile(self, job: CompileJob) -> Compiled:
        """Build the engine in a child process, then check the file that it left.

        ``job.options`` may hold ``workspace_bytes``, the most scratch memory that the builder may plan for.

        Raises:
            BuildError: the builder failed, crashed, ran out of time or left no whole engine.
            UnsupportedError: it says that it cannot have this model for this GPU.
        """
        arch = job.target.arch
        if not isinstance(arch, CudaArchitecture) or arch.sm not in SUPPORTED_SM:
            raise UnsupportedError(f"TensorRT-RTX cannot build for {job.target.tag}", where=str(job.target.path))
        workspace = _workspace(job.options)
        profile = _profile(job.inputs, job.dims)
        engine = job.workdir / "main.engine"
        built = worker.call(
            "modelforge.compilers.tensorrt_rtx_worker:build",
            {
                "model": str(job.model),
                "engine": str(engine),
                "sm": arch.sm,
                "profile": profile,
                "workspace_bytes": workspace,
            },
            workdir=job.workdir,
            timeout=job.timeout,
            what=f"TensorRT-RTX, building for {job.target.tag}",
        )
        try:
            header = read_header(engine, version=built["version"])
        except IntegrityError as error:
            raise BuildError(f"TensorRT-RTX left no whole engine: {error.what}", fix=error.fix) from error
        return Compiled(
            artifact=engine.name,
            files={engine.name: engine},
            commands=(_command(arch.sm, profile, workspace),),
            requires=_requires(arch.sm, header.version_text),
            notes=_notes(arch.sm, job.dims),
            report={
                "engine_version": header.version_text,
                "layers": built["layers"],
                "inputs": built["inputs"],
                "outputs": built["outputs"],
                "warnings": built["warnings"],
            },
        )

    def runner(self, target: Target) -> str | None:
        """None: ModelForge has no way yet to run an engine, with a GPU or without."""
        return None

    def runner_hint(self, target: Target) -> str:
        capability = _dotted(target.arch.sm) if isinstance(target.arch, CudaArchitecture) else "that fits"
        return (
            f"run on a GPU of compute capability {capability} with TensorRT-RTX 1.7: "
            "needs `modelforge finalize` / verify on the device, not built yet"
        )

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """Not timed in this version."""
        del first, second
        return None

    def run(self, job: RunJob) -> Ran:
        """Always refused; see :meth:`runner`."""
        raise BuildError("an engine cannot be run here", where=job.artifact, fix=self.runner_hint(job.target))


def parsed_operators() -> frozenset[str]:
    """The operators of the standard domain that the parser of 1.7 knows (data; a test asks the installed parser)."""
    text = files("modelforge.compilers").joinpath("tensorrt_rtx_operators.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def _installed_version() -> str | None:
    for distribution in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _dotted(sm: int) -> str:
    """75 as 7.5, 120 as 12.0."""
    return f"{sm // 10}.{sm % 10}"


def _refuse_capability(sm: int) -> Refusal:
    known = ", ".join(_dotted(supported) for supported in sorted(SUPPORTED_SM))
    gpu = f" ({_LEFT_OUT[sm]})" if sm in _LEFT_OUT else ""
    return Refusal(
        rule="compute-capability",
        what=f"TensorRT-RTX 1.7 has no compute capability {_dotted(sm)}{gpu}; it has {known}",
        fix='compile with classic TensorRT on the device: compiler = "tensorrt"',
        source=f"ComputeCapability enum, {_MEASURED}; {_DOCS}",
    )


def _refuse_precision(target: Target, precision: str) -> Refusal:
    return Refusal(
        rule="precision",
        what=f"{target.tag} has no {precision}",
        fix=f"choose from {', '.join(target.precisions)}",
        source=f"the profile {target.tag}.toml",
    )


def _refuse_dtypes(facts: ModelFacts, sm: int) -> list[Refusal]:
    refusals = []
    for kind, tensors in (("input", facts.inputs), ("output", facts.outputs)):
        for tensor in tensors:
            since = _DTYPE_SINCE.get(tensor.dtype, 0)
            if tensor.dtype not in _DTYPES:
                why = f"TensorRT-RTX takes no {tensor.dtype}"
                fix = "cast inside the client, and let the model take float32, float16, int32 or int64"
            elif sm < since:
                why = f"{tensor.dtype} needs compute capability {_dotted(since)}, the target has {_dotted(sm)}"
                fix = "use float16"
            else:
                continue
            refusals.append(Refusal("dtype", f"{kind} {tensor.name}: {why}", fix, f"{_MEASURED}; {_DOCS}"))
    return refusals


def _refuse_operators(facts: ModelFacts) -> list[Refusal]:
    parsed = parsed_operators()
    refusals = []
    for op in facts.ops:
        if op.domain not in ("", "ai.onnx"):
            # The parser ignores the domain: acme.Relu would become ONNX's Relu without a word.
            refusals.append(
                Refusal(
                    rule="domain",
                    what=f"node {op.example}: {op.domain}::{op.op} is of a domain that the parser does not tell apart",
                    fix="export the model with standard ONNX operators",
                    source=_MEASURED,
                )
            )
        elif op.op == "If":
            refusals.append(
                Refusal(
                    rule="control-flow",
                    what=f"node {op.example}: models with If end in an internal assertion of the builder",
                    fix="export the branch that is used, without If",
                    source=f"silero_vad, {_MEASURED}",
                )
            )
        elif op.op not in parsed:
            refusals.append(
                Refusal(
                    rule="operator",
                    what=f"node {op.example}: the parser has no {op.op}",
                    fix="export the model without it, or split the model there",
                    source=f"OnnxParser.supports_operator, {_MEASURED}",
                )
            )
    return refusals


def _refuse_fp32_products(facts: ModelFacts) -> list[Refusal]:
    return [
        Refusal(
            rule="sm75-fp32-gemm",
            what=f"node {op.example}: {op.op} in FP32 cannot be built for compute capability 7.5",
            fix='give the ladder ["int8", "fp16"] or ["fp16"]',
            source=f"{_MEASURED}; footnote of {_DOCS}; github.com/pytorch/TensorRT/issues/4546",
        )
        for op in facts.ops
        if op.op in FP32_GEMM_OPS
    ]


def _workspace(options: Mapping[str, Any]) -> int | None:
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise UnsupportedError(f'TensorRT-RTX has no option "{unknown[0]}"', fix=f"known: {', '.join(_OPTIONS)}")
    value = options.get("workspace_bytes")
    if value is not None and (not isinstance(value, int) or value <= 0):
        raise UnsupportedError(f"workspace_bytes must be a positive number of bytes, not {value!r}")
    return value


def _profile(inputs: Mapping[str, tuple[int | str, ...]], dims: Mapping[str, Dim]) -> dict[str, list[list[int]]]:
    """By input name: its smallest, usual and largest shape."""

    def at(shape: tuple[int | str, ...], size: str) -> list[int]:
        return [int(getattr(dims[part], size)) if isinstance(part, str) else part for part in shape]

    return {
        name: [at(shape, size) for size in ("smallest", "usual", "largest")] for name, shape in sorted(inputs.items())
    }


def _command(sm: int, profile: dict[str, list[list[int]]], workspace: int | None) -> tuple[str, ...]:
    words = ["tensorrt_rtx.Builder", "--strongly-typed", f"--compute-capability=SM{sm}"]
    for name, shapes in profile.items():
        spelled = ",".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
        words.append(f"--profile={name}:{spelled}")
    if workspace is not None:
        words.append(f"--workspace={workspace}")
    return tuple(words)


def _requires(sm: int, version: str) -> str:
    line = ".".join(version.split(".")[:2])
    return (
        f"TensorRT-RTX runtime {line}.x (built by {version}; not classic TensorRT), "
        f"an NVIDIA GPU of compute capability {_dotted(sm)}, and its driver"
    )


def _notes(sm: int, dims: Mapping[str, Dim]) -> tuple[str, ...]:
    notes = [NOTE_NOT_RUN, "the engine is not reproducible byte for byte; its inputs are what the content key names"]
    if sm in _UNLISTED_SM:
        notes.append(f"compute capability {_dotted(sm)} is accepted by the builder, but not in NVIDIA's support matrix")
    for symbol, dim in sorted(dims.items()):
        if dim.values and len(dim.values) > 1:
            notes.append(
                f"{symbol}: one optimisation profile from {dim.smallest} to {dim.largest}, optimised for {dim.usual}; "
                "the sizes between have no profile of their own"
            )
    return tuple(notes)
