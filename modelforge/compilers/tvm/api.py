"""The only module that imports TVM: every name that its releases rename passes through here. Written for 0.27.

Runs in the child process of :mod:`.worker`. TVM ships no types: its objects are ``Any``.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx, topi
from tvm.relax.frontend.onnx import from_onnx
from tvm.relax.utils import gen_call_tir_inputs
from tvm.s_tir import SBlock, Schedule
from tvm_ffi import structural_hash, structural_map

from modelforge.compilers.tvm.machine import Machine

__all__ = ["Mutator", "Schedule", "from_onnx", "mutator", "relax", "structural_map", "te", "tirx", "topi", "tvm"]

Mutator = relax.PyExprMutator
mutator = relax.expr_functor.mutator

DATA_PARALLEL, REDUCTION = 0, 2
"""``tvm.tirx.IterVar``: DataPar and CommReduce."""
ELEMENTWISE, BROADCAST, INJECTIVE, COMMREDUCE, OUT_FUSIBLE, TUPLE, OPAQUE = 0, 1, 2, 3, 4, 7, 8
"""``relax.OpPatternKind``: what FuseOps may join with what; OUT_FUSIBLE takes elementwise consumers only."""


def target(machine: Machine) -> Any:
    """TVM's target for a machine."""
    return tvm.target.Target(
        {
            "kind": "llvm",
            "mtriple": machine.triple,
            "mcpu": machine.mcpu,
            "mattr": list(machine.mattr),
            "num-cores": machine.cores,
        }
    )


def op_name(expression: Any) -> str:
    """``relax.nn.conv2d`` of a call of an operator; empty for anything else."""
    return str(getattr(getattr(expression, "op", None), "name", "")) if isinstance(expression, relax.Call) else ""


def shape_of(expression: Any) -> tuple[int, ...] | None:
    """The shape of a tensor, or None where a dimension is not a number."""
    shape = getattr(expression.ty, "shape", None)
    if shape is None or any(not isinstance(size, tirx.IntImm) for size in shape):
        return None
    return tuple(int(size) for size in shape)


def dtype_of(expression: Any) -> str:
    """NumPy's name of a tensor's element type; empty for what is no tensor."""
    return str(getattr(expression.ty, "dtype", None) or "")


def numbers(values: Any) -> tuple[int, ...]:
    """Integers of an operator's attribute."""
    return tuple(int(value) for value in values)


def attributes(call: Any) -> str:
    """An operator's attributes, in one spelling; empty where it has none."""
    return "" if call.attrs is None else " ".join(str(call.attrs).partition("(")[2].removesuffix(")").split())


def is_constant(expression: Any) -> bool:
    """Whether this is a tensor that is known now."""
    return isinstance(expression, tvm.ir.expr.GenericConst)


def constant_value(expression: Any) -> np.ndarray[Any, Any]:
    """The array of a constant."""
    array: np.ndarray[Any, Any] = expression.value.numpy()
    return array


def is_kernel(function: Any) -> bool:
    """Whether a function of a module is code for loops, not a graph."""
    return isinstance(function, tirx.PrimFunc)


def graphs(module: Any) -> list[tuple[Any, Any]]:
    """The graph functions of a module, with their names."""
    return [(name, body) for name, body in module.functions_items() if isinstance(body, relax.Function)]


def kernels(module: Any) -> list[tuple[Any, Any]]:
    """The loop functions of a module, with their names."""
    return [(name, body) for name, body in module.functions_items() if is_kernel(body)]


def bindings(module: Any) -> list[tuple[Any, Any, list[Any]]]:
    """Every variable of the graphs, what it is bound to, and the variables that this reads, one entry a use.

    Last, for each graph, None with its result.
    """
    found: list[tuple[Any, Any, list[Any]]] = []

    def reads(value: Any) -> list[Any]:
        if isinstance(value, relax.Var):
            return [value]
        if isinstance(value, relax.Tuple):
            return [variable for field in value.fields for variable in reads(field)]
        if isinstance(value, relax.TupleGetItem):
            return reads(value.tuple_value)
        arguments = value.args if isinstance(value, relax.Call) else []
        return [variable for argument in arguments for variable in reads(argument)]

    for _, graph in graphs(module):
        body = graph.body
        for block in body.blocks if isinstance(body, relax.SeqExpr) else []:
            found += [(binding.var, binding.value, reads(binding.value)) for binding in block.bindings]
        found.append((None, body, reads(body.body if isinstance(body, relax.SeqExpr) else body)))
    return found


def given_and_read(module: Any) -> tuple[dict[Any, Any], defaultdict[Any, list[Any]]]:
    """What every variable of the graphs stands for, and for each the variables whose values read it, one entry a use;
    None is a graph's result."""
    given: dict[Any, Any] = {}
    readers: defaultdict[Any, list[Any]] = defaultdict(list)
    for variable, value, reads in bindings(module):
        given[variable] = value
        for read in reads:
            readers[read].append(variable)
    return given, readers


def rewritten(module: Any, make: Callable[[Any], Any]) -> Any:
    """The module with each graph passed through ``make(module)``, a :class:`Mutator`."""
    rewriter = make(module)
    for name, graph in graphs(module):
        rewriter.builder_.update_func(name, rewriter.visit_expr(graph))
    return rewriter.builder_.get()


def emit_kernel(
    builder: Any, compute: Callable[..., Any], *arguments: Any, name: str, pattern: int, **attributes: int
) -> Any:
    """Emit a call of a kernel that ``compute`` describes in tensor expressions; ``pattern``: what may fuse with it."""
    told = {"op_pattern": pattern, **attributes}
    return builder.emit_te(compute, *arguments, primfunc_name_hint=name, primfunc_attrs=told)


def emit_sums(
    builder: Any, compute: Callable[..., Any], *arguments: Any, main: str, name: str, pattern: int, **attributes: int
) -> Any:
    """As :func:`emit_kernel`, for a kernel whose main block (annotated ``main``) sums from the last of ``arguments``.

    That one holds the start of each column of the block, and ``compute`` does not get it: te.sum starts at zero.
    """
    told = {"op_pattern": pattern, **attributes}
    function, inputs, result = gen_call_tir_inputs(
        lambda *tensors: compute(*tensors[:-1]), *arguments, primfunc_attrs=told
    )
    start = function.params[len(arguments) - 1]

    def from_start(block: Any) -> Any:
        if main not in block.annotations:
            return block
        store = block.init
        init = tirx.BufferStore(store.buffer, start[store.indices[-1]], store.indices)
        kept = (block.iter_vars, block.reads, block.writes, block.name_hint, block.body)
        return SBlock(*kept, init, block.alloc_buffers, block.match_buffers, block.annotations)

    function = function.with_body(structural_map(function.body, (SBlock, from_start), order="post"))
    return builder.emit(relax.call_tir(builder.add_func(function, name), inputs, result))


def register_intrinsic(name: str, meaning: str, body: str) -> None:
    """Make an instruction known to ``Schedule.tensorize``; both are sources in TVMScript, with ``T`` for its names."""
    from tvm.s_tir import TensorIntrin
    from tvm.script import from_source
    from tvm.script import tirx as script

    functions = [from_source(text, extra_vars={"T": script}) for text in (meaning, body)]
    TensorIntrin.register(name, *functions, override=True)


def kernel_attribute(builder: Any, name: Any, attribute: str) -> Any:
    """An attribute that :func:`emit_kernel` gave to a kernel; 0 where it gave none."""
    attributes = builder.get()[name].attrs
    return attributes[attribute] if attributes is not None and attribute in attributes else 0


def first_name(value: Any, lookup: Callable[[Any], Any]) -> Any:
    """Follow names to the variable that a value was first given; ``lookup`` gives what a variable is bound to."""
    while isinstance(value, relax.Var):
        bound = lookup(value)
        if not isinstance(bound, relax.Var):
            break
        value = bound
    return value


def computed_by(expression: Any, builder: Any) -> Any:
    """The call that gave a value, through other names of it; None for an input, the expression itself if no name."""
    while isinstance(expression, relax.Var):
        expression = builder.lookup_binding(expression)
    return expression


def empty_kernel() -> Any:
    """A kernel that nobody calls."""
    one = te.placeholder((1,), "float32", name="one")
    same = te.compute((1,), lambda i: one[i], name="same")
    return te.create_prim_func([one, same]).with_attr("global_symbol", "nothing")


def extent(sch: Any, loop: Any) -> int:
    """How often a loop runs."""
    return int(sch.get(loop).extent)


def blocks(sch: Any) -> list[Any]:
    """The blocks of a kernel, in order."""
    # What TVM writes as loops, such as ScatterElements, is one block without others in it, under its own name.
    return list(sch.get_child_blocks(sch.get_sblock(str(sch.mod["main"].body.block.name_hint))))


def is_reduction(sch: Any, block: Any) -> bool:
    """Whether a block sums, multiplies or compares over an axis."""
    return any(int(var.iter_type) == REDUCTION for var in sch.get(block).iter_vars)


def block_annotations(sch: Any, block: Any) -> Mapping[str, Any]:
    """What ``te.compute(attrs=...)`` said of a block."""
    found = sch.get(block).annotations
    return {str(key): found[key] for key in found}


def written_dtype(sch: Any, block: Any) -> str:
    """The element type of what a block writes."""
    return str(sch.get(block).writes[0].source.dtype)


def intrinsic(name: str) -> int:
    """LLVM's number for one of its intrinsic functions, which calls of it carry."""
    return int(tvm.target.codegen.llvm_lookup_intrinsic_id(name))


def lanes_of(value: Any) -> int:
    """Elements of a vector; 1 of a scalar."""
    return int(tvm.DataType(value.ty.dtype).lanes)


def element_of(value: Any) -> str:
    """The type of a vector's elements; a scalar's own."""
    return str(value.ty.dtype).partition("x")[0]


def is_choice(value: Any) -> bool:
    """Whether this is an if_then_else of TIR."""
    return op_name(value) == "prim.if_then_else"


def variables(expression: Any) -> list[Any]:
    """The variables of an expression of TIR."""
    return list(tirx.analysis.undefined_vars(expression))


def block_name(sch: Any, block: Any) -> str:
    """A block's name; unique within its kernel."""
    return str(sch.get(block).name_hint)


def count_rows_as_one(sch: Any, block: Any) -> None:
    """Count all axes of a block but its last as one, in memory order."""
    loops = sch.get_loops(block)
    if len(loops) == 1:
        sch.add_unit_loop(loops[0])
    else:
        regroup(sch, block, [len(loops) - 1, 1])


def regroup(sch: Any, block: Any, counts: list[int]) -> None:
    """Count so many axes of a block, in order, as one each: [2, 1] makes (a, b, c) into (a * B + b, c)."""
    sizes = [extent(sch, loop) for loop in sch.get_loops(block)]

    def grouped(*index: Any) -> tuple[Any, ...]:
        rest, result = list(zip(index, sizes, strict=True)), []
        for count in counts:
            flat: Any = 0
            for position, size in rest[:count]:
                flat = flat * size + position
            rest = rest[count:]
            result.append(flat)
        return tuple(result)

    if any(count != 1 for count in counts):
        dtype = str(sch.get(sch.get_loops(block)[0]).loop_var.ty.dtype)  # as :func:`narrowed` left it
        sch.transform_block_layout(block, tirx.IndexMap.from_func(grouped, ndim=len(sizes), index_dtype=dtype))


def narrowed(function: Any) -> Any:
    """A kernel whose loops and indices count in 32 bits, as its code will: TVM narrows them later, but loses the hints
    of :func:`~.kernels.loops.partition` then. A kernel with 64-bit data may have to stay as it is."""
    try:
        module = tirx.transform.ForceNarrowIndexToInt32()(tvm.IRModule({"main": function}))
    except Exception:  # InternalError: an index is data of 64 bits
        return function
    return module["main"]


def _round_to_even(call: Any) -> Any:
    """TVM rounds by the mode that the CPU is in, which Arm's conversions to integers cannot be joined with."""
    return tirx.call_llvm_pure_intrin(call.ty.dtype, "llvm.roundeven", call.args[0])


tirx.register_intrin_lowering("tirx.round", target="llvm", f=_round_to_even, level=99)


def connect(host: str, port: int, key: str) -> Any:
    """A session on ``python -m tvm.exec.rpc_server``; its ``cpu()`` is a device."""
    from tvm import rpc

    return rpc.connect(host, port, key)


def on_device(array: np.ndarray[Any, Any], device: Any) -> Any:
    """A copy of an array on a device, of this process or a session's."""
    return tvm.runtime.tensor(array, device)


def same_structure(module: Any) -> int:
    """Equal for two modules whose functions do the same; constants count by content."""
    return int(structural_hash(module, map_free_vars=True))


def parameters_of(graph: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shapes and types of a graph's parameters."""
    return [(shape_of(parameter) or (), dtype_of(parameter)) for parameter in graph.params]


def host_triple() -> str:
    """LLVM's words for the machine that this process runs on: ``x86_64-linux-gnu``."""
    return f"{platform.machine()}-linux-gnu"
