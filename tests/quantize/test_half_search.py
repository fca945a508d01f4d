"""Nodes that FP16 rounds too coarsely are found by running, few of them are kept, and that holds on other samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from modelforge.forge import worker
from modelforge.graph.fp16 import convert_fp16
from modelforge.graph.fp16_emulation import emulate_fp16
from modelforge.quantize import half_search
from modelforge.quantize.half_search import TRIALS, search_half
from tests.quantize.models import run, write

Array = NDArray[Any]


def cancelling(folder: Path, *, around: int = 20, offset: float = 2000.0) -> Path:
    """``around`` harmless nodes, ``(x + offset) - offset``, and as many again: FP16 steps by 1 beyond 1024.

    Harmless: FP16 holds their constants, and each rounds at 66 dB or better.
    """
    nodes, value = [], "x"

    def add(op: str, *more: str) -> None:
        nonlocal value
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(op, [value, *more], [output], f"{op}{len(nodes)}"))
        value = output

    def harmless() -> None:
        for index in range(around):
            add("Mul", ("up", "down")[index % 2])

    harmless()
    add("Add", "offset")
    add("Sub", "offset")
    harmless()
    nodes[-1].output[0] = "y"
    numbers = {"up": 1.5, "down": 0.6875, "offset": offset}
    weights = {name: np.full(8, number, np.float32) for name, number in numbers.items()}
    return write(folder / "model.onnx", nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, weights)


def feeds(seed: int, count: int = 4) -> list[Mapping[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(-1, 1, (1, 8)).astype(np.float32)} for _ in range(count)]


def sqnr_db(model: Path, lowered: Path, samples: list[Mapping[str, Array]]) -> float:
    pairs = [(run(model, feed)[0].astype(np.float64), run(lowered, feed)[0]) for feed in samples]
    noise = sum(float(np.square(exact - got).sum()) for exact, got in pairs)
    return float(10 * np.log10(sum(float(np.square(exact).sum()) for exact, _ in pairs) / noise))


def test_what_rounds_too_coarsely_is_kept_and_little_else(tmp_path: Path) -> None:
    model = cancelling(tmp_path)
    found = search_half(model, feeds(0))
    assert found is not None
    assert found.before_db < 10
    assert {"Add20", "Sub21"} <= set(found.kept)
    assert len(found.kept) <= 4
    assert found.after_db > 45
    assert found.trials <= TRIALS
    assert "asked for are 45" in found.reason
    # The same on other samples, and in the model that is really written.
    convert_fp16(model, tmp_path / "half", keep_fp32=set(found.kept))
    rounded = emulate_fp16(tmp_path / "half" / "model.onnx", tmp_path / "rounded")
    assert rounded is not None
    assert sqnr_db(model, rounded, feeds(1, 16)) > 45


def test_where_fp16_is_near_enough_one_model_is_run_and_nothing_kept(tmp_path: Path) -> None:
    found = search_half(cancelling(tmp_path, offset=0.25), feeds(0))
    assert found is not None
    assert (found.kept, found.trials) == ((), 1)
    assert found.after_db == found.before_db > 45


def test_nodes_that_are_kept_anyhow_need_not_be_found(tmp_path: Path) -> None:
    found = search_half(cancelling(tmp_path), feeds(0), keep={"Add20", "Sub21"})
    assert found is not None
    assert found.kept == ()


def test_out_of_reach_keeps_nothing_unless_less_will_do(tmp_path: Path) -> None:
    """Output noise of the last rounding cannot be taken away by half of the segments."""
    model = cancelling(tmp_path)
    found = search_half(model, feeds(0), wanted_db=150)
    assert found is not None
    assert (found.kept, found.after_db) == ((), found.before_db)
    less = search_half(model, feeds(0), wanted_db=150, least_db=30)
    assert less is not None
    assert less.kept
    assert 30 < less.after_db < 150


def test_a_model_too_large_for_one_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_search, "INLINE_BYTES", 100)
    assert search_half(cancelling(tmp_path), feeds(0)) is None


def test_large_outputs_are_taken_of_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_search, "HELD_BYTES", 100)
    found = search_half(cancelling(tmp_path, offset=0.25), feeds(0))
    assert found is not None
    assert found.samples == 2


def test_the_fp16_rung_keeps_them_and_says_why(tmp_path: Path) -> None:
    model = cancelling(tmp_path)
    np.savez(tmp_path / "samples.npz", x=np.concatenate([feed["x"] for feed in feeds(0, 8)]))
    ranges, samples = str(tmp_path / "ranges.json"), str(tmp_path / "samples.npz")
    worker.calibrate({"model": str(model), "samples": samples, "out": ranges, "data_digest": "test"})
    request = {"model": str(model), "folder": str(tmp_path / "fp16"), "precision": "fp16", "half_ranges": ranges}
    facts = worker.lower({**request, "samples": samples, "floor_db": None})["fp16"]
    assert facts["search"]["kept"] > 0
    assert facts["search"]["after_db"] > 45 > facts["search"]["before_db"]
    assert "on calibration data" in facts["kept"]["Add20"]
    json.dumps(facts)
    by_name = {node.name: node for node in onnx.load(tmp_path / "fp16" / "model.onnx").graph.node}
    assert by_name["Add20"].input[1] == "offset"  # not offset/float16
    # Without calibration samples nothing is looked for.
    assert "search" not in worker.lower({**request, "folder": str(tmp_path / "plain")})["fp16"]
