"""Run a model beside what was made of it in ONNX Runtime, on the same seeded random inputs, and compare the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from modelforge.errors import ModelError
from modelforge.graph.choices import deciding_values
from modelforge.graph.shapes import dimension

Array = NDArray[Any]

SEED = 20240229
RELATIVE = 1e-4
"""Allowed difference relative to an output's largest value: two orders above what FP32 rounding does in deep nets."""
ABSOLUTE = 1e-5

_BATCHES = (2, 1)
# For a size that is not the first: what image, speech and text models usually take, cheap ones first.
_OTHERS = (32, 64, 48, 224, 320, 512, 256, 576, 640, 16, 8, 1, 1024, 16000)
_ATTEMPTS = 24

_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


@dataclass(frozen=True)
class Sample:
    """One feed, and what the reference gives for it. Arrays by input and by output name.

    Attributes:
        sizes: that the open dimensions have.
        values: of inputs that were not left to chance: see :mod:`modelforge.graph.choices`.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    sizes: Mapping[str, int]
    values: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """How far a model is from the reference. ``reason`` says what is wrong, empty where all is within bounds."""

    max_abs: float
    reason: str = ""


def open_session(model: Path | ModelProto, *, optimize: bool = True) -> Any:
    """An ONNX Runtime CPU session, quiet, of a file or of a model in memory. ``optimize`` False runs the nodes as they
    stand.

    Raises:
        RuntimeError: ONNX Runtime does not load the model (its classes derive from RuntimeError or Exception).
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def reference_samples(
    model: Path, shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int], where: str, most: int = 2
) -> list[Sample]:
    """Run the original on random inputs, at up to ``most`` bindings of its open sizes.

    The first has the ``sizes`` given; open sizes beside those are tried from small common ones until the model runs.
    The second differs in every open size if the model lets it: a size that was baked in by mistake then shows. Where an
    input chooses the branch of an If, this is so for each branch that runs.

    Raises:
        ModelError: ONNX Runtime does not load the model, or runs it at no size that was tried.
    """
    try:
        session = open_session(model)
    except Exception as error:  # ONNX Runtime raises classes of its C++ module that share no base
        raise ModelError(
            f"ONNX Runtime does not load the model: {_head(error)}",
            where=where,
            fix="the FP32 model must run in ONNX Runtime before anything is built from it",
        ) from None
    samples: list[Sample] = []
    failures: list[str] = []
    for values in deciding_values(model):
        samples += _samples_at(session, shapes, sizes, values, most, failures)
    if not samples:
        raise ModelError(
            f"ONNX Runtime fails to run the model on random inputs: {failures[0]}",
            where=where,
            fix="give the shapes that the model takes under [inputs.*] and [dims] in the recipe",
        )
    return samples


def _samples_at(
    session: Any,
    shapes: Mapping[str, tuple[int | str, ...]],
    sizes: Mapping[str, int],
    values: Mapping[str, int],
    most: int,
    failures: list[str],
) -> list[Sample]:
    """Samples with these values of some inputs; none where the model does not run with them. Adds why it failed."""
    samples: list[Sample] = []
    first = itertools.islice(_bindings(session, shapes, sizes), _ATTEMPTS)
    others = itertools.islice(_bindings(session, shapes, {}), _ATTEMPTS)
    again = itertools.islice(_bindings(session, shapes, sizes), _ATTEMPTS)
    for all_new, bindings in ((True, first), (True, others), (False, again)):
        for binding in bindings:
            if len(samples) == most:
                break
            if samples and not _differs(binding, samples[0].sizes, all_new):
                continue
            inputs = random_inputs(session, shapes, binding, seed=SEED + len(samples))
            for name, value in values.items():
                inputs[name] = np.full_like(inputs[name], value)
            try:
                samples.append(Sample(inputs, run(session, inputs), binding, values))
            except Exception as error:  # ONNX Runtime raises classes of its C++ module that share no base
                failures.append(_head(error))
    return samples


def compare(model: Path, samples: list[Sample], relative: float = RELATIVE) -> Difference:
    """Run ``model`` on the samples' inputs and compare with their outputs. Raises nothing: a failure is a reason."""
    largest = 0.0
    try:
        session = open_session(model)
        for sample in samples:
            outputs = run(session, sample.inputs)
            for name, reference in sample.outputs.items():
                if name not in outputs:
                    return Difference(float("inf"), f"output {name!r} is gone")
                difference = distance(reference, outputs[name], relative)
                largest = max(largest, difference.max_abs)
                if difference.reason:
                    return Difference(largest, f"output {name!r} {difference.reason}")
    except Exception as error:  # whatever ONNX Runtime says against the new model is why it is not taken
        return Difference(float("inf"), f"does not run: {_head(error)}")
    return Difference(largest)


def run(session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def random_inputs(
    session: Any, shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int], seed: int = SEED
) -> dict[str, Array]:
    """Seeded inputs by name: floats uniform in [-1, 1), wide integers 0 or 1 (they may be indices), bytes any."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for value in session.get_inputs():
        shape = _sizes_of(value, shapes, sizes)
        dtype = _NUMPY.get(value.type)
        if dtype is None:
            raise ModelError(f"input {value.name!r} has the type {value.type}, which cannot be fed", where=value.name)
        inputs[value.name] = _random(rng, np.dtype(dtype), shape)
    return inputs


def _random(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    if dtype.kind == "f":
        return np.asarray(rng.uniform(-1, 1, shape).astype(dtype))
    if dtype.kind == "O":
        return np.full(shape, "a", dtype)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        return np.asarray(rng.integers(bounds.min, bounds.max + 1, shape, dtype=np.int64).astype(dtype))
    return np.asarray(rng.integers(0, 2, shape).astype(dtype))


def _open_sizes(session: Any, shapes: Mapping[str, tuple[int | str, ...]]) -> dict[str, int]:
    """The sizes that must be chosen, with the axis where each first occurs. Unnamed ones are called ``input[axis]``."""
    found: dict[str, int] = {}
    for value in session.get_inputs():
        for axis, size in enumerate(_declared(value, shapes)):
            if isinstance(size, str):
                found.setdefault(size if size != "?" else f"{value.name}[{axis}]", axis)
    return found


def _bindings(
    session: Any, shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Ways to choose the open sizes: all inner ones alike first, then each on its own for two of them."""
    axes = _open_sizes(session, shapes)
    given = {name: sizes[name] for name in axes if name in sizes}
    free = [name for name in axes if name not in given]
    outer = [name for name in free if axes[name] == 0]
    inner = [name for name in free if axes[name] != 0]
    seen: set[tuple[int, ...]] = set()
    # Silero's state has its batch at axis 1: inner sizes of 1 go with it, so batch 1 is tried at every other size.
    pools = [_OTHERS if index == 0 else (None, *_BATCHES) for index, _ in enumerate(inner)]
    for rest in itertools.product(*pools):
        for batch in _BATCHES if outer else (1,):
            chosen = [rest[0] if size is None else size for size in rest]
            binding = {**given, **dict.fromkeys(outer, batch), **dict(zip(inner, chosen, strict=True))}
            key = tuple(int(size or 1) for size in binding.values())
            if key not in seen:
                seen.add(key)
                yield dict(zip(binding, key, strict=True))


def _differs(binding: Mapping[str, int], other: Mapping[str, int], everywhere: bool) -> bool:
    """Whether two bindings differ, in every size or in one; a model without open sizes is run on other numbers."""
    changes = [size != other[name] for name, size in binding.items()]
    return not changes or (all(changes) if everywhere else any(changes))


def _declared(value: Any, shapes: Mapping[str, tuple[int | str, ...]]) -> tuple[int | str, ...]:
    return tuple(dimension(size) for size in shapes.get(value.name) or value.shape)


def _sizes_of(value: Any, shapes: Mapping[str, tuple[int | str, ...]], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(
        size if isinstance(size, int) else sizes[size if size != "?" else f"{value.name}[{axis}]"]
        for axis, size in enumerate(_declared(value, shapes))
    )


def distance(reference: Any, value: Any, relative: float) -> Difference:
    """How far an output is from the reference: same type and shape, finite in the same places, within bounds."""
    if isinstance(reference, list):
        return _sequence_distance(reference, value, relative)
    if not isinstance(reference, np.ndarray):  # an optional that is empty, or a map of labels
        return Difference(0.0, "" if reference == value else "has other values")
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return Difference(
            float("inf"), f"is {value.dtype}{list(value.shape)}, not {reference.dtype}{list(reference.shape)}"
        )
    if reference.dtype.kind != "f":
        same = bool(np.array_equal(reference, value))
        return Difference(0.0 if same else 1.0, "" if same else "has other values")
    if not reference.size:
        return Difference(0.0)
    if not np.array_equal(np.isfinite(reference), np.isfinite(value)):
        return Difference(float("inf"), "is infinite or NaN in other places")
    finite = np.isfinite(reference)
    exact, measured = reference[finite].astype(np.float64), value[finite].astype(np.float64)
    if not exact.size:
        return Difference(0.0)
    largest = float(np.abs(exact - measured).max())
    allowed = ABSOLUTE + relative * float(np.abs(exact).max())
    return Difference(largest, f"differs by {largest:.3g}, allowed are {allowed:.3g}" if largest > allowed else "")


def _sequence_distance(reference: list[Any], value: Any, relative: float) -> Difference:
    if not isinstance(value, list) or len(value) != len(reference):
        return Difference(float("inf"), "is a sequence of another length")
    parts = [distance(exact, measured, relative) for exact, measured in zip(reference, value, strict=True)]
    largest = max((part.max_abs for part in parts), default=0.0)
    return Difference(largest, next((part.reason for part in parts if part.reason), ""))


def _head(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
