"""`modelforge diff` on two really built versions of one bundle."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Built


def test_from_fp32_to_int8(built: Built) -> None:
    done = built.forge("diff", built.first, built.second, "--json")
    assert done.code == 0, done.err
    document = done.json
    assert (document["before"]["version"], document["after"]["version"], document["same"]) == ("1.0.0", "1.1.0", False)
    assert document["added"] == []
    assert document["removed"] == (["t4"] if built.has_t4 else [])
    (variant,) = document["changed"]
    changes = {change["key"]: change for change in variant["changes"]}
    assert variant["variant"] == "x86-64"
    assert (changes["precision"]["before"], changes["precision"]["after"]) == ("fp32", "int8")
    assert changes["artifact.size"]["delta"] < 0
    assert changes["accuracy.sqnr_db"]["delta"] < 0
    assert changes["latency.p50_ms"]["before"] is None
    assert changes["calibration.samples"]["after"] == 128
    assert {"version", "recipe.digest"} <= {change["key"] for change in document["about"]}


def test_the_table(built: Built) -> None:
    done = built.forge("diff", built.first, built.second)
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if "artifact.size" in line)
    assert "KiB" in line
    assert "%" in line


@pytest.mark.parametrize(("second", "code"), [("first", 0), ("second", 1)])
def test_exit_code(built: Built, second: str, code: int) -> None:
    done = built.forge("diff", built.first, getattr(built, second), "--exit-code")
    assert done.code == code
    assert ("the same bundle" in done.out) == (code == 0)


def test_no_bundle(built: Built) -> None:
    done = built.forge("diff", built.first, built.first / "blobs")
    assert done.code == 2
    assert "is not a bundle" in done.err
