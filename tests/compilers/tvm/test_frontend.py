"""What TVM's importer has to be helped with, each against the numbers that ONNX's own test case brings."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.tvm import TvmCompiler, preflight_attributes, preflight_nodes
from modelforge.errors import UnsupportedError
from tests.compilers.tvm.models import Build, make_model, this_machine, value


@cache
def _cases() -> dict[str, Any]:
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some overflow on purpose
        return {case.name: case for case in load_model_tests(kind="node")}


@pytest.mark.parametrize(
    "name",
    [
        "test_sinh",
        "test_cosh",
        "test_scatter_elements_with_axis",  # loops without blocks, of no schedule
        "test_shape",  # no kernel is left
        "test_sum_one_input",
    ],
)
def test_it_gives_what_onnx_says(build: Build, tmp_path: Path, name: str) -> None:
    case = _cases()[name]
    inputs, expected = case.data_sets[0]
    arrays = {value.name: array for value, array in zip(case.model.graph.input, inputs, strict=True)}
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = min(model.ir_version, 10)
    made = build(model, this_machine(), {name: array.shape for name, array in arrays.items()}, {})
    samples = {name: array if array.shape[:1] == (1,) else array[None] for name, array in arrays.items()}
    got, _ = made.run(samples, tmp_path)
    for value_info, array in zip(model.graph.output, expected, strict=True):
        np.testing.assert_allclose(got[value_info.name].reshape(array.shape), array, case.rtol, case.atol)


def test_lrn_of_fp16(build: Build, tmp_path: Path) -> None:
    half = TensorProto.FLOAT16
    shape = [1, 6, 3, 4]
    nodes = [helper.make_node("LRN", ["x"], ["y"], size=3, alpha=0.5, beta=0.75, bias=2.0)]
    made = build(make_model(nodes, [value("x", shape, half)], [value("y", shape, half)]), this_machine(),
                 {"x": tuple(shape)}, {})  # fmt: skip
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float16)
    got, _ = made.run({"x": x}, tmp_path)
    squares = np.pad(x.astype(np.float64) ** 2, ((0, 0), (1, 1), (0, 0), (0, 0)))
    sums = squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:]
    assert got["y"].dtype == np.float16
    np.testing.assert_allclose(got["y"], x / (2 + 0.5 / 3 * sums) ** 0.75, rtol=2e-3)


def test_a_concat_leaves_out_what_holds_nothing(build: Build, tmp_path: Path) -> None:
    empty = numpy_helper.from_array(np.zeros((1, 0), np.float32), "empty")
    model = make_model(
        [helper.make_node("Concat", ["empty", "x"], ["y"], axis=1)], [value("x", [1, 3])], [value("y", [1, 3])], [empty]
    )
    x = np.arange(3, dtype=np.float32)[None]
    got, _ = build(model, this_machine(), {"x": (1, 3)}, {}).run({"x": x}, tmp_path)
    np.testing.assert_array_equal(got["y"], x)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("test_isinf_negative", "IsInf .* one infinity only"),
        ("test_convtranspose_output_shape", "ConvTranspose .* output_shape"),
        ("test_mod_float_edge_cases_fmod_0_float32", "Mod .* fmod = 0"),
        ("test_bitshift_left_int32_shift_ge_width", "BitShift .* signed"),
        ("test_convtranspose", "ConvTranspose .* weight as an input"),
        ("test_resize_downsample_sizes_linear_antialias", "Resize .* antialias"),
        ("test_resize_upsample_sizes_nearest_axes_2_3", "Resize .* axes"),
        ("test_rms_normalization_2d_axis0", "RMSNormalization .* all dimensions"),
        ("test_reduce_max_bool_inputs", "ReduceMax .* booleans"),
        ("test_spacetodepth_crd_mode_example", "SpaceToDepth .* CRD"),
        ("test_tril_one_row_neg", "Trilu .* one row"),
    ],
)
def test_what_it_misreads_is_refused_by_the_plan_and_by_the_compile(tmp_path: Path, name: str, told: str) -> None:
    frontend = pytest.importorskip("modelforge.compilers.tvm.frontend")
    case = _cases()[name]
    path = tmp_path / "model.onnx"
    onnx.save(case.model, path)
    refusal, *_ = TvmCompiler().supports_model(path, this_machine())
    assert preflight_nodes.refusals(path)[0] == refusal
    node = case.model.graph.node[0]
    assert f"{node.op_type} (node {node.output[0]})" in refusal.what
    with pytest.raises(UnsupportedError, match=told):
        frontend.import_entries({"main": path})


@pytest.mark.parametrize(
    "name",
    [
        "test_isinf",
        "test_mod_mixed_sign_int64",
        "test_mod_mixed_sign_float32",  # fmod = 1
        "test_bitshift_left_uint8",
        "test_resize_upsample_sizes_cubic",
        "test_rms_normalization_2d_axis1",
        "test_reduce_max_default_axes_keepdim_example",
        "test_spacetodepth_dcr_mode_example",
        "test_triu_one_row",  # where to cut is an input
        "test_tril",
    ],
)
def test_what_it_reads_right_is_not(tmp_path: Path, name: str) -> None:
    onnx.save(_cases()[name].model, tmp_path / "model.onnx")
    assert preflight_nodes.refusals(tmp_path / "model.onnx") == []


@pytest.mark.parametrize(("factor", "is_refused"), [(0.6, True), (0.5, False), (1.75, False), (2.0, False)])
def test_scales_must_give_whole_sizes(factor: float, is_refused: bool) -> None:
    """Of 4 pixels, 0.6 makes 2.4, and the importer a ratio of 2."""
    scales = numpy_helper.from_array(np.array([1, 1, factor, factor], np.float32), "scales")
    nodes = [helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear")]
    model = make_model(nodes, [value("x", [1, 2, 4, 8])], [value("y", [1, 2, "h", "w"])], [scales])
    assert bool([*preflight_attributes.found_in(model)]) is is_refused


def test_an_output_whose_shape_depends_on_the_data_is_named(build: Build) -> None:
    model = make_model(
        [helper.make_node("Tile", ["x", "times"], ["tiles"])],
        [value("x", [1, 2]), value("times", [2], TensorProto.INT64)],
        [value("tiles", ["a", "b"])],
    )
    with pytest.raises(UnsupportedError, match=r"output tiles.*depends on the data"):
        build(model, this_machine(), {"x": (1, 2), "times": (2,)}, {})
