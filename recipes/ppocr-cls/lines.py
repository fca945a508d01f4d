"""Labelled text lines, upright or upside down, rendered on the spot: the data of this recipe.

`data = "lines:evaluation"` in recipe.toml names a function here. Such a function takes nothing and yields one dict per
sample: the input's array without its batch axis, and "label". It must yield the same samples every time it is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 48, 192
FONT_SIZES = (12, 16, 24, 36)
_TEXT = (
    "account address amount balance batch bridge camera channel client column contract customer date delivery device "
    "discount document east engine factory figure fragile garden glass harbour height invoice island journey kitchen "
    "label letter library machine market meeting method minute model morning network notice number office order paper "
    "parcel payment platform point price product quality quantity receipt record return river school section serial "
    "service signal station street summer supply system table tax ticket total train transfer unit value version "
    "voltage warehouse water weight window winter"
)
WORDS = _TEXT.split()


def evaluation() -> Iterator[dict[str, Any]]:
    """200 lines for the accuracy gate."""
    return _lines(count=200, seed=1)


def calibration() -> Iterator[dict[str, Any]]:
    """128 other lines for calibration, where a target's ladder has a rung that needs it."""
    return _lines(count=128, seed=2)


def _lines(count: int, seed: int) -> Iterator[dict[str, Any]]:
    # RandomState, not default_rng: NumPy promises that its stream never changes (NEP 19), so the data stay the same.
    random = np.random.RandomState(seed)
    fonts = {size: ImageFont.load_default(size) for size in FONT_SIZES}  # carried by Pillow: needs none on the machine
    for index in range(count):
        line = _render(random, fonts[FONT_SIZES[random.randint(len(FONT_SIZES))]])
        upside_down = index % 2  # class 0 is 0 degrees, class 1 is 180 degrees: RapidOCR's label_list
        if upside_down:
            line = line.transpose(Image.Transpose.ROTATE_180)
        yield {"x": preprocess(line), "label": np.int64(upside_down)}


def _render(random: np.random.RandomState, font: Any) -> Image.Image:
    """A cropped line as a text detector hands it over: up to three words and a figure, small, pale or noisy at times.

    Without the hard ones FP32 is right on every line by a wide margin, and a gate on such data would let much pass.
    """
    words = [WORDS[random.randint(len(WORDS))] for _ in range(random.randint(0, 4))]
    words.insert(random.randint(len(words) + 1), str(random.randint(1_000, 100_000)))
    text = " ".join(words)
    text = (text, text.upper(), text.title())[random.randint(3)]
    paper = random.randint(120, 256, 3)
    ink = (paper * random.uniform(0.1, 0.7)).astype(int)
    if random.randint(3) == 0:
        paper, ink = ink, paper
    left, top, right, bottom = font.getbbox(text)
    margins = random.randint(0, 6, 4)
    size = (int(right - left + margins[0] + margins[1]), int(bottom - top + margins[2] + margins[3]))
    image = Image.new("RGB", size, tuple(paper.tolist()))
    ImageDraw.Draw(image).text((int(margins[0] - left), int(margins[2] - top)), text, tuple(ink.tolist()), font)
    noise = random.randint(-20, 21, (size[1], size[0], 1)) * random.uniform()
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def preprocess(line: Image.Image) -> np.ndarray:
    """RapidOCR's preprocessing of a line for this model: float32 [3, 48, 192], BGR, -1..1, zeros right of the line.

    Height 48, width in proportion but at most 192 (longer lines are squeezed). RapidOCR resizes with OpenCV; Pillow's
    bilinear filter differs by its smoothing when it shrinks, and spares this recipe a dependency.
    """
    width = min(WIDTH, math.ceil(HEIGHT * line.width / line.height))
    resized = np.asarray(line.resize((width, HEIGHT), Image.Resampling.BILINEAR), dtype=np.float32)
    x = np.zeros((3, HEIGHT, WIDTH), dtype=np.float32)
    x[:, :, :width] = (resized[:, :, ::-1].transpose(2, 0, 1) / 255 - 0.5) / 0.5
    return x
