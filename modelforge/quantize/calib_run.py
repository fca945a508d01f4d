"""One model in calibration: the session that measures, and what it has found so far.

Knows no files of samples: :mod:`modelforge.quantize.calibrate` feeds it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from modelforge.errors import BuildError, DataError, ModelError
from modelforge.graph.load import parse
from modelforge.graph.shape_values import MOST_ELEMENTS
from modelforge.graph.walk import STANDARD_DOMAINS
from modelforge.quantize.calib_derive import Derived, Floats
from modelforge.quantize.calib_graph import (
    Activations,
    Probe,
    Shape,
    Shapes,
    channel_axis,
    choose_step,
    find_activations,
    instrument,
    tensors_to_sum,
)
from modelforge.quantize.ranges import Histogram, TensorRange

Array = NDArray[Any]
Feeds = Mapping[str, Array]

LOWEST_OPSET = 11
"""The first in which all operators of the measuring model have the form that it uses."""
SAMPLED_SHARE = 1 / 64
"""Of all elements, about how many go into histograms."""
SAMPLED_AT_LEAST, SAMPLED_AT_MOST = 256, 4096
"""Bounds of that number for each tensor and sample."""
BUFFER_BYTES = 4 << 20
"""Subsamples kept before they are counted into bins: many at a time cost less."""
FILE_ABOVE = 16 << 20
"""Bytes above which a model goes to ONNX Runtime by a file: in memory there would be two copies of its weights."""
TAME = 1e30
"""Beyond it arithmetic on extremes may overflow."""


@dataclass
class _Seen:
    """What is known so far of one tensor. ``minimum`` above ``maximum``: nothing finite yet."""

    count: int = 0
    minimum: float = np.inf
    maximum: float = -np.inf
    zeros: int = 0
    nans: int = 0
    infs: int = 0
    bins: Histogram | None = None
    absmax: Floats | None = None

    def add(self, minimum: float, maximum: float, values: Floats) -> None:
        """Finite ``values`` out of ``[minimum, maximum]``."""
        if minimum > maximum:
            return
        # Adding zero makes -0.0 of 0.0: both are met, and a table must not depend on which came first.
        low, high = min(self.minimum, minimum) + 0.0, max(self.maximum, maximum) + 0.0
        if self.bins is None or (low, high) != (self.minimum, self.maximum):
            grid = Histogram.spanning(low, high)
            if self.bins is None or (grid.low, grid.high) != (self.bins.low, self.bins.high):
                self.bins = grid if self.bins is None else self.bins.rebinned(grid)
        self.minimum, self.maximum = low, high
        self.bins = self.bins.plus(values)
        self.zeros += int(values.size - np.count_nonzero(values))

    def add_all(self, values: Floats) -> None:
        """Every element there is, finite or not."""
        self.count += values.size
        low, high = (float(values.min()), float(values.max())) if values.size else (np.inf, -np.inf)
        if not np.isfinite([low, high]).all():  # NumPy's minimum is NaN where an element is
            nans = int(np.isnan(values).sum())
            self.nans += nans
            finite = values[np.isfinite(values)]
            self.infs += values.size - finite.size - nans
            values = finite
            low, high = (float(values.min()), float(values.max())) if values.size else (np.inf, -np.inf)
        self.add(low, high, values)


class Calibration:
    """One model being calibrated; the session is made when the first sample shows the shapes."""

    def __init__(self, model: Path, tensors: Collection[str] | None, channels: Collection[str], threads: int) -> None:
        self._model, self._tensors, self._channels, self._threads = model, tensors, channels, threads
        proto = self._parse()
        self.inputs = _inputs(proto)
        self._shapes = Shapes(proto)
        self._session: Any = None
        self._careful = False
        self._known = True
        self._activations: Activations | None = None
        self._probes: list[Probe] = []
        self._sizes: dict[tuple[Any, ...], NDArray[np.int64]] = {}
        self._ranks: dict[str, int] = {}
        self._seen: dict[str, _Seen] = {}
        self._pending: list[tuple[Floats, list[Floats]]] = []
        self._pending_bytes = 0
        self._counts = np.zeros(0, np.int64)
        self._attended: list[tuple[int, Probe]] = []
        self._reduced = 0

    def add(self, feeds: Feeds, number: int, index: int) -> None:
        """Run ``number`` samples; ``index`` is the first one's, for messages."""
        if self._session is None:
            self._open(feeds, number)
        sizes = self._sizes_at(feeds)
        if sizes is None and self._known:
            self._flush()
            self._known = False
            self._open(feeds, number)
        stats, counts, *arrays = self._run(feeds, index)
        if not self._careful and not (np.abs(stats) < TAME).all():
            # Rare: something is not finite, or almost. From here on every tensor is measured, such elements counted.
            self._flush()
            self._measure_all()
            self._open(feeds, number)
            sizes = self._sizes_at(feeds)
            stats, counts, *arrays = self._run(feeds, index)
        self._collect(stats[: 2 * self._reduced].reshape(2, -1), counts.reshape(4, -1), sizes, arrays)
        if self._pending_bytes > BUFFER_BYTES:
            self._flush()

    def elements(self, feeds: Feeds) -> int:
        """Elements of all measured tensors, those of unknown size not counted."""
        types, shapes = self._shapes.at({name: array.shape for name, array in feeds.items()})
        found = find_activations(self._parse(), types, shapes, self._tensors, self._channels, str(self._model))
        return sum(_size(shapes.get(name)) or 0 for name in found.measured)

    def ranges(self) -> dict[str, TensorRange]:
        """The result, in order of name."""
        self._flush()
        return {name: self._range(name) for name in sorted(self._found.wanted)}

    def _range(self, name: str) -> TensorRange:
        seen = self._seen[name]
        rule = self._found.derived.get(name)
        if rule is not None and rule.function is None:
            seen = self._seen[rule.source]  # the same numbers in another shape
        finite = seen.bins is not None
        axis = next((probe.channel_axis for probe in self._probes if probe.name == name), None)
        return TensorRange(
            name=name,
            shape_rank=self._ranks[name],
            count=seen.count,
            minimum=float(seen.minimum) if finite else 0.0,
            maximum=float(seen.maximum) if finite else 0.0,
            zeros=seen.zeros,
            nans=seen.nans,
            infs=seen.infs,
            bins=seen.bins or Histogram.spanning(0.0, 0.0),
            channel_absmax=seen.absmax,
            channel_axis=axis,
        )

    def _parse(self) -> onnx.ModelProto:
        proto = parse(self._model)
        opset = max((item.version for item in proto.opset_import if item.domain in STANDARD_DOMAINS), default=0)
        if opset < LOWEST_OPSET:
            raise ModelError(
                f"opset {opset} is older than {LOWEST_OPSET}, which calibration needs",
                where=str(self._model),
                fix="prepare the model first, or export it with a newer opset",
            )
        for tensor in proto.graph.initializer:
            # Shapes and the like: ONNX Runtime looks into them before it looks beside the model.
            if tensor.data_location == onnx.TensorProto.EXTERNAL and prod(tensor.dims) <= MOST_ELEMENTS:
                onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self._model.parent))
                tensor.data_location = onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        return proto

    def _open(self, feeds: Feeds, number: int) -> None:
        """Make the session that measures, for samples like these."""
        self._session = None  # two at once would take twice the memory
        proto = self._parse()
        types, shapes = self._shapes.at({name: array.shape for name, array in feeds.items()})
        where = str(self._model)
        if self._activations is None:
            self._activations = find_activations(proto, types, shapes, self._tensors, self._channels, where)
        found = self._activations
        self._ranks.update({name: len(shape) for name, shape in shapes.items()})
        sizes = {name: _size(shapes.get(name)) for name in found.measured}
        total = sum(size or 0 for size in sizes.values()) / number
        share = total * SAMPLED_SHARE / max(1, len(found.measured))
        elements = round(min(max(share, SAMPLED_AT_LEAST), SAMPLED_AT_MOST))
        inputs = {*self.inputs}
        rows = self._shapes_of_one(feeds, shapes, number) if self._known else {}
        steps: dict[str, int | None] = dict.fromkeys(found.measured)
        if self._known:
            joint = {name: choose_step(shapes.get(name), elements * number) for name in found.measured}
            steps = joint | {name: choose_step(rows[name], elements) for name in found.measured if name in rows}
        whole = {name for name, step in steps.items() if step == 1 and name not in inputs} - {*self._channels}
        summed = tensors_to_sum(proto, [name for name in found.measured if name not in whole])
        self._probes = [
            Probe(
                name=name,
                step=steps[name],
                channel_axis=self._axis(proto, name, shapes) if name in self._channels else None,
                sum=name in summed,
                whole=name in whole,
                by_sample=name in rows,
            )
            for name in found.measured
        ]
        self._reduced = len(self._probes) - len(whole)
        self._sizes.clear()
        self._counts = np.zeros(self._reduced, np.int64)
        self._attended = [
            (place, probe)
            for place, probe in enumerate(probe for probe in self._probes if not probe.whole)
            if self._careful or probe.step is None or probe.channel_axis is not None
        ]
        for name in {*found.measured, *found.wanted}:
            self._seen.setdefault(name, _Seen())
        self._outputs = instrument(proto, self._probes, careful=self._careful)
        source = [proto]
        del proto
        self._session = _session(source, self._model, self._threads)

    def _shapes_of_one(self, feeds: Feeds, shapes: Mapping[str, Shape], number: int) -> dict[str, Shape]:
        """Of the tensors whose first axis is the samples that run together: their shapes for one sample alone."""
        if number == 1:
            return {}
        _, single = self._shapes.at({name: (1, *array.shape[1:]) for name, array in feeds.items()})
        return {name: one for name, one in single.items() if one[:1] == (1,) and shapes.get(name) == (number, *one[1:])}

    def _measure_all(self) -> None:
        """Go on carefully, with nothing derived."""
        self._careful = True
        before = self._found
        for name, rule in before.derived.items():
            if rule.function is None:
                self._seen[name] = replace(self._seen[rule.source])
        self._activations = Activations(before.wanted, {}, list(before.wanted))

    @property
    def _found(self) -> Activations:
        assert self._activations is not None
        return self._activations

    def _axis(self, proto: onnx.ModelProto, name: str, shapes: Mapping[str, Any]) -> int | None:
        """Where a tensor's channels lie; None where its rank is not known: it is measured as a whole then."""
        return channel_axis(proto, name, len(shapes[name])) if name in shapes else None

    def _sizes_at(self, feeds: Feeds) -> NDArray[np.int64] | None:
        """Elements of each probe at these input shapes (0 where the run tells); None where that is not known."""
        key = tuple((name, array.shape) for name, array in feeds.items())
        if key not in self._sizes:
            _, shapes = self._shapes.at({name: array.shape for name, array in feeds.items()})
            sizes = [
                0 if probe.step is None else _size(shapes.get(probe.name)) for probe in self._probes if not probe.whole
            ]
            if None in sizes:
                return None
            self._sizes[key] = np.array(sizes, np.int64)
        return self._sizes[key]

    def _run(self, feeds: Feeds, index: int) -> list[Array]:
        try:
            outputs: list[Array] = self._session.run(self._outputs, dict(feeds))
        except Exception as error:  # its exceptions share no base class but this one
            text = " ".join(str(error).split())
            if "INVALID_ARGUMENT" in text:
                raise DataError(
                    f"the model does not take this sample: {text[:300]}",
                    where=f"sample {index}",
                    fix="give arrays of the type and shape that the model's inputs have",
                ) from error
            raise BuildError(f"ONNX Runtime failed in calibration: {text[:300]}", where=f"sample {index}") from error
        return outputs

    def _collect(self, stats: Array, counts: Array, sizes: Array | None, arrays: Sequence[Array]) -> None:
        counted, ranks, nans, infs = counts
        counted = counted if sizes is None else counted + sizes
        # What each run costs in Python counts for small models: what can wait until the flush waits.
        self._pending.append((stats, list(arrays[: len(self._probes)])))
        self._pending_bytes += sum(values.nbytes for values in arrays)
        self._counts += counted
        by_channel = iter(arrays[len(self._probes) :])
        for place, probe in self._attended:
            seen = self._seen[probe.name]
            seen.nans += int(nans[place])
            seen.infs += int(infs[place])
            if probe.step is None:
                self._ranks[probe.name] = int(ranks[place])
            if probe.channel_axis is not None:
                seen.absmax = _absmax(next(by_channel), next(by_channel), seen.absmax, probe.name)

    def _flush(self) -> None:
        """Count what is pending into bins, of the measured tensors and of those that follow from them."""
        if not self._pending:
            return
        followers: dict[str, list[tuple[str, Derived]]] = {}
        for name, rule in self._found.derived.items():
            followers.setdefault(rule.source, []).append((name, rule))
        reduced = iter(self._extremes())
        for place, probe in enumerate(self._probes):
            values = np.concatenate([arrays[place].reshape(-1) for _, arrays in self._pending])
            ends = None
            if not probe.whole:
                low, high, count = next(reduced)
                ends = np.array([low, high], np.float32)
                values = values[np.isfinite(values)] if self._careful else values
                self._seen[probe.name].count += count
                self._seen[probe.name].add(low, high, values)
            else:
                self._seen[probe.name].add_all(values)
            for follower, rule in followers.get(probe.name, ()):
                if rule.function is None:
                    continue
                followed = self._seen[follower]
                if ends is None:
                    followed.add_all(rule.function(values))
                else:
                    low, high = sorted(rule.function(ends).tolist())
                    followed.add(low, high, rule.function(values))
                    followed.count = self._seen[probe.name].count
        self._pending, self._pending_bytes, self._counts = [], 0, np.zeros(self._reduced, np.int64)

    def _extremes(self) -> list[tuple[float, float, int]]:
        """Minimum, maximum and number of elements that are pending, of each reduced probe."""
        low = np.min([stats[0] for stats, _ in self._pending], axis=0)
        high = np.max([stats[1] for stats, _ in self._pending], axis=0)
        return list(zip(low.tolist(), high.tolist(), self._counts.tolist(), strict=True))


def _absmax(low: Floats, high: Floats, before: Floats | None, name: str) -> Floats:
    # Where a channel has nothing finite, low is above high.
    found = np.where(low > high, np.float32(0), np.maximum(np.abs(low), np.abs(high))).astype(np.float32)
    if before is None:
        return found
    if before.shape != found.shape:
        raise DataError(f'"{name}" has {len(found)} channels in one sample and {len(before)} in another')
    return np.maximum(before, found)


def _size(shape: Sequence[int | None] | None) -> int | None:
    if shape is None or any(size is None for size in shape):
        return None
    return prod(size or 0 for size in shape)


def _inputs(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: tuple(
            size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else (size.dim_param or "?")
            for size in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
        if value.name not in constants
    }


def _session(source: list[onnx.ModelProto], model: Path, threads: int) -> Any:
    """Load the one model in ``source``, which is taken out: it must be gone when ONNX Runtime makes its own copy."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    # Keeps to the order of the nodes: a tensor is reduced right where it was made, in cache, and freed. The default
    # order puts all reductions last, when every tensor is still alive.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    try:
        return _load(source, options)
    except Exception as error:  # its exceptions share no base class but this one
        text = " ".join(str(error).split())
        raise BuildError(f"ONNX Runtime refuses to calibrate: {text[:300]}", where=str(model)) from error


def _load(source: list[onnx.ModelProto], options: ort.SessionOptions) -> Any:
    proto = source.pop()
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)
    data = proto.SerializeToString()
    del proto
    providers = ["CPUExecutionProvider"]
    if external or len(data) < FILE_ABOVE:
        return ort.InferenceSession(data, options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        del data
        return ort.InferenceSession(str(path), options, providers=providers)
