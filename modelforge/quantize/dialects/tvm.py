"""TVM for CPUs: bytes between kernels, float within one, from its int32 sums to the int8 that it stores."""

from modelforge.quantize.dialects.rules import Dialect

DIALECT = Dialect(
    name="tvm",
    title="TVM Relax",
    signed=True,
    # The zero point's share of a sum is known when weights are packed, whatever multiplies: it costs nothing.
    symmetric=False,
    phases=True,
    # What is read from memory should be bytes: the other branch of a residual sum, what is joined or moved.
    residual_add=True,
    shared_concat=True,
    carriers=frozenset({"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split"}),
    sources=(
        "modelforge.compilers.tvm.integer",
        "modelforge.compilers.tvm.phases",
        "https://github.com/apache/tvm/pull/19391",
    ),
)
