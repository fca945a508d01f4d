"""A recipe's dimensions as ATC wants them: fixed shapes, or gears (the sizes that get code of their own)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelforge.errors import UnsupportedError
from modelforge.recipe import Dim

Shapes = Mapping[str, tuple[int | str, ...]]
LEAST_GEARS = 2


@dataclass(frozen=True)
class Build:
    """One .om: its stem, the shapes that it takes, and the options that say so.

    Attributes:
        shapes: by input name, in the model's order; -1 where gears follow.
        gears: sizes of the symbols, one row a gear; a single row where the shapes are fixed.
        symbols: what the columns of ``gears`` are.
        options: ATC's own words.
    """

    stem: str
    shapes: Mapping[str, tuple[int, ...]]
    symbols: tuple[str, ...]
    gears: tuple[tuple[int, ...], ...]
    options: Mapping[str, str]

    @property
    def is_dynamic(self) -> bool:
        return len(self.gears) > 1


def plan_builds(
    order: Sequence[str], inputs: Shapes, dims: Mapping[str, Dim], *, split: bool, most: int
) -> list[Build]:
    """What is to be built.

    Args:
        order: input names as in the model: gears are listed in that order.
        split: one .om for each combination of sizes instead of gears in one (INT8 has no gears: CANN 8.0 to 9.1,
            general restrictions).
        most: gears that the chip can have.

    Raises:
        UnsupportedError: a name or the number of gears cannot be had.
    """
    shapes = {name: inputs[name] for name in order}
    _check_names(shapes)
    symbols = tuple(dict.fromkeys(size for shape in shapes.values() for size in shape if isinstance(size, str)))
    rows = list(itertools.product(*(dims[symbol].gears for symbol in symbols)))
    if len(rows) == 1:
        return [_fixed("main", shapes, symbols, rows[0])]
    if split:
        return [_fixed("main_" + _spell(symbols, row, dims, shapes), shapes, symbols, row) for row in rows]
    if len(rows) > most:
        factors = " x ".join(f"{len(dims[symbol].gears)} {symbol}" for symbol in symbols)
        raise UnsupportedError(
            f"{len(rows)} gears ({factors}), and ATC takes {LEAST_GEARS} to {most}",
            where="dims",
            fix="give fewer `values`",
        )
    return [_geared(shapes, symbols, rows, dims)]


def _fixed(stem: str, shapes: Shapes, symbols: tuple[str, ...], row: tuple[int, ...]) -> Build:
    sizes = dict(zip(symbols, row, strict=True))
    fixed = {
        name: tuple(sizes[size] if isinstance(size, str) else size for size in shape) for name, shape in shapes.items()
    }
    return Build(stem, fixed, symbols, (row,), {"input_shape": _input_shape(fixed)})


def _geared(
    shapes: Shapes, symbols: tuple[str, ...], rows: Sequence[tuple[int, ...]], dims: Mapping[str, Dim]
) -> Build:
    constant = {symbol: dims[symbol].gears[0] for symbol in symbols if len(dims[symbol].gears) == 1}
    varying = tuple(symbol for symbol in symbols if symbol not in constant)
    opened = {
        name: tuple(constant.get(size, -1) if isinstance(size, str) else size for size in shape)
        for name, shape in shapes.items()
    }
    places = [
        (name, axis, size)
        for name, shape in shapes.items()
        for axis, size in enumerate(shape)
        if isinstance(size, str) and size in varying
    ]
    options = {"input_shape": _input_shape(opened)}
    by_symbol = [dict(zip(symbols, row, strict=True)) for row in rows]
    if len(varying) == 1 and all(axis == 0 for _, axis, _ in places):
        options["dynamic_batch_size"] = ",".join(str(sizes[varying[0]]) for sizes in by_symbol)
    elif _are_image_sizes(shapes, places):
        height, width = places[0][2], places[1][2]
        options["dynamic_image_size"] = ";".join(f"{sizes[height]},{sizes[width]}" for sizes in by_symbol)
    else:
        gears = (",".join(str(sizes[size]) for _, _, size in places) for sizes in by_symbol)
        options |= {"dynamic_dims": ";".join(gears), "input_format": "ND"}
    return Build("main", opened, symbols, tuple(rows), options)


def _are_image_sizes(shapes: Shapes, places: Sequence[tuple[str, int, str]]) -> bool:
    """Height and width of one image vary, and nothing else."""
    return [axis for _, axis, _ in places] == [2, 3] and places[0][0] == places[1][0] and len(shapes[places[0][0]]) == 4


def _input_shape(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ";".join(f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items())


def _check_names(shapes: Shapes) -> None:
    for name in shapes:
        # --input_shape is split at semicolons, and a value may not begin with a space.
        if ";" in name or '"' in name or name != name.strip() or not name.isprintable():
            raise UnsupportedError(
                f'ATC cannot be told the shape of an input called "{name}"',
                where="inputs",
                fix="rename it in the model",
            )


def _spell(symbols: tuple[str, ...], row: tuple[int, ...], dims: Mapping[str, Dim], shapes: Shapes) -> str:
    """``b4``, ``b1_width320``: what varies, batch first and short."""
    batch = {shape[0] for shape in shapes.values() if shape}
    words = []
    for symbol, size in zip(symbols, row, strict=True):
        if len(dims[symbol].gears) > 1:
            plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in symbol)
            words.append(f"b{size}" if symbol in batch else f"{plain}{size}")
    return "_".join(words)
