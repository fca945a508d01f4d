"""How a float tensor crosses from one stage to the next: as it is, rounded to FP16, or quantized to one byte.

``scale`` and ``zero_point`` are those of ONNX's QuantizeLinear to uint8; sender and receiver find them in the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from modelforge.quantize.ranges import TensorRange


def transport_of(kind: str, found: TensorRange | None) -> dict[str, Any]:
    """The JSON that says how a tensor crosses.

    Args:
        kind: ``fp16`` or ``int8``.
        found: the tensor's range on the calibration data; needed for ``int8``.
    """
    if kind == "fp16":
        return {"dtype": "float16"}
    from modelforge.quantize.thresholds import clip_range

    assert found is not None, "INT8 transport is planned only with calibration data"
    low, high = clip_range(found, symmetric=False, signed=False)
    scale = (high - low) / 255
    return {"dtype": "uint8", "scale": scale, "zero_point": int(min(255, max(0, round(-low / scale))))}


def cross(array: np.ndarray[Any, Any], way: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """What the receiver gets of a float array, in the sender's dtype: rounded and clipped as the way says."""
    import numpy as np

    if way["dtype"] == "float16":
        largest = np.finfo(np.float16).max
        half: np.ndarray[Any, Any] = np.clip(array, -largest, largest).astype(np.float16)
        return half.astype(array.dtype)
    scale, zero_point = way["scale"], way["zero_point"]
    sent: np.ndarray[Any, Any] = np.clip(np.rint(array / scale) + zero_point, 0, 255)
    received: np.ndarray[Any, Any] = (sent - zero_point) * scale
    return received.astype(array.dtype)
