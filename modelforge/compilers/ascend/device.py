"""Running an .om on an NPU of this machine: through ais_bench where it is installed, else through pyACL.

Both live in CANN's own Python, not in ours: :mod:`device_worker`, one file of standard library and NumPy, runs there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from modelforge.compilers.ascend import device_worker, install
from modelforge.compilers.ascend.install import NotHere, Place
from modelforge.compilers.ascend.launcher import Settings, open_session
from modelforge.compilers.protocol import Ran, RunJob
from modelforge.errors import BuildError
from modelforge.target import AscendArchitecture, Target

_DEVICES = Path("/dev")
_WORKER = "device_worker.py"


def chip_here(target: Target) -> bool:
    """Whether this machine's NPU is exactly the target's chip, and CANN's Python can drive it."""
    if not isinstance(target.arch, AscendArchitecture) or not any(_DEVICES.glob("davinci[0-9]*")):
        return False
    found = install.find()
    if isinstance(found, NotHere) or found.kind != "local":
        return False
    return bool(_probe(found).get("soc") == target.arch.soc_version)


def run(job: RunJob, manifest: str) -> Ran:
    """Run the variant over the job's inputs.

    Raises:
        BuildError: there is no NPU of the target's kind here, or running failed.
    """
    if not chip_here(job.target):
        raise BuildError(f"there is no NPU of {job.target.tag} here", where=job.artifact)
    place = install.find()
    assert isinstance(place, Place)
    answer = _call(
        place,
        {"do": "run", "manifest": manifest, "batch": job.batch, "inputs": "inputs.npz", "outputs": "outputs.npz"},
        {**_laid_out(job.files), "inputs.npz": job.inputs},
        job.workdir,
        job.timeout,
        fetch={"outputs.npz": job.outputs},
    )
    if not job.outputs.is_file():
        raise BuildError("the NPU wrote no outputs", where=job.artifact)
    times = answer["milliseconds"]
    latency = {"evidence": "device", "p50_ms": times["median"], "batch": times["batch"], "runs": times["runs"]}
    return Ran("device", (f"run on {answer['soc']} through {answer['api']}",), latency)


def race(first: RunJob, second: RunJob) -> tuple[float, float] | None:
    """Median milliseconds of one batch of each; None without an NPU of that kind."""
    if not chip_here(first.target):
        return None
    place = install.find()
    assert isinstance(place, Place)
    files = {"inputs.npz": first.inputs}
    for side, job in (("first", first), ("second", second)):
        files |= {f"{side}/{name}": path for name, path in job.files.items() if name.endswith((".om", ".json"))}
    request = {"do": "race", "manifests": ["first/main.json", "second/main.json"], "batch": first.batch}
    answer = _call(place, {**request, "inputs": "inputs.npz"}, files, first.workdir, first.timeout)
    ours, rival = answer["milliseconds"]
    return float(ours), float(rival)


def compare_command() -> str:
    """MindStudio's comparison of every layer with the ONNX model, for those who have it."""
    words = ("-gm", "MODEL.onnx", "-om", "main.om", "-c", "$ASCEND_TOOLKIT_HOME", "-o", "compared")
    return " ".join(("msit debug compare", *words))


@cache
def _probe(place: Place) -> Mapping[str, Any]:
    """``soc`` and ``api`` of this machine's NPU; empty where CANN's Python cannot drive it. Once a process."""
    folder = Path(tempfile.mkdtemp(prefix="modelforge-npu-"))
    try:
        return _call(place, {"do": "probe"}, {}, folder, 60.0)
    except (BuildError, OSError):
        return {}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(
    place: Place,
    request: Mapping[str, Any],
    files: Mapping[str, Path],
    workdir: Path,
    timeout: float,
    fetch: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    log = workdir / "npu.log"
    asked = workdir / "npu-request.json"
    asked.write_text(json.dumps(request, sort_keys=True), encoding="utf-8")
    python = install.python()
    settings = Settings(timeout, python="" if python is None else str(python.parent))
    with open_session(place, workdir, log) as session:
        session.put(Path(device_worker.__file__), _WORKER)
        session.put(asked, "request.json")
        for name, path in files.items():
            session.put(path, name)
        finished = session.run(["python3", _WORKER, "request.json", "answer.json"], settings)
        if not finished.ok or "answer.json" not in session.names():
            raise BuildError(f"running on the NPU {finished.ending()}", fix=finished.tail(6) or None)
        session.get("answer.json", workdir / "npu-answer.json")
        answer: dict[str, Any] = json.loads((workdir / "npu-answer.json").read_text(encoding="utf-8"))
        if "error" in answer:
            raise BuildError(f"running on the NPU: {answer['error']}", fix=finished.tail(6) or None)
        for name, path in (fetch or {}).items():
            session.get(name, path)
    return answer


def _laid_out(files: Mapping[str, Path]) -> dict[str, Path]:
    """The bundle's flat names as the .om wants its files: weight-NAME is weight/NAME."""
    return {
        name.replace("weight-", "weight/", 1) if name.startswith("weight-") else name: path
        for name, path in files.items()
    }
