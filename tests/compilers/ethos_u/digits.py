"""The digits model as int8 TFLite: what a user's own converter would give, from our ranges and weights."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from modelforge.graph.prepare import prepare
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.dialects import get_dialect
from modelforge.quantize.qdq import activation_parameters
from modelforge.quantize.weights import quantize_bias, quantize_weight
from tests.conftest import ROOT

DIGITS = ROOT / "recipes" / "digits"
_SAME, _VALID, _NONE = 0, 1, 0


def describe(folder: Path, *, floats: bool = False) -> dict[str, Any]:
    """Tensors and operators for ``write_tflite.py``: NHWC, int8 throughout or float throughout."""
    prepare(DIGITS / "model.onnx", folder, {"x": (1, 1, 8, 8)}, sizes={})
    table = calibrate(folder / "model.onnx", DIGITS / "calibration.npz")
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx")).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.initializer}
    values = [*model.input, *model.value_info, *model.output]
    shapes = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values}
    tensors: dict[str, dict[str, Any]] = {}
    operators = []

    def activation(name: str, like: str | None = None) -> str:
        if name not in tensors:
            shape = shapes[name]
            found = activation_parameters(table[name], get_dialect("rockchip"), "minmax")
            scale, zero = (
                (tensors[like]["scale"], tensors[like]["zero"]) if like else ([found.scale], [found.zero_point])
            )
            quantized = {"dtype": "int8", "scale": scale, "zero": zero}
            plain = {"dtype": "float32", "scale": None, "zero": None}
            nhwc = [shape[0], *shape[2:], shape[1]] if len(shape) == 4 else shape
            tensors[name] = {"name": name, "shape": nhwc, "data": None, **(plain if floats else quantized)}
        return name

    def constant(name: str, array: Any, scale: Any = None) -> str:
        dtype = {"float64": "float32"}.get(array.dtype.name, array.dtype.name)
        zero = None if scale is None else [0] * np.size(scale)
        scales = None if scale is None else np.atleast_1d(scale).tolist()
        tensors[name] = {
            "name": name, "shape": list(array.shape), "dtype": dtype, "data": array.tolist(),
            "scale": scales, "zero": zero,
        }  # fmt: skip
        return name

    def weighted(node: onnx.NodeProto) -> list[str]:
        source, weight, bias = activation(node.input[0]), weights[node.input[1]], weights[node.input[2]].reshape(-1)
        if node.op_type == "Conv":
            weight = weight.transpose(0, 2, 3, 1)
        if floats:
            return [source, constant(f"{node.name}/w", weight), constant(f"{node.name}/b", bias)]
        quantized = quantize_weight(weight, 0 if node.op_type == "Conv" else None)
        numbers, scale = quantize_bias(bias, tensors[source]["scale"][0], quantized.scale)
        return [
            source,
            constant(f"{node.name}/w", quantized.values, quantized.scale),
            constant(f"{node.name}/b", numbers, scale),
        ]

    for node in model.node:
        inputs, options = [], None
        op = {"Conv": "CONV_2D", "Gemm": "FULLY_CONNECTED", "Flatten": "RESHAPE", "GlobalAveragePool": "MEAN"}.get(
            node.op_type, {"MaxPool": "MAX_POOL_2D"}.get(node.op_type, node.op_type.upper())
        )
        like = node.input[0] if node.op_type in ("MaxPool", "Flatten") else None
        if node.op_type == "Conv":
            inputs = weighted(node)
            options = {"kind": "Conv2DOptions", "padding": _SAME, "strideW": 1, "strideH": 1}
            options |= {"dilationWFactor": 1, "dilationHFactor": 1}
        elif node.op_type == "Gemm":
            inputs, options = weighted(node), {"kind": "FullyConnectedOptions"}
        elif node.op_type == "MaxPool":
            inputs = [activation(node.input[0])]
            options = {"kind": "Pool2DOptions", "padding": _VALID, "strideW": 2, "strideH": 2}
            options |= {"filterWidth": 2, "filterHeight": 2}
        elif node.op_type == "GlobalAveragePool":
            inputs = [activation(node.input[0]), constant(f"{node.name}/axes", np.array([1, 2], np.int32))]
            options = {"kind": "ReducerOptions", "keepDims": True}
        elif node.op_type == "Flatten":
            shape = np.array(shapes[node.output[0]], np.int32)
            inputs = [activation(node.input[0]), constant(f"{node.name}/shape", shape)]
            options = {"kind": "ReshapeOptions", "newShape": shape.tolist()}
        elif node.op_type == "Add":
            inputs, options = [activation(name) for name in node.input], {"kind": "AddOptions"}
        else:
            assert node.op_type == "Relu", node.op_type
            inputs = [activation(node.input[0])]
        operators.append({"op": op, "inputs": inputs, "output": activation(node.output[0], like), "options": options})
    return {"tensors": list(tensors.values()), "operators": operators, "inputs": ["x"], "outputs": ["logits"]}


def write(description: dict[str, Any], out: Path, python: Path) -> Path:
    """Write it with the interpreter of the ethos-u environment."""
    out.parent.mkdir(parents=True, exist_ok=True)
    plain = out.with_suffix(".json")
    plain.write_text(json.dumps(description))
    script = Path(__file__).parent / "write_tflite.py"
    done = subprocess.run(
        [str(python), "-I", str(script), str(plain), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out
