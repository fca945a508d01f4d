"""TensorRT-RTX: real builds on the CPU, real refusals, and our data against the installed parser's answers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers import tensorrt_rtx
from modelforge.compilers.engine_header import read_header
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, Refusal, RunJob, Toolchain
from modelforge.compilers.tensorrt_rtx import FP32_GEMM_OPS, SUPPORTED_SM, TensorRtRtxCompiler, parsed_operators
from modelforge.errors import BuildError, IntegrityError, ModelForgeError, UnsupportedError
from modelforge.graph.facts import ModelFacts, OpFacts, TensorFacts
from modelforge.recipe import Dim
from modelforge.target import CudaArchitecture, Memory, Peak, Registry, Target
from modelforge.toolchains import worker

COMPILER = TensorRtRtxCompiler()

needs_toolchain = pytest.mark.skipif(
    isinstance(COMPILER.probe(), Missing), reason="needs pip install 'modelforge[tensorrt-rtx]'"
)

BATCH = Dim(min=1, opt=4, max=8)
Shape = tuple[int | str, ...]


def gpu(sm: int, *precisions: str) -> Target:
    return Target(
        tag=f"sm{sm}",
        title=f"a GPU of compute capability {sm}",
        vendor="nvidia",
        tier="edge",
        compilers=("tensorrt-rtx",),
        precisions=precisions or ("int8", "mixed", "fp16", "fp32"),  # type: ignore[arg-type]  # literals
        arch=CudaArchitecture(kind="cuda", sm=sm),
        memory=Memory(bytes=1, bandwidth=1.0),
        peak=Peak(),
        notes=(),
        path=Path(f"sm{sm}.toml"),
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


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    weights: Mapping[str, np.ndarray[Any, Any]],
    dtype: Any = np.float32,
    domains: tuple[str, ...] = (),
) -> Path:
    """Inputs and the output ``y`` are of ``dtype``, and so become all float weights."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, element, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", element, None)],
        [
            numpy_helper.from_array(array.astype(dtype) if array.dtype == np.float32 else array, name)
            for name, array in weights.items()
        ],
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def conv_net(path: Path, dtype: Any) -> Path:
    """``x [batch, 1, 8, 8]`` -> Conv, Relu, global mean, Gemm -> ``y [batch, 4]``."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "v"], ["y"], name="classifier"),
    ]
    weights = {
        "w": random.standard_normal((8, 1, 3, 3)).astype(np.float32),
        "v": random.standard_normal((8, 4)).astype(np.float32),
    }
    return save(path, nodes, {"x": ("batch", 1, 8, 8)}, weights, dtype)


def one_node(path: Path, name: str, shape: Shape = (4, 4), **attributes: Any) -> Path:
    domain = attributes.pop("domain", "")
    node = helper.make_node(name, ["x"], ["y"], name="the_node", domain=domain, **attributes)
    return save(path, [node], {"x": shape}, {}, domains=(domain,) if domain else ())


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
def test_gears_become_one_profile_and_a_note(tmp_path: Path) -> None:
    dims = {"batch": Dim(values=(1, 4, 16))}
    model = one_node(tmp_path / "m.onnx", "Relu", ("batch", 4))
    compiled = compile_for(gpu(86), model, tmp_path / "work", inputs={"x": ("batch", 4)}, dims=dims)
    assert compiled.commands[0][-1] == "--profile=x:1x4,16x4,16x4"
    assert any(note.startswith("batch: one optimisation profile from 1 to 16") for note in compiled.notes)


@needs_toolchain
@pytest.mark.parametrize("sm", [75, 80])
def test_fp32_products_fail_on_sm75_only_and_the_node_is_named(tmp_path: Path, sm: int) -> None:
    """The rule ``sm75-fp32-gemm`` against the real builder, on both sides of it."""
    model = conv_net(tmp_path / "m.onnx", np.float32)
    if sm == 80:
        assert compile_for(gpu(sm), model, tmp_path / "work", precision="fp32").artifact == "main.engine"
        return
    with pytest.raises(UnsupportedError, match="cannot have this node in FP32") as caught:
        compile_for(gpu(sm), model, tmp_path / "work", precision="fp32")
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
            compile_for(gpu(75), model, tmp_path / name, inputs=inputs, dims={})


@needs_toolchain
def test_a_parser_refusal_names_operator_node_and_code(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="refused Det, UNSUPPORTED_NODE") as caught:
        compile_for(gpu(80), one_node(tmp_path / "m.onnx", "Det"), tmp_path / "work", inputs={"x": (4, 4)}, dims={})
    assert caught.value.where == "node the_node"


@needs_toolchain
def test_a_custom_operator_is_named(tmp_path: Path) -> None:
    model = one_node(tmp_path / "m.onnx", "Frobnicate", domain="acme")
    with pytest.raises(UnsupportedError, match="refused Frobnicate, INVALID_NODE") as caught:
        compile_for(gpu(80), model, tmp_path / "work", inputs={"x": (4, 4)}, dims={})
    assert caught.value.where == "node the_node"


@needs_toolchain
def test_garbage_and_truncated_models_are_errors(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"hello world" * 100)
    with pytest.raises(BuildError, match="empty network: 0 layers, 0 outputs"):
        compile_for(gpu(80), garbage, tmp_path / "a", inputs={}, dims={})
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(conv_net(tmp_path / "m.onnx", np.float16).read_bytes()[:200])
    with pytest.raises(BuildError, match="MODEL_DESERIALIZE_FAILED"):
        compile_for(gpu(80), truncated, tmp_path / "b")
    with pytest.raises(BuildError, match="the parser"):
        compile_for(gpu(80), tmp_path / "absent.onnx", tmp_path / "c")
    assert not list(tmp_path.glob("*/main.engine"))


@needs_toolchain
@pytest.mark.parametrize(
    ("profile", "what"),
    [
        ({"x": [[8, 4], [4, 4], [8, 4]]}, "do not fit the model or each other"),
        ({"x": [[1, 5], [4, 5], [8, 5]]}, "do not fit the model or each other"),
        ({"x": [[1], [4], [8]]}, "do not fit the model or each other"),
        ({}, "the input has dynamic dimensions and no bounds"),
        ({"x": [[1, 4], [4, 4], [8, 4]], "z": [[1], [1], [1]]}, "the model has no input z"),
    ],
    ids=["min above opt", "against a fixed dimension", "another rank", "no bounds", "unknown name"],
)
def test_a_wrong_profile_is_an_error(tmp_path: Path, profile: dict[str, Any], what: str) -> None:
    request = {
        "model": str(one_node(tmp_path / "m.onnx", "Relu", ("batch", 4))),
        "engine": str(tmp_path / "main.engine"),
        "sm": 80,
        "profile": profile,
        "workspace_bytes": None,
    }
    with pytest.raises(BuildError, match=what):
        worker.call(
            "modelforge.compilers.tensorrt_rtx_worker:build", request, workdir=tmp_path, timeout=60, what="the build"
        )
    assert not (tmp_path / "main.engine").exists()


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
        compile_for(gpu(80), tmp_path / "m.onnx", tmp_path / "work", inputs={"x": (2, 4), "s": (2,)}, dims={})
    assert caught.value.where == "input s"


@needs_toolchain
def test_a_workspace_that_is_too_small_says_which_option(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx", np.float16)
    with pytest.raises(BuildError, match="workspace limit is too low") as caught:
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
    assert time.monotonic() - begun < 10
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
        compile_for(gpu(80), tmp_path / "m.onnx", tmp_path / "work", inputs={"x": (1, 2, 4, 8)}, dims={})


def test_a_child_that_claims_success_without_an_engine_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"version": "1.7.1.116", "layers": 1, "inputs": [], "outputs": [], "warnings": []}
    monkeypatch.setattr(tensorrt_rtx.worker, "call", lambda *_args, **_more: answer)
    with pytest.raises(BuildError, match="left no whole engine"):
        compile_for(gpu(80), tmp_path / "m.onnx", tmp_path / "work")


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
    model = facts(op("Relu"), op("Unique", example="u1"), op("Relu", domain="acme", example="r1"), op("If"))
    found = {refusal.rule: refusal.what for refusal in refuse(model, gpu(80))}
    assert sorted(found) == ["control-flow", "domain", "operator"]
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
        "modelforge.compilers.tensorrt_rtx_worker:describe",
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
    monkeypatch.setattr(tensorrt_rtx, "_DISTRIBUTIONS", ("no-such-distribution",))
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert missing.fix == "pip install 'modelforge[tensorrt-rtx]'"


def test_the_parent_process_never_imports_the_vendor_package() -> None:
    code = (
        "import sys; from modelforge.compilers.tensorrt_rtx import TensorRtRtxCompiler as C; C().probe(); "
        "sys.exit(any(name.startswith('tensorrt') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_engine_is_never_said_to_run_here(tmp_path: Path) -> None:
    target = gpu(75)
    assert COMPILER.runner(target) is None
    assert "compute capability 7.5 with TensorRT-RTX 1.7" in COMPILER.runner_hint(target)
    job = RunJob({}, "main.engine", target, tmp_path / "i.npz", 1, tmp_path / "o.npz", tmp_path, 10)
    with pytest.raises(BuildError, match="cannot be run here") as caught:
        COMPILER.run(job)
    assert "modelforge finalize" in str(caught.value.fix)
    assert isinstance(caught.value, ModelForgeError)
