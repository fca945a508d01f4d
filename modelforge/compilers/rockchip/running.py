"""The toolkit's PC simulator as a runner. It needs the built graph in memory, so the worker builds the file again,
holds the result against the one that ships, and simulates that.
"""

from __future__ import annotations

from modelforge.compilers.protocol import Ran, RunJob
from modelforge.compilers.rockchip.building import NATIVE, build_request, worker_ports
from modelforge.compilers.rockchip.manifest import FILE_NAME, read_manifest
from modelforge.errors import BuildError, UnsupportedError
from modelforge.toolchains import environments
from modelforge.toolchains.environments import Environment

_OFF_GRID = 0.02
"""How far from a whole pixel a sample may lie once mean and deviation are taken back."""


def simulate(job: RunJob, environment: Environment) -> Ran:
    """Run one gear in the simulator.

    Raises:
        BuildError: the lowered model is not among the files, or built again it is not the file that ships.
        UnsupportedError: the toolkit quantized it, and the calibration samples are not here to build it again.
    """
    for name in (FILE_NAME, "model.onnx"):
        if name not in job.files:
            raise BuildError(
                f"the simulator needs {name}, which is not among the variant's files", where=job.target.tag
            )
    manifest = read_manifest(job.files[FILE_NAME])
    if manifest.toolkit != environment.version:
        raise BuildError(
            f"the variant was built by RKNN-Toolkit2 {manifest.toolkit}, and {environment.version} is installed",
            where=job.target.tag,
        )
    if manifest.quantizer == NATIVE and job.calibration is None:
        raise UnsupportedError(
            "the simulator builds a model again, and what the toolkit's own quantizer made it of, the calibration "
            "samples, is not in the bundle",
            where=job.target.tag,
            fix="run the golden samples on the board",
        )
    gear = manifest.gear(job.batch)
    samples = job.calibration if manifest.quantizer == NATIVE else None
    model, inputs = job.files["model.onnx"], manifest.inputs
    request = {
        **build_request(model, manifest.platform, manifest.config, inputs, gear.batch, samples),
        "then": {
            "action": "simulate",
            "inputs": worker_ports(manifest.inputs),
            "outputs": worker_ports(manifest.outputs),
            "artifact": str(job.files[gear.file]),
            "samples": str(job.inputs),
            "batch": gear.batch,
            "result": str(job.outputs),
        },
    }
    what = f"RKNN-Toolkit2's simulator, running {gear.file} for {job.target.tag}"
    answer = environments.call(environment, request, workdir=job.workdir, timeout=job.timeout, what=what)
    if answer["off_grid"] > _OFF_GRID:
        raise BuildError(
            f"the samples are no pixels from 0 to 255 after this mean and deviation (off by {answer['off_grid']:.2g})",
            where="inputs.*.preprocess",
            fix="give the mean and std that the evaluation data was made with",
        )
    return Ran("simulator", tuple(_notes(gear.file, len(manifest.gears), int(answer["differs"]))))


def _notes(file: str, gears: int, differs: int) -> list[str]:
    same = (
        "to the same bytes"
        if differs == 0
        else f"and differs in {differs} bytes, all of them memory addresses that the toolkit leaves in the file"
    )
    notes = [f"simulated on a PC, not run on a board; the simulator built {file} again, {same}"]
    if gears > 1:
        notes.append(f"of {gears} sizes, {file} was simulated")
    return notes
