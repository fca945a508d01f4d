"""Calibration against what ONNX Runtime gives when every tensor is an output, and the refusals of bad data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from sklearn.datasets import load_digits

from modelforge.errors import BuildError, DataError, ModelError
from modelforge.graph.prepare import prepare
from modelforge.quantize.calib_graph import choose_step
from modelforge.quantize.calibrate import calibrate, check_calibration
from modelforge.quantize.ranges import RangeTable
from modelforge.samples import Samples
from tests.graph.conftest import SHAPES, make_graph, packaged, write_model

Array = NDArray[Any]
FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module")
def cls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _prepared("cls", tmp_path_factory)


@pytest.fixture(scope="module")
def det4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _prepared("det4", tmp_path_factory)


def _prepared(name: str, factory: pytest.TempPathFactory) -> Path:
    folder = factory.mktemp(name)
    prepare(packaged(name), folder, SHAPES[name])
    return folder / "model.onnx"


def images(count: int, *shape: int, seed: int = 0) -> Array:
    """Smooth, so that they are no noise."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(count, *shape)), axis=-1).astype(np.float32) / 5


def write(path: Path, **arrays: Array) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def all_values(model: Path, names: Iterable[str], feeds: Sequence[Mapping[str, Array]]) -> dict[str, list[Array]]:
    """Every tensor of every run, with optimisations off."""
    proto = onnx.load(model)
    inputs = {value.name for value in proto.graph.input}
    outputs = [name for name in names if name not in inputs]
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    found: dict[str, list[Array]] = {name: [] for name in names}
    for feed in feeds:
        for name, value in (*zip(outputs, session.run(outputs, dict(feed)), strict=True), *feed.items()):
            if name in found:
                found[name].append(value)
    return found


def check_against(table: RangeTable, values: Mapping[str, list[Array]], names: Iterable[str] | None = None) -> None:
    """Counts are exact; numbers within what other kernels of ONNX Runtime differ by."""
    for name in names or table.tensors:
        found = table[name]
        flat = np.concatenate([array.reshape(-1) for array in values[name]])
        finite = flat[np.isfinite(flat)]
        assert found.shape_rank == values[name][0].ndim, name
        assert found.count == flat.size, name
        assert (found.nans, found.infs) == (np.isnan(flat).sum(), np.isinf(flat).sum()), name
        if finite.size:
            # A saturated sigmoid multiplies relative differences of its input.
            tolerance = {"abs": 1e-4 * max(float(np.ptp(finite)), 1e-6), "rel": 3e-3}
            assert found.minimum == pytest.approx(finite.min(), **tolerance), name
            assert found.maximum == pytest.approx(finite.max(), **tolerance), name
        assert 0 < found.bins.total <= max(finite.size, 1) or not finite.size, name


def test_a_real_model_is_measured_whole(cls: Path, tmp_path: Path) -> None:
    x = images(5, 3, 48, 192)
    table = calibrate(cls, write(tmp_path / "x.npz", x=x, label=np.zeros(5)))
    assert table.samples == 5
    assert len(table.tensors) > 150
    assert "x" in table
    check_against(table, all_values(cls, table.tensors, [{"x": row[np.newaxis]} for row in x]))


def test_every_tensor_of_a_convolution_is_there(cls: Path, tmp_path: Path) -> None:
    table = calibrate(cls, write(tmp_path / "x.npz", x=images(1, 3, 48, 192)))
    proto = onnx.load(cls)
    weights = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul", "Add", "Mul", "MaxPool", "Relu", "Softmax"):
            assert {*node.input, *node.output} - weights <= set(table.tensors)
    assert not weights & set(table.tensors)


def test_shapes_that_change_from_sample_to_sample(det4: Path) -> None:
    feeds = [{"x": images(1, 3, height, width)} for height, width in ((64, 96), (96, 64), (64, 96), (128, 32))]
    table = calibrate(det4, feeds)
    assert table.samples == 4
    check_against(table, all_values(det4, table.tensors, feeds))


def test_the_same_samples_give_the_same_bytes_and_any_cut_merges_into_them(cls: Path, tmp_path: Path) -> None:
    x = images(6, 3, 48, 192)
    several = [calibrate(cls, write(tmp_path / name, x=x)).to_json() for name in ("x.npz", "again.npz")]
    assert several[0] == several[1]
    whole = calibrate(cls, tmp_path / "x.npz", batch=1)
    assert calibrate(cls, [{"x": row[np.newaxis]} for row in x]).to_json() == whole.to_json()
    parts = [calibrate(cls, write(tmp_path / f"{at}.npz", x=x[at : at + 3]), batch=1) for at in (0, 3)]
    assert parts[0].merge(parts[1]).tensors == whole.tensors
    assert calibrate(cls, [{"x": x[:1]}]).data_digest != whole.data_digest


def test_batches_and_their_remainder(cls: Path, tmp_path: Path) -> None:
    x = images(5, 3, 48, 192)
    path = write(tmp_path / "x.npz", x=x)
    table = calibrate(cls, path, batch=2)
    assert table.samples == 5
    assert table.data_digest == calibrate(cls, path).data_digest
    check_against(table, all_values(cls, table.tensors, [{"x": row[np.newaxis]} for row in x]))


def test_the_histogram_is_of_a_fair_subsample(cls: Path, tmp_path: Path) -> None:
    x = images(8, 3, 48, 192)
    tensor = calibrate(cls, write(tmp_path / "x.npz", x=x), tensors=["x"])["x"]
    assert tensor.bins.total < x.size / 4
    counts = np.histogram(x, bins=np.append(tensor.bins.centers - tensor.bins.width / 2, tensor.bins.high))[0]
    exact, sampled = np.cumsum(counts) / x.size, np.cumsum(tensor.bins.counts) / tensor.bins.total
    assert np.abs(exact - sampled).max() < 0.03


def test_zeros_are_counted_among_the_sampled(tmp_path: Path) -> None:
    graph = make_graph([helper.make_node("Relu", ["x"], ["y"])], [("x", FLOAT, ["n", 64])], [("y", FLOAT, ["n", 64])])
    model = write_model(tmp_path / "model.onnx", graph)
    x = np.linspace(-1, 3, 4 * 64, dtype=np.float32).reshape(4, 64)
    table = calibrate(model, write(tmp_path / "x.npz", x=x))
    assert table["y"].zeros == (x <= 0).sum()
    assert table["y"].bins.total == x.size
    assert (table["y"].minimum, table["y"].maximum) == (0, 3)


def test_channels_are_taken_where_they_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(5, 3, 1, 1)).astype(np.float32), "m": rng.normal(size=(6, 7)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("MatMul", ["c", "m"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    for opset in (13, 18):
        graph = make_graph(nodes, [("x", FLOAT, ["n", 3, 4, 6])], [("z", FLOAT, None)], weights)
        model = write_model(tmp_path / "model.onnx", graph, opset)
        x = rng.normal(size=(3, 3, 4, 6)).astype(np.float32)
        table = calibrate(model, write(tmp_path / "x.npz", x=x), channels=["c", "z"])
        values = all_values(model, ["c", "z"], [{"x": x}])
        for name, axes, axis in (("c", (0, 2, 3), 1), ("z", (0, 1, 2), 3)):
            assert table[name].channel_axis == axis
            np.testing.assert_allclose(table[name].channel_absmax, np.abs(values[name][0]).max(axis=axes), rtol=1e-5)
        assert table["y"].channel_absmax is None


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """Log makes NaN and infinities, which Relu, Slice and Softmax may hide from what comes after."""
    nodes = [
        helper.make_node("Log", ["x"], ["l"]),
        helper.make_node("Relu", ["l"], ["r"]),
        helper.make_node("Add", ["r", "one"], ["a"]),
        helper.make_node("Reshape", ["l", "shape"], ["v"]),
        helper.make_node("Slice", ["v", "zero", "one_index"], ["y"]),
    ]
    weights: dict[str, Array] = {
        "one": np.array(1, np.float32),
        "shape": np.array([-1], np.int64),
        "zero": np.array([0], np.int64),
        "one_index": np.array([1], np.int64),
    }
    outputs = [("a", FLOAT, None), ("y", FLOAT, None)]
    return write_model(tmp_path / "noisy.onnx", make_graph(nodes, [("x", FLOAT, ["n", 40])], outputs, weights))


@pytest.mark.parametrize("place", [0, 1, 17, 39])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_not_a_number_and_infinities_are_counted_exactly(noisy: Path, value: float, place: int) -> None:
    x = np.random.default_rng(1).uniform(0.5, 2, size=(6, 40)).astype(np.float32)
    x[3, place] = value
    feeds = [{"x": row[np.newaxis]} for row in x]
    table = calibrate(noisy, feeds)
    assert table["l"].nans + table["l"].infs == 1
    with np.errstate(all="ignore"):
        values = all_values(noisy, table.tensors, feeds)
    check_against(table, values)


def test_a_tensor_that_is_never_finite(noisy: Path) -> None:
    table = calibrate(noisy, [{"x": np.full((1, 40), -1, np.float32)}], channels=["l"])
    assert (table["l"].nans, table["l"].finite, table["l"].minimum, table["l"].maximum) == (40, 0, 0, 0)
    assert table["l"].bins.total == 0
    assert RangeTable.from_json(table.to_json()) == table


def test_a_nan_in_the_last_sample_of_a_real_model(cls: Path) -> None:
    feeds = [{"x": images(1, 3, 48, 192, seed=seed)} for seed in range(3)]
    feeds[2]["x"][0, 1, 40, 100] = np.nan
    table = calibrate(cls, feeds)
    assert table["x"].nans == 1
    check_against(table, all_values(cls, table.tensors, feeds), ["x"])
    convolution = next(node.output[0] for node in onnx.load(cls).graph.node if node.op_type == "Conv")
    assert table[convolution].nans > 1


def test_several_inputs_integers_and_bodies(tmp_path: Path) -> None:
    """Indices are no activation; a body's own tensors are left alone, its result is measured."""
    branches = [
        helper.make_graph([helper.make_node(op, ["s"], [f"{op}_out"])], op, [], [_info(f"{op}_out")])
        for op in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Add", ["e", "x"], ["s"]),
        helper.make_node("ReduceSum", ["ids"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["flag"], to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["i"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Mul", ["i", "i"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    graph = make_graph(
        nodes,
        [("ids", TensorProto.INT64, ["n", 3]), ("x", FLOAT, ["n", 3, 4])],
        [("y", FLOAT, None)],
        {"table": rng.normal(size=(10, 4)).astype(np.float32)},
    )
    model = write_model(tmp_path / "model.onnx", graph)
    ids, x = rng.integers(0, 10, (4, 3)), rng.normal(size=(4, 3, 4)).astype(np.float32)
    table = calibrate(model, write(tmp_path / "x.npz", ids=ids, x=x))
    assert set(table.tensors) == {"e", "x", "s", "i", "y"}
    feeds = [{"ids": ids[at : at + 1], "x": x[at : at + 1]} for at in range(4)]
    check_against(table, all_values(model, table.tensors, feeds))


def test_sizes_that_only_the_run_shows(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Transpose", ["where"], ["places"], perm=[1, 0]),
        helper.make_node("GatherND", ["x", "places"], ["some"]),
        helper.make_node("Relu", ["some"], ["y"]),
    ]
    graph = make_graph(nodes, [("x", FLOAT, ["n", 5000])], [("y", FLOAT, None)])
    model = write_model(tmp_path / "model.onnx", graph)
    x = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    x[1] = 0  # nothing at all goes through in this one
    x[2, :4000] = 0
    feeds = [{"x": row[np.newaxis]} for row in x]
    table = calibrate(model, feeds)
    assert table["some"].count == 6000
    check_against(table, all_values(model, table.tensors, feeds))


def test_weights_beside_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Add", ["c", "three"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["y"]),
    ]
    weights: dict[str, Array] = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "three": np.array(3, np.float32),
        "shape": np.array([0, -1], np.int64),
    }
    graph = make_graph(nodes, [("x", FLOAT, ["n", 3, 8, 8])], [("y", FLOAT, None)], weights)
    conv = write_model(tmp_path / "inline.onnx", graph)
    inline = calibrate(conv, [{"x": images(1, 3, 8, 8)}])
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(onnx.load(conv), folder / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    external = calibrate(folder / "model.onnx", [{"x": images(1, 3, 8, 8)}])
    assert external.tensors == inline.tensors
    assert external.model_digest != inline.model_digest


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    graph = make_graph(
        [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), helper.make_node("Relu", ["c"], ["y"])],
        [("x", FLOAT, ["n", 3, 8, 8])],
        [("y", FLOAT, None)],
        {"w": rng.normal(size=(4, 3, 3, 3)).astype(np.float32)},
    )
    return write_model(tmp_path / "conv.onnx", graph)


def test_what_cannot_be_calibrated_is_refused(conv: Path, tmp_path: Path) -> None:
    good = {"x": images(1, 3, 8, 8)}
    with pytest.raises(DataError, match=r'"cc" is no float32 activation.*did you mean "c"'):
        calibrate(conv, [good], tensors=["cc"])
    with pytest.raises(DataError, match='"w" is no float32 activation'):
        calibrate(conv, [good], channels=["w"])
    with pytest.raises(DataError, match="no samples"):
        calibrate(conv, [])
    with pytest.raises(DataError, match="sample 1: no array for the input x"):
        calibrate(conv, [good, {"z": good["x"]}])
    with pytest.raises(DataError, match=r"z\.npz: no array for the input x"):
        calibrate(conv, write(tmp_path / "z.npz", z=good["x"]))
    with pytest.raises(DataError, match="sample 1: the model does not take"):
        calibrate(conv, [good, {"x": good["x"].astype(np.float64)}])
    with pytest.raises(DataError, match="sample 1: the model does not take"):
        calibrate(conv, [good, {"x": images(1, 4, 8, 8)}])
    old = onnx.load(conv)
    old.opset_import[0].version = 9
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(ModelError, match="opset 9"):
        calibrate(tmp_path / "old.onnx", [good])


def test_an_operator_that_onnx_runtime_lacks(tmp_path: Path) -> None:
    graph = make_graph(
        [helper.make_node("Nope", ["x"], ["y"], domain="some.where")], [("x", FLOAT, [1])], [_value("y")]
    )
    model = write_model(tmp_path / "model.onnx", graph, **{"some_where": 1})
    with pytest.raises(BuildError, match="ONNX Runtime refuses"):
        calibrate(model, [{"x": np.ones(1, np.float32)}])


@pytest.mark.parametrize("shape", [(1, 3, 48, 192), (1, 40, 120), (7,), (1, 1), (1, 4096, 1, 1), (2, 30030)])
def test_the_stride_meets_every_row_column_and_channel(shape: tuple[int, ...]) -> None:
    step = choose_step(shape, 256)
    assert step is not None
    places = np.unravel_index(np.arange(0, np.prod(shape), step), shape)
    for axis, size in zip(places, shape, strict=True):
        assert len(np.unique(axis)) > 0.5 * min(size, 256)


def test_memory_does_not_grow_with_the_number_of_samples(cls: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.npz", x=images(32, 3, 48, 192))
    many = write(tmp_path / "many.npz", x=np.tile(images(32, 3, 48, 192), (12, 1, 1, 1)))
    peaks = [_peak(cls, path) for path in (few, many)]
    assert many.stat().st_size > 40 << 20
    assert peaks[1] < 1.1 * peaks[0]


def _peak(model: Path, samples: Path) -> int:
    code = (
        "import sys, resource; from pathlib import Path; from modelforge.quantize.calibrate import calibrate;"
        "calibrate(Path(sys.argv[1]), Path(sys.argv[2]));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(samples)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


# -- check_calibration


def samples(**arrays: Array) -> Samples:
    return Samples(arrays, None, len(next(iter(arrays.values()))), "sha256:d")


def digits() -> Array:
    return np.asarray(load_digits().images[:, np.newaxis], np.float32) / 16


def test_real_data_pass() -> None:
    rng = np.random.default_rng(0)
    assert check_calibration(samples(x=digits()), floor=32) == ()
    assert check_calibration(samples(x=images(40, 3, 32, 32)), floor=32) == ()
    # Tokens and bytes are looked up, not scaled; a row of features has no neighbours.
    assert check_calibration(samples(bytes=rng.integers(0, 256, (40, 2048), np.int32)), floor=32) == ()
    assert check_calibration(samples(x=rng.normal(size=(40, 64)).astype(np.float32)), floor=32) == ()
    mask = np.ones((40, 16), np.int64)
    assert check_calibration(samples(x=digits()[:40], mask=mask), floor=32) == ()
    rate = np.full((40, 1), 16000, np.float32)
    assert check_calibration(samples(x=digits()[:40], rate=rate), floor=32) == ()


def test_rendered_lines_pass() -> None:
    pillow = pytest.importorskip("PIL.Image")
    draw = pytest.importorskip("PIL.ImageDraw")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(32):
        image = pillow.new("RGB", (192, 48), "white")
        draw.Draw(image).text((5, 10), f"line {index * 7919}", "black")
        noisy_pixels = np.asarray(image, np.float32) + rng.normal(0, 20, (48, 192, 3))
        rows.append(noisy_pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)
    assert check_calibration(samples(x=np.stack(rows)), floor=32) == ()


NOISE = {
    "uniform": lambda rng: rng.uniform(size=(40, 3, 32, 32)),
    "standard normal": lambda rng: rng.normal(size=(40, 3, 32, 32)),
    "8-bit": lambda rng: rng.integers(0, 256, (40, 3, 32, 32)) / 255,
    "normalised by channel": lambda rng: (
        (rng.uniform(size=(40, 3, 32, 32)) - np.array([0.48, 0.45, 0.4]).reshape(3, 1, 1))
        / np.array([0.22, 0.2, 0.25]).reshape(3, 1, 1)
    ),
    "one channel": lambda rng: rng.normal(3, 7, size=(40, 1, 48, 192)),
}


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("seed", range(3))
def test_noise_is_refused_unless_allowed(kind: str, seed: int) -> None:
    noise = samples(x=NOISE[kind](np.random.default_rng(seed)).astype(np.float32))
    with pytest.raises(DataError, match=r'"x" looks like .* noise') as caught:
        check_calibration(noise, floor=32)
    assert caught.value.where == "calibration.data"
    assert 'allow = ["random"]' in str(caught.value)
    (finding,) = check_calibration(noise, floor=32, allow=["random"])
    assert finding.word == "random"


def test_too_few_are_refused_unless_allowed() -> None:
    with pytest.raises(DataError, match="holds 8 samples, fewer than the 32"):
        check_calibration(samples(x=digits()[:8]), floor=32)
    (finding,) = check_calibration(samples(x=digits()[:8]), floor=32, allow=["few"])
    assert finding.word == "few"
    with pytest.raises(DataError, match="only 1 different"):
        check_calibration(samples(x=np.repeat(digits()[:1], 40, axis=0)), floor=32)
    with pytest.raises(DataError, match="no samples"):
        check_calibration(samples(x=digits()[:0]), floor=32, allow=["few"])


def test_a_constant_input_is_refused_unless_allowed() -> None:
    data = samples(x=digits()[:40], bias=np.full((40, 4), 0.5, np.float32))
    with pytest.raises(DataError, match=r'"bias" is 0\.5 in every element'):
        check_calibration(data, floor=32)
    assert [finding.word for finding in check_calibration(data, floor=32, allow=["constant"])] == ["constant"]


def test_an_unknown_override_is_refused() -> None:
    with pytest.raises(DataError, match='did you mean "random"'):
        check_calibration(samples(x=digits()), floor=32, allow=["randon"])


def _info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, None)


def _value(name: str) -> tuple[str, int, None]:
    return (name, FLOAT, None)


@pytest.mark.parametrize("batch", [3, 6])
def test_how_many_run_together_does_not_change_the_table(cls: Path, tmp_path: Path, batch: int) -> None:
    """Of each sample the same elements are counted; this model gives the same numbers in any batch."""
    path = write(tmp_path / "x.npz", x=images(7, 3, 48, 192))
    assert calibrate(cls, path, batch=batch).to_json() == calibrate(cls, path, batch=1).to_json()


def test_a_tensor_whose_first_axis_is_another_is_sampled_all_the_same(tmp_path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), helper.make_node("Relu", ["t"], ["y"])]
    model = tmp_path / "model.onnx"
    write_model(model, make_graph(nodes, [("x", FLOAT, ["n", 40, 60])], [("y", FLOAT, [40, "n", 60])]))
    x = images(4, 40, 60)
    table = calibrate(model, write(tmp_path / "x.npz", x=x), batch=4, tensors=["x", "t", "y"])
    check_against(table, {"x": [x], "t": [x], "y": [np.maximum(x, 0)]})
    assert table["y"].bins.total >= 256
