"""One quantized layer as a QDQ model, compiled here, beside ONNX Runtime; and what its outputs may differ by."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.tvm.machine import Machine

Array = np.ndarray[Any, Any]
N = helper.make_node


class Layers:
    """Builds a QDQ model node by node: float in, float out, with the numbers of the last Q kept as int8."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.shape = shape
        self.value = "x"

    def constant(self, array: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(N(op, list(inputs), [output], **attributes))
        return output

    def quantize(self, scale: float, zero: int, dtype: str = "int8") -> str:
        """Q and DQ behind the last value."""
        parameters = (self.constant(np.float32(scale)), self.constant(np.array(zero, dtype)))
        stored = self.node("QuantizeLinear", self.value, *parameters)
        self.value = self.node("DequantizeLinear", stored, *parameters)
        return self.value

    def weight(self, shape: tuple[int, ...], axis: int | None) -> str:
        """A constant int8 weight and its DQ, with a scale for each channel along ``axis``."""
        scale = self.rng.uniform(0.002, 0.01, () if axis is None else shape[axis]).astype(np.float32)
        values = self.rng.integers(-127, 128, shape).astype(np.int8)
        inputs = [self.constant(values), self.constant(scale), self.constant(np.zeros(scale.shape, np.int8))]
        return self.node("DequantizeLinear", *inputs, **({} if axis is None else {"axis": axis}))

    def bias(self, count: int) -> str:
        return self.constant(self.rng.normal(size=count).astype(np.float32))

    def convolution(self, channels: int, kernel: tuple[int, int], group: int = 1, **attributes: Any) -> str:
        inputs = attributes.pop("inputs", self.shape[1])
        weight = self.weight((channels, inputs // group, *kernel), 0)
        self.value = self.node("Conv", self.value, weight, self.bias(channels), group=group, **attributes)
        return self.value

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "layers",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(self.value, TensorProto.FLOAT, None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def spread(model: onnx.ModelProto, x: Array) -> float:
    """A step of int8 for the model's output: its largest value in 127 steps."""
    return float(np.abs(reference(model, x)).max() / 127) or 1.0


def reference(model: onnx.ModelProto, x: Array) -> Array:
    """What ONNX Runtime gives for the QDQ model as it is written, without fusing anything."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    result: Array = session.run(None, {"x": x})[0]
    return result


def compiled(model: onnx.ModelProto, machine: Machine) -> tuple[Any, list[Any]]:
    """The executable and the report for each kernel."""
    from modelforge.compilers.tvm import lowering, scheduling
    from modelforge.compilers.tvm.api import target, tvm

    module = lowering.lower(imported(model), machine)
    module, reports = scheduling.schedule_all(module, machine)
    return tvm.compile(module, target(machine)), reports


def imported(model: onnx.ModelProto) -> Any:
    """The model as a module of Relax."""
    from modelforge.compilers.tvm import frontend

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return frontend.import_entries({"main": path})


def run(executable: Any, x: Array) -> Array:
    from modelforge.compilers.tvm.api import relax, tvm

    result: Array = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    return result


def rules(reports: list[Any]) -> set[str]:
    """The rules that sums were scheduled by; a kernel that its rule failed on says "generic"."""
    return {report.rule for report in reports if report.macs}


def steps_apart(ours: Array, theirs: Array, scale: float) -> int:
    """The largest difference of two dequantized outputs, in steps of their scale."""
    assert ours.shape == theirs.shape
    return int(np.abs(np.rint(ours / scale) - np.rint(theirs / scale)).max())
