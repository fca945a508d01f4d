"""AIPP configurations: the text, by the guide's own examples, and the formula, computed back."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.ascend.aipp import ImageInput, render
from modelforge.errors import UnsupportedError
from modelforge.options import PreprocessSection

IMAGE = ImageInput("x", 0, "float32", (1, 3, 224, 224))
GRAY = ImageInput("x", 0, "float32", (1, 1, 28, 28))


def read(text: str) -> dict[str, str]:
    """The fields of a single aipp_op, as protobuf's text format has them."""
    inside = re.fullmatch(r"aipp_op \{\n(.*)\}\n", text, re.DOTALL)
    assert inside is not None
    return dict(line.strip().split(" : ") for line in inside[1].splitlines())


def rendered(image: ImageInput = IMAGE, **section: Any) -> dict[str, str]:
    return read(render([(image, PreprocessSection.model_validate(section))]))


def test_imagenet() -> None:
    found = rendered(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
    assert found == {
        "aipp_mode": "static", "related_input_rank": "0", "input_format": "RGB888_U8", "src_image_size_w": "224",
        "src_image_size_h": "224", "crop": "false", "csc_switch": "false", "rbuv_swap_switch": "false",
        "mean_chn_0": "123", "min_chn_0": "0.675", "var_reci_chn_0": "0.017124754",
        "mean_chn_1": "116", "min_chn_1": "0.28", "var_reci_chn_1": "0.017507003",
        "mean_chn_2": "103", "min_chn_2": "0.53", "var_reci_chn_2": "0.017429194",
    }  # fmt: skip


@given(st.floats(0, 255), st.floats(0.01, 300), st.integers(0, 255))
def test_the_formula_gives_what_the_recipe_says(mean: float, std: float, pixel: int) -> None:
    """out = (pixel - mean_chn - min_chn) * var_reci_chn, mean_chn being a byte and the others FP16."""
    found = rendered(GRAY, mean=[mean], std=[std], source="gray8", colour="gray")
    whole, rest, factor = int(found["mean_chn_0"]), float(found["min_chn_0"]), float(found["var_reci_chn_0"])
    assert 0 <= whole <= 255
    assert 0 <= rest <= 1
    got = (pixel - whole - float(np.float16(rest))) * float(np.float16(factor))
    assert got == pytest.approx((pixel - mean) / std, rel=2e-3, abs=2e-3 / std + 1e-3)


@pytest.mark.parametrize(
    ("source", "colour", "fields"),
    [
        ("rgb888", "rgb", {"input_format": "RGB888_U8", "csc_switch": "false", "rbuv_swap_switch": "false"}),
        ("rgb888", "bgr", {"input_format": "RGB888_U8", "csc_switch": "false", "rbuv_swap_switch": "true"}),
        ("bgr888", "rgb", {"input_format": "RGB888_U8", "csc_switch": "false", "rbuv_swap_switch": "true"}),
        ("bgr888", "bgr", {"input_format": "RGB888_U8", "csc_switch": "false", "rbuv_swap_switch": "false"}),
        ("yuv420sp", "rgb", {"input_format": "YUV420SP_U8", "matrix_r0c2": "359", "matrix_r2c1": "454"}),
        ("yuv420sp", "bgr", {"input_format": "YUV420SP_U8", "matrix_r0c1": "454", "matrix_r2c2": "359"}),
    ],
)
def test_colours_as_the_guide_has_them(source: str, colour: str, fields: dict[str, str]) -> None:
    found = rendered(source=source, colour=colour)
    assert {name: found[name] for name in fields} == fields


@pytest.mark.parametrize(("source", "swap"), [("rgb888", "false"), ("bgr888", "true")])
def test_gray_from_colour(source: str, swap: str) -> None:
    found = rendered(GRAY, source=source, colour="gray")
    assert (found["csc_switch"], found["rbuv_swap_switch"]) == ("true", swap)
    assert [found[f"matrix_r0c{column}"] for column in range(3)] == ["76", "150", "30"]
    assert "mean_chn_1" not in found


def test_a_crop_says_where_it_begins() -> None:
    found = rendered(size=[256, 300], crop=[16, 38, 224, 224])
    assert (found["src_image_size_w"], found["src_image_size_h"]) == ("300", "256")
    assert (found["load_start_pos_w"], found["load_start_pos_h"]) == ("38", "16")
    assert (found["crop_size_w"], found["crop_size_h"]) == ("224", "224")


def test_gears_of_height_and_width_leave_the_size_open() -> None:
    found = rendered(ImageInput("x", 0, "float32", (1, 3, -1, -1)))
    assert (found["src_image_size_w"], found["src_image_size_h"], found["crop"]) == ("0", "0", "false")


def test_each_input_gets_its_own_operator() -> None:
    second = ImageInput("y", 2, "float32", (1, 3, 64, 64))
    text = render([(IMAGE, PreprocessSection()), (second, PreprocessSection())])
    assert re.findall(r"related_input_rank : (\d)", text) == ["0", "2"]


@pytest.mark.parametrize(
    ("image", "section", "says"),
    [
        (ImageInput("x", 0, "int64", (1, 3, 8, 8)), {}, "feeds floats"),
        (ImageInput("x", 0, "float32", (1, 3)), {}, "images"),
        (ImageInput("x", 0, "float32", (1, 4, 8, 8)), {}, "the input has 4"),
        (ImageInput("x", 0, "float32", (1, 3, 8, 5000)), {}, "4096"),
        (IMAGE, {"colour": "gray"}, "makes 1 channels"),
        (IMAGE, {"mean": [0.485, 300.0, 0.406]}, "scale of pixels"),
        (IMAGE, {"mean": [1.0, 2.0]}, "2 values for 3 channels"),
        (IMAGE, {"std": [1e-9]}, "FP16"),
        (IMAGE, {"size": [256, 256]}, "does not resize"),
        (IMAGE, {"crop": [0, 0, 224, 224]}, "needs `size`"),
        (IMAGE, {"size": [256, 256], "crop": [40, 0, 224, 224]}, "beyond"),
        (IMAGE, {"size": [256, 256], "crop": [0, 0, 200, 224]}, "the model takes 224"),
        (IMAGE, {"source": "yuv420sp", "size": [256, 256], "crop": [1, 0, 224, 224]}, "even"),
        (IMAGE, {"source": "gray8"}, "makes no rgb of gray8"),
        (IMAGE, {"swap_uv": True}, "yuv420sp only"),
        (ImageInput("x", 0, "float32", (1, 3, -1, -1)), {"size": [9, 9], "crop": [0, 0, 8, 8]}, "gears"),
    ],
)
def test_what_aipp_cannot_do_is_refused(image: ImageInput, section: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        render([(image, PreprocessSection.model_validate(section))])
    assert says in str(caught.value)
