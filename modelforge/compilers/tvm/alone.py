"""An operator of a graph by itself: in words that a tuning database is keyed by, and as a graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from modelforge.compilers.tvm.api import attributes, dtype_of, is_constant, op_name, relax, shape_of

_READ_THROUGH: Final = frozenset("relax." + name for name in ("astype", "subtract", "permute_dims", "reshape"))
"""What rules look through: integer products read quantized activations behind these (:mod:`.kernels.quantized`)."""


def geometry(call: Any) -> str:
    """The operator, the types and sizes of what it reads, its attributes: ``nn.conv2d(float32[*,8,8,4], …)``.

    The batch of an image is left out: one answer for all batches, or each entry would have packed weights of its own.
    """
    image = "data_layout" in attributes(call)
    reads = ", ".join(_said(argument, image and not place) for place, argument in enumerate(call.args))
    said = attributes(call)
    return f"{op_name(call).removeprefix('relax.')}({reads}{', ' if said else ''}{said})"


def standing_alone(call: Any, bound: Callable[[Any], Any]) -> Any:
    """The call with what rules look through in the place of variables; ``bound`` gives what a variable stands for."""

    def whole(value: Any) -> Any:
        found = bound(value) if isinstance(value, relax.Var) else value
        if found is not None and is_constant(found):
            return found
        if op_name(found) not in _READ_THROUGH:
            return value
        return relax.Call(found.op, [whole(argument) for argument in found.args], found.attrs, found.ty_args)

    return relax.Call(call.op, [whole(argument) for argument in call.args], call.attrs, call.ty_args)


def module_of(call: Any) -> Any:
    """A module whose only graph, ``main``, is a call of :func:`standing_alone`; its variables become parameters.

    What is added after it stands for the epilogue that nearly every operator has: kernels are built for one.
    """
    parameters: dict[Any, Any] = {}
    builder = relax.BlockBuilder()

    def collect(value: Any) -> None:
        if isinstance(value, relax.Var) and value not in parameters:
            parameters[value] = relax.Var(f"x{len(parameters)}", value.ty)
        elif isinstance(value, (relax.Call, relax.Tuple)):
            for argument in value.args if isinstance(value, relax.Call) else value.fields:
                collect(argument)

    def emitted(value: Any) -> Any:
        if isinstance(value, relax.Tuple):
            return relax.Tuple([emitted(field) for field in value.fields])
        if not isinstance(value, relax.Call):
            return parameters.get(value, value) if isinstance(value, relax.Var) else value
        return builder.emit(relax.Call(value.op, [emitted(each) for each in value.args], value.attrs, value.ty_args))

    collect(call)
    with builder.function("main", list(parameters.values())):
        with builder.dataflow():
            result = builder.emit_output(_epilogue(emitted(call), builder))
        builder.emit_func_output(result)
    return builder.get()


def _epilogue(value: Any, builder: Any) -> Any:
    """Bias and activation; of integer sums, the next layer's int8. Nothing where there are several results."""

    def number(of: float, dtype: str) -> Any:
        return relax.const(of, dtype)

    dtype = dtype_of(value)
    if dtype in ("float32", "float16"):
        biased = builder.emit(relax.op.add(value, number(0.125, dtype)))
        return builder.emit(relax.op.nn.relu(biased))
    if dtype == "int32":
        scaled = builder.emit(
            relax.op.multiply(builder.emit(relax.op.astype(value, "float32")), number(1e-4, "float32"))
        )
        clipped = builder.emit(relax.op.clip(builder.emit(relax.op.round(scaled)), -128, 127))
        return builder.emit(relax.op.astype(clipped, "int8"))
    return value


def _said(argument: Any, batched: bool) -> str:
    shape = shape_of(argument)
    if shape is None:
        return str(argument)
    sizes = ["*", *shape[1:]] if batched else shape
    return f"{dtype_of(argument)}[{','.join(map(str, sizes))}]"
