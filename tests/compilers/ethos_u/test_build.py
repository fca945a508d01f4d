"""A user's int8 .tflite through the whole way: compiled by Vela, judged by LiteRT against FP32 ONNX, bundled."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from modelforge.bundle.read import open_bundle
from tests.compilers.ethos_u.digits import describe, write
from tests.conftest import Forge, edit_targets

pytestmark = pytest.mark.ethos_u
OPTION = '\n[target.ethos-u]\nmodel = "digits.tflite"\n'


@pytest.fixture
def ethos_forge(ethos_u_home: Path, tmp_path: Path) -> Forge:
    return Forge(ethos_u_home, tmp_path)


def recipe(digits: Path, model: Path | None, tag: str = "ethos-u55-128", precision: str = "int8") -> Path:
    edit_targets(digits, {tag: [precision]}, OPTION)
    text = (digits / "recipe.toml").read_text()
    start, end = text.index("[calibration]"), text.index("[accuracy]")
    (digits / "recipe.toml").write_text(text[:start] + text[end:])  # the file is quantized already
    if model is not None:
        shutil.copyfile(model, digits / "digits.tflite")
    return digits


def test_compiled_judged_and_described(ethos_forge: Forge, digits: Path, int8_tflite: Path) -> None:
    done = ethos_forge("build", recipe(digits, int8_tflite), "--json")
    assert done.code == 0, done.err
    bundle = open_bundle(ethos_forge.cwd / "dist" / "digits-1.0.0")
    (variant,) = bundle.select("ethos-u55-128")
    record = variant.record
    assert (record.compiler, record.precision, record.calibration) == ("ethos-u", "int8", None)
    accuracy = record.accuracy
    assert (accuracy.evidence, accuracy.gate, accuracy.samples) == ("reference", "passed", 360)
    assert accuracy.sqnr_db is not None
    assert 25 < accuracy.sqnr_db < 60, "it is the int8 file that ran, not the FP32 model"
    assert any("LiteRT's reference kernels" in note for note in record.notes)
    assert not any("in ONNX Runtime" in note for note in record.notes)
    assert b"ethos-u" in bundle.file(variant, "main_vela.tflite").read_bytes()
    assert bundle.file(variant, "given.tflite").read_bytes() == int8_tflite.read_bytes()
    (row,) = csv.DictReader(bundle.file(variant, "vela.csv").read_text().splitlines())
    assert (row["system_config"], row["memory_mode"]) == ("Ethos_U55_High_End_Embedded", "Shared_Sram")
    assert float(row["cycles_total"]) > 1000
    (port,) = json.loads(bundle.file(variant, "ethos-u.json").read_bytes())["inputs"]
    assert (port["dtype"], port["zero_point"], port["permute"]) == ("int8", -128, [0, 2, 3, 1])
    assert ethos_forge("verify", ethos_forge.cwd / "dist" / "digits-1.0.0").code == 0


def test_another_file_is_another_build(
    ethos_forge: Forge, digits: Path, int8_tflite: Path, environment: object, tmp_path: Path
) -> None:
    """The file is named in the recipe and is no part of it: its content must be part of the key."""
    recipe(digits, int8_tflite)
    keys = [step["key"] for step in ethos_forge("plan", digits, "--json").json["steps"] if step["step"] == "compile"]
    (digits / "digits.tflite").write_bytes(int8_tflite.read_bytes() + b"\0")
    again = [step["key"] for step in ethos_forge("plan", digits, "--json").json["steps"] if step["step"] == "compile"]
    assert len(keys) == len(again) == 1
    assert keys != again


def test_a_file_that_computes_something_else_fails_the_gate(
    ethos_forge: Forge, digits: Path, ethos_u_home: Path, tmp_path: Path
) -> None:
    from modelforge.compilers.ethos_u import toolchain
    from modelforge.toolchains import environments

    other = describe(tmp_path)
    weight = next(each for each in other["tensors"] if each["name"] == "logits/w")
    weight["data"] = np.roll(np.array(weight["data"]), 1, axis=0).tolist()
    python = environments.require(toolchain(), ethos_u_home).python
    done = ethos_forge("build", recipe(digits, write(other, tmp_path / "other.tflite", python)))
    assert done.code == 3
    assert "top1 drops by" in done.err


def test_a_float_file_is_refused(ethos_forge: Forge, digits: Path, float_tflite: Path) -> None:
    done = ethos_forge("build", recipe(digits, float_tflite))
    assert done.code == 2
    assert "x of the .tflite file is float32" in done.err
    assert not (ethos_forge.cwd / "dist").exists()


def test_a_file_of_another_model_is_refused(ethos_forge: Forge, digits: Path, int8_tflite: Path) -> None:
    (digits / "any").write_bytes(b"no flatbuffer")
    assert "is no .tflite file" in ethos_forge("build", recipe(digits, digits / "any")).err


def test_what_is_wrong_in_the_recipe_is_told_at_plan_time(ethos_forge: Forge, digits: Path, int8_tflite: Path) -> None:
    done = ethos_forge("plan", recipe(digits, None))
    assert (done.code, "there is no file digits.tflite" in done.err) == (2, True)
    edit_targets(digits, {"ethos-u55-128": ["int8"]})
    done = ethos_forge("plan", digits)
    assert (done.code, "Vela reads .tflite files" in done.err) == (2, True)


def test_without_the_toolchain_nothing_stands_in_for_it(forge: Forge, digits: Path, int8_tflite: Path) -> None:
    """The FP32 model in ONNX Runtime would pass any gate."""
    done = forge("build", recipe(digits, int8_tflite), "--allow-deferred")
    assert (done.code, "modelforge toolchain install ethos-u" in done.err) == (4, True)
