"""The child's side of ONNX Runtime: optimise a model offline, and run a model over an .npz of samples.

Also the reference run: FP32 baselines and lowered models are run by :func:`run_model`, whatever the target.
"""

from __future__ import annotations

import re
import statistics
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from modelforge.errors import BuildError, DataError, ModelForgeError, UnsupportedError
from modelforge.samples import is_batched, stream_samples

Array = np.ndarray[Any, np.dtype[Any]]

_EXTERNAL_ABOVE = 1_500_000_000
"""Bytes of weights above which they go beside the model: a protobuf message ends at 2 GiB."""


def race(request: dict[str, Any]) -> dict[str, Any]:
    """Median milliseconds of several models on the same batch, in interleaved rounds: what else the machine does hits
    all of them alike. Request: models, inputs (.npz), batch, threads. Rounds until two seconds are spent, 10 to 200.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    # A waiting pool that spins would take the core from the other session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for model in request["models"]]
    inputs = sessions[0].get_inputs()
    _, arrays = next(_batches(Path(request["inputs"]), [each.name for each in inputs], request["batch"]))
    feeds = {each.name: _one_feed(arrays[each.name], each.shape) for each in inputs}
    times: list[list[float]] = [[] for _ in sessions]
    begun = time.perf_counter()
    for turn in range(_ROUNDS[1]):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, feeds)
            taken.append((time.perf_counter() - start) * 1000)
        if turn + 1 >= _ROUNDS[0] and time.perf_counter() - begun > 2:
            break
    # The first round warms caches and allocators up.
    return {"p50_ms": [round(statistics.median(taken[1:]), 4) for taken in times], "rounds": len(times[0]) - 1}


def time_batches(request: dict[str, Any]) -> dict[str, Any]:
    """Median milliseconds of one execution by batch size, the first sample repeated. Request: model, inputs (.npz),
    batches, threads. Rounds until a second is spent on a size, 10 to 200; ``rounds`` of the answer is their least."""
    options = _options(threads=request["threads"])
    session = ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    _, arrays = next(_batches(Path(request["inputs"]), [each.name for each in inputs], 1))
    medians, rounds = {}, _ROUNDS[1]
    for size in request["batches"]:
        feeds = {}
        for each in inputs:
            feed = _one_feed(arrays[each.name], each.shape)
            free = bool(each.shape) and not isinstance(each.shape[0], int)
            feeds[each.name] = np.repeat(feed, size, axis=0) if free else feed
        taken: list[float] = []
        begun = time.perf_counter()
        while len(taken) < _ROUNDS[0] or (len(taken) < _ROUNDS[1] and time.perf_counter() - begun < 1):
            start = time.perf_counter()
            session.run(None, feeds)
            taken.append((time.perf_counter() - start) * 1000)
        medians[str(size)] = round(statistics.median(taken[1:]), 4)
        rounds = min(rounds, len(taken) - 1)
    return {"by_batch": medians, "rounds": rounds}


def _one_feed(array: Array, shape: list[Any]) -> Array:
    """A batch as it goes into a session: without the axis of samples where the model has none."""
    return array if is_batched([size if isinstance(size, int) else "?" for size in shape]) else array[0, ...]


_ROUNDS = (10, 200)


def optimise(request: dict[str, Any]) -> dict[str, Any]:
    """Optimise ``model`` at level BASIC, save it as ``output``, and load what was saved.

    BASIC (constant folding, redundant nodes) keeps to portable operators and to the QDQ pairs; higher levels write
    nodes that fit only the machine that they were made on (onnxruntime.ai, "Graph Optimizations").

    Args:
        request: ``model``, ``output``: paths; ``external_above``: optional, bytes of weights above which they are
            written to ``output`` + ``.data``.

    Returns:
        ``version``, ``domains`` of the saved model, ``nodes``, ``data``: whether weights lie beside it.

    Raises:
        UnsupportedError: ONNX Runtime has no kernel for a node.
        BuildError: it refused the model, or what it saved does not load.
    """
    source, output = Path(request["model"]), Path(request["output"])
    options = _options(threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(output)
    external = _weight_bytes(source) > request.get("external_above", _EXTERNAL_ABOVE)
    data = output.name + ".data"
    if external:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    before = _signature(_load(source, options))
    if not output.is_file():
        raise BuildError("ONNX Runtime saved no optimised model")
    after = _signature(_load(output, _options(threads=1)))
    if before != after:
        raise BuildError(f"optimising changed the inputs or outputs from {before} to {after}")
    return {
        "version": ort.__version__,
        "nodes": _count_nodes(output),
        "data": data if (output.parent / data).is_file() else None,
    }


def run_model(request: dict[str, Any]) -> dict[str, Any]:
    """Run a model over samples on the CPU, batch by batch.

    Args:
        request: ``model``: path of the ONNX file; ``inputs``: path of an .npz with one array per model input, as
            :class:`~modelforge.compilers.protocol.RunJob` says; ``outputs``: path of the .npz to write; ``batch``:
            samples per run, used where all inputs have a symbol first; ``threads``: within one operator.

    Returns:
        ``samples``, ``version`` and ``outputs``, shapes by name. The .npz has one array per model output, the
        samples along its first axis, and the same bytes for the same outputs. Samples are streamed from the
        archive: only one batch of inputs and all the outputs are in memory.

    Raises:
        UnsupportedError: ONNX Runtime has no kernel for a node.
        BuildError: an input is missing, the inputs differ in length, or ONNX Runtime refused or failed.
    """
    session = _load(Path(request["model"]), _options(threads=request["threads"]))
    shapes = {each.name: _shape(each) for each in session.get_inputs()}
    batched = {name: is_batched(shape) for name, shape in shapes.items()}
    free = all(shape and isinstance(shape[0], str) for shape in shapes.values())
    step = request["batch"] if free else 1
    names = [each.name for each in session.get_outputs()]
    collected = {each.name: _Collected(each.name, _shape(each)) for each in session.get_outputs()}
    samples = 0
    for count, arrays in _batches(Path(request["inputs"]), list(shapes), step):
        feeds = {name: array if batched[name] else array[0, ...] for name, array in arrays.items()}
        for name, value in zip(names, _run(session, feeds, samples), strict=True):
            collected[name].add(value, count)
        samples += count
    if samples == 0:
        raise BuildError("there is no sample to run", where=Path(request["inputs"]).name)
    results = {name: each.joined() for name, each in collected.items()}
    _write_npz(Path(request["outputs"]), results)
    return {
        "samples": samples,
        "version": ort.__version__,
        "outputs": {name: list(array.shape) for name, array in results.items()},
    }


class _Collected:
    """One output over all samples.

    Values are joined along their first axis where the model says that samples lie there, else they are stacked.
    """

    def __init__(self, name: str, shape: tuple[int | str, ...]) -> None:
        self.name = name
        self._shape = shape
        self._values: list[Array] = []

    def add(self, value: Any, count: int) -> None:
        if not isinstance(value, np.ndarray):
            raise UnsupportedError(f"output {self.name} is a {type(value).__name__}, not a tensor")
        # ONNX Runtime says () of a scalar and of an unknown rank: then the value itself tells.
        along_first = is_batched(self._shape) or (self._shape == () and value.ndim > 0)
        if along_first and len(value) == count:
            self._values.append(value)
        elif count == 1:
            self._values.append(value[np.newaxis])
        else:
            raise BuildError(
                f"output {self.name} has shape {list(value.shape)} for a batch of {count} samples",
                fix="the model does not keep samples apart along the first axis: fix its batch at 1",
            )

    def joined(self) -> Array:
        shapes = {value.shape[1:] for value in self._values}
        if len(shapes) > 1:
            some = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
            raise BuildError(
                f"output {self.name} has other shapes for other samples: {some}",
                fix="compare an output whose shape does not depend on the values of the input",
            )
        return np.concatenate(self._values)


def _options(*, threads: int) -> ort.SessionOptions:
    """Sequential and without spinning: the same outputs every time, and no core burnt while it waits."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _load(model: Path, options: ort.SessionOptions) -> Any:
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class but this one
        raise _explain(error, model) from error


def _run(session: Any, feeds: Mapping[str, Array], done: int) -> list[Any]:
    try:
        outputs: list[Any] = session.run(None, dict(feeds))
    except Exception as error:  # its exceptions share no base class but this one
        failure = _explain(error, None)
        raise type(failure)(f"sample {done}: {failure.what}", where=failure.where, fix=failure.fix) from error
    return outputs


def _explain(error: Exception, model: Path | None) -> ModelForgeError:
    """``[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for ...`` as an error of ours."""
    text = " ".join(str(error).split())
    found = re.match(r"\[ONNXRuntimeError\] : \d+ : ([A-Z_]+) : (.*)", text)
    code, reason = found.groups() if found else (type(error).__name__, text)
    if model is not None:
        reason = reason.replace(str(model), model.name)
    named = re.search(r"""(?:[Nn]ode with name|[Nn]ode:?,?) ?[(:]? ?['"]?([^\s'",()]+)""", reason)
    where = f"node {named.group(1)}" if named else (model.name if model else None)
    what = f"ONNX Runtime {ort.__version__}, {code}: {reason}"
    if code == "NOT_IMPLEMENTED" or "is not a registered function/op" in reason or "No Op registered" in reason:
        return UnsupportedError(what, where=where, fix="use operators and types that its CPU provider has")
    return BuildError(what, where=where)


def _shape(tensor: Any) -> tuple[int | str, ...]:
    """Its shape with ``?`` for a dimension that has no name."""
    return tuple("?" if size is None else size for size in tensor.shape)


def _signature(session: Any) -> list[list[str]]:
    return [
        [f"{each.name}:{each.type}" for each in tensors] for tensors in (session.get_inputs(), session.get_outputs())
    ]


def _weight_bytes(model: Path) -> int:
    """What the weights of a model take, those beside it included; the latter are not loaded."""
    import onnx

    proto = onnx.load(model, load_external_data=False)
    beside = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    paths = [model, *(model.parent / name for name in beside)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _count_nodes(model: Path) -> dict[str, int]:
    """Number of nodes by domain; the standard one is ``ai.onnx``."""
    import onnx

    counts: dict[str, int] = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        domain = node.domain or "ai.onnx"
        counts[domain] = counts.get(domain, 0) + 1
    return dict(sorted(counts.items()))


def _batches(path: Path, names: list[str], step: int) -> Iterator[tuple[int, dict[str, Array]]]:
    """The samples of an archive. They were checked when the recipe was read: what is wrong now is a failed step."""
    try:
        yield from stream_samples(path, names, step)
    except DataError as error:
        raise BuildError(error.what, where=error.where) from error


def _write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """As ``numpy.savez`` writes, for any name (savez cannot write an output called ``file``)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            # ZipInfo's own date, 1980: the same arrays give the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
