"""Exponentials and their kin against float64, over the whole range of floats, and fused with what they follow."""

from __future__ import annotations

from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax
from modelforge.compilers.tvm.machine import Machine
from tests.compilers.tvm.kernels.graphs import compiled, rules, run
from tests.compilers.tvm.kernels.machines import MACHINES
from tests.compilers.tvm.kernels.test_matmul import arrays

op = relax.op
wide_erf = np.vectorize(erf)


def power(exponent: float) -> Callable[[Any], Any]:
    return lambda x: op.power(x, relax.const(exponent, "float32"))


EXACT: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], np.ndarray], float]] = {
    "exp": (op.exp, np.exp, 2),
    "log": (op.log, np.log, 2),
    "tanh": (op.tanh, np.tanh, 5),
    "erf": (op.erf, wide_erf, 6),
    "sqrt": (op.sqrt, np.sqrt, 1),
    "square": (power(2.0), np.square, 1),
    "cube": (power(3.0), lambda x: x**3, 2),
    "reciprocal": (power(-1.0), lambda x: 1 / x, 1),
}
"""The operator, the truth, and the errors allowed in ulp."""
NEAR: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "sigmoid": (op.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "silu": (op.nn.silu, lambda x: x / (1 + np.exp(-x))),
    "gelu": (op.nn.gelu, lambda x: x * 0.5 * (1 + wide_erf(x / np.sqrt(2)))),
    "gelu by tanh": (
        op.nn.gelu_tanh,
        lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "softplus": (op.nn.softplus, lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)),
}


def floats() -> np.ndarray:
    """Floats of every size and both signs, and densely those where exponentials live; no NaN, no infinity."""
    patterns = np.arange(0, 2**32, 400_009, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = [0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 3.4e38, -3.4e38, 88.72, 88.73, -87.4, -103.9, -104.1]
    dense = [np.linspace(-low, low, 9001, dtype=np.float32) for low in (110, 5)]
    return np.concatenate([patterns[np.isfinite(patterns)], np.array(edges, np.float32), *dense])


def ulps(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Errors in the spacing of floats at the truth; infinite where one is an infinity or NaN and the other is not."""
    rounded = truth.astype(np.float32)
    odd = ~np.isfinite(rounded)
    same = (np.isnan(rounded) & np.isnan(result)) | (rounded == result)
    error = np.abs(result.astype(np.float64) - truth) / np.spacing(np.abs(rounded)).astype(np.float64)
    return np.where(odd | ~np.isfinite(result), np.where(same, 0.0, np.inf), error)


@pytest.mark.parametrize("name", EXACT)
def test_errors_over_all_floats(name: str) -> None:
    function, truth, limit = EXACT[name]
    data = floats()
    with np.errstate(all="ignore"):
        expected = truth(data.astype(np.float64))
        result, reports = run(lambda emit, x: function(x), [data])
        errors = ulps(result, expected)
    assert rules(reports)
    assert errors.max() <= limit, (data[errors.argmax()], result[errors.argmax()], expected[errors.argmax()])


@pytest.mark.parametrize("name", NEAR)
def test_errors_of_what_is_made_of_them(name: str) -> None:
    function, truth = NEAR[name]
    data = np.concatenate([np.linspace(-120, 120, 5003), np.linspace(-6, 6, 5003)]).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = truth(data.astype(np.float64))
        result, _ = run(lambda emit, x: function(x), [data])
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "sigmoid"])
def test_infinities_and_nan(name: str) -> None:
    function, truth = (*EXACT.get(name, ()), *NEAR.get(name, ()))[:2]
    data = np.array([np.inf, -np.inf, np.nan, 0.0], np.float32)
    with np.errstate(all="ignore"):
        expected = truth(data.astype(np.float64)).astype(np.float32)
        result, _ = run(lambda emit, x: function(x), [data])
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_half_precision_goes_through_single() -> None:
    data = np.linspace(-8, 8, 999).astype(np.float16)
    result, _ = run(lambda emit, x: op.sigmoid(x), [data])
    assert result.dtype == np.float16
    np.testing.assert_allclose(result, 1 / (1 + np.exp(-data.astype(np.float64))), rtol=1e-3, atol=1e-4)


def test_two_functions_are_one_kernel_and_a_third_begins_another() -> None:
    (data,) = arrays((7, 45))

    def mish(emit: Any, x: Any) -> Any:
        inner = emit(op.log(emit(op.add(relax.const(1.0, "float32"), emit(op.exp(x))))))
        return op.multiply(x, emit(op.tanh(inner)))

    result, reports = run(mish, [data])
    # Each function more in one expression takes twenty times as long to compile.
    assert len(rules(reports)) == 2
    wide = data.astype(np.float64)
    np.testing.assert_allclose(result, wide * np.tanh(np.log1p(np.exp(wide))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
def test_no_call_of_the_c_library_in_any_machine_s_code(machine: Machine) -> None:
    (data,) = arrays((64, 33))

    def chain(emit: Any, x: Any) -> Any:
        for function in (op.sigmoid, op.tanh, op.erf, op.nn.gelu, op.exp, op.log):
            x = emit(function(x))
        return op.add(x, x)

    executable, reports = compiled(chain, [data], machine)
    assert rules(reports)
    text = executable.mod.imports[0].inspect_source("asm")
    assert not [name for name in ("expf", "tanhf", "erff", "logf") if name in text.split()]
