"""ONNX Runtime on ARM: int8 times int8, as its dot-product kernels (sdot, smmla) multiply it."""

from modelforge.quantize.dialects.rules import Dialect

DIALECT = Dialect(
    name="onnxruntime-arm",
    title="ONNX Runtime on ARM",
    signed=True,
    symmetric=False,
    weighted=frozenset({"Conv", "Gemm", "MatMul"}),
    bias="int32",
    outputs=frozenset({"Conv"}),
    carriers=frozenset({"MaxPool"}),
    # The first layer of an image model: about 1 % of the work, and all of its error reaches everything behind it.
    fewest_channels=4,
    sources=("https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",),
)
