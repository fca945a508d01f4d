"""What the driver uses of NVIDIA's module exists in each version that it serves, and is called as that takes it."""

from __future__ import annotations

import ast
import copy
from pathlib import Path

import pytest

from modelforge.compilers.tensorrt.product import TENSORRT, TENSORRT_RTX
from tests.compilers.tensorrt import uses
from tests.compilers.tensorrt.bindings import RTX, VERSIONS, NotHad, read_real, recorded


def product(version: str) -> str:
    return "tensorrt-rtx" if version == RTX else "tensorrt"


@pytest.mark.parametrize("version", VERSIONS)
def test_all_that_the_driver_uses_exists(version: str) -> None:
    found = uses.check(recorded(version), product(version))
    assert found.unknown == ()
    assert found.missing == ()
    used = {f"{use.kind or 'trt'}.{use.attribute}" for use in found.uses}
    assert len(used) > 60
    assert {
        "Builder.build_serialized_network",
        "IExecutionContext.execute_async_v3",
        "IProfiler.report_layer_time",
    } <= used


@pytest.mark.bindings
@pytest.mark.parametrize("version", VERSIONS)
def test_the_record_is_what_the_real_bindings_say(version: str, tmp_path: Path) -> None:
    """And so the test above speaks of the real ones. Downloads a wheel of about 1 MB, once."""
    try:
        real = read_real(version, tmp_path)
    except NotHad as reason:
        pytest.skip(str(reason))
    assert real == recorded(version)


def test_every_tested_version_line_is_on_record() -> None:
    lines = {".".join(version.split(".")[:2]) for version in VERSIONS}
    assert lines == {*TENSORRT.tested, *TENSORRT_RTX.tested}


def test_no_other_file_loads_the_module() -> None:
    """What is not read by the walk must not touch NVIDIA's module."""
    for path in uses.SOURCES.glob("*.py"):
        named = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert ("trt" in named or "vendor" in named) == (path.name in uses.FILES), path.name


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "DLA_core"),
        ("IExecutionContext", "set_optimization_profile_async"),
        ("OnnxParserRefitter", "refit_from_file"),
        ("ITensor", "is_shape_tensor"),
        ("IProfiler", "report_layer_time"),
    ],
)
def test_a_name_that_a_version_lacks_is_found(kind: str, attribute: str) -> None:
    api = copy.deepcopy(recorded("10.3.0"))
    del api["classes"][kind]["attributes"][attribute]
    assert any(f"{kind}.{attribute}" in fault for fault in uses.check(api, "tensorrt").missing)


def test_a_missing_enum_member_and_a_missing_class_are_found() -> None:
    api = copy.deepcopy(recorded("10.3.0"))
    api["classes"]["BuilderFlag"]["enum"].remove("STRIP_PLAN")
    del api["classes"]["Refitter"]
    found = uses.check(api, "tensorrt")
    assert any("BuilderFlag.STRIP_PLAN" in fault for fault in found.missing)
    assert any("trt.Refitter" in fault for fault in found.missing)
    assert any("of a Refitter" in fault for fault in found.unknown)


def test_a_call_with_other_arguments_is_found() -> None:
    api = copy.deepcopy(recorded("10.3.0"))
    api["classes"]["IBuilderConfig"]["attributes"]["set_timing_cache"] = ["set_timing_cache(self: I, cache: C) -> bool"]
    assert any("set_timing_cache" in fault for fault in uses.check(api, "tensorrt").missing)


def test_what_one_product_alone_has_is_asked_of_that_one_only() -> None:
    assert any("ComputeCapability" in fault for fault in uses.check(recorded("10.3.0"), "tensorrt-rtx").missing)


@pytest.mark.parametrize(
    ("signature", "positional", "keywords", "accepted"),
    [
        ("f(self: A, x: int) -> int", 1, (), True),
        ("f(self: A, x: int) -> int", 0, (), False),
        ("f(self: A, x: int) -> int", 2, (), False),
        ("f(self: A, x: int = 0) -> int", 0, (), True),
        ("f(self: A, x: E = <E.STATIC: 0>, y: bool = True) -> int", 0, ("y",), True),
        ("f(self: A, x: Tuple[int, int], y: str) -> int", 2, (), True),
        ("f(self: A) -> None", 0, ("z",), False),
    ],
)
def test_signatures_are_read_as_pybind11_writes_them(
    signature: str, positional: int, keywords: tuple[str, ...], accepted: bool
) -> None:
    assert uses.accepts(signature, positional, keywords) == accepted
