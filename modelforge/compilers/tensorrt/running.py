"""The child's side of a run: check the engine's digest, load it, run samples, time it. Runs only where a GPU is.

Deserializing an engine is running code: nothing of NVIDIA's sees a file whose digest is not the one that was recorded.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelforge.compilers.tensorrt.engine import Loaded
from modelforge.errors import BuildError
from modelforge.samples import is_batched, stream_samples

WARM_UP = 10
ROUNDS = 50
"""Timed rounds for each batch size, after the warm-up. Kernels of TensorRT-RTX are compiled in the first of these."""

if TYPE_CHECKING:  # NumPy 1.21, which JetPack 6 has, takes no subscripts
    Array = np.ndarray[Any, Any]
    Feeds = dict[str, Array]


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run an engine over samples on the GPU, batch by batch, then time it.

    Args:
        request: what :class:`~modelforge.compilers.tensorrt.engine.Loaded` takes; ``inputs`` and ``outputs``: .npz
            files as :class:`~modelforge.compilers.protocol.RunJob` says; ``batch``; ``gears``: the batch sizes to time;
            ``layers``: where to write the time of each layer, as JSON.

    Returns:
        ``samples``, ``gpu`` (name, sm, driver), ``device_memory_bytes``, ``latency`` by batch size.

    Raises:
        IntegrityError: the engine is not the one that was recorded, or is of another version.
        BuildError: it cannot be loaded or run, or an input does not fit it.
        UnsupportedError: a data type or an output shape that this runner does not have.
    """
    loaded = Loaded(request)
    samples = _run_all(loaded, Path(request["inputs"]), Path(request["outputs"]), request["batch"])
    first = _first(loaded, Path(request["inputs"]))
    timed = [_time(loaded, first, gear) for gear in request["gears"]]
    layers = loaded.layer_times(_repeated(loaded, first, request["gears"][-1]))
    _write_layers(Path(request["layers"]), layers, request["gears"][-1])
    return {
        "samples": samples,
        "gpu": vars(loaded.gpu),
        "device_memory_bytes": loaded.peak_bytes(),
        "latency": timed,
        "slowest_layers": sorted(layers, key=lambda layer: -float(layer["ms"]))[:5],
    }


def race(request: dict[str, Any]) -> dict[str, Any]:
    """Time two engines in one process, round by round. ``engines``: two requests as for :func:`run`; ``batch``.

    Returns:
        ``p50_ms``: the median of each, for one batch, without transfers.
    """
    engines = [Loaded(each) for each in request["engines"]]
    feeds = [_repeated(each, _first(each, Path(request["inputs"])), request["batch"]) for each in engines]
    taken: list[list[float]] = [[], []]
    for index in range(WARM_UP + ROUNDS):
        for place, engine in enumerate(engines):
            times = engine.timed(feeds[place])
            if index >= WARM_UP:
                taken[place].append(times["compute"])
    return {"p50_ms": [round(statistics.median(each), 4) for each in taken], "rounds": ROUNDS}


def _write_layers(path: Path, layers: list[dict[str, Any]], batch: int) -> None:
    """Into the job's private folder: nothing waits for the disk."""
    path.write_text(json.dumps({"schema": 1, "batch": batch, "layers": layers}, indent=1) + "\n", encoding="utf-8")


def _run_all(loaded: Loaded, inputs: Path, outputs: Path, batch: int) -> int:
    step = batch if all(shape and shape[0] == -1 for shape in loaded.input_shapes.values()) else 1
    collected: dict[str, list[Array]] = {name: [] for name in loaded.output_names}
    samples = 0
    for count, arrays in stream_samples(inputs, list(loaded.input_shapes), step):
        results = loaded.execute(_padded(loaded, _as_given(loaded, arrays), count))
        for name, value in results.items():
            collected[name].append(_of_samples(name, value, count, loaded.output_shapes[name]))
        samples += count
    if samples == 0:
        raise BuildError("there is no sample to run", where=inputs.name)
    np.savez(outputs, **{name: np.concatenate(values) for name, values in collected.items()})  # type: ignore[arg-type]  # stubs
    return samples


def _as_given(loaded: Loaded, arrays: Mapping[str, Array]) -> Feeds:
    """Samples as the engine's inputs: without the first axis where it is not one of the model."""
    return {
        name: array if _has_samples_first(loaded.input_shapes[name]) else array[0] for name, array in arrays.items()
    }


def _has_samples_first(shape: tuple[int, ...]) -> bool:
    return is_batched(["batch" if size == -1 else size for size in shape])


def _padded(loaded: Loaded, feeds: Feeds, count: int) -> Feeds:
    """The last sample repeated up to the engine's smallest batch, where there are fewer."""
    smallest = loaded.smallest_batch()
    if count >= smallest:
        return feeds
    return {
        name: np.concatenate([array, np.repeat(array[-1:], smallest - count, axis=0)])
        if loaded.input_shapes[name][:1] == (-1,)
        else array
        for name, array in feeds.items()
    }


def _of_samples(name: str, value: Array, count: int, shape: tuple[int, ...]) -> Array:
    """The part of an output that belongs to ``count`` samples, along the first axis."""
    if shape[:1] == (-1,) and len(value) >= count:
        return value[:count]
    if count == 1:
        return value if _has_samples_first(shape) and len(value) == 1 else value[np.newaxis]
    raise BuildError(
        f"output {name} has shape {list(value.shape)} for a batch of {count} samples",
        fix="the model does not keep samples apart along the first axis: fix its batch at 1",
    )


def _first(loaded: Loaded, inputs: Path) -> Feeds:
    _, arrays = next(iter(stream_samples(inputs, list(loaded.input_shapes), 1)))
    return _as_given(loaded, arrays)


def _repeated(loaded: Loaded, first: Feeds, batch: int) -> Feeds:
    return {
        name: np.repeat(array, batch, axis=0) if loaded.input_shapes[name][:1] == (-1,) else array
        for name, array in first.items()
    }


def _time(loaded: Loaded, first: Feeds, batch: int) -> dict[str, Any]:
    """Latency of one batch size by CUDA events: the GPU's own clock, transfers apart."""
    feeds = _repeated(loaded, first, batch)
    rounds = [loaded.timed(feeds) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    compute = np.array([each["compute"] for each in rounds])
    quantiles = {f"p{q}_ms": round(float(np.percentile(compute, q)), 4) for q in (50, 90, 99)}
    transfers = {f"{way}_ms": round(statistics.median(each[way] for each in rounds), 4) for way in ("in", "out")}
    return {"batch": batch, **quantiles, "rounds": ROUNDS, "warm_up": WARM_UP, "transfers": transfers}
