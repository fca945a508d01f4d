"""INT8 accuracy of our dialects beside ONNX Runtime's own quantizer: same models, same samples, one run.

Plain INT8, with what ``quantize_best`` chooses on 32 calibration samples; no layer is left out by a search.
``python benchmarks/int8_accuracy.py [task ...] [--plain]``; about five minutes on two cores. ``--plain`` shows, too,
what each dialect gives without equalization, bias correction and choice of the method.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from int8_tasks import TASKS, Array, Task, detections
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from modelforge.graph.prepare import prepare
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.equalize import weighted_inputs
from modelforge.quantize.improve import quantize_best
from modelforge.quantize.qdq import quantize_model

DIALECTS = ("onnxruntime-x86", "tensorrt", "ascend")
BATCH = 8


def main(names: list[str]) -> None:
    logging.getLogger().setLevel(logging.ERROR)  # quantize_static advises preprocessing through the root logger
    head = ("model", "quantized by", "metric", "value", "drop", "allowed", "SQNR dB", "agree", "seconds", "chosen")
    print(("{:7}{:34}{:12}{:>8}{:>8}{:>8}{:>9}{:>8}{:>9}  {}").format(*head))
    plain = "--plain" in names
    for name in [name for name in names if name in TASKS] or list(TASKS):
        with tempfile.TemporaryDirectory() as folder:
            measure(TASKS[name](), Path(folder), plain)


def measure(task: Task, work: Path, plain: bool) -> None:
    prepare(task.model, work / "fp32", task.shapes)
    model = work / "fp32" / "model.onnx"
    exact = infer(model, task.evaluation)
    truth = exact if task.truth is None else task.truth
    baseline = task.score(exact, truth)
    row(task, "FP32", exact, exact, baseline, 0.0, "")
    if task.name == "320n":
        print(f"       {sum(len(detections(image)) for image in exact)} detections in {len(exact)} images")
    key = next(iter(task.shapes))

    def feeds() -> Iterator[dict[str, Array]]:
        for start in range(0, len(task.calibration), BATCH):
            yield {key: task.calibration[start : start + BATCH]}

    def ranges(path: Path) -> Any:
        names = weighted_inputs(path)
        return calibrate(path, feeds(), channels=names)

    started = time.perf_counter()
    table = ranges(model)
    print(f"       calibration {time.perf_counter() - started:.1f} s")
    for dialect in DIALECTS:
        if plain:
            started = time.perf_counter()
            quantize_model(model, table, work / "plain", dialect=dialect)
            seconds = time.perf_counter() - started
            outputs = infer(work / "plain" / "model.onnx", task.evaluation)
            row(task, f"{dialect}, plain", outputs, exact, baseline, seconds, "auto", task.allowed[dialect])
        started = time.perf_counter()
        best = quantize_best(model, table, work / dialect, dialect=dialect, feeds=feeds, calibrate=ranges)
        seconds = time.perf_counter() - started
        chosen = best.chosen
        text = f"{chosen.start}, {chosen.method}" + (", bias corrected" if chosen.corrected else "")
        outputs = infer(work / dialect / "model.onnx", task.evaluation)
        row(task, dialect, outputs, exact, baseline, seconds, text, task.allowed[dialect])
    for label, ops in (("ORT MinMax, Conv/MatMul/Gemm", ["Conv", "MatMul", "Gemm"]), ("ORT MinMax, all ops", None)):
        started = time.perf_counter()
        try:
            peer(model, work / "peer.onnx", task, ops)
        except Exception as error:  # the peer's crash is a result: it is printed
            print(f"{task.name:7}{label:34}crash: {type(error).__name__}: {str(error)[:80]}")
            continue
        seconds = time.perf_counter() - started
        row(task, label, infer(work / "peer.onnx", task.evaluation), exact, baseline, seconds, "")


def row(
    task: Task,
    label: str,
    outputs: Array,
    exact: Array,
    baseline: float,
    seconds: float,
    chosen: str,
    allowed: float | None = None,
) -> None:
    value = task.score(outputs, exact if task.truth is None else task.truth)
    energy = float(np.square(exact, dtype=np.float64).sum())
    noise = float(np.square(exact.astype(np.float64) - outputs).sum())
    sqnr = 10 * np.log10(energy / noise) if noise else float("inf")
    agree = "-" if task.truth is None else f"{np.mean(exact.argmax(-1) == outputs.argmax(-1)):.4f}"
    drop = baseline - value
    limit = "" if allowed is None else f"{allowed:.4f}"
    verdict = "" if allowed is None else ("met" if drop <= allowed + 1e-9 else "MISSED")
    print(
        f"{task.name:7}{label:34}{task.metric:12}{value:8.4f}{drop:8.4f}{limit:>8}{sqnr:9.1f}{agree:>8}{seconds:9.1f}"
        f"  {verdict} {chosen}",
        flush=True,
    )


def infer(model: Path, inputs: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    starts = range(0, len(inputs), BATCH)
    return np.concatenate([session.run(None, {name: inputs[start : start + BATCH]})[0] for start in starts])


def peer(model: Path, output: Path, task: Task, ops: list[str] | None) -> None:
    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.feeds = iter(task.calibration)

        def get_next(self) -> dict[str, Array] | None:
            sample = next(self.feeds, None)
            return None if sample is None else {next(iter(task.shapes)): sample[None]}

    quantize_static(
        str(model),
        str(output),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=ops,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
