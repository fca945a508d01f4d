"""Range tables: histograms on a common grid, merging without loss, JSON that is kept and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modelforge.errors import DataError
from modelforge.quantize.ranges import BINS, Histogram, RangeTable, TensorRange

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)
VALUES = arrays(np.float32, st.integers(1, 50), elements=FLOATS)


def tensor(values: Any, name: str = "t", **extra: Any) -> TensorRange:
    array = np.asarray(values, np.float32)
    low, high = float(array.min()), float(array.max())
    facts: dict[str, Any] = {
        "name": name,
        "shape_rank": 4,
        "count": array.size,
        "minimum": low,
        "maximum": high,
        "zeros": int((array == 0).sum()),
        "nans": 0,
        "infs": 0,
        "bins": Histogram.spanning(low, high).plus(array),
    }
    return TensorRange(**{**facts, **extra})


def table(*tensors: TensorRange, data: str = "sha256:d", model: str = "sha256:m") -> RangeTable:
    return RangeTable({each.name: each for each in tensors}, 3, data, model)


@given(VALUES)
def test_every_value_falls_into_its_own_bin(values: Any) -> None:
    bins = tensor(values).bins
    assert bins.total == values.size
    exact = np.floor((values.astype(np.float64) - bins.low) / bins.width)
    # In exact arithmetic; float64 holds the difference only where the magnitudes are alike.
    if np.abs(values[values != 0]).min(initial=1) > 1e-3 * np.abs(values).max():
        assert np.array_equal(np.bincount(exact.astype(int), minlength=BINS), bins.counts)


@given(st.tuples(FLOATS, FLOATS).map(sorted))
def test_the_grid_is_fine_and_holds_the_range(ends: list[float]) -> None:
    low, high = ends
    grid = Histogram.spanning(low, high)
    assert grid.low <= low <= high < grid.high
    # Half of the bins are in use, unless float32 has no more values there.
    if high - low > max(1e-3 * max(abs(low), abs(high)), 2.0**-100):
        assert (high - low) / grid.width > BINS / 2 - 2


@given(VALUES, VALUES, VALUES)
@settings(max_examples=200)
def test_merging_is_exact_and_in_any_order(a: Any, b: Any, c: Any) -> None:
    together = tensor(np.concatenate([a, b, c]))
    assert tensor(a).merge(tensor(b)).merge(tensor(c)) == together
    assert tensor(c).merge(tensor(a).merge(tensor(b))) == together


def test_merging_keeps_what_has_no_finite_element() -> None:
    nothing = tensor([0.0], count=5, nans=3, infs=2, zeros=0, bins=Histogram.spanning(0, 0))
    merged = nothing.merge(tensor([3.0, 5.0]))
    assert (merged.minimum, merged.maximum) == (3.0, 5.0)
    assert (merged.count, merged.finite, merged.nans, merged.infs) == (7, 2, 3, 2)
    assert merged.bins == tensor([3.0, 5.0]).bins


def test_channels_are_merged_each() -> None:
    left = tensor([1.0], channel_axis=1, channel_absmax=np.array([1, 5], np.float32))
    right = tensor([1.0], channel_axis=1, channel_absmax=np.array([3, 2], np.float32))
    merged = left.merge(right)
    assert merged.channel_absmax is not None
    assert merged.channel_absmax.tolist() == [3, 5]
    with pytest.raises(DataError, match="channel axis"):
        left.merge(tensor([1.0]))


@given(VALUES)
def test_json_gives_the_same_table_and_the_same_bytes(values: Any) -> None:
    absmax = np.array([0.1, 1e-40], np.float32)
    before = table(tensor(values, "b"), tensor([0.0], "a", channel_axis=3, channel_absmax=absmax))
    text = before.to_json()
    after = RangeTable.from_json(text)
    assert after == before
    assert after.to_json() == text
    assert list(json.loads(text)["tensors"]) == ["a", "b"]
    assert after.digest == before.digest != table(tensor([9.0])).digest


def test_tables_merge_into_the_same_whichever_is_first() -> None:
    left, right = table(tensor([1.0]), data="sha256:1"), table(tensor([2.0]), data="sha256:2")
    merged = left.merge(right)
    assert merged == right.merge(left)
    assert merged.samples == 6
    assert merged.data_digest not in (left.data_digest, right.data_digest)
    assert merged["t"].bins.total == 2


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (table(tensor([1.0]), model="sha256:other", data="sha256:2"), "different models"),
        (table(tensor([1.0])), "same samples"),
        (table(tensor([1.0]), tensor([1.0], "u"), data="sha256:2"), 'tensor "u"'),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(other: RangeTable, message: str) -> None:
    with pytest.raises(DataError, match=message):
        table(tensor([1.0])).merge(other)


def test_a_missing_tensor_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match='did you mean "conv_1"'):
        table(tensor([1.0], "conv_1"))["conv1"]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("samples"), 'key "samples" is missing'),
        (lambda d: d.update(schema=2), "schema 2"),
        (lambda d: d.update(extra=1), 'unknown key "extra"'),
        (lambda d: d["tensors"]["t"].pop("maximum"), 'tensor "t".*"maximum" is missing'),
        (lambda d: d["tensors"]["t"].update(minimum="0"), 'tensor "t".*minimum is not a finite'),
        (lambda d: d["tensors"]["t"].update(minimum=1e300), 'tensor "t".*minimum is not a finite'),
        (lambda d: d["tensors"]["t"].update(counts=[1, -1]), 'tensor "t".*counts holds'),
        (lambda d: d["tensors"]["t"].update(counts=[10]), 'tensor "t".*more than count'),
        (lambda d: d["tensors"]["t"].update(first=2047), 'tensor "t".*beyond the last'),
        (lambda d: d["tensors"]["t"].update(low=0.1), 'tensor "t".*not the grid'),
        (lambda d: d["tensors"]["t"].update(maximum=-9), 'tensor "t".*above maximum'),
        (lambda d: d["tensors"].update(t=[]), 'tensor "t".*not an object'),
    ],
)
def test_a_spoilt_document_is_refused_with_its_place(change: Change, message: str) -> None:
    document = json.loads(table(tensor([0.0, 1.0, 2.0])).to_json())
    change(document)
    with pytest.raises(DataError, match=message):
        RangeTable.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": NaN}'])
def test_what_is_no_document_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"calibration\.json"):
        RangeTable.from_json(text, where="calibration.json")
