"""The rules, one file each, in the order in which they are asked."""

from __future__ import annotations

from typing import Any, Final

from modelforge.compilers.tvm import choices
from modelforge.compilers.tvm.alone import geometry, standing_alone
from modelforge.compilers.tvm.api import Mutator, graphs, is_constant, mutator, op_name, relax, shape_of
from modelforge.compilers.tvm.kernels import (
    convolution,
    convolution_int8,
    copies,
    depthwise,
    depthwise_dot,
    depthwise_int8,
    elementwise,
    generic,
    grouped,
    matmul,
    matmul_int8,
    pooling,
    products,
    requantize,
    rows,
    shuffles,
    starts,
    transposed,
    winograd,
)
from modelforge.compilers.tvm.kernels.rule import AmongEntries, Anchored, General
from modelforge.compilers.tvm.machine import Machine

_ANCHORED: Final[tuple[Anchored, ...]] = (
    depthwise.Depthwise(),
    depthwise_dot.DepthwiseDot(),
    depthwise_int8.DepthwiseInt8(),
    grouped.Grouped(),
    transposed.Transposed(),
    pooling.Pool(),
    pooling.ImagePool(),
    winograd.Winograd(),
    convolution.Convolution(),
    convolution_int8.ConvolutionInt8(),
    matmul.Matmul(),
    matmul_int8.MatmulInt8(),
    elementwise.Elementwise(),
    requantize.Requantize(),
    rows.Rows(),
    rows.RowReductions(),
    copies.Resize(),
    copies.Split(),
    shuffles.Shuffles(),
    shuffles.Phases(),
    products.Products(),
)
GENERAL: Final[tuple[General, ...]] = (copies.Copies(), generic.Generic())
"""Asked in this order about kernels that no rule made, or whose own rule failed."""
RULES: Final[dict[str, Anchored]] = {rule.name: rule for rule in _ANCHORED}


def rewriter(module: Any, machine: Machine) -> Any:
    """A mutator that puts the kernels of the rules in the place of operators."""
    return _Rewrite(module, machine)


@mutator
class _Rewrite(Mutator):  # type: ignore[misc]  # TVM ships no types
    def __init__(self, module: Any, machine: Machine) -> None:
        super().__init__(module)
        self._machine = machine
        shapes = [shape_of(graph.params[0]) for _, graph in graphs(module) if graph.params]
        batches = tuple(shape[0] for shape in shapes if shape)
        self._rules = [rule.among(batches) if isinstance(rule, AmongEntries) else rule for rule in _ANCHORED]

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = op_name(call)
        rules = [rule for rule in self._rules if name in rule.operators]
        if not rules and name != "relax.add":
            return call
        known = relax.Call(call.op, [self._known(argument) for argument in call.args], call.attrs, call.ty_args)
        if name == "relax.add":
            found = starts.with_constant(known, self.builder_)
            return call if found is None else found
        choices.about(lambda: geometry(known))
        for rule in rules:
            choices.asks(rule.name)
            found = rule.rewrite(known, self.builder_, self._machine)
            if found is not None:
                choices.made(lambda: standing_alone(known, self.lookup_binding))
                return found
        return call

    def _known(self, expression: Any) -> Any:
        bound = self.lookup_binding(expression) if isinstance(expression, relax.Var) else None
        return bound if bound is not None and is_constant(bound) else expression
