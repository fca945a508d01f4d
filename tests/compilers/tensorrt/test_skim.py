"""A model without its large weights is the same model; and what is no model is told as everywhere."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.tensorrt.skim import LARGE, skim
from modelforge.errors import ModelError

DATA = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def model(*tensors: TensorProto) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="n")], "g", [value], [value], list(tensors))
    return helper.make_model(graph, producer_name="p", opset_imports=[helper.make_opsetid("", 17)])


def emptied(proto: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        for name in DATA:
            held = getattr(tensor, name)
            size = len(held) if name == "raw_data" else len(held) * 8
            if size > LARGE:
                tensor.ClearField(name)
    return proto


def saved(tmp_path: Path, proto: onnx.ModelProto) -> Path:
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_only_the_data_of_large_initializers_is_left_out(tmp_path: Path) -> None:
    proto = model(
        numpy_helper.from_array(np.arange(40_000, dtype=np.float32), "large"),
        numpy_helper.from_array(np.arange(7, dtype=np.int64), "small"),
        helper.make_tensor("written out", TensorProto.DOUBLE, [20_000], np.arange(20_000.0)),
    )
    found = skim(saved(tmp_path, proto))
    assert [tensor.HasField("raw_data") for tensor in found.graph.initializer] == [False, True, False]
    assert [list(tensor.dims) for tensor in found.graph.initializer] == [[40_000], [7], [20_000]]
    assert found == emptied(proto)


def test_a_real_model_is_the_same_but_for_its_weights() -> None:
    path = Path(onnx.__file__).parent / "backend/test/data/light/light_squeezenet.onnx"
    assert skim(path) == emptied(onnx.load(path))


@given(st.lists(st.tuples(st.text(max_size=20), st.integers(0, 60)), max_size=6))
def test_any_names_and_shapes_come_through(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, int]]
) -> None:
    proto = model(*[numpy_helper.from_array(np.zeros((size, 2), np.float16), name) for name, size in tensors])
    assert skim(saved(tmp_path_factory.mktemp("m"), proto)) == proto


@given(st.binary(max_size=300))
def test_garbage_is_a_model_error_or_what_protobuf_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    path.write_bytes(data)
    try:
        skim(path)
    except ModelError:
        return
    onnx.ModelProto().ParseFromString(data)


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    """Half a gigabyte of weights in a sparse file: reading it would show in the time."""
    weight = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[1 << 29])
    path = saved(tmp_path, model())
    head = weight.SerializeToString() + b"\x4a" + _length(1 << 29)
    graph = model().graph.SerializeToString() + b"\x2a" + _length(len(head) + (1 << 29)) + head
    with path.open("wb") as stream:
        stream.write(b"\x08\x08\x3a" + _length(len(graph) + (1 << 29)) + graph)
        stream.truncate(stream.tell() + (1 << 29))
    begun = time.process_time()
    assert list(skim(path).graph.initializer[0].dims) == [1 << 29]
    assert time.process_time() - begun < 0.2


def _length(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
