"""What the toolkit cannot have, told from plain facts before any build. Imports no vendor module.

Rows were measured with rknn-toolkit2 2.5.0 unless they name another source. There is no table of operators: the toolkit
puts what the NPU cannot do on the CPU, and says so in its table of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from modelforge.compilers.isolated import Shapes, foreign_dtypes, open_shapes
from modelforge.compilers.protocol import Refusal
from modelforge.graph.facts import ModelFacts
from modelforge.options import Options
from modelforge.recipe import Dim
from modelforge.target import RockchipArchitecture, Target

NEWEST_OPSET = 19
"""``load_onnx: Unsupport onnx opset 21, need <= 19!``"""
PLATFORMS: Mapping[str, tuple[str, ...]] = {
    "rk3562": ("fp16", "int8", "mixed"),
    "rk3566": ("fp16", "int8", "mixed"),
    "rk3568": ("fp16", "int8", "mixed"),
    "rk3576": ("fp16", "int8", "mixed"),
    "rk3588": ("fp16", "int8", "mixed"),
    # An FP16 build for these ends with return code -1.
    "rv1103": ("int8",),
    "rv1106": ("int8",),
}
"""``target_platform`` and what it computes in."""
SINGLE_CORE = ("rk3588",)
"""``single_core_mode ... only for rk3588`` (docstring of RKNN.config)."""
DTYPES = frozenset(("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"))
_REFUSED: Mapping[str, str] = {
    "NonZero": "how much it gives depends on the data: `The input 0 of NonZero need to be constant!`",
    "If": "the toolkit needs a graph without branches",
    "Loop": "the toolkit needs a graph without loops",
    "Scan": "the toolkit needs a graph without loops",
    "NonMaxSuppression": "how much it gives depends on the data",
    "Unique": "how much it gives depends on the data",
    "Compress": "how much it gives depends on the data",
}

_FILE, _FIXED = "a .rknn file", "rknn-toolkit2 2.5.0: `The input shape [...] is not support!`"


def refusals(
    facts: ModelFacts, target: Target, precision: str, inputs: Shapes, dims: Mapping[str, Dim], options: Options
) -> list[Refusal]:
    """All that is known to stand against it; empty if nothing is."""
    if not isinstance(target.arch, RockchipArchitecture):
        return [Refusal("target", f"{target.tag} is no Rockchip NPU", "choose another compiler")]
    platform = target.arch.platform
    if platform not in PLATFORMS:
        what = f'the toolkit is not known to build for "{platform}"'
        return [Refusal("platform", what, f"platforms: {', '.join(PLATFORMS)}")]
    del dims
    return [
        *_precision(platform, precision),
        *_opset(facts),
        *open_shapes(inputs, _FILE, _FIXED),
        *foreign_dtypes(facts, DTYPES.__contains__, "a .rknn file"),
        *_operators(facts),
        *_options(platform, precision, options),
    ]


def _precision(platform: str, precision: str) -> Iterator[Refusal]:
    can = PLATFORMS[platform]
    if precision in can:
        return
    if precision == "fp32":
        yield Refusal("precision", "Rockchip's NPUs do not compute in fp32", f"choose from {', '.join(can)}")
        return
    yield Refusal(
        "precision",
        f"the NPU of {platform} computes in int8 only; the toolkit ends an {precision} build with return code -1",
        'give this target the ladder ["int8"]',
    )


def _opset(facts: ModelFacts) -> Iterator[Refusal]:
    opset = facts.opsets.get("", 0)
    if opset > NEWEST_OPSET:
        yield Refusal(
            "opset",
            f"the model is of opset {opset}, and the toolkit reads up to {NEWEST_OPSET}",
            f"export it with opset {NEWEST_OPSET}, or convert it: onnx.version_converter.convert_version(model, "
            f"{NEWEST_OPSET})",
            "rknn-toolkit2 2.5.0: `Unsupport onnx opset 21, need <= 19!`; airockchip/rknn-toolkit2 #539",
        )
    for domain in sorted(set(facts.opsets) - {"", "ai.onnx"}):
        if any(op.domain == domain for op in facts.ops):
            yield Refusal(
                "domain",
                f'the toolkit knows no operators of the domain "{domain}"',
                "export the model without them",
            )


def _operators(facts: ModelFacts) -> Iterator[Refusal]:
    for op in facts.ops:
        if op.domain == "" and op.op in _REFUSED:
            yield Refusal(
                "operator",
                f"{op.op} (node {op.example}): {_REFUSED[op.op]}",
                "split the model before it, or export without it",
            )


def _options(platform: str, precision: str, options: Options) -> Iterator[Refusal]:
    if options.get("quantizer") == "native" and precision == "mixed":
        yield Refusal(
            "native-mixed",
            "`mixed` is ModelForge's choice of layers, and the toolkit's own quantizer has none",
            'take `quantizer` out, or give this target the ladder ["int8", "fp16"]',
        )
    if options.get("single_core") and platform not in SINGLE_CORE:
        yield Refusal(
            "single-core",
            f"single_core is for {', '.join(SINGLE_CORE)} only, not for {platform}",
            "take it out",
        )
