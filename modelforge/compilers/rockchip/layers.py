"""The toolkit's own table of layers, out of its log: what runs on the NPU and what on the CPU.

Operators are rows of the table, which is the graph after the toolkit's fusions. Multiply-accumulates are counted from
the shapes of convolutions and matrix products, as :mod:`modelforge.graph.cost` does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

# ID   OpType  DataType  Target  InputShape  OutputShape  Cycles(DDR/NPU/Total)  RW(KB)  FullName
_ROW = re.compile(
    r"^D RKNN: +(?P<id>\d+) +(?P<op>\w+) +(?P<dtype>\w+) +(?P<target>CPU|NPU|GPU) +(?P<inputs>\S+) +"
    r"(?P<outputs>\S+) +(?P<cycles>\d+/\d+/\d+) +\d+ *(?P<name>.*)$"
)
_BORDERS = ("InputOperator", "OutputOperator")
_FROM_TOOLKIT = "the toolkit's table of layers, after its fusions"


@dataclass(frozen=True)
class Layer:
    """One row: ``op`` is the toolkit's type, ``name`` its full name (``Conv:Conv@3``), ``macs`` None where unknown."""

    op: str
    name: str
    dtype: str
    target: str
    macs: int | None


def read_layers(log: str) -> list[Layer]:
    """The layers of a build, borders left out; empty where the log has no such table."""
    found: dict[int, Layer] = {}
    for line in log.splitlines():
        row = _ROW.match(line)
        if row is None or row["op"] in _BORDERS:
            continue
        macs = _macs(row["op"], _shapes(row["inputs"]), _shapes(row["outputs"]))
        found[int(row["id"])] = Layer(row["op"], row["name"].strip(), row["dtype"], row["target"].lower(), macs)
    return [found[key] for key in sorted(found)]


def read_complaints(log: str) -> list[str]:
    """What the toolkit's compiler logged as an error in a build that it then called a success, each line once."""
    return list(dict.fromkeys(each.strip() for each in re.findall(r"E RKNN: *([^\n]+)", log)))


def delegation(layers: Sequence[Layer]) -> dict[str, Any]:
    """How much runs where: JSON for the report; every figure None where the toolkit told nothing."""
    if not layers:
        return {"operators": None, "macs": None, "source": "unknown: the toolkit's log has no table of layers"}
    operators = Counter(layer.target for layer in layers)
    macs: Counter[str] = Counter()
    for layer in layers:
        macs[layer.target] += layer.macs or 0
    known = all(layer.macs is not None for layer in layers)
    return {
        "operators": {place: operators[place] for place in _places(operators)},
        "macs": {place: macs[place] for place in _places(operators)} if known else None,
        "off_npu": [f"{layer.op} {layer.name}".strip() for layer in layers if layer.target != "npu"],
        "dtypes": dict(sorted(Counter(layer.dtype for layer in layers).items())),
        "source": _FROM_TOOLKIT,
    }


def _places(operators: Mapping[str, int]) -> list[str]:
    return ["npu", "cpu", *sorted(set(operators) - {"npu", "cpu"})]


def _shapes(text: str) -> list[tuple[int, ...]]:
    """``(1,3,48,192),(8,3,3,3),...``: the shapes that are whole; the table cuts long lists off."""
    found = re.findall(r"\((\d+(?:,\d+)*),?\)", text)
    return [tuple(int(size) for size in part.split(",")) for part in found]


def _macs(op: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> int | None:
    """0 for all that is no product with weights or of two tensors; None where the shapes do not tell."""
    is_product = "MatMul" in op or "Gemm" in op or ("Conv" in op and "Convert" not in op)  # exDataConvert is none
    if not is_product:
        return 0
    if not outputs or len(inputs) < 2:
        return None
    first, weight, out = inputs[0], inputs[1], outputs[0]
    if "Conv" not in op:
        return prod(out) * first[-1]
    if len(weight) < 3 or len(out) < 3:
        return None
    if "Transpose" in op or "Deconv" in op:
        return prod(first) * prod(weight[1:])
    if weight[0] == 1 and weight[1] == out[1] != 1:  # depthwise: the toolkit writes [1, channels, ...]
        return prod(out) * prod(weight[2:])
    return prod(out) * prod(weight[1:])
