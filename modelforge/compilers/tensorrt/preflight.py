"""What TensorRT cannot have of a model, told before any build: rules as data, each with its source.

Pure: imports no vendor module and starts no process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from modelforge.compilers.protocol import Refusal
from modelforge.compilers.tensorrt.product import MEASURED
from modelforge.errors import UnsupportedError

if TYPE_CHECKING:  # a child process holds a model against these rules before each build, and starts fast
    from modelforge.compilers.tensorrt.preflight_model import Model, Node
    from modelforge.graph.facts import ModelFacts
    from modelforge.recipe import Dim

SUPPORTED_SM = frozenset({75, 80, 86, 89, 120, 121})
"""The members of ``ComputeCapability`` in TensorRT-RTX 1.7.1 (a test asks the installed one)."""

FP32_GEMM_OPS = ("MatMul", "Gemm", "Einsum", "LSTM", "GRU", "RNN")
"""Operators that become FP32 matrix products at fp32; the builder refuses each for SM75 (measured on 1.7.1)."""

STRICTER = frozenset({"domain", "float64", "uint8-quantization"})
"""Rules that are ours and not the builder's: it would build, and what came out would not be the model."""

DOCS = "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html"

NEVER = {
    **dict.fromkeys(
        ("NonZero", "RoiAlign", "CausalConvWithState", "LinearAttention"),
        "the parser knows it and wants a plugin that TensorRT-RTX does not have",
    ),
    "NonMaxSuppression": "the parser takes it, and the builder has no kernel for it",
}
"""Operators that the parser says it supports and that were refused in every form tried -> why."""

_ASKED = f"OnnxParser.supports_operator, {MEASURED}"
_WITHOUT = "export the model without it, or split the model there"
_STANDARD = "export the model with standard ONNX operators"
# The parser ignores the domain: acme.Relu would become ONNX's Relu without a word.
_DOMAIN = "is of a domain that the parser does not tell apart"

# GPUs that people ask for and that this product leaves out -> what they are.
_LEFT_OUT = {
    70: "V100",
    72: "Jetson Xavier",
    87: "Jetson Orin",
    90: "H100 and H200",
    100: "B200",
    101: "Jetson Thor",
    103: "B300",
    110: "Jetson Thor",
}

DTYPE_SINCE = {"bfloat16": 80, "int4": 80, "float8_e4m3fn": 89, "float4_e2m1fn": 120}
"""Smallest compute capability with an element type (support matrix, and the builder's "HW-specific datatypes").

What is absent here every listed GPU has.
"""

# What the parser takes as a graph input or output as it stands. float64 is not among them: it parses, and silently
# becomes FP32, so that the caller's buffers would have the wrong size.
_DTYPES = frozenset({"float32", "float16", "int64", "int32", "int8", "uint8", "bool", *DTYPE_SINCE} - {"int4"})


def refusals(
    facts: ModelFacts,
    sm: int,
    precision: str,
    inputs: Mapping[str, tuple[int | str, ...]],
    dims: Mapping[str, Dim],
    toolchain: str,
) -> list[Refusal]:
    """Say what is known to fail: compute capability, data types, operators without a parser, FP32 on SM75.

    Args:
        sm: compute capability without its dot.
        toolchain: ``tensorrt`` or ``tensorrt-rtx``.
    """
    del inputs, dims
    if toolchain != "tensorrt-rtx":
        return []
    if sm not in SUPPORTED_SM:
        return [_refuse_capability(sm)]
    found = _refuse_dtypes(facts, sm) + _refuse_operators(facts)
    if sm == 75 and precision == "fp32":
        found += _refuse_fp32_products(facts)
    return found


def check_model(path: Path, sm: int, toolchain: str) -> list[Refusal]:
    """Say why TensorRT would refuse a lowered model: exactly the file that the compiler gets, node by node.

    Args:
        sm: compute capability without its dot.
        toolchain: ``tensorrt`` or ``tensorrt-rtx``. The rules are measured on TensorRT-RTX 1.7; of classic TensorRT
            only those are told that the source of its parser shows too.

    Returns:
        none where the build is expected to succeed. docs/coverage.md tells how often that is right.

    Raises:
        ModelError: the file is not an ONNX model.
    """
    from modelforge.compilers.tensorrt.preflight_model import read_model

    model = read_model(path)
    return [
        *_boundary(model, toolchain),
        *(found for node in model.nodes for found in _judge(node, model, sm, toolchain)),
    ]


def check_source(path: Path, sm: int, toolchain: str) -> list[Refusal]:
    """Say what TensorRT would refuse of a user's own model whatever precision it is lowered to: for use in a plan.

    Only what preparation cannot mend: nodes that depend on an input and that an output depends on, and rules about
    them that neither folding nor another opset changes. Takes and raises what :func:`check_model` does.
    """
    from modelforge.compilers.tensorrt.preflight_model import read_model

    model = replace(read_model(path), weights=())  # a constant may yet be folded away
    found = [each for each in _boundary(model, toolchain) if each.rule in ("dtype", "float64")]
    for node in model.nodes:
        if node.is_live and any(each.from_input for each in node.outputs):
            found += _judge(node, model, sm, toolchain, lasting=True)
    return found


def _boundary(model: Model, toolchain: str) -> list[Refusal]:
    from modelforge.compilers.tensorrt.preflight_rules import boundary

    if toolchain != "tensorrt-rtx":
        return []
    return [Refusal(rule, what, fix, MEASURED) for rule, what, fix in boundary(model)]


def _judge(node: Node, model: Model, sm: int, toolchain: str, *, lasting: bool = False) -> Iterator[Refusal]:
    """What is wrong with one node. ``lasting``: only by the rules that say so."""
    from modelforge.compilers.tensorrt.preflight_operators import OPERATORS
    from modelforge.compilers.tensorrt.preflight_rules import GENERAL

    is_classic = toolchain != "tensorrt-rtx"
    if not is_classic:
        yield from _known(node, parsed_operators())
    for rule in (*GENERAL, *OPERATORS):
        if (rule.ops and node.op not in rule.ops) or (is_classic and not rule.classic):
            continue
        if (rule.live_only and not node.is_live) or (lasting and not rule.lasting):
            continue
        reason = rule.broken(node, model, sm)
        if reason is not None:
            yield Refusal(rule.name, f"{_label(node)}: {reason}", rule.fix, rule.source)


def require(path: Path, capabilities: Sequence[int], toolchain: str) -> None:
    """Refuse a lowered model that an engine for ``capabilities`` cannot be built from.

    Raises:
        UnsupportedError: what :func:`check_model` says first, and how many more there are.
    """
    for sm in capabilities:
        found = check_model(path, sm, toolchain)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            first = found[0]
            what = f"the preflight for compute capability {dotted(sm)} refuses it, {first.rule}: {first.what}{more}"
            raise UnsupportedError(what, fix=first.fix)


def _known(node: Node, parsed: frozenset[str]) -> Iterator[Refusal]:
    if node.domain and node.op in parsed:
        yield Refusal("domain", f"{_label(node)} {_DOMAIN}", _STANDARD, MEASURED)
    elif node.op not in parsed:
        yield Refusal("operator", f"{_label(node)}: the parser has no {node.op}", _WITHOUT, _ASKED)


def _label(node: Node) -> str:
    domain = f"{node.domain}::" if node.domain else ""
    return f"node {node.name} ({domain}{node.op}, opset {node.opset})"


@cache
def parsed_operators() -> frozenset[str]:
    """The operators of the standard domain that the parser of 1.7 knows (data; a test asks the installed parser)."""
    text = files("modelforge.compilers.tensorrt").joinpath("operators.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def dotted(sm: int) -> str:
    """75 as 7.5, 120 as 12.0."""
    return f"{sm // 10}.{sm % 10}"


def _refuse_capability(sm: int) -> Refusal:
    known = ", ".join(dotted(supported) for supported in sorted(SUPPORTED_SM))
    gpu = f" ({_LEFT_OUT[sm]})" if sm in _LEFT_OUT else ""
    return Refusal(
        rule="compute-capability",
        what=f"TensorRT-RTX 1.7 has no compute capability {dotted(sm)}{gpu}; it has {known}",
        fix='compile with classic TensorRT on the device: compiler = "tensorrt"',
        source=f"ComputeCapability enum, {MEASURED}; {DOCS}",
    )


def _refuse_dtypes(facts: ModelFacts, sm: int) -> list[Refusal]:
    refusals = []
    for kind, tensors in (("input", facts.inputs), ("output", facts.outputs)):
        for tensor in tensors:
            since = DTYPE_SINCE.get(tensor.dtype, 0)
            if tensor.dtype not in _DTYPES:
                why = f"TensorRT-RTX takes no {tensor.dtype}"
                fix = "cast inside the client, and let the model take float32, float16, int32 or int64"
            elif sm < since:
                why = f"{tensor.dtype} needs compute capability {dotted(since)}, the target has {dotted(sm)}"
                fix = "use float16"
            else:
                continue
            refusals.append(Refusal("dtype", f"{kind} {tensor.name}: {why}", fix, f"{MEASURED}; {DOCS}"))
    return refusals


def _refuse_operators(facts: ModelFacts) -> list[Refusal]:
    """What stands in the model as the user gave it. Attributes, types and If are judged on the lowered model."""
    parsed = parsed_operators()
    refusals = []
    for op in facts.ops:
        domain = "" if op.domain == "ai.onnx" else op.domain
        opset = facts.opsets.get(domain, facts.opsets.get("", 0))
        label = f"node {op.example} ({f'{domain}::' if domain else ''}{op.op}, opset {opset})"
        if domain and op.op in parsed:
            refusals.append(Refusal("domain", f"{label} {_DOMAIN}", _STANDARD, MEASURED))
        elif op.op not in parsed:
            refusals.append(Refusal("operator", f"{label}: the parser has no {op.op}", _WITHOUT, _ASKED))
        elif op.op in NEVER:
            refusals.append(Refusal("operator", f"{label}: {NEVER[op.op]}", _WITHOUT, MEASURED))
    return refusals


def _refuse_fp32_products(facts: ModelFacts) -> list[Refusal]:
    return [
        Refusal(
            rule="sm75-fp32-gemm",
            what=f"node {op.example}: {op.op} in FP32 cannot be built for compute capability 7.5",
            fix='give the ladder ["int8", "fp16"] or ["fp16"]',
            source=f"{MEASURED}; footnote of {DOCS}; github.com/pytorch/TensorRT/issues/4546",
        )
        for op in facts.ops
        if op.op in FP32_GEMM_OPS
    ]
