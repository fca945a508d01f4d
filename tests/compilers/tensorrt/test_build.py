"""TensorRT-RTX: real builds on the CPU, real refusals, and our data against the installed parser's answers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from modelforge.compilers.engine_header import read_header
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Refusal, RunJob, Toolchain
from modelforge.compilers.tensorrt import building, product
from modelforge.compilers.tensorrt.driver import TensorRtRtxCompiler
from modelforge.compilers.tensorrt.messages import failure
from modelforge.compilers.tensorrt.preflight import FP32_GEMM_OPS, SUPPORTED_SM, parsed_operators
from modelforge.compilers.tensorrt.vendor import Heard
from modelforge.errors import BuildError, IntegrityError, ModelForgeError, ToolchainMissing, UnsupportedError
from modelforge.graph.facts import ModelFacts, OpFacts, TensorFacts
from modelforge.recipe import Dim
from modelforge.target import Registry, Target
from modelforge.toolchains import worker
from tests.compilers.tensorrt.models import BATCH, Shape, ask_builder, conv_net, gpu, one_node, save

COMPILER = TensorRtRtxCompiler()

needs_toolchain = pytest.mark.skipif(
    isinstance(COMPILER.probe(), Missing), reason="needs pip install 'modelforge[tensorrt-rtx]'"
)


def facts(
    *ops: OpFacts, inputs: tuple[TensorFacts, ...] | None = None, outputs: tuple[TensorFacts, ...] | None = None
) -> ModelFacts:
    return ModelFacts(
        producer="test",
        ir_version=10,
        opsets={"": 17},
        inputs=inputs or (TensorFacts("x", "float32", ("batch", 1, 8, 8)),),
        outputs=outputs or (TensorFacts("y", "float32", ("batch", 4)),),
        ops=ops,
        nodes=len(ops),
        parameters=0,
        parameter_bytes=0,
        flops=None,
        peak_activation_bytes=None,
        bound={},
    )


def op(name: str, *, domain: str = "", example: str = "node_1") -> OpFacts:
    return OpFacts(domain=domain, op=name, count=1, example=example, in_subgraph=False)


def refuse(model: ModelFacts, target: Target, precision: str = "fp16") -> list[Refusal]:
    return COMPILER.supports(model, target, precision, {}, {})


def compile_for(target: Target, model: Path, workdir: Path, **changes: Any) -> Compiled:
    workdir.mkdir(exist_ok=True)
    job = CompileJob(
        model=model,
        target=target,
        precision="fp16",
        inputs={"x": ("batch", 1, 8, 8)},
        dims={"batch": BATCH},
        workdir=workdir,
        timeout=120,
    )
    return COMPILER.compile(dataclasses.replace(job, **changes))


# -- real builds


@needs_toolchain
@pytest.mark.parametrize("sm", [75, 80])
def test_an_fp16_net_with_a_dynamic_batch_builds(tmp_path: Path, sm: int) -> None:
    compiled = compile_for(gpu(sm), conv_net(tmp_path / "m.onnx", np.float16), tmp_path / "work")
    engine = compiled.files[compiled.artifact]
    assert compiled.artifact == "main.engine"
    toolchain = COMPILER.probe()
    assert isinstance(toolchain, Toolchain)
    header = read_header(engine, version=toolchain.versions["tensorrt_rtx"])
    assert header.size == engine.stat().st_size > 10_000
    assert compiled.report["inputs"] == [{"name": "x", "dtype": "HALF", "shape": [-1, 1, 8, 8]}]
    assert compiled.report["outputs"] == [{"name": "y", "dtype": "HALF", "shape": [-1, 4]}]
    assert compiled.commands == (
        (
            "tensorrt_rtx.Builder",
            "--strongly-typed",
            f"--compute-capability=SM{sm}",
            "--profile=x:1x1x8x8,4x1x8x8,8x1x8x8",
        ),
    )
    assert "built without a GPU; compute-capability compatible, not run on one" in compiled.notes
    assert {75: "7.5", 80: "8.0"}[sm] in compiled.requires
    assert "1.7" in compiled.requires
    assert str(tmp_path) not in repr((compiled.commands, compiled.notes, compiled.requires, compiled.report))


@needs_toolchain
def test_a_truncated_real_engine_is_told(tmp_path: Path) -> None:
    model = one_node(tmp_path / "m.onnx", "Relu")
    compiled = compile_for(gpu(75), model, tmp_path / "work", inputs={"x": (4, 4)}, dims={})
    engine = compiled.files["main.engine"]
    with engine.open("r+b") as stream:
        stream.truncate(engine.stat().st_size // 2)
    with pytest.raises(IntegrityError, match="truncated"):
        read_header(engine)


@needs_toolchain
def test_gears_become_profiles_and_a_note(tmp_path: Path) -> None:
    dims = {"batch": Dim(values=(1, 4, 16))}
    model = one_node(tmp_path / "m.onnx", "Relu", ("batch", 4))
    compiled = compile_for(gpu(86), model, tmp_path / "work", inputs={"x": ("batch", 4)}, dims=dims)
    assert compiled.commands[0][-3:] == (
        "--profile=x:1x4,1x4,1x4",
        "--profile=x:2x4,4x4,4x4",
        "--profile=x:5x4,16x4,16x4",
    )
    assert "batch: an optimisation profile each for 1, 4, 16" in compiled.notes


@needs_toolchain
@pytest.mark.parametrize("sm", [75, 80])
def test_fp32_products_fail_on_sm75_only_and_the_node_is_named(tmp_path: Path, sm: int) -> None:
    """The rule ``sm75-fp32-gemm`` against the real builder, on both sides of it."""
    model = conv_net(tmp_path / "m.onnx", np.float32)
    if sm == 80:
        assert compile_for(gpu(sm), model, tmp_path / "work", precision="fp32").artifact == "main.engine"
        return
    with pytest.raises(UnsupportedError, match="node classifier"):
        compile_for(gpu(sm), model, tmp_path / "work", precision="fp32")
    with pytest.raises(UnsupportedError, match="cannot have this node in FP32") as caught:
        ask_builder(model, sm, tmp_path / "asked", profiles=[{"x": [[1, 1, 8, 8], [4, 1, 8, 8], [8, 1, 8, 8]]}])
    assert caught.value.where == "node classifier"
    assert "FP16" in str(caught.value.fix)
    assert "cudaError" not in str(caught.value)


def recurrent(name: str, gates: int) -> tuple[list[onnx.NodeProto], dict[str, Shape], dict[str, Any]]:
    weights = {"w": np.ones((1, 4 * gates, 3), np.float32), "r": np.ones((1, 4 * gates, 4), np.float32)}
    return [helper.make_node(name, ["x", "w", "r"], ["y"], name="n", hidden_size=4)], {"x": (5, 1, 3)}, weights


PRODUCTS: dict[str, Callable[[], tuple[list[onnx.NodeProto], dict[str, Shape], dict[str, Any]]]] = {
    "MatMul": lambda: (
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (1, 8)},
        {"w": np.ones((8, 4), np.float32)},
    ),
    "Gemm": lambda: ([helper.make_node("Gemm", ["x", "w"], ["y"])], {"x": (1, 8)}, {"w": np.ones((8, 4), np.float32)}),
    "Einsum": lambda: (
        [helper.make_node("Einsum", ["x", "w"], ["y"], equation="ab,bc->ac")],
        {"x": (1, 8)},
        {"w": np.ones((8, 4), np.float32)},
    ),
    "LSTM": lambda: recurrent("LSTM", 4),
    "GRU": lambda: recurrent("GRU", 3),
    "RNN": lambda: recurrent("RNN", 1),
}


@needs_toolchain
def test_each_operator_of_the_sm75_rule_is_refused_by_the_real_builder(tmp_path: Path) -> None:
    assert sorted(PRODUCTS) == sorted(FP32_GEMM_OPS)
    for name, make in PRODUCTS.items():
        nodes, inputs, weights = make()
        model = save(tmp_path / f"{name}.onnx", nodes, inputs, weights)
        with pytest.raises(UnsupportedError, match="FP32 GEMM is not supported"):
            ask_builder(model, 75, tmp_path / name)


@needs_toolchain
def test_a_parser_refusal_names_operator_node_and_code(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="refused Det, UNSUPPORTED_NODE") as caught:
        ask_builder(one_node(tmp_path / "m.onnx", "Det"), 80, tmp_path / "work")
    assert caught.value.where == "node the_node"


@needs_toolchain
def test_a_custom_operator_is_named(tmp_path: Path) -> None:
    model = one_node(tmp_path / "m.onnx", "Frobnicate", domain="acme")
    with pytest.raises(UnsupportedError, match="refused Frobnicate, INVALID_NODE") as caught:
        ask_builder(model, 80, tmp_path / "work")
    assert caught.value.where == "node the_node"


@needs_toolchain
def test_garbage_and_truncated_models_are_errors(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"hello world" * 100)
    with pytest.raises(BuildError, match="empty network: 0 layers, 0 outputs"):
        ask_builder(garbage, 80, tmp_path / "a")
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(conv_net(tmp_path / "m.onnx", np.float16).read_bytes()[:200])
    with pytest.raises(BuildError, match="MODEL_DESERIALIZE_FAILED"):
        ask_builder(truncated, 80, tmp_path / "b")
    with pytest.raises(BuildError, match="the parser"):
        ask_builder(tmp_path / "absent.onnx", 80, tmp_path / "c")
    for name, model in (("d", garbage), ("e", truncated), ("f", tmp_path / "absent.onnx")):
        with pytest.raises(ModelForgeError):
            compile_for(gpu(80), model, tmp_path / name)
    assert not list(tmp_path.glob("*/main.engine"))


@needs_toolchain
@pytest.mark.parametrize(
    ("profile", "what"),
    [
        ({"x": [[8, 4], [4, 4], [8, 4]]}, "do not rise"),
        ({"x": [[1, 5], [4, 5], [8, 5]]}, "do not fit the model or each other"),
        ({"x": [[1], [4], [8]]}, "do not fit the model or each other"),
        ({}, "the input has dynamic dimensions and no bounds"),
        ({"x": [[1, 4], [4, 4], [8, 4]], "z": [[1], [1], [1]]}, "the model has no input z"),
    ],
    ids=["min above opt", "against a fixed dimension", "another rank", "no bounds", "unknown name"],
)
def test_a_wrong_profile_is_an_error(tmp_path: Path, profile: dict[str, Any], what: str) -> None:
    model = one_node(tmp_path / "m.onnx", "Relu", ("batch", 4))
    with pytest.raises(BuildError, match=what):
        ask_builder(model, 80, tmp_path / "work", profiles=[profile] if profile else [])
    assert not (tmp_path / "work" / "main.engine").exists()


@needs_toolchain
def test_an_input_whose_values_are_a_shape_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "s"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4]),
            helper.make_tensor_value_info("s", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="decide shapes") as caught:
        ask_builder(tmp_path / "m.onnx", 80, tmp_path / "work")
    assert caught.value.where == "input s"


@needs_toolchain
def test_a_workspace_that_is_too_small_says_which_option(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx", np.float16)
    with pytest.raises(BuildError, match="not enough memory") as caught:
        compile_for(gpu(80), model, tmp_path / "work", options={"workspace_bytes": 1})
    assert "workspace_bytes" in str(caught.value.fix)


def test_unknown_and_senseless_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match='no option "opt_level"'):
        compile_for(gpu(80), tmp_path / "m.onnx", tmp_path / "work", options={"opt_level": 3})
    with pytest.raises(UnsupportedError, match="positive number of bytes"):
        compile_for(gpu(80), tmp_path / "m.onnx", tmp_path / "work", options={"workspace_bytes": "1G"})


# -- children that end badly


@needs_toolchain
def test_a_builder_that_hangs_is_stopped(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(BuildError, match="its time limit"):
        compile_for(gpu(80), conv_net(tmp_path / "m.onnx", np.float16), tmp_path / "work", timeout=0.05)
    assert time.monotonic() - begun < 30
    assert not (tmp_path / "work" / "main.engine").exists()


@needs_toolchain
def test_a_real_crash_of_the_builder_is_a_build_error(tmp_path: Path) -> None:
    """TensorRT-RTX 1.7.1.116 dies by SIGSEGV on the attention of one tensor with itself."""
    if COMPILER.probe() != Toolchain({"tensorrt_rtx": "1.7.1.116"}):
        pytest.skip("the bug was seen in 1.7.1.116 only")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Attention", ["x", "x", "x"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT16, [1, 2, 4, 8])],
        [value("y", TensorProto.FLOAT16, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BuildError, match="SIGSEGV"):
        ask_builder(tmp_path / "m.onnx", 80, tmp_path / "asked")
    with pytest.raises(UnsupportedError, match="crashes the builder"):
        compile_for(gpu(80), tmp_path / "m.onnx", tmp_path / "work", inputs={"x": (1, 2, 4, 8)}, dims={})


def test_a_child_that_claims_success_without_an_engine_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"version": "1.7.1.116", "layers": 1, "inputs": [], "outputs": [], "warnings": [], "dla": None}
    answer |= {"seconds": {"parse": 0.1, "build": 1.0}, "timing_caches_used": []}
    monkeypatch.setattr(building, "call", lambda *_args, **_more: answer)
    with pytest.raises(BuildError, match="left no whole engine"):
        compile_for(gpu(80), one_node(tmp_path / "m.onnx", "Relu"), tmp_path / "work")


# -- what is refused before any build


def test_products_in_fp32_are_refused_for_sm75_alone() -> None:
    model = facts(op("Conv"), op("Gemm", example="classifier"))
    (refusal,) = refuse(model, gpu(75), "fp32")
    assert refusal.rule == "sm75-fp32-gemm"
    assert "classifier" in refusal.what
    assert "fp16" in refusal.fix
    assert refusal.source
    assert refuse(model, gpu(75), "fp16") == []
    assert refuse(model, gpu(75), "int8") == []
    assert refuse(model, gpu(80), "fp32") == []
    assert refuse(facts(op("Conv")), gpu(75), "fp32") == []


@pytest.mark.parametrize(("sm", "gpu_name"), [(90, "H100"), (87, "Jetson Orin"), (70, "V100"), (61, "6.1")])
def test_other_compute_capabilities_are_refused_by_name(sm: int, gpu_name: str) -> None:
    (refusal,) = refuse(facts(op("Conv")), gpu(sm))
    assert refusal.rule == "compute-capability"
    assert gpu_name in refusal.what
    assert "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in refusal.what


def test_targets_without_a_gpu_are_refused(tmp_path: Path) -> None:
    target = Registry().get("cortex-a76")
    assert [refusal.rule for refusal in refuse(facts(), target)] == ["architecture"]
    with pytest.raises(UnsupportedError, match="cortex-a76"):
        compile_for(target, tmp_path / "m.onnx", tmp_path / "work")


def test_the_profile_of_the_t4_is_accepted() -> None:
    assert refuse(facts(op("Conv"), op("MatMul")), Registry().get("t4"), "fp16") == []


def test_a_precision_that_the_target_lacks_is_refused() -> None:
    assert [each.rule for each in refuse(facts(), gpu(80, "fp16"), "int8")] == ["precision"]


def test_operators_without_a_parser_and_foreign_domains_are_refused() -> None:
    model = facts(op("Relu"), op("Unique", example="u1"), op("Relu", domain="acme", example="r1"))
    found = {refusal.rule: refusal.what for refusal in refuse(model, gpu(80))}
    assert sorted(found) == ["domain", "operator"]
    assert "u1" in found["operator"]
    assert "Unique" in found["operator"]
    assert "acme::Relu" in found["domain"]


@pytest.mark.parametrize(
    ("dtype", "sm", "accepted"),
    [
        ("float16", 75, True),
        ("int64", 75, True),
        ("string", 89, False),
        ("float64", 89, False),
        ("int16", 89, False),
        ("bfloat16", 75, False),
        ("bfloat16", 80, True),
        ("float8_e4m3fn", 86, False),
        ("float8_e4m3fn", 89, True),
    ],
)
def test_data_types_of_inputs_and_outputs(dtype: str, sm: int, accepted: bool) -> None:
    tensor = (TensorFacts("tokens", dtype, (1, 4)),)
    for model in (facts(inputs=tensor), facts(outputs=tensor)):
        refusals = refuse(model, gpu(sm))
        assert [each.rule for each in refusals] == ([] if accepted else ["dtype"])
        assert all("tokens" in each.what and dtype in each.what for each in refusals)


# -- data against the installed software


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ops = sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""})
    return worker.call(
        "modelforge.compilers.tensorrt.worker:describe",
        {"ops": ops},
        workdir=tmp_path_factory.mktemp("describe"),
        timeout=60,
        what="asking the parser",
    ) | {"asked": ops}


@needs_toolchain
def test_the_operator_list_is_what_the_parser_says(installed: dict[str, Any]) -> None:
    """An older onnx knows fewer operators to ask about; of those, every answer must agree."""
    assert sorted(parsed_operators() & set(installed["asked"])) == installed["ops"]
    assert len(installed["ops"]) > 140


@needs_toolchain
def test_the_compute_capabilities_are_those_of_the_enum(installed: dict[str, Any]) -> None:
    assert sorted(SUPPORTED_SM) == installed["sm"]


@needs_toolchain
def test_probe_tells_the_version_that_the_module_has(installed: dict[str, Any]) -> None:
    toolchain = COMPILER.probe()
    assert isinstance(toolchain, Toolchain)
    assert toolchain.versions == {"tensorrt_rtx": installed["version"]}


# -- probe, runner


def test_a_missing_toolchain_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product.importlib.util, "find_spec", lambda _name: None)
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert missing.fix == "pip install 'modelforge[tensorrt-rtx]'"


def test_the_parent_process_never_imports_the_vendor_package() -> None:
    code = (
        "import sys; from modelforge.compilers.tensorrt.driver import TensorRtRtxCompiler as C; C().probe(); "
        "sys.exit(any(name.startswith('tensorrt') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_engine_is_never_said_to_run_here(tmp_path: Path) -> None:
    target = gpu(75)
    assert COMPILER.runner(target) is None
    assert "compute capability 7.5 with TensorRT-RTX" in COMPILER.runner_hint(target)
    job = RunJob({}, "main.engine", target, tmp_path / "i.npz", 1, tmp_path / "o.npz", tmp_path, 10)
    with pytest.raises(BuildError, match="cannot be run here") as caught:
        COMPILER.run(job)
    assert "modelforge verify" in str(caught.value.fix)
    assert isinstance(caught.value, ModelForgeError)


@needs_toolchain
def test_one_engine_for_two_capabilities_is_built_once_and_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
    options = {"compute_capabilities": ["7.5", "8.0"]}
    (tmp_path / "model").mkdir()
    model = conv_net(tmp_path / "model" / "m.onnx", np.float16)
    t4, a100 = (compile_for(gpu(sm), model, tmp_path / f"sm{sm}", options=options) for sm in (75, 80))
    assert t4.files["main.engine"].read_bytes() == a100.files["main.engine"].read_bytes()
    assert [each.report["shared"] for each in (t4, a100)] == [False, True]
    for each in (t4, a100):
        assert each.needs["sm"] == [75, 80]
        assert "compute capability 7.5 or 8.0" in each.requires
        assert "one engine for compute capabilities 7.5, 8.0" in each.notes
        assert "--compute-capability=SM75,SM80" in each.commands[0]
    other = compile_for(gpu(80), model, tmp_path / "other", options=options | {"builder_optimization_level": 1})
    assert other.report["shared"] is False


@needs_toolchain
def test_fp32_products_keep_a_shared_engine_from_being_built(tmp_path: Path) -> None:
    """The A100 could have it alone; the T4, which the same engine is for, could not."""
    options = {"compute_capabilities": ["7.5", "8.0"]}
    with pytest.raises(UnsupportedError, match=r"compute capability 7\.5"):
        compile_for(gpu(80), conv_net(tmp_path / "m.onnx", np.float32), tmp_path / "work", options=options)


MISLEADING = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at checkMacros.cpp:250 "
    "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version))"
)
"""As TensorRT-RTX 1.7.1 says it on a machine without a GPU, before or after the cause of a failed build."""


def test_the_misleading_line_is_never_the_cause_nor_an_error_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    heard = Heard(needs_gpu=False)
    for severity, message in (("ERROR", MISLEADING), ("ERROR", "the cause"), ("ERROR", MISLEADING)):
        heard.add(severity, message)
    assert heard.errors() == ["the cause"]
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("[INFO] (no GPU is needed for this; not the cause of anything)")
    assert second == "[ERROR] the cause"


def test_where_a_gpu_is_needed_the_same_line_is_the_cause() -> None:
    heard = Heard(needs_gpu=True)
    heard.add("ERROR", MISLEADING)
    cause = failure(heard.errors(), "there is no builder")
    assert isinstance(cause, ToolchainMissing)
    assert "no NVIDIA GPU" in cause.what
