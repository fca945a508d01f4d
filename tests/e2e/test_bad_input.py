"""Bad input: an exit code, one message that says what, where and how to mend, and nothing written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import ROOT, Forge, edit_targets

Edit = Callable[[str, str], None]


def refused(forge: Forge, recipe: Path, code: int, *said: str) -> None:
    """The build is refused with this code, its message says all this, and nothing was written."""
    before = sorted(recipe.rglob("*")) if recipe.is_dir() else []
    done = forge("build", recipe)
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.count("error:") == 1, done.err
    for word in said:
        assert word in done.err, f"{word!r} is not in: {done.err}"
    assert not forge.home.exists()
    assert not (forge.cwd / "dist").exists()
    assert before == (sorted(recipe.rglob("*")) if recipe.is_dir() else [])
    document = forge("build", recipe, "--json").json
    assert document["error"]["exit_code"] == code


def test_missing_recipe(forge: Forge) -> None:
    refused(forge, forge.cwd / "nowhere", 2, "nowhere", "no such recipe")


def test_folder_without_recipe(forge: Forge) -> None:
    (forge.cwd / "empty").mkdir()
    refused(forge, forge.cwd / "empty", 2, "no recipe.toml", "modelforge init")


def test_missing_model(forge: Forge, digits: Path) -> None:
    (digits / "model.onnx").unlink()
    refused(forge, digits, 2, "model.onnx")


def test_text_file_named_onnx(forge: Forge, digits: Path) -> None:
    (digits / "model.onnx").write_text("hello world\n" * 100)
    refused(forge, digits, 2, "model.onnx", "ONNX")


def test_truncated_model(forge: Forge, digits: Path) -> None:
    data = (digits / "model.onnx").read_bytes()
    (digits / "model.onnx").write_bytes(data[: len(data) // 2])
    refused(forge, digits, 2, "model.onnx")


def test_missing_external_data(forge: Forge, digits: Path) -> None:
    model = onnx.load(digits / "model.onnx")
    onnx.save(
        model,
        digits / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    (digits / "weights.bin").unlink()
    refused(forge, digits, 2, "weights.bin")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_drop", "max_dorp", 'did you mean "max_drop"?'),
        ('tag = "x86-64"', 'tag = "x86_64"', "x86_64"),
        ('tag = "x86-64"', 'tag = "cortex-a67"', 'did you mean "cortex-a76"?'),
        ("[inputs.x]", "[inputs.images]", 'no input "images"'),
        (
            '["batch", 1, 8, 8]',
            '["batch", 1, 9, 8]',
            "dimension 2 is 8 in the model, and 9 in the recipe",
        ),
        ('["batch", 1, 8, 8]', '["batch", 1, 8]', "4 dimensions"),
        (
            "min = 1, opt = 4, max = 8",
            "min = 8, opt = 4, max = 1",
            "`min` <= `opt` <= `max`",
        ),
        ('precision = ["fp32"]', 'precision = ["fp31"]', "fp32"),
        ('"evaluation.npz"', '"evalation.npz"', "evalation.npz"),
        ('metric   = "top1"', 'metric   = "tpo1"', 'did you mean "top1"?'),
        ("schema  = 1", "schema  = 2", "schema"),
        (
            '["cortex-a76", "t4", "a100"]',
            '["cortex-a76", "t4", "a10"]',
            'there is no target "a10"',
        ),
    ],
)
def test_recipe_faults(forge: Forge, digits: Path, edit: Edit, old: str, new: str, said: str) -> None:
    edit(old, new)
    refused(forge, digits, 2, said, "recipe.toml")


@pytest.mark.parametrize("section", ["accuracy", "calibration"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.astype(np.float64), "float64, the model wants float32"),
        (lambda x: x[:, :, :7], "[samples, 1, 8, 8]"),
        (
            lambda x: np.where(np.arange(len(x))[:, None, None, None] == 57, np.nan, x).astype(np.float32),
            "sample 57",
        ),
        (lambda x: x[:0], "no samples"),
    ],
    ids=["dtype", "shape", "nan", "empty"],
)
def test_data_faults(
    forge: Forge,
    digits: Path,
    section: str,
    spoil: Callable[[np.ndarray], np.ndarray],
    said: str,
) -> None:
    name = {"accuracy": "evaluation.npz", "calibration": "calibration.npz"}[section]
    arrays = dict(np.load(digits / name))
    np.savez(digits / name, **{**arrays, "x": spoil(arrays["x"])})
    if section == "accuracy" and said == "no samples":
        np.savez(digits / name, x=spoil(arrays["x"]), label=arrays["label"][:0])
    refused(forge, digits, 2, said, f"{section}.data")


def test_wrong_key_in_data(forge: Forge, digits: Path) -> None:
    arrays = dict(np.load(digits / "evaluation.npz"))
    np.savez(digits / "evaluation.npz", image=arrays["x"], label=arrays["label"])
    refused(forge, digits, 2, 'the key "image" is no input of the model')


def test_labels_of_another_length(forge: Forge, digits: Path) -> None:
    arrays = dict(np.load(digits / "evaluation.npz"))
    np.savez(digits / "evaluation.npz", x=arrays["x"], label=arrays["label"][:-1])
    refused(forge, digits, 2, "359 entries for 360 samples")


def test_labels_missing(forge: Forge, digits: Path) -> None:
    np.savez(digits / "evaluation.npz", x=np.load(digits / "evaluation.npz")["x"])
    refused(forge, digits, 2, "needs labels")


def test_target_without_a_compiler(forge: Forge, digits: Path) -> None:
    profile = (ROOT / "targets" / "ascend-310p3.toml").read_text().replace('["ascend"]', '["of-tomorrow"]')
    (digits / "targets").mkdir()
    (digits / "targets" / "a-new-chip.toml").write_text(profile)
    edit_targets(digits, {"a-new-chip": ["fp16"]})
    refused(forge, digits, 4, "a-new-chip", "required = false")


def test_missing_toolchain(forge: Forge, digits: Path) -> None:
    """TensorRT-RTX hidden from importlib.metadata, as on a machine where the extra was not installed."""
    edit_targets(digits, {"t4": ["fp16"]})
    hidden = forge.cwd / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "found = m.version\n"
        "def version(name):\n"
        "    if 'tensorrt' in name: raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.version = version\n"
    )
    done = forge("build", digits, PYTHONPATH=str(hidden))
    assert done.code == 4, done.err
    assert "modelforge[tensorrt-rtx]" in done.err
    assert not forge.home.exists()
    plan = forge("plan", digits, "--allow-deferred", "--json", PYTHONPATH=str(hidden)).json
    assert plan["variants"][0]["outcome"] == "deferred"
    done = forge("build", digits, "--allow-deferred", "--json", PYTHONPATH=str(hidden))
    assert done.code == 0, done.err
    record = done.json["variants"][0]
    assert (record["status"], record["artifact"], record["precision"]) == (
        "deferred",
        None,
        "fp16",
    )
    assert record["accuracy"]["evidence"] == "reference"
    files = {each["file"] for each in forge("inspect", "dist/digits-1.0.0", "--target", "t4", "--json").json["files"]}
    assert {"model.onnx", "golden-inputs.npz", "golden-outputs.npz"} <= files


def test_a_precision_that_the_compiler_lacks(forge: Forge, digits: Path) -> None:
    edit_targets(digits, {"x86-64": ["fp16"]}, 'compiler = "tvm"')
    refused(forge, digits, 2, "fp16", "x86-64")


def test_op_that_a_compiler_lacks(forge: Forge, digits: Path) -> None:
    """TVM's importer has no Det; the message names the operator and the node."""
    nodes = [
        helper.make_node("Det", ["x"], ["determinant"], name="my_det"),
        helper.make_node("Flatten", ["determinant"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, digits / "model.onnx")
    text = (digits / "recipe.toml").read_text()
    (digits / "recipe.toml").write_text(text.replace('"top1"', '"cosine"'))
    edit_targets(digits, {"cortex-a76": ["fp32"]}, 'compiler = "tvm"')
    refused(forge, digits, 2, "Det", "my_det")


def test_misspelt_command_and_option(forge: Forge) -> None:
    done = forge("biuld")
    assert done.code == 2
    assert 'did you mean "build"?' in done.err
    done = forge("build", "--traget", "t4", "x")
    assert done.code == 2
    assert "--traget" in done.err


def test_target_that_the_recipe_lacks(forge: Forge, digits: Path) -> None:
    done = forge("build", digits, "--target", "x86-46")
    assert done.code == 2
    assert 'did you mean "x86-64"?' in done.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


def test_cache_disk_full_midway(forge: Forge, digits: Path, small_disk: Path) -> None:
    done = forge("build", digits, MODELFORGE_HOME=str(small_disk / "home"))
    assert done.code == 1, done.err
    assert "no space left" in done.err
    assert "MODELFORGE_HOME" in done.err
    assert not (forge.cwd / "dist" / "digits-1.0.0").exists()
    # With room again the same command completes, and what is in the cache is whole.
    assert forge("build", digits).code == 0
    assert forge("cache", "verify", MODELFORGE_HOME=str(small_disk / "home")).code == 0


def test_output_disk_full(forge: Forge, digits: Path, small_disk: Path) -> None:
    done = forge("build", digits, "-o", small_disk / "out")
    assert done.code == 1, done.err
    assert "no space left" in done.err
    assert [path for path in small_disk.rglob("*") if path.is_file() and "digits-1.0.0" in str(path)] == []


def test_read_only_output(forge: Forge, digits: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = forge("build", digits, "-o", small_disk / "out")
    assert done.code == 2, done.err
    assert "cannot be written" in done.err
    assert not forge.home.exists()


def test_output_is_a_file(forge: Forge, digits: Path) -> None:
    (forge.cwd / "taken").write_text("mine")
    done = forge("build", digits, "-o", forge.cwd / "taken")
    assert done.code == 2
    assert (forge.cwd / "taken").read_text() == "mine"
