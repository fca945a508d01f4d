"""An operator by itself: the words that a database is keyed by, and a graph that computes what the operator does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelforge.compilers.tvm import choices, lowering, measuring, pipeline, scheduling
from modelforge.compilers.tvm.alone import geometry, module_of
from modelforge.compilers.tvm.api import parameters_of, relax, target
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runs_here

Array = np.ndarray[Any, Any]


def _convolution(batch: int = 1, channels: int = 16, dtype: str = "float32") -> Any:
    from tvm.relax import TensorType

    x = relax.Var("x", TensorType((batch, 10, 12, 8), dtype))
    weight = relax.const(np.full((channels, 3, 3, 8), 0.25, dtype))
    call = relax.op.nn.conv2d(x, weight, padding=1, data_layout="NHWC", kernel_layout="OHWI")
    return relax.BlockBuilder().normalize(call)


def test_geometry_tells_sizes_types_and_attributes_and_no_batch() -> None:
    said = geometry(_convolution())
    assert said.startswith("nn.conv2d(float32[*,10,12,8], float32[16,3,3,8]")
    assert 'data_layout="NHWC"' in said
    assert geometry(_convolution(batch=4)) == said
    assert geometry(_convolution(channels=17)) != said
    assert geometry(_convolution(dtype="float16")) != said


@pytest.mark.skipif(not runs_here(AVX2), reason="this processor has no AVX2")
def test_the_graph_computes_the_operator_and_an_epilogue() -> None:
    module = module_of(_convolution())
    assert parameters_of(module["main"]) == [((1, 10, 12, 8), "float32")]
    kernels, reports = scheduling.schedule_all(lowering.to_kernels(module, AVX2), AVX2)
    assert [report.rule for report in reports if report.macs] == [reports[0].rule]
    x = np.random.default_rng(0).standard_normal((1, 10, 12, 8)).astype(np.float32)
    bench = measuring.here("here")
    (got,) = bench.load(pipeline.compile_module(kernels, target(AVX2)), [x]).run()
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).sum(-1)
    sums = sum(padded[:, row : row + 10, column : column + 12] for row in range(3) for column in range(3)) * 0.25
    np.testing.assert_allclose(got, np.repeat(np.maximum(sums + 0.125, 0)[..., None], 16, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_has_candidates_and_each_is_a_kernel_of_its_rule(name: str) -> None:
    """The first, the second and the last that is named: none falls back to the generic schedule."""
    machine = MACHINES[name]
    with choices.session(listing=True) as said:
        lowering.to_kernels(module_of(_convolution()), machine)
    (site,) = said.sites
    for key, labels in site.asked.items():
        assert len(labels) > 1
        for label in (labels[1], labels[-1]):
            with choices.session({key: label}) as own:
                module = lowering.to_kernels(module_of(site.call), machine)
            _, reports = scheduling.schedule_all(module, machine)
            assert own.applied == {key}
            assert [report.rule for report in reports if report.macs and report.rule in ("generic", "none")] == []


def test_int8_sites_carry_what_their_rule_reads_through() -> None:
    from tvm.relax import TensorType

    stored = relax.Var("stored", TensorType((1, 10, 12, 8), "uint8"))
    builder = relax.BlockBuilder()
    with builder.function("main", [stored]):
        with builder.dataflow():
            wide = builder.emit(relax.op.astype(stored, "int16"))
            data = builder.emit(relax.op.subtract(wide, relax.const(np.int16(128))))
            weight = relax.const(np.ones((16, 3, 3, 8), np.int8))
            layout = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": "int32"}
            sums = builder.emit(relax.op.nn.conv2d(data, weight, padding=1, **layout))
            result = builder.emit_output(relax.op.astype(sums, "float32"))
        builder.emit_func_output(result)
    with choices.session(listing=True) as said:
        lowering.to_kernels(builder.get(), AVX512)
    (site,) = said.sites
    module = module_of(site.call)
    assert parameters_of(module["main"]) == [((1, 10, 12, 8), "uint8")]
    _, reports = scheduling.schedule_all(lowering.to_kernels(module, AVX512), AVX512)
    assert [report.rule for report in reports if report.macs] == ["convolution-int8"]


@pytest.mark.parametrize(
    ("got", "expected", "same"),
    [
        (np.float32([1, 2]), np.float32([1, 2.0005]), True),
        (np.float32([1, 2]), np.float32([1, 2.1]), False),
        (np.float32([1, np.nan]), np.float32([1, np.nan]), False),
        (np.float16([1, 2]), np.float16([1, 2.02]), True),
        (np.int8([1, 127]), np.int8([2, 127]), True),
        (np.int8([-128, 127]), np.int8([127, 127]), False),
        (np.array([True, False]), np.array([True, True]), False),
        (np.float32([0, 0]), np.float32([0, 0]), True),
        (np.float32([1]), np.float32([1, 1]), False),
        (np.float32([1]), np.float64([1]), False),
    ],
)
def test_outputs_are_the_same_within_another_order_of_sums(got: Array, expected: Array, same: bool) -> None:
    assert measuring.same([got], [expected]) is same


def test_another_number_of_outputs_is_not_the_same() -> None:
    one = np.float32([1])
    assert not measuring.same([one], [one, one])
