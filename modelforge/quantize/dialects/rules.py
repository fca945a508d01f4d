"""What a dialect is: a frozen table of rules. It knows no graph; placement and emission read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators with a weight, where nearly all arithmetic is."""


@dataclass(frozen=True)
class Dialect:
    """How one compiler wants quantization written.

    Attributes:
        title: of the compiler, for messages.
        signed: activations are int8; else uint8.
        symmetric: activations have zero point 0, and their range is as wide on both sides.
        weighted: the operators with a constant weight that are quantized; the weight is always symmetric int8.
        per_channel: of those, the ones with one scale for each output channel; the others have one for the tensor.
        bias: ``int32`` with the scale of the product, or ``float`` as it is.
        bias_zero_point: write the zero point 0 of an int32 bias, which ONNX lets one leave out.
        outputs: operators whose output (after a fused Relu or Clip) is quantized too, for all who read it.
        elementwise: operators without a weight that are quantized at all their inputs and outputs.
        carriers: operators that only move values; where their input is quantized, the output has the same scale.
        attention: whether a MatMul of two activations is quantized.
        graph_outputs: a quantized node's output that the model gives is quantized too; else it is float at once.
        matmul_rank: the only rank of a MatMul's weight that is taken; None takes all.
        residual_add: quantize the branch of an Add that no Conv is fused into, so that the fused kernel stays int8.
        shared_concat: the inputs of a Concat that feeds a quantized node are quantized, with the output's scale.
        skip_gemv: a matrix product with one row or one column stays in float.
        fewest_channels: a dense layer with fewer input or output channels stays in float.
        phases: a ConvTranspose becomes a Conv with its output channels once for each phase of the pixels; in groups,
            or not over an image, it stays in float.
        shortest_sum: fewer products in an output element than this, and an INT8 kernel gains nothing over float; 0: no
            layer is left in float for that.
        depthwise_cost: how much a multiplication of a depthwise Conv counts against INT8 beside those.
        half_scales: scales are FP16 numbers, so that an FP16 remainder can hold them exactly.
        remainder: what the float rest is lowered to; ``compiler``: it stays FP32 in the file, and the compiler makes it
            FP16.
        native: writes the compiler's own form, where it takes no QDQ: from the QDQ model, into a folder, given why
            nodes must not become FP16, by name. Gives facts, JSON.
        lowest_opset: of the result.
        equalize: whether the spread between channels may be evened out, which leaves constants with a number a channel.
        mixed_ratio: a Concat whose inputs' largest values differ by more holds different meanings and shares no scale.
        margin_db: how much SQNR the compiler's own arithmetic may lose beside ONNX Runtime's. `mixed` is chosen in the
            latter with this much to spare, at half the drop that is allowed, and keeps one layer in float at least.
        sources: where the rules are from.
    """

    name: str
    title: str
    signed: bool
    symmetric: bool
    weighted: frozenset[str] = WEIGHTED
    per_channel: frozenset[str] = WEIGHTED
    bias: Literal["int32", "float"] = "float"
    bias_zero_point: bool = False
    outputs: frozenset[str] = frozenset()
    elementwise: frozenset[str] = frozenset()
    carriers: frozenset[str] = frozenset()
    attention: bool = False
    graph_outputs: bool = False
    matmul_rank: int | None = None
    residual_add: bool = False
    shared_concat: bool = False
    skip_gemv: bool = False
    fewest_channels: int = 0
    phases: bool = False
    shortest_sum: int = 0
    depthwise_cost: float = 0.0
    half_scales: bool = False
    remainder: Literal["fp32", "fp16", "compiler"] = "fp32"
    native: Callable[[Path, Path, Mapping[str, str]], Mapping[str, Any]] | None = None
    lowest_opset: int = 13
    equalize: bool = True
    mixed_ratio: float = 50.0
    margin_db: float = 0.0
    sources: tuple[str, ...] = ()

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest quantized activation."""
        if not self.signed:
            return 0, 255
        return (-127, 127) if self.symmetric else (-128, 127)
