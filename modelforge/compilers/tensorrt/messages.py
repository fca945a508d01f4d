"""What TensorRT says, in words that help: which line is the cause, what it means, and how to mend it."""

from __future__ import annotations

import re

from modelforge.errors import BuildError, ModelForgeError, ToolchainMissing, UnsupportedError

# Said after every error on a machine without a GPU. Of a product that builds without one it is beside the point.
_NO_DRIVER = re.compile(r"cudaError ?35|CUDA driver version is insufficient|CUDA initialization failure", re.I)

# What the builder says -> what that means: pattern, error class, what, fix.
_MEANINGS: tuple[tuple[str, type[ModelForgeError], str, str], ...] = (
    (
        r"Turing \(SM75\)",
        UnsupportedError,
        "compute capability 7.5 cannot have this node in FP32",
        "build at fp16 with that node in FP16: no MatMul, Gemm, Einsum, recurrent layer or 3-D Conv may stay FP32",
    ),
    (
        r"HW-specific datatypes",
        UnsupportedError,
        "the model holds a data type that this GPU does not have",
        "use fp16 instead of bfloat16 or FP8",
    ),
    (
        r"OutOfMemory|out of memory|within workspace limit",
        BuildError,
        "there was not enough memory for this model",
        "raise the option `workspace_bytes` if it is set; else free memory of the GPU, or lower the largest batch",
    ),
    (
        r"MIN<=OPT<=MAX|contradictory IOptimizationProfile|Dimension mismatch|dimensions but profile",
        BuildError,
        "the sizes given for the inputs do not fit the model or each other",
        "check [inputs] against the model, `min` <= `opt` <= `max` under [dims], and one size per symbol",
    ),
    (
        _NO_DRIVER.pattern,
        ToolchainMissing,
        "there is no NVIDIA GPU that TensorRT can use, and it builds and runs on one only",
        "install the GPU's driver, or run this on the device",
    ),
    (
        r"incompatible device|compute capability .*Supported compute capabilities|different compute capability",
        UnsupportedError,
        "the engine is for another GPU",
        "build the variant for this GPU",
    ),
    (
        r"(?i)version tag|serialized with|expecting library version|version mismatch",
        UnsupportedError,
        "the engine is of another version of TensorRT",
        "install the version that built it, or build the variant again",
    ),
)


def is_beside_the_point(message: str, needs_gpu: bool) -> bool:
    """Whether a message names the missing GPU of a build that needs none."""
    return not needs_gpu and bool(_NO_DRIVER.search(message))


def failure(said: list[str], what: str) -> ModelForgeError:
    """The error for a call that gave nothing.

    Args:
        said: the errors that were logged, in order, the misleading ones left out.
        what: what it did not do: ``the builder gave no engine``.
    """
    for pattern, kind, meaning, fix in _MEANINGS:
        for message in said:
            if re.search(pattern, message):
                return kind(f"{meaning}: {message}", where=_node_in(message), fix=fix)
    if not said:
        return BuildError(f"{what} and no reason")
    more = "\n".join(said[1:])
    return BuildError(f"{what}: {said[0]}", where=_node_in(said[0]), fix=more or None)


def _node_in(message: str) -> str | None:
    found = re.search(r"(?:\[ONNX Layer: |Cannot compile operation ')([^\]']+)", message)
    return f"node {found.group(1)}" if found else None
