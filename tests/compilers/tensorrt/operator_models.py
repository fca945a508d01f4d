"""One small model for each operator and element type: what the table ``operator_types.txt`` is measured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}

IMAGE = (1, 4, 8, 8)
SQUARE = (4, 4)


@dataclass(frozen=True)
class Form:
    """How an operator is used: the shapes of its operands of the type in question, constants and inputs beside them.

    ``operands`` holds a shape (of that type), an array (a constant), or a pair of element type and shape (an input).
    """

    operands: tuple[Any, ...] = (IMAGE,)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 18


def _ints(*values: int) -> Any:
    return np.array(values, np.int64)


_UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp EyeLike Flatten Floor "
    "GlobalAveragePool GlobalLpPool GlobalMaxPool HardSigmoid HardSwish Hardmax Identity IsInf IsNaN LeakyRelu Log "
    "LogSoftmax LpNormalization MeanVarianceNormalization Mish Neg Not RandomNormalLike RandomUniformLike Reciprocal "
    "Relu Round Selu Shape Shrink Sigmoid Sign Sin Sinh Size Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu "
    "Transpose Trilu ArgMax ArgMin"
)
_BINARY = "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mul Or PRelu Pow Sub Sum Xor"
_REDUCE = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"

FORMS: dict[str, Form] = {
    **{op: Form() for op in _UNARY.split()},
    **{op: Form((IMAGE, IMAGE)) for op in _BINARY.split()},
    **{f"Reduce{kind}": Form((IMAGE, _ints(1))) for kind in _REDUCE.split()},
    **{op: Form(attributes={"kernel_shape": [2, 2]}) for op in ("AveragePool", "LpPool", "MaxPool")},
    **{op: Form(attributes={"blocksize": 2}) for op in ("DepthToSpace", "SpaceToDepth")},
    **{op: Form((IMAGE, (4, 4, 3, 3))) for op in ("Conv", "ConvTranspose")},
    **{op: Form(((4, 8), (8, 4))) for op in ("MatMul", "Gemm")},
    **{op: Form((IMAGE, _ints(0))) for op in ("Squeeze", "Unsqueeze")},
    **{
        op: Form(((5, 1, 3), (1, 4 * gates, 3), (1, 4 * gates, 4)), {"hidden_size": 4})
        for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    },
    "EyeLike": Form((SQUARE,)),
    "BatchNormalization": Form((IMAGE, *[(4,)] * 4)),
    "CastLike": Form((IMAGE, (TensorProto.FLOAT, IMAGE)), opset=19),
    "Concat": Form((IMAGE, IMAGE), {"axis": 1}),
    "CumSum": Form((IMAGE, np.array(1, np.int32))),
    "Einsum": Form(((4, 8), (8, 4)), {"equation": "ij,jk->ik"}),
    "Expand": Form((IMAGE, _ints(2, 4, 8, 8))),
    "Gather": Form((IMAGE, _ints(0, 1)), {"axis": 1}),
    "GatherElements": Form((SQUARE, (TensorProto.INT64, SQUARE))),
    "GatherND": Form((SQUARE, (TensorProto.INT64, (4, 1)))),
    "Gelu": Form(opset=20),
    "GridSample": Form((IMAGE, (1, 5, 5, 2)), opset=20),
    "GroupNormalization": Form((IMAGE, (4,), (4,)), {"num_groups": 2}, opset=21),
    "InstanceNormalization": Form((IMAGE, (4,), (4,))),
    "LayerNormalization": Form((IMAGE, (8,), (8,))),
    "LRN": Form(attributes={"size": 3}),
    "OneHot": Form(((TensorProto.INT64, (4,)), _ints(5), (2,))),
    "Pad": Form((IMAGE, _ints(0, 0, 1, 1, 0, 0, 1, 1))),
    "QuantizeLinear": Form((IMAGE, np.float32(0.1), np.int8(0))),
    "RMSNormalization": Form((IMAGE, (8,)), opset=23),
    "Reshape": Form((IMAGE, _ints(1, -1))),
    "Resize": Form((IMAGE, None, np.array([1, 1, 2, 2], np.float32)), {"mode": "nearest"}),
    "ReverseSequence": Form((SQUARE, (TensorProto.INT64, (4,)))),
    "RotaryEmbedding": Form(((1, 2, 4, 8), (1, 4, 4), (1, 4, 4)), opset=23),
    "ScatterElements": Form((SQUARE, (TensorProto.INT64, (2, 4)), (2, 4))),
    "ScatterND": Form((SQUARE, (TensorProto.INT64, (2, 1)), (2, 4))),
    "Slice": Form((IMAGE, _ints(0), _ints(2), _ints(2))),
    "Split": Form((IMAGE, _ints(2, 2)), {"axis": 1}, outputs=2),
    "Swish": Form(opset=24),
    "Tile": Form((IMAGE, _ints(1, 1, 2, 2))),
    "TopK": Form((IMAGE, _ints(2)), outputs=2),
    "Where": Form(((TensorProto.BOOL, IMAGE), IMAGE, IMAGE)),
}


def write(op: str, dtype: str, folder: Path) -> Path:
    """Write the model of one operator at one type."""
    form = FORMS[op]
    inputs, weights, names = [], [], []
    for position, operand in enumerate(form.operands):
        name = "abcdefg"[position]
        names.append("" if operand is None else name)
        if isinstance(operand, np.ndarray | np.generic):
            weights.append(numpy_helper.from_array(np.asarray(operand), name))
        elif operand is not None:
            elem, shape = (TYPES[dtype], operand) if _is_shape(operand) else operand
            inputs.append(helper.make_tensor_value_info(name, elem, shape))
    outputs = ["y", "z"][: form.outputs]
    node = helper.make_node(op, names, outputs, name=f"the_{op}", **form.attributes)
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name=each) for each in outputs], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", form.opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model)
    for own, found in zip(model.graph.output, inferred.graph.output, strict=True):
        if found.type.WhichOneof("value"):
            own.CopyFrom(found)
        else:  # a type that ONNX does not allow here: the parser wants an output to have one all the same
            own.CopyFrom(helper.make_tensor_value_info(own.name, TYPES[dtype], None))
    path = folder / f"{op}-{dtype}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def pairs() -> Iterator[tuple[str, str]]:
    """Every operator that the table has a form for, with every type that ONNX allows it."""
    for op, form in sorted(FORMS.items()):
        schema = onnx.defs.get_schema(op, form.opset)
        place = next(index for index, operand in enumerate(form.operands) if _is_shape(operand))
        allowed = schema.inputs[min(place, len(schema.inputs) - 1)].types
        for dtype, elem in TYPES.items():
            if f"tensor({TensorProto.DataType.Name(elem).lower()})" in allowed:
                yield op, dtype


def _is_shape(operand: Any) -> bool:
    """Whether it stands for an input of the type in question."""
    return isinstance(operand, tuple) and not (len(operand) == 2 and isinstance(operand[1], tuple))
