"""One pass gives every layer's local error: held against quantizing one layer at a time, on graphs built here and on a
real one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelforge.errors import DataError, InputError, UnsupportedError
from modelforge.graph.load import load
from modelforge.graph.prepare import prepare
from modelforge.quantize.blocks import find_blocks
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.qdq import quantize_model
from modelforge.quantize.ranges import RangeTable
from modelforge.quantize.search import search_exclusions
from modelforge.quantize.sensitivity import LARGEST_DB, Sensitivity, rank_layers

Array = NDArray[Any]
CHANNELS = 32


class Net:
    """A small prepared model with its samples and ranges."""

    def __init__(self, folder: Path, model: onnx.ModelProto | Path, samples: Array) -> None:
        self.folder = folder
        self.model = folder / "model.onnx"
        if isinstance(model, Path):
            prepare(model, folder, {})
        else:
            onnx.save(model, self.model)
        self.input = onnx.load(self.model).graph.input[0].name
        self.samples = folder / "samples.npz"
        np.savez(self.samples, **{self.input: samples})
        self.data = samples
        self.table: RangeTable = calibrate(self.model, self.samples)

    def rank(self, dialect: str = "tensorrt", **options: Any) -> Sensitivity:
        return rank_layers(self.model, self.table, self.samples, dialect=dialect, **options)

    def quantize(self, exclude: Collection[str], dialect: str) -> Path:
        quantize_model(self.model, self.table, self.folder / "q", dialect=dialect, exclude=exclude)
        return self.folder / "q" / "model.onnx"

    def run(self, model: Path, value: str | None = None, count: int | None = None) -> Array:
        """The model's first output, or a value inside of it, for the first samples."""
        proto = onnx.load(model)
        if value is not None:
            del proto.graph.output[:]
            proto.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return np.concatenate([session.run(None, {self.input: row[np.newaxis]})[0] for row in self.data[:count]])

    def local_sqnr_db(
        self, node: str, names: Sequence[str], dialect: str, tail: str, count: int, rounded: bool = False
    ) -> float:
        """With this node alone quantized, its output too if ``rounded``: the slow way to what ``rank_layers`` says."""
        path = self.quantize([name for name in names if name != node], dialect)
        graph = onnx.load(path).graph
        after = {item.input[0]: item.output[0] for item in graph.node if "Linear" in item.op_type}
        exact = self.run(self.model, tail, count).astype(np.float64)
        noise = exact - self.run(path, after[after[tail]] if rounded else tail, count)
        return float(10 * np.log10(np.sum(exact**2) / np.sum(noise**2)))


def tails(model: Path) -> dict[str, str]:
    """Of each node, the value behind a fused Relu or Clip from 0."""
    graph = onnx.load(model).graph
    found = {}
    for node in graph.node:
        readers = [other for other in graph.node if node.output[0] in other.input]
        fused = len(readers) == 1 and readers[0].op_type == "Relu"
        found[node.name] = readers[0].output[0] if fused else node.output[0]
    return found


def initializer(name: str, array: Array) -> TensorProto:
    return numpy_helper.from_array(array.astype(np.float32), name)


def build(nodes: Sequence[onnx.NodeProto], weights: dict[str, Array], shape: Sequence[Any], output: str) -> Any:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [initializer(name, array) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def node(op: str, inputs: str, name: str, **attributes: Any) -> onnx.NodeProto:
    """Its output has its name, in lower case."""
    return helper.make_node(op, inputs.split(), [name.lower()], name=name, **attributes)


def chain(outlier: float = 1.0) -> tuple[Any, Array]:
    """Conv A, Relu, Conv B, Relu, Conv C, pooled, Gemm. Channel 0 of A is ``outlier`` times as large, and B undoes it:
    one scale for all channels is too coarse for what B reads."""
    random = np.random.RandomState(3)
    conv = [random.randn(CHANNELS, CHANNELS, 3, 3) / 17 for _ in range(3)]
    conv[0][0] *= outlier
    conv[1][:, 0] /= outlier
    weights = dict(zip(("wa", "wb", "wc"), conv, strict=True))
    weights |= {name: random.randn(CHANNELS) / 10 for name in ("ba", "bb", "bc")}
    weights |= {"wg": random.randn(CHANNELS, 48) / 6}
    nodes = [
        node("Conv", "x wa ba", "A", pads=[1, 1, 1, 1]),
        node("Relu", "a", "RA"),
        node("Conv", "ra wb bb", "B", pads=[1, 1, 1, 1]),
        node("Relu", "b", "RB"),
        node("Conv", "rb wc bc", "C", pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", "c", "P"),
        node("Flatten", "p", "F"),
        node("Gemm", "f wg", "G"),
    ]
    return build(nodes, weights, ["n", CHANNELS, 8, 8], "g"), random.randn(12, CHANNELS, 8, 8).astype(np.float32)


@pytest.fixture
def plain(tmp_path: Path) -> Net:
    return Net(tmp_path, *chain())


@pytest.mark.parametrize(
    ("dialect", "tolerance_db"),
    # Where the output is quantized too, both energies are added as if independent.
    [("tensorrt", 0.02), ("ascend", 0.02), ("onnxruntime-x86", 0.1)],
)
def test_the_one_pass_says_what_one_layer_at_a_time_says(plain: Net, dialect: str, tolerance_db: float) -> None:
    found = plain.rank(dialect, count=5)
    names = [layer.node for layer in found.ranking]
    assert set(names) >= {"A", "B", "C"}
    for layer in found.ranking:
        # Of A and B the next layer reads the output, and its rounding is counted there; C's is read in float.
        rounded = dialect == "onnxruntime-x86" and layer.node == "C"
        slow = plain.local_sqnr_db(layer.node, names, dialect, tails(plain.model)[layer.node], 5, rounded)
        assert layer.sqnr_db == pytest.approx(slow, abs=tolerance_db), layer


def test_a_real_network_too(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the package rapidocr_onnxruntime carries this model")
    model = Path(spec.submodule_search_locations[0]) / "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
    samples = np.random.RandomState(5).uniform(-1, 1, (4, 3, 48, 192)).astype(np.float32)
    net = Net(tmp_path, model, samples)
    found = net.rank("ascend", count=3)
    names = [layer.node for layer in found.ranking]
    assert len(names) == 54
    assert sum(len(block) == 2 for block in found.blocks) == 9  # squeeze and excitation
    for layer in (found.ranking[0], found.ranking[10], found.ranking[-1]):
        slow = net.local_sqnr_db(layer.node, names, "ascend", tails(net.model)[layer.node], 3)
        assert layer.sqnr_db == pytest.approx(slow, abs=0.1), layer


def test_the_layer_that_reads_outliers_is_worst(tmp_path: Path, plain: Net) -> None:
    folder = tmp_path / "outlier"
    folder.mkdir()
    found = Net(folder, *chain(outlier=100)).rank()
    assert found.ranking[0].node == "B"
    before = {layer.node: layer.sqnr_db for layer in plain.rank().ranking}
    assert found.ranking[0].sqnr_db < before["B"] - 10


def test_ranking_and_search_find_the_one_layer_to_keep(tmp_path: Path) -> None:
    net = Net(tmp_path, *chain(outlier=100))
    reference = net.run(net.model).astype(np.float64)

    def evaluate(exclude: tuple[str, ...]) -> tuple[bool, dict[str, float]]:
        noise = reference - net.run(net.quantize(exclude, "tensorrt"))
        sqnr_db = float(10 * np.log10(np.sum(reference**2) / np.sum(noise**2)))
        return sqnr_db >= 25, {"sqnr_db": sqnr_db}

    found = search_exclusions(net.rank().blocks, evaluate)
    assert found.exclude == ("B",)
    assert [point["gate"] for point in found.curve] == ["failed", "passed"]


def test_the_same_input_gives_the_same_result(plain: Net) -> None:
    first = plain.rank("onnxruntime-x86")
    assert first == plain.rank("onnxruntime-x86")
    assert [layer.sqnr_db for layer in first.ranking] == sorted(layer.sqnr_db for layer in first.ranking)
    facts = json.loads(json.dumps(first.facts()))
    assert all(set(layer) == {"node", "op", "sqnr_db"} and abs(layer["sqnr_db"]) < LARGEST_DB for layer in facts)


def test_only_the_first_samples_are_run(plain: Net) -> None:
    few = plain.rank(count=3)
    assert few.samples == 3
    assert few != plain.rank(count=12)
    np.savez(plain.samples, x=plain.data[:3])
    assert plain.rank(count=12) == few


def test_what_is_excluded_has_no_shadow(plain: Net) -> None:
    found = plain.rank(exclude=("B",))
    assert {layer.node for layer in found.ranking} == {layer.node for layer in plain.rank().ranking} - {"B"}
    with pytest.raises(InputError, match="no node"):
        plain.rank(exclude=("nothing",))


def test_a_layer_without_error_is_cut_to_a_number(tmp_path: Path) -> None:
    """Zeros are exact in every dialect: signal and noise are both 0."""
    model, samples = chain()
    for tensor in model.graph.initializer:
        if tensor.name in ("wa", "ba"):
            tensor.CopyFrom(initializer(tensor.name, np.zeros_like(numpy_helper.to_array(tensor))))
    found = {layer.node: layer.sqnr_db for layer in Net(tmp_path, model, samples).rank().ranking}
    assert found["A"] == LARGEST_DB


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.zeros((2, CHANNELS, 8, 8), np.float32)}, "no array for the input x"),
        ({"x": np.zeros((0, CHANNELS, 8, 8), np.float32)}, "no sample"),
        ({"x": np.zeros((2, 5, 8, 8), np.float32)}, "sample 0.*fails"),
        ({"x": np.zeros((2, CHANNELS, 8, 8), np.float64)}, "sample 0.*fails"),
    ],
)
def test_unfit_samples_are_refused(plain: Net, arrays: dict[str, Array], message: str) -> None:
    np.savez(plain.samples, **arrays)
    with pytest.raises(DataError, match=message):
        plain.rank()


def test_a_model_that_the_dialect_leaves_in_float_is_refused(tmp_path: Path) -> None:
    samples = np.random.RandomState(1).randn(3, 4).astype(np.float32)
    net = Net(tmp_path, build([node("Relu", "x", "R")], {}, ["n", 4], "r"), samples)
    with pytest.raises(UnsupportedError):
        net.rank()


def test_weights_that_two_layers_share_and_a_fixed_batch(tmp_path: Path) -> None:
    random = np.random.RandomState(2)
    nodes = [node("Conv", "x w", "A"), node("Conv", "a w", "B"), node("Add", "a b", "S")]
    model = build(nodes, {"w": random.randn(CHANNELS, CHANNELS, 1, 1) / 6}, [1, CHANNELS, 4, 4], "s")
    net = Net(tmp_path, model, random.randn(6, CHANNELS, 4, 4).astype(np.float32))
    found = net.rank("tensorrt")
    names = [layer.node for layer in found.ranking]
    assert sorted(names) == ["A", "B", "S"]
    assert ("B", "S") in [tuple(sorted(block)) for block in found.blocks]
    for name in ("A", "B"):
        slow = net.local_sqnr_db(name, names, "tensorrt", name.lower(), 6)
        assert next(layer.sqnr_db for layer in found.ranking if layer.node == name) == pytest.approx(slow, abs=0.02)


def blocks_of(tmp_path: Path, model: Any, quantized: Collection[str]) -> list[tuple[str, ...]]:
    onnx.save(model, tmp_path / "graph.onnx")
    return [block for block in find_blocks(load(tmp_path / "graph.onnx").graph, quantized) if len(block) > 1]


def test_an_activation_goes_with_its_layer(tmp_path: Path) -> None:
    """x * sigmoid(x), and a carrier behind it; the next layer begins anew."""
    weights = {"w": np.ones((4, 4, 1, 1)), "v": np.ones((4, 4, 1, 1))}
    nodes = [
        node("Conv", "x w", "A"),
        node("Sigmoid", "a", "S"),
        node("Mul", "a s", "M"),
        node("MaxPool", "m", "P", kernel_shape=[2, 2]),
        node("Conv", "p v", "B"),
    ]
    model = build(nodes, weights, ["n", 4, 8, 8], "b")
    assert blocks_of(tmp_path, model, {"A", "S", "M", "P", "B"}) == [("A", "S", "M", "P")]
    assert blocks_of(tmp_path, model, {"A", "B"}) == []


def test_a_residual_add_goes_with_the_later_layer(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 4, 1, 1)), "v": np.ones((4, 4, 1, 1))}
    nodes = [node("Conv", "x w", "A"), node("Conv", "a v", "B"), node("Add", "b a", "S")]
    assert blocks_of(tmp_path, build(nodes, weights, ["n", 4, 8, 8], "s"), {"A", "B", "S"}) == [("B", "S")]


def test_the_two_products_of_an_attention_go_together(tmp_path: Path) -> None:
    weights = {name: np.ones((8, 8)) for name in ("wq", "wk", "wv")} | {"d": np.float32(3)}
    nodes = [
        node("MatMul", "x wq", "Q"),
        node("MatMul", "x wk", "K"),
        node("MatMul", "x wv", "V"),
        node("Transpose", "k", "T", perm=[0, 2, 1]),
        node("MatMul", "q t", "QK"),
        node("Div", "qk d", "D"),
        node("Softmax", "d_", "S", axis=-1),
        node("MatMul", "s v", "SV"),
    ]
    nodes[5].output[0] = "d_"
    model = build(nodes, weights, ["n", 5, 8], "sv")
    assert blocks_of(tmp_path, model, {"Q", "K", "V", "QK", "SV"}) == [("QK", "SV")]


def test_the_layers_of_a_squeeze_and_excitation_go_together(tmp_path: Path) -> None:
    weights = {name: np.ones((4, 4, 1, 1)) for name in ("w", "w1", "w2", "w3")}
    nodes = [
        node("Conv", "x w", "A"),
        node("GlobalAveragePool", "a", "P"),
        node("Conv", "p w1", "S1"),
        node("Relu", "s1", "R"),
        node("Conv", "r w2", "S2"),
        node("HardSigmoid", "s2", "H"),
        node("Mul", "a h", "M"),
        node("Conv", "m w3", "B"),
    ]
    model = build(nodes, weights, ["n", 4, 8, 8], "b")
    assert blocks_of(tmp_path, model, {"A", "S1", "S2", "B"}) == [("S1", "S2")]
