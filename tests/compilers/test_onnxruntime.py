"""ONNX Runtime as a compiler and as the runner of reference models, on real models."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from modelforge.compilers import onnxruntime as module
from modelforge.compilers.onnxruntime import OnnxRuntimeCompiler
from modelforge.compilers.protocol import Compiled, CompileJob, Missing, RunJob, Toolchain
from modelforge.errors import BuildError, UnsupportedError
from modelforge.graph.facts import ModelFacts, OpFacts
from modelforge.recipe import Dim
from modelforge.target import CpuArchitecture, Memory, Peak, Target
from modelforge.toolchains import worker
from modelforge.toolchains.host import Host, this_host

COMPILER = OnnxRuntimeCompiler()
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32)


def cpu(isa: str = "", *cpuinfo: str, precisions: tuple[str, ...] = ("int8", "fp32")) -> Target:
    return Target(
        tag="a-cpu",
        title="a CPU",
        vendor="any",
        tier="cloud",
        compilers=("onnxruntime",),
        precisions=precisions,  # type: ignore[arg-type]  # literals
        arch=CpuArchitecture(
            kind="cpu",
            isa=isa or this_host().isa,  # type: ignore[arg-type]  # a literal on every machine that this is tested on
            mcpu="generic",
            cpuinfo=cpuinfo,
            cores=2,
            vector_bits=128,
        ),
        memory=Memory(bytes=1, bandwidth=1.0),
        peak=Peak(),
        notes=(),
        path=Path("a-cpu.toml"),
    )


def facts(*ops: OpFacts) -> ModelFacts:
    return ModelFacts("test", 10, {"": 17}, (), (), ops, len(ops), 0, 0, None, None, {})


def save(path: Path, nodes: list[Any], inputs: dict[str, Any], outputs: list[str], weights: dict[str, Any]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def conv_net(path: Path, batch: int | str = "batch") -> Path:
    """Conv + BatchNormalization + Relu + Gemm, with a constant to fold."""
    node = helper.make_node
    one = np.ones(4, np.float32)
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="conv"),
        node("BatchNormalization", ["c", "one", "half", "half", "one"], ["b"], name="norm"),
        node("Relu", ["b"], ["r"], name="relu"),
        node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Add", ["one", "half"], ["two"], name="constant"),
        node("Mul", ["f", "two"], ["y"], name="mul"),
    ]
    return save(path, nodes, {"x": [batch, 3, 8, 8]}, ["y"], {"w": WEIGHT, "one": one, "half": one / 2})


def qdq_net(path: Path) -> Path:
    """A Conv between QDQ pairs with int8 weights: what an int8 lowered model looks like."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        node("DequantizeLinear", ["wq", "s", "z8"], ["wd"]),
        node("Conv", ["xd", "wd"], ["c"], name="conv"),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "s2", "z"], ["rq"]),
        node("DequantizeLinear", ["rq", "s2", "z"], ["y"]),
    ]
    weights = {
        "s": np.float32(0.02),
        "s2": np.float32(0.1),
        "z": np.uint8(0),
        "z8": np.int8(0),
        "wq": RANDOM.integers(-60, 60, (4, 3, 3, 3)).astype(np.int8),
    }
    return save(path, nodes, {"x": ["batch", 3, 8, 8]}, ["y"], {k: np.asarray(v) for k, v in weights.items()})


def compile_for(target: Target, model: Path, workdir: Path, **changes: Any) -> Compiled:
    workdir.mkdir(parents=True, exist_ok=True)
    job = CompileJob(
        model=model,
        target=target,
        precision="fp32",
        inputs={"x": ("batch", 3, 8, 8)},
        dims={"batch": Dim(min=1, opt=2, max=4)},
        workdir=workdir,
        timeout=60,
    )
    return COMPILER.compile(dataclasses.replace(job, **changes))


def run_model(model: Path, folder: Path, arrays: dict[str, Any], batch: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "inputs.npz", **arrays)
    request = {"model": str(model), "batch": batch, "threads": 1}
    request |= {name: str(folder / f"{name}.npz") for name in ("inputs", "outputs")}
    worker.call(
        "modelforge.compilers.onnxruntime_worker:run_model", request, workdir=folder, timeout=60, what="the reference"
    )
    with np.load(folder / "outputs.npz") as archive:
        return dict(archive)


def images(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


# -- compile


def test_a_net_is_optimised_with_standard_operators_and_the_same_outputs(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    compiled = compile_for(cpu(), model, tmp_path / "work")
    artifact = compiled.files[compiled.artifact]
    assert compiled.artifact == "main.onnx"
    nodes = [node.op_type for node in onnx.load(artifact).graph.node]
    assert "BatchNormalization" not in nodes, "folded into the Conv"
    assert "Add" not in nodes, "a constant"
    assert set(compiled.report["nodes"]) == {"ai.onnx"}
    before = run_model(model, tmp_path / "a", {"x": images(5)}, batch=2)
    after = run_model(artifact, tmp_path / "b", {"x": images(5)}, batch=2)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-5)
    assert str(tmp_path) not in repr((compiled.commands, compiled.requires, compiled.report))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    other = tmp_path / "elsewhere" / "renamed.onnx"
    other.parent.mkdir()
    other.write_bytes(model.read_bytes())
    first = compile_for(cpu(), model, tmp_path / "first").files["main.onnx"]
    second = compile_for(cpu(), other, tmp_path / "second").files["main.onnx"]
    assert first.read_bytes() == second.read_bytes()


def test_qdq_pairs_survive(tmp_path: Path) -> None:
    model = qdq_net(tmp_path / "m.onnx")
    artifact = compile_for(cpu(), model, tmp_path / "work", precision="int8").files["main.onnx"]
    saved = onnx.load(artifact).graph
    nodes = [node.op_type for node in saved.node]
    assert nodes.count("QuantizeLinear") == 2
    assert nodes.count("DequantizeLinear") == 3
    int8 = [tensor for tensor in saved.initializer if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 4]
    assert len(int8) == 1, "weights stay int8"
    before = run_model(model, tmp_path / "a", {"x": images(3)})
    after = run_model(artifact, tmp_path / "b", {"x": images(3)})
    np.testing.assert_array_equal(after["y"], before["y"])
    assert before["y"].std() > 0


def test_large_weights_lie_beside_the_model_and_run_from_a_store(tmp_path: Path) -> None:
    """The limit lowered from 1.5 GB; the blobs named as a store names them."""
    model = conv_net(tmp_path / "m.onnx")
    work = tmp_path / "work"
    work.mkdir()
    request = {"model": str(model), "output": str(work / "main.onnx"), "external_above": 10}
    # Only tensors above 1 kB go out: the net needs one.
    big = onnx.load(model)
    big.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1000), np.float32), "bias"))
    big.graph.node.append(helper.make_node("Gemm", ["y", "m4"], ["z"]))
    big.graph.node.append(helper.make_node("Add", ["z", "bias"], ["out"]))
    big.graph.initializer.append(numpy_helper.from_array(np.ones((4, 1000), np.float32), "m4"))
    big.graph.output[0].name = "out"
    onnx.save(big, model)
    saved = worker.call(
        "modelforge.compilers.onnxruntime_worker:optimise", request, workdir=work, timeout=60, what="optimising"
    )
    assert saved["data"] == "main.onnx.data"
    assert (work / "main.onnx.data").stat().st_size >= 16_000
    blobs = {"main.onnx": tmp_path / "blob1", "main.onnx.data": tmp_path / "blob2"}
    for name, blob in blobs.items():
        (work / name).rename(blob)
    np.savez(tmp_path / "inputs.npz", x=images(3))
    run = tmp_path / "run"
    run.mkdir()
    job = RunJob(blobs, "main.onnx", cpu(), tmp_path / "inputs.npz", 2, tmp_path / "outputs.npz", run, 60)
    assert COMPILER.run(job).evidence == "device"
    with np.load(tmp_path / "outputs.npz") as archive:
        np.testing.assert_allclose(archive["out"], run_model(model, tmp_path / "ref", {"x": images(3)})["out"], 1e-4)


def test_what_onnxruntime_refuses_is_named_with_its_node(tmp_path: Path) -> None:
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="the_node", domain="")
    model = save(tmp_path / "m.onnx", [node], {"x": [1, 4]}, ["y"], {})
    with pytest.raises(UnsupportedError, match="Frobnicate") as caught:
        compile_for(cpu(), model, tmp_path / "work")
    assert caught.value.where == "node the_node"
    assert str(tmp_path) not in caught.value.what


def test_a_type_without_a_kernel_is_unsupported(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="the_conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(WEIGHT.astype(np.float64), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="NOT_IMPLEMENTED") as caught:
        compile_for(cpu(), tmp_path / "m.onnx", tmp_path / "work")
    assert caught.value.where == "node the_conv"


def test_garbage_is_a_build_error_and_leaves_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"hello world" * 50)
    with pytest.raises(BuildError):
        compile_for(cpu(), tmp_path / "m.onnx", tmp_path / "work")
    assert not (tmp_path / "work" / "main.onnx").exists()


def test_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match='no option "level"'):
        compile_for(cpu(), tmp_path / "m.onnx", tmp_path / "work", options={"level": "all"})


# -- running over samples


def test_every_batch_size_gives_the_same_samples_in_order(tmp_path: Path) -> None:
    model = conv_net(tmp_path / "m.onnx")
    alone = run_model(model, tmp_path / "1", {"x": images(7)}, batch=1)
    assert alone["y"].shape == (7, 4)
    for batch in (3, 7, 100):
        together = run_model(model, tmp_path / str(batch), {"x": images(7)}, batch=batch)
        np.testing.assert_allclose(together["y"], alone["y"], rtol=1e-5, atol=1e-6)
    reversed_ = run_model(model, tmp_path / "r", {"x": images(7)[::-1].copy()})
    np.testing.assert_array_equal(reversed_["y"][::-1], alone["y"])


def test_a_first_dimension_fixed_at_one_runs_sample_by_sample(tmp_path: Path) -> None:
    free = run_model(conv_net(tmp_path / "a.onnx"), tmp_path / "a", {"x": images(3)}, batch=1)
    fixed = run_model(conv_net(tmp_path / "b.onnx", 1), tmp_path / "b", {"x": images(3)}, batch=8)
    assert fixed["y"].shape == (3, 4)
    np.testing.assert_array_equal(fixed["y"], free["y"])


def test_a_fixed_first_dimension_of_another_size_belongs_to_the_sample(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], {"x": [2, 4]}, ["y"], {})
    data = RANDOM.standard_normal((5, 2, 4)).astype(np.float32)
    np.testing.assert_array_equal(run_model(model, tmp_path / "w", {"x": data}, batch=4)["y"], -data)


def test_a_scalar_output_is_one_number_a_sample(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)
    model = save(tmp_path / "m.onnx", [node], {"x": [1, 4]}, ["y"], {})
    data = RANDOM.standard_normal((3, 4)).astype(np.float32)
    np.testing.assert_allclose(run_model(model, tmp_path / "w", {"x": data})["y"], data.mean(axis=1), rtol=1e-6)


def test_an_output_that_mixes_the_samples_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["x"], ["y"], keepdims=0)
    model = save(tmp_path / "m.onnx", [node], {"x": ["batch", 4]}, ["y"], {})
    with pytest.raises(BuildError, match="for a batch of 2 samples"):
        run_model(model, tmp_path / "w", {"x": np.ones((4, 4), np.float32)}, batch=2)


def test_outputs_of_varying_shape_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["x"], ["i"])
    cast = helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)
    model = save(tmp_path / "m.onnx", [node, cast], {"x": [1, 4]}, ["y"], {})
    with pytest.raises(BuildError, match="other shapes for other samples"):
        run_model(model, tmp_path / "w", {"x": np.tril(np.ones((3, 4), np.float32))})


def test_the_outputs_file_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    """An output called ``file`` is one that numpy.savez cannot write."""
    nodes = [helper.make_node("Neg", ["x"], ["file"]), helper.make_node("Abs", ["x"], ["a/b"])]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["n", 4]}, ["file", "a/b"], {})
    data = RANDOM.standard_normal((3, 4)).astype(np.float32)
    for folder in ("one", "two"):
        outputs = run_model(model, tmp_path / folder, {"x": data}, batch=2)
        np.testing.assert_array_equal(outputs["file"], -data)
        np.testing.assert_array_equal(outputs["a/b"], abs(data))
    one, two = (tmp_path / folder / "outputs.npz" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {1980}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"z": np.ones((2, 4), np.float32)}, "no array for the input x"),
        ({"x": np.ones((2, 5), np.float32)}, "sample 0: ONNX Runtime"),
        ({"x": np.ones((2, 4), np.float64)}, "sample 0: ONNX Runtime"),
        ({"x": np.ones((0, 4), np.float32)}, "no sample to run"),
        ({"x": np.asfortranarray(np.ones((2, 4), np.float32))}, "C order"),
    ],
    ids=["no array", "shape", "dtype", "empty", "Fortran order"],
)
def test_wrong_samples_are_build_errors(tmp_path: Path, arrays: dict[str, Any], what: str) -> None:
    model = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["x"], ["y"])], {"x": ["n", 4]}, ["y"], {})
    with pytest.raises(BuildError, match=what):
        run_model(model, tmp_path / "w", arrays)
    assert not (tmp_path / "w" / "outputs.npz").exists()


def test_inputs_of_different_lengths_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "z"], ["y"])
    model = save(tmp_path / "m.onnx", [node], {"x": ["n", 4], "z": ["n", 4]}, ["y"], {})
    with pytest.raises(BuildError, match="differ in their number of samples"):
        run_model(model, tmp_path / "w", {"x": np.ones((2, 4), np.float32), "z": np.ones((3, 4), np.float32)})


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    """600 MB of samples, read with a peak that could not hold half of them."""
    mean = helper.make_node("GlobalAveragePool", ["x"], ["y"])
    model = save(tmp_path / "m.onnx", [mean], {"x": ["n", 3, 256, 256]}, ["y"], {})
    samples = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(760, 3, 256, 256))
    samples.flush()
    with zipfile.ZipFile(tmp_path / "inputs.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    (tmp_path / "x.npy").unlink()
    request = {"model": str(model), "batch": 4, "threads": 1}
    request |= {name: str(tmp_path / f"{name}.npz") for name in ("inputs", "outputs")}
    # VmHWM, and not getrusage's ru_maxrss: a child inherits that from the process that forked it, here all of pytest.
    code = (
        "import json, re, sys\n"
        "from modelforge.compilers.onnxruntime_worker import run_model\n"
        "run_model(json.loads(sys.argv[1]))\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(request)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300 * 1024, "kilobytes at the peak"


# -- evidence


def test_a_cpu_with_all_flags_is_the_device(tmp_path: Path) -> None:
    target = cpu("", *sorted(this_host().flags)[:3])
    compiled = compile_for(target, conv_net(tmp_path / "m.onnx"), tmp_path / "work")
    np.savez(tmp_path / "inputs.npz", x=images(2))
    outputs = tmp_path / "outputs.npz"
    job = RunJob(compiled.files, "main.onnx", target, tmp_path / "inputs.npz", 2, outputs, tmp_path / "work", 60)
    assert COMPILER.runner(target) == "device"
    assert COMPILER.runner_hint(target) == ""
    ran = COMPILER.run(job)
    assert (ran.evidence, ran.latency) == ("device", {})
    with np.load(outputs) as archive:
        assert archive["y"].shape == (2, 4)


def test_a_cpu_that_lacks_a_flag_is_none_and_run_refuses(tmp_path: Path) -> None:
    target = cpu("", "avx1024")
    assert COMPILER.runner(target) is None
    assert "lacks avx1024" in COMPILER.runner_hint(target)
    job = RunJob({}, "main.onnx", target, tmp_path / "i.npz", 1, tmp_path / "o.npz", tmp_path, 60)
    with pytest.raises(BuildError, match="cannot run code for a-cpu here"):
        COMPILER.run(job)


def test_an_arm_target_on_an_x86_machine_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.host, "this_host", lambda: Host("x86-64", frozenset(), 2))
    hint = COMPILER.runner_hint(cpu("aarch64"))
    assert COMPILER.runner(cpu("aarch64")) is None
    assert "this machine is x86-64, the target aarch64" in hint
    assert "qemu" in hint


# -- refusals and probe


def test_foreign_domains_are_refused_with_operator_and_node() -> None:
    model = facts(
        OpFacts("", "Conv", 1, "c", False),
        OpFacts("ai.onnx.ml", "TreeEnsemble", 1, "t", False),
        OpFacts("com.microsoft", "Gelu", 1, "g", False),
        OpFacts("acme", "Frobnicate", 1, "node_7", False),
    )
    (refusal,) = COMPILER.supports(model, cpu(), "fp32", {}, {})
    assert refusal.rule == "domain"
    assert "node_7" in refusal.what
    assert "Frobnicate" in refusal.what


@pytest.mark.parametrize(
    ("isa", "precisions", "rules"),
    [
        ("x86-64", ("int8", "fp32"), ["precision"]),
        ("x86-64", ("fp16", "fp32"), ["fp16-kernels"]),
        ("aarch64", ("fp16", "fp32"), []),
        ("aarch64", ("fp32",), ["precision"]),
    ],
)
def test_fp16_is_refused_where_it_has_no_kernels(isa: str, precisions: tuple[str, ...], rules: list[str]) -> None:
    refusals = COMPILER.supports(facts(), cpu(isa, precisions=precisions), "fp16", {}, {})
    assert [refusal.rule for refusal in refusals] == rules
    assert all("casts" in refusal.what for refusal in refusals)


def test_probe_tells_the_version_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from modelforge.compilers.onnxruntime import OnnxRuntimeCompiler as C; "
        "print(C().probe().versions['onnxruntime']); sys.exit('onnxruntime' in sys.modules or 'onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    probed = COMPILER.probe()
    assert isinstance(probed, Toolchain)
    assert probed.versions == {"onnxruntime": done.stdout.strip()}

    def nothing(_name: str) -> str:
        raise module.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(module.importlib.metadata, "version", nothing)
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert "modelforge[build]" in missing.fix
