"""ONNX models of fixed shape in, one module with a graph per entry out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from modelforge.compilers.tvm import preflight_nodes
from modelforge.compilers.tvm.api import Mutator, from_onnx, mutator, relax, tirx, tvm
from modelforge.errors import UnsupportedError


def import_entries(models: Mapping[str, Path]) -> Any:
    """One IRModule with a Relax function per entry: ``models`` maps function names to models of fixed shape.

    Raises:
        UnsupportedError: the importer would make something else of a node.
    """
    merged = tvm.IRModule()
    for function, path in models.items():
        model = onnx.load(path)
        for refusal in preflight_nodes.found_in(model):
            raise UnsupportedError(refusal.what, fix=refusal.fix)
        preflight_nodes.without_unread_outputs(model)
        _plain_nodes(model)
        module = from_onnx(model, shape_dict=_shapes(model), dtype_dict=_dtypes(model), keep_params_in_input=False)
        module = relax.transform.DecomposeOpsForInference()(module)
        merged.update(_renamed(module, function))
    return merged


def _plain_nodes(model: Any) -> None:
    """Clip as Max and Min, Sum as Adds: the importer writes them as opaque loops, which no later pass goes through.
    Sinh and Cosh, for which TVM generates no code, by exponentials; Concat without tensors that hold nothing, of which
    TVM's runtime reads no constants; LRN of FP16 in FP32, as the importer's constants for it are."""
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)}
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.op_type == "Concat":
            kept = [name for name in node.input if name not in known or known[name].size]
            node.input[:] = kept or node.input[:1]
        if node.op_type == "Clip" and node.input[1:]:
            low, high = (*node.input[1:], "", "")[:2]
            steps = [(op, bound) for op, bound in (("Max", low), ("Min", high)) if bound]
            if any(bound not in known or np.isnan(known[bound]) for _, bound in steps):
                steps = []
        elif node.op_type == "Sum":
            steps = [("Add", name) for name in node.input[1:]]
        else:
            steps = []
        if node.op_type in ("Sinh", "Cosh"):
            nodes += _hyperbolic(node)
        elif node.op_type == "LRN" and kinds.get(node.input[0]) == onnx.TensorProto.FLOAT16:
            nodes += _in_float32(node)
        else:
            nodes += _chain(node, steps) if steps else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _chain(node: Any, steps: Sequence[tuple[str, str]]) -> Iterator[Any]:
    """Nodes that apply one operator after the other to the first input."""
    current = node.input[0]
    for position, (op, operand) in enumerate(steps):
        last = position == len(steps) - 1
        result = node.output[0] if last else f"{node.output[0]}/{position}"
        yield onnx.helper.make_node(op, [current, operand], [result], name=f"{node.name}/{position}")
        current = result


def _in_float32(node: Any) -> Iterator[Any]:
    (x,), (y,) = node.input, node.output
    make = onnx.helper.make_node
    yield make("Cast", [x], [f"{y}/wide"], name=f"{node.name}/wide", to=onnx.TensorProto.FLOAT)
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.input[:], inner.output[:] = [f"{y}/wide"], [f"{y}/narrow"]
    yield inner
    yield make("Cast", [f"{y}/narrow"], [y], name=f"{node.name}/narrow", to=onnx.TensorProto.FLOAT16)


def _hyperbolic(node: Any) -> Iterator[Any]:
    """Sinh or Cosh: the mean of two exponentials, one of them negated."""
    (x,), (y,) = node.input, node.output
    make = onnx.helper.make_node
    yield make("Exp", [x], [f"{y}/up"], name=f"{node.name}/up")
    yield make("Neg", [x], [f"{y}/minus"], name=f"{node.name}/minus")
    yield make("Exp", [f"{y}/minus"], [f"{y}/down"], name=f"{node.name}/down")
    if node.op_type == "Sinh":
        yield make("Neg", [f"{y}/down"], [f"{y}/negated"], name=f"{node.name}/negated")
    yield make("Mean", [f"{y}/up", f"{y}/negated" if node.op_type == "Sinh" else f"{y}/down"], [y], name=node.name)


def _renamed(module: Any, function: str) -> Any:
    """The same module, with ``main`` called ``function``. The importer gives the kernels of every model the same
    names, whatever their shapes: they get a name of their own too."""
    names = {
        name: tvm.ir.GlobalVar(function if name.name_hint == "main" else f"{name.name_hint}_{function}")
        for name in module.get_global_vars()
    }
    for old, new in names.items():
        relax.expr._update_type(new, old.ty)
    result = tvm.IRModule()
    for name, body in module.functions_items():
        renamed = _Rename(names).visit_expr(body) if isinstance(body, relax.Function) else body
        if renamed.attrs and "global_symbol" in renamed.attrs:
            renamed = renamed.with_attr("global_symbol", names[name].name_hint)
        result[names[name]] = renamed
    return result


@mutator
class _Rename(Mutator):  # type: ignore[misc]  # TVM ships no types
    def __init__(self, names: Mapping[Any, Any]) -> None:
        super().__init__()
        self._names = names

    def visit_global_var_(self, op: Any) -> Any:
        return self._names.get(op, op)


def _shapes(model: Any) -> dict[str, list[int]]:
    return {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in _true_inputs(model.graph)
    }


def _dtypes(model: Any) -> dict[str, str]:
    return {value.name: dtype_name(value) for value in _true_inputs(model.graph)}


def _true_inputs(graph: Any) -> list[Any]:
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def dtype_name(value: Any) -> str:
    """NumPy's name for the element type of a graph input or output."""
    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)


def tensors(path: Path) -> tuple[list[tuple[str, str, tuple[int, ...]]], list[tuple[str, str]]]:
    """The inputs (name, dtype, shape) and outputs (name, dtype) of a model of fixed shape."""
    model = onnx.load(path, load_external_data=False)
    shapes = _shapes(model)
    inputs = [(value.name, dtype_name(value), tuple(shapes[value.name])) for value in _true_inputs(model.graph)]
    return inputs, [(value.name, dtype_name(value)) for value in model.graph.output]


def output_shapes(module: Any, function: str, names: Sequence[str]) -> list[tuple[int, ...]]:
    """The shapes that TVM inferred for the outputs of an entry, which have these names.

    Raises:
        UnsupportedError: one depends on the data.
    """
    result = module[function].ret_ty
    fields = list(result.fields) if isinstance(result, relax.TupleType) else [result]
    shapes: list[tuple[int, ...]] = []
    for name, field in zip(names, fields, strict=True):
        if field.shape is None or any(not isinstance(size, tirx.IntImm) for size in field.shape):
            raise UnsupportedError(
                "the shape of an output depends on the data",
                where=f"output {name}",
                fix="end the model before it, or make what decides its shape constant",
            )
        shapes.append(tuple(int(size) for size in field.shape))
    return shapes


def failing_node(error: BaseException) -> str | None:
    """Which ONNX node the importer was at when it raised: it does not say so itself, its frames do."""
    trace = error.__traceback__
    found = None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "_construct_nodes":
            node = trace.tb_frame.f_locals.get("node")
            if node is not None:
                found = f"node {node.name or node.output[0]} ({node.op_type})"
        trace = trace.tb_next
    return found


def importable_ops() -> list[str]:
    """The ONNX operators that the importer maps."""
    from tvm.relax.frontend.onnx import onnx_frontend

    return sorted(onnx_frontend._get_convert_map())
