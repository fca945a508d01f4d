"""What runs on an NPU and what on the CPU beside it, as a row of a table: `plan` and `report` print the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ["target", "stage", "operators on NPU", "on CPU", "MACs on NPU", "on CPU", "NPU share", "known from"]


def delegation_row(tag: str, stage: str, told: Mapping[str, Any]) -> list[str]:
    """One variant's row; ``told`` in the shape of :class:`modelforge.bundle.record.Delegation`."""
    operators, macs = told["operators"], told["macs"]
    return [
        tag,
        stage,
        *_two(operators),
        *_two(macs),
        _share(macs if any((macs or {}).values()) else operators),
        told["source"],
    ]


def _two(counts: Mapping[str, int] | None) -> list[str]:
    """On the NPU, and on everything else."""
    if counts is None:
        return ["-", "-"]
    on_npu = counts.get("npu", 0)
    return [f"{on_npu:,}", f"{sum(counts.values()) - on_npu:,}"]


def _share(counts: Mapping[str, int] | None) -> str:
    total = sum((counts or {}).values())
    return f"{(counts or {}).get('npu', 0) / total:.1%}" if total else "-"
