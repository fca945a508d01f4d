"""The gate fails closed: each rule alone is enough to fail a variant."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modelforge.errors import AccuracyError
from modelforge.verify.gate import GateRules, check_baseline, judge
from modelforge.verify.metrics import _TopK

RNG = np.random.RandomState(0)
SCORES = RNG.randn(200, 4).astype(np.float32)
LABELS = SCORES.argmax(1)
TOP1 = _TopK(1, None, "accuracy.metric")
RULES = GateRules(metric="top1", max_drop=0.01)


def verdict(value: np.ndarray, precision: str = "fp32", rules: GateRules = RULES, metric=TOP1):
    return judge(rules, metric, precision, {"y": SCORES}, {"y": value}, LABELS)


def test_the_same_passes() -> None:
    found = verdict(SCORES)
    assert found.passed
    assert found.facts()["identical"]
    assert found.facts()["sqnr_db"] is None
    assert found.drop == 0


def test_a_drop_fails() -> None:
    worse = SCORES.copy()
    worse[:5] = -worse[:5]
    found = verdict(worse, rules=GateRules("top1", 0.01, min_agreement=0, min_sqnr_db=-100))
    assert not found.passed
    assert "drops by" in found.reasons[0]
    assert verdict(worse, rules=GateRules("top1", 0.05, min_agreement=0, min_sqnr_db=-100)).passed


def test_labels_are_never_the_only_gate() -> None:
    """The metric does not drop at all, and the outputs are far off."""
    noisy = SCORES * 3
    found = verdict(noisy)
    assert found.drop == 0
    assert not found.passed
    assert "SQNR" in found.reasons[0]


def test_precision_decides_what_noise_is_allowed() -> None:
    noisy = SCORES + RNG.randn(*SCORES.shape).astype(np.float32) * 1e-2
    assert not verdict(noisy, "fp32").passed
    assert verdict(noisy, "fp16").passed


@pytest.mark.parametrize("value", [np.zeros_like(SCORES), np.full_like(SCORES, np.nan), np.full_like(SCORES, 7)])
def test_a_collapsed_output_fails_whatever_is_allowed(value: np.ndarray) -> None:
    free = GateRules("cosine", 2.0, min_agreement=0, min_sqnr_db=-math.inf)
    assert not verdict(value, rules=free, metric=None).passed


def test_missing_and_misshaped_outputs_fail() -> None:
    assert "missing" in judge(RULES, TOP1, "fp32", {"y": SCORES}, {}, LABELS).reasons[0]
    assert "another shape" in judge(RULES, TOP1, "fp32", {"y": SCORES}, {"y": SCORES[:, :3]}, LABELS).reasons[0]


def test_the_boundary_is_inside() -> None:
    worse = SCORES.copy()
    worse[:2] = -worse[:2]
    assert verdict(worse, rules=GateRules("top1", 0.01, min_agreement=0, min_sqnr_db=-100)).passed


def test_baseline_must_beat_guessing() -> None:
    with pytest.raises(AccuracyError, match="guessing the most frequent label"):
        check_baseline(RULES, TOP1, {"y": SCORES}, (LABELS + 1) % 4)
    with pytest.raises(AccuracyError, match=r"`min_reference` is 0\.9900"):
        check_baseline(
            GateRules("top1", 0.01, min_reference=0.99), TOP1, {"y": SCORES}, np.where(np.arange(200) < 10, 0, LABELS)
        )


def test_baseline_must_be_an_output() -> None:
    with pytest.raises(AccuracyError, match="holds NaN"):
        check_baseline(RULES, TOP1, {"y": np.full_like(SCORES, np.nan)}, LABELS)


def test_pixel_maps_are_not_gated_on_agreement_unasked() -> None:
    """[samples, anchors, 5] is no table of classes: 1 % of flipped argmax says nothing there."""
    boxes = RNG.randn(4, 100, 5).astype(np.float32)
    boxes[..., 1] = boxes[..., 0]
    value = boxes.copy()
    value[..., 0] -= 1e-4
    rules = GateRules("cosine", 0.01)
    assert judge(rules, None, "fp16", {"y": boxes}, {"y": value}, None).passed
    asked = GateRules("cosine", 0.01, min_agreement=0.999)
    assert not judge(asked, None, "fp16", {"y": boxes}, {"y": value}, None).passed


def test_a_coarser_model_that_scores_higher_is_suspicious() -> None:
    """Labels that the FP32 model misses in 30 places, and the value meets."""
    worse = SCORES.copy()
    worse[:30] = -worse[:30]
    free = GateRules("top1", 0.01, min_agreement=0, min_sqnr_db=-100)
    found = judge(free, TOP1, "int8", {"y": worse}, {"y": SCORES}, LABELS)
    assert found.passed
    assert "check the metric" in str(found.suspicion)
    assert verdict(SCORES, "int8").suspicion is None
