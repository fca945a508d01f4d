"""Runs a variant on this machine: natively where its CPU can, else under QEMU. One process for all samples."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.protocol import Ran, RunJob
from modelforge.compilers.tvm.runtime import FFI, RUNNER, RUNTIME, copy_program
from modelforge.compilers.tvm.signature import Signature, parse
from modelforge.errors import BuildError
from modelforge.target import CpuArchitecture, Target
from modelforge.toolchains import host, process, qemu

_ROUNDS = 10
_TURNS = 5
"""Of two variants that are timed beside each other; the first of a machine that was idle is the slowest, and the
median drops it."""
_DESCRIBE_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """Where a variant can run: ``prefix`` stands before its command."""

    evidence: str
    prefix: tuple[str, ...]
    note: str


def place(target: Target) -> Place | None:
    """Where this target's code runs on this machine, or None."""
    if not isinstance(target.arch, CpuArchitecture):
        return None
    if host.why_not(target.arch) is None:
        return Place("device", (), "run natively on the build machine")
    emulator = qemu.find() if target.arch.isa == "aarch64" else None
    if emulator is None:
        return None
    cpu = target.arch.qemu_cpu or "max"
    return Place(
        "emulator", tuple(emulator.command(cpu=cpu)), f"run by qemu-aarch64 {emulator.version()}, CPU model {cpu}"
    )


def hint(target: Target) -> str:
    """How to raise the evidence; empty where it is the best."""
    if not isinstance(target.arch, CpuArchitecture):
        return ""
    reason = host.why_not(target.arch)
    if reason is None:
        return ""
    if target.arch.isa == "aarch64" and (missing := qemu.why_not()):
        return f"{reason}, and {missing}: {qemu.INSTALL}"
    return f"{reason}: run `modelforge verify` on the device itself"


def run(job: RunJob) -> Ran:
    """Run all samples of ``job.inputs``.

    Raises:
        BuildError: it cannot run here, or the runner failed.
    """
    where = place(job.target)
    if where is None:
        raise BuildError(f"a variant for {job.target.tag} cannot run on this machine", fix=hint(job.target) or None)
    folder = job.workdir / "variant"
    _lay_out(job, folder)
    program = [*where.prefix, str(folder / RUNNER)]
    signature = _describe(program, job, folder)
    arguments = _unpack_inputs(job, signature, folder)
    options = ["-o", str(folder), "-b", str(max(1, min(job.batch, signature.entries[-1].batch)))]
    if where.evidence == "device":
        options += ["-r", str(_ROUNDS)]
        sizes = [size for size in job.timed if size <= signature.entries[-1].batch]
        options += ["-t", ",".join(map(str, sizes))] if sizes else []
    said = _call([*program, *options, str(folder / "main.so"), *arguments], job, folder, job.timeout)
    _pack_outputs(job.outputs, signature, folder)
    return Ran(evidence=where.evidence, notes=(where.note,), latency=_latency(said))


def race(first: RunJob, second: RunJob) -> tuple[float, float] | None:
    """Median milliseconds of two variants for the first batch of samples, on one thread; None where they cannot run
    here at full speed. In processes that take turns: what else the machine does hits both alike, and their pools of
    threads never share a core.

    Raises:
        BuildError: one of them failed.
    """
    where = place(first.target)
    if where is None or where.evidence != "device":
        return None
    commands = [_race_command(job, job.workdir / name) for name, job in (("first", first), ("second", second))]
    medians: list[list[float]] = [[], []]
    for _ in range(_TURNS):
        for (command, folder), job, found in zip(commands, (first, second), medians, strict=True):
            found.append(float(_latency(_call(command, job, folder, job.timeout, threads=1))["p50_ms"]))
    ours, theirs = (round(statistics.median(found), 4) for found in medians)
    return ours, theirs


def _race_command(job: RunJob, folder: Path) -> tuple[list[str], Path]:
    _lay_out(job, folder)
    program = str(folder / RUNNER)
    signature = _describe([program], job, folder)
    batch = max(1, min(job.batch, signature.entries[-1].batch))
    arguments = _unpack_inputs(job, signature, folder)
    options = ["-o", str(folder), "-b", str(batch), "-r", str(_ROUNDS)]
    return [program, *options, str(folder / "main.so"), *arguments], folder


def _lay_out(job: RunJob, folder: Path) -> None:
    """The files under their bundle names: the runner looks for its libraries beside itself."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in (RUNNER, FFI, RUNTIME):
        if name not in job.files:
            raise BuildError(f"the variant has no file {name}", where=job.target.tag)
        copy_program(job.files[name], folder / name)
    (folder / "main.so").symlink_to(job.files[job.artifact].resolve())


def _describe(program: Sequence[str], job: RunJob, folder: Path) -> Signature:
    text = _call([*program, "--describe", str(folder / "main.so")], job, folder, _DESCRIBE_SECONDS)
    try:
        return parse(text)
    except ValueError as error:
        raise BuildError(f"the variant for {job.target.tag} does not describe itself: {error}") from error


def _call(argv: Sequence[str], job: RunJob, folder: Path, timeout: float, threads: int | None = None) -> str:
    """Run the runner and give what it said; on as many threads as the profile has cores, if this machine has them."""
    log = folder / "run.log"
    log.unlink(missing_ok=True)
    threads = threads or min(host.this_host().cores, getattr(job.target.arch, "cores", 1))
    try:
        finished = process.run(argv, cwd=folder, log=log, timeout=timeout, env={"TVM_NUM_THREADS": str(threads)})
    except OSError as error:
        raise BuildError(f"the variant for {job.target.tag} cannot be started: {error}") from error
    if not finished.ok:
        raise BuildError(
            f"the variant for {job.target.tag} {finished.ending()}", fix=f"what it said:\n{finished.tail()}"
        )
    return log.read_text(encoding="utf-8", errors="replace")


def _unpack_inputs(job: RunJob, signature: Signature, folder: Path) -> list[str]:
    """An .npz is a zip of .npy files: they are copied out as they are, and never held in memory."""
    arguments = []
    with zipfile.ZipFile(job.inputs) as archive:
        for position, tensor in enumerate(signature.inputs):
            path = folder / f"input-{position}.npy"
            try:
                with archive.open(f"{tensor.name}.npy") as source, path.open("wb") as target:
                    shutil.copyfileobj(source, target)
            except KeyError:
                raise BuildError(f"the inputs hold no array {tensor.name}", where=str(job.inputs)) from None
            arguments.append(f"{tensor.name}={path}")
    return arguments


def _pack_outputs(outputs: Path, signature: Signature, folder: Path) -> None:
    temporary = outputs.with_name(f".part-{outputs.name}")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for position, tensor in enumerate(signature.outputs):
            archive.write(folder / f"{position}.npy", f"{tensor.name}.npy")
    os.replace(temporary, outputs)


def _latency(said: str) -> dict[str, Any]:
    for line in said.splitlines():
        if line.startswith("{"):
            measured: dict[str, Any] = json.loads(line)
            return measured
    return {}
