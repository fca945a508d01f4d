"""What calibration found out about each activation: plain values that are kept, compared, merged and reused.

One table serves every dialect. Knows no onnx, no compiler: a table is a JSON document that outlives the model's file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelforge.errors import DataError, nearest

SCHEMA = 1
BINS = 2048
"""Bins of every histogram; of these at least about half are in use (see :meth:`Histogram.spanning`)."""

_SMALLEST_EXPONENT = -126
_FLOAT32_BITS = 23

Counts = NDArray[np.int64]
Absmax = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Histogram:
    """:data:`BINS` bins of equal width over ``[low, high)``; the width is a power of two and ``low`` a multiple of it.

    On such a grid a coarser histogram has every edge in common with the finer one, so that re-binning adds whole bins:
    no count is lost or split, and the result does not depend on the order in which samples came.

    Attributes:
        counts: int64 ``[BINS]``, read-only. Of a subsample where the tensor is large: see
            :func:`modelforge.quantize.calibrate.calibrate`.
    """

    low: float
    high: float
    counts: Counts

    @property
    def width(self) -> float:
        """Of one bin."""
        return (self.high - self.low) / BINS

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def centers(self) -> NDArray[np.float64]:
        """float64 ``[BINS]``."""
        return np.asarray(self.low + self.width * (np.arange(BINS) + 0.5), np.float64)

    @staticmethod
    def spanning(minimum: float, maximum: float) -> Histogram:
        """The empty histogram on the finest grid that holds both values (finite, ``minimum <= maximum``).

        No bin is finer than float32 can tell values of this magnitude apart.
        """
        largest = max(abs(minimum), abs(maximum))
        exponent = max(math.frexp(largest)[1] - _FLOAT32_BITS if largest else _SMALLEST_EXPONENT, _SMALLEST_EXPONENT)
        if maximum > minimum:
            exponent = max(exponent, math.frexp(maximum - minimum)[1] - BINS.bit_length())
        while _index(maximum, exponent) - _index(minimum, exponent) >= BINS:
            exponent += 1
        first = _index(minimum, exponent)
        return Histogram(math.ldexp(first, exponent), math.ldexp(first + BINS, exponent), _frozen(np.zeros(BINS)))

    def plus(self, values: NDArray[Any]) -> Histogram:
        """With finite ``values`` counted, all of which lie inside ``[low, high)``."""
        # Scaling by a power of two is exact, and so is floor: which bin it is, is not a matter of rounding. Only where
        # it makes values smaller, float32 could lose the sign of a tiny one.
        scale = (values.dtype.type if self.width <= 1 else np.float64)(1 / self.width)
        scaled = values.reshape(-1) * scale
        indices = np.floor(scaled, out=scaled).astype(np.int64)
        indices -= round(self.low / self.width)
        added = np.bincount(indices, minlength=BINS)
        if len(added) != BINS:
            raise ValueError(f"values outside [{self.low}, {self.high})")
        return Histogram(self.low, self.high, _frozen(self.counts + added))

    def rebinned(self, other: Histogram) -> Histogram:
        """These counts on the grid of ``other``, which holds this one's used bins and is not finer."""
        used = np.flatnonzero(self.counts)
        counts = np.zeros(BINS, np.int64)
        if len(used):
            factor = round(other.width / self.width)
            if factor < 1:
                raise ValueError("a histogram cannot be made finer")
            factor = min(factor, 1 << 40)  # beyond any bin's index already, and inside int64
            target = (round(self.low / self.width) + used) // factor - round(other.low / other.width)
            np.add.at(counts, target, self.counts[used])
        return Histogram(other.low, other.high, _frozen(counts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        return (self.low, self.high) == (other.low, other.high) and bool(np.array_equal(self.counts, other.counts))

    __hash__ = None  # type: ignore[assignment]  # holds an array


@dataclass(frozen=True, eq=False)
class TensorRange:
    """One activation over all samples.

    Attributes:
        shape_rank: number of dimensions.
        count: elements seen, NaN and infinite ones included.
        minimum, maximum: of the finite elements, over all of them; both 0 where there was none.
        zeros: exact zeros among the ``bins.total`` elements that the histogram counted.
        nans, infs: over all elements.
        bins: of the finite elements, of a subsample of them where the tensor is large.
        channel_absmax: float32 ``[channels]``, largest finite absolute value over all elements; None where not asked.
        channel_axis: what axis that is along: 1, or ``shape_rank - 1``; None where not asked.
    """

    name: str
    shape_rank: int
    count: int
    minimum: float
    maximum: float
    zeros: int
    nans: int
    infs: int
    bins: Histogram
    channel_absmax: Absmax | None = None
    channel_axis: int | None = None

    @property
    def finite(self) -> int:
        """Elements that are neither NaN nor infinite."""
        return self.count - self.nans - self.infs

    @property
    def absmax(self) -> float:
        """The largest absolute value."""
        return max(abs(self.minimum), abs(self.maximum))

    def merge(self, other: TensorRange) -> TensorRange:
        """Of both sets of samples.

        Raises:
            DataError: these are not ranges of the same tensor.
        """
        self._check_same(other)
        if not self.finite or not other.finite:
            kept = self if self.finite else other
            minimum, maximum, bins = kept.minimum, kept.maximum, kept.bins
        else:
            minimum, maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
            grid = Histogram.spanning(minimum, maximum)
            counts = self.bins.rebinned(grid).counts + other.bins.rebinned(grid).counts
            bins = Histogram(grid.low, grid.high, _frozen(counts))
        absmax = self.channel_absmax
        if absmax is not None and other.channel_absmax is not None:
            absmax = np.maximum(absmax, other.channel_absmax)
        return TensorRange(
            name=self.name,
            shape_rank=self.shape_rank,
            count=self.count + other.count,
            minimum=minimum,
            maximum=maximum,
            zeros=self.zeros + other.zeros,
            nans=self.nans + other.nans,
            infs=self.infs + other.infs,
            bins=bins,
            channel_absmax=absmax,
            channel_axis=self.channel_axis,
        )

    def _check_same(self, other: TensorRange) -> None:
        mine, others = (
            (each.name, each.shape_rank, each.channel_axis, None if absmax is None else len(absmax))
            for each in (self, other)
            for absmax in (each.channel_absmax,)
        )
        if mine != others:
            raise DataError(
                f"these are ranges of different things: (name, rank, channel axis, channels) {mine} and {others}",
                where=f'tensor "{self.name}"',
                fix="merge tables of the same model, calibrated with the same options",
            )

    def __eq__(self, other: object) -> bool:
        return _facts(self) == _facts(other) if isinstance(other, TensorRange) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # holds arrays


@dataclass(frozen=True)
class RangeTable:
    """The ranges of one model's activations over one set of samples.

    Attributes:
        tensors: by name.
        samples: how many were run.
        data_digest, model_digest: of what was calibrated with and on, ``sha256:...``.
    """

    tensors: Mapping[str, TensorRange]
    samples: int
    data_digest: str
    model_digest: str

    def __getitem__(self, name: str) -> TensorRange:
        """The range of one tensor.

        Raises:
            DataError: the table has none of that name.
        """
        found = self.tensors.get(name)
        if found is None:
            raise DataError(
                f'the range table has no tensor "{name}"; {nearest(name, self.tensors)[:400]}',
                fix="calibrate again, on the model that is to be quantized",
            )
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @property
    def digest(self) -> str:
        """``sha256:...`` of the JSON document."""
        return f"sha256:{hashlib.sha256(self.to_json().encode()).hexdigest()}"

    def merge(self, other: RangeTable) -> RangeTable:
        """Of both sets of samples; the same table whichever is first.

        Raises:
            DataError: other models, other tensors, or the same samples twice.
        """
        if self.model_digest != other.model_digest:
            raise DataError(
                "these tables are of different models",
                where="model_digest",
                fix="merge tables that were calibrated on the same prepared model",
            )
        if self.data_digest == other.data_digest:
            raise DataError(
                "these tables are of the same samples, which would count twice",
                where="data_digest",
                fix="calibrate on other samples, or use one of the two",
            )
        odd = sorted(set(self.tensors) ^ set(other.tensors))
        if odd:
            raise DataError(
                f"only one of the tables has {len(odd)} tensors",
                where=f'tensor "{odd[0]}"',
                fix="calibrate both with the same options",
            )
        digests = "\n".join(sorted((self.data_digest, other.data_digest)))
        return RangeTable(
            tensors={name: self.tensors[name].merge(other.tensors[name]) for name in self.tensors},
            samples=self.samples + other.samples,
            data_digest=f"sha256:{hashlib.sha256(digests.encode()).hexdigest()}",
            model_digest=self.model_digest,
        )

    def to_json(self) -> str:
        """One JSON document, one line a tensor in order of name: the same table gives the same bytes."""
        head = {
            "schema": SCHEMA,
            "samples": self.samples,
            "data_digest": self.data_digest,
            "model_digest": self.model_digest,
        }
        lines = [f"{_dumps(key)}: {_dumps(value)}," for key, value in head.items()]
        tensors = [f"{_dumps(name)}: {_dumps(_facts(self.tensors[name]))}" for name in sorted(self.tensors)]
        return "\n".join(["{", *lines, '"tensors": {', ",\n".join(tensors), "}", "}", ""])

    @staticmethod
    def from_json(text: str, *, where: str = "range table") -> RangeTable:
        """Read what :meth:`to_json` wrote.

        Args:
            where: the file, for messages.

        Raises:
            DataError: not such a document; names the tensor and the key.
        """
        try:
            document = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            raise DataError(f"this is not a range table: {error}", where=where, fix=_AGAIN) from None
        reader = _Reader(document, where)
        if reader.integer("schema") != SCHEMA:
            raise DataError(
                f"schema {document['schema']} is not {SCHEMA}", where=where, fix="calibrate with this version"
            )
        tensors = reader.mapping("tensors")
        table = RangeTable(
            tensors={
                name: _tensor(name, _Reader(facts, f'{where}: tensor "{name}"')) for name, facts in tensors.items()
            },
            samples=reader.integer("samples"),
            data_digest=reader.text("data_digest"),
            model_digest=reader.text("model_digest"),
        )
        reader.done()
        return table


_AGAIN = "calibrate again, or restore the file"


def _facts(tensor: TensorRange) -> dict[str, Any]:
    """As in JSON. Empty bins at both ends are left out; ``first`` is the index of the first that is there."""
    used = np.flatnonzero(tensor.bins.counts)
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, -1)
    facts: dict[str, Any] = {
        "shape_rank": tensor.shape_rank,
        "count": tensor.count,
        "minimum": tensor.minimum,
        "maximum": tensor.maximum,
        "zeros": tensor.zeros,
        "nans": tensor.nans,
        "infs": tensor.infs,
        "low": tensor.bins.low,
        "high": tensor.bins.high,
        "first": first,
        "counts": tensor.bins.counts[first : last + 1].tolist(),
    }
    if tensor.channel_absmax is not None:
        facts["channel_axis"] = tensor.channel_axis
        facts["channel_absmax"] = tensor.channel_absmax.astype(np.float64).tolist()
    return facts


def _tensor(name: str, reader: _Reader) -> TensorRange:
    counts = np.zeros(BINS, np.int64)
    found, first = reader.counts("counts"), reader.integer("first")
    if first + len(found) > BINS:
        raise reader.wrong("counts", f"has bins beyond the last of {BINS}")
    counts[first : first + len(found)] = found
    has_channels = reader.has("channel_absmax")
    tensor = TensorRange(
        name=name,
        shape_rank=reader.integer("shape_rank"),
        count=reader.integer("count"),
        minimum=reader.number("minimum"),
        maximum=reader.number("maximum"),
        zeros=reader.integer("zeros"),
        nans=reader.integer("nans"),
        infs=reader.integer("infs"),
        bins=Histogram(reader.number("low"), reader.number("high"), _frozen(counts)),
        channel_absmax=np.array(reader.numbers("channel_absmax"), np.float32) if has_channels else None,
        channel_axis=reader.integer("channel_axis") if has_channels else None,
    )
    if tensor.minimum > tensor.maximum:
        raise reader.wrong("minimum", "is above maximum")
    _check_grid(tensor, reader)
    reader.done()
    return tensor


def _check_grid(tensor: TensorRange, reader: _Reader) -> None:
    """The grid follows from minimum and maximum; a hand-edited one would be merged wrongly."""
    grid = Histogram.spanning(tensor.minimum, tensor.maximum)
    if (tensor.bins.low, tensor.bins.high) != (grid.low, grid.high):
        raise reader.wrong("low", f"and high are not the grid of this range, [{grid.low}, {grid.high})")
    if tensor.bins.total > tensor.count:
        raise reader.wrong("counts", "are more than count")


class _Reader:
    """Takes checked values out of one JSON object."""

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise DataError("this is not an object", where=where, fix=_AGAIN)
        self._document = document
        self._where = where
        self._read: set[str] = set()

    def wrong(self, key: str, what: str) -> DataError:
        return DataError(f"{key} {what}", where=self._where, fix=_AGAIN)

    def has(self, key: str) -> bool:
        return key in self._document

    def done(self) -> None:
        for key in self._document:
            if key not in self._read:
                raise DataError(f'unknown key "{key}"; {nearest(key, self._read)}', where=self._where, fix=_AGAIN)

    def integer(self, key: str) -> int:
        value = self._value(key)
        if type(value) is not int or value < 0:
            raise self.wrong(key, "is not a count")
        return value

    def number(self, key: str) -> float:
        return self._finite(key, self._value(key))

    def numbers(self, key: str) -> list[float]:
        return [self._finite(key, value) for value in self._list(key)]

    def counts(self, key: str) -> list[int]:
        values = self._list(key)
        if not all(type(value) is int and 0 <= value < 2**63 for value in values):
            raise self.wrong(key, "holds something that is not a count")
        return list(values)

    def text(self, key: str) -> str:
        value = self._value(key)
        if not isinstance(value, str):
            raise self.wrong(key, "is not a text")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._value(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "is not an object")
        return value

    def _list(self, key: str) -> Sequence[Any]:
        value = self._value(key)
        if not isinstance(value, list):
            raise self.wrong(key, "is not a list")
        return value

    def _finite(self, key: str, value: Any) -> float:
        # 2 ** 140: float32 ends at 2 ** 128, and a grid reaches a little beyond its range.
        if type(value) not in (int, float) or not abs(value) < 2.0**140:
            raise self.wrong(key, "is not a finite float32 number")
        return float(value)

    def _value(self, key: str) -> Any:
        if key not in self._document:
            raise DataError(f'the key "{key}" is missing', where=self._where, fix=_AGAIN)
        self._read.add(key)
        return self._document[key]


def _index(value: float, exponent: int) -> int:
    """The bin of a value on the grid of width ``2 ** exponent``."""
    return math.floor(math.ldexp(value, -exponent))


def _frozen(counts: NDArray[Any]) -> Counts:
    counts = counts.astype(np.int64)
    counts.flags.writeable = False
    return counts


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no finite number")


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
