"""Large models: thousands of nodes, and weights far beyond memory that are never read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.split_models import deep_net, llama
from modelforge.graph.load import check_model
from modelforge.graph.split import Balanced, OverTiers, plan_split
from modelforge.graph.split_chain import compare_chain
from modelforge.graph.split_graph import read_layers
from modelforge.graph.split_tiers import Link, Tier, TierProblem, best_cut
from modelforge.graph.split_write import write_split

_PEAK = """
import sys
from modelforge.cli.main import main
code = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
raise SystemExit(code)
"""


def peak_megabytes(cwd: Path, *argv: str) -> tuple[float, str]:
    """Run the program; its peak resident memory, and what it printed."""
    env = {**os.environ, "MODELFORGE_HOME": str(cwd / "home")}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1]) / 1024, done.stdout


def test_five_thousand_nodes(tmp_path: Path) -> None:
    graph = read_layers(deep_net(tmp_path / "deep.onnx"))
    assert len(graph.layers) == 5004
    plan = plan_split(graph, Balanced(4))
    total = sum(layer.flops or 0 for layer in graph.layers)
    largest = max(layer.flops or 0 for layer in graph.layers)
    assert max(stage.flops for stage in plan.stages) <= 1.1 * (total / 4 + largest)
    device = Tier("device", [(layer.flops or 0) / 1e9 for layer in graph.layers])
    cloud = Tier("cloud", [(layer.flops or 0) / 1e11 for layer in graph.layers])
    problem = TierProblem(graph, (device, cloud), {("device", "cloud"): Link(0.001, 2e6)})
    best = best_cut(problem)
    every = [0.0]
    for seconds in device.seconds:
        every.append(every[-1] + seconds)
    # Each block has one tensor at its end, so the best of all cuts is the best of these.
    ends = [position + 1 for position, layer in enumerate(graph.layers) if layer.op in ("Add", "MaxPool")]
    back = graph.tensors[graph.outputs[0]].bytes or 0
    least = every[-1]
    for end in [0, *ends]:
        name = graph.layers[end - 1].writes[0] if end else "x"
        sent = (graph.tensors[name].bytes or 0) + back
        if end < len(graph.layers):
            least = min(least, every[end] + (every[-1] - every[end]) / 100 + 0.002 + sent / 2e6)
    assert best.seconds == pytest.approx(least)
    assert plan_split(graph, OverTiers(problem, best)).stages


def test_twenty_six_gigabytes_are_planned_without_reading_them(tmp_path: Path) -> None:
    """A LLaMA-2-13B in shape, its weights a sparse file: only the cloud holds it at 40 ms a token."""
    model = llama(tmp_path / "llama.onnx")
    assert (tmp_path / "llama.onnx.data").stat().st_size > 26e9
    peak, out = peak_megabytes(tmp_path, "plan", str(model), "--matrix", "--task", "text-generation", "--json")
    assert peak < 500
    import json

    tiers = {tier["tier"]: tier for tier in json.loads(out)["tiers"]}
    assert (tiers["device"]["verdict"], tiers["edge"]["verdict"]) == ("no", "no")
    assert {"a100", "h100"} <= set(tiers["cloud"]["able"])
    peak, out = peak_megabytes(tmp_path, "split", str(model), "--stages", "2", "--plan-only", "--json")
    assert peak < 500
    plan = json.loads(out)
    assert [stage["name"] for stage in plan["stages"]] == ["stage1", "stage2"]
    assert sum(stage["weight_bytes"] for stage in plan["stages"]) == pytest.approx(26.03e9, rel=0.001)
    assert len(plan["crossing"]) > 1, "the rotation's angles are read by every layer"


def test_the_same_model_small_gives_the_same_bits(tmp_path: Path) -> None:
    model = llama(tmp_path / "llama.onnx", layers=2, width=64, heads=4, inner=128, words=100)
    data = tmp_path / "llama.onnx.data"
    # float16 bytes 0x2e2e are 0.0965: no zeros, so that an exchanged weight would show
    data.write_bytes(bytes([0x2E]) * data.stat().st_size)
    graph = read_layers(model, {"sequence": 8})
    stages = write_split(model, plan_split(graph, Balanced(3)), tmp_path / "s")
    assert compare_chain(model, stages.folder, sizes={"batch": 2, "sequence": 8}).identical


@pytest.mark.slow  # writes more than two gigabytes
def test_the_split_of_a_large_model_streams_its_weights(tmp_path: Path) -> None:
    """2.3 GB of real bytes: bounded memory, valid stages, every byte in its place."""
    model = llama(tmp_path / "llama.onnx", layers=3)
    data = tmp_path / "llama.onnx.data"
    size = data.stat().st_size
    assert size > 2**31
    block = bytes(range(256)) * 4096
    with data.open("r+b") as stream:
        for _ in range(-(-size // len(block))):
            stream.write(block)
        stream.truncate(size)
    peak, _ = peak_megabytes(tmp_path, "split", str(model), "--stages", "2", "-o", "stages", "--no-verify")
    assert peak < 300
    total = 0
    for name in ("stage1", "stage2"):
        path = tmp_path / "stages" / f"{name}.onnx"
        check_model(path)
        total += path.with_name(f"{name}.onnx.data").stat().st_size
        with path.with_name(f"{name}.onnx.data").open("rb") as stream:
            # Every tensor began on a page of the original and does here: each page starts the same way.
            assert stream.read(256) == bytes(range(256))
    assert total == pytest.approx(size, rel=0.001)
