"""Recipes: every fault is told with file, line, key and the way out; nothing that a user writes ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modelforge.errors import RecipeError
from modelforge.recipe import Dim, Recipe, find_recipe, load_recipe
from modelforge.schema import find_line

GOOD = """\
schema = 1
name = "digits"
version = "1.0.0"

[model]
path = "model.onnx"

[inputs.x]
shape = ["batch", 1, 8, 8]

[dims]
batch = { min = 1, opt = 4, max = 8 }

[calibration]
data = "calibration.npz"
samples = 128

[accuracy]
data = "evaluation.npz"
metric = "top1"
max_drop = 0.01

[serving]
task = "image-classification"
latency_budget_ms = 50
fallback = ["t4"]

[[target]]
tag = "t4"
precision = ["int8", "fp16"]

[[target]]
tag = "x86-64"
precision = ["fp32"]
required = false
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(GOOD)
    return tmp_path


def refused(folder: Path, *said: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder)
    text = str(caught.value)
    for part in said:
        assert part in text, text
    assert "pydantic" not in text
    return caught.value


def test_a_good_recipe(folder: Path) -> None:
    recipe = load_recipe(folder)
    assert recipe == load_recipe(folder / "recipe.toml")
    assert recipe.folder == folder
    assert recipe.model == folder / "model.onnx"
    assert recipe.inputs == {"x": ("batch", 1, 8, 8)}
    assert recipe.dims == {"batch": Dim(min=1, opt=4, max=8)}
    assert [(target.tag, target.precision, target.required) for target in recipe.targets] == [
        ("t4", ("int8", "fp16"), True),
        ("x86-64", ("fp32",), False),
    ]
    assert recipe.accuracy is not None
    assert recipe.accuracy.max_drop == 0.01
    assert recipe.serving.latency_budget_ms == 50


def test_another_compiler_for_a_target_is_told_nothing_that_was_said_to_the_first(folder: Path) -> None:
    """The CPU's part of a partition: the NPU's options are not TVM's."""
    path = folder / "recipe.toml"
    npu = (
        '[[target]]\ntag = "rk3588"\nprecision = ["int8"]\npartition = "npu"\n[target.rockchip]\nquantizer = "native"\n'
    )
    path.write_text(path.read_text() + npu)
    section = load_recipe(folder).targets[-1]
    assert section.sections == {"rockchip": {"quantizer": "native"}}
    assert (section.quantizes("rockchip"), section.quantizes("tvm")) == (True, False)
    beside = section.for_compiler("tvm", "fp32")
    assert (beside.sections, beside.compiler, beside.precision) == ({}, "tvm", ("fp32",))
    assert not beside.quantizes("rockchip")


def test_the_least_that_a_recipe_needs(folder: Path) -> None:
    (folder / "recipe.toml").write_text(
        'schema = 1\nname = "m"\nversion = "0.1.0-rc.1"\nmodel.path = "m.onnx"\n'
        'target = [{ tag = "t4", precision = ["fp16"] }]\n'
    )
    recipe = load_recipe(folder)
    assert recipe.calibration is None
    assert recipe.accuracy is None
    assert recipe.inputs == {}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # Unknown keys, at each level.
        ("schema = 1", 'schema = 1\nnmae = "x"', 'recipe.toml:2: nmae: unknown key "nmae"; did you mean "name"?'),
        ("[model]", "[modle]", 'recipe.toml:5: modle: unknown key "modle"; did you mean "model"?'),
        ("path =", "pth =", 'recipe.toml:6: model.pth: unknown key "pth"; did you mean "path"?'),
        ("shape =", "shap =", 'recipe.toml:9: inputs.x.shap: unknown key "shap"; did you mean "shape"?'),
        ("opt = 4", "otp = 4", 'recipe.toml:12: dims.batch.otp: unknown key "otp"; did you mean "opt"?'),
        ("samples", "sample", 'recipe.toml:16: calibration.sample: unknown key "sample"; did you mean "samples"?'),
        ("max_drop", "maxdrop", 'recipe.toml:21: accuracy.maxdrop: unknown key "maxdrop"; did you mean "max_drop"?'),
        ("task", "tsak", 'recipe.toml:24: serving.tsak: unknown key "tsak"; did you mean "task"?'),
        ("required", "requird", 'recipe.toml:35: target[1].requird: unknown key "requird"; did you mean "required"?'),
        # Missing keys.
        ("schema = 1\n", "", "schema: this key is required and missing"),
        ('name = "digits"', "", "name: this key is required and missing"),
        ('path = "model.onnx"', "", "recipe.toml:5: model.path: this key is required and missing"),
        ('data = "evaluation.npz"', "", "recipe.toml:18: accuracy.data: this key is required and missing"),
        ("max_drop = 0.01", "", "recipe.toml:18: accuracy: metric `top1` needs `max_drop`"),
        ('tag = "x86-64"', "", "recipe.toml:32: target[1].tag: this key is required and missing"),
        ('precision = ["fp32"]', "", "recipe.toml:32: target[1].precision: this key is required and missing"),
        # Wrong types: TOML's types are meant.
        ("schema = 1", "schema = true", "recipe.toml:1: schema: should be a whole number (got true)"),
        ("schema = 1", "schema = 2", "recipe.toml:1: schema"),
        ('name = "digits"', "name = 5", "recipe.toml:2: name: should be a string (got 5)"),
        ('["batch", 1, 8, 8]', '"8"', "recipe.toml:9: inputs.x.shape: should be an array"),
        ('["batch", 1, 8, 8]', '["batch", 1.5, 8, 8]', "recipe.toml:9: inputs.x.shape[1]: should be a whole number"),
        ('["batch", 1, 8, 8]', '["batch", true, 8, 8]', "recipe.toml:9: inputs.x.shape[1]: should be a whole number"),
        (
            '["batch", 1, 8, 8]',
            '["batch", 0, 8, 8]',
            "recipe.toml:9: inputs.x.shape[1]: input should be greater than 0",
        ),
        (
            "samples = 128",
            'samples = "128"',
            "recipe.toml:16: calibration.samples: should be a whole number (got '128')",
        ),
        ("samples = 128", "samples = 0", "calibration.samples: input should be greater than 0"),
        ("max_drop = 0.01", "max_drop = -0.01", "recipe.toml:21: accuracy.max_drop"),
        ("max_drop = 0.01", "max_drop = nan", "accuracy.max_drop: input should be a finite number"),
        ("max_drop = 0.01", "max_drop = inf", "accuracy.max_drop: input should be a finite number"),
        ("latency_budget_ms = 50", "latency_budget_ms = 0", "serving.latency_budget_ms"),
        ("required = false", 'required = "no"', "recipe.toml:35: target[1].required: should be true or false"),
        ('precision = ["fp32"]', "precision = []", "recipe.toml:34: target[1].precision"),
        ('precision = ["fp32"]', 'precision = "fp32"', "recipe.toml:34: target[1].precision: should be an array"),
        ('precision = ["fp32"]', 'precision = ["fp64"]', "'fp32', 'fp16', 'int8' or 'mixed' (got 'fp64')"),
        ("{ min = 1, opt = 4, max = 8 }", "8", "recipe.toml:12: dims.batch: should be a table (got 8)"),
        # Names and versions.
        ('"digits"', '"Digits"', "recipe.toml:2: name: is not of the form"),
        ('"digits"', '"a/b"', "recipe.toml:2: name"),
        ('"digits"', '".."', "recipe.toml:2: name"),
        ('"1.0.0"', '"1.0"', "recipe.toml:3: version: is not of the form that is allowed here (got '1.0')"),
        ('"1.0.0"', '"1.0.0/.."', "three numbers"),
        # Dimensions.
        ('["batch", 1', '["N", 1', 'inputs.x.shape: the symbol "N" has no bounds under [dims]'),
        (
            "[dims]",
            "[dims]\ntime = { min = 1, opt = 1, max = 1 }",
            "recipe.toml:12: dims.time: no input uses the symbol",
        ),
        ("opt = 4, max = 8", "opt = 9, max = 8", "recipe.toml:12: dims.batch: `min` <= `opt` <= `max` must hold"),
        ("min = 1, opt = 4, max = 8", "min = 1, max = 8", "give `min`, `opt` and `max`, or `values`"),
        ("min = 1, opt = 4, max = 8", "min = 1, values = [1]", "not both"),
        ("min = 1, opt = 4, max = 8", "values = [4, 1]", "`values` must rise"),
        ("min = 1, opt = 4, max = 8", "values = [1, 1]", "each size once"),
        ("min = 1, opt = 4, max = 8", "values = []", "dims.batch.values"),
        ("min = 1, opt = 4, max = 8", "values = [0, 1]", "dims.batch.values[0]"),
        # Metrics and targets.
        ('"top1"', '"tpo1"', 'recipe.toml:20: accuracy.metric: unknown metric; did you mean "top1"?'),
        ('"top1"', '"sqnr"', "`min_sqnr_db` instead of `max_drop`"),
        ('tag = "x86-64"', 'tag = "t4"', 'recipe.toml:33: target[1].tag: target "t4" stands twice'),
        ('tag = "x86-64"', 'tag = "x86_64"', "recipe.toml:33: target[1].tag: is not of the form"),
        ('["int8", "fp16"]', '["fp16", "fp16"]', "recipe.toml:30: target[0].precision: a precision stands twice"),
        # A model in a package.
        ('"model.onnx"', '"package:no_such_package/m.onnx"', "pip install --no-deps no-such-package"),
        ('"model.onnx"', '"package:__main__/m.onnx"', "recipe.toml:6: model.path"),
        ('"model.onnx"', '"package:/m.onnx"', "recipe.toml:6: model.path"),
    ],
)
def test_faults(folder: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    (folder / "recipe.toml").write_text(GOOD.replace(old, new))
    refused(folder, said)


def test_keys_that_look_like_pydantic_words_are_named(folder: Path) -> None:
    """Inputs may be called anything; only names that are not in the file are left out of the place."""
    for name in ("X", "Input3", "int", "str", "cpu", "constrained-str", '"a.b"'):
        (folder / "recipe.toml").write_text(GOOD.replace("[inputs.x]", f"[inputs.{name}]").replace("shape", "shpe"))
        refused(folder, f"recipe.toml:9: inputs.{name.strip(chr(34))}.shpe: unknown key")


def test_not_toml_tells_the_line(folder: Path) -> None:
    (folder / "recipe.toml").write_text(GOOD.replace('path = "model.onnx"', "path = model.onnx"))
    refused(folder, "recipe.toml: is not valid TOML", "line 6")


def test_a_key_twice(folder: Path) -> None:
    (folder / "recipe.toml").write_text(GOOD.replace("[dims]", "[model]\n[dims]"))
    refused(folder, "is not valid TOML", "line 11")


def test_not_text(folder: Path) -> None:
    (folder / "recipe.toml").write_bytes(b"\x08\x10\xff\xfe onnx")
    refused(folder, "recipe.toml: is not a text file in UTF-8", "a recipe is a TOML file")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"this folder holds no recipe\.toml"):
        find_recipe(tmp_path)
    with pytest.raises(RecipeError, match="there is no such recipe"):
        find_recipe(tmp_path / "absent.toml")


def test_one_fault_is_enough_and_unknown_keys_come_first(folder: Path) -> None:
    (folder / "recipe.toml").write_text(GOOD.replace('name = "digits"', 'nam = "digits"').replace("= 128", "= 0"))
    refused(folder, 'unknown key "nam"; did you mean "name"?')


def test_where_names_file_line_and_key(folder: Path) -> None:
    recipe = load_recipe(folder)
    assert recipe.where("accuracy", "data") == f"{folder / 'recipe.toml'}:19: accuracy.data"
    assert recipe.where("target", 1, "tag") == f"{folder / 'recipe.toml'}:33: target[1].tag"
    assert recipe.where("calibration", "absent") == f"{folder / 'recipe.toml'}:14: calibration.absent"


def test_lines_of_every_way_to_write_a_key(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('a.b = 1\n[ c . "d.e" ] # [x]\nf = "= 2"\n[[t]]\n"g h" = 1\n[t.sub]\nk = 1\n[[t]]\nk = [\n 1]\n')
    assert find_line(path, ["a", "b"]) == 1
    assert find_line(path, ["c", "d.e"]) == 2
    assert find_line(path, ["c", "d.e", "f"]) == 3
    assert find_line(path, ["t", 0, "g h"]) == 5
    assert find_line(path, ["t", 0, "sub", "k"]) == 7
    assert find_line(path, ["t", 1, "k", 0]) == 9
    assert find_line(path, ["t", 2]) == 4, "the nearest that stands there"
    assert find_line(path, ["nowhere"]) is None
    assert find_line(tmp_path / "absent.toml", ["a"]) is None


def test_dims() -> None:
    assert Dim(min=1, opt=4, max=8).gears == (1, 4, 8)
    assert Dim(min=2, opt=2, max=8).gears == (2, 8)
    gears = Dim(values=(1, 6))
    assert (gears.smallest, gears.usual, gears.largest, gears.gears) == (1, 6, 6, (1, 6))
    assert gears.facts() == {"values": [1, 6]}


def _toml(value: Any) -> str:
    """A value as TOML: JSON, but for tables, and for the floats that JSON has not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=6)
_words = st.sampled_from(
    ["schema", "name", "x", "cpu", "int", "shape", "batch", "data", "top1", "fp16", "t4", "min", "max", "values"]
)
_values = st.recursive(
    st.booleans() | st.integers(-2, 300) | st.floats() | _text | _words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text | _words, inner, max_size=3),
    max_leaves=6,
)
_BASE: dict[str, Any] = {
    "schema": 1,
    "name": "digits",
    "version": "1.0.0",
    "model": {"path": "model.onnx"},
    "inputs": {"x": {"shape": ["batch", 1, 8, 8]}},
    "dims": {"batch": {"min": 1, "opt": 4, "max": 8}},
    "calibration": {"data": "c.npz", "samples": 8},
    "accuracy": {"data": "e.npz", "metric": "top1", "max_drop": 0.01},
    "serving": {"task": "t", "fallback": ["t4"]},
    "target": [{"tag": "t4", "precision": ["fp16"]}, {"tag": "x86-64", "precision": ["fp32"], "required": False}],
}


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return ([path] if path else []) + [found for key, item in items for found in _paths(item, (*path, key))]


@settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.sampled_from(_paths(_BASE)), st.booleans(), _values, _text | _words), max_size=3))
@example(changes=[])
def test_any_change_gives_a_recipe_or_a_recipe_error(tmp_path: Path, changes: list[Any]) -> None:
    data = json.loads(json.dumps(_BASE))
    for path, replace, value, key in changes:
        table: Any = data
        for part in path[:-1]:
            inside = isinstance(table, dict) and part in table
            table = table[part] if inside or (isinstance(table, list) and isinstance(part, int)) else {}
        if isinstance(table, dict):
            table[path[-1] if replace else key] = value
        elif isinstance(table, list) and isinstance(path[-1], int) and path[-1] < len(table):
            table[path[-1]] = value
    path = tmp_path / "recipe.toml"
    path.write_text("".join(f"{json.dumps(key)} = {_toml(value)}\n" for key, value in data.items()), encoding="utf-8")
    try:
        outcome: Recipe | RecipeError = load_recipe(path)
    except RecipeError as error:
        outcome = error
    if isinstance(outcome, Recipe):
        symbols = {size for shape in outcome.inputs.values() for size in shape if isinstance(size, str)}
        assert symbols == set(outcome.dims)
        return
    assert changes, "nothing was changed"
    assert outcome.where is not None
    assert outcome.where.startswith(str(path))
