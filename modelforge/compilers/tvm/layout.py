"""Channels last: what convolutions read lies together in memory, pixel by pixel."""

from __future__ import annotations

from typing import Any

from modelforge.compilers.tvm.api import relax, tvm

_CONVOLUTIONS = {"relax.nn.conv2d": ["NHWC", "OHWI"]}


def channels_last(module: Any) -> Any:
    """Turn two-dimensional convolutions, and what lies between them, to NHWC."""
    passes = [
        relax.transform.ConvertLayout(_CONVOLUTIONS),
        relax.transform.FoldConstant(),
        relax.transform.CanonicalizeBindings(),
    ]
    return tvm.transform.Sequential(passes)(module)
