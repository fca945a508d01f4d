"""The SoCs that HTP contexts are built for: the pair that QNN wants, and whether the chip computes in floating point.

QNN does not check the pair: 43 (v73) with ``htp_arch`` 75 gives the context of v73 without a word, and an ``htp_arch``
alone ends in ``QNN_COMMON_ERROR_MEM_ALLOC`` (measured with QAIRT 2.51). So this table does.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelforge.target import QualcommArchitecture

_PAIRS = "ExecuTorch, backends/qualcomm/serialization/qc_schema.py"
_LATER_PAIRS = "ExecuTorch pull requests 19216 and 22542 (QNN_SOC_MODEL_* of QnnTypes.h)"
_V68 = "onnxruntime-qnn pull request 708: HTP v68 has no float path, though QAIRT 2.51 builds for it"
_REFUSED = 'QAIRT 2.51: "The SocModel doesn\'t support FP16" (measured)'


@dataclass(frozen=True)
class Soc:
    """One row.

    Attributes:
        model: QNN's number (``soc_model``).
        htp_arch: the Hexagon version.
        no_float: why it computes in integers only; empty where it has FP16.
        source: of the pair.
    """

    name: str
    model: int
    htp_arch: int
    no_float: str = ""
    source: str = _PAIRS


SOCS = (
    Soc("SM8350", 30, 68, _V68),
    Soc("SA8295", 39, 68, _V68),
    Soc("SA8540", 62, 68, _V68),
    Soc("QCM6490", 93, 68, _REFUSED),
    Soc("SM8450", 36, 69),
    Soc("SM8475", 42, 69),
    Soc("SXR2230P", 53, 69),
    Soc("SM8550", 43, 73),
    Soc("SA8255", 52, 73),
    Soc("QCS9100", 77, 73),
    Soc("SXR1230P", 45, 73, _REFUSED),
    Soc("SSG2115P", 46, 73, _REFUSED),
    Soc("SSG2125P", 58, 73, _REFUSED),
    Soc("SM8635", 68, 73, _REFUSED, _LATER_PAIRS),
    Soc("SM8650", 57, 75),
    Soc("SM8750", 69, 79),
    Soc("SXR2330P", 75, 79),
    Soc("SM8735", 85, 79, _REFUSED, _LATER_PAIRS),
)
"""Built with QAIRT 2.51, each at int8, and at fp16 where it has that."""


def soc_of(arch: QualcommArchitecture) -> Soc | None:
    """The row of a profile's pair, None where there is none."""
    return next((soc for soc in SOCS if (soc.model, soc.htp_arch) == (arch.soc_model, arch.htp_arch)), None)


def soc_named(name: str) -> Soc:
    """The row of a name that came from this table."""
    return next(soc for soc in SOCS if soc.name == name)
