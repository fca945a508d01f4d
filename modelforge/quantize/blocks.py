"""Which quantized nodes compute together, so that they are quantized or kept in float together. Reads a graph only."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir

from modelforge.quantize.placement import is_weighted

_FUSED = frozenset("Relu LeakyRelu PRelu Clip Sigmoid HardSigmoid HardSwish Tanh Elu Gelu Mul".split())
_POINTWISE = _FUSED | frozenset("Add Sub Div Softmax Where Pow Erf Cast Identity Reshape Transpose".split())


def find_blocks(graph: onnx_ir.Graph, quantized: Collection[str]) -> list[tuple[str, ...]]:
    """The quantized nodes of an FP32 graph, those together that only make sense together, in graph order.

    A node with a weight begins a block. To it belong:

    - nodes without a weight that read nothing but this block (an activation behind its Conv, ``x * sigmoid(x)``, a
      Reshape): a float island inside would cost two conversions and save no noise;
    - a residual Add, to the later Conv that only it reads: one kernel computes both;
    - the two products of an attention, from Q K^T through Softmax to scores V;
    - the layers of a squeeze-and-excitation branch, from a global pooling to the Mul with what was pooled.
    """
    names = frozenset(quantized)
    nodes = [node for node in graph if node.name in names]
    blocks = _Union(nodes)
    for node in nodes:
        if is_weighted(node):
            continue
        if node.op_type == "MatMul":
            _join_attention(node, names, blocks)
        elif not _join_readers(node, names, blocks) and node.op_type == "Add":
            _join_residual(node, names, blocks)
    for node in graph:
        if node.op_type in ("GlobalAveragePool", "ReduceMean") and node.domain == "":
            _join_excitation(node, names, blocks)
    return blocks.groups()


class _Union:
    """Sets of nodes that are joined pair by pair."""

    def __init__(self, nodes: Sequence[onnx_ir.Node]) -> None:
        self._head = {node: node for node in nodes}

    def of(self, node: onnx_ir.Node) -> onnx_ir.Node:
        while self._head[node] is not node:
            node = self._head[node]
        return node

    def join(self, first: onnx_ir.Node, second: onnx_ir.Node) -> None:
        self._head[self.of(second)] = self.of(first)

    def groups(self) -> list[tuple[str, ...]]:
        found: dict[onnx_ir.Node, list[str]] = {}
        for node in self._head:
            found.setdefault(self.of(node), []).append(str(node.name))
        return [tuple(names) for names in found.values()]


def _join_residual(node: onnx_ir.Node, names: frozenset[str], blocks: _Union) -> None:
    for value in reversed(node.inputs):
        producer = _behind(value, names)
        alone = value is not None and len(list(value.uses())) == 1
        if producer is not None and producer.name in names and is_weighted(producer) and alone:
            blocks.join(producer, node)
            return


def _join_readers(node: onnx_ir.Node, names: frozenset[str], blocks: _Union) -> bool:
    before = [_behind(value, names) for value in node.inputs if value is not None and value.const_value is None]
    found = {blocks.of(each) if each is not None and each.name in names else None for each in before}
    head = found.pop() if len(found) == 1 else None
    if head is not None:
        blocks.join(head, node)
    return head is not None


def _join_attention(node: onnx_ir.Node, names: frozenset[str], blocks: _Union) -> None:
    """From a product of two activations through Softmax to the next one."""
    softmax = False
    step: onnx_ir.Node | None = node
    while step is not None:
        readers = {use.node for use in step.outputs[0].uses()}
        step = readers.pop() if len(readers) == 1 else None
        if step is not None and step.op_type == "MatMul":
            if softmax and step.name in names and not is_weighted(step):
                blocks.join(node, step)
            return
        softmax = softmax or (step is not None and step.op_type == "Softmax")
        if step is None or step.op_type not in _POINTWISE:
            return


def _join_excitation(pool: onnx_ir.Node, names: frozenset[str], blocks: _Union) -> None:
    """From a global pooling to the Mul that scales what was pooled; joins the layers on the way."""
    way: list[onnx_ir.Node] = []
    frontier, met = [pool], {pool}
    while frontier and len(met) < 32:  # such a branch is two layers with an activation each, some written as four nodes
        node = frontier.pop()
        for reader in dict.fromkeys(use.node for output in node.outputs for use in output.uses()):
            if reader.op_type == "Mul" and pool.inputs[0] in reader.inputs:
                way = [each for each in blocks._head if each in met and is_weighted(each)]
                for other in way[1:]:
                    blocks.join(way[0], other)
                return
            if reader not in met and (reader.op_type in _POINTWISE or is_weighted(reader)):
                met.add(reader)
                frontier.append(reader)


def _behind(value: onnx_ir.Value | None, names: frozenset[str]) -> onnx_ir.Node | None:
    """What computed the value, behind pointwise nodes of one activation that stay in float."""
    producer = None if value is None else value.producer()
    while producer is not None and producer.name not in names and producer.op_type in _FUSED:
        activations = {each for each in producer.inputs if each is not None and each.const_value is None}
        if len(activations) != 1:
            return None
        producer = activations.pop().producer()
    return producer
