"""A split as a step sees it: planned purely, written by a worker from JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modelforge.errors import BuildError, DataError, InputError
from modelforge.forge.splitting import (
    SplitWish,
    chain_check,
    check_chain,
    plan_key,
    plan_stages,
    read_profile,
    split_model,
    write_stages,
)
from modelforge.graph.load import check_model
from modelforge.graph.split_graph import read_layers
from modelforge.store import canonical_json
from modelforge.target import Registry
from tests.graph.conftest import packaged


def test_planning_writes_nothing_and_gives_the_same_key_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wish = SplitWish(stages=2)
    keys = [canonical_json(plan_key(plan_stages(packaged("magika"), wish, Registry()).plan)) for _ in range(2)]
    assert keys[0] == keys[1]
    assert list(tmp_path.iterdir()) == []
    other = canonical_json(plan_key(plan_stages(packaged("magika"), SplitWish(stages=3), Registry()).plan))
    assert other != keys[0]


def test_the_worker_writes_what_was_planned(tmp_path: Path) -> None:
    """Through JSON, as a child process gets it; the same plan gives the same bytes."""
    model = packaged("magika")
    plan = plan_stages(model, SplitWish(stages=2), Registry()).plan
    contents = []
    for name in ("a", "b"):
        request = json.loads(json.dumps({"model": str(model), "plan": plan.facts(), "folder": str(tmp_path / name)}))
        answer = write_stages(request)
        assert answer["files"] == {"stage1": ["stage1.onnx"], "stage2": ["stage2.onnx"]}
        assert [stage["name"] for stage in answer["manifest"]["stages"]] == ["stage1", "stage2"]
        for stage in ("stage1", "stage2"):
            check_model(tmp_path / name / f"{stage}.onnx")
        contents.append([(tmp_path / name / f"{stage}.onnx").read_bytes() for stage in ("stage1", "stage2")])
    assert contents[0] == contents[1]
    found = check_chain({"model": str(model), "folder": str(tmp_path / "a")})
    assert (found["identical"], found["max_abs"], found["data"]) == (True, 0.0, "random")


def test_on_the_users_own_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = packaged("magika")
    np.savez(tmp_path / "data.npz", bytes=np.random.default_rng(0).integers(0, 257, (6, 2048)).astype(np.int32))
    plan = plan_stages(model, SplitWish(stages=2), Registry()).plan
    with chain_check(model, plan, data="data.npz", samples=4) as check:
        found = split_model(model, plan, tmp_path / "out", check)
    assert (found["identical"], found["data"], found["samples"]) == (True, "given", 4)
    np.savez(tmp_path / "wrong.npz", bites=np.zeros((1, 2048), np.int32))
    with pytest.raises(DataError), chain_check(model, plan, data="wrong.npz", samples=4):
        pass


def test_a_chain_that_differs_leaves_nothing(tmp_path: Path) -> None:
    model = packaged("magika")
    plan = plan_stages(model, SplitWish(stages=2), Registry()).plan
    with pytest.raises(BuildError, match="the chain of stages is not the model: output 'y' differs"):
        split_model(model, plan, tmp_path / "out", lambda _: {"reason": "output 'y' differs"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (SplitWish(), "say in one way"),
        (SplitWish(at=(("a",),), stages=2), "say in one way"),
        (SplitWish(stages=2, balance="flop"), 'did you mean "flops"'),
        (SplitWish(stages=2, balance="time"), "time of each layer"),
        (SplitWish(stages=2, balance="time", time_on="qualcomm-htp-v73"), "knows no peak rate"),
    ],
)
def test_bad_wishes(wish: SplitWish, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan_stages(packaged("magika"), wish, Registry())


def test_a_measured_profile_balances_by_its_own_times(tmp_path: Path) -> None:
    """All time in one layer of many: the cut isolates it."""
    model = packaged("resnet50")
    graph = read_layers(model)
    times = {layer.name: 0.001 for layer in graph.layers}
    slowest = graph.layers[10].name
    times[slowest] = 100.0
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(times))
    assert read_profile(graph, profile)[10] == pytest.approx(0.1)
    plan = plan_stages(model, SplitWish(stages=2, balance="time", profile=profile), Registry()).plan
    assert max(stage.seconds or 0 for stage in plan.stages) == pytest.approx(0.1, rel=0.01)
    profile.write_text('{"other": 1}')
    with pytest.raises(DataError, match="knows 0 of 176 layers"):
        read_profile(graph, profile)
    profile.write_text("[1]")
    with pytest.raises(DataError, match="is no profile"):
        read_profile(graph, profile)
