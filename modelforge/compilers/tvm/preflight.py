"""What TVM cannot have, told from plain facts before any compile. Imports no vendor module.

``ops.json`` is the table of the importer of the pinned version (a test holds them together).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from modelforge.compilers.protocol import Refusal
from modelforge.compilers.tvm.signature import DTYPES
from modelforge.graph.facts import ModelFacts, OpFacts
from modelforge.recipe import Dim
from modelforge.target import CpuArchitecture, Target
from modelforge.toolchains import linker

PRECISIONS = ("fp32", "fp16", "int8", "mixed")
_IMPORTER = "the ONNX importer of TVM 0.27 (relax/frontend/onnx/onnx_frontend.py)"
_CONTROL_FLOW = ("If", "Loop", "Scan")
_RECURRENT = ("LSTM", "GRU", "RNN")
# How many elements these give depends on the data; the runner knows every size beforehand.
_DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression", "AllClassNMS")
_SORTS = ("TopK",)
"""Calls ``tvm.contrib.sort``, which is in the compiler's library and not in the runtime's, which ships."""


def refusals(
    facts: ModelFacts,
    target: Target,
    precision: str,
    inputs: Mapping[str, tuple[int | str, ...]],
    dims: Mapping[str, Dim],
) -> list[Refusal]:
    """All that is known to stand against it; empty if nothing is."""
    if not isinstance(target.arch, CpuArchitecture):
        return [Refusal("target", f"TVM compiles for CPUs here, {target.tag} is none", "choose another compiler")]
    found = [*_precision(target, precision), *_linker(target.arch.isa), *_symbols(inputs), *_dtypes(facts)]
    for op in facts.ops:
        found += _op(op)
    return found


def batch_symbol(inputs: Mapping[str, tuple[int | str, ...]]) -> str | None:
    """The symbol that stands for the batch; None where all shapes are fixed."""
    return next((size for shape in inputs.values() for size in shape[:1] if isinstance(size, str)), None)


@cache
def importable() -> Mapping[str, frozenset[str]]:
    """The ONNX operators that the importer maps, by domain."""
    table = json.loads((Path(__file__).parent / "ops.json").read_text(encoding="utf-8"))
    return {domain: frozenset(ops) for domain, ops in table["domains"].items()}


def _precision(target: Target, precision: str) -> list[Refusal]:
    if precision not in PRECISIONS:
        return [Refusal("precision", f"no kernels in {precision}", f"its precisions: {', '.join(PRECISIONS)}")]
    if precision == "fp32" or precision in target.precisions:
        return []
    what = {
        "fp16": "arithmetic in fp16: its code would convert at each step and be slower than fp32",
        "int8": "dot products of int8: its sums would be no faster than in fp32",
        "mixed": "dot products of int8: its sums would be no faster than in fp32",
    }[precision]
    return [Refusal("precision", f"{target.tag} has no {what}", 'give this target the ladder ["fp32"]')]


def _linker(isa: str) -> list[Refusal]:
    if linker.find(isa) is not None:
        return []
    return [Refusal("linker", f"nothing here links for {isa}", "pip install 'modelforge[build]' (it brings ziglang)")]


def _symbols(inputs: Mapping[str, tuple[int | str, ...]]) -> list[Refusal]:
    found = []
    batch = batch_symbol(inputs)
    for name, shape in inputs.items():
        for position, size in enumerate(shape):
            if isinstance(size, int) or (position == 0 and size == batch):
                continue
            why = (
                f'it is not the leading one, dimension {position} "{size}"' if position else f'"{size}" is a second one'
            )
            found.append(
                Refusal(
                    "dynamic-shape",
                    f"input {name} has a symbolic dimension other than the batch: {why}",
                    f'give "{size}" an integer in inputs.{name}.shape, or one recipe per size',
                    "TVM's importer and kernels need fixed sizes",
                )
            )
    return found


def _dtypes(facts: ModelFacts) -> list[Refusal]:
    return [
        Refusal(
            "dtype", f"{tensor.name} is of type {tensor.dtype}, which the runner does not know", "cast it in the model"
        )
        for tensor in (*facts.inputs, *facts.outputs)
        if tensor.dtype not in DTYPES
    ]


def _op(op: OpFacts) -> list[Refusal]:
    domain = "" if op.domain == "ai.onnx" else op.domain
    shown = f"{op.domain}:{op.op}" if domain else op.op
    where = f"(node {op.example}{_more(op.count)})"
    if op.in_subgraph:
        return []  # the control flow that holds it is refused
    if not domain and op.op in _CONTROL_FLOW:
        return [Refusal("control-flow", f"{shown} {where} is control flow", "split the model around it", _IMPORTER)]
    mapped = op.op in importable().get(domain, frozenset())
    if not domain and not mapped and op.op in _RECURRENT:
        return [
            Refusal("recurrent", f"{shown} {where} is not imported", "unroll it, or choose another compiler", _IMPORTER)
        ]
    if not domain and op.op in _DATA_DEPENDENT:
        fix = "end the model before it, and do this step outside"
        return [Refusal("data-dependent-shape", f"how much {shown} {where} gives depends on the data", fix, _IMPORTER)]
    if not domain and op.op in _SORTS:
        what = f"{shown} {where} calls a function of TVM's that its runtime library for devices does not have"
        return [Refusal("runtime", what, "end the model before it, and do this step outside", "libtvm_runtime.so")]
    if not mapped:
        return [Refusal("op", f"{shown} {where} is not imported", "replace it, or choose another compiler", _IMPORTER)]
    return []


def _more(count: int) -> str:
    return "" if count == 1 else f" and {count - 1} more"


def gears(dims: Mapping[str, Dim], inputs: Mapping[str, tuple[int | str, ...]]) -> Sequence[int]:
    """The batch sizes that get an entry of their own, rising."""
    symbol = batch_symbol(inputs)
    return dims[symbol].gears if symbol else (1,)
