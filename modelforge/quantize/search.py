"""The fewest layers to keep in float so that a gate is met: exclusion prefixes of a ranking, then a bisection.

Pure: what a prefix is worth is asked of a function. Knows no model and no metric; see
:mod:`modelforge.quantize.sensitivity` for how the two go together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
"""Of sensitivity.json."""


Trial = tuple[bool, Mapping[str, Any]]
"""What an evaluation says: whether the gate is met, and the figures measured, JSON-able, for the curve."""


@dataclass(frozen=True)
class SearchResult:
    """What was found, and what was tried.

    Attributes:
        exclude: the names to keep in float, worst first: exactly this tuple was evaluated, and met the gate; None
            where nothing that was tried did.
        curve: all evaluations by number of excluded layers: ``{"excluded": n, ...figures, "gate": "passed"}`` (or
            ``"failed"``).
        worst: names at the head of the ranking, for the message where the gate is not met.
    """

    exclude: tuple[str, ...] | None
    curve: tuple[Mapping[str, Any], ...]
    worst: tuple[str, ...]

    @property
    def chosen(self) -> int | None:
        """How many layers are excluded; the first so many of the ranking."""
        return None if self.exclude is None else len(self.exclude)

    def facts(self, metric: str, ranking: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """sensitivity.json; ``ranking`` is what :meth:`modelforge.quantize.sensitivity.Sensitivity.facts` gives."""
        return {
            "schema": SCHEMA,
            "metric": metric,
            "ranking": [dict(layer) for layer in ranking],
            "curve": [dict(point) for point in self.curve],
            "chosen": self.chosen,
        }


def search_exclusions(
    ranking: Sequence[str | Sequence[str]],
    evaluate: Callable[[tuple[str, ...]], Trial],
    *,
    least: int = 0,
    limit: int | None = None,
) -> SearchResult:
    """Find the smallest prefix of the ranking that, kept in float, meets the gate.

    Tries the first 0, 1, 2, 4, 8, ... entries until the gate is met, then bisects between the last that failed and the
    first that passed: at most ``2 log2(n) + 3`` evaluations of n entries. Errors of layers cancel, so that keeping one
    more in float can be worse: the answer is the smallest prefix *that was seen to pass*, a smaller one that was never
    tried may pass as well, and where every prefix tried fails, one between them might not have.

    Args:
        ranking: names, worst first; an entry with several names is a block that is kept in float as one.
        evaluate: is given the names to exclude; called once for each prefix. What it raises ends the search.
        least: fewest entries to exclude: 1 where it is known that none is too few.
        limit: most entries to exclude; by default all but the last, as INT8 without a quantized layer is none.

    Raises:
        ValueError: a name stands in the ranking twice, or ``limit`` is negative.
    """
    blocks = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in ranking]
    names = [name for block in blocks for name in block]
    if len(set(names)) != len(names):
        raise ValueError("a layer stands in the ranking twice")
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}")
    most = max(len(blocks) - 1, 0) if limit is None else min(limit, len(blocks))
    tried: dict[int, tuple[tuple[str, ...], Trial]] = {}

    def passes(count: int) -> bool:
        excluded = tuple(name for block in blocks[:count] for name in block)
        tried[count] = excluded, evaluate(excluded)
        return tried[count][1][0]

    failed = min(least, most) - 1
    for count in (each for each in _steps(most) if each > failed):
        if passes(count):
            _bisect(failed, count, passes)
            break
        failed = count
    best = min((count for count, (_, (passed, _)) in tried.items() if passed), default=None)
    return SearchResult(
        exclude=None if best is None else tried[best][0],
        curve=tuple(_point(*tried[count]) for count in sorted(tried)),
        worst=tuple(names[:8]),
    )


def _steps(most: int) -> list[int]:
    """0, 1, 2, 4, ... and ``most`` itself."""
    powers = [2**exponent for exponent in range(most.bit_length())]
    return sorted({0, *powers, most})


def _bisect(failed: int, passed: int, passes: Callable[[int], bool]) -> None:
    while passed - failed > 1:
        middle = (failed + passed) // 2
        if passes(middle):
            passed = middle
        else:
            failed = middle


def _point(excluded: tuple[str, ...], trial: Trial) -> dict[str, Any]:
    passed, figures = trial
    own = {"excluded": len(excluded), "gate": "passed" if passed else "failed"}
    return {"excluded": len(excluded), **figures, **own}
