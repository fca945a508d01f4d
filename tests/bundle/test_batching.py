"""Recommended batch sizes: a budget holds under load, and a larger batch is worth its wait."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.bundle.batching import Curve, curve_of, recommend, sizes_of
from modelforge.bundle.record import VariantRecord
from modelforge.store import canonical_json
from tests.bundle.deployed import record, timed

CURVE = Curve({1: 2.0, 2: 2.4, 4: 3.2, 8: 5.6, 16: 11.0}, "measured")
SIZES = (1, 4, 16)


def with_latency(latency: dict[str, Any], batch: Any = None) -> VariantRecord:
    data = record("x86-64", latency=latency, batch=batch)
    data["artifact"] |= {"digest": "sha256:" + "0" * 64, "size": 1}
    return VariantRecord.from_bytes(canonical_json(data), where="x86-64")


def test_the_largest_batch_of_which_two_fit_the_budget() -> None:
    """A request waits for the batch that runs (5.6 ms), for its own to fill, and for its own to run (5.6 ms)."""
    found = recommend(CURVE, SIZES, 15.0)
    assert found is not None
    assert found.preferred == (1, 2, 4, 8)
    assert found.max_batch == 8
    assert found.max_queue_delay_us == int((15.0 - 2 * 5.6) * 1000)
    assert found.milliseconds == 5.6
    assert found.throughput == pytest.approx(8000 / 5.6, rel=1e-3)
    assert found.meets_budget is True


def test_never_waits_longer_than_a_batch_takes() -> None:
    found = recommend(CURVE, SIZES, 1000.0)
    assert found is not None
    assert (found.max_batch, found.max_queue_delay_us) == (8, 5600)


def test_a_batch_that_answers_no_more_a_second_is_not_preferred() -> None:
    """16 takes twice as long as 8, within the noise: it only makes answers wait."""
    found = recommend(Curve({1: 2.0, 8: 5.6, 16: 11.2}, "measured"), SIZES, None)
    assert found is not None
    assert found.preferred == (1, 8)
    assert found.meets_budget is None
    assert found.max_queue_delay_us == 0


def test_a_budget_that_holds_on_an_idle_server_only() -> None:
    found = recommend(CURVE, SIZES, 3.0)
    assert found is not None
    assert (found.max_batch, found.max_queue_delay_us, found.meets_budget) == (1, 0, True)
    assert "idle" in found.reasons[0]


def test_a_budget_that_nothing_meets() -> None:
    found = recommend(CURVE, SIZES, 1.5)
    assert found is not None
    assert (found.max_batch, found.meets_budget) == (1, False)
    assert found.reasons == ("batch 1 alone takes 2 ms, measured: above 1.5 ms",)


def test_nothing_measured() -> None:
    found = recommend(Curve({}, "none"), SIZES, 10.0)
    assert found is not None
    assert (found.preferred, found.max_batch, found.max_queue_delay_us) == ((4, 16), 16, 0)
    assert found.source == "none"
    assert found.meets_budget is None
    assert "no latency is recorded" in found.reasons[0]


def test_sizes_of_which_nothing_is_known_are_told() -> None:
    found = recommend(Curve({4: 0.034}, "measured"), (1, 4, 8), 5.0)
    assert found is not None
    assert (found.preferred, found.max_batch) == ((4,), 4)
    assert found.reasons == ("nothing is known of batches of 8: not recommended",)


def test_a_fixed_batch_has_no_recommendation() -> None:
    assert recommend(CURVE, (), 10.0) is None


def test_sizes_that_it_was_not_built_for_are_not_recommended() -> None:
    found = recommend(CURVE, (1, 4), None)
    assert found is not None
    assert found.max_batch == 4


TIMES = st.dictionaries(st.integers(1, 64), st.floats(0.01, 500, allow_nan=False), min_size=1, max_size=8)


@given(TIMES, st.floats(0.01, 2000))
def test_a_recommendation_holds_what_it_promises(times: dict[int, float], budget: float) -> None:
    curve = Curve(times, "measured")
    found = recommend(curve, tuple(sorted(times)), budget)
    assert found is not None
    assert found.max_batch == found.preferred[-1] == max(found.preferred)
    assert set(found.preferred) <= set(times)
    time = times[found.max_batch]
    if found.meets_budget:
        assert time + found.max_queue_delay_us / 1000 <= budget
        if "idle" not in " ".join(found.reasons):
            assert 2 * time + found.max_queue_delay_us / 1000 <= budget + 1e-9
    else:
        # No size meets it, not even the one that was recommended.
        assert found.max_batch == min(times)
        assert times[min(times)] > budget
    throughput = [size / times[size] for size in found.preferred]
    assert throughput == sorted(throughput)


@given(TIMES, st.integers(1, 64))
def test_a_time_lies_between_its_neighbours(times: dict[int, float], size: int) -> None:
    found = Curve(times, "measured").at(size)
    if size > max(times):
        assert found.milliseconds is None
    elif size < min(times):
        assert found.milliseconds == times[min(times)]
        assert "at most" in found.detail
    else:
        low = max(each for each in times if each <= size)
        high = min(each for each in times if each >= size)
        assert found.milliseconds is not None
        assert min(times[low], times[high]) - 1e-9 <= found.milliseconds <= max(times[low], times[high]) + 1e-9


@pytest.mark.parametrize(
    ("latency", "curve"),
    [
        ({"evidence": "none"}, Curve({}, "none")),
        (timed(b4=6.0, b1=2.0), Curve({1: 2.0, 4: 6.0}, "measured")),
        ({"evidence": "device", "batch": 4, "p50_ms": 0.034, "threads": 1}, Curve({4: 0.034}, "measured", "1 thread")),
        ({"evidence": "device", "p50_ms": 0.034}, Curve({}, "none")),
        # qemu's time is not the device's.
        ({"evidence": "emulator", "by_batch": {"1": 900.0}}, Curve({}, "none")),
        (
            {"evidence": "none", "estimate": {"by_batch": {"1": 1.5}, "method": "roofline"}},
            Curve({1: 1.5}, "estimated", "roofline"),
        ),
        (timed(b1=2.0) | {"estimate": {"by_batch": {"1": 1.5}}}, Curve({1: 2.0}, "measured")),
        ({"evidence": "device", "by_batch": {"one": 2.0, "0": 1.0, "2": "x", "4": -1, "8": True}}, Curve({}, "none")),
        ({"evidence": "device", "by_batch": [1, 2]}, Curve({}, "none")),
        ({"evidence": "device", "batch": 0, "p50_ms": 1.0}, Curve({}, "none")),
    ],
)
def test_what_a_record_tells(latency: dict[str, Any], curve: Curve) -> None:
    assert curve_of(with_latency(latency)) == curve


def test_sizes_of_a_record() -> None:
    assert sizes_of(with_latency({"evidence": "none"}, {"min": 1, "opt": 4, "max": 8})) == (1, 4, 8)
    assert sizes_of(with_latency({"evidence": "none"}, {"values": [6, 1]})) == (1, 6)
    assert sizes_of(with_latency({"evidence": "none"})) == ()
