"""The only module that imports TVM: ONNX in, object files out. Runs in the child process of :mod:`.worker`.

TVM renames its interface from release to release; all that must follow is here. Written for 0.27.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.s_tir import Schedule

from modelforge.compilers.tvm import schedule


@dataclass(frozen=True)
class Machine:
    """What code is generated for, in LLVM's words."""

    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    cores: int
    vector_bits: int


@dataclass(frozen=True)
class Objects:
    """Object files to link, in order, and what became of the functions in them."""

    files: tuple[Path, ...]
    functions: int
    scheduled: int


def import_entries(models: Mapping[str, Path]) -> Any:
    """One IRModule with a Relax function per entry: ``models`` maps function names to models of fixed shape."""
    merged = tvm.IRModule()
    for function, path in models.items():
        model = onnx.load(path)
        module = from_onnx(model, shape_dict=_shapes(model), dtype_dict=_dtypes(model), keep_params_in_input=False)
        module = relax.transform.DecomposeOpsForInference()(module)
        merged.update(_renamed(module, function))
    return merged


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


@relax.expr_functor.mutator
class _FoldPlain(relax.PyExprMutator):  # type: ignore[misc]  # TVM ships no types
    """Folds what NumPy gives exactly, bias reshapes and the bounds of Clip above all: FoldConstant compiles a kernel
    for each of them (60 ms), and there are hundreds."""

    _VIEWS = ("relax.reshape", "relax.expand_dims", "relax.squeeze", "relax.flatten")

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        name = getattr(call.op, "name", "")
        values = [self._constant(argument) for argument in call.args]
        if not values or values[0] is None:
            return call
        if name in self._VIEWS:
            shape = self.builder_.normalize(call).ty.shape
            return relax.const(values[0].reshape([int(size) for size in shape]))
        if name == "relax.permute_dims":
            axes = call.attrs.axes and [int(axis) for axis in call.attrs.axes]
            return relax.const(np.ascontiguousarray(values[0].transpose(axes)))
        if name == "relax.isnan":
            return relax.const(np.isnan(values[0]))
        if name == "relax.where" and all(value is not None for value in values):
            return relax.const(np.where(*values))
        return call

    def _constant(self, expression: Any) -> Any:
        if isinstance(expression, relax.Var):
            expression = self.lookup_binding(expression)
        return expression.value.numpy() if isinstance(expression, tvm.ir.expr.GenericConst) else None


@relax.expr_functor.mutator
class _LongSums(relax.PyExprMutator):  # type: ignore[misc]  # TVM ships no types
    """Means, sums and softmax of FP16 go through FP32: a mean over 2304 pixels in FP16 was off by 0.04 of 1.

    Convolutions and matrix products keep FP16 sums: that is what makes them faster than FP32.
    """

    _OPS = (
        "relax.mean",
        "relax.sum",
        "relax.prod",
        "relax.variance",
        "relax.std",
        "relax.cumsum",
        "relax.nn.softmax",
        "relax.nn.log_softmax",
        "relax.nn.avg_pool1d",
        "relax.nn.avg_pool2d",
        "relax.nn.avg_pool3d",
        "relax.nn.adaptive_avg_pool2d",
    )

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if getattr(call.op, "name", "") not in self._OPS:
            return call
        if getattr(call.args[0].ty, "dtype", None) != "float16":
            return call
        wide = self.builder_.emit(relax.op.astype(call.args[0], "float32"))
        result = self.builder_.emit(relax.Call(call.op, [wide, *call.args[1:]], call.attrs, call.ty_args))
        return relax.op.astype(result, "float16")


@relax.expr_functor.mutator
class _Rename(relax.PyExprMutator):  # type: ignore[misc]  # TVM ships no types
    def __init__(self, names: Mapping[Any, Any]) -> None:
        super().__init__()
        self._names = names

    def visit_global_var_(self, op: Any) -> Any:
        return self._names.get(op, op)


def build(module: Any, machine: Machine, folder: Path) -> Objects:
    """Lower, schedule and generate code; the object files go into ``folder``."""
    target = tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": machine.triple,
            "mcpu": machine.mcpu,
            "mattr": list(machine.mattr),
            "num-cores": machine.cores,
        }
    )
    with target:
        module = _lower(module)
    module, scheduled, functions = _schedule(module, machine)
    executable = tvm.compile(module, target)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "scratch"
    scratch.mkdir()
    collected: list[Path] = []

    def collect(_: str, files: Sequence[str], **__: Any) -> None:
        collected.extend(Path(shutil.copy(file, folder / Path(file).name)) for file in files)

    executable.export_library(str(folder / "unlinked.so"), fcompile=collect, workspace_dir=str(scratch))
    shutil.rmtree(scratch)
    return Objects(tuple(collected), functions, scheduled)


def _lower(module: Any) -> Any:
    entries = [name.name_hint for name, function in module.functions_items() if isinstance(function, relax.Function)]
    for name in entries:
        module[name] = _LongSums(module).visit_expr(_FoldPlain(module).visit_expr(module[name]))
    passes = [
        relax.transform.CanonicalizeBindings(),
        relax.transform.FoldConstant(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(entries),
    ]
    return tvm.transform.Sequential(passes)(module)


def _schedule(module: Any, machine: Machine) -> tuple[Any, int, int]:
    """Schedule each kernel; one that a rule cannot have stays as it is: slow, and right."""
    scheduled = functions = 0
    lanes = machine.vector_bits // 32
    for name, function in list(module.functions_items()):
        if not isinstance(function, tvm.tirx.PrimFunc):
            continue
        functions += 1
        try:
            result = schedule.apply(Schedule(function), lanes, machine.cores)
        except Exception:  # whatever a schedule primitive refuses, the unscheduled kernel is right, only slow
            continue
        module[name] = result.with_attrs(dict(function.attrs.items())) if function.attrs else result
        scheduled += 1
    return module, scheduled, functions


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


def output_shapes(module: Any, function: str) -> list[tuple[int, ...]]:
    """The shapes that TVM inferred for the outputs of an entry.

    Raises:
        ValueError: one depends on the data.
    """
    result = module[function].ret_ty
    fields = list(result.fields) if isinstance(result, relax.TupleType) else [result]
    shapes: list[tuple[int, ...]] = []
    for field in fields:
        if field.shape is None or any(not isinstance(size, tvm.tirx.IntImm) for size in field.shape):
            raise ValueError("the shape of an output depends on the data")
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
