"""Weights lie once in the library, and are read where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from modelforge.compilers.tvm.signature import ALIGNMENT, Signature, parse
from modelforge.recipe import Dim
from tests.compilers.tvm.models import Build, Built, make_model, this_machine, value


def _signature(made: Built) -> Signature:
    return parse(made.compiled.report["signature"])


def _library(made: Built) -> bytes:
    return made.compiled.files["main.so"].read_bytes()


def _matrix(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _products(*weights: np.ndarray) -> onnx.ModelProto:
    """x times each of the matrices, one after the other."""
    names = ["x", *(f"h{position}" for position in range(len(weights) - 1)), "y"]
    nodes = [
        helper.make_node("MatMul", [names[position], f"w{position}"], [names[position + 1]])
        for position in range(len(weights))
    ]
    arrays = [numpy_helper.from_array(weight, f"w{position}") for position, weight in enumerate(weights)]
    inputs, outputs = value("x", ["batch", weights[0].shape[0]]), value("y", ["batch", weights[-1].shape[1]])
    return make_model(nodes, [inputs], [outputs], arrays)


def _build(build: Build, model: onnx.ModelProto, *batches: int) -> Built:
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    return build(model, this_machine(), {"x": ("batch", width)}, {"batch": Dim(values=batches)})


def test_every_entry_reads_the_same_weights(built: Built) -> None:
    """The conv net has entries for 1, 4 and 8."""
    signature = _signature(built)
    first, *others = (set(entry.weights) for entry in signature.entries)
    assert first
    assert all(rows == first for rows in others)


def test_a_second_entry_of_matrix_products_adds_code_alone(build: Build) -> None:
    size = 400 * 512 * 4
    made = _build(build, _products(_matrix(0, 400, 512)), 1, 2, 4)
    assert size <= _signature(made).weight_bytes < 1.05 * size
    assert len(_library(made)) < 1.3 * size


@pytest.mark.parametrize("pixels", [6, 8])
def test_a_second_entry_of_convolutions_adds_code_alone(build: Build, pixels: int) -> None:
    """Of layers that one image alone would sum directly, and eight would not."""
    weights = [_matrix(seed, 64, 64, 3, 3) for seed in (0, 1)]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["h"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "w1"], ["y"], pads=[1, 1, 1, 1]),
    ]
    ports = [value(name, ["batch", 64, pixels, pixels]) for name in ("x", "y")]
    arrays = [numpy_helper.from_array(weight, f"w{position}") for position, weight in enumerate(weights)]
    inputs = {"x": ("batch", 64, pixels, pixels)}
    made = build(make_model(nodes, ports[:1], ports[1:], arrays), this_machine(), inputs, {"batch": Dim(values=(1, 8))})
    assert _signature(made).weight_bytes == sum(weight.nbytes for weight in weights)


def test_the_same_content_is_written_once(build: Build, tmp_path: Path) -> None:
    weight = _matrix(0, 64, 64)
    made = _build(build, _products(weight, weight, weight), 1)
    (row,) = _signature(made).weights
    assert row.offset == 0
    x = _matrix(1, 3, 64)
    got, _ = made.run({"x": x}, tmp_path)
    np.testing.assert_allclose(got["y"], x @ weight @ weight @ weight, rtol=1e-3, atol=1e-3)


def test_they_are_aligned_and_not_in_the_executable_too(build: Build) -> None:
    made = _build(build, _products(_matrix(0, 50, 100), _matrix(1, 100, 30)), 1)
    signature, data = _signature(made), _library(made)
    assert all(weight.offset % ALIGNMENT == 0 for weight in signature.weights)
    for weight in (_matrix(0, 50, 100), _matrix(1, 100, 30)):
        row = weight[-1, :8].tobytes()  # packed or not, neighbours stay neighbours
        assert data.count(row) == 1


def test_they_begin_a_page(built: Built) -> None:
    """A page of the file is then a page in memory, and holds nothing else."""
    elf = _sections(_library(built))
    address, size, alignment = elf[".modelforge"]
    assert alignment % 4096 == 0
    assert address % 4096 == 0
    assert size >= _signature(built).weight_bytes


def _sections(data: bytes) -> dict[str, tuple[int, int, int]]:
    """Offset, size and alignment by name (System V gABI, chapter 4)."""
    table, (width, count, names) = int.from_bytes(data[40:48], "little"), np.frombuffer(data, "<u2", 3, 58)
    rows = [np.frombuffer(data, "<u8", 8, table + int(width) * index) for index in range(count)]
    begin = int(rows[int(names)][3])
    found = {}
    for row in rows:
        at = begin + int(row[0]) % (1 << 32)
        found[data[at : data.index(b"\0", at)].decode()] = (int(row[3]), int(row[4]), int(row[6]))
    return found


def test_constants_of_every_type_are_lifted(build: Build, tmp_path: Path) -> None:
    kinds = ("int64", "bool", "float16", "int8")
    tables = {kind: np.random.default_rng(2).integers(0, 2, (40, 16)).astype(kind) for kind in kinds}
    model = make_model(
        [helper.make_node("Gather", [f"table_{kind}", "ids"], [kind]) for kind in kinds],
        [value("ids", ["batch", 3], onnx.TensorProto.INT64)],
        [value(kind, ["batch", 3, 16], helper.np_dtype_to_tensor_dtype(np.dtype(kind))) for kind in kinds],
        [numpy_helper.from_array(table, f"table_{kind}") for kind, table in tables.items()],
    )
    made = build(model, this_machine(), {"ids": ("batch", 3)}, {"batch": Dim(values=(2,))})
    assert {weight.dtype for weight in _signature(made).weights} == set(kinds)
    assert all(weight.shape == (40, 16) for weight in _signature(made).weights)
    ids = np.random.default_rng(3).integers(0, 40, (4, 3))
    got, _ = made.run({"ids": ids}, tmp_path, 2)
    for kind in kinds:
        np.testing.assert_array_equal(got[kind], tables[kind][ids])


def test_a_model_without_weights_is_a_model(build: Build, tmp_path: Path) -> None:
    model = make_model([helper.make_node("Relu", ["x"], ["y"])], [value("x", ["batch", 4])], [value("y", ["batch", 4])])
    made = _build(build, model, 2)
    assert _signature(made).weight_bytes == 0
    x = _matrix(0, 3, 4)
    got, _ = made.run({"x": x}, tmp_path, 2)
    np.testing.assert_array_equal(got["y"], np.maximum(x, 0))
