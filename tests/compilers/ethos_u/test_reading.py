"""Configurations, tensors and Vela's own words, without the toolchain."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modelforge.compilers.ethos_u import EthosUCompiler
from modelforge.compilers.ethos_u.building import _require_npu
from modelforge.compilers.ethos_u.configurations import refusals
from modelforge.compilers.ethos_u.ports import match_ports
from modelforge.compilers.ethos_u.summary import read_delegation, read_summary
from modelforge.errors import BuildError, UnsupportedError
from modelforge.target import EthosUArchitecture, Registry

FLOAT = """
Warning (supported operators) operator: FULLY_CONNECTED, ofm: 'logits'
Reason: Operation has tensor with unsupported DataType Float32 (features)
Warning (supported operators) operator: RESHAPE, ofm: 'features'
CPU operators = 18 (100.0%)
NPU operators = 0 (0.0%)
"""
"""As ethos-u-vela 5.2.0 writes it, for a float model, and ends with 0."""


def arch(**changes: str) -> EthosUArchitecture:
    base = {
        "accelerator": "ethos-u55-128",
        "system_config": "Ethos_U55_High_End_Embedded",
        "memory_mode": "Shared_Sram",
    }
    return EthosUArchitecture.model_validate({"kind": "ethos-u", **base, **changes})


@pytest.mark.parametrize("tag", [tag for tag in Registry().tags() if tag.startswith("ethos")])
def test_every_profile_is_a_configuration_of_velas(tag: str) -> None:
    target = Registry().get(tag)
    assert isinstance(target.arch, EthosUArchitecture)
    assert list(refusals(target.arch)) == []


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"accelerator": "ethos-u55-512"}, "accelerator"),
        ({"accelerator": "ethos"}, "accelerator"),
        ({"system_config": "Ethos_U65_High_End"}, "system-config"),
        ({"memory_mode": "Dedicated_Sram"}, "memory-mode"),
        ({"memory_mode": "Dram_Only"}, "memory-mode"),
    ],
)
def test_what_is_none_is_refused(changes: dict[str, str], rule: str) -> None:
    (found,) = refusals(arch(**changes))
    assert found.rule == rule


def test_only_int8_and_only_with_a_file() -> None:
    target = replace(Registry().get("ethos-u55-128"))
    supports: Any = EthosUCompiler().supports
    assert [each.rule for each in supports(None, target, "int8", {}, {}, {"model": "m.tflite"})] == []
    assert [each.rule for each in supports(None, target, "fp16", {}, {}, {})] == ["precision", "own-file"]
    assert [each.rule for each in supports(None, Registry().get("t4"), "int8", {}, {})] == ["target"]


def port(**changes: Any) -> dict[str, Any]:
    base = {"tensor": "in", "dtype": "int8", "shape": [1, 8, 8, 3], "scale": 0.1, "zero_point": 0}
    return {**base, **changes}


def test_nchw_becomes_nhwc_and_back() -> None:
    (found,) = match_ports({"x": ("batch", 3, 8, 8)}, [port()], inputs=True)
    assert (found.permute, found.batched, found.tensor) == ((0, 2, 3, 1), True, "in")
    (found,) = match_ports({"y": (1, 3, 8, 8)}, [port()], inputs=False)
    assert found.permute == (0, 3, 1, 2)
    (found,) = match_ports({"y": (1, 10)}, [port(shape=[1, 10])], inputs=False)
    assert found.permute == (0, 1)


def test_names_come_before_order() -> None:
    two = [port(tensor="b", shape=[1, 2]), port(tensor="a", shape=[1, 3])]
    found = match_ports({"a": (1, 3), "b": (1, 2)}, two, inputs=True)
    assert [each.tensor for each in found] == ["a", "b"]


@pytest.mark.parametrize(
    ("onnx", "found", "words"),
    [
        ({"x": (1, 3, 9, 8)}, [port()], r"has shape \[1, 8, 8, 3\], and x of the ONNX model \[1, 3, 9, 8\]"),
        ({"x": (1, 3, 8, 8)}, [port(dtype="float32", scale=None)], "is float32"),
        ({"x": (1, 3, 8, 8)}, [port(scale=None)], "is int8"),
        ({"x": (1, 3, 8, 8), "y": (1,)}, [port()], "has 1 inputs, and the ONNX model 2"),
    ],
)
def test_another_model_is_refused(onnx: dict[str, Any], found: list[Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        match_ports(onnx, found, inputs=True)


def test_a_model_that_vela_leaves_to_the_cpu_is_a_failure() -> None:
    found = read_delegation(FLOAT, 0)
    assert found["operators"] == {"npu": 0, "cpu": 18}
    assert found["off_npu"] == ["FULLY_CONNECTED logits", "RESHAPE features"]
    with pytest.raises(UnsupportedError, match="nothing is on the NPU: FULLY_CONNECTED logits"):
        _require_npu(found, "ethos-u55-128")


def test_macs_of_the_cpu_are_not_made_up() -> None:
    found = read_delegation(
        "CPU operators = 1 (10%)\nNPU operators = 9 (90%)\n   CPU: Softmax = y (outputs [1])\n", 500
    )
    assert (found["macs"], found["off_npu"]) == (None, ["Softmax y"])
    _require_npu(found, "ethos-u55-128")
    assert read_delegation("CPU operators = 0\nNPU operators = 9", 500)["macs"] == {"npu": 500, "cpu": 0}
    with pytest.raises(BuildError, match="how many operators"):
        read_delegation("nothing", 0)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "cycles_total\nmany\n"])
def test_a_summary_that_cannot_be_read_is_told(text: str) -> None:
    with pytest.raises(BuildError, match="cannot be read"):
        read_summary(text)
