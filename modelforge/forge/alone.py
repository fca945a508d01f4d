"""Single stretches of the way, for people who want no bundle: the range table of a model, or its QDQ form."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.errors import DataError, InputError, nearest
from modelforge.forge.stages import TIMEOUT
from modelforge.graph.facts import TensorFacts
from modelforge.store import write_atomically
from modelforge.toolchains import worker

FLOOR = 16
"""Different samples that a calibration needs, as in a recipe that does not say otherwise."""
Shapes = Mapping[str, tuple[int | str, ...]]


@dataclass(frozen=True)
class Prepared:
    """A prepared model in a folder that goes away with the context that made it."""

    model: Path
    folder: Path
    inputs: Shapes
    report: Mapping[str, Any]


@contextmanager
def prepared(model: Path, shapes: Shapes) -> Iterator[Prepared]:
    """Check and prepare a bare model. A dynamic dimension that ``shapes`` does not fix stays dynamic.

    Raises:
        InputError: the model or a shape is wrong.
    """
    from modelforge.graph.inspect import inspect_model
    from modelforge.graph.load import check_model

    check_model(model)
    facts = inspect_model(model, cost=False)
    known = {tensor.name: tensor for tensor in facts.inputs}
    for name in shapes:
        if name not in known:
            raise InputError(f'the model has no input "{name}"; {nearest(name, known)}', where="--shape")
    inputs = {name: shapes.get(name) or _named(tensor) for name, tensor in known.items()}
    folder = Path(tempfile.mkdtemp(prefix="modelforge-"))
    try:
        request = {"model": str(model), "folder": str(folder / "prepared"), "inputs": inputs, "sizes": {}}
        report = _call("prepare", request, folder, "preparing the model")
        yield Prepared(folder / "prepared" / "model.onnx", folder, inputs, report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def calibrate(ready: Prepared, data: str, *, limit: int | None, allow: Sequence[str] = ()) -> Path:
    """Write the range table of a prepared model into its folder; gives its path.

    ``data`` is as in a recipe (:func:`modelforge.samples.load_samples`), relative to the working folder.

    Raises:
        DataError: the data is wrong, or is no calibration data (see :func:`check_calibration`) and not allowed as such.
    """
    from modelforge.graph.inspect import inspect_model
    from modelforge.quantize.calib_checks import check_calibration
    from modelforge.samples import load_samples, write_samples

    facts = inspect_model(ready.model, cost=False)
    tensors = [TensorFacts(tensor.name, tensor.dtype, ready.inputs[tensor.name]) for tensor in facts.inputs]
    samples = load_samples(data, folder=Path.cwd(), inputs=tensors, dims={}, limit=limit, where="--data")
    check_calibration(samples, floor=FLOOR, allow=allow, where="--data")
    write_samples(samples, ready.folder / "samples.npz")
    request = {
        "model": str(ready.model),
        "samples": str(ready.folder / "samples.npz"),
        "batch": 1,
        "out": str(ready.folder / "ranges.json"),
        "data_digest": samples.digest,
    }
    _call("calibrate", request, ready.folder, "calibrating")
    return ready.folder / "ranges.json"


def quantize(
    ready: Prepared, ranges: Path, *, dialect: str, exclude: Sequence[str], method: str, reduce_range: bool
) -> tuple[Path, Mapping[str, Any]]:
    """Write the QDQ form of a prepared model into its folder; gives the model and the report.

    Raises:
        DataError: the range table cannot be read, or is of another model.
    """
    if not ranges.is_file():
        raise DataError("there is no such range table", where=str(ranges), fix="`modelforge calibrate` makes one")
    out = ready.folder / "quantized"
    request = {
        "model": str(ready.model),
        "folder": str(out),
        "precision": "int8",
        "ranges": str(ranges.resolve()),
        "dialect": dialect,
        "exclude": list(exclude),
        "method": method,
        "reduce_range": reduce_range,
    }
    report = _call("lower", request, ready.folder, f"quantizing for {dialect}")
    return out / "model.onnx", report


def merge_ranges(paths: Sequence[Path], out: Path) -> int:
    """Merge range tables of one model into one; gives the number of samples behind it.

    Raises:
        DataError: one of them is no range table, or they are not of one model.
    """
    from modelforge.quantize.ranges import RangeTable

    tables = []
    for path in paths:
        try:
            tables.append(RangeTable.from_json(path.read_text(encoding="utf-8"), where=str(path)))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read: {error}", where=str(path)) from error
    merged = tables[0]
    for table in tables[1:]:
        merged = merged.merge(table)
    put(out, merged.to_json().encode())
    return merged.samples


def put(path: Path, data: bytes) -> None:
    """Write a result file atomically.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        write_atomically(path, data)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path), fix="give another -o FILE") from error


def _named(tensor: TensorFacts) -> tuple[int | str, ...]:
    """The model's own shape, every unnamed dimension with a name of its own."""
    if tensor.shape is None:
        raise InputError(
            f'the input "{tensor.name}" has no known rank', where="--shape", fix=f"--shape {tensor.name}=1,3,224,224"
        )
    return tuple(
        f"{tensor.name}_{axis}" if size == "?" else size for axis, size in enumerate(tensor.shape)
    )  # fmt: skip


def _call(function: str, request: Mapping[str, Any], folder: Path, what: str) -> dict[str, Any]:
    return worker.call(
        f"modelforge.forge.worker:{function}", request, workdir=folder / "child", timeout=TIMEOUT, what=what
    )
