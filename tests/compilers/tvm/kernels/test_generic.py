"""What no other rule takes: right for every shape, in vectors, and named where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax
from modelforge.compilers.tvm.machine import Machine
from tests.compilers.tvm.kernels.graphs import compiled, rules, run, scheduled
from tests.compilers.tvm.kernels.machines import MACHINES
from tests.compilers.tvm.kernels.test_matmul import arrays

op = relax.op
CASES: dict[str, tuple[Callable[..., Any], Callable[[np.ndarray], np.ndarray]]] = {
    "sum over the first axis": (lambda emit, x: op.sum(x, axis=[0]), lambda x: x.sum(0)),
    "maximum over the middle": (lambda emit, x: op.max(x, axis=[1], keepdims=True), lambda x: x.max(1, keepdims=True)),
    "variance over the middle": (lambda emit, x: op.variance(x, axis=[1]), lambda x: x.var(1)),
    "where and compare": (
        lambda emit, x: op.where(emit(op.less(x, relax.const(0.0, "float32"))), x, emit(op.negative(x))),
        lambda x: -np.abs(x),
    ),
    "cast": (lambda emit, x: op.astype(x, "int32"), lambda x: x.astype(np.int32)),
    "broadcast": (lambda emit, x: op.subtract(x, emit(op.mean(x, axis=[0], keepdims=True))), lambda x: x - x.mean(0)),
    "product over the middle": (lambda emit, x: op.prod(x, axis=[1]), lambda x: x.prod(1)),
}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=st.sampled_from(list(CASES)), shape=st.tuples(st.integers(1, 7), st.integers(1, 20), st.integers(1, 90)))
def test_agrees_with_numpy(case: str, shape: tuple[int, int, int]) -> None:
    graph, reference = CASES[case]
    (data,) = arrays(shape)
    result, reports = run(graph, [data])
    assert not [report for report in reports if report.rule == "none" or "rror" in report.note]
    np.testing.assert_allclose(result, reference(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("case", CASES)
def test_vectors_on_every_machine(machine: Machine, case: str) -> None:
    (data,) = arrays((3, 17, 71))
    _, reports = compiled(CASES[case][0], [data], machine)
    rules(reports)  # no refusal, and no note of a scalar loop


def test_says_what_is_scalar() -> None:
    (data,) = arrays((5, 6, 40))
    result, (report,) = run(lambda emit, x: op.argmax(x, axis=1), [data])
    assert "scalar" in report.note
    np.testing.assert_array_equal(result, data.argmax(1))


def test_takes_rows_of_a_table() -> None:
    (table,) = arrays((50, 24))
    places = np.array([[3, 49, 0], [7, 7, 21]])
    result, reports = run(lambda emit, x: op.take(relax.const(table), x, axis=0), [places])
    assert rules(reports)
    np.testing.assert_array_equal(result, table[places])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integers(dtype: str) -> None:
    rng = np.random.default_rng(3)
    left, right = (rng.integers(0, 50, (9, 31)).astype(dtype) for _ in range(2))
    result, reports = run(lambda emit, a, b: op.maximum(emit(op.add(a, b)), b), [left, right])
    assert rules(reports)
    np.testing.assert_array_equal(result, np.maximum(left + right, right))


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("shape", [(28, 12, 3), (9, 10, 8), (9, 9, 40), (3, 6, 24), (7, 28, 34), (28, 28, 136)])
def test_no_lane_has_an_index_of_its_own(machine: Machine, shape: tuple[int, ...]) -> None:
    """Where all axes counted as one, vectors of 16 over 24 channels divided the number of each lane by 3."""
    from modelforge.compilers.tvm.api import kernels, target, tirx, tvm

    (data,) = arrays((1, *shape))
    module, _ = scheduled(lambda emit, x: op.astype(x, "int8"), [data], machine)
    ((_, kernel),) = kernels(module)
    to_code, _, _ = tirx.get_tir_pipeline("default")
    own = target(machine).with_host(target(machine))
    text = to_code(
        tirx.transform.BindTarget(own)(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}))
    ).script()
    stores = [line for line in text.splitlines() if "] = " in line]
    assert stores
    assert not [line for line in stores if "//" in line or "%" in line], stores
