"""Calibration and evaluation data: .npz, folders and globs of .npz/.npy, or a Python function.

Reads, checks against the model's inputs, and gives arrays with the samples along the first axis. Whatever is wrong is
refused here, before any slow step, with the sample's index or file. Nothing is ever unpickled.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import math
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from modelforge.errors import DataError, nearest
from modelforge.graph.facts import TensorFacts

if TYPE_CHECKING:
    import numpy as np

LABEL = "label"


@dataclass(frozen=True)
class Samples:
    """Checked data.

    Attributes:
        arrays: by input name, ``[count, ...]`` in the model's dtype: the samples lie along the first axis. Where the
            model's first dimension is 1 or a symbol, a sample is ``array[i:i+1]``; else it is ``array[i]``.
        labels: ``[count, ...]`` where the data has them.
        digest: of names, dtypes, shapes and bytes.
    """

    arrays: Mapping[str, np.ndarray[Any, Any]]
    labels: np.ndarray[Any, Any] | None
    count: int
    digest: str


def is_batched(shape: Sequence[int | str]) -> bool:
    """Whether samples go along the first dimension of this shape (it is 1 or a symbol), not along one of their own."""
    return len(shape) > 0 and (isinstance(shape[0], str) or shape[0] == 1)


def load_samples(
    data: str,
    *,
    folder: Path,
    inputs: Sequence[TensorFacts],
    dims: Mapping[str, tuple[int, int]],
    limit: int | None,
    where: str,
) -> Samples:
    """Read the data that a recipe names.

    Args:
        data: a path or glob relative to ``folder``, or ``module:function`` (the module is looked for in ``folder``
            first); the function takes nothing and yields dicts: one sample each, arrays by input name without the
            batch axis, and ``label`` where there are labels.
        inputs: what the model takes; an int in a shape is exact, a symbol bounded by ``dims`` (smallest, largest).
        limit: take the first so many samples; there must be as many.
        where: the recipe key, for messages.

    Raises:
        DataError: no data, unknown or missing key, wrong dtype or shape, NaN or infinity, labels of another length.
    """
    reader = _Reader(folder, where, list(inputs))
    arrays = reader.read(data, limit)
    labels = arrays.pop(LABEL, None) if LABEL not in {tensor.name for tensor in inputs} else None
    count = _check(arrays, inputs, dims, data, where)
    if labels is not None and (labels.ndim == 0 or len(labels) != count):
        found = len(labels) if labels.ndim else "one"
        raise DataError(f'"{LABEL}" has {found} entries for {count} samples', where=f"{where} = {data}")
    if limit is not None:
        if limit > count:
            raise DataError(
                f"holds {count} samples, fewer than the {limit} asked for",
                where=f"{where} = {data}",
                fix=f"give more data, or lower `samples` to at most {count}",
            )
        arrays = {name: array[:limit] for name, array in arrays.items()}
        labels = None if labels is None else labels[:limit]
        count = limit
    return Samples(arrays, labels, count, _digest(arrays, labels))


def write_samples(samples: Samples, path: Path) -> None:
    """Write as .npz, uncompressed: arrays by input name, and ``label``."""
    import numpy as np

    extra = {} if samples.labels is None else {LABEL: samples.labels}
    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **dict(samples.arrays), **extra)


def stream_samples(
    path: Path, names: Sequence[str], step: int = 1
) -> Iterator[tuple[int, dict[str, np.ndarray[Any, Any]]]]:
    """The samples of an .npz, ``step`` at a time: (how many, arrays by name, ``[how many, ...]``). Never read whole.

    Arrays of other names (``label``) are left alone.

    Raises:
        DataError: an array is missing or is no plain array in C order, they differ in length, the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            for name in names:
                if f"{name}.npy" not in members:
                    raise DataError(f"no array for the input {name}", where=path.name)
            columns = [_Column(name, archive.open(f"{name}.npy")) for name in names]
            total = {column.name: column.rows for column in columns}
            if len(set(total.values())) > 1:
                raise DataError(f"the inputs differ in their number of samples: {total}", where=path.name)
            rows = columns[0].rows if columns else 0
            for begin in range(0, rows, step):
                count = min(step, rows - begin)
                yield count, {column.name: column.read(count) for column in columns}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"the samples cannot be read: {error}", where=path.name) from error


class _Column:
    """One array of an archive, read row by row, never whole (numpy.lib.format, NPY version 1 to 3)."""

    def __init__(self, name: str, stream: IO[bytes]) -> None:
        import numpy as np

        self.name = name
        self._stream = stream
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, self._dtype = read_header(stream)
        if not shape or self._dtype.hasobject or (fortran and len(shape) > 1):
            raise DataError(f"array {name} is not [samples, ...] of plain numbers in C order")
        self.rows, self._row = shape[0], shape[1:]

    def read(self, count: int) -> np.ndarray[Any, Any]:
        import numpy as np

        size = count * math.prod(self._row) * self._dtype.itemsize
        data = self._stream.read(size)
        if len(data) != size:
            raise EOFError(f"array {self.name} ends early")
        return np.frombuffer(data, self._dtype).reshape(count, *self._row)


class _Reader:
    """Turns each kind of source into arrays by name, samples along the first axis."""

    def __init__(self, folder: Path, where: str, inputs: list[TensorFacts]) -> None:
        self.folder = folder
        self.where = where
        self.inputs = inputs

    def read(self, data: str, limit: int | None) -> dict[str, np.ndarray[Any, Any]]:
        if ":" in data and not (self.folder / data).exists():
            return self._from_function(data)
        path = self.folder / data
        if path.is_file():
            return self._from_file(path)
        files = self._files(data)
        if not files:
            what = "this folder holds no .npz or .npy file" if path.is_dir() else "there is no such file"
            raise DataError(
                what, where=f"{self.where} = {data}", fix="give an .npz, a folder or glob of them, or module:function"
            )
        return self._stack((str(file.name), self._one(file)) for file in files[:limit])

    def _files(self, data: str) -> list[Path]:
        path = self.folder / data
        if path.is_dir():
            return sorted(file for file in path.iterdir() if file.suffix in (".npz", ".npy"))
        found = glob.glob(data, root_dir=self.folder, recursive=True)
        return [self.folder / name for name in sorted(found) if name.endswith((".npz", ".npy"))]

    def _from_file(self, path: Path) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    return {self._only_input(path): archive}
                return {name: archive[name] for name in archive.files}
        except TypeError:  # a bare array is no context manager
            return {self._only_input(path): np.load(path, allow_pickle=False)}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"cannot be read: {error}", where=f"{self.where}: {path.name}", fix="write it with numpy.savez"
            ) from error

    def _only_input(self, path: Path) -> str:
        if len(self.inputs) != 1:
            names = ", ".join(tensor.name for tensor in self.inputs)
            raise DataError(
                "an .npy holds one array, and the model has several inputs",
                where=f"{self.where}: {path.name}",
                fix=f"use .npz with the keys {names}",
            )
        return self.inputs[0].name

    def _one(self, path: Path) -> dict[str, np.ndarray[Any, Any]]:
        """One sample from one file; a leading axis of 1 where the model has a batch axis may be there or not."""
        arrays = self._from_file(path)
        for tensor in self.inputs:
            array = arrays.get(tensor.name)
            if array is None or tensor.shape is None or not is_batched(tensor.shape):
                continue
            if array.ndim == len(tensor.shape) and array.shape[0] == 1:
                arrays[tensor.name] = array[0]
        return arrays

    def _from_function(self, data: str) -> dict[str, np.ndarray[Any, Any]]:
        function = load_function(data, self.folder, self.where)
        try:
            produced = list(function())
        except Exception as error:  # the user's code may raise anything; it is their data that is wrong
            raise DataError(
                f"the function raised {type(error).__name__}: {error}", where=f"{self.where} = {data}"
            ) from error
        if not all(isinstance(sample, Mapping) for sample in produced):
            raise DataError(
                "the function must yield dicts of arrays by input name, one sample each", where=f"{self.where} = {data}"
            )
        return self._stack((f"sample {index}", dict(sample)) for index, sample in enumerate(produced))

    def _stack(self, samples: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        rows: dict[str, list[np.ndarray[Any, Any]]] = {}
        first: str | None = None
        for title, sample in samples:
            if first is not None and set(sample) != set(rows):
                raise DataError(f"{title} has the keys {sorted(sample)}, {first} has {sorted(rows)}", where=self.where)
            first = first or title
            for name, value in sample.items():
                array = np.asarray(value)
                column = rows.setdefault(name, [])
                if column and column[0].shape != array.shape:
                    raise DataError(
                        f'{title}: "{name}" has the shape {list(array.shape)}, {first} has {list(column[0].shape)}',
                        where=self.where,
                        fix="samples of one source must agree in shape",
                    )
                column.append(array)
        return {name: np.stack(column) for name, column in rows.items()}


def load_function(name: str, folder: Path, where: str) -> Any:
    """``module:function``, the module looked for in ``folder`` first (``lines`` is ``folder/lines.py``).

    Raises:
        DataError: there is no such module or function, or the module cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    file = folder / (module_name.replace(".", "/") + ".py")
    try:
        if file.is_file():
            spec = importlib.util.spec_from_file_location(f"_recipe_{module_name}", file)
            if spec is None or spec.loader is None:
                raise ImportError(f"cannot import {file.name}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except Exception as error:  # importing the user's module may raise anything
        raise DataError(
            f'the module "{module_name}" cannot be imported: {type(error).__name__}: {error}',
            where=f"{where} = {name}",
            fix=f"put {module_name}.py beside the recipe, or install what it needs",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [each for each in vars(module) if callable(getattr(module, each)) and not each.startswith("_")]
        raise DataError(
            f'"{module_name}" has no function "{function_name}"; {nearest(function_name, known)}',
            where=f"{where} = {name}",
        )
    return function


def _check(
    arrays: Mapping[str, np.ndarray[Any, Any]],
    inputs: Sequence[TensorFacts],
    dims: Mapping[str, tuple[int, int]],
    data: str,
    where: str,
) -> int:
    place = f"{where} = {data}"
    names = [tensor.name for tensor in inputs]
    for name in arrays:
        if name not in names:
            raise DataError(f'the key "{name}" is no input of the model; {nearest(name, [*names, LABEL])}', where=place)
    for name in names:
        if name not in arrays:
            raise DataError(f'the input "{name}" is missing; there are: {", ".join(arrays) or "no keys"}', where=place)
    counts = {name: (array.shape[0] if array.ndim else 0) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"the inputs have different numbers of samples: {counts}", where=place)
    count = next(iter(counts.values()), 0)
    if count == 0:
        raise DataError("holds no samples", where=place, fix="a gate without data is no gate: give some samples")
    for tensor in inputs:
        _check_array(arrays[tensor.name], tensor, dims, place)
    return count


def _check_array(
    array: np.ndarray[Any, Any], tensor: TensorFacts, dims: Mapping[str, tuple[int, int]], place: str
) -> None:
    import numpy as np

    name = tensor.name
    if array.dtype.name != tensor.dtype:
        raise DataError(
            f'"{name}" is {array.dtype.name}, the model wants {tensor.dtype}',
            where=place,
            fix=f'save it as array.astype("{tensor.dtype}"), if that is what the values mean',
        )
    if tensor.shape is not None:
        wanted = tensor.shape[1:] if is_batched(tensor.shape) else tensor.shape
        found = array.shape[1:]
        if len(found) != len(wanted) or not all(map(_fits, found, wanted, [dims] * len(found))):
            shown = ", ".join(["samples", *(str(size) for size in wanted)])
            raise DataError(f'"{name}" has the shape {list(array.shape)}, the model wants [{shown}]', where=place)
    if array.dtype.kind == "f":
        for start, chunk in _chunks(array):
            finite = np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
            if not finite.all():
                index = start + int(np.argmin(finite))
                raise DataError(f'"{name}" holds NaN or infinity in sample {index}', where=place, fix="mend the data")


def _fits(found: int, wanted: int | str, dims: Mapping[str, tuple[int, int]]) -> bool:
    if isinstance(wanted, int):
        return found == wanted
    smallest, largest = dims.get(wanted, (1, sys.maxsize))
    return smallest <= found <= largest


def _chunks(array: np.ndarray[Any, Any], rows: int = 64) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def _digest(arrays: Mapping[str, np.ndarray[Any, Any]], labels: np.ndarray[Any, Any] | None) -> str:
    import numpy as np

    hasher = hashlib.sha256()
    named = sorted(arrays.items()) + ([] if labels is None else [(f"/{LABEL}", labels)])
    for name, array in named:
        hasher.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        for _, chunk in _chunks(array):
            hasher.update(np.ascontiguousarray(chunk).data)
    return f"sha256:{hasher.hexdigest()}"
