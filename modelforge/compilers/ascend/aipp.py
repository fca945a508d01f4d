"""``[inputs.NAME.preprocess]`` as an AIPP configuration: raw 8-bit images in, normalized by the chip itself.

The text format, the ranges and the colour matrices are those of the ATC guide's chapter on AIPP (github.com/hicann/ge,
docs/zh/user_guides/atc_tools/AIPP).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modelforge.errors import UnsupportedError
from modelforge.options import PreprocessSection

INPUT_FORMATS = {"rgb888": "RGB888_U8", "bgr888": "RGB888_U8", "yuv420sp": "YUV420SP_U8", "gray8": "YUV400_U8"}

_LARGEST_SIDE = 4096

# Rows of the matrix and input biases, by (source, colour); JPEG's and BT.601's full range, which CANN's guide calls
# JPEG or BT-601WIDE. A pair without a row needs no colour conversion, or cannot be had.
_YUV_TO_RGB = ((256, 0, 359), (256, -88, -183), (256, 454, 0))
_RGB_TO_GRAY = ((76, 150, 30), (0, 0, 0), (0, 0, 0))
_MATRICES: Mapping[tuple[str, str], tuple[Sequence[Sequence[int]], Sequence[int]]] = {
    ("yuv420sp", "rgb"): (_YUV_TO_RGB, (0, 128, 128)),
    ("yuv420sp", "bgr"): (_YUV_TO_RGB[::-1], (0, 128, 128)),
    ("yuv420sp", "gray"): (((256, 0, 0), (0, 0, 0), (0, 0, 0)), (0, 0, 0)),
    ("rgb888", "gray"): (_RGB_TO_GRAY, ()),
    ("bgr888", "gray"): (_RGB_TO_GRAY, ()),
}

# Pairs that only need their channels exchanged (or nothing): the value of rbuv_swap_switch.
_SWAPS = {
    ("rgb888", "rgb"): False, ("rgb888", "bgr"): True, ("bgr888", "bgr"): False, ("bgr888", "rgb"): True,
    ("rgb888", "gray"): False, ("bgr888", "gray"): True, ("gray8", "gray"): False,
}  # fmt: skip


@dataclass(frozen=True)
class ImageInput:
    """A model input that AIPP feeds.

    Attributes:
        rank: which input of the model it is, from 0.
        shape: ``[batch, channels, height, width]``; -1 where it varies over gears.
    """

    name: str
    rank: int
    dtype: str
    shape: tuple[int, ...]


def render(inputs: Sequence[tuple[ImageInput, PreprocessSection]]) -> str:
    """The configuration file's text: one ``aipp_op`` for each input.

    Raises:
        UnsupportedError: AIPP cannot do what a section asks for on its input.
    """
    return "".join(_operator(each, section) for each, section in inputs)


def _operator(each: ImageInput, section: PreprocessSection) -> str:
    where = f"inputs.{each.name}.preprocess"
    channels, height, width = _check(each, section, where)
    lines: list[tuple[str, object]] = [
        ("aipp_mode", "static"),
        ("related_input_rank", each.rank),
        ("input_format", INPUT_FORMATS[section.source]),
        *_geometry(section, height, width, where),
        *_colours(section, where),
        *_normalization(section, channels, where),
    ]
    return "aipp_op {\n" + "".join(f"    {name} : {_word(value)}\n" for name, value in lines) + "}\n"


def _check(each: ImageInput, section: PreprocessSection, where: str) -> tuple[int, int, int]:
    if each.dtype not in ("float32", "float16"):
        raise UnsupportedError(f"AIPP feeds floats, and the input is {each.dtype}", where=where)
    if len(each.shape) != 4:
        raise UnsupportedError("AIPP feeds images [batch, channels, height, width] only", where=where)
    _, channels, height, width = each.shape
    wanted = 1 if section.colour == "gray" else 3
    if channels != wanted:
        raise UnsupportedError(
            f"colour = {section.colour} makes {wanted} channels, and the input has {channels}", where=where
        )
    if max(height, width) > _LARGEST_SIDE:
        raise UnsupportedError(f"AIPP's images have sides of at most {_LARGEST_SIDE} pixels", where=where)
    return channels, height, width


def _geometry(section: PreprocessSection, height: int, width: int, where: str) -> list[tuple[str, object]]:
    is_open = -1 in (height, width)
    if section.crop is None:
        source = section.size or (height, width)
        if not is_open and tuple(source) != (height, width):
            raise UnsupportedError(
                f"the raw image is {source[0]} x {source[1]}, the model takes {height} x {width}: AIPP does not resize",
                where=where,
                fix="give `crop`, or resize before",
            )
        # 0: as the model's own input, which is what gears of height and width need.
        sizes = (0, 0) if is_open else (height, width)
        return [("src_image_size_w", sizes[1]), ("src_image_size_h", sizes[0]), ("crop", False)]
    if is_open:
        raise UnsupportedError("AIPP cannot crop where height and width have gears", where=where)
    if section.size is None:
        raise UnsupportedError("`crop` needs `size`, the raw image's height and width", where=where)
    top, left, high, wide = section.crop
    if (high, wide) != (height, width):
        raise UnsupportedError(f"`crop` cuts out {high} x {wide}, and the model takes {height} x {width}", where=where)
    if top + high > section.size[0] or left + wide > section.size[1]:
        raise UnsupportedError("`crop` reaches beyond `size`", where=where)
    if section.source == "yuv420sp" and (top % 2 or left % 2 or section.size[0] % 2 or section.size[1] % 2):
        raise UnsupportedError("yuv420sp: sizes and the crop's corner have to be even", where=where)
    return [
        ("src_image_size_w", section.size[1]), ("src_image_size_h", section.size[0]), ("crop", True),
        ("load_start_pos_w", left), ("load_start_pos_h", top), ("crop_size_w", wide), ("crop_size_h", high),
    ]  # fmt: skip


def _colours(section: PreprocessSection, where: str) -> list[tuple[str, object]]:
    pair = (section.source, section.colour)
    swap = section.swap_uv if section.source == "yuv420sp" else _SWAPS.get(pair)
    if swap is None:
        raise UnsupportedError(f"AIPP makes no {section.colour} of {section.source}", where=where)
    if section.swap_uv and section.source != "yuv420sp":
        raise UnsupportedError("`swap_uv` is of yuv420sp only", where=where)
    if pair not in _MATRICES:
        return [("csc_switch", False), ("rbuv_swap_switch", swap)]
    matrix, biases = _MATRICES[pair]
    lines: list[tuple[str, object]] = [("csc_switch", True), ("rbuv_swap_switch", swap)]
    lines += [
        (f"matrix_r{row}c{column}", value) for row, values in enumerate(matrix) for column, value in enumerate(values)
    ]
    if biases:
        return lines + [(f"input_bias_{place}", value) for place, value in enumerate(biases)]
    return lines + [(f"output_bias_{place}", 0) for place in range(3)]


def _normalization(section: PreprocessSection, channels: int, where: str) -> list[tuple[str, object]]:
    """``out = (pixel - mean_chn - min_chn) * var_reci_chn``; mean_chn is a whole number, min_chn takes its fraction."""
    lines: list[tuple[str, object]] = []
    for name, values in (("mean", section.mean), ("std", section.std)):
        if len(values) not in (1, channels) and len(set(values)) > 1:
            raise UnsupportedError(f"`{name}` has {len(values)} values for {channels} channels", where=where)
    for channel in range(channels):
        mean = section.mean[channel] if len(section.mean) > channel else section.mean[0]
        std = section.std[channel] if len(section.std) > channel else section.std[0]
        if not 0 <= mean <= 255:
            raise UnsupportedError(
                f"mean {mean:g} is not between 0 and 255", where=where, fix="`mean` is on the scale of pixels, 0 to 255"
            )
        if not 1 / 65504 <= std <= 16384:
            raise UnsupportedError(f"1 / std ({std:g}) is no FP16 number", where=where)
        whole = int(mean)
        lines += [
            (f"mean_chn_{channel}", whole),
            (f"min_chn_{channel}", float(f"{mean - whole:.6g}")),
            (f"var_reci_chn_{channel}", float(f"{1 / std:.8g}")),
        ]
    return lines


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return (
        f"{value:.10f}".rstrip("0").rstrip(".") + (".0" if value == int(value) else "")
        if isinstance(value, float)
        else str(value)
    )
