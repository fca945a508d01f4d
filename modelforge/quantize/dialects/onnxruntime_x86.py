"""ONNX Runtime on x86-64: uint8 times int8, the order of operands that VNNI (and MLAS on all x86) multiplies."""

from modelforge.quantize.dialects.rules import Dialect

DIALECT = Dialect(
    name="onnxruntime-x86",
    title="ONNX Runtime on x86-64",
    signed=False,
    symmetric=False,
    # No int8 kernel for ConvTranspose in the CPU provider.
    weighted=frozenset({"Conv", "Gemm", "MatMul"}),
    bias="int32",
    # QLinearConv gives 8 bits: a Conv whose output is not quantized runs in float, with Q/DQ as an extra.
    outputs=frozenset({"Conv"}),
    carriers=frozenset({"MaxPool"}),
    # The first layer of an image model: about 1 % of the work, and all of its error reaches everything behind it.
    fewest_channels=4,
    # Measured by benchmarks/int8_layers.py: MLAS's blocked float kernels are faster than its INT8 ones there.
    shortest_sum=24,
    depthwise_cost=4.0,
    sources=(
        "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
        "https://github.com/microsoft/onnxruntime/issues/6732",
    ),
)
