"""`modelforge split` and `modelforge plan --matrix`, as users call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Forge
from tests.graph.conftest import packaged

TIERS = ["--tier", "device=cortex-a76", "--tier", "cloud=a100:fp16", "--link", "device-cloud=10ms,1.25MB/s"]


def test_split_writes_checked_stages(forge: Forge, tmp_path: Path) -> None:
    model = packaged("nudenet")
    done = forge("split", model, "--stages", "2", "--size", "height=160", "--size", "width=160", "-o", "out", "--json")
    assert done.code == 0, done.err
    assert done.json["check"]["identical"] is True
    assert done.json["check"]["data"] == "random"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["split.json", "stage1.onnx", "stage2.onnx"]
    manifest = json.loads((tmp_path / "out" / "split.json").read_text())
    first, second = manifest["stages"]
    assert {tensor["name"] for tensor in second["inputs"]} <= {tensor["name"] for tensor in first["outputs"]}
    assert set(first["inputs"][0]) >= {"name", "dtype", "shape", "bytes", "from", "to"}
    text = forge("split", model, "--stages", "2", "-o", "out", "--size", "height=160", "--size", "width=160")
    assert "equals the whole model bit by bit on 2 random, seeded inputs" in text.out


def test_plan_only_writes_nothing_and_lists_other_cuts(forge: Forge, tmp_path: Path) -> None:
    done = forge("split", packaged("resnet50"), "--stages", "2", "--plan-only", "--json")
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []
    cheapest = done.json["candidates"][0]
    assert 0.01 <= cheapest["flops_before"] <= 0.99
    again = forge("split", packaged("resnet50"), "--at", ",".join(cheapest["tensors"]), "--plan-only", "--json")
    assert [tensor["name"] for tensor in again.json["crossing"]] == cheapest["tensors"]


def test_tiers_show_the_best_the_others_and_the_sweep(forge: Forge) -> None:
    done = forge("split", packaged("resnet50"), *TIERS, "--transport", "int8", "--plan-only", "--json")
    assert done.code == 0, done.err
    tiers = done.json["tiers"]
    assert tiers["estimate"] is True
    totals = [cut["total_ms"] for cut in tiers["cuts"]]
    assert totals[: len(totals) - 2] == sorted(totals[: len(totals) - 2])
    assert {"all on device", "send the input to cloud"} <= {cut["kind"] for cut in tiers["cuts"]}
    swept = [cut["total_ms"] for cut in tiers["sweep"]]
    assert swept == sorted(swept, reverse=True), "more bandwidth never takes more time"
    assert len({cut["kind"] for cut in tiers["sweep"]}) > 1
    text = forge("split", packaged("resnet50"), *TIERS, "--plan-only").out
    assert "how the choice depends on bandwidth" in text


def test_the_devices_file(forge: Forge, tmp_path: Path) -> None:
    (tmp_path / "devices.toml").write_text(
        'schema = 1\n[[tier]]\nname = "device"\ntarget = "cortex-a76"\n[[tier]]\nname = "cloud"\ntarget = "a100"\n'
        '[[link]]\nfrom = "device"\nto = "cloud"\nlatency = "1ms"\nbandwidth = "1GB/s"\n'
    )
    done = forge("split", packaged("resnet50"), "--devices", "devices.toml", "--plan-only", "--json")
    assert done.code == 0, done.err
    assert [stage["name"] for stage in done.json["stages"]] == ["cloud"]
    assert "send the input" in done.json["notes"][0]
    both = forge("split", packaged("resnet50"), "--devices", "devices.toml", "--tier", "edge=t4", "--plan-only")
    assert both.code == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--at", "r8x"], "did you mean"),
        (["--at", "r50"], "does not separate the graph"),
        (["--at", "r89;r47"], "would form a cycle"),
        (["--stages", "999"], "cannot be cut into 999 stages"),
        (["--max-stage-bytes", "1MB"], "no stage can have less than"),
        (["--max-stage-bytes", "much"], "is no size"),
        (["--stages", "2", "--size", "height"], "is not NAME=N"),
        (["--stages", "2", "--at", "r47"], "say in one way"),
        ([], "say in one way"),
    ],
)
def test_bad_input(forge: Forge, tmp_path: Path, options: list[str], says: str) -> None:
    done = forge("split", packaged("resnet50"), *options, "-o", "out")
    assert done.code == 2
    assert says in done.err
    assert "how to mend" in done.err
    assert list(tmp_path.iterdir()) == []


def test_matrix_of_a_bare_model(forge: Forge) -> None:
    model = packaged("resnet50")
    done = forge("plan", model, "--matrix", "--target", "cortex-a76", "--target", "t4", "--target", "a100", "--json")
    assert done.code == 0, done.err
    assert {tier["tier"]: tier["verdict"] for tier in done.json["tiers"]} == {
        "device": "yes", "edge": "yes", "cloud": "yes",
    }  # fmt: skip
    assert done.json["estimate"] is True
    text = forge("plan", model, "--matrix", "--target", "cortex-a76", "--latency-budget", "1")
    assert "held against 1 ms" in text.out
    assert "nothing was run" in text.err


def test_matrix_of_a_recipe_takes_its_targets(forge: Forge, digits: Path) -> None:
    done = forge("plan", digits, "--matrix", "--json")
    assert done.code == 0, done.err
    assert [row["target"] for row in done.json["targets"]] == ["x86-64"]


def test_matrix_refusals(forge: Forge, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"hello world")
    for options, says in (
        (["bad.onnx"], "not an ONNX model"),
        ([str(packaged("resnet50")), "--target", "t5"], 'no target "t5"'),
        ([str(packaged("resnet50")), "--task", "poetry"], "no latency budget"),
    ):
        done = forge("plan", "--matrix", *options)
        assert done.code == 2
        assert says in done.err
