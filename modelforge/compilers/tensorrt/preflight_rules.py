"""Rules of the preflight that hold for many operators: element types, quantization, shapes, compute capability.

Each gives a reason or None; what it applies to and where it comes from stands beside it in a :class:`Rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from modelforge.compilers.tensorrt.preflight import DOCS, DTYPE_SINCE, FP32_GEMM_OPS
from modelforge.compilers.tensorrt.preflight_model import Model, Node, Tensor
from modelforge.compilers.tensorrt.product import MEASURED

PARSER = "github.com/onnx/onnx-tensorrt, onnxOpCheckers.cpp of 10.1"
"""What a rule is read from that holds for classic TensorRT too."""

NARROW = frozenset({"int4", "float8_e4m3fn", "float4_e2m1fn"})
"""Types that exist only between a QuantizeLinear and a DequantizeLinear."""

READABLE = frozenset({"float32", "float16", "bfloat16", "float64", "int8", "uint8", "int32", "int64", "bool", *NARROW})
"""Element types that the parser can read at all; float64 becomes FP32."""

SINGLE = frozenset({"float32", "float64"})

HIGHEST_RANK = 8

# Operands that decide shapes, or that have to be known when the engine is built.
_SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Split", "TopK", "OneHot", "CumSum", "Squeeze", "Unsqueeze"), (1,)),
    **dict.fromkeys(("ConstantOfShape", "BlackmanWindow", "HammingWindow", "HannWindow", "Loop"), (0,)),
    "Pad": (1, 3),
    "Slice": (1, 2, 3, 4),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "Upsample": (1,),
}

# Operands that must be weights: no arithmetic, not even on constants.
_WEIGHT_OPERANDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        [f"Reduce{kind}" for kind in "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()], (1,)
    ),
    "STFT": (1, 3),
    "Dropout": (2,),
}

# Where an operator's data operand is not the first.
_DATA_OPERAND = {"Where": 1, "OneHot": 2}

_RECURRENT = frozenset({"LSTM", "GRU", "RNN", "Loop", "Scan"})

_BROADCAST = frozenset(
    "Add Sub Mul Div Pow Max Min Mean Sum And Or Xor Equal Greater Less PRelu Gemm".split()  # of opset 6
)


@dataclass(frozen=True)
class Rule:
    """A thing that TensorRT-RTX refuses.

    Attributes:
        ops: operators that it concerns; empty: all.
        broken: the reason why a node breaks it, or None.
        live_only: told by the builder, which no longer sees nodes that no output depends on.
        classic: holds for classic TensorRT as well.
        lasting: nothing that ModelForge does to a model before it is compiled could mend it.
    """

    name: str
    ops: frozenset[str]
    broken: Callable[[Node, Model, int], str | None]
    fix: str
    source: str = MEASURED
    live_only: bool = False
    classic: bool = False
    lasting: bool = False


@cache
def operator_types() -> dict[str, frozenset[str]]:
    """The element types that each operator takes (data, measured)."""
    text = files("modelforge.compilers.tensorrt").joinpath("operator_types.txt").read_text(encoding="utf-8")
    table = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            types, ops = line.split(":")
            table.update(dict.fromkeys(ops.split(), frozenset(types.split())))
    return table


def _operand_type(node: Node, _: Model, __: int) -> str | None:
    taken = operator_types().get(node.op)
    data = node.input(_DATA_OPERAND.get(node.op, 0))
    if taken is None:
        return None
    if data is not None and data.dtype in READABLE - NARROW - taken:
        return f"it takes no {data.dtype} ({data.name})"
    others = [each for each in node.inputs if each is not None and each.dtype == "uint8"]
    is_free = "uint8" in taken or node.op == "QuantizeLinear"
    return f"it takes no uint8 ({others[0].name})" if others and not is_free else None


def _result_type(node: Node, model: Model, _: int) -> str | None:
    ends = {each.name for each in model.outputs}  # told as such
    unknown = [each for each in node.outputs if each.dtype and each.dtype not in READABLE and each.name not in ends]
    return f"the parser knows no {unknown[0].dtype} ({unknown[0].name})" if unknown else None


def _byte_between(node: Node, model: Model, _: int) -> str | None:
    made = [each for each in node.outputs if each.dtype == "uint8"]
    ends = {each.name for each in model.outputs}
    if made and made[0].name not in ends and node.op in ("Cast", "CastLike"):
        return f"{made[0].name} is a uint8 tensor between two nodes"
    return None


def _quantized_constant(node: Node, _: Model, __: int) -> str | None:
    if node.op in ("DequantizeLinear", "QuantizeLinear", "CastLike", "Shape", "Size", "Identity", "Constant"):
        return None
    for each in node.inputs:
        if each is not None and each.is_weight and each.dtype in {"int8", "uint8", *NARROW}:
            return f"the {each.dtype} constant {each.name} goes to something else than DequantizeLinear"
    return None


def _old_broadcast(node: Node, _: Model, __: int) -> str | None:
    if node.opset >= 7 or len(node.inputs) < 2 or (node.op == "Gemm" and node.input(2) is None):
        return None
    return "before opset 7, operands are broadcast in a way that the parser does not know"


def _narrow_cast(node: Node, _: Model, __: int) -> str | None:
    for each in (*node.inputs[:1], *node.outputs):
        if each is not None and each.dtype in NARROW:
            return f"{each.name} is of type {each.dtype}"
    return None


def _shape_operand(node: Node, _: Model, __: int) -> str | None:
    for place in _SHAPE_OPERANDS.get(node.op, ()):
        each = node.input(place)
        if each is not None and each.from_input:
            return f"its operand {each.name} decides a shape and depends on the numbers of an input"
    return None


def _weight_operand(node: Node, _: Model, __: int) -> str | None:
    for place in _WEIGHT_OPERANDS.get(node.op, ()):
        each = node.input(place)
        if each is not None and not each.is_weight:
            return f"its operand {each.name} is computed, and only a constant will do"
    return None


def _rank(node: Node, _: Model, __: int) -> str | None:
    high = [each for each in node.outputs if each.rank is not None and each.rank > HIGHEST_RANK]
    return f"{high[0].name} has {high[0].rank} dimensions, and {HIGHEST_RANK} are the most" if high else None


def _capability(node: Node, _: Model, sm: int) -> str | None:
    if node.op in ("Shape", "Size"):
        return None
    for each in (*node.inputs, *node.outputs):
        since = DTYPE_SINCE.get(each.dtype, 0) if each is not None else 0
        if each is not None and sm < since:
            return f"{each.name} is {each.dtype}, which needs compute capability {since // 10}.{since % 10}"
    return None


def _fp32_product(node: Node, _: Model, sm: int) -> str | None:
    operands = [each for each in node.inputs if each is not None and each.dtype]
    if sm != 75 or not operands or operands[0].dtype not in SINGLE:
        return None
    if node.op == "Einsum" and len(node.inputs) < 2:
        return None
    return "its product is in FP32, which compute capability 7.5 cannot have"


def _fp32_volume(node: Node, _: Model, sm: int) -> str | None:
    data = node.input(0)
    if sm != 75 or data is None or data.dtype not in SINGLE or data.rank != 5:
        return None
    return "it is a 3-D convolution in FP32, which compute capability 7.5 cannot have"


def _zero_point(node: Node, _: Model, __: int) -> str | None:
    zero = node.input(2)
    if zero is None:
        return None
    if zero.value is not None and np.any(zero.value.astype(np.float64)):
        return f"zero point {zero.name} is not 0"
    if not zero.is_weight and zero.value is None:
        return f"zero point {zero.name} is not a constant"
    return None


def _scale(node: Node, _: Model, __: int) -> str | None:
    scale = node.input(1)
    if scale is not None and scale.value is not None and not np.all(scale.value.astype(np.float64) > 0):
        return f"scale {scale.name} is not positive"
    return None


def _quantized_type(node: Node, model: Model, _: int) -> str | None:
    if node.op == "QuantizeLinear":
        made = node.outputs[0].dtype
        return f"it makes {made}" if made and made not in {"int8", "uint8", *NARROW} else None
    data = node.input(0)
    if data is None or not data.dtype or data.dtype in {"int8", *NARROW}:
        return None
    if data.dtype == "uint8" and data.name in model.producers:
        return None
    return f"it takes {data.dtype} ({data.name})"


def _odd_nibbles(node: Node, _: Model, __: int) -> str | None:
    data = node.input(0)
    if data is None or data.dtype not in ("int4", "float4_e2m1fn") or data.shape is None:
        return None
    sizes = [size for size in data.shape if isinstance(size, int)]
    return "it has an odd number of 4-bit elements" if len(sizes) == len(data.shape) and np.prod(sizes) % 2 else None


def _unsigned(node: Node, _: Model, __: int) -> str | None:
    zero = node.input(2)
    return f"zero point {zero.name} is uint8" if zero is not None and zero.dtype == "uint8" else None


def _same_name(node: Node, model: Model, _: int) -> str | None:
    twins = [each for each in model.named.get(node.name, ()) if each.op == node.op]
    return "another node has the same name" if len(twins) > 1 and twins[0] is not node else None


def _conditional(node: Node, _: Model, __: int) -> str | None:
    condition = node.input(0)
    if condition is None or not condition.from_input or len(node.bodies) != 2:
        return None
    for left, right in zip(*node.bodies, strict=False):
        if left.rank is not None and right.rank is not None and left.rank != right.rank:
            return f"its branches give {left.rank} and {right.rank} dimensions"
    return None


def _nested(node: Node, model: Model, _: int) -> str | None:
    if not any(each.op == "If" for owner in node.owners for each in model.named.get(owner, ())):
        return None
    if any(each.op in _RECURRENT and set(each.owners) & set(node.owners) for each in model.nodes if each.owners):
        return "it stands inside another If, beside a recurrent layer, where the builder ends in an internal assertion"
    return None


def _loop(node: Node, _: Model, __: int) -> str | None:
    if node.input(1) is None:
        return "it has no condition"
    if node.bodies:
        for before, after in zip(node.inputs[2:], node.bodies[0][1:], strict=False):
            if before is not None and _differ(before, after):
                return f"{before.name} changes its shape from {before.shape} to {after.shape}"
    return None


def _differ(before: Tensor, after: Tensor) -> bool:
    if before.shape is None or after.shape is None:
        return False
    if len(before.shape) != len(after.shape):
        return True
    pairs = zip(before.shape, after.shape, strict=True)
    return any(isinstance(old, int) and isinstance(new, int) and old != new for old, new in pairs)


_Q = frozenset({"QuantizeLinear"})
_DQ = frozenset({"DequantizeLinear"})
_ALL: frozenset[str] = frozenset()
_QUANTIZATION = "github.com/onnx/onnx-tensorrt, QuantDequantLinearHelper in onnxOpImporters.cpp of 10.1"
_RECALIBRATE = 'quantize with the dialect "tensorrt": signed, zero points of 0, bias in floating point'
_CONSTANT = "make it a constant of the model"

GENERAL = (
    Rule("operand-type", _ALL, _operand_type, "cast to float32, float16 or int32 before it", lasting=True),
    Rule("result-type", _ALL, _result_type, "use another type in the model", lasting=True),
    Rule("uint8", _ALL, _byte_between, "use int8 or int32", lasting=True),
    Rule("quantized-constant", _ALL, _quantized_constant, "dequantize it first, or store it in a wider type"),
    Rule(
        "broadcast",
        _BROADCAST,
        _old_broadcast,
        "raise the opset to 13 or later (onnx.version_converter)",
        "github.com/onnx/onnx-tensorrt, broadcastTensor in importerUtils.cpp of 10.1",
        classic=True,
    ),
    Rule(
        "narrow-cast",
        frozenset({"Cast", "CastLike"}),
        _narrow_cast,
        "use QuantizeLinear and DequantizeLinear",
        lasting=True,
    ),
    Rule("shape-operand", frozenset(_SHAPE_OPERANDS), _shape_operand, _CONSTANT, lasting=True),
    Rule("constant-operand", frozenset(_WEIGHT_OPERANDS), _weight_operand, _CONSTANT),
    Rule("rank", _ALL, _rank, "merge dimensions", lasting=True),
    Rule("capability-type", _ALL, _capability, "use float16", f"{MEASURED}; {DOCS}", live_only=True),
    Rule(
        "sm75-fp32-gemm",
        frozenset(FP32_GEMM_OPS),
        _fp32_product,
        'give the ladder ["int8", "fp16"] or ["fp16"]',
        f"{MEASURED}; footnote of {DOCS}; github.com/pytorch/TensorRT/issues/4546",
        live_only=True,
    ),
    Rule(
        "sm75-fp32-conv3d",
        frozenset({"Conv", "ConvTranspose"}),
        _fp32_volume,
        'give the ladder ["int8", "fp16"] or ["fp16"]',
        f"{MEASURED}; footnote of {DOCS}",
        live_only=True,
    ),
    Rule("zero-point", _Q | _DQ, _zero_point, _RECALIBRATE, _QUANTIZATION, classic=True, lasting=True),
    Rule("scale", _Q | _DQ, _scale, _RECALIBRATE, _QUANTIZATION, classic=True, lasting=True),
    Rule("quantized-type", _Q | _DQ, _quantized_type, _RECALIBRATE, lasting=True),
    Rule("odd-nibbles", _DQ, _odd_nibbles, "pad it to an even number of elements"),
    Rule("uint8-quantization", _Q | _DQ, _unsigned, _RECALIBRATE, lasting=True),
    Rule("same-name", _Q | _DQ, _same_name, "give every node a name of its own"),
    Rule(
        "branch-ranks",
        frozenset({"If"}),
        _conditional,
        "let both branches give the same number of dimensions",
        lasting=True,
    ),
    Rule("nested-if", frozenset({"If"}), _nested, "export the branch that is used, without If", live_only=True),
    Rule(
        "loop",
        frozenset({"Loop"}),
        _loop,
        "give it a condition, and let it keep the shapes of what it carries",
        lasting=True,
    ),
)


def boundary(model: Model) -> Iterator[tuple[str, str, str]]:
    """What is wrong with inputs, outputs and weights: rule, what, fix."""
    cast = "cast inside the client, and let the model take float32, float16, int32 or int64"
    for kind, tensors in (("input", model.inputs), ("output", model.outputs), ("constant", model.weights)):
        for each in tensors:
            if kind == "output" and not each.dtype:
                yield "output-type", f"output {each.name} has no type", "run ONNX's shape inference on the model"
            elif each.dtype and each.dtype not in READABLE:
                yield "dtype", f"{kind} {each.name}: the parser knows no {each.dtype}", cast
            elif kind != "constant" and each.dtype == "float64":
                yield "float64", f"{kind} {each.name} is float64 and would become float32 without a word", cast
            if each.rank is not None and each.rank > HIGHEST_RANK:
                yield (
                    "rank",
                    f"{kind} {each.name} has {each.rank} dimensions, {HIGHEST_RANK} are the most",
                    "merge some",
                )
    for each in model.inputs:
        users = model.consumers.get(each.name, ())
        if each.dtype in NARROW and any(node.op != "DequantizeLinear" for node in users):
            yield "dtype", f"input {each.name} is {each.dtype} and goes to no DequantizeLinear", cast
    for each in model.outputs:
        maker = model.producers.get(each.name)
        if each.dtype in NARROW and (maker is None or maker.op != "QuantizeLinear"):
            yield "dtype", f"output {each.name} is {each.dtype} and comes from no QuantizeLinear", cast
