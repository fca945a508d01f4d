"""Ascend from recipe to bundle: compiled with the double of ATC, deferred without one, finalized where one is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.compilers.ascend import double
from tests.conftest import ROOT, Forge, edit_targets

TAGS = ("ascend-310", "ascend-310p3", "ascend-310b4", "ascend-910b3")
NO_ATC = {"MODELFORGE_ATC": "/there/is/none"}


def with_atc(folder: Path, **facts: Any) -> dict[str, str]:
    made = double.install(folder)
    made.drive(**facts)
    return {"MODELFORGE_ATC": str(made.root)}


def test_digits_int8_for_four_chips(forge: Forge, digits: Path, tmp_path: Path) -> None:
    edit_targets(digits, {tag: ["int8", "fp16"] for tag in TAGS})
    done = forge("build", digits, "--json", **with_atc(tmp_path))
    assert done.code == 0, done.err
    variants = {each["target"]: each for each in done.json["variants"]}
    assert set(variants) == set(TAGS)
    for each in variants.values():
        assert (each["status"], each["precision"], each["compiler"]) == (
            "compiled",
            "int8",
            "ascend",
        )
        # The record says that no real CANN compiled this.
        assert each["toolchain"]["cann"] == "8.2.RC1-double"
        assert each["runtime"]["needs"]["cann"] == ">=8.2.RC1-double"
        assert each["accuracy"]["evidence"] == "reference"
        assert each["accuracy"]["gate"] == "passed"
        assert each["accuracy"]["sqnr_db"] > 30
        assert any("AscendQuant" in note for note in each["notes"])
        assert "not verified on a device" in each["notes"]
        # min, opt and max: three files, as INT8 has no gears.
        assert [command[5] for command in each["commands"]] == [f"--input_shape=x:{n},1,8,8" for n in (1, 4, 8)]
    text = json.dumps(done.json)
    assert str(tmp_path) not in text.replace(str(done.json["path"]), "")


def test_digits_fp16_with_gears(forge: Forge, digits: Path, tmp_path: Path) -> None:
    edit_targets(digits, {"ascend-310p3": ["fp16"]})
    done = forge("build", digits, "--json", **with_atc(tmp_path))
    assert done.code == 0, done.err
    (variant,) = done.json["variants"]
    assert (variant["status"], variant["precision"]) == ("compiled", "fp16")
    assert variant["artifact"]["file"] == "main.om"
    (command,) = variant["commands"]
    assert {"--input_shape=x:-1,1,8,8", "--dynamic_batch_size=1,4,8"} <= set(command)
    assert "--precision_mode=must_keep_origin_dtype" in command


def test_without_any_atc_it_is_exit_4_or_deferred_and_finalized(forge: Forge, digits: Path, tmp_path: Path) -> None:
    edit_targets(digits, {"ascend-310b4": ["int8", "fp16"]})
    refused = forge("build", digits, **NO_ATC)
    assert refused.code == 4
    assert "MODELFORGE_ATC" in refused.err
    assert not (tmp_path / "dist").exists()
    deferred = forge("build", digits, "--allow-deferred", "--json", **NO_ATC)
    assert deferred.code == 0, deferred.err
    (variant,) = deferred.json["variants"]
    assert variant["status"] == "deferred"
    assert variant["accuracy"]["gate"] == "passed"
    done = forge(
        "finalize",
        deferred.json["path"],
        "--target",
        "ascend-310b4",
        "-o",
        "final",
        "--json",
        **with_atc(tmp_path),
    )
    assert done.code == 0, done.err
    (variant,) = forge("inspect", "final", "--json").json["variants"]
    assert (variant["status"], variant["precision"]) == ("compiled", "int8")
    assert variant["toolchain"]["cann"] == "8.2.RC1-double"


def test_what_fails_on_one_chip_fails_that_variant_only(forge: Forge, digits: Path, tmp_path: Path) -> None:
    edit_targets(
        digits,
        {"ascend-310p3": ["fp16"], "x86-64": ["fp32"]},
        extra="required = false\n",
    )
    environment = with_atc(
        tmp_path,
        code="EZ3003",
        message="No supported Ops kernel and engine are found for [conv], optype [Conv2D].",
    )
    done = forge("build", digits, "--json", **environment)
    assert done.code == 0, done.err
    variants = {each["target"]: each for each in done.json["variants"]}
    assert variants["x86-64"]["status"] == "compiled"
    assert variants["ascend-310p3"]["status"] == "failed"
    reason = json.dumps(variants["ascend-310p3"])
    assert "EZ3003" in reason
    assert "conv (Conv2D)" in reason


def test_quantize_writes_what_atc_reads(forge: Forge, digits: Path, tmp_path: Path) -> None:
    done = forge(
        "quantize",
        digits / "model.onnx",
        "--data",
        digits / "calibration.npz",
        "--dialect",
        "ascend",
        "-o",
        "q.onnx",
    )
    assert done.code == 0, done.err
    types = {node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node}
    assert {"AscendQuant", "AscendDequant"} <= types
    assert not {"QuantizeLinear", "DequantizeLinear"} & types


def test_preprocessing_becomes_aipp(forge: Forge, digits: Path, tmp_path: Path) -> None:
    recipe = digits / "recipe.toml"
    edit_targets(digits, {"ascend-310p3": ["fp16"]})
    section = '[inputs.x.preprocess]\nsource = "gray8"\ncolour = "gray"\nmean = [0.0]\nstd = [255.0]\n\n'
    recipe.write_text(recipe.read_text().replace("\n[dims]\n", f"\n{section}[dims]\n", 1))
    done = forge("build", digits, "--json", **with_atc(tmp_path))
    assert done.code == 0, done.err
    assert "--insert_op_conf=aipp.cfg" in done.json["variants"][0]["commands"][0]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ('source = "gray8"\ncolour = "rgb"', "colour = rgb makes 3 channels, and the input has 1"),
        ('source = "gray8"\ncolour = "gray"\nmean = [300.0]', "mean 300 is not between 0 and 255"),
        ('source = "gray8"\ncolour = "gray"\nsize = [100, 100]', "AIPP does not resize"),
    ],
)
def test_what_aipp_cannot_do_is_told_by_the_plan(forge: Forge, digits: Path, section: str, words: str) -> None:
    """Without ATC: nothing was compiled to find out."""
    recipe = digits / "recipe.toml"
    edit_targets(digits, {"ascend-310p3": ["fp16"]})
    text = f"[inputs.x.preprocess]\n{section}\n\n"
    recipe.write_text(recipe.read_text().replace("\n[dims]\n", f"\n{text}[dims]\n", 1))
    refused = forge("plan", digits)
    assert refused.code == 2, refused.err
    assert words in refused.err
    assert "inputs.x.preprocess" in refused.err
    assert "how to mend" in refused.err


def recipe_for(
    folder: Path,
    model: str | Path,
    name: str,
    shape: list[Any],
    dims: str,
    samples: Any,
    precision: str,
) -> Path:
    """A recipe that judges by SQNR alone, for models whose labels we do not have."""
    folder.mkdir()
    half = len(samples) // 2
    np.savez(folder / "calibration.npz", **{name: samples[:half]})
    np.savez(folder / "evaluation.npz", **{name: samples[half:]})
    targets = "".join(f'[[target]]\ntag = "{tag}"\nprecision = ["{precision}"]\n' for tag in TAGS)
    (folder / "recipe.toml").write_text(
        f'schema = 1\nname = "m"\nversion = "1.0.0"\n[model]\npath = "{model}"\n[inputs."{name}"]\n'
        f"shape = {json.dumps(shape)}\n"
        f'{dims}[calibration]\ndata = "calibration.npz"\nfloor = 8\n'
        f'[accuracy]\ndata = "evaluation.npz"\nmetric = "sqnr"\n'
        f"min_sqnr_db = {25.0 if precision == 'fp16' else 9.0}\n{targets}"
    )
    return folder


def lines(count: int, height: int, width: int) -> Any:
    """Dark strokes on light paper, in -1..1: what text detectors and readers look at."""
    random = np.random.default_rng(3)
    page = np.full((count, 3, height, width), 0.9, np.float32)
    for image in page:
        for _ in range(height * width // 500):
            top, left = random.integers(0, height - 8), random.integers(0, width - 12)
            image[
                :,
                top : top + random.integers(2, 8),
                left : left + random.integers(1, 12),
            ] = -0.8
    return page + random.normal(0, 0.02, page.shape).astype(np.float32)


def resnet(path: Path) -> Path:
    """onnx's ResNet-50 has constants for weights: random ones, of the size that keeps activations alive."""
    random = np.random.default_rng(1)
    model = onnx.load(Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx")
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    variances, scales = ({node.input[place] for node in norms} for place in (4, 1))
    nodes = [node for node in model.graph.node if node.op_type != "ConstantOfShape"]
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            continue
        shape, name = shapes[node.input[0]].tolist(), node.output[0]
        values = random.normal(size=shape) * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.15)
        values = np.ones(shape) if name in variances else 0.6 + 0.2 * random.random(shape) if name in scales else values
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.ir_version = 8
    onnx.save(model, path)
    return path


BATCH = "[dims]\nbatch = { values = [1, 4] }\n"


@pytest.mark.slow  # ten builds of real networks, half of them quantized: two to four minutes
@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize("kind", ["cls", "det", "rec", "resnet50", "yolov8n"])
def test_real_models_for_four_chips(kind: str, precision: str, forge: Forge, tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    ocr = "package:rapidocr_onnxruntime/models/"
    if kind == "cls":  # the recipe of the repository, on lines of text with their labels
        shutil.copytree(ROOT / "recipes" / "ppocr-cls", folder)
        edit_targets(folder, {tag: [precision] for tag in TAGS})
    elif kind == "det":
        recipe_for(
            folder,
            ocr + "ch_PP-OCRv4_det_infer.onnx",
            "x",
            [1, 3, 160, 160],
            "",
            lines(16, 160, 160),
            precision,
        )
    elif kind == "rec":
        model = ocr + "ch_PP-OCRv4_rec_infer.onnx"
        recipe_for(
            folder,
            model,
            "x",
            ["batch", 3, 48, 320],
            BATCH,
            lines(16, 48, 320),
            precision,
        )
    elif kind == "resnet50":
        name, images = "gpu_0/data_0", lines(16, 224, 224)
        recipe_for(
            folder,
            resnet(tmp_path / "resnet50.onnx"),
            name,
            [1, 3, 224, 224],
            "",
            images,
            precision,
        )
    else:
        images = (lines(16, 320, 320) + 1) / 2
        recipe_for(
            folder,
            "package:nudenet/320n.onnx",
            "images",
            ["batch", 3, 320, 320],
            BATCH,
            images,
            precision,
        )
    done = forge("build", folder, "--json", "--jobs", "2", **with_atc(tmp_path))
    assert done.code == 0, done.err
    for each in done.json["variants"]:
        assert (each["status"], each["precision"]) == ("compiled", precision)
        assert each["accuracy"]["gate"] == "passed"
