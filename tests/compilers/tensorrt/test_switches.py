"""The recipe's options: each limit refused before any build, and what is allowed said to the builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.tensorrt import switches
from modelforge.compilers.tensorrt.driver import TensorRtCompiler, TensorRtRtxCompiler
from modelforge.compilers.tensorrt.product import TENSORRT, TENSORRT_RTX, Product, parse_version
from modelforge.errors import RecipeError, UnsupportedError
from modelforge.options import TensorRtSection
from modelforge.recipe import Dim, load_recipe
from modelforge.target import CudaArchitecture, Registry
from tests.compilers.tensorrt.models import gpu

ORIN = CudaArchitecture(kind="cuda", sm=87, dla=True)


def refused(
    product: Product,
    options: dict[str, Any],
    sm: int = 80,
    *,
    version: str | None = None,
    precision: str = "fp16",
    is_dynamic: bool = False,
    dla: bool = False,
) -> list[str]:
    arch = CudaArchitecture(kind="cuda", sm=sm, dla=dla)
    return [
        refusal.what
        for refusal in switches.refusals(
            switches.Case(product, version, arch, "the-target", precision, is_dynamic, options)
        )
    ]


@pytest.mark.parametrize(
    ("product", "options", "more", "what"),
    [
        (TENSORRT_RTX, {"version_compatible": True}, {}, "has no lean runtime"),
        (TENSORRT_RTX, {"hardware_compatibility": "ampere+"}, {}, "ignores it, with a warning"),
        (TENSORRT_RTX, {"strip_plan": True}, {}, "needs a GPU to build such an engine"),
        (TENSORRT_RTX, {"dla_core": 0}, {}, "ignores it without a word"),
        (TENSORRT_RTX, {"compute_capabilities": ["8.0", "8.x"]}, {}, '"8.x" is no compute capability'),
        (TENSORRT_RTX, {"compute_capabilities": ["7.5"]}, {}, "itself has 8.0"),
        (TENSORRT, {"compute_capabilities": ["7.5", "8.0"]}, {}, "not for others by name"),
        (TENSORRT, {"version_compatible": True}, {"sm": 61}, "7.0 or newer"),
        (TENSORRT, {"hardware_compatibility": "ampere+"}, {"sm": 75}, "needs a GPU of 8.0 or newer to build on"),
        (TENSORRT, {"hardware_compatibility": "ampere+"}, {"sm": 87}, "not for JetPack"),
        (TENSORRT, {"hardware_compatibility": "same-compute-capability"}, {"sm": 70}, "7.5 or newer"),
        (TENSORRT, {"hardware_compatibility": "same-compute-capability"}, {"version": "10.3.0"}, "10.13 has"),
        (TENSORRT, {"hardware_compatibility": "volta"}, {}, '"volta" is no level'),
        (TENSORRT, {"dla_core": 0}, {}, "has no DLA"),
        (TENSORRT, {"dla_core": 0}, {"sm": 87, "dla": True, "is_dynamic": True}, "no dynamic dimension"),
        (TENSORRT, {"dla_core": 0}, {"sm": 87, "dla": True, "precision": "mixed"}, "not in mixed"),
        (TENSORRT, {"dla_core": 0}, {"sm": 87, "dla": True, "version": "10.13.3.9"}, "10.7 was the last"),
        (TENSORRT, {"dla_core": 0}, {"sm": 87, "dla": True, "version": "11.4.0.106"}, "before 11.4.1"),
        (TENSORRT, {"dla_core": 0}, {"sm": 87, "dla": True, "version": "10.3.0", "precision": "int8"}, "no Q/DQ"),
        (TENSORRT, {"dla_core": -1}, {"sm": 87, "dla": True}, "0 or 1"),
        (TENSORRT, {"builder_optimization_level": 6}, {}, "from 0 to 5"),
        (TENSORRT, {"workspace_bytes": 0}, {}, "positive number of bytes"),
        (TENSORRT, {"opt_level": 3}, {}, 'no option "opt_level"'),
    ],
)
def test_what_cannot_be_had_is_refused_with_its_reason(
    product: Product, options: dict[str, Any], more: dict[str, Any], what: str
) -> None:
    assert any(what in each for each in refused(product, options, **more)), refused(product, options, **more)


@pytest.mark.parametrize(
    ("product", "options", "more"),
    [
        (TENSORRT_RTX, {"compute_capabilities": ["7.5", "8.0"], "builder_optimization_level": 0}, {}),
        (TENSORRT, {"version_compatible": True, "strip_plan": True, "workspace_bytes": 1}, {"version": "10.3.0"}),
        (TENSORRT, {"hardware_compatibility": "same-compute-capability"}, {"sm": 75, "version": "10.13.3.9"}),
        (TENSORRT, {"hardware_compatibility": "same-compute-capability"}, {"sm": 87}),
        (TENSORRT, {"dla_core": 1}, {"sm": 87, "dla": True, "version": "10.3.0"}),
        (TENSORRT, {"dla_core": 1}, {"sm": 87, "dla": True, "version": "11.4.1", "precision": "int8"}),
        (TENSORRT, {"dla_core": 1}, {"sm": 87, "dla": True}),
    ],
)
def test_what_can_be_had_is_not_refused(product: Product, options: dict[str, Any], more: dict[str, Any]) -> None:
    assert refused(product, options, **more) == []


def test_each_option_of_the_recipe_is_known_here_and_has_a_rule_with_a_source() -> None:
    assert set(TensorRtSection.model_fields) == set(switches.KNOWN) == set(switches._RULES)


def test_every_refusal_names_its_source() -> None:
    options = {"version_compatible": True, "hardware_compatibility": "ampere+", "strip_plan": True, "dla_core": 0}
    found = switches.refusals(switches.Case(TENSORRT_RTX, None, ORIN, "t", "fp32", True, options))
    assert len(found) >= 4
    assert all(each.source and each.fix for each in found)


def test_the_drivers_ask_before_any_build(tmp_path: Path) -> None:
    options = {"strip_plan": True}
    job = CompileJob(tmp_path / "m.onnx", gpu(80), "fp16", {"x": (4,)}, {}, tmp_path, 10, options)
    with pytest.raises(UnsupportedError, match="strip_plan: NVIDIA TensorRT-RTX needs a GPU"):
        TensorRtRtxCompiler().compile(job)
    assert not list(tmp_path.iterdir())


def test_switches_in_the_words_of_a_command_line() -> None:
    asked = switches.read({"compute_capabilities": ["8.0"], "workspace_bytes": 7, "dla_core": 0}, gpu(75).arch)  # type: ignore[arg-type]  # a GPU has an arch
    assert asked.capabilities == (75, 80)
    assert asked.words(TENSORRT_RTX) == [
        "--strongly-typed", "--compute-capability=SM75,SM80", "--workspace=7", "--dla-core=0", "--gpu-fallback",
    ]  # fmt: skip
    assert "--compute-capability" not in " ".join(asked.words(TENSORRT))


@pytest.mark.parametrize(
    ("text", "numbers"), [("10.3.0", (10, 3, 0)), ("10.13.3.9+double", (10, 13, 3, 9)), ("11.4.0.106", (11, 4, 0, 106))]
)
def test_versions_are_compared_as_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers
    assert parse_version("10.13") > parse_version("10.3")


def test_a_recipe_says_them_and_a_misspelt_one_is_told(tmp_path: Path) -> None:
    text = """
schema = 1
name = "n"
version = "1.0.0"
[model]
path = "m.onnx"
[[target]]
tag = "t4"
precision = ["fp16"]
[target.tensorrt]
compute_capabilities = ["7.5", "8.0"]
builder_optimization_level = 5
"""
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    assert load_recipe(path).targets[0].sections == {
        "tensorrt": {"compute_capabilities": ["7.5", "8.0"], "builder_optimization_level": 5}
    }
    path.write_text(text + "strip_plans = true\n")
    with pytest.raises(RecipeError, match="strip_plans"):
        load_recipe(path)


def test_the_profiles_of_the_targets_have_the_dla_that_their_device_has() -> None:
    registry = Registry()
    with_dla = {target.tag for target in registry if isinstance(target.arch, CudaArchitecture) and target.arch.dla}
    assert with_dla == {"jetson-agx-orin"}


def test_supports_answers_for_every_capability_that_the_engine_is_for() -> None:
    from tests.compilers.tensorrt.test_build import facts, op

    options = {"compute_capabilities": ["7.5", "8.0"]}
    model = facts(op("Gemm", example="classifier"))
    found = TensorRtRtxCompiler().supports(model, gpu(80), "fp32", {}, {}, options)
    assert [each.rule for each in found] == ["sm75-fp32-gemm"]
    assert TensorRtRtxCompiler().supports(model, gpu(80), "fp32", {}, {}) == []
    assert (
        TensorRtCompiler().supports(model, gpu(87), "fp32", {"x": ("batch",)}, {"batch": Dim(min=1, opt=2, max=3)})
        == []
    )
