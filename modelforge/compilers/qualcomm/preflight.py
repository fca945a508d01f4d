"""What an HTP context cannot have, told from plain facts before any build. Imports no vendor module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from modelforge.compilers.isolated import Shapes, foreign_dtypes, open_shapes
from modelforge.compilers.protocol import Refusal
from modelforge.compilers.qualcomm.socs import SOCS, soc_of
from modelforge.graph.facts import ModelFacts
from modelforge.recipe import Dim
from modelforge.target import QualcommArchitecture, Target

_NO_TENSOR = ("string", "complex64", "complex128", "float64")
"""QNN's types have none of these (QnnTypes.h, Qnn_DataType_t)."""

_FILE, _FIXED = "an HTP context", "onnxruntime-qnn 2.7: `Dynamic shape is not supported yet, for input: ...`"


def refusals(
    facts: ModelFacts, target: Target, precision: str, inputs: Shapes, dims: Mapping[str, Dim]
) -> list[Refusal]:
    """All that is known to stand against it; empty if nothing is."""
    arch = target.arch
    if not isinstance(arch, QualcommArchitecture):
        return [Refusal("target", f"{target.tag} is no Qualcomm HTP", "choose another compiler")]
    del dims
    return [
        *_soc(arch, target),
        *_precision(arch, precision),
        *open_shapes(inputs, _FILE, _FIXED),
        *foreign_dtypes(facts, lambda dtype: dtype not in _NO_TENSOR, "QNN"),
    ]


def _soc(arch: QualcommArchitecture, target: Target) -> Iterator[Refusal]:
    if soc_of(arch) is not None:
        return
    pair = f"soc_model {arch.soc_model} with htp_arch {arch.htp_arch}"
    what = f"{pair} is no SoC that is known" if arch.soc_model else f"htp_arch {arch.htp_arch} alone names no SoC"
    known = ", ".join(f"{soc.name} ({soc.model}, {soc.htp_arch})" for soc in SOCS)
    yield Refusal(
        "soc",
        f"{what}: QNN builds for another chip, or fails with a message about memory",
        f"put (soc_model, htp_arch) of the chip into {target.path.name}; known: {known}",
        "QAIRT 2.51, measured: QNN_COMMON_ERROR_MEM_ALLOC",
    )


def _precision(arch: QualcommArchitecture, precision: str) -> Iterator[Refusal]:
    soc = soc_of(arch)
    if precision == "fp32":
        yield Refusal(
            "precision",
            "Hexagon tensor processors do not compute in fp32",
            "choose from int8, mixed, fp16",
            "onnxruntime-qnn pull request 782: float operations use FP16 since QAIRT 2.35",
        )
    elif precision in ("fp16", "mixed") and soc is not None and soc.no_float:
        yield Refusal(
            "precision",
            f"the tensor processor of {soc.name} computes in integers only, so no {precision}",
            'give this target the ladder ["int8"]',
            soc.no_float,
        )
