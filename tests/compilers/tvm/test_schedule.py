"""The schedule changes how a kernel runs, never what it computes: checked on this machine, kernel by kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelforge.compilers.tvm import schedule

tvm = pytest.importorskip("tvm")
te = pytest.importorskip("tvm.te")


def _kernels() -> dict[str, Any]:
    from tvm import topi

    def placeholder(*shape: int) -> Any:
        return te.placeholder(shape, "float32", name=f"p{len(shape)}")

    x, w = placeholder(2, 6, 9, 13), te.placeholder((8, 6, 3, 3), "float32", name="w")
    a, b = placeholder(5, 7), te.placeholder((7, 12), "float32", name="b")
    unit = placeholder(4, 200, 1, 48)
    return {
        "convolution with bias and relu": [x, w, topi.nn.relu(topi.nn.conv2d(x, w, (1, 1), (1, 1), (1, 1)))],
        "convolution with stride": [x, w, topi.nn.conv2d(x, w, (2, 2), (1, 1), (1, 1))],
        "matrix product": [a, b, topi.matmul(a, b)],
        "maximum over the last axes": [x, topi.max(x, axis=(2, 3))],
        "softmax": [a, topi.nn.softmax(a)],
        "elementwise with a unit axis inside": [unit, topi.tanh(unit)],
        "sum to a scalar": [a, topi.sum(a)],
    }


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", list(_kernels()))
def test_computes_the_same(name: str, lanes: int) -> None:
    tensors = _kernels()[name]
    plain = te.create_prim_func(tensors)
    scheduled = schedule.apply(tvm.s_tir.Schedule(plain), lanes, cores=2)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([int(n) for n in tensor.shape]).astype(np.float32) for tensor in tensors[:-1]]
    results = []
    for function in (plain, scheduled):
        out = tvm.runtime.tensor(np.zeros([int(n) for n in tensors[-1].shape], np.float32))
        tvm.compile(function, target="llvm")(*[tvm.runtime.tensor(array) for array in arrays], out)
        results.append(out.numpy())
    assert np.abs(results[0]).max() > 0
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert "vectorized" in scheduled.script() or "parallel" in scheduled.script() or name in ("sum to a scalar",)
