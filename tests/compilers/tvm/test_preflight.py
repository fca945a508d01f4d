"""What is refused before any compile, by name and with a way out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import modelforge.compilers.tvm
from modelforge.compilers.protocol import Refusal
from modelforge.compilers.tvm import TvmCompiler, preflight
from modelforge.graph.facts import ModelFacts, OpFacts, TensorFacts
from modelforge.recipe import Dim
from modelforge.target import Registry, Target
from tests.compilers.tvm.models import DIMS, INPUTS, cortex_a76, this_machine


def _facts(*ops: OpFacts, dtype: str = "float32") -> ModelFacts:
    return ModelFacts(
        producer="test",
        ir_version=8,
        opsets={"": 17},
        inputs=(TensorFacts("x", dtype, ("batch", 3, 16, 20)),),
        outputs=(TensorFacts("y", "float32", ("batch", 10)),),
        ops=ops or (OpFacts("", "Conv", 2, "conv1", False),),
        nodes=2,
        parameters=0,
        parameter_bytes=0,
        flops=None,
        peak_activation_bytes=None,
        bound={},
    )


def _refusals(
    facts: ModelFacts | None = None,
    target: Target | None = None,
    precision: str = "fp32",
    inputs: dict[str, tuple[int | str, ...]] | None = None,
) -> list[Refusal]:
    dims = DIMS | {"width": Dim(values=(8, 16))}
    return TvmCompiler().supports(facts or _facts(), target or cortex_a76(), precision, inputs or INPUTS, dims)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "mixed"])
def test_a_plain_model_is_welcome(precision: str) -> None:
    assert _refusals(precision=precision) == []


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_quantized_models_are_refused_where_the_profile_does_not_list_them(precision: str) -> None:
    (refusal,) = _refusals(target=Registry().get("cortex-a72"), precision=precision)
    assert refusal.rule == "precision"
    assert refusal.what.startswith("cortex-a72 has no dot products")


def test_fp16_is_refused_where_the_processor_has_no_arithmetic_for_it() -> None:
    (refusal,) = _refusals(target=this_machine(), precision="fp16")
    assert refusal.rule == "precision"
    assert "this-machine" in refusal.what


def test_a_target_that_is_no_cpu() -> None:
    (refusal,) = _refusals(target=Registry().get("t4"))
    assert refusal.rule == "target"


@pytest.mark.parametrize(
    ("op", "domain", "rule"),
    [
        ("If", "", "control-flow"),
        ("Loop", "", "control-flow"),
        ("LSTM", "", "recurrent"),
        ("NonMaxSuppression", "", "data-dependent-shape"),
        ("QLinearConv", "", "op"),
        ("Attention", "", "op"),  # the importer takes every Attention for Microsoft's
        ("FusedConv", "com.microsoft", "op"),
        ("Conv", "my.domain", "op"),
    ],
)
def test_an_operator_that_it_cannot_have_is_named_with_its_node(op: str, domain: str, rule: str) -> None:
    (refusal,) = _refusals(_facts(OpFacts(domain, op, 3, "layer7/node", False)))
    assert refusal.rule == rule
    assert op in refusal.what
    assert "layer7/node and 2 more" in refusal.what
    assert refusal.fix


def test_an_operator_of_a_domain_that_it_maps_is_welcome() -> None:
    assert _refusals(_facts(OpFacts("com.microsoft", "FastGelu", 1, "n", False))) == []


def test_a_symbol_that_is_not_the_batch_is_named_with_its_input() -> None:
    (refusal,) = _refusals(inputs={"image": ("batch", 3, 48, "width")})
    assert refusal.rule == "dynamic-shape"
    assert "image" in refusal.what
    assert "width" in refusal.what
    assert "inputs.image.shape" in refusal.fix


def test_a_second_leading_symbol_is_refused() -> None:
    (refusal,) = _refusals(inputs={"x": ("batch", 3), "boxes": ("width", 4)})
    assert "boxes" in refusal.what


def test_an_input_of_strings_is_refused() -> None:
    (refusal,) = _refusals(_facts(dtype="string"))
    assert refusal.rule == "dtype"


def test_the_table_of_operators_is_the_installed_importers() -> None:
    frontend = pytest.importorskip("modelforge.compilers.tvm.frontend")
    table = preflight.importable()
    assert sorted(set().union(*table.values())) == frontend.importable_ops()
    text = json.loads((Path(modelforge.compilers.tvm.__file__).parent / "ops.json").read_text())
    assert text["importer"] == f"apache-tvm {modelforge.compilers.tvm.runtime.TVM_VERSION}"


def test_every_operator_of_the_table_belongs_to_a_domain_that_defines_it() -> None:
    import onnx.defs

    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert preflight.importable()[""] <= standard


def test_without_a_linker_it_is_refused_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.linker, "find", lambda isa: None)
    (refusal,) = _refusals()
    assert refusal.rule == "linker"


def test_gears_follow_the_dimension() -> None:
    assert list(preflight.gears(DIMS, INPUTS)) == [1, 4, 8]
    assert list(preflight.gears({}, {"x": (1, 3)})) == [1]
    assert dataclasses.is_dataclass(TvmCompiler)
