"""One build: a compile job in, contexts read back from disk, and what QNN's log says of a refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.isolated import batch_symbol
from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.qualcomm.manifest import Gear, Manifest
from modelforge.compilers.qualcomm.socs import Soc, soc_of
from modelforge.errors import BuildError, UnsupportedError
from modelforge.target import QualcommArchitecture
from modelforge.toolchains import environments, worker
from modelforge.toolchains.environments import Environment

_READING = "modelforge.compilers.qualcomm.reading"
# "Unsupported nodes in QNN EP: { name: logits, type: Gemm }{ name: ..."
_UNSUPPORTED = re.compile(r"\{ name: (?P<name>[^{}]*), type: (?P<op>\w+) \}")
_TYPE_REFUSED = re.compile(r"The SocModel doesn't support \w+")
_NOISE = re.compile(r"\x1b\[[0-9;]*m|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ ")


@dataclass(frozen=True)
class Built:
    """``described`` is the lowered model at the smallest gear."""

    manifest: Manifest
    files: Mapping[str, Path]
    described: Mapping[str, Any]


def build(job: CompileJob, environment: Environment) -> Built:
    """Save a context for each gear, each in a process of its own.

    Raises:
        UnsupportedError: the chip is not known, or a node cannot run on its tensor processor.
        BuildError: QNN crashed, ran out of time, or what it wrote is not one context for this chip.
    """
    soc = _soc(job)
    symbol = batch_symbol(job.inputs)
    gears, files, described, versions = [], {}, [], set()
    for batch in job.dims[symbol].gears if symbol else (1,):
        folder = job.workdir / f"b{batch}"
        sizes = {symbol: batch} if symbol else {}
        told = _describe(job, folder, sizes)
        _require_integers(job, soc, told["float_nodes"])
        name = f"main_b{batch}.onnx" if symbol else "main.onnx"
        _save(job, environment, folder, Path(told["model"]), name)
        context = _read_back(job, soc, folder / name)
        gears.append(Gear(batch, name, context["file"]))
        for file in (name, *([context["file"]] if context["file"] else [])):
            if not (folder / file).is_file():
                raise BuildError(f"QNN said it was done, and {file} is not there", where=job.target.tag)
            files[file] = folder / file
        described.append(told)
        versions.add(context["qnn"])
    ports = [*described[0]["inputs"], *described[0]["outputs"]]
    batched = tuple(port["name"] for port in ports if port["shape"][:1] == [gears[0].batch])
    _require_batched(described[-1], gears[-1].batch, batched)
    manifest = Manifest(soc.name, soc.model, soc.htp_arch, versions.pop(), batched, tuple(gears))
    return Built(manifest, files, described[0])


def provider_options(soc: Soc, options: Mapping[str, Any]) -> dict[str, str]:
    """What the QNN provider is told, at the build and in the emulator alike."""
    told = {
        "htp_arch": str(soc.htp_arch),
        "soc_model": str(soc.model),
        # Inputs and outputs stay float and are quantized on the NPU: otherwise those nodes are left to the CPU.
        "offload_graph_io_quantization": "0",
    }
    if (effort := options.get("optimization")) is not None:
        told["htp_graph_finalization_optimization_mode"] = str(effort)
    return told


def _soc(job: CompileJob) -> Soc:
    arch = job.target.arch
    if not isinstance(arch, QualcommArchitecture):
        raise UnsupportedError(f"{job.target.tag} is no Qualcomm HTP")
    soc = soc_of(arch)
    if soc is None:
        raise UnsupportedError(f"(soc_model {arch.soc_model}, htp_arch {arch.htp_arch}) is no SoC that is known")
    return soc


def _describe(job: CompileJob, folder: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    request = {"model": str(job.model), "folder": str(folder / "fixed"), "sizes": dict(sizes)}
    what = f"reading the lowered model for {job.target.tag}"
    return worker.call(
        f"{_READING}:describe", request, workdir=folder / "read", timeout=job.timeout, what=what
    )  # fmt: skip


def _require_integers(job: CompileJob, soc: Soc, float_nodes: Sequence[str]) -> None:
    """HTP computes float in FP16 whatever the model says, or not at all."""
    if not float_nodes:
        return
    named = ", ".join(float_nodes[:5]) + (" ..." if len(float_nodes) > 5 else "")
    if job.precision == "fp16":
        raise UnsupportedError(
            f"{len(float_nodes)} nodes must stay FP32 for the range of their values, and HTP computes float in FP16: "
            f"{named}",
            where=job.target.tag,
            fix="use int8, or split the model around them",
        )
    if soc.no_float:
        raise UnsupportedError(
            f"the tensor processor of {soc.name} computes in integers only, and these nodes stay in float: {named}",
            where=job.target.tag,
            fix="split the model before them, and build the rest for the SoC's ARM cores",
        )


def _save(job: CompileJob, environment: Environment, folder: Path, model: Path, name: str) -> None:
    soc = _soc(job)
    request = {
        "action": "build",
        "model": str(model),
        "context": name,
        "embed": bool(job.options.get("embed", False)),
        "provider": provider_options(soc, job.options),
    }
    what = f"QNN, building for {job.target.tag}"
    refused: BuildError | None = None
    try:
        environments.call(environment, request, workdir=folder, timeout=job.timeout, what=what)
    except BuildError as error:
        refused = error
    log = _clean_log(folder)
    with (job.workdir / "worker.log").open("a", encoding="utf-8") as stream:
        stream.write(f"== {name}\n{log}")
    if refused is not None:
        raise _explained(refused, log, job.target.tag) from refused


def _explained(error: BuildError, log: str, tag: str) -> BuildError | UnsupportedError:
    """QNN's exception says that a CPU is not allowed; its log says which nodes it cannot have."""
    nodes = dict.fromkeys(f"{each['name']} ({each['op']})" for each in _UNSUPPORTED.finditer(log))
    if not nodes:
        return error
    named = ", ".join(list(nodes)[:5]) + (" ..." if len(nodes) > 5 else "")
    why = _TYPE_REFUSED.search(log)
    return UnsupportedError(
        f"{len(nodes)} nodes cannot run on the tensor processor: {named}" + (f" ({why[0]})" if why else ""),
        where=tag,
        fix="split the model around them, or try another precision; QNN's own words are in the log",
    )


def _read_back(job: CompileJob, soc: Soc, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BuildError(f"QNN said it was done, and {path.name} is not there", where=job.target.tag)
    request = {"context": str(path), "soc_model": soc.model, "htp_arch": soc.htp_arch}
    folder = path.parent / "read"
    what = f"reading {path.name} back"
    return worker.call(f"{_READING}:read_context", request, workdir=folder, timeout=job.timeout, what=what)


def _require_batched(described: Mapping[str, Any], batch: int, batched: Sequence[str]) -> None:
    if batch == 1:
        return
    for port in described["outputs"]:
        if port["name"] not in batched or port["shape"][:1] != [batch]:
            raise UnsupportedError(
                f"output {port['name']} has shape {port['shape']} at a batch of {batch}: samples are not along its "
                "first axis",
                where=port["name"],
                fix="give the batch as 1",
            )


def _clean_log(folder: Path) -> str:
    """The worker's log without colours and clock times: the same build gives the same log."""
    log = folder / "worker.log"
    return _NOISE.sub("", log.read_text(encoding="utf-8", errors="replace")) if log.exists() else ""
