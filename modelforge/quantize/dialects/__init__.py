"""The dialects, one file each: how every compiler wants quantization written. A new one is a file and a line here."""

from __future__ import annotations

from modelforge.errors import InputError, nearest
from modelforge.quantize.dialects import ascend, onnxruntime_arm, onnxruntime_x86, qualcomm, rockchip, tensorrt, tvm
from modelforge.quantize.dialects.rules import WEIGHTED, Dialect

__all__ = ["DIALECTS", "WEIGHTED", "Dialect", "get_dialect"]

DIALECTS: dict[str, Dialect] = {
    module.DIALECT.name: module.DIALECT
    for module in (ascend, onnxruntime_arm, onnxruntime_x86, qualcomm, rockchip, tensorrt, tvm)
}


def get_dialect(name: str) -> Dialect:
    """The dialect of this name.

    Raises:
        InputError: there is none; names the nearest.
    """
    found = DIALECTS.get(name)
    if found is None:
        raise InputError(f'there is no dialect "{name}"', fix=nearest(name, DIALECTS))
    return found
