"""What is read of a lowered model, and of a context that something else wrote. Needs no toolchain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from modelforge.compilers.qualcomm.building import _explained
from modelforge.compilers.qualcomm.reading import describe, read_context
from modelforge.errors import BuildError, UnsupportedError

N = helper.make_node
CHIP = "v2:6:2.51.0:5.51.0:73:43:0:0"


def context(path: Path, *, beside: bool = False, chip: str = CHIP, sdk: str = "v2.51.0.260929181845") -> dict[str, Any]:
    name = "main_qnn.bin"
    node = N(
        "EPContext", ["x"], ["y"], "node", domain="com.microsoft", embed_mode=0, ep_cache_context=name, ep_sdk_version=sdk
    )  # fmt: skip
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
    assert told.what == (
        "2 nodes cannot run on the tensor processor: logits (Gemm), stem_relu (Relu) (The SocModel doesn't support FP16)"
    )
    assert _explained(error, "nothing", "a-tag") is error
