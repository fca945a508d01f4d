"""What each Ascend chip and CANN release can have, as rows with their source. Looks at no model and starts nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from modelforge.errors import UnsupportedError

Version = tuple[int, ...]

_HIASCEND = "https://www.hiascend.com/document/detail/zh"


@dataclass(frozen=True)
class Chip:
    """One family of chips.

    Attributes:
        pattern: the exact ``soc_version`` words of the family, as a regular expression.
        image: the family's word in the tags of the official CANN container images.
        since, until: the CANN lines that have it; None: no bound is known.
        fp32_products: whether Conv and MatMul compute in FP32 at all (else the matrix unit takes FP16 and INT8 only).
        ranges: whether dynamic shapes with ranges (``-1``) are possible; gears always are.
        most_gears: of one model.
    """

    title: str
    pattern: str
    image: str
    since: Version | None = None
    until: Version | None = None
    fp32_products: bool = False
    ranges: bool = True
    most_gears: int = 100


# Sources: ATC's --soc_version page (CANN 8.1 to 9.1), the platform_config files of CANN, the tags of
# quay.io/ascend/cann; `until` of the 310: listed up to 8.2.RC1 and gone from the documents of 8.3.RC1 and later.
# `since`: the oldest documents that name the family and were read (6.2.RC2 for Atlas 200I A2, 6.3.RC2 for Atlas A2).
# Gears: ATC's pages --dynamic_batch_size, --dynamic_image_size, --dynamic_dims (2 to 100; 256 for the 950).
CHIPS = (
    Chip("Ascend 310", r"Ascend310", "310", until=(8, 2), ranges=False),
    Chip("Ascend 310P", r"Ascend310P([1357]|3Vir0[1248])", "310p"),
    Chip("Ascend 310B", r"Ascend310B[1-4]", "310b", since=(6, 2), ranges=False),
    Chip("Ascend 910, first generation", r"Ascend910(A|ProA|ProB|PremiumA)", "910"),
    Chip("Ascend 910B", r"Ascend910B([1-4]|2C|4-1)", "910b", since=(6, 3), fp32_products=True),
    Chip("Ascend 910_93", r"Ascend910_93(62|72|81|82|91|92)", "a3", fp32_products=True),
    Chip("Ascend 950", r"Ascend950(PR|DT)_[0-9A-Za-z]+", "950", fp32_products=True, most_gears=256),
)

# soc_version words that are no exact chip, or not what most people mean by them, and what was probably meant.
_TRAPS = {
    "Ascend910B": (
        "Ascend910B without a digit is a first-generation Ascend 910, and the 910B family (Atlas A2) is Ascend910B1 "
        "to B4: write the exact chip that `npu-smi info` shows (for the first generation Ascend910A or Ascend910ProB)"
    ),
    "Ascend310P": "give the number on the chip: Ascend310P1, P3, P5 or P7 (`npu-smi info` shows it)",
    "Ascend310B": "give the number on the chip: Ascend310B1 to B4 (`npu-smi info` shows it)",
    "Ascend910": "give the exact chip: Ascend910A, Ascend910ProA ... or Ascend910B1 to B4 (`npu-smi info` shows it)",
}


@dataclass(frozen=True)
class OpsetRow:
    """The newest opset of ``ai.onnx`` that CANN takes from a version on."""

    since: Version
    newest: int
    source: str


OPSETS = (
    OpsetRow((5, 0), 13, f"{_HIASCEND}/canncommercial/601/inferapplicationdev/atctool/atctool_0178.html"),
    OpsetRow((7, 0), 18, f"{_HIASCEND}/canncommercial/700/inferapplicationdev/atctool/atlasatc_16_0201.html"),
)
"""ONNX operators: v9 to v13 up to CANN 6, v9 to v18 from 7.0 on (later releases say it per operator)."""

QUANT_OPSETS = (
    OpsetRow((5, 0), 13, f"{_HIASCEND}/canncommercial/5046/reference/fwoperatorlist/atlasoxol_09_0015.html"),
    OpsetRow((8, 0), 16, f"{_HIASCEND}/canncommercial/800/apiref/aolapi/atlasoxol_09_0015.html"),
    OpsetRow((9, 0), 22, f"{_HIASCEND}/canncommercial/latest/API/aolapi/atlasoxol_09_0015.html"),
)
"""The operator AscendQuant, without which there is no INT8."""

OLDEST_OPSET = 9

UNPARSED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger",
})  # fmt: skip
"""Operators of standard quantization: ATC has no parser for them (CANN 9.0: "No operator plugin is registered")."""


def chip_of(soc_version: str) -> Chip:
    """The family of an exact ``soc_version``. Never guessed.

    Raises:
        UnsupportedError: it is no exact word that ATC knows.
    """
    for chip in CHIPS:
        if re.fullmatch(chip.pattern, soc_version):
            return chip
    fix = _TRAPS.get(soc_version, "write the exact word of `npu-smi info`, for example Ascend310P3")
    raise UnsupportedError(f'"{soc_version}" is no exact soc_version', fix=fix)


def parse_version(text: str) -> Version | None:
    """``8.2.RC1`` as (8, 2), ``7.0.1.beta1`` as (7, 0, 1); None where it does not begin with numbers."""
    found = re.match(r"\d+(?:\.\d+)*", text.strip())
    return tuple(int(part) for part in found.group().split(".")[:3]) if found else None


def newest_opset(version: Version, rows: tuple[OpsetRow, ...] = OPSETS) -> OpsetRow:
    """The row that holds for a CANN version; the oldest where it is older than all."""
    return next((row for row in reversed(rows) if version[: len(row.since)] >= row.since), rows[0])


def least_cann(chip: Chip, opset: int, *, quantized: bool) -> tuple[Version, str]:
    """The oldest CANN line whose documents allow this opset on this chip, and why.

    Raises:
        UnsupportedError: none does.
    """
    needs: list[tuple[Version, str]] = [(chip.since, f"the first with {chip.title}")] if chip.since else []
    tables = [("ONNX", OPSETS), ("AscendQuant", QUANT_OPSETS)] if quantized else [("ONNX", OPSETS)]
    for what, rows in tables:
        row = next((row for row in rows if opset <= row.newest), None)
        if row is None:
            raise UnsupportedError(
                f"opset {opset} is newer than what any CANN documents ({what}: {rows[-1].newest})",
                fix=f"export the model with opset {OPSETS[-1].newest} or lower",
            )
        needs.append((row.since, f"the first with {what} opset {opset}"))
    least, why = max(needs)
    if chip.until is not None and least > chip.until:
        raise UnsupportedError(
            f"{'INT8 with ' if quantized else ''}opset {opset} needs CANN {spell(least)} ({why}), "
            f"and {chip.title} ends with CANN {spell(chip.until)}",
            fix="export the model with a lower opset: 13 serves every CANN",
        )
    return least, why


def spell(version: Version) -> str:
    return ".".join(map(str, version))


# Tags seen on quay.io/ascend/cann; others follow the same pattern (VERSION-CHIP-OS-pyPYTHON).
_IMAGES: Mapping[str, str] = {
    "310p": "quay.io/ascend/cann:9.0.0-310p-openeuler24.03-py3.11",
    "910b": "quay.io/ascend/cann:8.5.1-910b-ubuntu22.04-py3.11",
    "950": "quay.io/ascend/cann:9.1.0-950-ubuntu22.04-py3.12-devel",
}


def image_for(chip: Chip) -> str:
    """The official container image, or the pattern of its tag where no tag is known to us."""
    if chip.image in _IMAGES:
        return _IMAGES[chip.image]
    line = spell(chip.until) if chip.until else "VERSION"
    return f"quay.io/ascend/cann:{line}-{chip.image}-ubuntu22.04-pyX.Y (look the exact tag up there)"


def known_images() -> str:
    """All tags that are known to us, for messages that are not about one chip."""
    return ", ".join(f"{image} ({family})" for family, image in _IMAGES.items())
