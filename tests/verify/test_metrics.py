"""Figures against what they are by definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelforge.errors import DataError
from modelforge.verify.metrics import compare, fault_of, label_metric, majority_share

floats = hnp.arrays(np.float32, (6, 5), elements=st.floats(-100, 100, width=32))


@given(floats, floats)
def test_figures_by_their_definitions(reference: np.ndarray, value: np.ndarray) -> None:
    found = compare(reference, value)
    first, second = reference.astype(float), value.astype(float)
    assert found.max_abs == pytest.approx(abs(first - second).max())
    assert found.identical == (reference == value).all()
    noise = ((first - second) ** 2).sum()
    if noise > 0 and (first**2).sum() > 0:
        assert found.sqnr_db == pytest.approx(10 * math.log10((first**2).sum() / noise))
    assert found.agreement == pytest.approx((first.argmax(1) == second.argmax(1)).mean())
    assert -1 - 1e-9 <= found.cosine <= 1 + 1e-9


def test_known_values() -> None:
    reference = np.array([[3.0, 4.0]], np.float32)
    found = compare(reference, reference * np.float32(1.1))
    assert found.sqnr_db == pytest.approx(20, abs=1e-4)
    assert found.cosine == pytest.approx(1)


def test_agreement_only_where_the_last_axis_holds_classes() -> None:
    assert compare(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)).agreement == 1
    assert compare(np.zeros((2, 3, 4, 5), np.float32), np.ones((2, 3, 4, 5), np.float32)).agreement is None
    assert compare(np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32)).agreement is None
    assert compare(np.zeros((2, 3), np.int64), np.ones((2, 3), np.int64)).agreement is None


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ([1.0, math.nan], "NaN"),
        ([1.0, math.inf], "infinity"),
        ([0.0, 0.0], "all zero"),
        ([2.0, 2.0], "all equal"),
        ([1.0, 2.0], None),
        ([], "empty"),
    ],
)
def test_outputs_that_are_none(value: list[float], fault: str | None) -> None:
    found = fault_of(np.array(value, np.float32))
    assert found is None if fault is None else fault in str(found)


def test_flat_is_right_where_the_reference_is_flat() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert compare(zeros, zeros).fault is None


def test_nan_never_looks_good() -> None:
    reference = np.array([[1.0, 2.0]], np.float32)
    found = compare(reference, np.array([[math.nan, 2.0]], np.float32))
    assert found.sqnr_db == -math.inf
    assert found.agreement == 0
    assert found.fault


def metric(name: str, folder: Path, **more: object):
    return label_metric(name, **{"k": 2, "output": None, "folder": folder, "where": "accuracy.metric", **more})  # type: ignore[arg-type]  # test shorthand


def test_top1_and_topk(tmp_path: Path) -> None:
    scores = {"s": np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], np.float32)}
    labels = np.array([1, 1, 0])
    assert metric("top1", tmp_path)(scores, labels) == pytest.approx(1 / 3)
    assert metric("topk", tmp_path)(scores, labels) == pytest.approx(2 / 3)


def test_label_faults(tmp_path: Path) -> None:
    scores = {"s": np.zeros((2, 3), np.float32)}
    top1 = metric("top1", tmp_path)
    with pytest.raises(DataError, match="needs labels"):
        top1(scores, None)
    with pytest.raises(DataError, match="from 0 to 3, the model has 3 classes"):
        top1(scores, np.array([0, 3]))
    with pytest.raises(DataError, match="one integer a sample"):
        top1(scores, np.array([0.0, 1.0]))
    with pytest.raises(DataError, match="several outputs: s, t"):
        top1({**scores, "t": scores["s"]}, np.array([0, 1]))
    assert metric("top1", tmp_path, output="t")({**scores, "t": scores["s"]}, np.array([0, 0])) == 1


def test_user_metric(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def half(outputs, labels): return 0.5\ndef bad(outputs, labels): return 1 / 0\n")
    assert metric("mine:half", tmp_path)({}, None) == 0.5
    with pytest.raises(DataError, match="ZeroDivisionError"):
        metric("mine:bad", tmp_path)({}, None)


def test_majority() -> None:
    assert majority_share(np.array([1, 1, 1, 0])) == 0.75
