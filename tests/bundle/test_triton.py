"""What Triton can serve of a bundle, and its configuration, read with Triton's own protobuf definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.bundle.read import Bundle
from modelforge.bundle.triton import Served, quoted, serve, unserved
from modelforge.errors import InputError, UnsupportedError
from tests.bundle.deployed import ABOUT, opened, record, timed
from tests.bundle.triton_config import dtype, parse

LOWERED = ("model.onnx", "lowered-model", b"a lowered model")


def bundle_of(folder: Path, tag: str, about: dict[str, Any] | None = None, **more: Any) -> Bundle:
    files = more.pop("files", [LOWERED])
    return opened(folder, [record(tag, **more)], about, files=files)


def served(
    folder: Path, tag: str, about: dict[str, Any] | None = None, *, lowered: bool = False, **more: Any
) -> Served:
    bundle = bundle_of(folder, tag, about, **more)
    return serve(bundle, bundle.variants[0], lowered=lowered)


def about(**more: Any) -> dict[str, Any]:
    return {**ABOUT, **more}


def test_an_onnx_variant(tmp_path: Path) -> None:
    found = served(tmp_path, "x86-64", latency=timed(b1=2.0, b4=5.0, b8=9.0))
    config = parse(found.config)
    assert (config.name, config.platform, config.backend) == ("ppocr-cls", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 8
    assert [(each.name, dtype(config, each), list(each.dims)) for each in config.input] == [
        ("x", "TYPE_FP32", [3, 48, 192])
    ]
    assert [(each.name, dtype(config, each), list(each.dims)) for each in config.output] == [
        ("scores", "TYPE_FP32", [2])
    ]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 9000
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)
    assert found.files == {"main.onnx": "model.onnx"}


def test_a_classic_tensorrt_plan(tmp_path: Path) -> None:
    found = served(tmp_path, "jetson-agx-orin")
    config = parse(found.config)
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert found.files == {"main.plan": "model.plan"}
    assert "the server must have: what tensorrt needs" in found.notes


def test_not_measured_is_said_and_nothing_waits(tmp_path: Path) -> None:
    found = served(tmp_path, "x86-64")
    assert "# batch sizes and delay: not measured" in found.config
    config = parse(found.config)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0


def test_the_budget_bounds_the_batch(tmp_path: Path) -> None:
    serving = {"serving": {"latency_budget_ms": 11.0}}
    config = parse(served(tmp_path, "x86-64", about(**serving), latency=timed(b1=2.0, b4=5.0, b8=9.0)).config)
    assert config.max_batch_size == 4
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000


@pytest.mark.parametrize(
    ("tag", "why"),
    [
        ("t4", "not engines of TensorRT-RTX"),
        ("cortex-a76", "no backend for TVM"),
        ("rk3588", "no stock backend of Triton loads what rockchip compiles"),
    ],
)
def test_what_stock_triton_cannot_load_is_refused(tmp_path: Path, tag: str, why: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        served(tmp_path, tag)
    assert why in str(caught.value)
    assert "--lowered" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("tag", "kind"), [("t4", "KIND_GPU"), ("cortex-a76", "KIND_CPU"), ("rk3588", "KIND_AUTO")])
def test_the_lowered_model_instead(tmp_path: Path, tag: str, kind: str) -> None:
    found = served(tmp_path, tag, lowered=True, latency=timed(b1=0.5, b8=1.0))
    config = parse(found.config)
    assert config.backend == "onnxruntime"
    assert config.instance_group[0].kind == getattr(config.instance_group[0], kind)
    assert found.files == {"model.onnx": "model.onnx"}
    assert "the recorded latency is not that of this one" in found.notes[0]
    assert found.batching is not None
    assert found.batching.source == "none"


def test_a_lowered_model_with_operators_of_ascend(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="operators of ascend"):
        served(tmp_path / "a", "ascend-310p3", lowered=True)
    with pytest.raises(UnsupportedError) as caught:
        served(tmp_path / "b", "ascend-310p3")
    assert "--lowered" not in str(caught.value)
    assert served(tmp_path / "c", "ascend-310p3", lowered=True, precision="fp16").files


def test_no_lowered_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="carries no lowered"):
        served(tmp_path, "t4", lowered=True, files=[])


def test_a_deferred_variant(tmp_path: Path) -> None:
    """Not compiled yet; its lowered model is there, beside that of the next rung."""
    files = [LOWERED, ("fp16-model.onnx", "lowered-model", b"the next rung")]
    with pytest.raises(UnsupportedError, match="it is deferred"):
        served(tmp_path / "a", "jetson-agx-orin", status="deferred", files=files)
    found = served(tmp_path / "b", "jetson-agx-orin", status="deferred", files=files, lowered=True)
    assert found.files == {"model.onnx": "model.onnx"}


def test_external_data_keeps_its_name(tmp_path: Path) -> None:
    files = [
        ("main.onnx.data", "runtime-library", b"weights"),
        LOWERED,
        ("model.onnx.data", "lowered-model", b"others"),
    ]
    assert served(tmp_path / "a", "x86-64", files=files).files == {
        "main.onnx": "model.onnx",
        "main.onnx.data": "main.onnx.data",
    }
    lowered = served(tmp_path / "b", "x86-64", files=files, lowered=True).files
    assert lowered == {"model.onnx": "model.onnx", "model.onnx.data": "model.onnx.data"}


def test_a_fixed_batch_is_part_of_the_shape(tmp_path: Path) -> None:
    fixed = about(
        inputs=[{"name": "x", "dtype": "float32", "shape": [4, 3]}],
        outputs=[{"name": "y", "dtype": "int64", "shape": [4]}],
    )
    config = parse(served(tmp_path, "x86-64", fixed, batch=None).config)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [4, 3]
    assert list(config.output[0].dims) == [4]
    assert not config.HasField("dynamic_batching")


def test_other_symbols_are_free(tmp_path: Path) -> None:
    given = about(inputs=[{"name": "ids", "dtype": "int64", "shape": ["batch", "length"]}])
    assert list(parse(served(tmp_path, "x86-64", given).config).input[0].dims) == [-1]


def test_a_batch_of_single_values_is_reshaped(tmp_path: Path) -> None:
    """Triton's dims are never empty: [batch] is written as one element that is reshaped to none."""
    given = about(inputs=[{"name": "x", "dtype": "bool", "shape": ["batch"]}])
    (tensor,) = parse(served(tmp_path, "x86-64", given).config).input
    assert list(tensor.dims) == [1]
    assert tensor.HasField("reshape")
    assert list(tensor.reshape.shape) == []


@pytest.mark.parametrize(("first", "size"), [("batch", 8), ("?", 8), ("detections", 0), (1, 0)])
def test_every_output_must_have_the_batch_first(tmp_path: Path, first: Any, size: int) -> None:
    given = about(outputs=[{"name": "boxes", "dtype": "float32", "shape": [first, 7]}])
    found = served(tmp_path, "x86-64", given)
    config = parse(found.config)
    assert config.max_batch_size == size
    assert list(config.output[0].dims) == ([7] if size else [1 if first == 1 else -1, 7])
    assert list(config.input[0].dims) == ([3, 48, 192] if size else [-1, 3, 48, 192])
    assert any("boxes" in note for note in found.notes) == (first != "batch")


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        ({"shape": None}, "the shape of x is not recorded"),
        ({"dtype": "complex64"}, "no type for x"),
        ({"name": 5}, "tensors"),
    ],
)
def test_tensors_that_cannot_be_written_are_left_to_triton(tmp_path: Path, tensor: dict[str, Any], why: str) -> None:
    given = about(inputs=[{"name": "x", "dtype": "float32", "shape": ["batch", 3]} | tensor])
    found = served(tmp_path, "x86-64", given)
    config = parse(found.config)
    assert not config.input
    assert not config.output
    assert config.max_batch_size == 0
    assert why in " ".join(found.notes)


def test_stages_are_models_of_their_own(tmp_path: Path) -> None:
    found = served(tmp_path / "a", "x86-64", stage="head")
    assert parse(found.config).name == found.name == "ppocr-cls-head"
    with pytest.raises(InputError, match="cannot name a folder"):
        served(tmp_path / "b", "x86-64", stage="../head")


def test_unserved_says_why(tmp_path: Path) -> None:
    (failed,) = bundle_of(tmp_path, "x86-64", status="failed", precision=None, notes=["x"]).variants
    assert unserved(failed) == "it is failed"


@given(st.text(min_size=1))
def test_any_name_survives_the_text_format(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:  # a lone surrogate: no JSON holds one
        return
    assert parse(f"name: {quoted(name)}").name == name
