"""What the recipe may say about input shapes: one rule for inspection, preparation and specialisation.

Works on plain values: no onnx object here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelforge.errors import ModelError, nearest

Shape = tuple[int | str, ...]
"""Sizes; a symbol is a string and ``"?"`` a size that has no name."""


def dimension(value: int | str | None) -> int | str:
    """One spelling for sizes that are not known: exporters write -1, 0, ``"?"`` or an empty name.

    (0 is a legal size, but an input of no elements is what an exporter that means "any" wrote.)
    """
    if isinstance(value, int):
        return value if value > 0 else "?"
    text = (value or "").strip()
    return text if text and text not in ("?", "-1", "None", "unk") else "?"


def bind_shapes(
    declared: Mapping[str, Shape | None], wanted: Mapping[str, Sequence[int | str]], where: str
) -> tuple[dict[str, Shape | None], dict[str, int | str]]:
    """Put the wanted shapes of some inputs over the declared ones.

    Args:
        declared: shape by input name as the model has it; None where the rank is unknown.
        wanted: shape by input name as the recipe has it.
        where: the model's path, for messages.

    Returns:
        the new shape of every input, and what became of each symbol that the model used: other inputs and the
        outputs follow it.

    Raises:
        ModelError: an unknown input, another rank, a fixed size contradicted, one symbol given two meanings.
    """
    renamed: dict[str, int | str] = {}
    for name, shape in wanted.items():
        if name not in declared:
            raise ModelError(
                f'the model has no input "{name}"', where=where, fix=nearest(name, declared) or "it has no inputs"
            )
        _match(name, declared[name], shape, renamed, where)
    bound: dict[str, Shape | None] = {}
    for name, old in declared.items():
        if name in wanted:
            bound[name] = tuple(dimension(size) for size in wanted[name])
        else:
            bound[name] = None if old is None else tuple(renamed.get(str(size), size) for size in old)
    return bound, renamed


def _match(
    name: str, declared: Shape | None, wanted: Sequence[int | str], renamed: dict[str, int | str], where: str
) -> None:
    if declared is None:
        return
    if len(declared) != len(wanted):
        raise ModelError(
            f'input "{name}" has {len(declared)} dimensions {list(declared)}, not {len(wanted)} {list(wanted)}',
            where=where,
            fix=f"give one size or symbol for each dimension of {list(declared)}",
        )
    for axis, (old, new) in enumerate(zip(declared, wanted, strict=True)):
        if isinstance(old, int):
            if old != new:
                raise ModelError(
                    f'input "{name}" has the fixed size {old} at axis {axis}, not {new!r}',
                    where=where,
                    fix=f"write {old} there, or export the model with that dimension dynamic",
                )
        elif old != "?" and renamed.setdefault(old, new) != new:
            raise ModelError(
                f'input "{name}", axis {axis}: the model names this size "{old}" as another dimension that the '
                f"recipe sets to {renamed[old]!r}, so it cannot be {new!r}",
                where=where,
                fix="give both the same size or symbol",
            )
