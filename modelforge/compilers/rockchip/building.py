"""One build: a compile job in, .rknn files read back from disk, and what the toolkit's log says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.isolated import batch_symbol
from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.rockchip.container import Container, read_container
from modelforge.compilers.rockchip.layers import delegation, read_complaints, read_layers
from modelforge.compilers.rockchip.manifest import Gear, Manifest, Port
from modelforge.errors import BuildError, UnsupportedError
from modelforge.options import PreprocessSection
from modelforge.store import digest_file
from modelforge.target import RockchipArchitecture
from modelforge.toolchains import environments
from modelforge.toolchains.environments import Environment

QUANTIZED = ("int8", "mixed")
NATIVE = "native"
# Level 3 fuses over the Q/DQ pairs: scores 0.48 beside 0.92 against the QDQ model on a detection head (measured), and
# the toolkit warns of it: "The QAT model is loaded, but optimization_level = 3".
_QDQ_LEVEL = 2


@dataclass(frozen=True)
class Built:
    """What a job gave.

    Attributes:
        files: .rknn files by name.
        container: one of them as read back from disk.
        delegation: by batch.
        complaints: lines that the toolkit logged as errors, and went on.
    """

    manifest: Manifest
    files: Mapping[str, Path]
    container: Container
    delegation: Mapping[str, Any]
    complaints: tuple[str, ...] = ()


def build(job: CompileJob, environment: Environment) -> Built:
    """Build a .rknn for each gear, each in a process of its own.

    Raises:
        BuildError: the toolkit crashed, ran out of time, or what it wrote is not for this chip.
        UnsupportedError: it cannot have this model, or leaves all of it to the CPU.
    """
    arch = job.target.arch
    if not isinstance(arch, RockchipArchitecture):
        raise UnsupportedError(f"{job.target.tag} is no Rockchip NPU")
    calibration = _calibration(job)
    config = _config(job)
    inputs, outputs = _ports(job)
    symbol = batch_symbol(job.inputs)
    batches = job.dims[symbol].gears if symbol else (1,)
    gears, files, told, complaints = [], {}, {}, []
    container = None
    for batch in batches:
        name = f"main_b{batch}.rknn" if symbol else "main.rknn"
        folder = job.workdir / f"b{batch}"
        folder.mkdir()
        path = folder / name
        request = {
            **build_request(job.model, arch.platform, config, inputs, batch, calibration),
            "then": {"action": "export", "artifact": str(path)},
        }
        what = f"RKNN-Toolkit2, building for {job.target.tag}"
        try:
            environments.call(environment, request, workdir=folder, timeout=job.timeout, what=what)
        except UnsupportedError as error:
            raise UnsupportedError(error.what, where=job.target.tag, fix=_last_complaint(folder)) from None
        finally:
            log = _clean_log(folder)
            with (job.workdir / "worker.log").open("a", encoding="utf-8") as stream:
                stream.write(f"== {name}\n{log}")
        complaints += read_complaints(log)
        container = _checked(path, arch.platform, environment.version)
        found = delegation(read_layers(log))
        _require_npu(found, job.target.tag)
        blob = digest_file(path)
        gears.append(Gear(batch, name, blob.digest, blob.size))
        files[name], told[str(batch)] = path, found
    assert container is not None
    quantizer = NATIVE if calibration else "modelforge"
    manifest = Manifest(arch.platform, environment.version, config, inputs, outputs, tuple(gears), quantizer)
    return Built(manifest, files, container, told, tuple(dict.fromkeys(complaints)))


def build_request(
    model: Path, platform: str, config: Mapping[str, Any], inputs: tuple[Port, ...], batch: int,
    calibration: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the worker is to build: the same for a build and for the simulator that repeats it.

    Args:
        calibration: samples for the toolkit's own quantizer; without them, the model is built as it is.
    """
    extra = model.with_name(model.name + ".data")
    files = [path for path in (model, extra, calibration) if path is not None and (path != extra or path.exists())]
    build: dict[str, Any] = {
        "model": model.name,
        "platform": platform,
        "config": dict(config),
        "inputs": [{"name": port.name, "shape": port.sized(batch)} for port in inputs],
    }
    if calibration is not None:
        build["quantize"] = {"samples": calibration.name, "batch": batch, "inputs": worker_ports(inputs)}
    return {"files": [str(path) for path in files], "build": build}


def worker_ports(ports: tuple[Port, ...]) -> list[dict[str, Any]]:
    """Inputs or outputs, as the worker reads and writes their samples."""
    return [{"name": port.name, "pixels": port.pixels, "batched": port.is_batched} for port in ports]


def _calibration(job: CompileJob) -> Path | None:
    """The samples for the toolkit's own quantizer, where the recipe asks for it."""
    if job.precision != "int8" or job.options.get("quantizer") != NATIVE:
        return None
    if job.calibration is None:
        raise UnsupportedError(
            "the toolkit's own quantizer needs calibration samples, and the job has none", where=job.target.tag
        )
    return job.calibration


def _config(job: CompileJob) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if job.precision in QUANTIZED and job.options.get("quantizer") != NATIVE:
        config["optimization_level"] = _QDQ_LEVEL
    if job.options.get("single_core"):
        config["single_core_mode"] = True
    if job.preprocess:
        ((name, section),) = _single(job).items()
        _require_plain(name, section, len(job.inputs[name]))
        config |= {"mean_values": [list(section.mean)], "std_values": [list(section.std)]}
    return config


def _single(job: CompileJob) -> Mapping[str, PreprocessSection]:
    if len(job.inputs) != 1:
        raise UnsupportedError(
            "preprocessing is built into models with one input only",
            where=job.target.tag,
            fix="take [inputs.NAME.preprocess] out, and preprocess on the device",
        )
    return job.preprocess


def _require_plain(name: str, section: PreprocessSection, rank: int) -> None:
    """Mean and deviation are built in; the rest of a preprocessing section is not."""
    wanted = {"rgb": "rgb888", "bgr": "bgr888", "gray": "gray8"}[section.colour]
    odd = [
        word
        for word, given in (
            ("crop", section.crop is not None),
            ("size", section.size is not None),
            ("swap_uv", section.swap_uv),
            (f'source = "{section.source}" for colour = "{section.colour}"', section.source != wanted),
            (f"{rank} dimensions", rank != 4),
        )
        if given
    ]
    if odd:
        raise UnsupportedError(
            f"RKNN-Toolkit2 builds in mean and deviation of an NCHW image, and not: {', '.join(odd)}",
            where=f"inputs.{name}.preprocess",
            fix="do that part on the device, and leave mean and std here",
        )


def _ports(job: CompileJob) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    from modelforge.graph.inspect import inspect_model  # heavy: onnx

    facts = inspect_model(job.model, cost=False)
    dtypes = {tensor.name: tensor.dtype for tensor in facts.inputs}
    inputs = []
    for tensor in facts.inputs:
        section = job.preprocess.get(tensor.name)
        pixels = None if section is None else {"mean": list(section.mean), "std": list(section.std)}
        shape = tuple(None if isinstance(size, str) else size for size in job.inputs[tensor.name])
        inputs.append(Port(tensor.name, "uint8" if pixels else dtypes[tensor.name], shape, pixels))
    outputs = []
    for tensor in facts.outputs:
        # A size that is no number follows from the batch, or is a fixed one that nothing told.
        shape = tuple(size if isinstance(size, int) else None for size in tensor.shape or ())
        outputs.append(Port(tensor.name, tensor.dtype, shape))
    return tuple(inputs), tuple(outputs)


def _checked(path: Path, platform: str, version: str) -> Container:
    """Read back from disk: whole, for this chip, by this toolkit."""
    if not path.is_file():
        raise BuildError("the toolkit said it was done, and there is no .rknn file", where=path.name)
    container = read_container(path)
    if platform not in container.platforms:
        raise BuildError(f"it is for {', '.join(container.platforms)}, not for {platform}", where=path.name)
    if container.version != version:
        raise BuildError(f"it says toolkit {container.version}, and {version} is installed", where=path.name)
    return container


def _require_npu(found: Mapping[str, Any], tag: str) -> None:
    operators, macs = found["operators"], found["macs"]
    if operators is None:
        return
    if operators["npu"] == 0 or (macs is not None and sum(macs.values()) > 0 and macs["npu"] == 0):
        raise UnsupportedError(
            "the toolkit leaves all of the model's arithmetic to the CPU",
            where=tag,
            fix="build this model for the SoC's ARM cores instead, with a cortex target",
        )


def _last_complaint(folder: Path) -> str | None:
    """What the toolkit logged last as an error: with return code -1 it says nothing else."""
    found = re.findall(r"^E (?!RKNN)([^\n]+)", _clean_log(folder), flags=re.MULTILINE)
    told = [line for line in found if "rknn-toolkit2 version" not in line and "Traceback" not in line]
    return f"the toolkit says: {told[-1].strip()}" if told else None


_NOISE = re.compile(r"\x1b\[[0-9;]*m|\[\d\d:\d\d:\d\d\.\d{3}\] ?")


def _clean_log(folder: Path) -> str:
    """The worker's log without colours, progress bars and clock times: the same build gives the same log."""
    log = folder / "worker.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [_NOISE.sub("", line.rsplit("\r", 1)[-1]) for line in text.split("\n")]
    return "\n".join(line for line in lines if "it/s]" not in line and "?it/s" not in line)
