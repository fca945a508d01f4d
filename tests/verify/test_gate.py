"""The gate fails closed: each rule alone is enough to fail a variant."""

from __future__ import annotations

import math

import numpy as np
import pytest

from modelforge.errors import AccuracyError
from modelforge.verify.gate import GateRules, check_baseline, judge
from modelforge.verify.metrics import ChannelGroup, _TopK

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


BOXES = ChannelGroup("y", "boxes", 1, 0, 4, alike=False)
SCORES_GROUP = ChannelGroup("y", "scores", 1, 4, 14, alike=False)


def detector(samples: int = 6, anchors: int = 300) -> np.ndarray:
    """Boxes of hundreds of pixels, and ten classes whose scores come from a sigmoid: ``[samples, 14, anchors]``."""
    random = np.random.RandomState(1)
    boxes = random.uniform(0, 320, (samples, 4, anchors))
    scores = 1 / (1 + np.exp(-random.normal(-2, 2, (samples, 10, anchors))))
    return np.concatenate([boxes, scores], axis=1).astype(np.float32)


def judged(reference: np.ndarray, value: np.ndarray, *groups: ChannelGroup, **rules: float):
    return judge(GateRules("cosine", 0.01, **rules), None, "int8", {"y": reference}, {"y": value}, None, groups)


def test_one_scale_over_boxes_and_scores_passes_as_a_whole_and_fails_by_groups() -> None:
    exact = detector()
    scale = np.float32(320 / 127)
    value = np.rint(exact / scale) * scale
    whole = judged(exact, value)
    assert whole.passed
    assert whole.value > 0.999
    found = judged(exact, value, BOXES, SCORES_GROUP)
    assert not found.passed
    assert found.reasons == ('output "y", channels 4:14 scores, is all zero',)
    rows = found.facts()["per_output"]
    assert [row.get("group") for row in rows] == [None, "0:4 boxes", "4:14 scores"]
    assert rows[1]["sqnr_db"] > 30
    assert rows[2]["collapsed"] == 1.0


def test_some_dead_classes_are_a_collapse() -> None:
    exact = detector()
    value = exact.copy()
    value[:, 5:7] = 0.0  # two classes of ten, both alive in FP32
    (reason,) = judged(exact, value, BOXES, SCORES_GROUP, min_sqnr_db=-100).reasons
    assert "20% of its channels are the same everywhere" in reason
    exact[:, 5:7] = value[:, 5:7] = 1e-6  # dead in FP32, too
    exact[0, 5, 0] = 2e-6
    assert judged(exact, value, BOXES, SCORES_GROUP, min_sqnr_db=-100).passed


def test_a_group_has_the_floor_of_an_output() -> None:
    exact = detector()
    value = exact.copy()
    value[:, 4:] = np.clip(value[:, 4:] + np.random.RandomState(2).normal(0, 0.3, value[:, 4:].shape), 0, 1)
    assert judged(exact, value).passed
    (reason,) = judged(exact, value, BOXES, SCORES_GROUP).reasons
    assert "channels 4:14 scores" in reason
    assert "SQNR" in reason
    assert judged(exact, value, BOXES, SCORES_GROUP, min_sqnr_db=1).passed


def test_a_silent_scale_of_the_same_kind_is_not_held_to_it() -> None:
    """Scores of two scales of a detector; nothing is seen in the second."""
    near = detector()[:, 4:]
    far = near * np.float32(0.04)
    exact, value = np.concatenate([near, far], axis=1), np.concatenate([near, far * 3], axis=1)
    ends = {"near": (0, 10), "far": (10, 20)}
    assert judged(exact, value, *(ChannelGroup("y", name, 1, *end, alike=True) for name, end in ends.items())).passed
    apart = [ChannelGroup("y", name, 1, *end, alike=False) for name, end in ends.items()]
    assert "SQNR" in judged(exact, value, *apart).reasons[0]


def test_the_class_of_each_box_is_asked_for_by_min_agreement() -> None:
    exact = detector()
    value = exact.copy()
    value[:, 4:] = np.roll(value[:, 4:], 1, axis=1)  # every class is the next one
    found = judged(exact, value, BOXES, SCORES_GROUP, min_sqnr_db=-100)
    assert found.passed
    agreements = [row.get("agreement") for row in found.facts()["per_output"][1:]]
    assert agreements[0] is None
    assert agreements[1] < 0.05
    assert not judged(exact, value, BOXES, SCORES_GROUP, min_sqnr_db=-100, min_agreement=0.9).passed
