"""Models for the benchmarks and tests of splitting: a 5,000-node net, and LLaMA-2-13B in shape, with sparse weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LLAMA_LAYERS, LLAMA_WIDTH, LLAMA_HEADS, LLAMA_INNER, LLAMA_WORDS = 40, 5120, 40, 13824, 32000
"""Touvron et al., "Llama 2: open foundation and fine-tuned chat models", 2023; the 13B model."""


def deep_net(path: Path, blocks: int = 1000) -> Path:
    """Five nodes a block (Conv, Relu, Sigmoid, Mul, residual Add), a pooling after each 200 blocks."""
    rng = np.random.default_rng(0)
    nodes, weights, current = [], [], "x"
    for index in range(blocks):
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, (8, 8, 3, 3)).astype(np.float32), f"w{index}"))
        nodes += [
            helper.make_node("Conv", [current, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{index}"], [f"r{index}"]),
            helper.make_node("Sigmoid", [f"r{index}"], [f"s{index}"]),
            helper.make_node("Mul", [f"r{index}", f"s{index}"], [f"m{index}"]),
            helper.make_node("Add", [f"m{index}", current], [f"a{index}"]),
        ]
        current = f"a{index}"
        if index % 200 == 199 and index < blocks - 1:
            nodes.append(helper.make_node("MaxPool", [current], [f"p{index}"], kernel_shape=[2, 2], strides=[2, 2]))
            current = f"p{index}"
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 64, 64])],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, ["batch", 8, None, None])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def llama(
    path: Path,
    layers: int = LLAMA_LAYERS,
    width: int = LLAMA_WIDTH,
    heads: int = LLAMA_HEADS,
    inner: int = LLAMA_INNER,
    words: int = LLAMA_WORDS,
) -> Path:
    """A decoder of LLaMA's shape in FP16. Its weights, all zero, are a sparse file beside it: 26 GB, no room."""
    return _Llama(path, width, heads).build(layers, inner, words)


class _Llama:
    def __init__(self, path: Path, width: int, heads: int) -> None:
        self.path, self.width, self.heads = path, width, heads
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.offset = 0

    def build(self, layers: int, inner: int, words: int) -> Path:
        size = self.width // self.heads
        self.small("one_half", np.array(0.5, np.float16))
        self.small("epsilon", np.array(1e-3, np.float16))
        self.small("two", np.array(2, np.float16))
        self.small("scale", np.array(size**-0.5, np.float16))
        self.small("frequencies", np.linspace(1, 0.01, size).astype(np.float16).reshape(1, size))
        self.small("split_heads", np.array([0, -1, self.heads, size], np.int64))
        self.small("join_heads", np.array([0, -1, self.width], np.int64))
        self.small("last", np.array([1], np.int64))
        # The angles of the rotation are read by every layer: no cut of this model is a single tensor.
        self.op("Cast", ["positions"], "position", to=TensorProto.FLOAT16)
        self.op("Unsqueeze", ["position", "last"], "position_column")
        self.op("Mul", ["position_column", "frequencies"], "angles")
        self.op("Cos", ["angles"], "cosine")
        self.op("Sin", ["angles"], "sine")
        self.weight("embedding", words, self.width)
        self.op("Gather", ["embedding", "tokens"], "hidden")
        hidden = "hidden"
        for index in range(layers):
            hidden = self.layer(f"l{index}", hidden, inner)
        self.weight("head", self.width, words)
        self.op("MatMul", [self.norm("final", hidden), "head"], "logits")
        return self.write(words)

    def layer(self, name: str, hidden: str, inner: int) -> str:
        normed = self.norm(f"{name}.in", hidden)
        q, k, v = (self.heads_of(f"{name}.{each}", normed, rotate=each != "v") for each in "qkv")
        self.op("Transpose", [k], f"{name}.kt", perm=[0, 1, 3, 2])
        self.op("MatMul", [q, f"{name}.kt"], f"{name}.raw")
        self.op("Mul", [f"{name}.raw", "scale"], f"{name}.scores")
        self.op("Softmax", [f"{name}.scores"], f"{name}.weights", axis=-1)
        self.op("MatMul", [f"{name}.weights", v], f"{name}.mixed")
        self.op("Transpose", [f"{name}.mixed"], f"{name}.back", perm=[0, 2, 1, 3])
        self.op("Reshape", [f"{name}.back", "join_heads"], f"{name}.joined")
        attended = self.linear(f"{name}.o", f"{name}.joined", self.width, self.width)
        self.op("Add", [hidden, attended], f"{name}.mid")
        normed = self.norm(f"{name}.post", f"{name}.mid")
        gate = self.linear(f"{name}.gate", normed, self.width, inner)
        up = self.linear(f"{name}.up", normed, self.width, inner)
        self.op("Sigmoid", [gate], f"{name}.sigmoid")
        self.op("Mul", [gate, f"{name}.sigmoid"], f"{name}.silu")
        self.op("Mul", [f"{name}.silu", up], f"{name}.gated")
        down = self.linear(f"{name}.down", f"{name}.gated", inner, self.width)
        return self.op("Add", [f"{name}.mid", down], f"{name}.out")

    def norm(self, name: str, value: str) -> str:
        self.op("Pow", [value, "two"], f"{name}.square")
        self.op("ReduceMean", [f"{name}.square"], f"{name}.mean", axes=[-1])
        self.op("Add", [f"{name}.mean", "epsilon"], f"{name}.moved")
        self.op("Sqrt", [f"{name}.moved"], f"{name}.root")
        self.op("Div", [value, f"{name}.root"], f"{name}.unit")
        self.weight(f"{name}.gain", self.width)
        return self.op("Mul", [f"{name}.unit", f"{name}.gain"], f"{name}.normed")

    def heads_of(self, name: str, value: str, *, rotate: bool) -> str:
        self.op("Reshape", [self.linear(name, value, self.width, self.width), "split_heads"], f"{name}.heads")
        self.op("Transpose", [f"{name}.heads"], f"{name}.by_head", perm=[0, 2, 1, 3])
        if not rotate:
            return f"{name}.by_head"
        self.op("Mul", [f"{name}.by_head", "cosine"], f"{name}.even")
        self.op("Mul", [f"{name}.by_head", "sine"], f"{name}.odd")
        return self.op("Add", [f"{name}.even", f"{name}.odd"], f"{name}.rotated")

    def linear(self, name: str, value: str, rows: int, columns: int) -> str:
        self.weight(f"{name}.w", rows, columns)
        return self.op("MatMul", [value, f"{name}.w"], f"{name}.y")

    def op(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"n.{output}", **attributes))
        return output

    def small(self, name: str, array: np.ndarray) -> None:
        self.weights.append(numpy_helper.from_array(array, name))

    def weight(self, name: str, *dims: int) -> None:
        length = 2 * int(np.prod(dims))
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", f"{self.path.name}.data"), ("offset", self.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        self.offset += -(-length // 4096) * 4096

    def write(self, words: int) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "llama",
            [
                helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "sequence"]),
                helper.make_tensor_value_info("positions", TensorProto.INT64, ["sequence"]),
            ],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "sequence", words])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        self.path.write_bytes(model.SerializeToString())
        with self.path.with_name(f"{self.path.name}.data").open("wb") as stream:
            stream.truncate(self.offset)
        return self.path
