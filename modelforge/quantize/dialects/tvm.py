"""TVM Relax: plain Q/DQ at the inputs of weighted operators, symmetric, as its sdot kernels multiply int8 by int8."""

from modelforge.quantize.dialects.rules import Dialect

DIALECT = Dialect(
    name="tvm",
    title="TVM Relax",
    signed=True,
    symmetric=True,
    weighted=frozenset({"Conv", "Gemm", "MatMul"}),
    sources=("https://github.com/apache/tvm/pull/19391", "https://github.com/apache/tvm/pull/19993"),
)
