"""What a toolchain's environment and one call of its worker cost, cold and warm.

    python benchmarks/toolchains.py [toolchain] [rounds]      # dummy and 5 unless told

Environments: ``cold`` with an empty cache of uv, so packages come over the network, ``warm`` out of uv's cache, and
``here`` where it stands already and is only checked. The peer is ``uv pip install`` of the same pins into a bare ``uv
venv``, warm too. Worker calls, medians over the rounds: one round trip of the dummy's worker, beside a bare
``python -I -c pass`` of the same interpreter; for ``rockchip`` and ``qualcomm``, the build of a small convolution.
``dummy`` is the double in tests/doubles; a licence that must be accepted is accepted by running this.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "doubles" / "dummy_toolchain"))

from modelforge.toolchains.definition import Definition, get_definition
from modelforge.toolchains.environments import Environment, call, find, install

Request = Callable[[Path], dict[str, object]]
"""What a worker is asked, given the folder that it works in."""


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def bare(definition: Definition, folder: Path) -> None:
    """The peer: what anyone would type, in two commands."""
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    pip = [*uv, "pip", "install", "--quiet", "--no-deps", "--link-mode", "copy", "--python", str(folder / "bin/python")]
    subprocess.run([*pip, *definition.packages], check=True)


def environments(definition: Definition, folder: Path, rounds: int) -> Environment:
    os.environ["UV_CACHE_DIR"] = str(folder / "cache")
    make = partial(install, definition, accept_license=True)
    cold = seconds(partial(make, home=folder / "cold"))
    warm, peer, here = [], [], []
    for turn in range(rounds):
        warm.append(seconds(partial(make, home=folder / f"warm{turn}")))
        peer.append(seconds(partial(bare, definition, folder / f"bare{turn}")))
        here.append(seconds(lambda: find(definition, folder / "cold")))
    ours, theirs = statistics.median(warm), statistics.median(peer)
    print(f"environment  cold {cold:.2f} s   warm {ours:.2f} s ({ours / theirs:.2f} of uv alone)", end="   ")
    print(f"check of one that is here {1000 * statistics.median(here):.1f} ms")
    found = find(definition, folder / "cold")
    assert isinstance(found, Environment)
    return found


def trips(environment: Environment, folder: Path, rounds: int, request: Request, name: str) -> None:
    ours, bare_python = [], []
    for turn in range(rounds):
        work = folder / f"{name}{turn}"
        work.mkdir()
        asked = request(work)
        ours.append(seconds(partial(call, environment, asked, workdir=work, timeout=600, what=name)))
        bare_python.append(seconds(lambda: subprocess.run([environment.python, "-I", "-c", "pass"], check=True)))
    first, rest, peer = ours[0], statistics.median(ours[1:]), statistics.median(bare_python)
    print(f"{name}  first {first:.3f} s   then {rest:.3f} s ({rest / peer:.1f} of a bare interpreter, {peer:.3f} s)")


def small_convolution(folder: Path) -> Path:
    """One convolution, 3 to 16 channels, 64 x 64."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(0, 0.1, (16, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 64, 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def rockchip_build(model: Path, work: Path) -> dict[str, object]:
    build = {
        "model": model.name,
        "platform": "rk3588",
        "config": {},
        "inputs": [{"name": "x", "shape": [1, 3, 64, 64]}],
    }
    then = {"action": "export", "artifact": str(work / "out.rknn")}
    return {"files": [str(model)], "build": build, "then": then}


def qualcomm_build(model: Path, work: Path) -> dict[str, object]:
    del work  # the worker writes into the folder that it runs in
    provider = {"htp_arch": "73", "soc_model": "43", "offload_graph_io_quantization": "0"}
    return {"action": "build", "model": str(model), "context": "out.onnx", "embed": False, "provider": provider}


BUILDS = {"rockchip": rockchip_build, "qualcomm": qualcomm_build}


def main(name: str = "dummy", rounds: str = "5") -> None:
    importlib.invalidate_caches()
    with tempfile.TemporaryDirectory(prefix="modelforge-bench-") as place:
        folder = Path(place)
        definition = get_definition(name)
        environment = environments(definition, folder, int(rounds))
        if name == "dummy":
            trips(environment, folder, int(rounds), lambda work: {"how": "well"}, "worker round trip")
        if name in BUILDS:
            trips(environment, folder, int(rounds), partial(BUILDS[name], small_convolution(folder)), "worker build")


if __name__ == "__main__":
    main(*sys.argv[1:])
