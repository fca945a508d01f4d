"""Where sums start: a constant per channel; of integers it costs nothing, as registers have to be set to something.

Rules give their kernels such a constant (what the zero point of the activations adds); an integer constant that is
added to the sums (:mod:`..integer` makes biases and zero points so) joins it. Sums of FP16 in blocks (:mod:`.halves`)
take their bias so, before they are rounded.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm.api import (
    computed_by,
    constant_value,
    dtype_of,
    emit_sums,
    is_constant,
    kernel_attribute,
    op_name,
    relax,
)
from modelforge.compilers.tvm.kernels.rule import RULE

Array = np.ndarray[Any, Any]

STARTS: Final = "modelforge.starts"
"""An attribute of a kernel: its last argument is where the sums of each column start."""
_SHARE: Final = "modelforge.starts.share"
_PADDED: Final = "modelforge.starts.padded"
"""Attributes of one whose channels stand apart: so many of so many columns are channels."""


def emit_from(
    builder: Any,
    compute: Any,
    *arguments: Any,
    start: Array,
    name: str,
    pattern: int,
    apart: tuple[int, int] | None = None,
) -> Any:
    """Emit a kernel of int32 sums from ``start`` [columns of the main block].

    ``apart``: of every so many columns (the second) only so many (the first) are channels of the result.
    """
    told = {STARTS: 1, **(dict(zip((_SHARE, _PADDED), apart, strict=True)) if apart else {})}
    constant = relax.const(start.astype(np.int32))
    return emit_sums(builder, compute, *arguments, constant, main=RULE, name=name, pattern=pattern, **told)


def with_constant(call: Any, builder: Any) -> Any | None:
    """What stands for ``sums + constant`` where the kernel of the sums can start there; None for other sums."""
    dtype = dtype_of(call.args[0])
    if op_name(call) != "relax.add" or dtype not in ("int32", "float16") or not is_constant(call.args[1]):
        return None
    sums = computed_by(call.args[0], builder)
    if op_name(sums) != "relax.call_tir" or not kernel_attribute(builder, sums.args[0], STARTS):
        return None
    added, channels = constant_value(call.args[1]), int(call.args[0].ty.shape[-1])
    if added.size not in (1, channels) or (added.size > 1 and added.shape[-1] != channels):
        return None
    *inputs, start = sums.args[1].fields
    moved, places = constant_value(start).copy(), np.arange(channels)
    if dtype == "float16" and (added.size != channels or moved.any()):
        return None  # what follows a bias, as the 3 of a hard swish, has the sums with their bias read twice
    if share := int(kernel_attribute(builder, sums.args[0], _SHARE)):
        places += places // share * (int(kernel_attribute(builder, sums.args[0], _PADDED)) - share)
    moved[places] += added.reshape(-1)
    return relax.Call(sums.op, [sums.args[0], relax.Tuple([*inputs, relax.const(moved)])], sums.attrs, sums.ty_args)
