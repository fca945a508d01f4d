"""check_model refuses what is not a usable model, quickly and in words; load and save keep bytes and weights."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelforge.errors import ModelError
from modelforge.graph import load as load_module
from modelforge.graph.load import check_model, load, model_files, save
from tests.graph.conftest import PACKAGED, make_graph, packaged, run, write_model


def _external(folder: Path, location: str = "weights.bin", length: int = 400, offset: int = 0) -> Path:
    """A model whose one weight, 100 floats, lies in ``location``."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[100], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    graph = make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, [100])],
        [("y", TensorProto.FLOAT, [100])],
    )
    graph.initializer.append(weight)
    return write_model(folder / "external.onnx", graph)


@pytest.mark.parametrize("name", PACKAGED)
def test_real_models_are_accepted(name: str) -> None:
    check_model(packaged(name))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello world\n" * 100, "text file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"\x00\x01\x02\xff" * 64, "corrupt"),
        (b"\x08", "corrupt"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "corrupt"),
    ],
)
def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says) as caught:
        check_model(path)
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        check_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="folder"):
        check_model(tmp_path)


@pytest.mark.parametrize("part", [0.3, 0.7, 0.999])
def test_truncated_model_is_refused(tmp_path: Path, part: float) -> None:
    data = packaged("magika").read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ModelError):
        check_model(path)


def test_empty_graph_and_no_outputs(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="graph is empty"):
        check_model(write_model(tmp_path / "a.onnx", make_graph([], [], [])))
    graph = make_graph([helper.make_node("Relu", ["x"], ["y"])], [("x", TensorProto.FLOAT, [1])], [])
    with pytest.raises(ModelError, match="no outputs"):
        check_model(write_model(tmp_path / "b.onnx", graph))


def test_checker_failure_is_told(tmp_path: Path) -> None:
    graph = make_graph(
        [helper.make_node("NoSuchOp", ["x"], ["y"])], [("x", TensorProto.FLOAT, [1])], [("y", TensorProto.FLOAT, [1])]
    )
    with pytest.raises(ModelError, match="NoSuchOp"):
        check_model(write_model(tmp_path / "a.onnx", graph))


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "C:\\w.bin", "..\\w.bin", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(400))
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ModelError, match="beside the model"):
        check_model(_external(folder, location))


def test_external_data_missing_short_or_linked(tmp_path: Path) -> None:
    path = _external(tmp_path)
    with pytest.raises(ModelError, match="missing"):
        check_model(path)
    data = tmp_path / "weights.bin"
    data.write_bytes(bytes(399))
    with pytest.raises(ModelError, match="399 bytes, but the model needs 400"):
        check_model(path)
    data.write_bytes(bytes(400))
    check_model(path)
    assert model_files(path) == [path, data]
    os.link(data, tmp_path / "second-name")
    with pytest.raises(ModelError, match="link"):
        check_model(path)


def test_external_data_of_a_body_is_seen(tmp_path: Path) -> None:
    """The tensor of a Constant node inside an If."""
    inner = onnx.load(_external(tmp_path), load_external_data=False).graph.initializer[0]
    body = make_graph([helper.make_node("Constant", [], ["k"], value=inner)], [], [("k", TensorProto.FLOAT, [100])])
    graph = make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)],
        [("c", TensorProto.BOOL, [])],
        [("y", TensorProto.FLOAT, [100])],
    )
    with pytest.raises(ModelError, match=r"weights\.bin.*missing"):
        model_files(write_model(tmp_path / "if.onnx", graph))


def test_a_large_model_is_checked_in_under_two_seconds(tmp_path: Path) -> None:
    """100 MB of weights. (The bound is the contract's for bad input, not a benchmark.)"""
    weights = {"w": np.ones((25, 1000, 1000), np.float32)}
    graph = make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, [1])],
        [("z", TensorProto.FLOAT, None)],  # no such tensor
        weights,
    )
    path = write_model(tmp_path / "large.onnx", graph)
    started = time.process_time()
    with pytest.raises(ModelError):
        check_model(path)
    assert time.process_time() - started < 2


def test_save_gives_the_same_bytes_and_the_same_answers(tmp_path: Path) -> None:
    source = packaged("squeezenet")
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        assert save(load(source), folder) == [folder / "model.onnx"]
    assert (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()
    image = np.random.default_rng(0).random((1, 3, 224, 224), np.float32)
    np.testing.assert_array_equal(run(first / "model.onnx", data_0=image)[0], run(source, data_0=image)[0])


def test_save_takes_external_data_in(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(np.arange(100, dtype=np.float32).tobytes())
    out = tmp_path / "out"
    out.mkdir()
    model = load(path)
    assert save(model, out) == [out / "model.onnx"]
    assert model_files(out / "model.onnx") == [out / "model.onnx"]
    np.testing.assert_array_equal(run(out / "model.onnx", x=np.zeros(100, np.float32))[0], np.arange(100))
    assert type(model.graph.initializers["w"].const_value).__name__ == "ExternalTensor"  # still on disk


def test_large_weights_go_to_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "INLINE_BYTES", 1000)
    files = save(load(packaged("magika")), tmp_path)
    assert files == [tmp_path / "model.onnx", tmp_path / "model.onnx.data"]
    assert files[0].stat().st_size < files[1].stat().st_size
    check_model(files[0])
    data = np.random.default_rng(0).integers(0, 257, (2, 2048)).astype(np.int32)
    np.testing.assert_array_equal(run(files[0], bytes=data)[0], run(packaged("magika"), bytes=data)[0])
