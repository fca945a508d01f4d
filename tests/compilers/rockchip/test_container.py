"""Reading .rknn files without the toolkit: what is whole is read, anything else is told."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.rockchip.container import read_container
from modelforge.errors import BuildError


def container(body: bytes = b"\1" * 100, facts: object = None, layout: int = 6) -> bytes:
    """As rknn-toolkit2 2.5.0 writes it (test_build.py holds a real one against the reader)."""
    told = json.dumps({"target_platform": ["rk3588"], "version": "2.5.0"} if facts is None else facts).encode()
    head = b"RKNN" + bytes(4) + struct.pack("<QQ", layout, len(body))
    return head.ljust(64, b"\0") + body + struct.pack("<Q", len(told)) + told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "main.rknn"


def test_what_it_says_of_itself(path: Path) -> None:
    path.write_bytes(container())
    found = read_container(path)
    assert (found.layout, found.platforms, found.version) == (6, ("rk3588",), "2.5.0")
    assert found.size == path.stat().st_size


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not begin"),
        (b"RKNX" + container()[4:], "does not begin"),
        (container()[:-1], "length"),
        (container() + b"\0", "length"),
        (container(facts=[]), "not a JSON object"),
        (container(facts={"version": "2.5.0"}), "names no chip"),
        (container(facts={"target_platform": ["rk3588"]}), "no version"),
    ],
)
def test_what_is_not_whole_is_told(path: Path, data: bytes, words: str) -> None:
    path.write_bytes(data)
    with pytest.raises(BuildError, match=words):
        read_container(path)


def test_a_body_longer_than_the_file(path: Path) -> None:
    path.write_bytes(container()[:90])
    with pytest.raises(BuildError, match="cut off"):
        read_container(path)


@given(st.data())
def test_any_damage_is_an_error_or_harmless(data: st.DataObject) -> None:
    whole = container()
    place = data.draw(st.integers(0, len(whole) - 1))
    spoiled = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    spoiled = spoiled[: data.draw(st.integers(0, len(spoiled)))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "main.rknn"
        path.write_bytes(spoiled)
        with contextlib.suppress(BuildError):
            assert read_container(path).platforms
