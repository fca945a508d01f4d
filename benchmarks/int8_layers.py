"""INT8 beside float of single layers and blocks in ONNX Runtime on this CPU: where the x86 dialect's rules come from.

    python benchmarks/int8_layers.py

Layers as they stand between float activations (a Q before, a DQ behind), and MobileNetV2 blocks as runs of integers.
One thread, medians of interleaved rounds. A ratio below 1 says that INT8 is slower there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.dialects import DIALECTS
from modelforge.quantize.dialects.rules import Dialect
from modelforge.quantize.qdq import quantize_model

ROUNDS = 60
Shape = tuple[int, int, int]
"""Channels, height, width."""
LAYERS = [
    *[(channels, 1, False, (24, 96)) for channels in (8, 16, 24, 32, 64, 128)],
    *[(channels, 3, True, (24, 96)) for channels in (8, 16, 32, 64, 128)],
    *[(channels, 5, True, (6, 80)) for channels in (64, 240, 480)],
    *[(channels, 3, False, (24, 96)) for channels in (16, 32, 64)],
]
BLOCKS = [(8, 24, 3, 24), (16, 32, 3, 56), (24, 144, 3, 56), (64, 384, 3, 14), (96, 576, 3, 14), (32, 200, 5, 12)]


def main() -> None:
    print("a layer between float activations:      float ms  int8 ms  times as fast")
    for channels, kernel, depthwise, (height, width) in LAYERS:
        specs = [(channels, channels, kernel, depthwise)] * 4
        exact, quantized = measure(specs, "HardSwish", (channels, height, width))
        title = f"{kernel}x{kernel} {'depthwise' if depthwise else 'dense'}, {channels} channels, {height}x{width}"
        print(f"  {title:38}{exact:8.3f}{quantized:9.3f}{exact / quantized:11.2f}")
    print("three blocks: 1x1, depthwise, 1x1")
    for activation in ("Relu", "HardSwish"):
        for outside, inside, kernel, size in BLOCKS:
            block = [(outside, inside, 1, False), (inside, inside, kernel, True), (inside, outside, 1, False)]
            exact, quantized = measure(block * 3, activation, (outside, size, size))
            title = f"{activation}, {outside} and {inside} channels, {kernel}x{kernel}, {size}x{size}"
            print(f"  {title:38}{exact:8.3f}{quantized:9.3f}{exact / quantized:11.2f}")


def measure(specs: Sequence[tuple[int, int, int, bool]], activation: str, shape: Shape) -> tuple[float, float]:
    """Median milliseconds in FP32, and with every layer in INT8 whatever the dialect's rules for speed say."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(_model(specs, activation, shape), folder / "model.onnx")
        x = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
        table = calibrate(folder / "model.onnx", [{"x": x}])
        rules = DIALECTS["onnxruntime-x86"]
        try:
            DIALECTS["onnxruntime-x86"] = _everything(rules)
            quantize_model(folder / "model.onnx", table, folder / "int8", dialect="onnxruntime-x86")
        finally:
            DIALECTS["onnxruntime-x86"] = rules
        sessions = [_session(folder / "model.onnx"), _session(folder / "int8" / "model.onnx")]
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for session, taken in zip(sessions, times, strict=True):
                start = time.perf_counter()
                session.run(None, {"x": x})
                taken.append(time.perf_counter() - start)
    return float(np.median(times[0])) * 1e3, float(np.median(times[1])) * 1e3


def _everything(rules: Dialect) -> Dialect:
    from dataclasses import replace

    return replace(rules, shortest_sum=0, fewest_channels=0)


def _model(specs: Sequence[tuple[int, int, int, bool]], activation: str, shape: Shape) -> onnx.ModelProto:
    random = np.random.default_rng(1)
    nodes = [helper.make_node("HardSwish", ["x"], ["in"], name="first")]
    weights, value = [], "in"
    for place, (before, behind, kernel, depthwise) in enumerate(specs):
        size = (behind, 1 if depthwise else before, kernel, kernel)
        weight = random.normal(size=size) / np.sqrt(np.prod(size[1:]))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{place}"))
        groups = before if depthwise else 1
        pads = [kernel // 2] * 4
        conv, out = f"c{place}", f"a{place}"
        nodes.append(helper.make_node("Conv", [value, f"w{place}"], [conv], name=conv, group=groups, pads=pads))
        value = conv
        if activation == "HardSwish" or depthwise or behind > before:  # a projection is linear in these blocks
            nodes.append(helper.make_node(activation, [conv], [out], name=out))
            value = out
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *shape])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def _session(model: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
