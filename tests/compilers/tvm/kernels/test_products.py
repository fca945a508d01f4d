"""Products of two activations: right for every shape and batch, read through slices, on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax
from modelforge.compilers.tvm.machine import Machine
from tests.compilers.tvm.kernels.graphs import compiled, rules, run
from tests.compilers.tvm.kernels.machines import MACHINES
from tests.compilers.tvm.kernels.test_matmul import arrays


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["both", "left", "right"])), max_size=2),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 70)),
    transposed=st.booleans(),
)
def test_agrees_with_numpy(batch: list[tuple[int, str]], sizes: tuple[int, int, int], transposed: bool) -> None:
    rows, inner, columns = sizes
    first = [size if who != "right" else 1 for size, who in batch]
    second = [size if who != "left" else 1 for size, who in batch]
    left, right = arrays((*first, rows, inner), (*second, inner, columns))
    swapped = [*range(len(batch)), len(batch) + 1, len(batch)]

    def graph(emit: Any, a: Any, b: Any) -> Any:
        return relax.op.matmul(a, emit(relax.op.permute_dims(b, swapped)) if transposed else b)

    given_right = np.ascontiguousarray(right.transpose(swapped)) if transposed else right
    result, reports = run(graph, [left, given_right])
    assert set(rules(reports).values()) == {"product"}
    np.testing.assert_allclose(result, left @ right, rtol=1e-4, atol=1e-4)


def attention(heads: int, width: int, tokens: int) -> Any:
    """Queries, keys and values cut out of one matrix [tokens, 3 * heads * width], as exporters write it."""

    def graph(emit: Any, data: Any) -> Any:
        op = relax.op
        cut = emit(op.permute_dims(emit(op.reshape(data, (1, tokens, 3, heads, width))), [2, 0, 3, 1, 4]))
        parts = [
            emit(op.squeeze(emit(op.strided_slice(cut, [0], [part], [part + 1])), [0]))
            if part != 1
            else emit(op.take(cut, relax.const(1, "int64"), axis=0))
            for part in range(3)
        ]
        scaled = emit(op.multiply(parts[0], relax.const(0.25, "float32")))
        scores = emit(op.matmul(scaled, emit(op.permute_dims(parts[1], [0, 1, 3, 2]))))
        return op.matmul(emit(op.nn.softmax(scores, axis=-1)), parts[2])

    return graph


def attention_reference(data: np.ndarray, heads: int, width: int) -> np.ndarray:
    query, key, value = data.reshape(1, len(data), 3, heads, width).transpose(2, 0, 3, 1, 4).astype(np.float64)
    scores = 0.25 * query @ key.transpose(0, 1, 3, 2)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True) @ value


@pytest.mark.parametrize(("heads", "width", "tokens"), [(2, 16, 24), (3, 15, 17), (1, 8, 5)])
def test_attention_reads_its_operands_where_they_lie(heads: int, width: int, tokens: int) -> None:
    (data,) = arrays((tokens, 3 * heads * width))
    result, reports = run(attention(heads, width, tokens), [data])
    # No kernel for a slice, a permutation or the scale is left.
    assert sorted(rules(reports).values()) == ["product", "product", "rows"]
    np.testing.assert_allclose(result, attention_reference(data, heads, width), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("tokens", [24, 17])
def test_applies_on_every_machine(machine: Machine, tokens: int) -> None:
    (data,) = arrays((tokens, 3 * 4 * 16))
    _, reports = compiled(attention(4, 16, tokens), [data], machine)
    assert sorted(rules(reports).values()) == ["product", "product", "rows"]


def test_parts_of_a_split_are_read_in_place() -> None:
    (data,) = arrays((2, 6, 40))

    def graph(emit: Any, x: Any) -> Any:
        parts = emit(relax.op.split(x, [16], axis=2))
        left, right = (emit(relax.TupleGetItem(parts, part)) for part in range(2))
        return relax.op.matmul(emit(relax.op.permute_dims(left, [0, 2, 1])), right)

    result, reports = run(graph, [data])
    assert "product" in rules(reports).values()
    np.testing.assert_allclose(result, data[..., :16].transpose(0, 2, 1) @ data[..., 16:], rtol=1e-4, atol=1e-4)
