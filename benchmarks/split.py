"""How long planning and writing a split takes, and how much memory: 5,000 nodes, 26 GB of weights, 2.3 GB to write.

    python benchmarks/split.py [rounds]

Peers on the same work in the same run: onnx.utils.Extractor for cutting two stages out, scipy's maximum_flow for the
minimum cut (where scipy is installed), cp for copying weights. Medians of interleaved rounds, in CPU seconds of one
thread but for whole programs, which are in wall time. Limits are those of the
project: 5,000 nodes in 2 s; 26 GB in 5 s and 500 MB.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
from onnx.utils import Extractor

from benchmarks.split_models import deep_net, llama
from modelforge.graph.mincut import Labelling, best_labels
from modelforge.graph.split import Balanced, Bounded, BySupport, plan_split
from modelforge.graph.split_graph import LayerGraph, read_layers
from modelforge.graph.split_tiers import Link, Tier, TierProblem, best_cut, sweep
from modelforge.graph.split_write import write_split

PEAK = """
import sys
from modelforge.cli.main import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], file=sys.stderr)
raise SystemExit(code)
"""


def main(rounds: int = 5) -> None:
    with tempfile.TemporaryDirectory(prefix="modelforge-bench-") as temporary:
        folder = Path(temporary)
        five_thousand(folder, rounds)
        minimum_cut(folder, rounds)
        twenty_six_gigabytes(folder, rounds)
        two_gigabytes(folder)


def five_thousand(folder: Path, rounds: int) -> None:
    model = deep_net(folder / "deep.onnx")
    graph = read_layers(model)
    problem = tiers(graph, 3)
    found = interleaved(
        {
            "read the layers": lambda: read_layers(model),
            "balance into 4 stages": lambda: plan_split(graph, Balanced(4)),
            "stages of at most 300 kB": lambda: plan_split(graph, Bounded(300_000)),
            "by support, 3 stages": lambda: plan_split(
                graph, BySupport(lambda layer: layer.op != "MaxPool", max_stages=3)
            ),
            "two tiers": lambda: best_cut(tiers(graph, 2)),
            "three tiers": lambda: best_cut(problem),
            "three tiers, 8 bandwidths": lambda: sweep(problem, (1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64, 256)),
        },
        rounds,
    )
    print(f"{len(graph.layers)} nodes, CPU seconds; load average {os.getloadavg()[0]:.1f}")
    for name, seconds in found.items():
        print(f"  {name:<28} {seconds:7.3f} s")
    slowest = found["read the layers"] + max(found["two tiers"], found["three tiers"], found["balance into 4 stages"])
    print(f"  read and plan, slowest way   {slowest:7.3f} s, {slowest / 2:.2f} of the limit of 2 s")
    plan = plan_split(graph, Balanced(2))
    (cut,) = plan.crossing
    whole = onnx.load(model)

    def extract() -> None:
        extractor = Extractor(onnx.shape_inference.infer_shapes(whole))
        extractor.extract_model(["x"], [cut.name])
        extractor.extract_model([cut.name], [plan.outputs[0][0]])

    both = interleaved({"ours": lambda: write_split(model, plan, folder / "deep-stages"), "Extractor": extract}, rounds)
    print(
        f"  write 2 stages               {both['ours']:7.3f} s, {both['ours'] / both['Extractor']:.2f} of "
        "onnx.utils.Extractor (which writes no files)"
    )


def minimum_cut(folder: Path, rounds: int) -> None:
    """The same two-tier cut by us and by scipy, both from the problem on."""
    try:
        import numpy as np
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_flow
    except ImportError:
        print("scipy is not installed: no peer for the minimum cut in this run (pip install scipy)")
        return
    graph = read_layers(deep_net(folder / "deep.onnx"))
    count = len(graph.layers)
    # Whole microseconds: scipy's capacities are 32-bit.
    unary = [[(layer.flops or 0) // 1000, (layer.flops or 0) // 30000] for layer in graph.layers]
    nets = [
        (graph.producer[name], readers, [(graph.tensors[name].bytes or 0) // 20])
        for name, readers in graph.readers.items()
        if name in graph.producer
    ]
    nets.append((0, [0], [0]))
    problem = Labelling(2, unary, nets)

    def theirs() -> int:
        arcs: list[tuple[int, int, int]] = []
        source, sink, never = count + len(nets), count + len(nets) + 1, 2**30
        for node, (near, far) in enumerate(unary):
            arcs += [(source, node, far), (node, sink, near)]
        for index, (producer, readers, (cost,)) in enumerate(nets):
            arcs.append((producer, count + index, cost))
            for reader in readers:
                arcs += [(count + index, reader, never), (reader, producer, never)] if reader != producer else []
        tails, heads, room = (np.array(each) for each in zip(*arcs, strict=True))
        matrix = coo_array((room.astype(np.int32), (tails, heads)), shape=(sink + 1, sink + 1)).tocsr()
        return int(maximum_flow(matrix, source, sink).flow_value)

    ours = best_labels(problem)
    assert ours is not None
    assert ours[0] == theirs(), "both find the same least cost"
    found = interleaved({"ours": lambda: best_labels(problem), "scipy": theirs}, rounds)
    print(
        f"minimum cut of {count} nodes, no dependency: {found['ours']:.3f} s, "
        f"{found['ours'] / found['scipy']:.2f} of scipy's maximum_flow"
    )


def twenty_six_gigabytes(folder: Path, rounds: int) -> None:
    model = llama(folder / "llama.onnx")
    size = model.with_name("llama.onnx.data").stat().st_size
    print(f"LLaMA-2-13B in shape, {size / 1e9:.1f} GB of sparse weights, whole processes")
    for name, argv in {
        "plan --matrix": ["plan", str(model), "--matrix", "--task", "text-generation", "--json"],
        "split --stages 2 --plan-only": ["split", str(model), "--stages", "2", "--plan-only", "--json"],
    }.items():
        runs = [program(folder, argv) for _ in range(rounds)]
        seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
        print(f"  {name:<28} {seconds:7.2f} s ({seconds / 5:.2f} of 5 s), {peak:.0f} MB ({peak / 500:.2f} of 500 MB)")


def two_gigabytes(folder: Path) -> None:
    model = llama(folder / "three.onnx", layers=3)
    data = model.with_name("three.onnx.data")
    size = data.stat().st_size
    block = os.urandom(1 << 20)
    with data.open("r+b") as stream:
        for _ in range(-(-size // len(block))):
            stream.write(block)
        stream.truncate(size)
    started = time.perf_counter()
    shutil.copyfile(data, folder / "copy.data")
    with (folder / "copy.data").open("rb") as stream:
        os.fsync(stream.fileno())
    copied = time.perf_counter() - started
    (folder / "copy.data").unlink()
    seconds, peak = program(folder, ["split", str(model), "--stages", "2", "-o", str(folder / "out"), "--no-verify"])
    print(
        f"write 2 stages of {size / 1e9:.1f} GB: {seconds:.1f} s ({seconds / copied:.2f} of copying the file), "
        f"{peak:.0f} MB resident"
    )


def tiers(graph: LayerGraph, count: int) -> TierProblem:
    speeds = {"device": 1e9, "edge": 2e10, "cloud": 1e12} if count == 3 else {"device": 1e9, "cloud": 1e12}
    names = list(speeds)
    placed = tuple(Tier(name, [(layer.flops or 0) / speed for layer in graph.layers]) for name, speed in speeds.items())
    links = {(near, far): Link(0.002, 3e6) for near, far in itertools.pairwise(names)}
    return TierProblem(graph, placed, links, "int8")


def program(folder: Path, argv: list[str]) -> tuple[float, float]:
    """Seconds and peak megabytes of one run of the program."""
    env = {**os.environ, "MODELFORGE_HOME": str(folder / "home")}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", PEAK, *argv], env=env, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, int(done.stderr.split()[-1]) / 1024


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each call, which works in one thread: what else runs here counts little."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            call()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
