"""Models to split: a small transformer as PyTorch exports it, and random DAGs whose every layer can be told apart."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.graph.conftest import make_graph, write_model


def export_bert(path: Path, *, layers: int, width: int, heads: int, words: int, length: int, dynamic: bool) -> Path:
    """BERT's shape with random weights; base is 12 layers, 768 wide, 12 heads, 30522 words."""
    torch = pytest.importorskip("torch")
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkvo = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x, mask):  # type: ignore[no-untyped-def]  # torch traces it
            batch, steps, _ = x.shape
            q, k, v = (part(x).view(batch, steps, heads, width // heads).transpose(1, 2) for part in self.qkvo[:3])
            weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads) + mask, -1)
            mixed = (weights @ v).transpose(1, 2).reshape(batch, steps, width)
            x = self.norms[0](x + self.qkvo[3](mixed))
            return self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))

    class Bert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(words, width), nn.Embedding(512, width)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.pool = nn.Linear(width, width)

        def forward(self, ids, mask):  # type: ignore[no-untyped-def]  # torch traces it
            bias = (1 - mask[:, None, None, :].float()) * -1e4
            x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
            for layer in self.layers:
                x = layer(x, bias)
            return x, torch.tanh(self.pool(x[:, 0]))

    torch.manual_seed(0)
    example = torch.ones(1, length, dtype=torch.long)
    axes = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        Bert().eval(),
        (example, example),
        str(path),
        input_names=["ids", "mask"],
        output_names=["hidden", "pooled"],
        dynamic_axes={"ids": axes, "mask": axes} if dynamic else None,
        dynamo=False,
        opset_version=17,
    )
    return path


def random_dag(path: Path, seed: int, layers: int) -> Path:
    """Element-wise layers with one or two inputs each on tensors of a few sizes; some results are outputs."""
    rng = random.Random(seed)
    sizes = {"x0": rng.choice((4, 16)), "x1": rng.choice((4, 16))}
    names, nodes, weights, read = list(sizes), [], {}, set()
    for index in range(layers):
        first = rng.choice(names[-4:])
        output = f"t{index}"
        same = [name for name in names if sizes[name] == sizes[first] and name != first]
        read.add(first)
        if same and rng.random() < 0.5:
            second = rng.choice(same)
            read.add(second)
            nodes.append(helper.make_node("Add", [first, second], [output], name=f"n{index}"))
            sizes[output] = sizes[first]
        else:
            sizes[output] = rng.choice((4, 16))
            weights[f"w{index}"] = np.full((sizes[first], sizes[output]), 0.01 * (index + 1), np.float32)
            nodes.append(helper.make_node("MatMul", [first, f"w{index}"], [output], name=f"n{index}"))
        names.append(output)
    outputs = [name for name in names[2:] if name not in read] or [names[-1]]
    graph = make_graph(
        nodes,
        [(name, TensorProto.FLOAT, [2, sizes[name]]) for name in ("x0", "x1")],
        [(name, TensorProto.FLOAT, [2, sizes[name]]) for name in outputs],
        weights,
    )
    return write_model(path, graph)
