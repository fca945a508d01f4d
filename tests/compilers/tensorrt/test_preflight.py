"""The preflight against the real builder: a few dozen models both ways here, all of ONNX's node cases under `slow`."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser

from modelforge.compilers.protocol import Missing
from modelforge.compilers.tensorrt import preflight
from modelforge.compilers.tensorrt.driver import TensorRtRtxCompiler
from modelforge.compilers.tensorrt.preflight import STRICTER, check_model, check_source, require
from modelforge.compilers.tensorrt.preflight_model import read_model
from modelforge.compilers.tensorrt.preflight_rules import operator_types
from modelforge.compilers.tensorrt.preflight_verdicts import Question, Verdict, ask
from modelforge.errors import ModelError, UnsupportedError

needs_toolchain = pytest.mark.skipif(
    isinstance(TensorRtRtxCompiler().probe(), Missing), reason="needs pip install 'modelforge[tensorrt-rtx]'"
)
SM = (75, 80)


@dataclass(frozen=True)
class Row:
    """A model in ONNX's own text form (the part behind the header), and the rule that refuses it: for 7.5, and 8.0."""

    name: str
    text: str
    sm75: str | None = None
    sm80: str | None = None
    opset: int = 18


def both(name: str, text: str, rule: str, opset: int = 18) -> Row:
    return Row(name, text, rule, rule, opset)


_QDQ = "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"
_IF = "y = If (c) <then_branch: graph = t () => (float[{a}] p) {{ p = {then} }}, else_branch: graph = e () => "
_IF += "(float[{b}] r) {{ r = {other} }}>"

ROWS = (
    Row("relu", "(float[4,4] x) => (float[4,4] y) { y = Relu(x) }"),
    # Products in FP32 on compute capability 7.5.
    Row("matmul", "(float[4,8] a, float[8,4] b) => (float[4,4] y) { y = MatMul(a, b) }", "sm75-fp32-gemm"),
    Row("matmul-half", "(float16[4,8] a, float16[8,4] b) => (float16[4,4] y) { y = MatMul(a, b) }"),
    Row("einsum", '(float[4,8] a, float[8,4] b) => (float[4,4] y) { y = Einsum<equation="ij,jk->ik">(a, b) }',
        "sm75-fp32-gemm"),
    Row("einsum-of-one", '(float[4,8] a) => (float[8,4] y) { y = Einsum<equation="ij->ji">(a) }'),
    Row("dead-matmul", "(float[4,4] x) => (float[4,4] y) { z = MatMul(x, x) y = Relu(x) }"),
    Row("conv-2d", "(float[1,4,8,8] x, float[4,4,3,3] w) => (float[1,4,6,6] y) { y = Conv(x, w) }"),
    Row("conv-3d", "(float[1,4,8,8,8] x, float[4,4,3,3,3] w) => (float[1,4,6,6,6] y) { y = Conv(x, w) }",
        "sm75-fp32-conv3d"),
    Row("loop-matmul", """(float[4,4] x, float[4,4] w) => (float[4,4] y) <int64 n = {3}, bool go = {1}> {
        y = Loop (n, go, x) <body: graph = b (int64 i, bool c, float[4,4] v) => (bool d, float[4,4] u)
            { d = Identity(c) u = MatMul(v, w) }> }""", "sm75-fp32-gemm"),
    # Element types.
    Row("bfloat16", "(bfloat16[4,4] x) => (bfloat16[4,4] y) { y = Relu(x) }", "capability-type"),
    Row("bfloat16-shape", "(bfloat16[4,4] x) => (int64[2] y) { y = Shape(x) }"),
    both("float8", "(float[4,4] x) => (float[4,4] y) <float s = {0.1}> "
         "{ z = Constant<value = float8e4m3fn {0}>() q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
         "capability-type", 19),
    both("uint16", "(uint16[4] x) => (uint16[4] y) { y = Identity(x) }", "dtype"),
    both("string", "(string[4] x) => (string[4] y) { y = Identity(x) }", "dtype"),
    both("unused-uint32", "(float[4] x) => (float[4] y) <uint32[1] u = {1}> { y = Relu(x) }", "dtype"),
    both("uint8-add", "(uint8[4] a, uint8[4] b) => (uint8[4] y) { y = Add(a, b) }", "operand-type"),
    Row("uint8-cast", "(uint8[4] x) => (float[4] y) { y = Cast<to = 1>(x) }"),
    both("uint8-between", "(float[4] x) => (float[4] y) { u = Cast<to = 2>(x) y = Cast<to = 1>(u) }", "uint8"),
    both("int8-sqrt", "(int8[4,4] x) => (int8[4,4] y) { y = Sqrt(x) }", "operand-type"),
    both("int32-relu", "(int32[4,4] x) => (int32[4,4] y) { y = Relu(x) }", "operand-type"),
    both("int8-constant", "(float[4] x) => (float[4] y) <int8[4] w = {1, 2, 3, 4}> "
         "{ v = Cast<to = 1>(w) y = Add(x, v) }", "quantized-constant"),
    both("cast-to-uint4", "(float[4] x) => (uint4[4] y) { y = Cast<to = 21>(x) }", "dtype", 21),
    # Quantization.
    Row("qdq", f"(float[4,4] x) => (float[4,4] y) <float s = {{0.1}}, int8 z = {{0}}> {{ {_QDQ} }}"),
    both("zero-point", f"(float[4,4] x) => (float[4,4] y) <float s = {{0.1}}, int8 z = {{5}}> {{ {_QDQ} }}",
         "zero-point"),
    both("open-zero-point", f"(float[4,4] x, int8 z) => (float[4,4] y) <float s = {{0.1}}> {{ {_QDQ} }}", "zero-point"),
    both("negative-scale", f"(float[4,4] x) => (float[4,4] y) <float s = {{-0.1}}, int8 z = {{0}}> {{ {_QDQ} }}",
         "scale"),
    both("int32-bias", "(float[1,2] x) => (float[1,2] y) <int32[2] b = {1, 2}, float s = {0.1}> "
         "{ d = DequantizeLinear(b, s) y = Add(x, d) }", "quantized-type"),
    both("uint8-dequantize", "(uint8[4] x) => (float[4] y) <float s = {0.1}> { y = DequantizeLinear(x, s) }",
         "quantized-type"),
    both("dynamic-quantize", "(float[4] x) => (uint8[4] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
         "operator"),
    # What decides shapes, and what must be constant.
    both("open-shape", "(float[4,4] x, int64[1] k) => (float[n] y) { y = Reshape(x, k) }", "shape-operand"),
    Row("constant-shape", "(float[4,4] x) => (float[16] y) <int64[1] k = {16}> { y = Reshape(x, k) }"),
    both("data-shape", """(float[8] x, float[4] b) => (float[n] y) <int64[1] o = {0}> {
        m = ReduceMax(b) i = Cast<to = 7>(m) y = Slice(x, o, i) }""", "shape-operand"),
    both("computed-axes", "(float[2,3] x) => (float[2,1] y) <int64[1] k = {1}, int64[1] o = {0}> "
         "{ a = Add(k, o) y = ReduceSum(x, a) }", "constant-operand"),
    Row("computed-unsqueeze", "(float[2,3] x) => (float[2,1,3] y) <int64[1] k = {1}, int64[1] o = {0}> "
        "{ a = Add(k, o) y = Unsqueeze(x, a) }"),
    both("rank-9", "(float[1,1,1,1,1,1,1,1,2] x) => (float[1,1,1,1,1,1,1,1,2] y) { y = Relu(x) }", "rank"),
    # Operators and attributes.
    both("no-parser", "(float[4,4] x) => (float y) { y = Det(x) }", "operator"),
    both("no-plugin", "(float[4,4] x) => (int64[2,n] y) { y = NonZero(x) }", "operator"),
    both("nms", "(float[1,9,4] b, float[1,2,9] s) => (int64[n,3] y) <int64[1] k = {3}, float[1] i = {0.5}> "
         "{ y = NonMaxSuppression(b, s, k, i) }", "operator"),
    both("dilated-pool", "(float[1,1,8,8] x) => (float[1,1,6,6] y) "
         "{ y = MaxPool<kernel_shape = [2,2], dilations = [2,2]>(x) }", "dilations"),
    both("pool-indices", "(float[1,1,8,8] x) => (float[1,1,7,7] y, int64[1,1,7,7] i) "
         "{ y, i = MaxPool<kernel_shape = [2,2]>(x) }", "one-output"),
    both("antialias", "(float[1,1,8,8] x) => (float[1,1,4,4] y) <float[4] s = {1, 1, 0.5, 0.5}> "
         '{ y = Resize<mode = "linear", antialias = 1>(x, , s) }', "resize"),
    both("scatter-add", "(float[4,4] x, int64[2,4] i, float[2,4] u) => (float[4,4] y) "
         '{ y = ScatterElements<reduction = "add">(x, i, u) }', "reduction"),
    both("capitals", '(float[4,8] a, float[8,4] b) => (float[4,4] y) { y = Einsum<equation="IJ,JK->IK">(a, b) }',
         "equation"),
    both("vector-by-3d", "(float[4] a, float[2,4,3] b) => (float[2,3] y) { y = MatMul(a, b) }", "vector-product"),
    both("softmax-of-vector", "(float[4] x) => (float[4] y) { y = Softmax(x) }", "softmax-rank"),
    both("top-k", "(float[2,4000] x) => (float[2,3841] y, int64[2,3841] i) <int64[1] k = {3841}> "
         "{ y, i = TopK(x, k) }", "top-k"),
    Row("top-k-largest", "(float[2,4000] x) => (float[2,3840] y, int64[2,3840] i) <int64[1] k = {3840}> "
        "{ y, i = TopK(x, k) }"),
    both("old-broadcast", "(float[2,3] a, float[3] b) => (float[2,3] y) { y = Add<broadcast = 1>(a, b) }",
         "broadcast", 6),
    # Attention.
    Row("attention", "(float16[1,2,8,64] q, float16[1,2,8,64] k, float16[1,2,8,64] v) => (float16[1,2,8,64] y) "
        "{ y = Attention(q, k, v) }", opset=23),
    both("attention-fp32", "(float[1,2,8,64] q, float[1,2,8,64] k, float[1,2,8,64] v) => (float[1,2,8,64] y) "
         "{ y = Attention(q, k, v) }", "attention", 23),
    both("attention-crash", "(float16[1,2,8,64] x) => (float16[1,2,8,64] y) { y = Attention(x, x, x) }",
         "attention", 23),
    # Control flow.
    Row("if", "(bool c, float[1,4] x) => (float[1,4] y) { "
        + _IF.format(a="1,4", b="1,4", then="Relu(x)", other="Neg(x)") + " }"),
    both("if-ranks", "(bool c, float[1,4] x) => (float y) <int64[1] k = {0}> { "
         + _IF.format(a="4", b="1,4", then="Squeeze(x, k)", other="Neg(x)") + " }", "branch-ranks"),
    both("loop-grows", """(float[4,4] x) => (float[m,4] y) <int64 n = {3}, bool go = {1}> {
        y = Loop (n, go, x) <body: graph = b (int64 i, bool c, float[4,4] v) => (bool d, float[8,4] u)
            { d = Identity(c) u = Concat<axis = 0>(v, v) }> }""", "loop"),
)  # fmt: skip


def write(row: Row, folder: Path) -> Path:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {row.opset}]> g {row.text}')
    path = folder / f"{row.name}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {row.name: write(row, folder) for row in ROWS}


@pytest.fixture(scope="module")
def verdicts(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Verdict]:
    """The real builder's, of every row, in as few children as crashes allow."""
    pairs = [(row.name, sm) for row in ROWS for sm in SM]
    found = ask([Question(models[name], sm) for name, sm in pairs], tmp_path_factory.mktemp("builder"))
    return dict(zip(pairs, found, strict=True))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_rule_that_refuses_a_model(row: Row, models: dict[str, Path]) -> None:
    for sm, rule in zip(SM, (row.sm75, row.sm80), strict=True):
        found = [each.rule for each in check_model(models[row.name], sm, "tensorrt-rtx")]
        assert (rule in found) if rule else not found, (sm, found)


@needs_toolchain
def test_the_builder_refuses_what_the_rows_say_it_does(verdicts: dict[tuple[str, int], Verdict]) -> None:
    expected = {(row.name, sm): rule is None for row in ROWS for sm, rule in zip(SM, (row.sm75, row.sm80), strict=True)}
    assert {key: verdict.builds for key, verdict in verdicts.items()} == expected


@needs_toolchain
def test_a_crash_of_the_builder_is_a_refusal_and_the_rest_is_asked(verdicts: dict[tuple[str, int], Verdict]) -> None:
    assert "SIGSEGV" in verdicts["attention-crash", 80].reason
    assert verdicts["if", 80].builds  # asked after it


# -- what a refusal says


def test_a_refusal_names_node_operator_opset_reason_fix_and_source(models: dict[str, Path]) -> None:
    (found,) = check_model(models["dilated-pool"], 80, "tensorrt-rtx")
    assert found.what == "node y (MaxPool, opset 18): its dilations are [2, 2]"
    assert found.fix
    assert "onnx-tensorrt" in found.source
    for row in ROWS:
        for each in check_model(models[row.name], 75, "tensorrt-rtx"):
            assert each.fix, row.name
            assert each.source, row.name
            assert each.rule in ("dtype", "rank", "float64") or ", opset " in each.what


def test_a_refused_model_never_reaches_the_builder(models: dict[str, Path]) -> None:
    require(models["matmul"], (80,), "tensorrt-rtx")
    with pytest.raises(
        UnsupportedError, match=r"7\.5 refuses it, sm75-fp32-gemm: node y \(MatMul, opset 18\)"
    ) as caught:
        require(models["matmul"], (80, 75), "tensorrt-rtx")  # one engine for both
    assert "fp16" in str(caught.value.fix)


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"hello world" * 100)
    with pytest.raises(ModelError):
        check_model(tmp_path / "m.onnx", 80, "tensorrt-rtx")


def test_classic_tensorrt_is_held_to_what_the_source_of_its_parser_shows(models: dict[str, Path]) -> None:
    refused = {row.name for row in ROWS if check_model(models[row.name], 75, "tensorrt")}
    assert {"dilated-pool", "antialias", "zero-point", "negative-scale", "old-broadcast"} <= refused
    assert not {"matmul", "conv-3d", "no-plugin", "nms", "attention-fp32", "int32-bias"} & refused


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("(float[1,1,8,8] x) => (float[1,1,6,6] y) { y = MaxPool<kernel_shape = [2,2], dilations = [2,2]>(x) }",
         ["dilations"]),
        ("(float[4,4] x) => (int64[2,n] y) { y = NonZero(x) }", ["operator"]),
        ("(string[4] x) => (string[4] y) { y = Identity(x) }", ["dtype", "dtype"]),
        # Lowering makes FP16 of it, folds it, or drops it.
        ("(float[4,8] a, float[8,4] b) => (float[4,4] y) { y = MatMul(a, b) }", []),
        ("(float[2,n] x) => (float[2,n] y) <float[2] c = {0, 1}> "
         "{ i = NonZero(c) s = ReduceMax(i) f = Cast<to = 1>(s) y = Mul(x, f) }", []),
        ("(float[4,4] x) => (float[4,4] y) { z = NonZero(x) y = Relu(x) }", []),
    ],
)  # fmt: skip
def test_of_a_users_model_only_what_no_lowering_mends_is_refused(text: str, rules: list[str], tmp_path: Path) -> None:
    path = write(Row("source", text), tmp_path)
    assert [each.rule for each in check_source(path, 75, "tensorrt-rtx")] == rules


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("nudenet", "320n.onnx"),
        ("magika", "models/standard_v3_3/model.onnx"),
        ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
        ("rapidocr", "models/PP-OCRv6_det_small.onnx"),
    ],
)
def test_real_models_pass_as_their_exporters_left_them(package: str, file: str) -> None:
    """All of them build at FP16 (docs/coverage.md): a refusal here would be wrong."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs pip install --no-deps {package}")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    assert check_source(path, 75, "tensorrt-rtx") == []


STRICT = {
    "domain": "(float[4] x) => (float[4] y) { y = acme.Relu(x) }",
    "float64": "(double[4] x) => (double[4] y) { y = Relu(x) }",
    "uint8-quantization": "(float[4] x) => (float[4] y) <float s = {0.1}, uint8 z = {0}> "
    "{ r = Relu(x) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z) }",
}


@needs_toolchain
def test_where_we_are_stricter_the_builder_would_build_another_model(tmp_path: Path) -> None:
    """That is why these rules do not count in the agreement: a build that succeeds proves nothing here."""
    assert set(STRICT) == STRICTER
    paths = []
    for rule, text in STRICT.items():
        model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18, "acme" : 1]> g {text}')
        paths.append(tmp_path / f"{rule}.onnx")
        paths[-1].write_bytes(model.SerializeToString())
        assert rule in {each.rule for each in check_model(paths[-1], 80, "tensorrt-rtx")}
    assert [each.builds for each in ask([Question(path, 80) for path in paths], tmp_path / "work")] == [True] * 3


@needs_toolchain
def test_two_quantizers_of_one_name_are_refused(tmp_path: Path) -> None:
    """The parser wants layer names of its own for these alone; of other nodes it makes the names differ."""
    row = Row(
        "twins",
        """(float[4,4] x) => (float[4,4] y) <float s = {0.1}, int8 z = {0}> {
        [q] q1 = QuantizeLinear(x, s, z) [d] d1 = DequantizeLinear(q1, s, z)
        [q] q2 = QuantizeLinear(d1, s, z) [d] y = DequantizeLinear(q2, s, z) }""",
    )
    path = write(row, tmp_path)
    assert [each.rule for each in check_model(path, 80, "tensorrt-rtx")] == ["same-name", "same-name"]
    (verdict,) = ask([Question(path, 80)], tmp_path / "work")
    assert not verdict.builds


# -- reading


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_damage_to_a_model_ends_in_an_answer_or_a_model_error(data: st.DataObject, tmp_path: Path) -> None:
    """Bytes of a real model changed: what still parses is judged, whatever it contradicts."""
    row = data.draw(st.sampled_from(ROWS))
    content = bytearray(write(row, tmp_path).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(bytes(content))
    with contextlib.suppress(ModelError):
        assert isinstance(check_model(path, 75, "tensorrt-rtx"), list)


def test_what_decides_a_shape_is_traced_through_bodies(models: dict[str, Path]) -> None:
    model = read_model(models["loop-matmul"])
    inner = next(node for node in model.nodes if node.op == "MatMul")
    assert inner.owners == ("y",)
    carried = inner.input(0)
    assert carried is not None
    assert carried.from_input
    assert (
        not next(node for node in read_model(models["bfloat16-shape"]).nodes if node.op == "Shape")
        .outputs[0]
        .from_input
    )


# -- the data


def _forms() -> ModuleType:
    return _load(Path(__file__).parent / "operator_models.py")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _disagreements(
    pairs: list[tuple[str, str]], write_model: Callable[[str, str, Path], Path], folder: Path
) -> list[Any]:
    models = [write_model(op, dtype, folder) for op, dtype in pairs]
    found = ask([Question(model, 80) for model in models], folder / "work")
    taken = operator_types()
    return [
        (op, dtype, verdict)
        for (op, dtype), verdict in zip(pairs, found, strict=True)
        if verdict.builds != (dtype in taken[op])
    ]


@needs_toolchain
def test_a_draw_of_the_table_of_types_is_what_the_builder_takes(tmp_path: Path) -> None:
    forms = _forms()
    drawn = random.Random(4).sample(list(forms.pairs()), 40)
    assert _disagreements(drawn, forms.write, tmp_path) == []


@needs_toolchain
@pytest.mark.slow  # builds 744 models: about a minute
def test_the_whole_table_of_types_is_what_the_builder_takes(tmp_path: Path) -> None:
    forms = _forms()
    assert set(operator_types()) - set(forms.FORMS) == {"Attention", "Range"}  # these have rules of their own
    assert _disagreements(list(forms.pairs()), forms.write, tmp_path) == []


def test_every_rule_is_about_operators_that_the_parser_knows() -> None:
    from modelforge.compilers.tensorrt.preflight_operators import OPERATORS
    from modelforge.compilers.tensorrt.preflight_rules import GENERAL

    # In no opset that onnx 1.23 still has among those the parser was asked about.
    old = {"Upsample"}
    named = {op for rule in (*GENERAL, *OPERATORS) for op in rule.ops}
    assert named | set(operator_types()) <= preflight.parsed_operators() | old


# -- the agreement that docs/coverage.md reports


@needs_toolchain
@pytest.mark.slow  # builds ONNX's 1,884 node cases for two compute capabilities: about two minutes
def test_the_preflight_agrees_with_the_builder_on_the_node_cases(tmp_path: Path) -> None:
    program = _load(Path(__file__).parents[3] / "docs" / "make_agreement.py")
    cases = program.node_cases(tmp_path / "cases")
    assert len(cases) >= 1800
    outcomes = program.measure(cases, tmp_path / "work")
    for chosen in (
        *([each for each in outcomes if each.sm == sm] for sm in SM),
        [each for each in outcomes if each.case.held],
    ):
        assert program.agreement(chosen) >= program.THRESHOLD, [each for each in chosen if not each.agrees]
