"""Which nodes must stay in FP32 so that FP16 is near enough: a search for the fewest, on calibration samples.

Every model that is tried is run with each FP16 tensor rounded explicitly, as a CPU's FP16 says nothing of rounding (see
:mod:`modelforge.graph.fp16_emulation`). Knows no gate: what is asked for comes as a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from modelforge.graph.compare import open_session
from modelforge.graph.fp16 import halve
from modelforge.graph.fp16_emulation import emulated
from modelforge.graph.load import INLINE_BYTES, load, model_files
from modelforge.graph.passes import InferShapes, LiftConstants, UniqueNames, run_passes
from modelforge.quantize.search import Trial, search_exclusions

Array = NDArray[Any]

WANTED_DB = 45.0
"""SQNR of the worst output on calibration samples below which nodes are looked for."""
MARGIN_DB = 1.0
"""What is asked for beyond that of a model that was searched for: other samples are not the ones it was found on."""
SEGMENTS = 16
"""Runs of nodes, one behind the other, that are first tried as one: a value between two nodes is rounded unless both of
them are in FP32, so that single nodes do not help."""
PARTS = 5
"""What a segment that is kept is cut into, to see how much of it is needed."""
TRIALS = 48
"""Models that are tried at most."""
HELD_BYTES = 256 << 20
"""Of samples and their FP32 outputs, beyond which no more samples are taken: outputs may be whole pictures."""


@dataclass(frozen=True)
class HalfSearch:
    """What was found.

    Attributes:
        wanted_db: what was asked for.
        before_db, after_db: SQNR of the worst output without and with ``kept``, on the samples.
        kept: names of the nodes to keep in FP32; empty where none are needed, or no set that was tried was enough.
        trials: how many models were run, ``samples`` each.
    """

    wanted_db: float
    before_db: float
    after_db: float
    kept: tuple[str, ...]
    trials: int
    samples: int

    @property
    def reason(self) -> str:
        """Why the kept nodes are."""
        return (
            f"with it and {len(self.kept) - 1} more in FP16 an output has {self.before_db:.1f} dB on calibration data, "
            f"without {self.after_db:.1f}; asked for are {self.wanted_db:.0f}"
        )

    def facts(self) -> dict[str, Any]:
        """JSON-able; an SQNR that is not finite is None."""
        figures = {"before_db": self.before_db, "after_db": self.after_db}
        rounded = {name: round(value, 2) if math.isfinite(value) else None for name, value in figures.items()}
        count = {"kept": len(self.kept), "trials": self.trials, "samples": self.samples}
        return {"wanted_db": self.wanted_db, **rounded, **count}


def search_half(
    model: Path,
    feeds: Iterable[Mapping[str, Array]],
    *,
    keep: Collection[str] = (),
    wanted_db: float = WANTED_DB,
    least_db: float | None = None,
) -> HalfSearch | None:
    """The fewest more nodes to keep in FP32 for an SQNR of ``wanted_db``; None where the model is too large to tell.

    The noise that each of :data:`SEGMENTS` runs of nodes makes alone ranks them; prefixes of that ranking are tried, at
    most half of all, and of what is kept then, parts are given back as long as it is enough.

    Args:
        model: what :func:`modelforge.graph.prepare.prepare` wrote.
        feeds: a few calibration samples by input name, as the model takes them; never those that it is judged by.
        keep: nodes that stay in FP32 anyhow.
        least_db: what to be content with where ``wanted_db`` is out of reach.

    Raises:
        RuntimeError: ONNX Runtime fails on the model (its classes derive from RuntimeError or Exception).
    """
    if sum(file.stat().st_size for file in model_files(model)) > INLINE_BYTES // 2:
        return None
    laboratory = _Laboratory(Path(model), feeds, frozenset(keep))
    before = laboratory.sqnr_db(())
    wanted = [wanted_db] if least_db is None else [wanted_db, min(least_db, wanted_db)]
    kept: tuple[str, ...] = ()
    after = before
    for asked in wanted:
        if before >= asked:
            break
        kept, after = _search(laboratory, asked + MARGIN_DB)
        if kept:
            break
    return HalfSearch(wanted_db, before, after if kept else before, kept, laboratory.trials, laboratory.samples)


def _search(laboratory: _Laboratory, asked: float) -> tuple[tuple[str, ...], float]:
    """The nodes to keep, and what that reaches; none where it is not enough."""
    segments = _cut(laboratory.nodes, SEGMENTS)
    everything = {*laboratory.nodes}
    alone = {segment: laboratory.sqnr_db(everything.difference(segment)) for segment in segments}
    ranked = sorted(segments, key=lambda segment: alone[segment])  # stable: equal ones in graph order

    def evaluate(names: tuple[str, ...]) -> Trial:
        reached = laboratory.sqnr_db(names)
        return reached >= asked, {"sqnr_db": reached}

    found = search_exclusions(ranked, evaluate, limit=max(len(ranked) // 2, 1))
    if not found.exclude:
        return (), -math.inf
    kept = set(found.exclude)
    # What is likely to be needed least first: the rearmost parts of the segment that makes the least noise.
    chosen = [segment for segment in reversed(ranked) if kept.issuperset(segment)]
    for part in (part for segment in chosen for part in reversed(_cut(segment, PARTS))):
        if laboratory.trials >= TRIALS:
            break
        if len(part) < len(kept) and laboratory.sqnr_db(kept.difference(part)) >= asked:
            kept.difference_update(part)
    return tuple(name for name in laboratory.nodes if name in kept), laboratory.sqnr_db(kept)


def _cut(names: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Into so many runs of about the same length, none empty."""
    ends = [round(len(names) * place / count) for place in range(count + 1)]
    return [tuple(names[start:end]) for start, end in itertools.pairwise(ends) if end > start]


class _Laboratory:
    """Runs one model with various nodes in FP32; each set once."""

    def __init__(self, model: Path, feeds: Iterable[Mapping[str, Array]], keep: frozenset[str]) -> None:
        graph = load(model)
        run_passes(graph, [LiftConstants(), UniqueNames(), InferShapes()], str(model))
        onnx_ir.external_data.load_to_model(graph)
        self._source = onnx_ir.to_proto(graph)
        self._keep = keep
        self.nodes = halve(graph, keep).nodes
        session = open_session(self._source)
        self._names = [output.name for output in session.get_outputs() if output.type == "tensor(float)"]
        self._samples: list[tuple[Mapping[str, Array], list[Array]]] = []
        held = 0
        for feed in feeds:
            self._samples.append((feed, session.run(self._names, dict(feed))))
            held += sum(array.nbytes for array in (*feed.values(), *self._samples[-1][1]))
            if held > HELD_BYTES:
                break
        self._reached: dict[frozenset[str], float] = {}

    @property
    def samples(self) -> int:
        return len(self._samples)

    @property
    def trials(self) -> int:
        return len(self._reached)

    def sqnr_db(self, more: Collection[str]) -> float:
        """SQNR of the worst output with these in FP32, too; infinite where all are exact."""
        key = frozenset(more)
        if key not in self._reached:
            self._reached[key] = self._measure(key)
        return self._reached[key]

    def _measure(self, more: frozenset[str]) -> float:
        graph = onnx_ir.serde.deserialize_model(self._source)
        halve(graph, self._keep | more)
        session = open_session(emulated(onnx_ir.to_proto(graph)))
        signal, noise = np.zeros(len(self._names)), np.zeros(len(self._names))
        for feed, exact in self._samples:
            for place, (wanted, got) in enumerate(zip(exact, session.run(self._names, dict(feed)), strict=True)):
                signal[place] += np.square(wanted, dtype=np.float64).sum()
                noise[place] += np.square(np.subtract(wanted, got, dtype=np.float64)).sum()
        if not np.isfinite(noise).all():
            return -math.inf
        found = [10 * math.log10(s / n) if s > 0 else -math.inf for s, n in zip(signal, noise, strict=True) if n > 0]
        return min(found, default=math.inf)
