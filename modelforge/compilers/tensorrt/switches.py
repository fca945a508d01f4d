"""The recipe's ``[target.tensorrt]``: what each option asks for, and which toolchain, version and GPU allow it.

Each limit is a rule with its source. A version that is not known yet (the toolchain is on the device) is checked
when the job gets there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelforge.compilers.protocol import Refusal
from modelforge.compilers.tensorrt.product import MEASURED, Product, parse_version
from modelforge.options import Options
from modelforge.target import CudaArchitecture

_DOCS = "https://docs.nvidia.com/deeplearning/tensorrt"
_COMPATIBILITY = f"{_DOCS}/11.1.0/inference-library/engine-compatibility.html"
_HEADER = "NvInfer.h of TensorRT 11.1, HardwareCompatibilityLevel"
_FLAGS = "NvInfer.h of TensorRT 11.1, BuilderFlag"
_DLA = f"{_DOCS}/11.4.1/inference-library/work-with-dla.html"

JETSON_SM = {72: "Jetson Xavier", 87: "Jetson Orin", 101: "Jetson Thor", 110: "Jetson Thor"}
"""Compute capabilities that only Jetson and DRIVE modules have."""

KNOWN = (
    "workspace_bytes",
    "compute_capabilities",
    "version_compatible",
    "hardware_compatibility",
    "strip_plan",
    "dla_core",
    "builder_optimization_level",
    "timing_cache",
)


@dataclass(frozen=True)
class Switches:
    """The options in the words of the builder.

    Attributes:
        capabilities: compute capabilities without their dot, rising; the target's own is among them.
        hardware: a member of ``HardwareCompatibilityLevel``, or None.
    """

    capabilities: tuple[int, ...]
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware: str | None = None
    strip_plan: bool = False
    dla_core: int | None = None
    optimization_level: int | None = None

    def words(self, product: Product) -> list[str]:
        """As a command line would have them, for the record."""
        said = ["--strongly-typed"]
        if product.names_capabilities:
            said.append("--compute-capability=" + ",".join(f"SM{sm}" for sm in self.capabilities))
        said += [f"--workspace={self.workspace_bytes}"] if self.workspace_bytes is not None else []
        said += ["--version-compatible"] if self.version_compatible else []
        said += [f"--hardware-compatibility={self.hardware}"] if self.hardware else []
        said += ["--strip-plan"] if self.strip_plan else []
        said += [f"--dla-core={self.dla_core}", "--gpu-fallback"] if self.dla_core is not None else []
        said += [f"--optimization-level={self.optimization_level}"] if self.optimization_level is not None else []
        return said


@dataclass(frozen=True)
class Case:
    """What an option is judged against. ``version`` is None where the toolchain is not installed here."""

    product: Product
    version: str | None
    arch: CudaArchitecture
    tag: str
    precision: str
    is_dynamic: bool
    options: Options = field(default_factory=dict)

    def before(self, version: str) -> bool:
        return self.version is not None and parse_version(self.version) < parse_version(version)


_HARDWARE = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


def refusals(case: Case) -> list[Refusal]:
    """Why these options cannot be had here; empty where they can."""
    unknown = sorted(set(case.options) - set(KNOWN))
    if unknown:
        what = f'{case.product.title} has no option "{unknown[0]}"'
        return [Refusal("option", what, f"known: {', '.join(KNOWN)}", "docs/guides/tensorrt.md")]
    found: list[Refusal] = []
    for name, rules in _RULES.items():
        value = case.options.get(name)
        if value is not None and value is not False:  # 0 is the number of a DLA core
            found += [
                Refusal(f"option-{name.replace('_', '-')}", f"{name}: {what}", fix, source)
                for what, fix, source in rules(case)
            ]
    return found


def read(options: Options, arch: CudaArchitecture) -> Switches:
    """The options as switches; they have passed :func:`refusals`."""
    asked = options.get("compute_capabilities")
    level = options.get("hardware_compatibility")
    return Switches(
        capabilities=tuple(sorted({arch.sm, *map(capability, asked or ())})),
        workspace_bytes=options.get("workspace_bytes"),
        version_compatible=bool(options.get("version_compatible")),
        hardware=_HARDWARE[level] if level else None,
        strip_plan=bool(options.get("strip_plan")),
        dla_core=options.get("dla_core"),
        optimization_level=options.get("builder_optimization_level"),
    )


def capability(text: str) -> int:
    """``8.0`` as 80, ``12.0`` as 120.

    Raises:
        ValueError: it is no compute capability.
    """
    major, dot, minor = str(text).partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal() and len(minor) == 1):
        raise ValueError(f'"{text}" is no compute capability')
    return int(major) * 10 + int(minor)


Fault = tuple[str, str, str]
"""What, how to mend it, source."""


def _workspace(case: Case) -> Iterator[Fault]:
    value = case.options["workspace_bytes"]
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        yield f"must be a positive number of bytes, not {value!r}", "give the limit in bytes", "docs/guides/tensorrt.md"


def _capabilities(case: Case) -> Iterator[Fault]:
    fix = 'write them as in NVIDIA\'s table: ["7.5", "8.0"]'
    asked = case.options["compute_capabilities"]
    try:
        wanted = [capability(each) for each in asked]
    except (TypeError, ValueError) as error:
        yield str(error), fix, "docs/guides/tensorrt.md"
        return
    if case.arch.sm not in wanted:
        own = f"{case.arch.sm // 10}.{case.arch.sm % 10}"
        yield f"{case.tag} itself has {own}, which is not among them", f'add "{own}"', "docs/guides/tensorrt.md"
    if not case.product.names_capabilities:
        yield (
            f"{case.product.title} builds for the GPU that it runs on, not for others by name",
            'use hardware_compatibility = "ampere+" or "same-compute-capability", or compiler = "tensorrt-rtx"',
            f"no such call in its bindings (10.3, 10.13, 11.4); {_COMPATIBILITY}",
        )


def _version_compatible(case: Case) -> Iterator[Fault]:
    if not case.product.needs_gpu:
        yield (
            f"{case.product.title} has no lean runtime to build it with",
            "leave it out: such an engine belongs to one version of the runtime",
            f"libnvinfer_lean.so.1 is missing, {MEASURED}",
        )
    elif case.arch.sm < 70:
        yield "needs compute capability 7.0 or newer", "leave it out", _FLAGS


def _hardware(case: Case) -> Iterator[Fault]:
    level = case.options["hardware_compatibility"]
    if level not in _HARDWARE:
        yield f'"{level}" is no level', f"one of {', '.join(_HARDWARE)}", _HEADER
    elif not case.product.needs_gpu:
        yield (
            f"{case.product.title} ignores it, with a warning",
            'list what the engine is for instead: compute_capabilities = ["8.0", "8.9"]',
            f"setHardwareCompatibilityLevel is unsupported, {MEASURED}",
        )
    elif level == "ampere+":
        if case.arch.sm < 80:
            own = f"{case.arch.sm // 10}.{case.arch.sm % 10}"
            yield f"needs a GPU of 8.0 or newer to build on, {case.tag} has {own}", "leave it out", _HEADER
        if case.arch.sm in JETSON_SM:
            yield f"is not for JetPack, and {case.tag} is a {JETSON_SM[case.arch.sm]}", "leave it out", _COMPATIBILITY
    elif case.arch.sm < 75:
        yield "needs compute capability 7.5 or newer", "leave it out", _HEADER
    elif case.before("10.13"):
        yield (
            f"TensorRT {case.version} does not have this level; 10.13 has",
            "leave it out, or install a newer TensorRT",
            "the bindings of 10.3.0 and 10.13.3.9",
        )


def _strip_plan(case: Case) -> Iterator[Fault]:
    if not case.product.needs_gpu:
        yield (
            f"{case.product.title} needs a GPU to build such an engine, and we build without",
            "leave it out",
            f"graph_jit.cpp: CHECK(status == CUDA_SUCCESS), for every compute capability, {MEASURED}",
        )


def _dla(case: Case) -> Iterator[Fault]:
    core = case.options["dla_core"]
    if isinstance(core, bool) or not isinstance(core, int) or core < 0:
        yield f"must be the number of a core, 0 or 1, not {core!r}", "give 0 or 1", _DLA
    if not case.product.needs_gpu:
        yield (
            f"{case.product.title} ignores it without a word",
            'compiler = "tensorrt"',
            f"default_device_type = DLA had no effect, {MEASURED}",
        )
        return
    if not case.arch.dla:
        yield f"{case.tag} has no DLA", "leave it out", f"the profile {case.tag}.toml; {_DLA}"
    if case.precision not in ("fp16", "int8"):
        yield f"a DLA computes in FP16 and INT8, not in {case.precision}", 'precision = ["int8", "fp16"]', _DLA
    if case.is_dynamic:
        yield (
            "a DLA takes no dynamic dimension: every layer would fall back to the GPU",
            "give the inputs fixed sizes",
            "what TensorRT logs, github.com/onnx/tensorflow-onnx/issues/1632",
        )
    yield from _dla_version(case)


def _dla_version(case: Case) -> Iterator[Fault]:
    if case.version is None or not case.before("11.4.1"):
        return
    if not case.before("10.8"):
        yield (
            f"TensorRT {case.version} has no DLA: 10.7 was the last before 11.4.1, which has it again",
            "JetPack 6 with TensorRT 10.7 or older, or JetPack 7.2.2 with TensorRT 11.4.1",
            _DLA,
        )
    elif case.precision == "int8":
        yield (
            f"the DLA of TensorRT {case.version} takes no Q/DQ, which is how INT8 is written here",
            'precision = ["fp16"], or JetPack 7.2.2 with TensorRT 11.4.1',
            "https://developer.nvidia.cn/blog/tensorrt-deep-learning-accelerator-cn",
        )


def _optimization_level(case: Case) -> Iterator[Fault]:
    level = case.options["builder_optimization_level"]
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= 5:
        yield f"must be a whole number from 0 to 5, not {level!r}", "3 is the default", f"{_DOCS}, IBuilderConfig"


def _timing_cache(case: Case) -> Iterator[Fault]:
    path = case.options["timing_cache"]
    if not isinstance(path, str) or not path:
        yield f"must be the path of a file, not {path!r}", "name what `finalize` left in its bundle", "NvInfer.h"
    if not case.product.times_tactics:
        yield (
            f"{case.product.title} measures nothing as it builds",
            'compiler = "tensorrt"',
            f"{_NO_TIMING}, {MEASURED}",
        )


_NO_TIMING = "the documentation of TensorRT-RTX 1.7 (timing caches have no effect)"

_RULES: Mapping[str, Any] = {
    "workspace_bytes": _workspace,
    "compute_capabilities": _capabilities,
    "version_compatible": _version_compatible,
    "hardware_compatibility": _hardware,
    "strip_plan": _strip_plan,
    "dla_core": _dla,
    "builder_optimization_level": _optimization_level,
    "timing_cache": _timing_cache,
}
