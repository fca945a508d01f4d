"""The nine models of ``tvm_cpu.py``, of fixed shape, in FP32 and INT8, with what they are fed.

ONNX's light models get seeded weights; the BERT is four layers of random weights, written here; the others are as
their packages carry them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelforge.graph.prepare import prepare
from modelforge.graph.specialize import specialize
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.qdq import quantize_model

sys.path.append(str(Path(__file__).parent.parent / "docs"))
from make_coverage import carried, files, light, photographs, text  # docs/ is no package

Array = NDArray[Any]
_CLS = "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
_TOKENS, _WIDTH, _HEADS, _LAYERS, _WORDS = 128, 256, 4, 4, 1000


def bert(folder: Path) -> Path:
    """Four encoder layers of width 256 with four heads over 128 tokens, embeddings and a classifier around them."""
    random = np.random.default_rng(0)
    weights: list[Any] = []
    nodes: list[Any] = []

    def weight(name: str, *shape: int, mean: float = 0.0) -> str:
        values = mean + random.normal(size=shape) * (shape[0] ** -0.5 if len(shape) > 1 else 0.1)
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def integers(name: str, *values: int) -> str:
        weights.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        result = f"v{len(nodes)}"
        nodes.append(helper.make_node(op, list(inputs), [result], name=f"{op}_{len(nodes)}", **attributes))
        return result

    def linear(value: str, name: str, before: int, behind: int) -> str:
        return node("Add", node("MatMul", value, weight(f"{name}.w", before, behind)), weight(f"{name}.b", behind))

    def normal(value: str, name: str) -> str:
        scale, bias = weight(f"{name}.scale", _WIDTH, mean=1.0), weight(f"{name}.bias", _WIDTH)
        return node("LayerNormalization", value, scale, bias, axis=-1)

    heads = integers("heads", 1, _TOKENS, _HEADS, _WIDTH // _HEADS)
    joined = integers("joined", 1, _TOKENS, _WIDTH)
    half, one, root, scale = (
        numpy_helper.from_array(np.array(value, np.float32), name)
        for name, value in (("half", 0.5), ("one", 1.0), ("root", 2**0.5), ("scale", (_WIDTH // _HEADS) ** -0.5))
    )
    weights += [half, one, root, scale]
    value = normal(node("Gather", weight("words", _WORDS, _WIDTH), "ids"), "embedding")
    for layer in range(_LAYERS):
        own = f"layer{layer}"
        parts = [node("Reshape", linear(value, f"{own}.{part}", _WIDTH, _WIDTH), heads) for part in "qkv"]
        query, key, content = (
            node("Transpose", part, perm=perm)
            for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        shares = node("Softmax", node("Mul", node("MatMul", query, key), "scale"), axis=-1)
        mixed = node("Reshape", node("Transpose", node("MatMul", shares, content), perm=[0, 2, 1, 3]), joined)
        value = normal(node("Add", value, linear(mixed, f"{own}.out", _WIDTH, _WIDTH)), f"{own}.first")
        inner = linear(value, f"{own}.up", _WIDTH, 4 * _WIDTH)
        bent = node("Mul", inner, node("Mul", node("Add", node("Erf", node("Div", inner, "root")), "one"), "half"))
        value = normal(node("Add", value, linear(bent, f"{own}.down", 4 * _WIDTH, _WIDTH)), f"{own}.second")
    nodes.append(helper.make_node("Identity", [linear(value, "head", _WIDTH, 10)], ["scores"], name="scores"))
    graph = helper.make_graph(
        nodes,
        "bert",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, _TOKENS])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, _TOKENS, 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "bert.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def _sentences() -> Iterator[Array]:
    random = np.random.default_rng(1)
    for _ in range(8):
        yield random.integers(0, _WORDS, _TOKENS)


@dataclass(frozen=True)
class Model:
    """One model: ``fitted`` says whether rules were fitted on it, ``integer`` whether INT8 figures are wanted."""

    name: str
    source: Callable[[Path], Path]
    input: str
    shape: tuple[int, ...]
    samples: Callable[[], Any]
    fitted: bool = False
    integer: bool = True

    def fp32(self, folder: Path) -> Path:
        """The model as compilers get it; made once per folder."""
        path = folder / self.name / "fp32" / "model.onnx"
        if not path.exists():
            work = folder / self.name / "work"
            work.mkdir(parents=True)
            prepare(self.source(work), work / "prepared", {self.input: self.shape})
            specialize(work / "prepared" / "model.onnx", path.parent, {})
        return path

    def int8(self, folder: Path, dialect: str) -> Path:
        """The model with Q/DQ in a dialect; made once per folder."""
        path = folder / self.name / dialect / "model.onnx"
        if not path.exists():
            model = self.fp32(folder)
            table = calibrate(model, [{self.input: sample[None]} for sample in self.samples()])
            quantize_model(model, table, path.parent, dialect=dialect)
        return path

    def feed(self) -> Array:
        """One sample, with the batch in front."""
        return np.ascontiguousarray(next(iter(self.samples()))[None])


MODELS = [
    Model("resnet50", light("resnet50"), "gpu_0/data_0", (1, 3, 224, 224), photographs(224), fitted=True),
    Model(
        "yolov8n", carried("nudenet", "320n.onnx"), "images", (1, 3, 320, 320), photographs(320, normalise=False), True
    ),
    Model("ppocr-cls", carried("rapidocr_onnxruntime", _CLS), "x", (1, 3, 48, 192), text(48, 192, 1), fitted=True),
    Model(
        "ppocr-det",
        carried("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
        "x",
        (1, 3, 640, 640),
        text(640, 640, 10),
    ),
    Model("squeezenet", light("squeezenet"), "data_0", (1, 3, 224, 224), photographs(224)),
    Model("densenet121", light("densenet121"), "data_0", (1, 3, 224, 224), photographs(224)),
    Model("shufflenet", light("shufflenet"), "gpu_0/data_0", (1, 3, 224, 224), photographs(224)),
    Model("bert", bert, "ids", (1, _TOKENS), _sentences, integer=False),
    Model(
        "magika",
        carried("magika", "models/standard_v3_3/model.onnx"),
        "bytes",
        (1, 2048),
        files,
        integer=False,
    ),
]
