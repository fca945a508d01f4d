"""Calibration: one streaming pass over samples in ONNX Runtime gives the range table that every dialect uses.

Memory is that of one forward pass, whatever the number of samples: see :mod:`modelforge.quantize.calib_graph`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelforge.errors import DataError
from modelforge.graph.load import model_files
from modelforge.quantize.calib_checks import Finding, check_calibration
from modelforge.quantize.calib_run import Calibration, Feeds
from modelforge.quantize.ranges import RangeTable
from modelforge.samples import is_batched, stream_samples
from modelforge.store import digest_file

__all__ = ["Feeds", "Finding", "calibrate", "check_calibration"]

BATCH_ELEMENTS, BATCH_AT_MOST = 6 << 20, 32
"""Samples run together as long as the measured tensors of all of them have fewer elements than this."""


def calibrate(
    model: Path,
    samples: Path | Iterable[Feeds],
    *,
    tensors: Collection[str] | None = None,
    channels: Collection[str] = (),
    batch: int | None = None,
    threads: int = 1,
    data_digest: str | None = None,
) -> RangeTable:
    """Run the samples through a prepared model and record the range of every activation that may be quantized.

    Minimum, maximum, NaN and infinities are exact, over all elements. Histogram and zeros are of a subsample of large
    tensors: every n-th element, n chosen from the first sample so that 256 to 4096 elements of a sample are taken
    (together about 1/64 of all). The same samples give the same table, byte for byte.

    Args:
        model: what :func:`modelforge.graph.prepare.prepare` wrote. If, Loop and Scan bodies are left alone.
        samples: an .npz with one array by input name, samples along the first axis, read row by row; or feeds as the
            model takes them, whose shapes may differ where the model's inputs are dynamic.
        tensors: names of float32 activations; by default all graph inputs, and inputs and outputs of the operators in
            :data:`~modelforge.quantize.calib_graph.QUANTIZABLE`.
        channels: names of tensors whose largest absolute value is wanted for each channel too, along axis 1 beside
            convolutions and poolings, else along the last.
        batch: samples of an .npz that run together, where all inputs have a symbol first; by default one, or more of
            a small model, whose cost is otherwise that of starting operators. Which elements of a sample are counted
            does not depend on it, but in tensors whose first axis is another than the samples'.
        threads: of ONNX Runtime, within one operator.
        data_digest: of the samples, where it is known already; else it is taken of what is run.

    Raises:
        DataError: no samples, an array is missing or has a wrong type or shape, or a name that is no activation.
        ModelError: not a model, or older than opset 11.
        BuildError: ONNX Runtime refuses the model, or fails on a sample.
    """
    model = Path(model)
    model_digest = _model_digest(model)  # checks its files, too
    calibration = Calibration(model, tensors, channels, max(1, min(threads, 2)))
    hasher = None if data_digest is not None else _RowHasher()
    count = 0
    if batch is None:
        batch = _batch(samples, calibration)
    for rows, feeds in _feeds(samples, calibration.inputs, batch):
        if hasher is not None:
            hasher.update(rows)
        number = len(next(iter(rows.values()))) if rows else 1
        calibration.add(feeds, number, count)
        count += number
    if count == 0:
        raise DataError("there are no samples to calibrate with", where=_place(samples), fix="give some")
    return RangeTable(
        tensors=calibration.ranges(),
        samples=count,
        data_digest=data_digest if hasher is None else hasher.digest(),  # type: ignore[arg-type]  # one of both is there
        model_digest=model_digest,
    )


def _batch(samples: Path | Iterable[Feeds], calibration: Calibration) -> int:
    """How many samples to run together: see :data:`BATCH_ELEMENTS`."""
    if not isinstance(samples, str | Path) or not _is_free(calibration.inputs):
        return 1
    for _, rows in stream_samples(Path(samples), list(calibration.inputs)):
        return min(max(BATCH_ELEMENTS // max(calibration.elements(rows), 1), 1), BATCH_AT_MOST)
    return 1


def _is_free(inputs: Mapping[str, tuple[int | str, ...]]) -> bool:
    return bool(inputs) and all(shape and isinstance(shape[0], str) for shape in inputs.values())


def _feeds(
    samples: Path | Iterable[Feeds], inputs: Mapping[str, tuple[int | str, ...]], batch: int
) -> Iterator[tuple[Feeds, Feeds]]:
    """(arrays with the samples along the first axis, the same as the model takes them)."""
    along_first = {name: is_batched(shape) for name, shape in inputs.items()}
    if not isinstance(samples, str | Path):
        for index, feeds in enumerate(samples):
            for name in inputs:
                if name not in feeds:
                    raise DataError(f"no array for the input {name}", where=f"sample {index}")
            arrays = {name: np.asarray(feeds[name]) for name in inputs}
            rows = {name: array if along_first[name] else array[np.newaxis] for name, array in arrays.items()}
            yield rows, arrays
        return
    for _, rows in stream_samples(Path(samples), list(inputs), batch if _is_free(inputs) else 1):
        yield rows, {name: array if along_first[name] else array[0, ...] for name, array in rows.items()}


class _RowHasher:
    """The digest of samples, however they were cut into batches."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = {}
        self._shapes: dict[str, Any] = {}

    def update(self, rows: Feeds) -> None:
        for name, array in rows.items():
            column = self._columns.setdefault(name, hashlib.sha256())
            kind = (array.dtype.str, array.shape[1:])
            if self._shapes.get(name) != kind:
                self._shapes[name] = kind
                column.update(repr(kind).encode())
            column.update(np.ascontiguousarray(array).data)

    def digest(self) -> str:
        lines = "\n".join(f"{name}\0{self._columns[name].hexdigest()}" for name in sorted(self._columns))
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _model_digest(model: Path) -> str:
    files = model_files(model)
    digests = [digest_file(path).digest for path in files]
    if len(digests) == 1:
        return digests[0]
    return f"sha256:{hashlib.sha256(chr(10).join(digests).encode()).hexdigest()}"


def _place(samples: Path | Iterable[Feeds]) -> str | None:
    return str(samples) if isinstance(samples, str | Path) else None
