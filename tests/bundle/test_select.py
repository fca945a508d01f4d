"""Choosing: what runs here, in which order, where else, and what is said where nothing does."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelforge.bundle.links import Link
from modelforge.bundle.read import Bundle
from modelforge.bundle.select import Selection, StageChoice, select
from modelforge.bundle.triton import serve, unserved
from modelforge.errors import InputError
from tests.bundle.deployed import ABOUT, PI_5, T4_SERVER, device, make, opened, record, timed

EDGE, CLOUD = Link("edge", 5.0, 100e6), Link("cloud", 20.0, 10e6)
PC = {**T4_SERVER, "gpus": []}


def about(fallback: list[str], budget: float | None = 50.0) -> dict[str, Any]:
    return {**ABOUT, "serving": {"task": "x", "latency_budget_ms": budget, "fallback": fallback}}


def ask(folder: Path, records: list[dict[str, Any]], facts: dict[str, Any], **more: Any) -> StageChoice:
    about_ = more.pop("about", ABOUT)
    return select(opened(folder, records, about_), device(facts), **more).stages[0]


def path(choice: StageChoice) -> list[tuple[str, str]]:
    return [(place.where, place.target) for place in choice.path]


def test_the_one_that_runs_here(tmp_path: Path) -> None:
    choice = ask(tmp_path, [record("t4"), record("a100"), record("rk3588")], T4_SERVER)
    assert choice.chosen is not None
    assert (choice.chosen.where, choice.chosen.target) == ("here", "t4")
    verdicts = {each.variant.record.target: each.match.verdict for each in choice.candidates}
    assert verdicts == {"t4": "runs", "a100": "cannot", "rk3588": "cannot"}


def test_an_accelerator_before_the_cpu_where_not_all_are_measured(tmp_path: Path) -> None:
    choice = ask(tmp_path, [record("x86-64", latency=timed(b1=3.0)), record("t4")], T4_SERVER)
    assert path(choice) == [("here", "t4"), ("here", "x86-64")]


def test_the_fastest_where_all_are_measured(tmp_path: Path) -> None:
    records = [record("x86-64", latency=timed(b1=0.2)), record("t4", latency=timed(b1=0.9))]
    assert path(ask(tmp_path, records, T4_SERVER))[0] == ("here", "x86-64")


def test_what_is_sure_to_run_before_what_is_not(tmp_path: Path) -> None:
    """The T4 is here, and TensorRT-RTX was not found: the CPU's variant is sure to run."""
    facts = {**T4_SERVER, "versions": {"onnxruntime": "1.32.0"}}
    choice = ask(tmp_path, [record("t4"), record("x86-64")], facts)
    assert path(choice) == [("here", "x86-64"), ("here", "t4")]
    assert "may be installed elsewhere" in choice.path[1].reasons[0]


def test_the_more_exact_cpu_profile_first(tmp_path: Path) -> None:
    avx512 = ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"]
    records = [record("x86-64"), record("x86-64-avx512")]
    assert path(ask(tmp_path / "a", records, {**PC, "cpuinfo": PC["cpuinfo"] + avx512}))[0][1] == "x86-64-avx512"
    assert path(ask(tmp_path / "b", records, PC)) == [("here", "x86-64")]


def test_the_path_goes_from_near_to_far(tmp_path: Path) -> None:
    records = [record("cortex-a76"), record("t4"), record("a100"), record("x86-64")]
    choice = ask(tmp_path, records, PI_5)
    assert path(choice)[0] == ("here", "cortex-a76")
    assert [where for where, _ in path(choice)] == ["here", "edge", "cloud"]
    assert not choice.path[1].reachable
    assert "--link edge=" in " ".join(choice.path[1].reasons)


def test_the_recipes_fallback_is_honoured_in_its_order(tmp_path: Path) -> None:
    records = [record("cortex-a76"), record("t4"), record("a100"), record("x86-64")]
    choice = ask(tmp_path, records, PI_5, about=about(["cortex-a76", "a100", "t4", "rk3588"]))
    assert path(choice) == [("here", "cortex-a76"), ("cloud", "a100"), ("edge", "t4")]
    assert choice.left_out == {"rk3588": "the bundle has no variant for it"}


def test_no_place_beside_the_recipes_fallback_without_a_link(tmp_path: Path) -> None:
    records = [record("cortex-a76"), record("t4"), record("a100")]
    assert path(ask(tmp_path, records, PI_5, about=about(["t4"]))) == [("here", "cortex-a76"), ("edge", "t4")]


def test_a_link_leads_to_a_tier_that_the_fallback_does_not_name(tmp_path: Path) -> None:
    records = [record("cortex-a76"), record("t4"), record("a100")]
    choice = ask(tmp_path, records, PI_5, about=about(["t4"]), links=[CLOUD])
    assert path(choice) == [("here", "cortex-a76"), ("edge", "t4"), ("cloud", "a100")]
    assert [place.reachable for place in choice.path] == [True, False, True]


def test_the_path_never_goes_back(tmp_path: Path) -> None:
    choice = ask(
        tmp_path,
        [record("cortex-a76"), record("t4"), record("a100")],
        T4_SERVER,
        about=about(["cortex-a76", "t4", "a100"]),
    )
    assert path(choice) == [("here", "t4"), ("cloud", "a100")]
    assert "never goes back" in choice.left_out["cortex-a76"]


def test_a_deferred_fallback_is_left_out_with_its_reason(tmp_path: Path) -> None:
    records = [record("cortex-a76"), record("t4", status="deferred")]
    choice = ask(tmp_path, records, PI_5, about=about(["t4"]))
    assert "modelforge finalize" in choice.left_out["t4"]


def test_over_the_budget_here_and_within_it_on_the_edge(tmp_path: Path) -> None:
    """81 ms here; on the edge 2 ms, and 5 + 1.1 ms there and 5 ms back."""
    records = [record("cortex-a76", latency=timed(b1=81.0)), record("t4", latency=timed(b1=2.0))]
    choice = ask(tmp_path, records, PI_5, links=[EDGE])
    here, edge = choice.path
    assert here.meets_budget is False
    assert "81 ms is above the budget of 50 ms" in here.reasons
    assert edge.transfer_ms == pytest.approx(10 + 110_592 / 100e3 + 8 / 100e3)
    assert edge.total_ms == pytest.approx(2 + 10 + 110_592 / 100e3 + 8 / 100e3)
    assert choice.chosen is edge
    assert ask(tmp_path / "2", records, PI_5, links=[EDGE], latency_budget_ms=100).chosen.target == "cortex-a76"  # type: ignore[union-attr]  # None fails the test too


def test_a_way_that_alone_takes_too_long(tmp_path: Path) -> None:
    records = [record("cortex-a76", latency=timed(b1=81.0)), record("t4")]
    choice = ask(tmp_path, records, PI_5, links=[Link("edge", 30.0, 100e6)])
    assert choice.path[1].meets_budget is False
    assert choice.path[1].total_ms is None
    assert choice.chosen is None


def test_a_time_that_is_not_known_is_no_reason_to_go_elsewhere(tmp_path: Path) -> None:
    choice = ask(tmp_path, [record("cortex-a76"), record("t4", latency=timed(b1=2.0))], PI_5, links=[EDGE])
    assert choice.chosen is choice.path[0]
    assert "whether it meets 50 ms is not known" in choice.chosen.reasons
    assert "execution: not measured" in choice.chosen.reasons


def test_estimates_are_told_apart(tmp_path: Path) -> None:
    latency = {"evidence": "none", "estimate": {"by_batch": {"1": 9.0}, "method": "roofline"}}
    choice = ask(tmp_path, [record("cortex-a76", latency=latency)], PI_5)
    assert choice.chosen is not None
    assert choice.chosen.to_json()["source"] == "estimated"
    assert "execution: 9 ms, estimated (roofline)" in choice.chosen.reasons


def test_nothing_here_and_a_link_to_the_edge(tmp_path: Path) -> None:
    records = [record("t4"), record("a100")]
    assert ask(tmp_path / "a", records, PI_5).chosen is None
    choice = ask(tmp_path / "b", records, PI_5, links=[EDGE, CLOUD])
    assert choice.chosen is not None
    assert (choice.chosen.where, choice.chosen.target) == ("edge", "t4")


def test_nothing_at_all(tmp_path: Path) -> None:
    choice = ask(tmp_path, [record("rk3588"), record("ascend-310p3")], PC)
    assert choice.chosen is None
    assert [each.needs[0] for each in choice.candidates] == ["an Ascend310P3 processor", "a Rockchip NPU of rk3588"]


@pytest.mark.parametrize(
    ("batch", "given", "refused"),
    [
        (9, {"min": 1, "opt": 4, "max": 8}, "it takes at most 8 samples at once"),
        (1, {"min": 2, "opt": 4, "max": 8}, "it takes at least 2 samples at once"),
        (3, {"values": [1, 4]}, ""),
        (5, {"values": [1, 4]}, "it takes at most 4 samples at once"),
        (4, {"min": 1, "opt": 4, "max": 8}, ""),
    ],
)
def test_batch_sizes(tmp_path: Path, batch: int, given: dict[str, Any], refused: str) -> None:
    choice = ask(tmp_path, [record("t4", batch=given)], T4_SERVER, batch=batch)
    assert choice.candidates[0].refused == refused
    assert (choice.chosen is None) == bool(refused)


def test_a_fixed_batch(tmp_path: Path) -> None:
    fixed = {**ABOUT, "inputs": [{"name": "x", "dtype": "float32", "shape": [4, 3]}]}
    choice = ask(tmp_path, [record("t4", batch=None)], T4_SERVER, batch=2, about=fixed)
    assert choice.candidates[0].refused == "its batch is fixed at 4"


def test_a_size_between_gears_takes_the_time_of_the_next(tmp_path: Path) -> None:
    given = record("t4", batch={"values": [1, 8]}, latency=timed(b1=1.0, b8=4.0))
    assert ask(tmp_path, [given], T4_SERVER, batch=3).path[0].total_ms == 4.0


def test_several_batch_sets_of_one_target(tmp_path: Path) -> None:
    records = [
        record("ascend-310p3", batch={"values": [size]}, latency=timed(**{f"b{size}": size * 1.5})) for size in (1, 8)
    ]
    atlas = {**PI_5, "ascend": ["Ascend310P3"], "versions": {"cann": "8.0.0"}}
    choice = ask(tmp_path, records, atlas, batch=8)
    assert choice.chosen is not None
    assert choice.chosen.total_ms == 12.0
    assert ask(tmp_path / "2", records, atlas).chosen.total_ms == 1.5  # type: ignore[union-attr]  # None fails the test too


def test_only_a_precision(tmp_path: Path) -> None:
    records = [record("t4", precision="fp16"), record("x86-64")]
    choice = ask(tmp_path, records, T4_SERVER, precisions=["int8"])
    assert path(choice) == [("here", "x86-64")]
    assert choice.candidates[0].refused == "its precision is fp16"
    with pytest.raises(InputError, match="fp16"):
        ask(tmp_path / "b", records, T4_SERVER, precisions=["fp61"])


def test_stages_are_chosen_one_by_one(tmp_path: Path) -> None:
    records = [record("t4", stage="tail"), record("x86-64", stage="head")]
    bundle = opened(tmp_path, records, ABOUT)
    alone = select(bundle, device(PC))
    assert {stage.stage: stage.chosen.target for stage in alone.stages if stage.chosen} == {"head": "x86-64"}
    assert not alone.is_complete
    tail = {stage.stage: stage.chosen for stage in select(bundle, device(PC), links=[EDGE]).stages}["tail"]
    assert tail is not None
    assert (tail.where, tail.transfer_ms) == ("edge", None)
    assert 'does not tell the tensors of the stage "tail"' in " ".join(tail.reasons)


def test_recommendations_stand_beside(tmp_path: Path) -> None:
    choice = ask(tmp_path, [record("t4", latency=timed(b1=2.0, b4=5.0, b8=9.0))], T4_SERVER)
    batching = choice.candidates[0].batching
    assert batching is not None
    assert (batching.max_batch, batching.source, batching.max_queue_delay_us) == (8, "measured", 9000)


def test_the_same_document_every_time_and_all_of_it_json(tmp_path: Path) -> None:
    import json

    place = make(tmp_path, [record("t4"), record("x86-64", latency=timed(b1=1.0)), record("a100")], about(["a100"]))
    documents = [
        json.dumps(select(place, device(T4_SERVER), links=[CLOUD]).to_json(), allow_nan=False) for _ in range(2)
    ]
    assert documents[0] == documents[1]


def test_the_python_call_is_light(tmp_path: Path) -> None:
    """A scheduler's process: no numpy, no vendor module; and the call itself reads a few small files."""
    place = make(tmp_path, [record("t4"), record("x86-64")])
    code = (
        "import sys; from pathlib import Path\n"
        "from modelforge.bundle.select import select\n"
        f"found = select(Path({str(place)!r}))\n"
        "assert found.to_json()['stages']\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'tvm', 'tensorrt_rtx', 'rich', 'cryptography'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 100) | st.sampled_from(["t4", "edge", "batch", "float32", "?", "main"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["t4", "arch", "tier", "sm", "cpuinfo", "isa", "name", "shape", "dtype", "fallback", "batch",
                         "latency_budget_ms", "values", "max", "inputs", "outputs"]),
        inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
SOUND = {
    **ABOUT,
    "serving": {"latency_budget_ms": 50.0, "fallback": ["x86-64", "t4"]},
    "dims": {"batch": {"min": 1, "opt": 4, "max": 8}, "length": {"values": [16, 32]}},
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length"]}],
    "targets": {
        "x86-64": {"title": "a PC", "tier": "cloud", "arch": {"kind": "cpu", "isa": "x86-64", "cpuinfo": ["avx2"]}}
    },
    "stages": [{"name": "tail", "inputs": ABOUT["inputs"], "outputs": ABOUT["outputs"]}],
}


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, part in inside for path in places(part, (*above, key)))]


def spoiled(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    document: Any = deepcopy(SOUND)
    inside = document
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return document  # type: ignore[no-any-return]  # JSON


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    records = [record("t4"), record("x86-64"), record("t4", stage="tail"), record("x86-64", batch=None, stage="tail")]
    return opened(tmp_path_factory.mktemp("whole"), records, files=[("model.onnx", "lowered-model", b"x")])


@settings(max_examples=300)
@given(st.sampled_from(places(SOUND)[1:]), JSON, st.integers(1, 9))
def test_an_about_from_anywhere_is_answered(whole: Bundle, place: tuple[Any, ...], value: Any, batch: int) -> None:
    """It is open JSON of somebody else: whatever stands there, there is an answer and no crash."""
    bundle = replace(whole, about=spoiled(place, value))
    select(bundle, device(T4_SERVER), links=[EDGE, CLOUD], batch=batch).to_json()
    for variant in bundle.variants:
        if not unserved(variant):
            serve(bundle, variant)


def test_selection_is_complete(tmp_path: Path) -> None:
    found: Selection = select(opened(tmp_path, [record("t4")]), device(T4_SERVER))
    assert found.is_complete
    assert found.latency_budget_ms == 50.0
