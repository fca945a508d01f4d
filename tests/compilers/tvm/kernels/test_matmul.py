"""Products with a constant matrix: right for every shape, in the rule's own schedule, on every machine."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax
from modelforge.compilers.tvm.kernels import matmul, tiles
from modelforge.compilers.tvm.machine import Machine
from tests.compilers.tvm.kernels.graphs import Graph, compiled, rules, run
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES, runnable


def dense(weight: np.ndarray, bias: np.ndarray, activation: Any) -> Graph:
    def graph(emit: Any, data: Any) -> Any:
        product = emit(relax.op.matmul(data, relax.const(weight)))
        return activation(emit(relax.op.add(product, relax.const(bias))))

    return graph


def arrays(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    leading=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    inner=st.integers(1, 40),
    columns=st.integers(1, 140),
)
def test_agrees_with_numpy(leading: list[int], inner: int, columns: int) -> None:
    data, weight, bias = arrays((*leading, inner), (inner, columns), (columns,))
    result, reports = run(dense(weight, bias, relax.op.nn.relu), [data])
    assert set(rules(reports).values()) == {"matmul"}
    np.testing.assert_allclose(result, np.maximum(data @ weight + bias, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize("shape", [(1, 70, 100), (41, 33, 107), (128, 16, 96)])
def test_every_width_of_vectors(machine: Machine, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    data, weight, bias = arrays((rows, inner), (inner, columns), (columns,))
    result, reports = run(dense(weight, bias, relax.op.nn.gelu), [data], machine)
    assert set(rules(reports).values()) == {"matmul"}
    wide = exact_gelu(data @ weight + bias)
    np.testing.assert_allclose(result, wide, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("machine", runnable(AVX512, AVX2))
@pytest.mark.parametrize(("rows", "columns"), [(1, 290), (7, 207), (1, 67), (3, 54)])
def test_a_tile_that_reaches_beyond_the_last_block(machine: Machine, rows: int, columns: int) -> None:
    data, weight, bias = arrays((rows, 19), (19, columns), (columns,))
    result, reports = run(dense(weight, bias, relax.op.nn.relu), [data], machine)
    assert set(rules(reports).values()) == {"matmul"}
    np.testing.assert_allclose(result, np.maximum(data @ weight + bias, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
@settings(max_examples=30, deadline=None, derandomize=True)
@given(columns=st.integers(1, 5000), rows=st.integers(1, 300))
def test_tiles_are_whole_parts_of_packed_blocks(machine: Machine, columns: int, rows: int) -> None:
    """Weights are packed alike for every number of rows: tiles have several blocks or a part of one."""
    unit = tiles.unit(columns, machine)
    tile = matmul.choose(rows, columns, machine, "float32", unit)
    assert 0 in (tile.vectors % unit, unit % tile.vectors)


@pytest.mark.parametrize("name", ["cortex-a53", "cortex-a72", "cortex-a76"])
@pytest.mark.parametrize("inner", [64, 61])
def test_values_of_a_row_are_loaded_by_vectors_on_arm(name: str, inner: int) -> None:
    """FMLA by element multiplies by any of four values that one load brought; 61 values are filled up."""
    data, weight, bias = arrays((32, inner), (inner, 64), (64,))
    executable, _ = compiled(dense(weight, bias, relax.op.nn.relu), [data], MACHINES[name])
    assembly = next(module for module in executable.mod.imports if module.kind == "llvm").inspect_source("asm")
    used = set(re.findall(r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[(\d)\]", assembly))
    assert used == {"0", "1", "2", "3"}
    assert "ld1r" not in assembly


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
@pytest.mark.parametrize("shape", [(1, 64, 1000), (40, 24, 65), (64, 32, 96), (7, 5, 3)])
def test_applies_on_every_machine(machine: Machine, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    data, weight, bias = arrays((rows, inner), (inner, columns), (columns,))
    _, reports = compiled(dense(weight, bias, relax.op.sigmoid), [data], machine)
    assert set(rules(reports).values()) == {"matmul"}
    assert [report.macs for report in reports] == [rows * inner * columns]


def test_half_precision() -> None:
    data, weight, bias = (array.astype(np.float16) for array in arrays((5, 24), (24, 37), (37,)))
    result, reports = run(dense(weight, bias, relax.op.nn.relu), [data])
    assert set(rules(reports).values()) == {"matmul"}
    assert result.dtype == np.float16
    exact = np.maximum(data.astype(np.float64) @ weight.astype(np.float64) + bias, 0)
    np.testing.assert_allclose(result, exact, rtol=2e-2, atol=3e-2)


def test_packing_pads_the_last_block_with_zeros() -> None:
    packed = matmul.pack(np.arange(15, dtype=np.float32).reshape(3, 5), 4)
    assert packed.shape == (2, 3, 4)
    np.testing.assert_array_equal(packed[0], [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]])
    np.testing.assert_array_equal(packed[1], [[4, 0, 0, 0], [9, 0, 0, 0], [14, 0, 0, 0]])
    deeper = matmul.pack(np.ones((3, 5), np.float32), 4, 8)
    assert deeper.shape == (2, 8, 4)
    assert not deeper[:, 3:].any()


def test_one_row_takes_many_vectors() -> None:
    single, several = (matmul.choose(rows, 1000, AVX512, "float32") for rows in (1, 64))
    assert single.rows == 1
    assert single.vectors >= 8
    assert several.rows * several.vectors >= 16


def exact_gelu(x: np.ndarray) -> np.ndarray:
    from math import erf

    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
