"""Convolutions by minimal filtering are right for any geometry, nearly as exact as direct ones, made where they pay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tvm")

from modelforge.compilers.tvm.api import relax, target, tvm
from modelforge.compilers.tvm.kernels import winograd, winograd_plan
from modelforge.compilers.tvm.kernels.convolution import Window
from modelforge.compilers.tvm.lowering import to_kernels
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.scheduling import KernelReport, schedule_all
from tests.compilers.tvm.kernels.machines import AVX2, AVX512, MACHINES

Array = np.ndarray[Any, Any]
Shape = tuple[int, int, int, int]

HERE = [AVX512, AVX2]
"""Machines whose code is run here."""


def layer(shape: Shape, weight: Array, pad: tuple[int, ...], *, tail: str, dtype: str = "float32", **attrs: Any) -> Any:
    """A module of one convolution (NHWC) and what follows it: ``bias`` and SiLU, or a residual sum and ReLU."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    args = [x]
    with builder.function("main", args):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x, relax.const(weight.astype(dtype)), padding=pad, data_layout="NHWC", kernel_layout="OHWI", **attrs
            )
            y = builder.emit(y)
            if tail == "silu":
                y = builder.emit(relax.op.add(y, relax.const(bias(weight, dtype))))
                y = builder.emit(relax.op.multiply(y, builder.emit(relax.op.sigmoid(y))))
            if tail == "residual":
                y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(x, y))))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


def bias(weight: Array, dtype: str = "float32") -> Array:
    return np.linspace(-1, 1, len(weight)).reshape(1, 1, 1, -1).astype(dtype)


def compiled(module: Any, machine: Machine) -> tuple[Any, list[KernelReport]]:
    scheduled, reports = schedule_all(to_kernels(module, machine), machine)
    return tvm.compile(scheduled, target(machine)), reports


def run(executable: Any, *values: Array) -> Array:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result: Array = machine["main"](*map(tvm.runtime.tensor, values)).numpy()
    return result


def reference(data: Array, weight: Array, pad: tuple[int, ...]) -> Array:
    """The sum in float64."""
    top, left, bottom, right = pad
    padded = np.pad(data.astype(np.float64), ((0, 0), (top, bottom), (left, right), (0, 0)))
    high, broad = padded.shape[1] - 2, padded.shape[2] - 2
    total = np.zeros((len(data), high, broad, len(weight)))
    for y, x in np.ndindex(3, 3):
        total += padded[:, y : y + high, x : x + broad] @ weight[:, y, x].astype(np.float64).T
    return total


def numbers(shape: Shape, channels: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(channels, 3, 3, shape[3])) / np.sqrt(9 * shape[3])
    return rng.normal(size=shape).astype(np.float32), weight.astype(np.float32)


def always(monkeypatch: pytest.MonkeyPatch, pick: int = 0) -> None:
    """Take a plan even where the direct kernel would cost less."""

    def plans(window: Window, machine: Machine, batches: tuple[int, ...] = ()) -> list[Any]:
        del batches
        found = [plan for plan in winograd_plan.ranked(window, machine) if plan is not None]
        return [found[pick % len(found)]] if found else [None]

    monkeypatch.setattr(winograd, "ranked", plans)


@pytest.mark.parametrize("machine", HERE, ids=["avx512", "avx2"])
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(3, 15), st.integers(3, 15)),
    inputs=st.integers(1, 24).map(lambda count: 4 * count),
    channels=st.integers(1, 20).map(lambda count: 4 * count),
    pad=st.tuples(*[st.integers(0, 2)] * 4),
    tail=st.sampled_from(["", "silu"]),
    pick=st.integers(0, 5),
)
def test_any_geometry(
    machine: Machine,
    batch: int,
    size: tuple[int, int],
    inputs: int,
    channels: int,
    pad: tuple[int, ...],
    tail: str,
    pick: int,
) -> None:
    shape = (batch, *size, inputs)
    data, weight = numbers(shape, channels)
    with pytest.MonkeyPatch.context() as patch:
        always(patch, pick)
        executable, reports = compiled(layer(shape, weight, pad, tail=tail), machine)
    wanted = reference(data, weight, pad)
    if tail:
        wanted = wanted + bias(weight)
        wanted = wanted / (1 + np.exp(-wanted))
    assert [report.rule for report in reports] == ["winograd"]
    assert "rror" not in reports[0].note
    np.testing.assert_allclose(run(executable, data), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("shape", [(1, 28, 28, 64), (1, 14, 14, 256)], ids=["one step", "steps"])
def test_residual_block_for_every_machine(machine: Machine, shape: Shape) -> None:
    data, weight = numbers(shape, shape[3])
    executable, reports = compiled(layer(shape, weight, (1, 1, 1, 1), tail="residual"), machine)
    assert [report.rule for report in reports] == ["winograd"]
    assert "rror" not in reports[0].note
    assert reports[0].macs == 9 * shape[1] * shape[2] * shape[3] ** 2
    if machine in HERE:
        wanted = np.maximum(data + reference(data, weight, (1, 1, 1, 1)), 0)
        np.testing.assert_allclose(run(executable, data), wanted, rtol=0, atol=2e-5)


def test_error_is_of_the_order_of_the_direct_kernels() -> None:
    shape = (1, 16, 16, 256)
    data, weight = numbers(shape, 64)
    module = layer(shape, weight, (1, 1, 1, 1), tail="")
    wanted = reference(data, weight, (1, 1, 1, 1))
    errors = []
    for plans in (winograd_plan.ranked, lambda *_: [None]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(winograd, "ranked", plans)
            executable, reports = compiled(module, AVX512)
        errors.append((reports[0].rule, float(np.sqrt(np.mean((run(executable, data) - wanted) ** 2)))))
    (first, ours), (second, direct) = errors
    assert (first, second) == ("winograd", "convolution")
    assert ours < 4 * direct


@pytest.mark.parametrize(
    ("dtype", "attrs"),
    [("float16", {}), ("float32", {"strides": [2, 2]}), ("float32", {"dilation": [2, 2]}), ("float32", {"groups": 2})],
    ids=["half precision", "stride", "dilation", "groups"],
)
def test_others_are_left_to_other_rules(dtype: str, attrs: dict[str, Any]) -> None:
    weight = np.ones((32, 3, 3, 32 // attrs.get("groups", 1)))
    module = layer((1, 32, 32, 32), weight, (2, 2, 2, 2), tail="", dtype=dtype, **attrs)
    _, reports = schedule_all(to_kernels(module, AVX512), AVX512)
    assert "winograd" not in [report.rule for report in reports]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_made_where_it_pays(machine: Machine) -> None:
    def plans(size: int, channels: int) -> Any:
        window = Window((1, size, size, channels), channels, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
        return winograd_plan.ranked(window, machine)[0]

    assert plans(56, 64) is not None
    assert plans(28, 128) is not None
    assert plans(2, 512) is None  # one tile: transforming the weights is more work than the sums
    assert plans(56, 2) is None  # channels do not fill a vector


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_transformed_data_stays_small(machine: Machine) -> None:
    window = Window((1, 512, 512, 64), 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    for plan in winograd_plan.ranked(window, machine):
        assert plan is None or plan.held(64) <= 4 * machine.l2


def test_a_search_may_choose_the_direct_kernel() -> None:
    window = Window((1, 56, 56, 64), 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    assert None in winograd_plan.ranked(window, AVX512)[1:]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
def test_entries_for_several_batches_take_the_same_kind(machine: Machine) -> None:
    """512 channels of 7x7: alone, one image would be summed directly and eight would not."""
    windows = [Window((batch, 7, 7, 512), 512, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)) for batch in (1, 8)]
    assert [winograd_plan.ranked(window, machine)[0] is None for window in windows] == [True, False]
    together = [winograd_plan.ranked(window, machine, (1, 8))[0] for window in windows]
    assert len({plan and plan.tile for plan in together}) == 1
    assert winograd_plan.ranked(windows[0], machine, (1, 1))[0] is None


def test_entries_that_gain_much_decide() -> None:
    window = Window((1, 7, 7, 512), 512, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    assert winograd_plan.ranked(window, AVX512, (1, 2))[0] is None
    assert winograd_plan.ranked(window, AVX512, (1, 8, 16))[0] is not None
