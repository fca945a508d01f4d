"""Sizes that contradict the model are told before any build; the real builder is asked what it makes of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers.protocol import CompileJob, Wanted
from modelforge.compilers.tensorrt.driver import TensorRtCompiler, TensorRtRtxCompiler
from modelforge.compilers.tensorrt.preflight_sizes import contradictions, one_symbol_two_sizes
from modelforge.compilers.tensorrt.profiles import profiles
from modelforge.errors import ModelForgeError, UnsupportedError
from modelforge.graph.inspect import inspect_model
from modelforge.recipe import Dim
from tests.compilers.tensorrt.models import ask_builder, gpu
from tests.conftest import Forge

Shape = tuple[int | str, ...]
HALF = np.float16
N = Dim(min=1, opt=4, max=8)


def model(path: Path, node: onnx.NodeProto, inputs: dict[str, Shape], output: Shape, **weights: np.ndarray) -> Path:
    def value(name: str, shape: Shape) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)

    graph = helper.make_graph(
        [node],
        "sizes",
        [value(name, shape) for name, shape in inputs.items()],
        [value("y", output)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def add(path: Path, a: Shape, b: Shape) -> Path:
    return model(path, helper.make_node("Add", ["a", "b"], ["y"], name="add"), {"a": a, "b": b}, ("k", 4))


def reshape(path: Path, *wanted: int) -> Path:
    node = helper.make_node("Reshape", ["a", "shape"], ["y"], name="reshape")
    return model(
        path, node, {"a": ("n", 4)}, tuple("m" if each < 1 else each for each in wanted), shape=np.int64(wanted)
    )


def refused_by_builder(path: Path, inputs: dict[str, Shape], dims: dict[str, Dim], workdir: Path) -> bool:
    try:
        ask_builder(path, 80, workdir, profiles(inputs, dims))
    except ModelForgeError:
        return True
    return False


def test_what_the_builder_refuses_at_the_usual_sizes(tmp_path: Path) -> None:
    """Each case with sizes that fit and with sizes that do not: our verdict is the builder's."""
    kernel = np.ones((1, 2, 5, 5), HALF)
    conv = model(
        tmp_path / "conv.onnx", helper.make_node("Conv", ["a", "w"], ["y"], name="conv"),
        {"a": (1, 2, "h", "h")}, (1, 1, "k", "k"), w=kernel,
    )  # fmt: skip
    fixed = model(
        tmp_path / "fixed.onnx", helper.make_node("Add", ["a", "w"], ["y"], name="add"), {"a": ("n", 4)}, ("n", 4),
        w=np.ones((3, 4), HALF),
    )  # fmt: skip
    cases: list[tuple[Path, dict[str, Shape], dict[str, Dim], str | None]] = [
        (reshape(tmp_path / "r0.onnx", 2, 8), {"a": ("n", 4)}, {"n": Dim(min=4, opt=4, max=4)}, None),
        (reshape(tmp_path / "r1.onnx", -1, 8), {"a": ("n", 4)}, {"n": Dim(min=2, opt=4, max=8)}, None),
        (reshape(tmp_path / "r2.onnx", -1, 8), {"a": ("n", 4)}, {"n": Dim(min=1, opt=3, max=8)}, "node reshape"),
        (reshape(tmp_path / "r3.onnx", 0, 2, 2), {"a": ("n", 4)}, {"n": N}, None),
        (fixed, {"a": ("n", 4)}, {"n": Dim(min=3, opt=3, max=3)}, None),
        (fixed, {"a": ("n", 4)}, {"n": Dim(min=1, opt=2, max=8)}, "node add (Add)"),
        (conv, {"a": (1, 2, "h", "h")}, {"h": Dim(min=5, opt=8, max=9)}, None),
        (add(tmp_path / "a0.onnx", ("n", 4), ("m", 4)), {"a": ("n", 4), "b": ("m", 4)}, {"n": N, "m": N}, None),
        (
            add(tmp_path / "a1.onnx", ("n", 4), ("m", 4)), {"a": ("n", 4), "b": ("m", 4)},
            {"n": Dim(min=2, opt=3, max=3), "m": Dim(min=5, opt=6, max=7)}, "node add (Add)",
        ),
    ]  # fmt: skip
    for place, (path, inputs, dims, words) in enumerate(cases):
        found = contradictions(path, inputs, dims)
        assert bool(found) == (words is not None), (path.name, found)
        assert words is None or words in found[0].what
        assert refused_by_builder(path, inputs, dims, tmp_path / str(place)) == bool(found), path.name


@pytest.mark.parametrize(
    ("wanted", "dims", "words"),
    [
        ((2, 8), N, "n = 1: node reshape (Reshape): it would make the 4 elements of [1, 4] into the 16 of [2, 8]"),
        ((2, 8), N, "n = 8: node reshape (Reshape): it would make the 32 elements of [8, 4] into the 16 of [2, 8]"),
        ((-1, 8), N, "n = 1: node reshape (Reshape)"),
        ((-1, 8), Dim(values=(2, 4, 7)), "n = 7: node reshape (Reshape)"),
    ],
)
def test_what_only_fails_at_an_end_is_refused_too(
    tmp_path: Path, wanted: tuple[int, ...], dims: Dim, words: str
) -> None:
    """The builder warns and builds: its engine would fail when it is given these sizes."""
    path = reshape(tmp_path / "m.onnx", *wanted)
    assert any(words in each.what for each in contradictions(path, {"a": ("n", 4)}, {"n": dims}))


def test_an_end_that_the_builder_lets_pass(tmp_path: Path) -> None:
    """Why this is stricter than the builder: it says so itself, in a warning."""
    path = reshape(tmp_path / "m.onnx", 2, 8)
    answer = ask_builder(path, 80, tmp_path / "work", profiles({"a": ("n", 4)}, {"n": N}))
    assert any("kMAX values are not self-consistent" in warning for warning in answer["warnings"])


def test_a_window_larger_than_the_smallest_image(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["a", "w"], ["y"], name="conv")
    inputs: dict[str, Shape] = {"a": (1, 2, "h", "h")}
    path = model(tmp_path / "m.onnx", node, inputs, (1, 1, "k", "k"), w=np.ones((1, 2, 5, 5), HALF))
    (found,) = contradictions(path, inputs, {"h": Dim(min=3, opt=8, max=9)})
    assert "h = 3: node conv (Conv)" in found.what


# -- one name of the model, two sizes of the recipe


@pytest.mark.parametrize(
    ("shapes", "dims", "words"),
    [
        ({"a": ("n", 4), "b": ("m", 4)}, {"n": N, "m": Dim(min=1, opt=2, max=6)}, "n (1, 4, 8) and m (1, 2, 6)"),
        ({"a": ("n", 4), "b": (2, 4)}, {"n": N}, "n (1, 4, 8) and 2"),
        ({"a": (4, 4), "b": (2, 4)}, {}, "4 and 2"),
        ({"a": ("n", 4), "b": ("n", 4)}, {"n": N}, None),
        ({"a": (4, 4), "b": (4, 4)}, {}, None),
    ],
)
def test_one_symbol_of_two_inputs(
    tmp_path: Path, shapes: dict[str, Shape], dims: dict[str, Dim], words: str | None
) -> None:
    path = add(tmp_path / "m.onnx", ("k", 4), ("k", 4))
    facts = inspect_model(path, cost=False)
    found = one_symbol_two_sizes(facts, shapes, dims)
    assert len(found) == (words is not None)
    if words is not None:
        assert words in found[0].what
        assert "input a, axis 0 and input b, axis 0" in found[0].what
    for compiler in (TensorRtCompiler(), TensorRtRtxCompiler()):
        wanted = Wanted(path, facts, gpu(80), "fp16", shapes, dims)
        assert [each.what for each in compiler.supports_recipe(wanted)] == [each.what for each in found]


def test_what_the_builder_makes_of_one_symbol(tmp_path: Path) -> None:
    """It refuses two ranges, and narrows a range to another input's fixed size without a word: then 1, 4 and 8 fail."""
    path = add(tmp_path / "m.onnx", ("k", 4), ("k", 4))
    ranges: dict[str, Shape] = {"a": ("n", 4), "b": ("m", 4)}
    assert refused_by_builder(path, ranges, {"n": N, "m": Dim(min=1, opt=2, max=6)}, tmp_path / "two")
    assert not refused_by_builder(path, {"a": ("n", 4), "b": (2, 4)}, {"n": N}, tmp_path / "fixed")
    assert not refused_by_builder(path, {"a": ("n", 4), "b": ("n", 4)}, {"n": N}, tmp_path / "same")


def test_names_of_the_model_alone_prove_nothing(tmp_path: Path) -> None:
    """Two names may well have the same size, and an unnamed one any."""
    path = add(tmp_path / "m.onnx", ("p", 4), ("q", 4))
    facts = inspect_model(path, cost=False)
    assert one_symbol_two_sizes(facts, {"a": ("n", 4), "b": (1, 4)}, {"n": N}) == []


# -- through the doors


def test_a_lowered_model_is_held_against_its_sizes_before_the_build(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    job = CompileJob(
        model=reshape(tmp_path / "m.onnx", 2, 8), target=gpu(80), precision="fp16", inputs={"a": ("n", 4)},
        dims={"n": N}, workdir=tmp_path / "work", timeout=60,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"n = 1: node reshape \(Reshape\)"):
        TensorRtRtxCompiler().compile(job)
    assert not list((tmp_path / "work").iterdir())


RECIPE = """
schema = 1
name = "sizes"
version = "1.0.0"
[model]
path = "model.onnx"
[inputs.a]
shape = ["batch", 4]
[inputs.b]
shape = [{b}, 4]
[dims]
batch = {{ min = 1, opt = 4, max = 8 }}
other = {other}
[accuracy]
data = "data.npz"
metric = "cosine"
max_drop = 0.01
[[target]]
tag = "a100"
precision = ["fp16"]
"""


@pytest.mark.parametrize(
    ("shared", "other", "words"),
    [
        (True, "{ min = 1, opt = 2, max = 6 }", "they are one size, and the recipe gives"),
        (False, "{ min = 2, opt = 3, max = 6 }", "node add (Add)"),
        (True, "{ min = 6, opt = 2, max = 8 }", "`min` <= `opt` <= `max` must hold"),
    ],
)
def test_the_plan_refuses_such_a_recipe(forge: Forge, tmp_path: Path, shared: bool, other: str, words: str) -> None:
    add(tmp_path / "model.onnx", ("k", 4), ("k" if shared else "l", 4))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", **{name: rng.standard_normal((16, 4)).astype(HALF) for name in "ab"})
    (tmp_path / "recipe.toml").write_text(RECIPE.format(b='"other"', other=other))
    refused = forge("plan", tmp_path)
    assert refused.code == 2
    assert words in refused.err, refused.err
