"""Softmax, layer norm and reductions: right for every length of a row, in the rule's own schedule, on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax
from modelforge.compilers.tvm.kernels.rows import row_of
from modelforge.compilers.tvm.machine import Machine
from tests.compilers.tvm.kernels.graphs import compiled, rules, run
from tests.compilers.tvm.kernels.machines import AVX512, CORTEX_A76, MACHINES
from tests.compilers.tvm.kernels.test_matmul import arrays

Case = tuple[Callable[..., Any], Callable[[np.ndarray], np.ndarray]]


def softmax(data: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(data.astype(np.float64) - data.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def norm(data: np.ndarray) -> np.ndarray:
    wide = data.astype(np.float64)
    rest = wide - wide.mean(-1, keepdims=True)
    return rest / np.sqrt((rest * rest).mean(-1, keepdims=True) + 1e-5)


def normalized(emit: Any, data: Any) -> Any:
    length = int(data.ty.shape[-1])
    scale, shift = (relax.const(np.full(length, value, np.float32)) for value in (2.0, 0.5))
    return relax.op.nn.layer_norm(data, scale, shift, axes=[-1])


NORMS: dict[str, Case] = {
    "softmax": (lambda emit, x: relax.op.nn.softmax(x, axis=-1), softmax),
    "log softmax": (lambda emit, x: relax.op.nn.log_softmax(x, axis=-1), lambda x: np.log(softmax(x))),
    "layer norm": (normalized, lambda x: norm(x) * 2 + 0.5),
}
REDUCTIONS: dict[str, Case] = {
    "sum": (lambda emit, x: relax.op.sum(x, axis=[-1]), lambda x: x.sum(-1)),
    "mean": (lambda emit, x: relax.op.mean(x, axis=[-1], keepdims=True), lambda x: x.mean(-1, keepdims=True)),
    "max": (lambda emit, x: relax.op.max(x, axis=[-1]), lambda x: x.max(-1)),
    "min of all": (lambda emit, x: relax.op.min(x), lambda x: x.min()),
    "argmax": (lambda emit, x: relax.op.argmax(x, axis=-1), lambda x: x.argmax(-1)),
    "argmin": (lambda emit, x: relax.op.argmin(x, axis=-1, keepdims=True), lambda x: x.argmin(-1, keepdims=True)),
    "squares": (lambda emit, x: relax.op.sum(emit(relax.op.multiply(x, x)), axis=[-1]), lambda x: (x * x).sum(-1)),
}


@settings(max_examples=18, deadline=None, derandomize=True)
@given(
    case=st.sampled_from([*NORMS, *REDUCTIONS]),
    leading=st.lists(st.integers(1, 5), max_size=2),
    length=st.integers(1, 300),
)
def test_agrees_with_numpy(case: str, leading: list[int], length: int) -> None:
    graph, reference = (NORMS | REDUCTIONS)[case]
    (data,) = arrays((*leading, length))
    result, reports = run(graph, [data])
    assert set(rules(reports).values()) == {"rows" if case in NORMS else "row reduction"}
    expected = reference(data)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("case", "all_of"), [("max", -np.inf), ("min of all", np.inf)])
def test_the_greatest_of_infinities_is_infinite(case: str, all_of: float) -> None:
    """A masked row of attention scores; TVM's own reducers start at the largest finite float."""
    graph, reference = REDUCTIONS[case]
    data = np.full((2, 37), all_of, np.float32)
    result, reports = run(graph, [data])
    assert set(rules(reports).values()) == {"row reduction"}
    np.testing.assert_array_equal(result, reference(data))


def test_reduces_several_last_axes() -> None:
    (data,) = arrays((3, 5, 7, 2))
    result, reports = run(lambda emit, x: relax.op.mean(x, axis=[2, 3]), [data])
    assert set(rules(reports).values()) == {"row reduction"}
    np.testing.assert_allclose(result, data.mean((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_softmax_over_another_axis(axis: int) -> None:
    (data,) = arrays((6, 9, 37))
    result, reports = run(lambda emit, x: relax.op.nn.softmax(x, axis=axis), [data])
    assert rules(reports)  # by the generic rule, in vectors: no note of a scalar loop
    np.testing.assert_allclose(result, softmax(data, axis), rtol=1e-5, atol=1e-6)


def test_softmax_of_masked_and_huge_scores() -> None:
    data = np.full((3, 40), -np.inf, np.float32)
    data[0, :5], data[1, 7], data[2, :] = 1e4, -3e38, 88.0
    result, _ = run(NORMS["softmax"][0], [data])
    np.testing.assert_allclose(result, softmax(data), rtol=1e-5, atol=0)


def test_layer_norm_is_followed_by_what_comes_after_in_one_kernel() -> None:
    (data,) = arrays((6, 50))
    result, reports = run(lambda emit, x: relax.op.nn.relu(emit(normalized(emit, x))), [data])
    assert list(rules(reports).values()) == ["rows"]
    np.testing.assert_allclose(result, np.maximum(norm(data) * 2 + 0.5, 0), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("case", ["softmax", "layer norm", "mean", "argmax"])
def test_applies_on_every_machine(machine: Machine, case: str) -> None:
    (data,) = arrays((4, 53))
    _, reports = compiled((NORMS | REDUCTIONS)[case][0], [data], machine)
    assert set(rules(reports).values()) == {"rows" if case in NORMS else "row reduction"}


def test_a_step_is_a_power_of_two_that_fits() -> None:
    assert [row_of(length, AVX512).step for length in (1, 5, 16, 40, 64, 6625)] == [1, 4, 16, 32, 64, 64]
    assert row_of(6625, CORTEX_A76).step == 16


@pytest.mark.parametrize("by_power", [True, False])
def test_layer_norm_in_pieces_is_one_kernel(by_power: bool) -> None:
    (data,) = arrays((2, 9, 40))

    def graph(emit: Any, x: Any) -> Any:
        op = relax.op
        rest = emit(op.subtract(x, emit(op.mean(x, axis=[-1], keepdims=True))))
        squared = emit(op.power(rest, relax.const(2.0, "float32")) if by_power else op.multiply(rest, rest))
        mean = emit(op.mean(squared, axis=[-1], keepdims=True))
        deviation = emit(op.sqrt(emit(op.add(mean, relax.const(1e-5, "float32")))))
        scaled = emit(op.multiply(emit(op.divide(rest, deviation)), relax.const(np.full(40, 2.0, np.float32))))
        return op.add(scaled, relax.const(np.full(40, 0.5, np.float32)))

    result, reports = run(graph, [data])
    assert list(rules(reports).values()) == ["rows"]
    np.testing.assert_allclose(result, norm(data) * 2 + 0.5, rtol=2e-5, atol=2e-5)


def test_a_division_that_is_no_layer_norm_stays_one() -> None:
    (data,) = arrays((4, 24))

    def graph(emit: Any, x: Any) -> Any:
        op = relax.op
        rest = emit(op.subtract(x, emit(op.mean(x, axis=[-1], keepdims=True))))
        mean = emit(op.mean(emit(op.multiply(x, x)), axis=[-1], keepdims=True))  # of x, not of the rest
        return op.divide(rest, emit(op.sqrt(emit(op.add(mean, relax.const(1e-5, "float32"))))))

    result, _ = run(graph, [data])
    expected = (data - data.mean(-1, keepdims=True)) / np.sqrt((data * data).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)
