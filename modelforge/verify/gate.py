"""The accuracy gate: baseline first, then the metric, and agreement and SQNR beside it. Fails closed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modelforge.errors import AccuracyError
from modelforge.verify.metrics import (
    ChannelGroup,
    Comparison,
    LabelMetric,
    Outputs,
    compare,
    compare_group,
    fault_of,
    majority_share,
)

# What a precision must reach beside the recipe's metric, where the recipe says nothing: (SQNR in dB, agreement).
# FP16 has an 11-bit significand: single operations round at 66 dB; real networks reach 45 to 77 dB in ONNX Runtime, and
# text detectors, whose error sits on the few pixels of steep edges, 32 dB. INT8 networks with their accuracy intact
# reach 9 to 30 dB. FP32 differs by the order of its sums only.
FLOORS = {"fp32": (60.0, 0.999), "fp16": (30.0, 0.99), "int8": (9.0, 0.95), "mixed": (9.0, 0.95)}

COLLAPSED_AT_MOST = 0.1
"""The share of a group's channels that may be the same everywhere where the FP32 model's are not."""
MIXED_RATIO = 50.0
"""Groups from the same kind of operator are the scales of one thing, unless their largest values differ by more: the
silent scale of a detector has a poor SQNR and decides nothing. As ``mixed_ratio`` of the dialects."""


@dataclass(frozen=True)
class GateRules:
    """The recipe's [accuracy] section as plain values."""

    metric: str
    max_drop: float | None
    min_reference: float | None = None
    min_agreement: float | None = None
    min_sqnr_db: float | None = None

    def floors(self, precision: str) -> tuple[float, float]:
        """(SQNR in dB, agreement) that hold for a precision."""
        sqnr_db, agreement = FLOORS[precision]
        return (
            sqnr_db if self.min_sqnr_db is None else self.min_sqnr_db,
            agreement if self.min_agreement is None else self.min_agreement,
        )


@dataclass(frozen=True)
class Verdict:
    """What a variant reached. ``reasons`` is empty exactly where ``passed``; ``suspicion`` does not fail it."""

    passed: bool
    reference: float | None
    value: float | None
    drop: float | None
    samples: int
    reasons: tuple[str, ...]
    outputs: Mapping[str, Comparison] = field(default_factory=dict)
    suspicion: str | None = None
    groups: Mapping[ChannelGroup, Comparison] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The ``accuracy`` object of a variant record, less evidence and metric."""
        worst = list(self.outputs.values())
        agreements = [each.agreement for each in worst if each.agreement is not None]
        noisy = [each.sqnr_db for each in worst if each.sqnr_db is not None]
        return {
            "reference": self.reference,
            "value": self.value,
            "drop": self.drop,
            "sqnr_db": min(noisy) if noisy and math.isfinite(min(noisy)) else None,
            "identical": all(each.identical for each in worst),
            "cosine": min(each.cosine for each in worst),
            "agreement": min(agreements) if agreements else None,
            "samples": self.samples,
            "gate": "passed" if self.passed else "failed",
            "reasons": list(self.reasons),
            "suspicion": self.suspicion,
            "per_output": [
                {**key, **{name: _finite(value) for name, value in each.facts().items()}} for key, each in self._rows()
            ],
        }

    def _rows(self) -> Iterator[tuple[dict[str, str], Comparison]]:
        """Each output, and behind it its channel groups."""
        for name, each in self.outputs.items():
            yield {"output": name}, each
            for group, found in self.groups.items():
                if group.output == name:
                    yield {"output": name, "group": group.title}, found


def check_baseline(
    rules: GateRules, metric: LabelMetric | None, reference: Outputs, labels: np.ndarray[Any, Any] | None
) -> float | None:
    """Check the FP32 model before anything is compared with it; give its metric (1.0 for cosine, None for SQNR).

    Raises:
        AccuracyError: its outputs are no outputs, or it does not meet the user's own metric.
    """
    for name, output in reference.items():
        fault = fault_of(output)
        if fault:
            raise AccuracyError(
                f'the FP32 model itself is broken on this data: output "{name}" {fault}',
                fix="check the model, and that the data is preprocessed as the model wants it",
            )
    if metric is None:
        return 1.0 if rules.metric == "cosine" else None
    value = metric(reference, labels)
    if rules.min_reference is not None:
        floor, meaning = rules.min_reference, "`min_reference`"
    elif labels is not None and rules.metric in ("top1", "topk"):
        floor, meaning = majority_share(labels), "what guessing the most frequent label would reach"
    else:
        return value
    if value < floor or (value == floor and rules.min_reference is None and floor < 1):
        raise AccuracyError(
            f"the FP32 model reaches {rules.metric} {value:.4f} on this data; {meaning} is {floor:.4f}",
            fix="the baseline is wrong: check preprocessing, label order and the data before quantizing anything",
        )
    return value


def judge(
    rules: GateRules,
    metric: LabelMetric | None,
    precision: str,
    reference: Outputs,
    value: Outputs,
    labels: np.ndarray[Any, Any] | None,
    groups: Sequence[ChannelGroup] = (),
) -> Verdict:
    """Hold a variant's outputs against the FP32 model's on the same samples.

    Args:
        groups: channels of outputs that mean different things: each must reach the floors on its own, as a cosine of
            boxes and scores together says nothing of the scores.

    Raises:
        AccuracyError: see :func:`check_baseline`.
    """
    baseline = check_baseline(rules, metric, reference, labels)
    samples = len(next(iter(reference.values())))
    missing = [name for name in reference if name not in value]
    mismatched = [name for name in reference if name in value and value[name].shape != reference[name].shape]
    if missing or mismatched:
        reason = f"outputs missing: {missing}" if missing else f"outputs of another shape: {mismatched}"
        return Verdict(False, baseline, None, None, samples, (reason,), {})
    outputs = {name: compare(reference[name], value[name]) for name in reference}
    reasons = [f'output "{name}" {each.fault}' for name, each in outputs.items() if each.fault]
    reached: float | None = None
    drop: float | None = None
    if not reasons and rules.metric != "sqnr":
        reached = metric(value, labels) if metric else min(each.cosine for each in outputs.values())
        drop = (baseline or 0.0) - reached
        # One rounding step of slack: 0.98 - 0.97 is 0.010000000000000009.
        if rules.max_drop is not None and drop > rules.max_drop + 1e-9:
            reasons.append(f"{rules.metric} drops by {drop:.4f}, allowed is {rules.max_drop:.4f}")
    min_sqnr_db, min_agreement = rules.floors(precision)
    for name, each in outputs.items():
        if each.sqnr_db is not None and each.sqnr_db < min_sqnr_db:
            reasons.append(f'output "{name}" has an SQNR of {each.sqnr_db:.1f} dB, asked for is {min_sqnr_db:.1f} dB')
        # An agreement that nobody asked for gates class scores only: in [samples, anchors, boxes] or a pixel map the
        # last axis holds no classes.
        gates = rules.min_agreement is not None or reference[name].ndim == 2
        if gates and each.agreement is not None and each.agreement < min_agreement:
            reasons.append(f'output "{name}" agrees in {each.agreement:.4f}, asked for is {min_agreement:.4f}')
    apart = {group: compare_group(group, reference[group.output], value[group.output]) for group in groups}
    for group, each in apart.items():
        reasons += _group_faults(group, each, reference[group.output], rules, precision)
    suspicion = _suspicion(rules, precision, drop, samples)
    return Verdict(not reasons, baseline, reached, drop, samples, tuple(reasons), outputs, suspicion, apart)


def _group_faults(
    group: ChannelGroup, found: Comparison, reference: np.ndarray[Any, Any], rules: GateRules, precision: str
) -> list[str]:
    """Why a channel group fails the gate; empty where it does not."""
    title = f'output "{group.output}", channels {group.title},'
    if found.fault:
        return [f"{title} {found.fault}"]
    if found.collapsed is not None and found.collapsed > COLLAPSED_AT_MOST:
        return [f"{title} collapsed: {found.collapsed:.0%} of its channels are the same everywhere"]
    min_sqnr_db, min_agreement = rules.floors(precision)
    faults = []
    if found.sqnr_db is not None and found.sqnr_db < min_sqnr_db and _says_its_own(group, reference):
        faults.append(f"{title} have an SQNR of {found.sqnr_db:.1f} dB, asked for is {min_sqnr_db:.1f} dB")
    if rules.min_agreement is not None and found.agreement is not None and found.agreement < min_agreement:
        faults.append(f"{title} agree in {found.agreement:.4f}, asked for is {min_agreement:.4f}")
    return faults


def _says_its_own(group: ChannelGroup, reference: np.ndarray[Any, Any]) -> bool:
    if not group.alike:
        return True
    own, whole = float(np.abs(group.of(reference)).max(initial=0.0)), float(np.abs(reference).max(initial=0.0))
    return whole > MIXED_RATIO * own > 0


def _suspicion(rules: GateRules, precision: str, drop: float | None, samples: int) -> str | None:
    """A coarser model that scores clearly higher than FP32 says that the metric rewards noise, not that it is better.

    Clearly: by more than the drop that is allowed, and by more than three samples.
    """
    if drop is None or precision == "fp32" or -drop <= max(rules.max_drop or 0.0, 3 / samples):
        return None
    return f"{precision} scores higher than fp32 by {-drop:.4f}: check the metric, it may reward noise"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
