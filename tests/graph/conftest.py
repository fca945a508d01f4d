"""Real models as installed packages carry them, and a short way to write a graph by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

PACKAGED = {
    "det4": "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
    "rec4": "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
    "cls": "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
    "magika": "magika/models/standard_v3_3/model.onnx",
    "nudenet": "nudenet/320n.onnx",
    "silero": "silero_vad/data/silero_vad.onnx",
    "silero_op15": "silero_vad/data/silero_vad_16k_op15.onnx",
    "silero_ifless": "silero_vad/data/silero_vad_op18_ifless.onnx",
    "resnet50": "onnx/backend/test/data/light/light_resnet50.onnx",
    "squeezenet": "onnx/backend/test/data/light/light_squeezenet.onnx",
    "densenet121": "onnx/backend/test/data/light/light_densenet121.onnx",
}

SHAPES: dict[str, dict[str, tuple[int | str, ...]]] = {
    "det4": {"x": ("batch", 3, "height", "width")},
    "rec4": {"x": ("batch", 3, 48, "width")},
    "cls": {"x": ("batch", 3, 48, 192)},
    "magika": {"bytes": ("batch", 2048)},
}

Value = tuple[str, int, Sequence[int | str | None] | None]


def packaged(name: str) -> Path:
    """The path of a real model; the test is skipped where its package is not installed."""
    package, _, inside = PACKAGED[name].partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / inside


def make_graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: Mapping[str, NDArray[Any]] | None = None,
    name: str = "graph",
) -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes),
        name,
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, key) for key, array in (weights or {}).items()],
    )


def write_model(path: Path, graph: onnx.GraphProto, opset: int = 17, **opsets: int) -> Path:
    """Write without checking: some models here are wrong on purpose."""
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain.replace("_", "."), version) for domain, version in opsets.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def op_types(path: Path) -> list[str]:
    """Operator names of the graph and of its bodies."""
    from modelforge.graph.walk import graphs

    return [node.op_type for graph in graphs(onnx.load(path).graph) for node in graph.node]


def sqnr_db(reference: NDArray[Any], value: NDArray[Any]) -> float:
    exact, measured = reference.astype(np.float64), value.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / max(float(((exact - measured) ** 2).sum()), 1e-300)))


@pytest.fixture
def conv_model(tmp_path: Path) -> Path:
    """Conv -> Relu on ``x [N, 3, 8, 8]``, N unnamed as paddle2onnx writes it: -1."""
    rng = np.random.default_rng(1)
    weights = {"w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    shape = [-1, 3, 8, 8]
    graph = make_graph(nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, [-1, 4, 8, 8])], weights)
    return write_model(tmp_path / "conv.onnx", graph)
