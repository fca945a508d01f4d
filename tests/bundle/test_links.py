"""What it costs to ask another place: units of a link, bytes of a model's tensors."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.bundle.links import Link, Transfer, parse_link, transfer
from modelforge.errors import InputError
from tests.bundle.deployed import ABOUT


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("edge=5ms,100MB/s", Link("edge", 5.0, 100e6)),
        ("cloud=20ms,50Mbit/s", Link("cloud", 20.0, 6.25e6)),
        ("device=250us,1GiB/s", Link("device", 0.25, 2**30)),
        ("cloud=0.1s,800kB/s", Link("cloud", 100.0, 800e3)),
        ("edge=0ms,1B/s", Link("edge", 0.0, 1.0)),
    ],
)
def test_a_link(text: str, link: Link) -> None:
    assert parse_link(text) == link


@pytest.mark.parametrize(
    "text",
    ["", "edge", "edge=5,100MB/s", "edge=5ms", "edge=5ms,100MB", "moon=5ms,100MB/s", "edge=5ms,0MB/s",
     "edge=5ms,-1MB/s", "edge=5ms,100mb/s", "edge=1.2.3ms,1MB/s", "edge=.ms,1MB/s", "edge=5ms,100MB/s x"],
)  # fmt: skip
def test_no_link(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_link(text)
    assert "edge=5ms,100MB/s" in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_link_or_refused(text: str) -> None:
    try:
        link = parse_link(text)
    except InputError:
        return
    assert link.bandwidth > 0


def test_both_ways_are_paid() -> None:
    cost = transfer(ABOUT, "main", 2)
    assert cost == Transfer(2 * 3 * 48 * 192 * 4, 2 * 2 * 4)
    link = Link("edge", 5.0, 1e6)
    assert cost.milliseconds(link) == pytest.approx(5 + 221.184 + 5 + 0.016)


def about(**tensor: Any) -> dict[str, Any]:
    whole = {"name": "x", "dtype": "float32", "shape": ["batch", 10]} | tensor
    return {
        "inputs": [whole],
        "outputs": [],
        "dims": {"length": {"min": 1, "opt": 8, "max": 32}, "s": {"values": [4, 16]}},
    }


@pytest.mark.parametrize(
    ("tensor", "size"),
    [
        ({}, 40),
        ({"dtype": "float16"}, 20),
        ({"dtype": "bool", "shape": []}, 1),
        ({"shape": ["?", 10]}, 40),  # an unknown first dimension is the batch
        ({"shape": ["batch", "length"]}, 128),  # another symbol counts at its largest
        ({"shape": [1, "s"]}, 64),
    ],
)
def test_bytes_of_a_tensor(tensor: dict[str, Any], size: int) -> None:
    assert transfer(about(**tensor), "main", 1).input_bytes == size


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        ({"dtype": "string"}, "no fixed size"),
        ({"shape": None}, "no shape"),
        ({"shape": ["batch", "free"]}, "dimension 1 (free) has no bound"),
    ],
)
def test_bytes_that_are_not_known(tensor: dict[str, Any], why: str) -> None:
    cost = transfer(about(**tensor), "main", 1)
    assert cost.input_bytes is None
    assert why in cost.reasons[0]
    assert cost.milliseconds(Link("edge", 1.0, 1.0)) is None


def test_stages_have_their_own_tensors() -> None:
    cut = {"name": "cut", "dtype": "float16", "shape": ["batch", 64]}
    stages = [{"name": "head", "inputs": ABOUT["inputs"], "outputs": [cut]}]
    assert transfer({**ABOUT, "stages": stages}, "head", 1).output_bytes == 128
    assert "does not tell" in transfer(ABOUT, "head", 1).reasons[0]


@pytest.mark.parametrize("wrong", [{}, {"inputs": 5}, {"inputs": [5], "outputs": []}, {"inputs": [{}], "outputs": []}])
def test_an_about_that_tells_nothing(wrong: dict[str, Any]) -> None:
    assert transfer(wrong, "main", 1).input_bytes is None
