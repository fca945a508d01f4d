"""Qualcomm HTP (QNN through ONNX Runtime): what is not quantized is refused or leaves the NPU, so all of it is."""

from modelforge.quantize.dialects.rules import WEIGHTED, Dialect

_ELEMENTWISE = (
    "Add Sub Mul Div Relu LeakyRelu PRelu Clip Sigmoid Tanh HardSigmoid HardSwish Elu Gelu Softmax Sqrt Pow Exp "
    "AveragePool GlobalAveragePool ReduceMean LayerNormalization InstanceNormalization Concat"
)

DIALECT = Dialect(
    name="qualcomm",
    title="Qualcomm HTP",
    signed=False,
    symmetric=False,
    per_channel=frozenset({"Conv", "ConvTranspose"}),
    bias="int32",
    outputs=WEIGHTED,
    elementwise=frozenset(_ELEMENTWISE.split()),
    carriers=frozenset(
        "MaxPool GlobalMaxPool Reshape Transpose Slice Split Squeeze Unsqueeze Flatten Gather Resize Pad Expand".split()
    ),
    attention=True,
    graph_outputs=True,
    remainder="compiler",
    # ResNet-50 with random weights: over 9 dB in ONNX Runtime, 6.5 in HTP's emulation.
    margin_db=3.0,
    sources=("https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html",),
)
