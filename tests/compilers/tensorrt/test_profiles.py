"""Profiles: one range a symbol, one profile a gear, and nothing that the builder would take in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.tensorrt.profiles import MAX_PROFILES, profiles, spell
from modelforge.errors import UnsupportedError
from modelforge.recipe import Dim

sizes = st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True).map(lambda each: tuple(sorted(each)))


def test_one_symbol_in_two_inputs_has_one_range() -> None:
    inputs = {"b": ("batch", 3), "a": (2, "batch")}
    (profile,) = profiles(inputs, {"batch": Dim(min=1, opt=4, max=8)})
    assert profile == {"a": [[2, 1], [2, 4], [2, 8]], "b": [[1, 3], [4, 3], [8, 3]]}
    assert spell(profile) == ["a:2x1,2x4,2x8", "b:1x3,4x3,8x3"]


def test_fixed_inputs_need_no_profile() -> None:
    assert profiles({"x": (1, 3, 8, 8)}, {}) == []


def test_a_dynamic_dimension_without_bounds_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match='"width" is dynamic and has no bounds') as caught:
        profiles({"x": (1, 3, "width")}, {})
    assert caught.value.where == "input x"


def test_sizes_that_do_not_rise_are_refused() -> None:
    wrong = Dim.model_construct(min=8, opt=4, max=8, values=None)
    with pytest.raises(UnsupportedError, match="min 8, opt 4, max 8 do not rise"):
        profiles({"x": ("batch",)}, {"batch": wrong})


def test_too_many_profiles_are_refused() -> None:
    dims = {name: Dim(values=(1, 2, 3, 4, 5)) for name in ("height", "width")}
    with pytest.raises(UnsupportedError, match=f"25 optimisation profiles; at most {MAX_PROFILES}"):
        profiles({"x": ("height", "width")}, dims)


@given(sizes, st.integers(1, 64))
def test_gears_cover_each_size_once_and_are_tuned_for_their_value(values: tuple[int, ...], size: int) -> None:
    found = [each["x"] for each in profiles({"x": ("batch", 3)}, {"batch": Dim(values=values)})]
    assert [usual[0] for _, usual, _ in found] == list(values)
    holding = [place for place, (low, _, high) in enumerate(found) if low[0] <= size <= high[0]]
    assert len(holding) == (values[0] <= size <= values[-1])
