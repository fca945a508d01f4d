"""Rank the layers of real models by what INT8 costs in them, in one pass; beside the layer-by-layer way and bare FP32.

    python benchmarks/sensitivity.py [rec4 cls 320n] [--dialect tvm] [--samples 8 16 32] [--times]

Ratios are of CPU time, 1 thread, best of interleaved rounds, and told two ways. `rank_layers` is always all of it:
loading and quantizing the model, building the measuring one, its session, the pass. "of a forward" holds that against
running the samples alone, in a session that is there already; "with its session" against making the session, too, which
is what a program that runs these samples once has to do. What does not depend on the samples is told apart.

After the times, at the first number of samples: "true" quantizes one layer at a time, runs the whole
model for each, and takes the SQNR of the output before its last Softmax or Sigmoid; Spearman's rho compares the two.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from int8_tasks import TASKS, Task
from numpy.typing import NDArray

from modelforge.errors import UnsupportedError
from modelforge.graph.prepare import prepare
from modelforge.quantize import sensitivity
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.qdq import quantize_model
from modelforge.quantize.ranges import RangeTable
from modelforge.samples import stream_samples

Array = NDArray[Any]
KEPT = (0, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=["rec4", "cls", "320n"])
    parser.add_argument("--dialect", default="tvm", help="tvm quantizes all 47 layers of rec4")
    parser.add_argument("--samples", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", action="store_true", help="nothing but the times: not layer by layer")
    options = parser.parse_args()
    for name in options.tasks:
        with tempfile.TemporaryDirectory() as folder:
            Bench(TASKS[name](64), Path(folder), options).run()


class Bench:
    def __init__(self, task: Task, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.folder, self.dialect, self.count = task.name, folder, options.dialect, options.samples[0]
        self.rounds, self.options = options.rounds, options
        self.input = next(iter(task.shapes))
        prepare(task.model, folder / "prepared", task.shapes)
        self.model = folder / "model.onnx"
        onnx.save(_without_last_activation(onnx.load(folder / "prepared/model.onnx")), self.model)
        self.samples, self.evaluation = folder / "samples.npz", task.evaluation
        np.savez(self.samples, **{self.input: task.calibration})
        self.calibration = task.calibration[: self.count]
        self.table: RangeTable = calibrate(self.model, self.samples)

    def run(self) -> None:
        local = self.rank()
        print(f"\n{self.name}, {self.dialect}: {len(local.ranking)} layers in {len(local.blocks)} blocks")
        print("  samples  forward  +session     pass  rank_layers (ms)   of a forward  with its session")
        found: dict[int, tuple[float, float, float, float]] = {}
        for count in self.options.samples:
            self.count = count
            bare, loaded, passed, whole = found[count] = self.times()
            print(
                f"  {count:7}{bare * 1e3:9.1f}{loaded * 1e3:10.1f}{passed * 1e3:9.1f}{whole * 1e3:13.1f}"
                f"{whole / bare:20.2f}{whole / loaded:18.2f}"
            )
        self.count = self.options.samples[0]
        bare, loaded, passed, whole = found[self.count]
        print(
            f"  whatever the samples: {(whole - passed) * 1e3:.0f} ms, beside {(loaded - bare) * 1e3:.0f} of a session"
        )
        if self.options.times:
            return
        start = time.process_time()
        reference = self.forward(self.model, self.calibration)
        true: dict[str, float] = {}
        for layer in local.ranking:
            # A Concat or an Add is not quantized on its own account: there is nothing to run.
            with suppress(UnsupportedError):
                true[layer.node] = self.sqnr_db(self.all_but([layer.node], local), reference)
        slow = time.process_time() - start
        print(f"  layer by layer            {slow * 1000:8.1f} ms   {slow / bare:6.2f}x  ({slow / whole:.0f}x of that)")
        alone = [layer for layer in local.ranking if layer.node in true]
        rho = spearman([layer.sqnr_db for layer in alone], [true[layer.node] for layer in alone])
        print(f"  Spearman(local, true) {rho:.2f}, of {len(alone)} layers")
        names = [layer.node for layer in alone]
        self.compare(names, sorted(names, key=lambda name: true[name]))

    def compare(self, local: list[str], true: list[str]) -> None:
        """SQNR of the output over samples that neither ranking saw, the first n of each ranking kept in float."""
        shuffled = random.Random(7).sample(local, len(local))
        reference = self.forward(self.model, self.evaluation)
        print("  SQNR in dB, kept in float:" + "".join(f"{kept:>8}" for kept in KEPT))
        for title, ranking in (("local", local), ("true", true), ("random", shuffled), ("best last", local[::-1])):
            found = [
                self.sqnr_db(self.quantized(ranking[:kept]), reference, self.evaluation)
                for kept in KEPT
                if kept < len(ranking)
            ]
            print(f"    {title:24}" + "".join(f"{each:8.2f}" for each in found))

    def times(self) -> tuple[float, float, float, float]:
        """Bare forward, from the made session to the last sample, and with the making; the pass; all of rank_layers."""
        found: dict[str, list[float]] = {"bare": [], "loaded": [], "pass": [], "whole": []}
        for _ in range(self.rounds):
            with clock(found["loaded"]):
                session = _session(self.model)
                with clock(found["bare"]):
                    for _, rows in islice(stream_samples(self.samples, [self.input]), self.count):
                        session.run(None, rows)
            with clock(found["whole"]), passes_clocked(found["pass"]):
                self.rank()
        return min(found["bare"]), min(found["loaded"]), min(found["pass"]), min(found["whole"])

    def rank(self) -> sensitivity.Sensitivity:
        return sensitivity.rank_layers(self.model, self.table, self.samples, dialect=self.dialect, count=self.count)

    def all_but(self, kept: Collection[str], ranked: sensitivity.Sensitivity) -> Path:
        return self.quantized([layer.node for layer in ranked.ranking if layer.node not in kept])

    def quantized(self, exclude: Collection[str]) -> Path:
        folder = self.folder / "quantized"
        quantize_model(self.model, self.table, folder, dialect=self.dialect, exclude=exclude)
        return folder / "model.onnx"

    def forward(self, model: Path, samples: Array) -> Array:
        session = _session(model)
        return np.concatenate([session.run(None, {self.input: row[np.newaxis]})[0] for row in samples])

    def sqnr_db(self, model: Path, reference: Array, samples: Array | None = None) -> float:
        exact = reference.astype(np.float64)
        noise = exact - self.forward(model, self.calibration if samples is None else samples)
        return float(10 * np.log10(np.sum(exact**2) / max(float(np.sum(noise**2)), 1e-300)))


@contextmanager
def clock(seconds: list[float]) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds.append(time.process_time() - start)


@contextmanager
def passes_clocked(seconds: list[float]) -> Iterator[None]:
    """Clock the pass itself inside rank_layers: from the made session to the last sample."""
    run: Callable[..., Any] = sensitivity._run

    def clocked(*arguments: Any) -> Any:
        with clock(seconds):
            return run(*arguments)

    sensitivity._run = clocked
    try:
        yield
    finally:
        sensitivity._run = run


def spearman(first: list[float], second: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def _without_last_activation(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give out what the last Softmax or Sigmoid reads: a saturated probability says nothing about noise."""
    producers = {output: node for node in model.graph.node for output in node.output}
    for value in model.graph.output:
        node = producers[value.name]
        if node.op_type in ("Softmax", "Sigmoid"):
            known = next(each for each in model.graph.value_info if each.name == node.input[0])
            value.CopyFrom(known)  # with its shape, which `prepare` has inferred
            model.graph.node.remove(node)
    return model


def _session(model: Path) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
