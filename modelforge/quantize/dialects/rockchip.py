"""Rockchip (rknn-toolkit2): int8 between all operators; it reads Q/DQ with ``optimization_level`` 2."""

from modelforge.quantize.dialects.rules import WEIGHTED, Dialect

DIALECT = Dialect(
    name="rockchip",
    title="Rockchip RKNN",
    signed=True,
    symmetric=False,
    # A Div by a number for each channel, which equalization makes of a HardSwish, kills the toolkit 2.5.0 (SIGSEGV).
    equalize=False,
    bias="int32",
    # Without it, the toolkit 2.5.0 ends with "IndexError: list index out of range" in fold_constant.
    bias_zero_point=True,
    # Weights of all kinds by channel: it takes a Gemm's scale for a channel's where a Conv has one for each.
    outputs=WEIGHTED,
    # Not Clip: its bounds would become INT8 constants, which the toolkit leaves without a type.
    elementwise=frozenset("Add Sub Mul Relu LeakyRelu Sigmoid HardSwish AveragePool GlobalAveragePool Concat".split()),
    carriers=frozenset("MaxPool Reshape Transpose Slice Split Squeeze Unsqueeze Flatten Resize".split()),
    # Its requantization differs by one step in a tenth of all values, which doubles the noise: ResNet-50 with random
    # weights has 10.5 dB in ONNX Runtime and 8.2 in the simulator, on the same samples.
    margin_db=3.0,
    sources=("rknn-toolkit2 2.5.0 user guide, section on quantized models", "builds with rknn-toolkit2 2.5.0"),
)
