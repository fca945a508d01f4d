"""Titles that mean one file everywhere, and JSON in Go's spelling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.bundle.format import go_json, title_fault, titles_fault, variant_labels

BAD = [
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "x\0y", "x\ny", "-rf", ".hidden", " x", "x ", "x.",
    "nul", "COM1.txt", "e\u0301", "\ud800", "\u202eexe.txt", "x" * 201, "a*b",
]  # fmt: skip


@pytest.mark.parametrize("title", BAD)
def test_bad_titles(title: str) -> None:
    assert title_fault(title)


@pytest.mark.parametrize("title", ["main.engine", "model.onnx.data", "é 1.bin", "_x", "console.log", "x" * 200])
def test_good_titles(title: str) -> None:
    assert title_fault(title) is None


@pytest.mark.parametrize("titles", [["a", "a"], ["A.so", "a.so"], ["straße", "STRASSE"]])
def test_titles_that_are_one_file_on_some_systems(titles: list[str]) -> None:
    assert "one file" in (titles_fault(titles) or "")


@given(st.text(max_size=40))
def test_a_title_never_leads_out(title: str) -> None:
    if title_fault(title) is None:
        assert (Path("/base") / title).parent == Path("/base")
        assert Path(title).name == title


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))
    )
)
def test_go_json_means_the_same(value: dict[str, str]) -> None:
    data = go_json(value)
    assert json.loads(data) == value
    assert not set(b"<>&") & set(data)


def test_go_json_refuses_what_json_cannot_say() -> None:
    with pytest.raises(ValueError, match="JSON"):
        go_json({"x": float("inf")})


def test_labels_leave_out_what_there_is_not() -> None:
    record = {"target": "t4", "stage": "main", "precision": None, "status": "skipped", "compiler": None}
    assert variant_labels(record) == {
        "io.modelforge.kind": "variant",
        "io.modelforge.target": "t4",
        "io.modelforge.stage": "main",
        "io.modelforge.status": "skipped",
    }
