"""The variant record: exactly the contract's JSON, strict about types, tolerant of later keys."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modelforge.bundle.record import Accuracy, Batch, Latency, OutputFigures, Rung, VariantRecord
from modelforge.errors import IntegrityError

# The example of the contract, word for word but for the digests, which stand in full.
CONTRACT = """
{"target": "t4", "stage": "main", "status": "compiled", "compiler": "tensorrt-rtx",
 "toolchain": {"tensorrt_rtx": "1.7.1.116"},
 "precision": "int8", "ladder": [{"precision": "int8", "gate": "passed"}], "batch": {"min": 1, "opt": 4, "max": 8},
 "artifact": {"file": "main.engine", "digest": "sha256:DIGEST", "size": 8475188}, "runtime": {"requires": "..."},
 "accuracy": {"evidence": "reference", "metric": "top1", "reference": 0.981, "value": 0.979, "drop": 0.002,
              "sqnr_db": 31.2, "cosine": 0.9998, "agreement": 0.996, "samples": 360, "max_drop": 0.01,
              "gate": "passed"},
 "latency": {"evidence": "none"}, "calibration": {"samples": 128, "digest": "sha256:DIGEST"},
 "commands": [["x", "y"]], "notes": ["built without a GPU; not run on one"]}
""".replace("DIGEST", "a" * 64)


def contract(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(CONTRACT)
    return data | changes


def read(data: dict[str, Any]) -> VariantRecord:
    return VariantRecord.from_bytes(json.dumps(data).encode(), where="record")


def test_contract_goes_through_unchanged_and_in_its_order() -> None:
    assert json.dumps(read(contract()).to_json()) == json.dumps(json.loads(CONTRACT))


def test_bytes_are_one_spelling_and_read_back() -> None:
    record = read(contract())
    assert VariantRecord.from_bytes(record.to_bytes(), where="x") == record
    assert record.to_bytes() == read(dict(reversed(contract().items()))).to_bytes()


def test_variant_that_was_skipped_has_every_key_and_null_for_what_there_is_not() -> None:
    data = VariantRecord(target="rk3588", status="skipped", compiler=None, precision=None).to_json()
    assert list(data) == list(contract())
    assert [key for key, value in data.items() if value is None] == [
        "compiler", "precision", "batch", "artifact", "runtime", "calibration",
    ]  # fmt: skip
    assert list(data["accuracy"]) == list(contract()["accuracy"])
    assert (data["accuracy"]["evidence"], data["accuracy"]["gate"], data["accuracy"]["drop"]) == ("none", "none", None)


def test_later_keys_are_dropped_where_closed_and_kept_where_open() -> None:
    data = contract(novelty=1, latency={"evidence": "device", "p50_ms": 1.5}, runtime={"requires": "x", "sm": 75})
    data["accuracy"]["psnr"] = 3.0
    result = read(data).to_json()
    assert "novelty" not in result
    assert "psnr" not in result["accuracy"]
    assert result["latency"] == {"evidence": "device", "p50_ms": 1.5}
    assert result["runtime"] == {"requires": "x", "sm": 75}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"artifact": None}, "has an artifact"),
        ({"runtime": None}, "requires to run"),
        ({"status": "failed"}, "failed variant has no artifact"),
        ({"status": "deferred"}, "deferred variant has no artifact"),
        ({"status": "done"}, "status"),
        ({"precision": "fp32"}, "fp32 has no calibration"),
        ({"precision": "int4"}, "precision"),
        ({"batch": {"min": 4, "opt": 1, "max": 8}}, "batch"),
        ({"batch": {"min": 1}}, "batch"),
        ({"batch": {"min": 1, "opt": 1, "max": 1, "values": [1]}}, "batch"),
        ({"batch": {"min": True, "opt": 1, "max": 1}}, "batch.min"),
        ({"latency": {"evidence": "guess"}}, "latency.evidence"),
        ({"latency": {"evidence": "device", "p50_ms": math.inf}}, "finite"),
        ({"calibration": {"samples": "128", "digest": "sha256:" + "b" * 64}}, "calibration.samples"),
        ({"calibration": {"samples": 128, "digest": "md5:x"}}, "calibration.digest"),
        ({"artifact": {"file": "../x", "digest": "sha256:" + "a" * 64, "size": 1}}, "artifact.file"),
        ({"artifact": {"file": "x", "digest": "sha256:" + "a" * 64, "size": -1}}, "artifact.size"),
        ({"accuracy": {"gate": "maybe"}}, "accuracy.gate"),
        ({"accuracy": {"drop": math.nan}}, "accuracy.drop"),
        ({"accuracy": {"agreement": 1.5}}, "accuracy.agreement"),
        ({"ladder": [{"precision": "int8"}]}, "ladder.0.gate"),
        ({"target": "T4/../x"}, "target"),
        ({"delegation": {"operators": {"npu": -1}, "source": "x"}}, "delegation.operators.npu"),
        ({"delegation": {"operators": {"npu": 1}}}, "delegation.source"),
        ({"commands": ["ls"]}, "commands"),
    ],
)
def test_what_is_wrong_is_refused_and_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(IntegrityError, match="record") as caught:
        read(contract(**changes))
    assert said in str(caught.value)


DELEGATION = {
    "operators": {"npu": 173, "cpu": 4},
    "macs": {"npu": 1_012_627_200, "cpu": 0},
    "off_npu": ["Reshape r1"],
    "source": "the toolkit's table of layers",
}


def test_delegation_is_there_where_a_compiler_tells_of_it() -> None:
    found = read(contract(delegation=DELEGATION))
    assert found.to_json()["delegation"] == DELEGATION
    assert found.delegation is not None
    assert found.delegation.npu_share == 1.0
    assert "delegation" not in read(contract()).to_json()


@pytest.mark.parametrize(
    ("operators", "macs", "share"),
    [
        ({"npu": 3, "cpu": 1}, None, 0.75),
        ({"npu": 3, "cpu": 1}, {"npu": 0, "cpu": 0}, 0.75),
        ({"npu": 3, "cpu": 1}, {"npu": 10, "cpu": 90}, 0.1),
        ({"cpu": 2}, {"cpu": 5}, 0.0),
        (None, None, None),
    ],
)
def test_the_share_of_the_npu(operators: Any, macs: Any, share: float | None) -> None:
    found = read(contract(delegation={"operators": operators, "macs": macs, "source": "x"})).delegation
    assert found is not None
    assert found.npu_share == share


def test_infinite_sqnr_is_identical_outputs() -> None:
    accuracy = Accuracy(sqnr_db=math.inf, per_output=(OutputFigures(output="y", sqnr_db=math.inf, cosine=1.0),))
    record = VariantRecord(target="t4", status="failed", compiler="tvm", precision=None, accuracy=accuracy)
    data = json.loads(record.to_bytes())["accuracy"]
    assert (data["sqnr_db"], data["identical"]) == (None, True)
    assert data["per_output"] == [{"output": "y", "cosine": 1.0, "identical": True}]
    assert VariantRecord.from_bytes(record.to_bytes(), where="x") == record


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_figures_that_json_cannot_say_are_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        Accuracy(sqnr_db=value)
    with pytest.raises(ValidationError):
        Latency.model_validate({"evidence": "device", "p50_ms": value})


def test_each_rung_keeps_its_outcome() -> None:
    rung = Rung(precision="int8", gate="failed", metric="top1", value=0.5, drop=0.4, sqnr_db=9.0, reason="drop 0.4")
    record = VariantRecord(target="t4", status="failed", compiler="tvm", precision=None, ladder=(rung,))
    assert record.to_json()["ladder"] == [
        {"precision": "int8", "gate": "failed", "sqnr_db": 9.0, "metric": "top1", "value": 0.5, "drop": 0.4}
        | {"reason": "drop 0.4"}
    ]


def test_a_rung_tells_of_the_chain_that_left_it() -> None:
    """Its own figures beside those of the chain, and nothing that was not measured."""
    chain = {"name": "a -> b", "evidence": "simulator", "metric": "m", "value": 0.95, "samples": 64, "gate": "failed"}
    rung = {"precision": "int8", "gate": "failed", "sqnr_db": 20.0, "reason": "the chain misses its gate"}
    record = contract(ladder=[{**rung, "chain": chain}])
    (told,) = read(record).to_json()["ladder"]
    assert told == {**rung, "chain": chain}
    assert read(contract(ladder=[rung])).to_json()["ladder"] == [rung]


def test_batch_of_given_sizes() -> None:
    record = VariantRecord(target="t4", status="failed", compiler=None, precision=None, batch=Batch(values=(1, 4)))
    assert record.to_json()["batch"] == {"values": [1, 4]}


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_garbage_is_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        VariantRecord.from_bytes(data, where="record")
