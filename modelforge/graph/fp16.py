"""Write a model in FP16: every node that can, in bodies too; inputs and outputs keep their type.

A weight that FP16 cannot hold keeps its node in FP32 and is reported, never clamped. How much accuracy this costs is
for the gate to say.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
from onnx_ir.passes import common
from onnx_ir.traversal import RecursiveGraphIterator

from modelforge.errors import BuildError
from modelforge.graph.compare import open_session
from modelforge.graph.fp16_rules import CARRIERS, FLOAT, HALF, Plan, is_float, plan_node, unfit, unfit_array
from modelforge.graph.load import load, save
from modelforge.graph.passes import InferShapes, LiftConstants, RemoveDeadNodes, UniqueNames, run_passes

KeepFp32 = Callable[[onnx_ir.Node], bool] | Collection[str]
"""Which nodes stay in FP32: their names, or a function that says so."""


@dataclass(frozen=True)
class Fp16Report:
    """What conversion did; JSON-able by ``dataclasses.asdict``.

    Attributes:
        converted: number of nodes that compute in FP16.
        kept: why a node stays in FP32, by its name; nodes without any floating point value are not listed.
        casts: number of Cast nodes that were added.
    """

    converted: int
    kept: Mapping[str, str]
    casts: int


def convert_fp16(model: Path, folder: Path, *, keep_fp32: KeepFp32 = ()) -> Fp16Report:
    """Write ``folder/model.onnx``: ``model`` with FP16 weights and arithmetic between inputs and outputs as they were.

    Fold BatchNormalization first (:func:`modelforge.graph.prepare.prepare` does): statistics often exceed FP16.

    Args:
        keep_fp32: nodes to leave in FP32, beside those that have to stay. A kept If, Loop or Scan keeps its bodies.

    Raises:
        ModelError: not a model.
        BuildError: the result is refused by onnx.checker or does not load in ONNX Runtime.
    """
    model, folder = Path(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    graph = load(model)
    if graph.functions:
        common.InlinePass()(graph)
    run_passes(graph, [LiftConstants(), UniqueNames(), InferShapes()], str(model))
    halved = halve(graph, keep_fp32)
    run_passes(graph, [RemoveDeadNodes()], str(model))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fp16-") as temporary:
        files = save(graph, Path(temporary))
        _check(files[0], model)
        for file in reversed(files):  # the model last: it is what says that its data is complete
            shutil.move(file, folder / file.name)
    return halved.report


@dataclass(frozen=True)
class Halved:
    """A conversion in memory: what it did, and the names of the nodes that compute in FP16, in graph order."""

    report: Fp16Report
    nodes: tuple[str, ...]


def halve(graph: onnx_ir.Model, keep_fp32: KeepFp32 = ()) -> Halved:
    """Convert in place as :func:`convert_fp16` does, with nothing checked. Constants must be initializers, node names
    unique and types inferred; what nothing reads any more is left in the graph."""
    wanted = keep_fp32 if callable(keep_fp32) else lambda node: node.name in keep_fp32
    conversion = _Conversion(graph, _plan(graph, wanted))
    conversion.convert(graph.graph)
    plans = conversion.plans
    computing = tuple(str(node.name) for node, plan in plans.items() if plan.half and node.op_type not in CARRIERS)
    report = Fp16Report(
        converted=len(computing),
        kept={str(node.name): plan.reason for node, plan in plans.items() if not plan.half and plan.reason},
        casts=conversion.casts,
    )
    return Halved(report, computing)


def _plan(model: onnx_ir.Model, wanted: Callable[[onnx_ir.Node], bool]) -> dict[onnx_ir.Node, Plan]:
    """What becomes of each node, in graph order."""
    opset = model.opset_imports.get("", 1)
    from_shapes = _shape_arithmetic(model)
    plans: dict[onnx_ir.Node, Plan] = {}
    carriers: dict[object, onnx_ir.Node] = {}
    for node in RecursiveGraphIterator(model.graph):
        plan = plan_node(node, opset)
        reason = ""
        carriers.update(dict.fromkeys(_bodies(node), node))
        carrier = carriers.get(node.graph)
        if wanted(node):
            reason = "asked for"
        elif carrier is not None and not plans[carrier].half and plans[carrier].reason:
            reason = f"inside {carrier.name}, which is kept"
        elif plan.half and node in from_shapes and node.op_type not in ("Shape", "Size"):
            reason = "arithmetic on shapes; FP16 has no integers above 2048"
        elif plan.half:
            reason = _unfit_input(node, plan)
        has_float = plan.half or bool(plan.reason)
        plans[node] = Plan(False, reason) if reason and (has_float or node.op_type in CARRIERS) else plan
    return plans


def _unfit_input(node: onnx_ir.Node, plan: Plan) -> str:
    """Why a constant of the node keeps it in FP32."""
    for place in sorted(plan.half_inputs):
        value = node.inputs[place]
        if value is not None and value.is_initializer() and not value.is_graph_input() and (reason := unfit(value)):
            return f"{value.name}: {reason}"
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        return unfit_array(node.attributes["value"].as_tensor().numpy())
    return ""


def _shape_arithmetic(model: onnx_ir.Model) -> set[onnx_ir.Node]:
    """Nodes that depend on the shapes of tensors and on constants, but on no tensor's numbers."""
    derived: set[onnx_ir.Value] = set()
    found: set[onnx_ir.Node] = set()
    for node in RecursiveGraphIterator(model.graph):
        inputs = [value for value in node.inputs if value is not None]
        constant = all(value in derived or (value.is_initializer() and not value.is_graph_input()) for value in inputs)
        if node.op_type in ("Shape", "Size") or (
            constant and any(value in derived for value in inputs) and node.op_type not in CARRIERS
        ):
            derived.update(node.outputs)
            found.add(node)
    return found


@dataclass
class _Conversion:
    """The state of one conversion: which cast or FP16 copy already stands for a value."""

    model: onnx_ir.Model
    plans: dict[onnx_ir.Node, Plan]
    casts: int = 0
    copies: dict[tuple[onnx_ir.Value, onnx_ir.DataType], onnx_ir.Value] = field(default_factory=dict)

    def convert(self, graph: onnx_ir.Graph) -> None:
        """Convert a graph in its own order: when a node is met, its inputs have their final type."""
        for node in list(graph):
            plan = self.plans[node]
            for place, value in enumerate(node.inputs):
                if value is not None and self._was_float(value):
                    self._feed(node, place, value, HALF if place in plan.half_inputs else FLOAT)
            if plan.half:
                _retype_attributes(node, plan)
                for place in plan.half_outputs:
                    self._set_half(node.outputs[place])
            for body in _bodies(node):
                self._convert_body(body, plan)
        if graph is self.model.graph:
            self._restore_outputs(graph)

    def _was_float(self, value: onnx_ir.Value) -> bool:
        """FP32 in the original: what was FP16 there already is none of our business."""
        return is_float(value) or value in self._halved

    def __post_init__(self) -> None:
        self._halved: set[onnx_ir.Value] = set()

    def _set_half(self, value: onnx_ir.Value) -> None:
        value.dtype = HALF
        self._halved.add(value)

    def _feed(self, node: onnx_ir.Node, place: int, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> None:
        if value.dtype != dtype:
            node.replace_input_with(place, self._as(value, dtype))

    def _as(self, value: onnx_ir.Value, dtype: onnx_ir.DataType) -> onnx_ir.Value:
        """The value in another type: one cast, or one copy of a weight, for all who want it."""
        key = (value, dtype)
        if key not in self.copies:
            if value.is_initializer() and not value.is_graph_input():
                self.copies[key] = _half_initializer(value)
            else:
                cast = self._cast(value, dtype, f"{value.name}/{dtype.name.lower()}")
                producer = value.producer()
                if producer is not None:
                    graph = producer.graph
                    assert graph is not None
                    graph.insert_after(producer, cast)
                else:
                    graph = value.graph
                    assert graph is not None
                    _prepend(graph, cast)
                self.copies[key] = cast.outputs[0]
        return self.copies[key]

    def _cast(self, value: onnx_ir.Value, dtype: onnx_ir.DataType, name: str) -> onnx_ir.Node:
        self.casts += 1
        cast = onnx_ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
        output = cast.outputs[0]
        output.name, output.dtype, output.shape = name, dtype, value.shape
        return cast

    def _convert_body(self, body: onnx_ir.Graph, plan: Plan) -> None:
        """A body's inputs and outputs take the type that its carrier's have."""
        floats = [is_float(value) for value in body.outputs]
        if plan.half:
            for value in body.inputs:
                if is_float(value):
                    self._set_half(value)
        self.convert(body)
        for place, value in enumerate(list(body.outputs)):
            dtype = HALF if plan.half else FLOAT
            if floats[place] and value.dtype != dtype:
                # Its own cast: a body's output needs a producer in the body, and the cached one may stand outside.
                cast = self._cast(value, dtype, f"{value.name}/{body.name}_output_{place}")
                body.append(cast)
                body.outputs[place] = cast.outputs[0]

    def _restore_outputs(self, graph: onnx_ir.Graph) -> None:
        """Give each output of the model its type and its name back."""
        for place, value in enumerate(list(graph.outputs)):
            if value in self._halved:
                name, shape = str(value.name), value.shape
                value.name = f"{name}/float16"
                cast = self._cast(value, FLOAT, name)
                cast.outputs[0].shape = shape
                graph.append(cast)
                graph.outputs[place] = cast.outputs[0]


def _half_initializer(value: onnx_ir.Value) -> onnx_ir.Value:
    tensor, graph = value.const_value, value.graph
    assert tensor is not None
    assert isinstance(graph, onnx_ir.Graph)
    name = f"{value.name}/float16"
    array = tensor.numpy()
    half = onnx_ir.tensor(array.astype(np.float16), name=name)
    copy = onnx_ir.val(name, dtype=HALF, shape=array.shape, const_value=half)
    graph.register_initializer(copy)
    return copy


def _retype_attributes(node: onnx_ir.Node, plan: Plan) -> None:
    """Where the output's type is an attribute, write FP16 there."""
    if 0 not in plan.half_outputs:
        return
    if node.op_type == "Cast":
        node.attributes["to"] = onnx_ir.AttrInt64("to", int(HALF))
    if node.op_type == "ConstantOfShape":
        fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
        node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor(fill.astype(np.float16)))


def _bodies(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    bodies: list[onnx_ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == onnx_ir.AttributeType.GRAPH:
            bodies.append(attribute.as_graph())
        elif attribute.type == onnx_ir.AttributeType.GRAPHS:
            bodies.extend(attribute.as_graphs())
    return bodies


def _prepend(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    if len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def _check(model: Path, source: Path) -> None:
    """What a compiler would refuse must not get out: the checker's full check, and a load in ONNX Runtime."""
    try:
        # Where the source itself does not pass the full check (a fault of an operator's definition), nor need this.
        onnx.checker.check_model(str(model), full_check=_passes_full_check(source))
        open_session(model, optimize=False)
    except Exception as error:  # onnx and ONNX Runtime raise classes of their C++ modules that share no base
        raise BuildError(
            f"the model converted to FP16 is not valid: {' '.join(str(error).split())[:400]}",
            where=str(source),
            fix="leave fp16 out of the ladder for this model, and report it",
        ) from None


def _passes_full_check(model: Path) -> bool:
    try:
        onnx.checker.check_model(str(model), full_check=True)
    except Exception:  # onnx raises ValidationError, InferenceError or others of its C++ module
        return False
    return True
