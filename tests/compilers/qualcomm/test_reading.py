"""What is read of a lowered model, and of a context that something else wrote. Needs no toolchain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from modelforge.compilers.qualcomm.building import _explained
from modelforge.compilers.qualcomm.reading import describe, read_context
from modelforge.errors import BuildError, UnsupportedError

N = helper.make_node
CHIP = "v2:6:2.51.0:5.51.0:73:43:0:0"


def context(path: Path, *, beside: bool = False, chip: str = CHIP, sdk: str = "v2.51.0.260929181845") -> dict[str, Any]:
    facts = {"embed_mode": 0, "ep_cache_context": "main_qnn.bin", "ep_sdk_version": sdk}
    node = N("EPContext", ["x"], ["y"], "node", domain="com.microsoft", **facts)
    nodes = [node, N("Relu", ["y"], ["z"], "left_over")] if beside else [node]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [1])], [value(nodes[-1].output[0], TensorProto.FLOAT, [1])]
    )
    model = helper.make_model(graph)
    entry = model.metadata_props.add()
    entry.key, entry.value = "ep_compatibility_info.QNNExecutionProvider", chip
    onnx.save(model, path)
    return {"context": str(path), "soc_model": 43, "htp_arch": 73}


def test_one_context_for_the_chip(tmp_path: Path) -> None:
    answer = read_context(context(tmp_path / "main.onnx"))
    assert (answer["qnn"], answer["file"]) == ("2.51.0", "main_qnn.bin")


def test_a_node_beside_the_context_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"not all of the model is on the NPU.*left_over \(Relu\)"):
        read_context(context(tmp_path / "main.onnx", beside=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chip": "v2:6:2.51.0:5.51.0:75:43:0:0"}, r"\['75', '43'\], and \['73', '43'\] was asked for"),
        ({"chip": ""}, "was asked for"),
        ({"sdk": ""}, "does not say which QNN"),
    ],
)
def test_a_context_for_something_else_is_refused(tmp_path: Path, change: dict[str, str], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        read_context(context(tmp_path / "main.onnx", **change))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    request = context(tmp_path / "main.onnx")
    (tmp_path / "main.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(BuildError, match="cannot be read"):
        read_context(request)


def test_a_quantized_model_has_no_float_node(int8: Path, prepared: Path, fp16: Path, tmp_path: Path) -> None:
    def read(model: Path) -> dict[str, Any]:
        return describe({"model": str(model), "folder": str(tmp_path / model.parent.name), "sizes": {"batch": 2}})

    quantized = read(int8)
    assert quantized["float_nodes"] == []
    assert quantized["operators"] == 18
    assert quantized["inputs"] == [{"name": "x", "dtype": "float32", "shape": [2, 1, 8, 8]}]
    exact = read(prepared)
    assert len(exact["float_nodes"]) == exact["operators"] == 18
    assert exact["macs"] == quantized["macs"] == read(fp16)["macs"]
    assert read(fp16)["float_nodes"] == [], "FP16 is what the chip computes in"


def shared_constant(path: Path) -> None:
    """``(x * 6) / 6``, both numbers stored as 255, in one tensor."""
    scalar = onnx.numpy_helper.from_array
    numbers = {"six_scale": 6 / 255, "sixth_scale": 1 / 6 / 255, "x_scale": 4 / 255, "much_scale": 24 / 255}
    weights = [scalar(np.array(value, np.float32), name) for name, value in numbers.items()]
    weights += [scalar(np.array(255, np.uint8), "full"), scalar(np.array(0, np.uint8), "zero")]
    nodes = []

    def pair(name: str, scale: str) -> str:
        nodes.append(N("QuantizeLinear", [name, scale, "zero"], [f"{name}_q"], f"{name}_q"))
        nodes.append(N("DequantizeLinear", [f"{name}_q", scale, "zero"], [f"{name}_d"], f"{name}_d"))
        return f"{name}_d"

    scales = [("six", "six_scale"), ("sixth", "sixth_scale")]
    nodes.extend(N("DequantizeLinear", ["full", scale, "zero"], [name], f"{name}_dq") for name, scale in scales)
    nodes.append(N("Mul", [pair("x", "x_scale"), "six"], ["much"], "times"))
    nodes.append(N("Mul", [pair("much", "much_scale"), "sixth"], ["back"], "over"))
    nodes.append(N("QuantizeLinear", ["back", "x_scale", "zero"], ["back_q"], "back_q"))
    nodes.append(N("DequantizeLinear", ["back_q", "x_scale", "zero"], ["y"], "back_d"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [1, 8])], [value("y", TensorProto.FLOAT, [1, 8])], weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def test_a_constant_that_two_scales_read_is_copied(tmp_path: Path) -> None:
    shared_constant(tmp_path / "model.onnx")
    answer = describe({"model": str(tmp_path / "model.onnx"), "folder": str(tmp_path / "own"), "sizes": {}})
    model = onnx.load(answer["model"])
    read = [node.input[0] for node in model.graph.node if node.name in ("six_dq", "sixth_dq")]
    assert len(set(read)) == 2
    assert set(read) <= {tensor.name for tensor in model.graph.initializer}
    x = {"x": np.linspace(0, 4, 8, dtype=np.float32).reshape(1, 8)}
    sessions = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (tmp_path / "model.onnx", answer["model"])
    ]
    assert (sessions[0].run(None, x)[0] == sessions[1].run(None, x)[0]).all()


def test_a_refusal_says_what_the_log_says() -> None:
    """Both lines as onnxruntime-qnn 2.7.0 writes them."""
    error = BuildError("FAIL : This session contains graph nodes that are assigned to the default CPU EP")
    log = (
        "[W:onnxruntime:, qnn.cc:1] The SocModel doesn't support FP16\n"
        "[E:onnxruntime:, qnn_execution_provider.cc:2453 GetCapabilityImpl] Unsupported nodes in QNN EP: "
        "{ name: logits, type: Gemm }{ name: stem_relu, type: Relu }\n"
    ) * 2
    told = _explained(error, log, "a-tag")
    assert isinstance(told, UnsupportedError)
    assert told.what.startswith("2 nodes cannot run on the tensor processor: logits (Gemm), stem_relu (Relu) ")
    assert told.what.endswith("(The SocModel doesn't support FP16)")
    assert _explained(error, "nothing", "a-tag") is error
