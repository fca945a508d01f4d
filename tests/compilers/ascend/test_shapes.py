"""Dimensions as gears: written out, and held against the double's own reading of the options."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.ascend.options import render, typed
from modelforge.compilers.ascend.shapes import plan_builds
from modelforge.errors import UnsupportedError
from modelforge.recipe import Dim
from tests.compilers.ascend.double import SOURCE


def values(*sizes: int) -> Dim:
    return Dim(values=sizes)


DIMS = {"batch": values(1, 4, 8), "height": values(48, 64), "width": values(160, 320, 640), "one": values(7)}


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ({"x": (1, 3, 8, 8)}, {"input_shape": "x:1,3,8,8"}),
        ({"x": (), "y": (3,)}, {"input_shape": "x:;y:3"}),
        ({"x": ("one", 3)}, {"input_shape": "x:7,3"}),
        ({"x": ("batch", 3, 8, 8)}, {"input_shape": "x:-1,3,8,8", "dynamic_batch_size": "1,4,8"}),
        (
            {"a:0": ("batch", 3), "b": ("batch", "one")},
            {"input_shape": "a:0:-1,3;b:-1,7", "dynamic_batch_size": "1,4,8"},
        ),
        (
            {"x": (1, 3, "height", "width")},
            {"input_shape": "x:1,3,-1,-1", "dynamic_image_size": "48,160;48,320;48,640;64,160;64,320;64,640"},
        ),
        (
            {"x": (1, 3, 48, "width")},
            {"input_shape": "x:1,3,48,-1", "dynamic_dims": "160;320;640", "input_format": "ND"},
        ),
        (
            {"x": (1, "width"), "y": (1, "width", 2)},
            {"input_shape": "x:1,-1;y:1,-1,2", "dynamic_dims": "160,160;320,320;640,640", "input_format": "ND"},
        ),
        (
            {"x": ("batch", 3, 48, "height")},
            {"input_shape": "x:-1,3,48,-1", "dynamic_dims": "1,48;1,64;4,48;4,64;8,48;8,64", "input_format": "ND"},
        ),
    ],
)
def test_the_words(inputs: dict[str, tuple[int | str, ...]], options: dict[str, str]) -> None:
    (build,) = plan_builds(list(inputs), inputs, DIMS, split=False, most=100)
    assert build.stem == "main"
    assert build.options == options


def test_a_range_becomes_its_three_sizes() -> None:
    (build,) = plan_builds(["x"], {"x": ("n", 3)}, {"n": Dim(min=1, opt=4, max=16)}, split=False, most=100)
    assert build.options["dynamic_batch_size"] == "1,4,16"


def test_int8_gets_one_file_a_size() -> None:
    builds = plan_builds(["x"], {"x": ("batch", 3, 48, "width")}, DIMS, split=True, most=100)
    assert [build.stem for build in builds] == [f"main_b{n}_width{w}" for n in (1, 4, 8) for w in (160, 320, 640)]
    assert builds[4].options == {"input_shape": "x:4,3,48,320"}
    assert not any(build.is_dynamic for build in builds)


def test_order_is_the_model_s_not_the_recipe_s() -> None:
    inputs: dict[str, tuple[int | str, ...]] = {"b": (1, "width"), "a": (1, "height")}
    (build,) = plan_builds(["a", "b"], inputs, DIMS, split=False, most=100)
    assert build.options["input_shape"] == "a:1,-1;b:1,-1"
    assert build.options["dynamic_dims"].startswith("48,160;48,320")


def test_too_many_gears_are_refused() -> None:
    dims = {"h": values(*range(1, 12)), "w": values(*range(1, 11))}
    with pytest.raises(UnsupportedError, match=r"110 gears.*2 to 100"):
        plan_builds(["x"], {"x": (1, 3, "h", "w")}, dims, split=False, most=100)
    assert len(plan_builds(["x"], {"x": (1, 3, "h", "w")}, dims, split=False, most=256)[0].gears) == 110


@pytest.mark.parametrize("name", ["a;b", " a", "a\n", 'a"b'])
def test_a_name_that_cannot_be_said_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="cannot be told"):
        plan_builds([name], {name: (1,)}, {}, split=False, most=100)


def _double() -> ModuleType:
    loader = SourceFileLoader("atc_double", str(SOURCE / "atc"))
    spec = importlib.util.spec_from_loader("atc_double", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


ATC = _double()
NAMES = st.text("abcxyz_:./0", min_size=1, max_size=6)
SIZES = st.one_of(st.integers(1, 9), st.sampled_from(["h", "w", "n"]))


@given(
    st.dictionaries(NAMES, st.lists(SIZES, min_size=1, max_size=5).map(tuple), min_size=1, max_size=3),
    st.fixed_dictionaries(
        {name: st.sets(st.integers(1, 99), min_size=1, max_size=4).map(sorted) for name in ("h", "w", "n")}
    ),
    st.booleans(),
)
def test_whatever_the_shapes_atc_can_read_what_is_said(
    inputs: dict[str, tuple[int | str, ...]], gears: dict[str, list[int]], split: bool
) -> None:
    """The double's parser and shape checks are its own; every size of the recipe must be among what it reads."""
    dims = {name: Dim(values=tuple(sizes)) for name, sizes in gears.items()}
    model = {name: [size if isinstance(size, int) else -1 for size in shape] for name, shape in inputs.items()}
    for build in plan_builds(list(inputs), inputs, dims, split=split, most=100):
        read = ATC.parse(render(typed({"model": "m", "output": build.stem, **build.options})))
        shapes = ATC.input_shapes(read["input_shape"], model)
        assert list(shapes) == list(inputs)
        kinds = [name for name in read if name.startswith("dynamic_")]
        assert len(kinds) == int(build.is_dynamic)
        for kind in kinds:
            ATC.gears(kind, read[kind], shapes)
        if not kinds:
            assert not any(-1 in shape for shape in shapes.values())
