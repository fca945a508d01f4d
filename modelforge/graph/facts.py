"""What a model is, as plain values: what `plan` and the compilers' preflight look at. No onnx object inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TensorFacts:
    """A graph input or output. ``shape`` is None where the rank is unknown; an unnamed dimension is ``"?"``."""

    name: str
    dtype: str
    """NumPy's name: ``float32``, ``int64``, ``uint8``, ``bool``; ``string`` for strings."""
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True)
class OpFacts:
    """How often an operator occurs among the nodes that run (foldable constants are not counted).

    ``example`` is one such node's name, or its first output where it has none.
    """

    domain: str
    op: str
    count: int
    example: str
    in_subgraph: bool


@dataclass(frozen=True)
class ModelFacts:
    """One ONNX model.

    Attributes:
        opsets: version by domain; the standard domain is ``""``.
        parameters: number of elements in the initializers and in Constant nodes, where some exporters keep all weights.
        parameter_bytes: their size.
        flops: floating point operations of one inference at ``bound`` dimensions (a multiply-add counts as two),
            None where a shape is unknown.
        peak_activation_bytes: the largest sum of live activations over the graph's own order, None likewise.
        bound: what the symbols were bound to for these two figures; an unnamed size is called ``input[axis]``.
    """

    producer: str
    ir_version: int
    opsets: Mapping[str, int]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    ops: tuple[OpFacts, ...]
    nodes: int
    parameters: int
    parameter_bytes: int
    flops: int | None
    peak_activation_bytes: int | None
    bound: Mapping[str, int]

    def op(self, name: str, domain: str = "") -> OpFacts | None:
        """The facts of one operator, if the model has it."""
        return next((found for found in self.ops if found.op == name and found.domain == domain), None)
