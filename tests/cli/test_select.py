"""`modelforge select` on a really built bundle: this machine, other machines, and none that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelforge.target import CpuArchitecture, Registry
from modelforge.toolchains import host
from tests.cli.conftest import Built

PROFILE = Registry().get("x86-64").arch
RUNS_HERE = isinstance(PROFILE, CpuArchitecture) and host.why_not(PROFILE) is None

PI = {"schema": 1, "name": "a board", "isa": "aarch64", "cpuinfo": ["asimd"], "gpus": [], "ascend": [], "rockchip": [],
      "qualcomm": [], "versions": {"glibc": "2.36"}}  # fmt: skip


@pytest.fixture
def board(tmp_path: Path) -> Path:
    path = tmp_path / "board.json"
    path.write_text(json.dumps(PI))
    return path


@pytest.mark.skipif(not RUNS_HERE, reason="this machine is not what the profile x86-64 asks for")
def test_this_machine(built: Built) -> None:
    done = built.forge("select", built.second, "--latency-budget", "1000", "--json")
    assert done.code == 0, done.err
    (stage,) = done.json["stages"]
    assert stage["chosen"]["where"] == "here"
    assert (stage["chosen"]["target"], stage["chosen"]["precision"]) == ("x86-64", "int8")
    artifact = stage["chosen"]["artifact"]["digest"].removeprefix("sha256:")
    assert (built.second / "blobs/sha256" / artifact).is_file()
    # INT8 was timed beside FP32 as it was built: the record holds a real figure.
    assert stage["chosen"]["source"] == "measured"
    assert 0 < stage["chosen"]["execution_ms"] < 1000
    assert stage["chosen"]["meets_budget"] is True
    assert stage["variants"][0]["batching"]["source"] == "measured"
    text = built.forge("select", built.second, "--latency-budget", "1000")
    assert "run here: x86-64 (int8, onnxruntime)" in text.out


def test_another_machine_has_no_match(built: Built, board: Path) -> None:
    done = built.forge("select", built.first, "--device-facts", board)
    assert done.code == 2
    assert "no variant of digits 1.0.0 can answer for this device" in done.err
    assert "x86-64 (fp32): needs a CPU of x86-64; this CPU is aarch64" in done.err
    assert "would run on a CPU of x86-64" in done.err
    assert "--link" in done.err


def test_no_match_is_one_document_too(built: Built, board: Path) -> None:
    done = built.forge("select", built.first, "--device-facts", board, "--json")
    assert done.code == 2
    assert done.json["stages"][0]["chosen"] is None
    assert {each["match"]["verdict"] for each in done.json["stages"][0]["variants"]} == {"cannot"}


def test_a_way_to_the_cloud(built: Built, board: Path) -> None:
    """x86-64 is of the tier cloud: 1,024 bytes there at batch 4, 160 back."""
    done = built.forge("select", built.second, "--device-facts", board, "--batch", "4", "--latency-budget", "100",
                       "--link", "cloud=20ms,1MB/s", "--json")  # fmt: skip
    assert done.code == 0, done.err
    chosen = done.json["stages"][0]["chosen"]
    assert (chosen["where"], chosen["target"], chosen["source"]) == ("cloud", "x86-64", "measured")
    assert chosen["transfer_ms"] == pytest.approx(20 + 1.024 + 20 + 0.16)
    assert chosen["total_ms"] == pytest.approx(chosen["transfer_ms"] + chosen["execution_ms"])


@pytest.mark.parametrize(
    ("change", "verdict", "said"),
    [
        ({}, "runs", ""),
        ({"gpus": [{"name": "A100", "sm": 80}]}, "cannot", "compute capability 7.5; here: A100 (8.0)"),
        ({"versions": {"tensorrt_rtx": "1.6.0.50"}}, "cannot", "1.6.0.50 is here"),
        ({"versions": {"tensorrt": "10.3.0.30"}}, "unknown", "TensorRT-RTX"),  # the other TensorRT does not help
    ],
)
def test_a_real_engine_against_gpu_servers(
    built: Built, tmp_path: Path, change: dict[str, Any], verdict: str, said: str
) -> None:
    """What the compiler wrote into the record is what is compared: no GPU is needed to know that it cannot run."""
    built.require_t4()
    version = built.forge("inspect", built.first, "--target", "t4", "--json").json["variants"][0]["toolchain"][
        "tensorrt_rtx"
    ]
    facts = {**PI, "gpus": [{"name": "Tesla T4", "sm": 75}], "versions": {"tensorrt_rtx": version}} | change
    (tmp_path / "server.json").write_text(json.dumps(facts))
    done = built.forge("select", built.first, "--device-facts", tmp_path / "server.json", "--json")
    (match,) = [each["match"] for each in done.json["stages"][0]["variants"] if each["target"] == "t4"]
    assert match["verdict"] == verdict
    assert said in " ".join(match["cannot"] + match["unknown"])
    assert (done.code == 0) == (verdict != "cannot")


def test_device_facts_go_round(built: Built, tmp_path: Path) -> None:
    printed = built.forge("select", "--print-device-facts")
    assert printed.code == 0
    assert built.forge("select", "--print-device-facts", "--json").json == json.loads(printed.out)
    (tmp_path / "here.json").write_text(printed.out)
    again = built.forge("select", built.first, "--device-facts", tmp_path / "here.json", "--json")
    here = built.forge("select", built.first, "--json")
    assert (again.code, again.out) == (here.code, here.out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no bundle was given"),
        (["missing"], "is not a bundle"),
        (["FIRST", "--latency-budget", "soon"], '"soon" is not a time in milliseconds'),
        (["FIRST", "--latency-budget", "-1"], "--latency-budget"),
        (["FIRST", "--batch", "0"], '"0" is not a number of samples'),
        (["FIRST", "--batch", "9"], "it takes at most 8 samples at once"),
        (["FIRST", "--link", "edge=fast"], '"edge=fast" is not TIER=LATENCY,BANDWIDTH'),
        (["FIRST", "--precision", "int4"], 'no variant has the precision "int4"'),
        (["FIRST", "--device-facts", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_bad_input(built: Built, arguments: list[str], said: str) -> None:
    done = built.forge("select", *(str(built.first) if word == "FIRST" else word for word in arguments))
    assert done.code == 2
    assert said in done.err
    assert not done.out or "variant" in done.out
