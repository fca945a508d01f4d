"""Every graph, node and tensor of an ONNX protobuf, subgraphs and model-local functions included.

Works on what `onnx` parsed; reads no external data.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

STANDARD_DOMAINS = ("", "ai.onnx")
"""Two spellings of the standard operator domain."""


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies that a node carries (If, Loop, Scan), not their own subgraphs."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs inside it, outermost first."""
    yield graph
    for node in graph.node:
        for body in subgraphs(node):
            yield from graphs(body)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All tensors that the model carries: initializers and attributes, sparse ones' parts included."""
    for graph in graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from _attribute_tensors(graph.node)
    for function in model.functions:
        yield from _attribute_tensors(function.node)
        for node in function.node:
            for body in subgraphs(node):
                for graph in graphs(body):
                    yield from graph.initializer
                    yield from _attribute_tensors(graph.node)


def _attribute_tensors(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
