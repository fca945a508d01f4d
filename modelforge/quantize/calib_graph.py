"""Which activations to look at, which of them follow from others, and the model that measures the rest as it runs.

The measuring model reduces every activation where it is made: what leaves it is a few numbers and a small subsample,
so that no activation has to outlive its use. Works on protobufs; runs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, gcd, prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from modelforge.errors import DataError, nearest
from modelforge.graph.shape_values import MOST_ELEMENTS
from modelforge.graph.walk import STANDARD_DOMAINS
from modelforge.quantize.calib_derive import SAME_NUMBERS, Derived, attributes_of, derive_rules

Shape = tuple[int | None, ...]

QUANTIZABLE = frozenset(
    (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Pow"),
        *("Sqrt", "Concat", "Split", "Slice", "Gather", "Pad", "Resize", "Upsample", "Where", "Expand", "Tile"),
        *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"),
        *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Celu"),
        *("Gelu", "Mish", "Softplus", "Erf", "Exp", "Softmax", "LogSoftmax", "Swish", "Reshape", "Transpose"),
        *("Flatten", "Squeeze", "Unsqueeze", "DepthToSpace", "SpaceToDepth", "BatchNormalization"),
        *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"),
    )
)
"""Operators whose inputs or outputs some dialect quantizes."""

_CHANNELS_FIRST = frozenset(
    (
        *("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool"),
        *("BatchNormalization", "InstanceNormalization", "PRelu", "Resize"),
    )
)
_CARRIES_NAN = frozenset(
    (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Sum", "Concat", "GlobalAveragePool"),
        *("ReduceMean", *SAME_NUMBERS),
    )
)
"""One NaN anywhere in the data input is a NaN somewhere in the output (not so in a Relu, a Clip, a Slice)."""


@dataclass(frozen=True)
class Probe:
    """One tensor that the measuring model looks at.

    Attributes:
        step: every so manieth element goes into the subsample; None where the model works it out.
        channel_axis: axis of the largest absolute values; None where not asked.
        sum: whether its sum is taken, to find NaN.
        whole: the subsample is all of it, so that it is handed over as it is and nothing is reduced: this spares small
            tensors, of which there are many, all the added nodes.
        by_sample: the subsample is taken of each row along the first axis on its own: the same elements of a sample,
            however many run together.
    """

    name: str
    step: int | None
    channel_axis: int | None
    sum: bool
    whole: bool
    by_sample: bool = False


@dataclass
class Activations:
    """The float32 activations of a model's own graph (bodies of If and Loop are left alone).

    Attributes:
        wanted: to be in the table, in graph order.
        derived: for some of them, what they follow from.
        measured: those that have to be measured: roots of the derived ones, and the others.
    """

    wanted: list[str]
    derived: dict[str, Derived] = field(default_factory=dict)
    measured: list[str] = field(default_factory=list)


class Shapes:
    """Element types and shapes of a model's tensors as far as they follow from the shapes of its inputs."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._light = _without_weights(model)

    def at(self, inputs: Mapping[str, Sequence[int]]) -> tuple[dict[str, int], dict[str, Shape]]:
        """Types by name and shapes by name, at these input shapes."""
        model = onnx.ModelProto()
        model.CopyFrom(self._light)
        for value in model.graph.input:
            if value.name in inputs:
                kind = value.type.tensor_type.elem_type
                value.CopyFrom(helper.make_tensor_value_info(value.name, kind, inputs[value.name]))
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        types, shapes = {}, {}
        for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
            tensor = value.type.tensor_type
            types[value.name] = tensor.elem_type
            if tensor.HasField("shape"):
                shapes[value.name] = tuple(
                    size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim
                )
        return types, shapes


def find_activations(
    model: onnx.ModelProto,
    types: Mapping[str, int],
    shapes: Mapping[str, Shape],
    tensors: Collection[str] | None,
    channels: Collection[str],
    where: str,
) -> Activations:
    """What to look at.

    Raises:
        DataError: a name in ``tensors`` or ``channels`` that is no float32 activation.
    """
    graph = model.graph
    constants = {tensor.name for tensor in graph.initializer}
    floats: dict[str, None] = {}
    quantizable: set[str] = set()
    for value in graph.input:
        if types.get(value.name) == TensorProto.FLOAT and value.name not in constants:
            floats[value.name] = None
            quantizable.add(value.name)
    varying = {value.name for value in graph.input if value.name not in constants}
    for node in graph.node:
        # A node without inputs may be random or a constant; either is nothing to quantize. A body may read anything.
        if varying.intersection(node.input) or any(attribute.HasField("g") for attribute in node.attribute):
            varying.update(node.output)
        names = [name for name in node.output if name in varying and types.get(name) == TensorProto.FLOAT]
        floats.update(dict.fromkeys(names))
        if node.op_type in QUANTIZABLE:
            quantizable.update((*node.input, *node.output))
    for name in (*(tensors or ()), *channels):
        if name not in floats:
            raise DataError(
                f'"{name}" is no float32 activation of the model; {nearest(name, floats)[:400]}',
                where=where,
                fix="name outputs of nodes or graph inputs of the prepared model",
            )
    chosen = quantizable if tensors is None else {*tensors}
    found = Activations([name for name in floats if name in chosen or name in channels])
    allowed = {name for name in floats if name not in channels and name in shapes}
    rules = derive_rules(model, list(floats), allowed)
    found.derived = {name: rules[name] for name in found.wanted if name in rules}
    roots = {rule.source for rule in found.derived.values()}
    found.measured = [name for name in floats if name in roots or (name in found.wanted and name not in rules)]
    return found


def choose_step(shape: Shape | None, elements: int) -> int | None:
    """A stride that leaves about ``elements`` of them and meets all rows, columns and channels; None if unknown."""
    if shape is None or any(size is None for size in shape):
        return None
    sizes = [size or 1 for size in shape]
    step = ceil(prod(sizes) / elements)
    while step > 1 and any(gcd(step, size) > 1 for size in sizes):
        step += 1
    return step


def channel_axis(model: onnx.ModelProto, name: str, rank: int) -> int:
    """1 beside operators that keep their channels there, else the last axis."""
    for node in model.graph.node:
        if node.op_type in _CHANNELS_FIRST and (name in node.input or name in node.output) and rank > 1:
            return 1
    return max(rank - 1, 0)


def tensors_to_sum(model: onnx.ModelProto, reduced: Collection[str]) -> set[str]:
    """Of which reduced tensors a sum must be taken so that no NaN in any of them goes unseen.

    A sum is NaN if an element is; minimum and maximum in ONNX Runtime skip NaN. Where every NaN of a tensor reaches
    another one that is looked at, its own sum is spared.
    """
    looked_at = set(reduced)
    seen: set[str] = set(looked_at)
    carried: set[str] = set()
    for node in reversed(model.graph.node):
        if carries_nan(node) and any(name in seen or name in carried for name in node.output):
            carried.update(node.input)
    return looked_at - carried


def carries_nan(node: onnx.NodeProto) -> bool:
    """Whether a NaN in an input is certain to be one in the first output."""
    if node.op_type not in _CARRIES_NAN or node.domain not in STANDARD_DOMAINS:
        return False
    if node.op_type not in ("Conv", "ConvTranspose"):
        return True
    attributes = attributes_of(node)
    kernel, strides = attributes.get("kernel_shape"), attributes.get("strides")
    # A stride longer than the kernel jumps over elements.
    reaches = not strides or (kernel and all(size >= step for size, step in zip(kernel, strides, strict=True)))
    return bool(reaches) and all(size == 1 for size in attributes.get("dilations", ()))


def instrument(model: onnx.ModelProto, probes: Sequence[Probe], *, careful: bool) -> list[str]:
    """Make ``model`` measure; its own outputs go. Returns its new outputs.

    ``stats`` float32: minima and maxima, each ``[reduced probes]``, and the sums that are taken; ``counts`` int64
    ``[4 * reduced probes]``: elements and ranks (0 where the step was known beforehand), NaN, infinite ones; then each
    probe's subsample; then minimum and maximum by channel of each probe that has an axis. Only with ``careful``,
    minimum and maximum are of the finite elements, NaN and infinite ones are counted, and sums are not taken: this
    costs several times as much.
    """
    writer = _Writer(model, careful)
    for place, probe in enumerate(probes):
        writer.add(place, probe)
    return writer.finish()


class _Writer:
    def __init__(self, model: onnx.ModelProto, careful: bool) -> None:
        self._graph = model.graph
        self._careful = careful
        self._opset = next(item.version for item in model.opset_import if item.domain in STANDARD_DOMAINS)
        taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
        self._prefix = next(p for p in ("calibration/", "calibration//") if not any(t.startswith(p) for t in taken))
        self._nodes: dict[str, list[onnx.NodeProto]] = {}
        self._current: list[onnx.NodeProto] = []
        self._rows: dict[str, list[str]] = {key: [] for key in ("low", "high", "sum", "size", "rank", "nan", "inf")}
        self._samples: list[str] = []
        self._channels: list[str] = []
        self._constants: dict[str, str] = {}

    def add(self, place: int, probe: Probe) -> None:
        if probe.whole:
            self._samples.append(probe.name)
            return
        self._current = self._nodes.setdefault(probe.name, [])
        x, end = probe.name, f"/{place}"
        flat = self._node("Reshape", [x, self._ints(-1)], f"flat{end}")
        low = high = flat
        if self._careful:
            low, high = self._finite(flat, end)
            channels = (low, high)
        self._rows["low"].append(self._node("ReduceMin", [low], f"low{end}", keepdims=1))
        self._rows["high"].append(self._node("ReduceMax", [high], f"high{end}", keepdims=1))
        summed = probe.sum and not self._careful
        if summed:
            self._rows["sum"].append(self._node("ReduceSum", [flat], f"sum{end}", keepdims=1))
        step = self._step(flat, probe, end)
        if step is None:
            self._samples.append(flat)
        else:
            rows = self._node("Reshape", [x, self._ints(0, -1)], f"rows{end}") if probe.by_sample else flat
            axis, ends = self._ints(int(probe.by_sample)), self._ints(np.iinfo(np.int64).max)
            self._samples.append(self._node("Slice", [rows, self._ints(0), ends, axis, step], f"sample{end}"))
        if probe.channel_axis is not None:
            shaped = (x, x)
            if self._careful:
                shape = self._node("Shape", [x], f"shape{end}")
                shaped = tuple(  # type: ignore[assignment]  # mypy takes it for any length
                    self._node("Reshape", [part, shape], f"shaped{end}/{side}") for side, part in enumerate(channels)
                )
            self._by_channel(shaped, probe, end)

    def finish(self) -> list[str]:
        graph = self._graph
        nodes = list(graph.node)
        del graph.node[:], graph.output[:]
        # Each probe stands right behind what makes its tensor: run in this order, the tensor can be freed after it.
        for value in graph.input:
            graph.node.extend(self._nodes.get(value.name, ()))
        for node in nodes:
            graph.node.append(node)
            for name in node.output:
                graph.node.extend(self._nodes.get(name, ()))
        self._current = []
        rows = self._rows
        if not rows["low"]:  # every probe is whole
            rows["low"].append(self._constant("none", np.zeros(0, np.float32)))
            rows["size"].append(self._constant("none-counted", np.zeros(0, np.int64)))
        stats = self._node("Concat", rows["low"] + rows["high"] + rows["sum"], "stats", axis=0)
        counts = self._node("Concat", rows["size"] + rows["rank"] + rows["nan"] + rows["inf"], "counts", axis=0)
        graph.node.extend(self._current)
        outputs = [(stats, TensorProto.FLOAT), (counts, TensorProto.INT64)]
        outputs += [(name, TensorProto.FLOAT) for name in (*self._samples, *self._channels)]
        graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in outputs)
        return [name for name, _ in outputs]

    def _finite(self, flat: str, end: str) -> tuple[str, str]:
        """The tensor with what is not finite replaced by what a minimum, and a maximum, passes over."""
        nan = self._node("IsNaN", [flat], f"isnan{end}")
        infinite = self._node("IsInf", [flat], f"isinf{end}")
        for key, found in (("nan", nan), ("inf", infinite)):
            number = self._node("Cast", [found], f"{key}-numbers{end}", to=TensorProto.INT64)
            self._rows[key].append(self._node("ReduceSum", [number], f"{key}{end}", keepdims=1))
        odd = self._node("Or", [nan, infinite], f"odd{end}")
        largest = np.finfo(np.float32).max
        ends = (self._constant("largest", np.array([largest])), self._constant("smallest", np.array([-largest])))
        low, high = (self._node("Where", [odd, part, flat], f"finite{end}/{side}") for side, part in enumerate(ends))
        return low, high

    def _step(self, flat: str, probe: Probe, end: str) -> str | None:
        """The name of the step, None where the whole tensor is the sample; fills in the counts."""
        nothing = self._ints(0)
        if not self._careful:
            self._rows["nan"].append(nothing)
            self._rows["inf"].append(nothing)
        if probe.step is not None:
            self._rows["size"].append(nothing)
            self._rows["rank"].append(nothing)
            return None if probe.step == 1 else self._ints(probe.step)
        size = self._node("Shape", [flat], f"size{end}")
        self._rows["size"].append(size)
        shape = self._node("Shape", [probe.name], f"dimensions{end}")
        self._rows["rank"].append(self._node("Shape", [shape], f"rank{end}"))
        # Odd, so that it shares no factor with sizes that are powers of two.
        half = self._node("Div", [size, self._ints(2 * UNKNOWN_SIZE_ELEMENTS)], f"half{end}")
        even = self._node("Mul", [half, self._ints(2)], f"even{end}")
        return self._node("Add", [even, self._ints(1)], f"step{end}")

    def _by_channel(self, sides: Sequence[str], probe: Probe, end: str) -> None:
        for op, x in zip(("ReduceMin", "ReduceMax"), sides, strict=True):
            # To [before, channels, after], whatever the rank.
            before = self._node("Flatten", [x], f"{op}-before{end}", axis=probe.channel_axis)
            shape = self._node("Shape", [x], f"{op}-shape{end}")
            channels = self._node("Gather", [shape, self._ints(probe.channel_axis or 0)], f"{op}-channels{end}")
            target = self._node("Concat", [self._ints(0), channels, self._ints(-1)], f"{op}-target{end}", axis=0)
            rows = self._node("Reshape", [before, target], f"{op}-rows{end}")
            self._channels.append(self._reduce(op, rows, (0, 2), f"{op}-channel{end}"))

    def _reduce(self, op: str, x: str, axes: tuple[int, ...], name: str) -> str:
        if self._opset >= 18:
            return self._node(op, [x, self._ints(*axes)], name, keepdims=0)
        return self._node(op, [x], name, keepdims=0, axes=list(axes))

    def _node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        output = f"{self._prefix}{name}"
        self._current.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def _ints(self, *values: int) -> str:
        return self._constant("_".join(map(str, values)), np.array(values, np.int64))

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants[name] = f"{self._prefix}constant/{name}"
            if value.dtype == np.float64:
                value = value.astype(np.float32)
            self._graph.initializer.append(numpy_helper.from_array(value, self._constants[name]))
        return self._constants[name]


UNKNOWN_SIZE_ELEMENTS = 1024
"""About how many elements are sampled of a tensor whose size only the run shows."""


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for shape inference: large weights have a shape and no data, and no shape is claimed beforehand."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    for value in model.graph.output:
        kind = value.type.tensor_type.elem_type
        light.graph.output.append(helper.make_tensor_value_info(value.name, kind, None))
    light.graph.initializer.extend(_light_tensors(model))
    return light


def _light_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= MOST_ELEMENTS and tensor.data_location != TensorProto.EXTERNAL:
            yield tensor
        else:
            yield TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
