"""What Vela says of a build: its CSV of cycles and memory, and the count of operators that it prints."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from modelforge.errors import BuildError

_OPERATORS = re.compile(r"^(?P<place>CPU|NPU) operators = (?P<count>\d+)", re.MULTILINE)
# Of U55 and U65: "Warning (supported operators) operator: RESHAPE, ofm: 'features'"; of U85: "   CPU: Conv2D = name (".
_ON_CPU = re.compile(
    r"^(?:Warning \(supported operators\) operator: (?P<op>\w+), ofm: '(?P<name>[^']*)'"
    r"| *CPU: (?P<op85>\w+) = (?P<name85>\S+))",
    re.MULTILINE,
)
_FIGURES = {
    "cycles_total": "cycles",
    "cycles_npu": "npu_cycles",
    "inference_time": "seconds",
    "core_clock": "clock_hz",
    "nn_macs": "macs",
    "sram_memory_used": "sram_kib",
    "dram_memory_used": "dram_kib",
    "on_chip_flash_memory_used": "on_chip_flash_kib",
    "off_chip_flash_memory_used": "off_chip_flash_kib",
}
"""Column of the CSV -> key of the report. Estimates of Vela's performance model, not measurements."""


def read_summary(text: str) -> dict[str, float]:
    """The figures of one summary CSV.

    Raises:
        BuildError: a column is missing, or is no number.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    try:
        return {name: float(rows[0][column]) for column, name in _FIGURES.items()}
    except (IndexError, KeyError, ValueError, TypeError) as error:
        raise BuildError(f"Vela's summary cannot be read: {type(error).__name__} {error}") from error


def read_delegation(log: str, macs: int) -> dict[str, Any]:
    """Operators and MACs by place. Vela counts the MACs on the NPU; those of the rest are unknown where there is one.

    Raises:
        BuildError: the log does not say how many operators are where.
    """
    counts = {each["place"].lower(): int(each["count"]) for each in _OPERATORS.finditer(log)}
    if set(counts) != {"npu", "cpu"}:
        raise BuildError("Vela does not say how many operators are on the NPU")
    return {
        "operators": {"npu": counts["npu"], "cpu": counts["cpu"]},
        "macs": {"npu": macs, "cpu": 0} if counts["cpu"] == 0 else None,
        "off_npu": [f"{each['op'] or each['op85']} {each['name'] or each['name85']}" for each in _ON_CPU.finditer(log)],
        "source": "Vela's summary: operators after its graph optimisation",
    }
