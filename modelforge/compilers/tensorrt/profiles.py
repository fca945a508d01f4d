"""Optimisation profiles from the recipe's dims: a range per symbol, never per tensor. Knows no vendor module.

TensorRT takes minimum, usual and maximum shape of each input, several times over: each such set is one profile.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from modelforge.errors import UnsupportedError
from modelforge.recipe import Dim

MAX_PROFILES = 16
"""Each profile is tuned and stored apart: build time, engine size and device memory grow with their number."""

Sizes = tuple[int, int, int]
"""Minimum, usual and maximum of one symbol."""
Profile = dict[str, list[list[int]]]
"""By input name: its smallest, usual and largest shape."""


def profiles(inputs: Mapping[str, tuple[int | str, ...]], dims: Mapping[str, Dim]) -> list[Profile]:
    """The profiles of a model; empty where every input is of fixed size.

    A symbol with ``min``, ``opt`` and ``max`` has one range. One with ``values`` has a range for each value, from just
    above the value below it up to the value itself, which is what it is tuned for: the sizes between run too.

    Raises:
        UnsupportedError: a symbol has no bounds, min <= opt <= max does not hold, or there would be too many profiles.
    """
    symbols = sorted({size for shape in inputs.values() for size in shape if isinstance(size, str)})
    ranges = [_ranges(symbol, inputs, dims) for symbol in symbols]
    chosen = [dict(zip(symbols, each, strict=True)) for each in itertools.product(*ranges)]
    if len(chosen) > MAX_PROFILES:
        raise UnsupportedError(
            f"the `values` of {', '.join(symbols)} make {len(chosen)} optimisation profiles; at most {MAX_PROFILES}",
            fix="give fewer values, or `min`, `opt` and `max` for all symbols but one",
        )
    if not symbols:
        return []
    return [{name: _shapes(shape, sizes) for name, shape in sorted(inputs.items())} for sizes in chosen]


def spell(profile: Profile) -> list[str]:
    """``x:1x3x8x8,4x3x8x8,8x3x8x8`` for each input."""
    return [
        f"{name}:" + ",".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
        for name, shapes in profile.items()
    ]


def _ranges(symbol: str, inputs: Mapping[str, tuple[int | str, ...]], dims: Mapping[str, Dim]) -> list[Sizes]:
    if symbol not in dims:
        name = next(name for name, shape in inputs.items() if symbol in shape)
        raise UnsupportedError(
            f'the dimension "{symbol}" is dynamic and has no bounds',
            where=f"input {name}",
            fix=f"add to [dims]: {symbol} = {{ min = 1, opt = 4, max = 8 }}",
        )
    dim = dims[symbol]
    if dim.values:
        below = [dim.values[0], *(value + 1 for value in dim.values[:-1])]
        return [(low, value, value) for low, value in zip(below, dim.values, strict=True)]
    sizes = (dim.smallest, dim.usual, dim.largest)
    if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        # The builder says so only after the fact, and set_shape says nothing.
        raise UnsupportedError(
            f"{symbol}: min {sizes[0]}, opt {sizes[1]}, max {sizes[2]} do not rise",
            where=f"dims.{symbol}",
            fix="1 <= min <= opt <= max must hold",
        )
    return [sizes]


def _shapes(shape: tuple[int | str, ...], sizes: Mapping[str, Sizes]) -> list[list[int]]:
    return [[sizes[part][place] if isinstance(part, str) else part for part in shape] for place in range(3)]
