"""TVM's variants beside ONNX Runtime on this CPU: the files that ship, run by the runner that ships.

    python benchmarks/tvm_cpu.py [--threads 1 2] [--precisions fp32 int8] [--pairs 9] [--target TAG] [MODEL ...]

A pair is two processes, one after the other: `run -r` on the variant, then a script that runs the same model in ONNX
Runtime with as many threads. Each gives the median of its rounds; the figure is the median of the pairs' ratios. Rules
were fitted on the first three models only: the others are held out, and stand apart. INT8 in ONNX Runtime is our
``onnxruntime-x86`` dialect, on all layers that it can have. Values are held against ONNX Runtime's FP32.

Limits (issue 5): FP32 .95 (worst 1.2) with one thread, 1.0 (1.2) with two; INT8 1.0, and half of our FP32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tvm_models import MODELS, Model

from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.tvm import ARTIFACT, TvmCompiler
from modelforge.compilers.tvm.runtime import copy_program
from modelforge.target import Registry, Target

ORT = """
import json, sys, time
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feed = {session.get_inputs()[0].name: numpy.load(sys.argv[2])}
for _ in range(5):
    session.run(None, feed)
times = []
for _ in range(int(sys.argv[4])):
    begun = time.perf_counter()
    session.run(None, feed)
    times.append(time.perf_counter() - begun)
print(json.dumps({"p50_ms": sorted(times)[len(times) // 2] * 1e3}))
"""
BUDGET_SECONDS = 1.5
"""What the rounds of one process may take."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "int8"), default=["fp32"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--target", default="x86-64-avx512")
    parser.add_argument("--work", type=Path, help="keep prepared models here between runs")
    options = parser.parse_args()
    target = Registry().get(options.target)
    chosen = [model for model in MODELS if not options.models or model.name in options.models]
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        print(f"{target.tag}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.pairs} pairs")
        for precision in options.precisions:
            built = [
                (model, compile_it(model, precision, target, work)) for model in chosen if wanted(model, precision)
            ]
            for threads in options.threads:
                table(built, precision, threads, options.pairs, work)
        if {"fp32", "int8"} <= set(options.precisions):
            for threads in options.threads:
                beside([model for model in chosen if model.integer], threads, options.pairs, work)


def wanted(model: Model, precision: str) -> bool:
    return precision == "fp32" or model.integer


def compile_it(model: Model, precision: str, target: Target, work: Path) -> dict[str, Any]:
    """Compile as the forge does, in a child process; what it took, and what came out."""
    source = model.fp32(work) if precision == "fp32" else model.int8(work, "tvm")
    folder = work / model.name / f"variant-{precision}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    begun = time.perf_counter()
    job = CompileJob(source, target, precision, {model.input: model.shape}, {}, folder / "work", timeout=900)
    job.workdir.mkdir()
    compiled = TvmCompiler().compile(job)
    taken = time.perf_counter() - begun
    ready = folder / "files"
    ready.mkdir()
    for name, path in compiled.files.items():
        copy_program(path, ready / name)
    np.save(folder / "x.npy", model.feed())
    weights = sum(path.stat().st_size for path in source.parent.iterdir())
    kernels = compiled.report["kernels"]
    fallen = [kernel["name"] for kernel in kernels if kernel["rule"] in ("generic", "none") and kernel["macs"]]
    return {"folder": folder, "seconds": taken, "bytes": (ready / ARTIFACT).stat().st_size / weights, "fallen": fallen}


def table(built: list[tuple[Model, dict[str, Any]]], precision: str, threads: int, pairs: int, work: Path) -> None:
    print(f"\n{precision}, {threads} thread(s): milliseconds TVM / ONNX Runtime, ratio (lowest to highest of pairs)")
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for model, variant in built:
        peer = model.fp32(work) if precision == "fp32" else model.int8(work, "onnxruntime-x86")
        taken = [pair(model, variant["folder"], peer, threads, position) for position in range(pairs)]
        own, theirs = (statistics.median(side) for side in zip(*taken, strict=True))
        each = sorted(a / b for a, b in taken)
        ratios[model.fitted].append(statistics.median(each))
        error = difference(model, variant["folder"], work)
        print(
            f"  {'fitted' if model.fitted else 'held out':9}{model.name:12}{own:9.3f}{theirs:9.3f}"
            f"{statistics.median(each):7.2f} ({each[0]:.2f} to {each[-1]:.2f})   {error}, compiled in "
            f"{variant['seconds']:.0f} s, {variant['bytes']:.2f} of the model's bytes"
            + (f", GENERIC: {len(variant['fallen'])}" if variant["fallen"] else ""),
            flush=True,
        )
    for fitted, name in ((True, "fitted"), (False, "held out")):
        if ratios[fitted]:
            mean = statistics.geometric_mean(ratios[fitted])
            print(f"  {name}: geometric mean {mean:.3f}, worst {max(ratios[fitted]):.3f}")
    both = ratios[True] + ratios[False]
    print(f"  all: geometric mean {statistics.geometric_mean(both):.3f}, worst {max(both):.3f}")


def beside(models: list[Model], threads: int, pairs: int, work: Path) -> None:
    """Our INT8 beside our FP32, which were compiled before: processes alternate as with the peer."""
    print(f"\nint8 / fp32, both ours, {threads} thread(s): milliseconds, ratio (lowest to highest of pairs)")
    ratios = []
    for model in models:
        folders = [work / model.name / f"variant-{precision}" for precision in ("int8", "fp32")]
        rounds = [count(model, folder, threads) for folder in folders]
        commands = [ours(model, folder, each) for folder, each in zip(folders, rounds, strict=True)]
        taken = [alternate(commands, threads, position) for position in range(pairs)]
        first, second = (statistics.median(side) for side in zip(*taken, strict=True))
        each = sorted(a / b for a, b in taken)
        ratios.append(statistics.median(each))
        print(
            f"  {model.name:12}{first:9.3f}{second:9.3f}{ratios[-1]:7.2f} ({each[0]:.2f} to {each[-1]:.2f})", flush=True
        )
    print(f"  all: geometric mean {statistics.geometric_mean(ratios):.3f}, worst {max(ratios):.3f}")


def pair(model: Model, folder: Path, peer: Path, threads: int, position: int) -> tuple[float, float]:
    """One process of TVM's and one of ONNX Runtime's."""
    rounds = count(model, folder, threads)
    theirs = [sys.executable, "-c", ORT, str(peer), str(folder / "x.npy"), str(threads), str(rounds)]
    return alternate([ours(model, folder, rounds), theirs], threads, position)


def ours(model: Model, folder: Path, rounds: int) -> list[str]:
    """The runner on a variant."""
    program = [str(folder / "files" / "run"), "-r", str(rounds), "-o", str(folder), str(folder / "files" / ARTIFACT)]
    return [*program, f"{model.input}={folder / 'x.npy'}"]


def count(model: Model, folder: Path, threads: int) -> int:
    """How many inferences fill the time of a process."""
    return max(10, int(BUDGET_SECONDS / max(1e-4, estimate(model, folder, threads))))


def alternate(commands: list[list[str]], threads: int, position: int) -> tuple[float, float]:
    """Milliseconds of two processes, one after the other on the same cores; who goes first alternates."""
    found: list[float] = [0.0, 0.0]
    for side in (0, 1) if position % 2 else (1, 0):
        found[side] = call(commands[side], threads)["p50_ms"]
    return found[0], found[1]


_ESTIMATES: dict[tuple[Path, int], float] = {}


def estimate(model: Model, folder: Path, threads: int) -> float:
    """Seconds of one inference, from a short run."""
    key = (folder, threads)
    if key not in _ESTIMATES:
        _ESTIMATES[key] = call(ours(model, folder, 5), threads)["p50_ms"] / 1e3
    return _ESTIMATES[key]


def call(command: list[str], threads: int) -> dict[str, Any]:
    cores = set(sorted(os.sched_getaffinity(0))[:threads])
    environment = {**os.environ, "TVM_NUM_THREADS": str(threads)}
    said = subprocess.run(
        command,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    ).stdout
    line = next(line for line in said.splitlines() if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found


def difference(model: Model, folder: Path, work: Path) -> str:
    """Signal to noise against ONNX Runtime in FP32, of the least of all outputs."""
    session = onnxruntime.InferenceSession(str(model.fp32(work)), providers=["CPUExecutionProvider"])
    exact = session.run(None, {model.input: np.load(folder / "x.npy")})
    worst = np.inf
    for position, reference in enumerate(exact):
        error = np.load(folder / f"{position}.npy").astype(np.float64) - reference
        power = np.square(reference.astype(np.float64)).sum()
        worst = min(worst, 10 * np.log10(power / max(np.square(error).sum(), 1e-30)))
    return f"{worst:.0f} dB"


if __name__ == "__main__":
    main()
