"""QNN's x86 emulation of the tensor processor as a runner: it loads the very context that ships."""

from __future__ import annotations

import shutil

from modelforge.compilers.protocol import Ran, RunJob
from modelforge.compilers.qualcomm.building import provider_options
from modelforge.compilers.qualcomm.manifest import FILE_NAME, read_manifest
from modelforge.compilers.qualcomm.socs import soc_of
from modelforge.errors import BuildError
from modelforge.target import QualcommArchitecture
from modelforge.toolchains import environments
from modelforge.toolchains.environments import Environment


def emulate(job: RunJob, environment: Environment) -> Ran:
    """Run one gear in the emulator.

    Raises:
        BuildError: a file of the variant is missing, it is for another chip, or the emulator failed.
    """
    if FILE_NAME not in job.files:
        raise BuildError(f"{FILE_NAME} is not among the variant's files", where=job.target.tag)
    manifest = read_manifest(job.files[FILE_NAME])
    arch = job.target.arch
    soc = soc_of(arch) if isinstance(arch, QualcommArchitecture) else None
    if soc is None or (manifest.soc_model, manifest.htp_arch) != (soc.model, soc.htp_arch):
        raise BuildError(f"the variant is for {manifest.soc}, not for {job.target.tag}", where=FILE_NAME)
    gear = manifest.gear(job.batch)
    folder = job.workdir / "context"
    folder.mkdir(exist_ok=True)
    for name in (gear.file, *([gear.context] if gear.context else [])):
        if name not in job.files:
            raise BuildError(f"{name} is not among the variant's files", where=job.target.tag)
        shutil.copyfile(job.files[name], folder / name)  # the wrapper names its binary, and a store names by digest
    request = {
        "action": "emulate",
        "context": str(folder / gear.file),
        "provider": provider_options(soc, {}),
        "samples": str(job.inputs),
        "batch": gear.batch,
        "batched": list(manifest.batched),
        "result": str(job.outputs),
    }
    what = f"QNN's emulator, running {gear.file} for {job.target.tag}"
    answer = environments.call(environment, request, workdir=job.workdir, timeout=job.timeout, what=what)
    if not job.outputs.is_file():
        raise BuildError("the emulator wrote no outputs", where=gear.file)
    notes = [f"{gear.file} ran in QNN's x86 emulation of Hexagon v{manifest.htp_arch}, not on a chip"]
    if answer["samples"] == 0:
        raise BuildError("there is no sample to run", where=gear.file)
    if len(manifest.gears) > 1:
        notes.append(f"of {len(manifest.gears)} sizes, {gear.file} was emulated")
    return Ran("emulator", tuple(notes))
