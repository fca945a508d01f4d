"""What becomes code: kernels without tests of their arguments, entries with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax, tvm
from tests.compilers.tvm.kernels.graphs import compiled, here, run

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


def tanh(emit: Any, data: Any) -> Any:
    return emit(relax.op.tanh(data))


def test_kernels_do_not_test_their_arguments() -> None:
    """TVM's assertions, with their words, are three quarters of a small model's code."""
    executable, _ = compiled(tanh, [X], here())
    code = next(module for module in executable.mod.imports if module.kind == "llvm").inspect_source("ll")
    assert "tanh" in code
    assert not [word for word in ("Expected", "AssertionError", "TypeError") if word in code]


@pytest.mark.parametrize("wrong", [X[:, :2], X[0], X.astype(np.float64), X.astype(np.float16)])
def test_entries_test_what_comes_from_outside(wrong: np.ndarray) -> None:
    executable, _ = compiled(tanh, [X], here())
    entry = relax.VirtualMachine(executable, tvm.cpu())["main"]
    np.testing.assert_allclose(entry(tvm.runtime.tensor(X)).numpy(), np.tanh(X), rtol=1e-5)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        entry(tvm.runtime.tensor(np.ascontiguousarray(wrong)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_largest_of_infinities_is_infinite(dtype: type) -> None:
    """As masks of attention ask for it: a row in which all is masked. FP32 comes out of what FP16 goes through."""
    masked = np.where([[False, False, False], [True, False, True]], 0, -np.inf).astype(dtype)
    found, _ = run(lambda emit, data: emit(relax.op.max(data, axis=[-1])), [masked])
    np.testing.assert_array_equal(found, np.array([-np.inf, 0], dtype))
