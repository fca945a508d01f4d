"""Set the shapes of the graph's inputs, and let outputs follow the symbols that they share with them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir
from onnx_ir.passes import InPlacePass, PassResult

from modelforge.errors import ModelError, nearest
from modelforge.graph.shapes import Shape, bind_shapes, dimension


class SetInputShapes(InPlacePass):
    """Put the recipe's shapes over those that the model declares; a size without a name stays without one.

    Raises:
        ModelError: as :func:`modelforge.graph.shapes.bind_shapes` does.
    """

    def __init__(self, wanted: Mapping[str, Shape], where: str) -> None:
        self.wanted = wanted
        self.where = where

    def call(self, model: onnx_ir.Model) -> PassResult:
        declared = {str(value.name): read_shape(value) for value in model.graph.inputs}
        shapes, renamed = bind_shapes(declared, self.wanted, self.where)
        before = [value.shape for value in (*model.graph.inputs, *model.graph.outputs)]
        for value in model.graph.inputs:
            _write(value, shapes[str(value.name)])
        for value in model.graph.outputs:
            shape = read_shape(value)
            _write(value, shape and tuple(renamed.get(str(size), size) for size in shape))
        forget_inner_shapes(model)
        return PassResult(model, before != [value.shape for value in (*model.graph.inputs, *model.graph.outputs)])


class BindSymbols(InPlacePass):
    """Give symbols a size, in inputs and outputs; what lies between is left to shape inference.

    Raises:
        ModelError: a symbol that no input has.
    """

    def __init__(self, sizes: Mapping[str, int], where: str) -> None:
        self.sizes = sizes
        self.where = where

    def call(self, model: onnx_ir.Model) -> PassResult:
        symbols = {size for value in model.graph.inputs for size in read_shape(value) or () if isinstance(size, str)}
        for symbol in self.sizes:
            if symbol not in symbols:
                raise ModelError(
                    f'no input of the model has the symbol "{symbol}"',
                    where=self.where,
                    fix=nearest(symbol, symbols - {"?"}),
                )
        for value in (*model.graph.inputs, *model.graph.outputs):
            shape = read_shape(value)
            _write(value, shape and tuple(self.sizes.get(str(size), size) for size in shape))
        forget_inner_shapes(model)
        return PassResult(model, bool(self.sizes))


def read_shape(value: onnx_ir.Value) -> Shape | None:
    """The shape of a value with one spelling for unnamed sizes, None where the rank is unknown."""
    if value.shape is None:
        return None
    return tuple(dimension(size if isinstance(size, int) else size.value) for size in value.shape)


def forget_inner_shapes(model: onnx_ir.Model) -> None:
    """Drop the shapes between inputs and outputs: they hold for the sizes at export. Custom operators keep theirs."""
    outputs = set(model.graph.outputs)
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if value not in outputs and node.domain == "":
                value.shape = None


def _write(value: onnx_ir.Value, shape: Shape | None) -> None:
    value.shape = None if shape is None else onnx_ir.Shape([None if size == "?" else size for size in shape])
