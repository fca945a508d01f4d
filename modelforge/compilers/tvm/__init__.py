"""TVM: native code for CPUs, x86-64 and aarch64, cross-compiled, with its own small runner.

Imports nothing heavy: TVM is seen only by ``api.py``, in a child process.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Ran, Refusal, RunJob, Toolchain, Tuned
from modelforge.compilers.tvm import preflight, run, runtime, tuner
from modelforge.compilers.tvm.signature import FILE_NAME
from modelforge.errors import BuildError, ToolchainMissing, UnsupportedError
from modelforge.graph.facts import ModelFacts
from modelforge.options import NO_OPTIONS, Options
from modelforge.recipe import Dim
from modelforge.store import Store
from modelforge.target import CpuArchitecture, Target
from modelforge.toolchains import linker
from modelforge.toolchains import worker as child  # not `worker`: a module of this package has that name

ARTIFACT = "main.so"
_TRIPLE = {"x86-64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
# ELF's e_machine (System V ABI, gABI chapter 4): bytes 18 and 19, little endian.
_ELF_MACHINE = {"x86-64": 62, "aarch64": 183}


@dataclass(frozen=True)
class TvmCompiler:
    """Apache TVM behind :class:`modelforge.compilers.protocol.Compiler`."""

    name: str = "tvm"
    title: str = "Apache TVM"
    section: str | None = "tune"
    code_version: str = "6"

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        del target  # what it builds for one, it builds for all
        try:
            pair = runtime.installed_pair()
        except ToolchainMissing as error:
            return Missing(reason=error.what, fix=error.fix or "")
        linkers = {isa: tool.name for isa in _TRIPLE if (tool := linker.find(isa)) is not None}
        versions = {**pair, **{f"linker-{isa}": name for isa, name in linkers.items()}}
        return Toolchain(versions=versions, warnings=tuple(_warnings(pair, linkers)))

    def dialect(self, target: Target) -> str:
        del target
        return "tvm"

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = NO_OPTIONS,
    ) -> list[Refusal]:
        return [*preflight.refusals(facts, target, precision, inputs, dims), *tuner.refusals(target, options)]

    def supports_model(self, model: Path, target: Target, options: Options = NO_OPTIONS) -> list[Refusal]:
        del target, options
        from modelforge.compilers.tvm import preflight_nodes  # needs onnx, which a deployer's install has not

        return preflight_nodes.refusals(model)

    def tuned_on(self, options: Options) -> str:
        return tuner.place(options)

    def tune(self, job: CompileJob) -> Tuned:
        rules = f"{self.code_version}, TVM {runtime.installed_pair()['apache-tvm']}"
        return tuner.tune(job, _request(job, _architecture(job)), rules, Store())

    def compile(self, job: CompileJob) -> Compiled:
        arch = _architecture(job)
        request = _request(job, arch)
        tuning = tuner.given(job.options)
        if tuning is not None:
            request["choices"] = tuning.choices
        answer = child.call(
            "modelforge.compilers.tvm.worker:compile_model",
            request,
            workdir=job.workdir,
            timeout=job.timeout,
            what=f"TVM, compiling for {job.target.tag}",
        )
        library, link_command = _link(arch.isa, answer, job.workdir / "link")
        device = runtime.device_files(arch.isa, Store(), job.workdir / "device")
        return Compiled(
            artifact=ARTIFACT,
            files={ARTIFACT: library, **device.files, **tuner.files(job.options)},
            commands=(_compile_command(request), link_command, *device.commands),
            requires=_requires(arch),
            needs={"glibc": f">={linker.GLIBC}", "glibcxx": f">={GLIBCXX}"},
            notes=(*_notes(job.precision), *tuner.notes(tuning, answer["applied"])),
            report={
                "signature": answer["signature"],
                "kernels": answer["kernels"],
                "entries": request["batches"],
            },
        )

    def runner(self, target: Target) -> str | None:
        where = run.place(target)
        return where.evidence if where else None

    def runner_hint(self, target: Target) -> str:
        return run.hint(target)

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        return run.race(first, second)

    def run(self, job: RunJob) -> Ran:
        return run.run(job)


def _architecture(job: CompileJob) -> CpuArchitecture:
    if not isinstance(job.target.arch, CpuArchitecture):
        raise UnsupportedError(f"TVM compiles for CPUs here, {job.target.tag} is none")
    return job.target.arch


def _request(job: CompileJob, arch: CpuArchitecture) -> dict[str, Any]:
    """What the child process is asked."""
    return {
        "model": str(job.model),
        "folder": str(job.workdir / "tvm"),
        "inputs": {name: list(shape) for name, shape in job.inputs.items()},
        "symbol": preflight.batch_symbol(job.inputs),
        "batches": list(preflight.gears(job.dims, job.inputs)),
        "machine": _machine(arch),
    }


def _warnings(pair: Mapping[str, str], linkers: Mapping[str, str]) -> list[str]:
    found = []
    pinned = {"apache-tvm": runtime.TVM_VERSION, "apache-tvm-ffi": runtime.FFI_VERSION}
    if dict(pair) != pinned:
        here = " with ".join(f"{package} {version}" for package, version in pair.items())
        wanted = " ".join(f"{package}=={version}" for package, version in pinned.items())
        found.append(f"{here} is not the pair that was tested; others crash: pip install {wanted}")
    found += [
        f"nothing here links for {isa}: pip install 'modelforge[build]' (it brings ziglang)"
        for isa in _TRIPLE
        if isa not in linkers
    ]
    if any(not name.startswith("ziglang") for name in linkers.values()):
        found.append(
            "linked with this machine's own compiler: other machines may give other bytes; pip install ziglang"
        )
    return found


def _machine(arch: CpuArchitecture) -> dict[str, Any]:
    return {
        "triple": _TRIPLE[arch.isa],
        "mcpu": arch.mcpu,
        "mattr": [*arch.mattr, *(["-prefer-256-bit"] if arch.vector_bits == 512 else [])],
        "cores": arch.cores,
        "vector_bits": arch.vector_bits,
        "l1d": arch.l1d,
        "l2": arch.l2,
        "dot": "vnni" if "avx512_vnni" in arch.cpuinfo else "sdot" if "asimddp" in arch.cpuinfo else "",
        "fp16": "asimdhp" in arch.cpuinfo,
    }


def _link(isa: str, answer: Mapping[str, Any], folder: Path) -> tuple[Path, tuple[str, ...]]:
    folder.mkdir()
    signature = folder / FILE_NAME
    signature.write_text(answer["signature"], encoding="utf-8")
    library = folder / ARTIFACT
    objects = [Path(path) for path in answer["objects"]]
    command = linker.link_shared(isa, objects, library, embed=[signature, Path(answer["weights"])], workdir=folder)
    _read_back(library, isa, signature.read_bytes())
    return library, command


def _read_back(library: Path, isa: str, signature: bytes) -> None:
    """A whole library for the right machine that carries its description, or an error.

    The table of sections is the last part of the file (System V gABI, chapter 4: e_shoff at 40, e_shentsize and
    e_shnum at 58).
    """
    with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (machine,), (begin,) = struct.unpack_from("<H", data, 18), struct.unpack_from("<Q", data, 40)
        width, count = struct.unpack_from("<HH", data, 58)
        whole = data[:4] == b"\x7fELF" and len(data) == begin + width * count
        if not whole or machine != _ELF_MACHINE[isa] or data.find(signature) < 0:
            raise BuildError(f"what the linker made is not a model library for {isa}", where=library.name)


def _compile_command(request: Mapping[str, Any]) -> tuple[str, ...]:
    """What the worker did, as the target that TVM was given."""
    machine = request["machine"]
    attributes = [f"-mattr={','.join(machine['mattr'])}"] if machine["mattr"] else []
    return ("tvm.compile", "llvm", f"-mtriple={machine['triple']}", f"-mcpu={machine['mcpu']}", *attributes)


def _notes(precision: str) -> tuple[str, ...]:
    usage = (
        "run it with: ./run -o OUTPUTS main.so NAME=FILE.npy; ./run --describe main.so names its inputs; "
        "in Python with NumPy: player.Model"
    )
    return (usage, "convolutions and matrix products add up in fp16") if precision == "fp16" else (usage,)


GLIBCXX = "3.4.22"
"""The newest symbol version of libstdc++ that the arm64 and x86-64 runtime libraries ask for."""


def _requires(arch: CpuArchitecture) -> str:
    flags = f" with {', '.join(arch.cpuinfo)}" if arch.cpuinfo else ""
    return (
        f"Linux on {arch.isa} ({arch.mcpu}{flags}), glibc {linker.GLIBC} or newer, "
        f"libstdc++ with GLIBCXX_{GLIBCXX} (GCC 6 or newer), libgcc_s"
    )
