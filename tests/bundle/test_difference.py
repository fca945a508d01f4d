"""What a reader of two bundles wants to know: which targets came and went, and what became better or worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelforge.bundle.difference import Difference, compare
from modelforge.bundle.read import open_bundle
from tests.bundle.deployed import ABOUT, opened, record, timed
from tests.conftest import Forge


def differ(folder: Path, old: dict[str, Any], new: dict[str, Any], **abouts: Any) -> dict[str, tuple[Any, Any, Any]]:
    """The changes of the one variant: key -> before, after, delta."""
    found = compare(opened(folder / "a", [old], abouts.get("old")), opened(folder / "b", [new], abouts.get("new")))
    changes = found.changed[0].changes if found.changed else ()
    return {change.key: (change.before, change.after, change.delta) for change in changes}


def test_the_same(tmp_path: Path) -> None:
    bundles = [opened(tmp_path / name, [record("t4"), record("a100")]) for name in "ab"]
    found = compare(*bundles)
    assert found == Difference(bundles[0], bundles[1], (), (), (), ())
    assert found.is_same


def test_targets_come_and_go(tmp_path: Path) -> None:
    found = compare(
        opened(tmp_path / "a", [record("t4"), record("a100")]),
        opened(tmp_path / "b", [record("a100"), record("rk3588")]),
    )
    assert (found.added, found.removed) == (("rk3588",), ("t4",))
    assert not found.is_same


def test_figures_have_deltas(tmp_path: Path) -> None:
    accuracy = record("t4")["accuracy"]
    changes = differ(
        tmp_path,
        record("t4", latency=timed(b1=4.0)),
        record("t4", latency=timed(b1=3.0), precision="fp16", accuracy=accuracy | {"value": 0.98, "drop": 0.0}),
    )
    assert changes["precision"] == ("int8", "fp16", None)
    assert changes["accuracy.value"] == (0.979, 0.98, pytest.approx(0.001))
    assert changes["accuracy.drop"] == (0.001, 0.0, pytest.approx(-0.001))
    assert changes["latency.by_batch.1"] == (4.0, 3.0, -1.0)
    assert set(changes) == {"precision", "accuracy.value", "accuracy.drop", "latency.by_batch.1"}


def test_an_artifact_that_was_compiled_anew(tmp_path: Path) -> None:
    found = compare(
        opened(tmp_path / "a", [record("t4")], artifact=b"x" * 100),
        opened(tmp_path / "b", [record("t4")], artifact=b"y" * 150),
    )
    (variant,) = found.changed
    assert {change.key: change.delta for change in variant.changes} == {"artifact.digest": None, "artifact.size": 50}


def test_a_variant_that_failed_now(tmp_path: Path) -> None:
    changes = differ(
        tmp_path, record("t4"), record("t4", status="failed", precision=None, notes=["no rung met its gate"])
    )
    assert changes["status"] == ("compiled", "failed", None)
    assert changes["artifact.size"] == (2000, None, None)
    assert changes["notes"] == ([], ["no rung met its gate"], None)


def test_toolchains_and_other_files(tmp_path: Path) -> None:
    old = opened(tmp_path / "a", [record("t4")], files=[("model.onnx", "lowered-model", b"1"), ("x.log", "log", b"1")])
    new = opened(
        tmp_path / "b", [record("t4", toolchain={"tensorrt_rtx": "1.8"})], files=[("model.onnx", "lowered-model", b"2")]
    )
    keys = {change.key for change in compare(old, new).changed[0].changes}
    assert keys == {"toolchain.tensorrt-rtx", "toolchain.tensorrt_rtx", "files.model.onnx", "files.x.log"}


def test_inputs_by_name_and_serving(tmp_path: Path) -> None:
    mask = {"name": "mask", "dtype": "int64", "shape": ["batch", 2]}
    wider = {**ABOUT["inputs"][0], "shape": ["batch", 3, 48, 320]}  # type: ignore[index]  # a plain dict
    about = {**ABOUT, "inputs": [mask, wider], "serving": {**ABOUT["serving"], "latency_budget_ms": 40.0}}  # type: ignore[dict-item]  # a plain dict
    found = compare(
        opened(tmp_path / "a", [record("t4")]), opened(tmp_path / "b", [record("t4")], about, version="1.3.0")
    )
    changes = {change.key: (change.before, change.after) for change in found.about}
    assert changes == {
        "version": ("1.2.0", "1.3.0"),
        "serving.latency_budget_ms": (50.0, 40.0),
        "inputs.x.shape": (["batch", 3, 48, 192], ["batch", 3, 48, 320]),
        "inputs.mask.dtype": (None, "int64"),
        "inputs.mask.shape": (None, ["batch", 2]),
    }


def test_batch_sets_are_paired_by_their_sizes(tmp_path: Path) -> None:
    old = [record("ascend-310p3", batch={"values": [size]}) for size in (1, 8)]
    new = [record("ascend-310p3", batch={"values": [size]}) for size in (8, 16)]
    found = compare(opened(tmp_path / "a", old), opened(tmp_path / "b", new))
    assert found.added == ('ascend-310p3 batch {"values":[16]}',)
    assert found.removed == ('ascend-310p3 batch {"values":[1]}',)


def test_what_was_not_pulled_is_not_called_removed(tmp_path: Path, forge: Forge) -> None:
    whole = opened(tmp_path / "made", [record("t4"), record("a100")])
    done = forge("pull", f"oci:{whole.path}", "--target", "t4", "-o", tmp_path / "pulled")
    assert done.code == 0, done.err
    for pair in ((whole, part := open_bundle(tmp_path / "pulled")), (part, whole)):
        found = compare(*pair)
        assert found.is_same
        assert (found.added, found.removed, found.not_compared) == ((), (), ("a100",))


def test_it_is_json(tmp_path: Path) -> None:
    found = compare(opened(tmp_path / "a", [record("t4")]), opened(tmp_path / "b", [record("a100")], {"x": None}))
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == found.to_json()
