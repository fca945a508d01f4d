"""Exports: whole or not at all, never over what is not theirs, and what they write is served by a real ONNX Runtime."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.bundle.export import MARKER, export_bundle
from modelforge.bundle.read import Bundle, open_bundle
from modelforge.errors import InputError, IntegrityError, ModelForgeError, UnsupportedError
from modelforge.store import digest_file
from tests.bundle.deployed import ABOUT, make, opened, record
from tests.bundle.triton_config import parse

ABOUT_MLP = {**ABOUT, "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
             "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 3]}]}  # fmt: skip


def mlp(folder: Path, data: str) -> tuple[bytes, bytes]:
    """y = x @ w with the weights in external data of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save_model(model, folder / "m.onnx", save_as_external_data=True, location=data, size_threshold=0)
    return (folder / "m.onnx").read_bytes(), (folder / data).read_bytes()


@pytest.fixture
def served(tmp_path: Path) -> Bundle:
    """One ONNX variant with its weights beside it, and one that Triton cannot load."""
    model, data = mlp(tmp_path / "model", "main.onnx.data")
    files = [("main.onnx.data", "runtime-library", data)]
    return opened(tmp_path / "made", [record("x86-64"), record("t4")], ABOUT_MLP, artifact=model, files=files)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_plain_files(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "made", [record("t4"), record("rk3588"), record("a100", status="deferred")])
    done = export_bundle(bundle, tmp_path / "out", "dir")
    assert done.folders == (tmp_path / "out",)
    found = tree(tmp_path / "out")
    assert sorted(found) == sorted(
        ["about.json", MARKER, "a100/main/record.json", "rk3588/main/main.rknn", "rk3588/main/record.json",
         "t4/main/main.engine", "t4/main/record.json"]
    )  # fmt: skip
    for variant in bundle.variants:
        assert json.loads(found[f"{variant.record.target}/main/record.json"]) == variant.record.to_json()
    marker = json.loads(found[MARKER])
    assert (marker["digest"], marker["format"]) == (bundle.digest, "dir")
    for name, entry in marker["files"].items():
        assert vars(digest_file(tmp_path / "out" / name)) == entry


def test_only_some_targets(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "made", [record("t4"), record("rk3588")])
    export_bundle(bundle, tmp_path / "out", "dir", targets=["t4"])
    assert not (tmp_path / "out" / "rk3588").exists()
    with pytest.raises(InputError, match="rk3588"):
        export_bundle(bundle, tmp_path / "other", "dir", targets=["rk3589"])
    assert not (tmp_path / "other").exists()


def test_a_runner_can_be_started_and_nothing_is_a_link(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "made", [record("cortex-a76")], files=[("run", "runner", b"#!/bin/sh\n")])
    export_bundle(bundle, tmp_path / "out", "dir")
    runner = tmp_path / "out/cortex-a76/main/run"
    assert os.access(runner, os.X_OK)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1
    assert not os.access(tmp_path / "out/cortex-a76/main/main.so", os.X_OK)


def test_batch_sets_lie_apart(tmp_path: Path) -> None:
    records = [record("ascend-310p3", batch={"values": [size]}) for size in (1, 8)]
    bundle = opened(tmp_path / "made", records)
    export_bundle(bundle, tmp_path / "out", "dir")
    assert sorted(path.name for path in (tmp_path / "out/ascend-310p3").iterdir()) == ["main-batch-1", "main-batch-8"]


def test_a_repository_that_onnx_runtime_serves(tmp_path: Path, served: Bundle) -> None:
    """What config.pbtxt says is what the exported model takes and gives, at every batch that it promises."""
    done = export_bundle(served, tmp_path / "models", "triton")
    model = tmp_path / "models/ppocr-cls"
    assert done.folders == (model,)
    assert sorted(tree(model)) == ["1/main.onnx.data", "1/model.onnx", "config.pbtxt", MARKER, "record.json"]
    config = parse((model / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == [each.name for each in config.input]
    assert [each.name for each in session.get_outputs()] == [each.name for each in config.output]
    for size in (1, *config.dynamic_batching.preferred_batch_size, config.max_batch_size):
        (value,) = session.run(None, {"x": np.ones((size, *config.input[0].dims), np.float32)})
        assert value.shape == (size, *config.output[0].dims)
        assert value[0].tolist() == [18.0, 22.0, 26.0]
    onnx.checker.check_model(model / "1" / "model.onnx")


def test_other_models_of_a_repository_stay(tmp_path: Path, served: Bundle) -> None:
    other = tmp_path / "models/another/1/model.onnx"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"somebody else's")
    export_bundle(served, tmp_path / "models", "triton", targets=["x86-64"])
    assert other.read_bytes() == b"somebody else's"
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["another", "ppocr-cls"]


def test_a_repository_is_one_machines(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "made", [record("x86-64"), record("jetson-agx-orin")])
    with pytest.raises(InputError, match="choose one: --target") as caught:
        export_bundle(bundle, tmp_path / "models", "triton")
    assert "jetson-agx-orin, x86-64" in str(caught.value)


def test_nothing_to_serve_tells_all_reasons(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "made", [record("t4"), record("cortex-a76")])
    with pytest.raises(UnsupportedError) as caught:
        export_bundle(bundle, tmp_path / "models", "triton")
    assert "t4: Triton's TensorRT backend loads plans" in str(caught.value)
    assert "cortex-a76: stock Triton" in str(caught.value)
    assert not (tmp_path / "models").exists()


def test_batch_sets_would_be_one_model(tmp_path: Path) -> None:
    bundle = opened(tmp_path / "made", [record("x86-64", batch={"values": [size]}) for size in (1, 8)])
    with pytest.raises(InputError, match="different batch sizes"):
        export_bundle(bundle, tmp_path / "models", "triton")


@pytest.mark.parametrize("kind", ["dir", "triton"])
def test_an_export_is_replaced_only_by_force(tmp_path: Path, served: Bundle, kind: Any) -> None:
    place = tmp_path / "out"
    (folder,) = export_bundle(served, place, kind, targets=["x86-64"]).folders
    before = tree(folder)
    with pytest.raises(InputError, match="--force"):
        export_bundle(served, place, kind, targets=["x86-64"])
    (folder / "stale").write_text("of the export before")
    export_bundle(served, place, kind, targets=["x86-64"], force=True)
    assert tree(folder) == before


@pytest.mark.parametrize("kind", ["dir", "triton"])
@pytest.mark.parametrize("force", [False, True])
def test_what_no_export_wrote_is_never_replaced(tmp_path: Path, served: Bundle, kind: Any, force: bool) -> None:
    standing = tmp_path / "out" if kind == "dir" else tmp_path / "out/ppocr-cls"
    standing.mkdir(parents=True)
    (standing / "precious").write_text("mine")
    with pytest.raises(InputError, match="not written by `modelforge export`"):
        export_bundle(served, tmp_path / "out", kind, targets=["x86-64"], force=force)
    assert tree(standing) == {"precious": b"mine"}


@pytest.mark.parametrize("make_it", ["file", "link"])
def test_no_folder_there(tmp_path: Path, served: Bundle, make_it: str) -> None:
    place = tmp_path / "out"
    (tmp_path / "real").mkdir()
    if make_it == "link":
        place.symlink_to(tmp_path / "real")
    else:
        place.write_text("a file")
    with pytest.raises(InputError, match="not a folder"):
        export_bundle(served, place, "dir", force=True)
    assert not list((tmp_path / "real").iterdir())


def test_an_empty_folder_is_filled(tmp_path: Path, served: Bundle) -> None:
    (tmp_path / "out").mkdir()
    export_bundle(served, tmp_path / "out", "dir")
    assert (tmp_path / "out" / MARKER).is_file()


def test_not_into_the_bundle(served: Bundle) -> None:
    with pytest.raises(InputError, match="inside the bundle"):
        export_bundle(served, served.path / "out", "dir")


@pytest.mark.parametrize("kind", ["dir", "triton"])
@pytest.mark.parametrize("damage", ["flip", "gone", "link"])
def test_a_damaged_blob_leaves_nothing(tmp_path: Path, served: Bundle, kind: Any, damage: str) -> None:
    """Also where an older export stands, which stays as it was."""
    place = tmp_path / "out"
    (folder,) = export_bundle(served, place, kind, targets=["x86-64"]).folders
    before = tree(folder)
    blob = served.file(served.select("x86-64")[0], "main.onnx.data")
    blob.chmod(0o644)
    data = blob.read_bytes()
    blob.unlink()
    if damage == "flip":
        blob.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        blob.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError):
        export_bundle(served, place, kind, targets=["x86-64"], force=True)
    assert tree(folder) == before
    with pytest.raises(ModelForgeError):
        export_bundle(served, tmp_path / "new", kind, targets=["x86-64"])
    assert not tree(tmp_path / "new")
    assert not list(tmp_path.rglob(".part-*"))


def test_the_same_bundle_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (open_bundle(make(tmp_path / name, [record("x86-64"), record("t4")])) for name in ("a", "b"))
    export_bundle(first, tmp_path / "1", "dir")
    export_bundle(second, tmp_path / "2", "dir")
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
