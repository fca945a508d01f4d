"""How a .tflite file's tensors stand for an ONNX model's: by name or order, as they lie or from NCHW to NHWC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelforge.errors import UnsupportedError

_INTEGERS = ("int8", "uint8", "int16")


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: in the ONNX model.
        tensor: in the .tflite file.
        dtype: of the file's tensor; ``scale`` and ``zero_point``: ``x = (q - zero_point) * scale``.
        shape: of the file's tensor.
        permute: axes that bring the ONNX model's array into the file's layout (inputs), or back (outputs).
        batched: whether samples lie along its first axis.
    """

    name: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    scale: float | None
    zero_point: int | None
    permute: tuple[int, ...]
    batched: bool


def match_ports(
    onnx: Mapping[str, Sequence[int | str]], found: Sequence[Mapping[str, Any]], *, inputs: bool
) -> tuple[Port, ...]:
    """Match the tensors of the file with those of the ONNX model.

    Args:
        onnx: shape by name, in order; a symbol is the batch.
        found: what the worker's ``inspect`` says.

    Raises:
        UnsupportedError: their number or a shape differs, or one is float.
    """
    side = "inputs" if inputs else "outputs"
    if len(onnx) != len(found):
        raise UnsupportedError(
            f"the .tflite file has {len(found)} {side}, and the ONNX model {len(onnx)}",
            fix="give the .tflite form of the same model",
        )
    by_name = {each["tensor"]: each for each in found}
    use_names = set(by_name) == set(onnx)
    return tuple(
        _port(name, shape, by_name[name] if use_names else each, inputs)
        for (name, shape), each in zip(onnx.items(), found, strict=True)
    )


def _port(name: str, shape: Sequence[int | str], found: Mapping[str, Any], inputs: bool) -> Port:
    tensor = f"{found['tensor']} of the .tflite file"
    if found["dtype"] not in _INTEGERS or found["scale"] is None:
        raise UnsupportedError(
            f"{tensor} is {found['dtype']}: Ethos-U computes in integers, and Vela leaves a float model to the CPU",
            where=name,
            fix="quantize inputs, outputs and all between to int8 when you convert the model",
        )
    wanted = tuple(1 if isinstance(size, str) else size for size in shape)
    given = tuple(found["shape"])
    permute = _permutation(wanted, given, inputs)
    if permute is None:
        raise UnsupportedError(
            f"{tensor} has shape {list(given)}, and {name} of the ONNX model {list(wanted)}",
            where=name,
            fix="give the .tflite form of the same model at a batch of 1, in the same layout or NHWC for NCHW",
        )
    batched = bool(shape) and (isinstance(shape[0], str) or shape[0] == 1)
    return Port(
        name, found["tensor"], found["dtype"], given, found["scale"], found["zero_point"], permute, batched
    )  # fmt: skip


def _permutation(onnx: tuple[int, ...], tflite: tuple[int, ...], inputs: bool) -> tuple[int, ...] | None:
    """Axes as in ``numpy.transpose``; a shape that fits both ways is taken as it lies."""
    if onnx == tflite:
        return tuple(range(len(onnx)))
    if len(onnx) == 4 and (onnx[0], *onnx[2:], onnx[1]) == tflite:
        return (0, 2, 3, 1) if inputs else (0, 3, 1, 2)
    return None
