"""Tables with and without `rich`: the same cells, in the same order."""

from __future__ import annotations

import pytest

from modelforge.cli import console
from modelforge.cli.console import Console

ROWS = [["t4", "compiled", "8.1 MiB"], ["jetson-agx-orin", "deferred", "-"]]


def test_a_plain_table_has_what_a_rich_one_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Console().table(["target", "status", "size"], ROWS, title="variants")
    rich = capsys.readouterr().out
    monkeypatch.setattr(console, "has_rich", lambda: False)
    Console().table(["target", "status", "size"], ROWS, title="variants")
    plain = capsys.readouterr().out
    assert plain.splitlines() == [
        "variants",
        "target           status    size",
        "t4               compiled  8.1 MiB",
        "jetson-agx-orin  deferred  -",
    ]
    assert [line.split() for line in rich.splitlines()] == [line.split() for line in plain.splitlines()]


def test_no_table_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    Console(json=True).table(["target"], [["t4"]])
    assert capsys.readouterr().out == ""
