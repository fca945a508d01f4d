"""INT8 accuracy of the files that ship, beside ONNX Runtime's own quantizer: same models, same samples, one run.

    python benchmarks/int8_accuracy.py [task ...] [--quick] [--seeds N] [--dialects NAME ...]

The `int8` rung as the forge lowers it (its own worker functions) with 32 calibration samples, each lowered model run
with its rounding made explicit: TensorRT's rest in FP16, Ascend's own nodes. No layer is left out by a search.
``--seeds N`` evaluates rec4 and cls on N sets of freshly rendered lines, which nothing was tuned on, and prints the
mean drop with its spread over the sets: one line of 512 is 0.2 points. ``--quick``: fewer samples, x86 and TensorRT
only, no peer; under two minutes. Else about ten on two cores.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from int8_tasks import TASKS, Array, Task, detections, fresh
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from modelforge.forge import worker
from modelforge.graph.prepare import prepare

DIALECTS = ("onnxruntime-x86", "tensorrt", "ascend", "tvm")
BATCH = 8
FRESH = 512
"""Lines in a fresh set, with --quick too."""
FIRST_SEED = 8001
"""Of the fresh sets. Development saw 11, 12, 21, 22, 901, and those from 7001 to 7012."""


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)  # quantize_static advises preprocessing through the root logger
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="task", help=", ".join(TASKS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--dialects", nargs="+", choices=DIALECTS, default=[])
    options = parser.parse_args()
    head = ("model", "quantized by", "metric", "value", "drop", "allowed", "SQNR dB", "agree", "seconds", "chosen")
    print(("{:7}{:34}{:12}{:>8}{:>8}{:>8}{:>9}{:>8}{:>9}  {}").format(*head))
    for name in options.tasks or list(TASKS):
        with tempfile.TemporaryDirectory() as folder:
            task = TASKS[name](*([128] if options.quick else []))
            Bench(task, Path(folder), options).run()


class Bench:
    def __init__(self, task: Task, work: Path, options: argparse.Namespace) -> None:
        self.task, self.work, self.options = task, work, options
        self.dialects = options.dialects or (DIALECTS[:2] if options.quick else DIALECTS)
        prepare(task.model, work / "fp32", task.shapes)
        self.model = work / "fp32" / "model.onnx"
        self.exact = infer(self.model, task.evaluation)
        self.baseline = task.score(self.exact, self.exact if task.truth is None else task.truth)

    def run(self) -> None:
        task = self.task
        self.row("FP32", self.exact, 0.0, "")
        if task.name == "320n":
            count = sum(len(detections(image)) for image in self.exact)
            print(f"       {count} detections in {len(self.exact)} images")
        samples, ranges = self.work / "samples.npz", self.work / "ranges.json"
        np.savez(samples, **{next(iter(task.shapes)): task.calibration})
        started = time.perf_counter()
        worker.calibrate(
            {"model": str(self.model), "samples": str(samples), "out": str(ranges), "data_digest": "benchmark"}
        )
        print(f"       calibration {time.perf_counter() - started:.1f} s")
        shipped: dict[str, Path] = {}
        for dialect in self.dialects:
            started = time.perf_counter()
            shipped[dialect], chosen = self.lowered(dialect, samples, ranges)
            seconds = time.perf_counter() - started
            self.row(dialect, infer(shipped[dialect], task.evaluation), seconds, chosen, task.allowed[dialect])
        if not self.options.quick:
            self.peers()
        if self.options.seeds and task.name in ("rec4", "cls"):
            self.fresh_sets(shipped)

    def lowered(self, dialect: str, samples: Path, ranges: Path) -> tuple[Path, str]:
        """What the forge would give the compiler, as ONNX Runtime can run it; and what was chosen."""
        folder = self.work / dialect
        how = {"dialect": dialect, "method": "auto", "reduce_range": False, "exclude": (), "precision": "int8"}
        request = {"model": str(self.model), "folder": str(folder), "samples": str(samples), "ranges": str(ranges)}
        facts = worker.lower({**request, **how})
        chosen = facts["chosen"]
        text = f"{chosen['start']}, {chosen['method']}" + (", bias corrected" if chosen["corrected"] else "")
        text += f"; {len(facts['quantize']['quantized'])} nodes quantized"
        ran = worker.emulate({"model": str(folder / "model.onnx"), "folder": str(folder / "emulated")})["model"]
        return Path(ran or folder / "model.onnx"), text

    def peers(self) -> None:
        task = self.task
        for label, ops in (("ORT MinMax, Conv/MatMul/Gemm", ["Conv", "MatMul", "Gemm"]), ("ORT MinMax, all ops", None)):
            started = time.perf_counter()
            try:
                peer(self.model, self.work / "peer.onnx", task, ops)
            except Exception as error:  # the peer's crash is a result: it is printed
                print(f"{task.name:7}{label:34}crash: {type(error).__name__}: {str(error)[:80]}")
                continue
            self.row(label, infer(self.work / "peer.onnx", task.evaluation), time.perf_counter() - started, "")

    def fresh_sets(self, models: dict[str, Path]) -> None:
        """The drop on each of several sets that no choice has seen."""
        drops: dict[str, list[float]] = {name: [] for name in models}
        changed = dict.fromkeys(models, 0)
        count = 0
        for seed in range(FIRST_SEED, FIRST_SEED + self.options.seeds):
            inputs, truth = fresh(self.task.name, seed, FRESH)
            exact = infer(self.model, inputs)
            baseline, decided = self.task.score(exact, truth), exact.argmax(-1)
            count += len(inputs)
            for name, model in models.items():
                outputs = infer(model, inputs)
                drops[name].append(baseline - self.task.score(outputs, truth))
                differs = decided != outputs.argmax(-1)
                changed[name] += int(differs.reshape(len(inputs), -1).any(axis=1).sum())
        for name, found in drops.items():
            mean, spread = np.mean(found) * 100, np.std(found) * 100
            limit = self.task.allowed[name] * 100
            verdict = "met" if mean <= limit + 1e-9 else "MISSED"
            each = " ".join(f"{drop * 100:+.2f}" for drop in found)
            print(
                f"{self.task.name:7}{name:18}{count} fresh samples: drop {mean:+.2f} points, spread {spread:.2f} "
                f"(allowed {limit:.2f}, {verdict}); by set {each}; another decision anywhere: {changed[name]}",
                flush=True,
            )

    def row(self, label: str, outputs: Array, seconds: float, chosen: str, allowed: float | None = None) -> None:
        task, exact = self.task, self.exact
        value = task.score(outputs, exact if task.truth is None else task.truth)
        energy = float(np.square(exact, dtype=np.float64).sum())
        noise = float(np.square(exact.astype(np.float64) - outputs).sum())
        sqnr = 10 * np.log10(energy / noise) if noise else float("inf")
        agree = "-" if task.truth is None else f"{np.mean(exact.argmax(-1) == outputs.argmax(-1)):.4f}"
        drop = self.baseline - value
        limit = "" if allowed is None else f"{allowed:.4f}"
        verdict = "" if allowed is None else ("met" if drop <= allowed + 1e-9 else "MISSED")
        print(
            f"{task.name:7}{label:34}{task.metric:12}{value:8.4f}{drop:8.4f}{limit:>8}{sqnr:9.1f}{agree:>8}"
            f"{seconds:9.1f}  {verdict} {chosen}",
            flush=True,
        )


def infer(model: Path, inputs: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    starts = range(0, len(inputs), BATCH)
    return np.concatenate([session.run(None, {name: inputs[start : start + BATCH]})[0] for start in starts])


def peer(model: Path, output: Path, task: Task, ops: Sequence[str] | None) -> None:
    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.feeds = iter(task.calibration)

        def get_next(self) -> dict[str, Array] | None:
            sample = next(self.feeds, None)
            return None if sample is None else {next(iter(task.shapes)): sample[None]}

    chosen: Any = None if ops is None else list(ops)
    quantize_static(
        str(model),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=chosen,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


if __name__ == "__main__":
    main()
