"""From a model to a variant that runs: what it computes, what it is made of, and that it is always the same."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from modelforge.compilers.protocol import CompileJob, Missing, Toolchain
from modelforge.compilers.tvm import TvmCompiler, run, runtime
from modelforge.errors import BuildError, UnsupportedError
from modelforge.recipe import Dim
from modelforge.store import Store, digest_file
from modelforge.target import CpuArchitecture, Registry, Target
from modelforge.toolchains import process
from tests.compilers.tvm.models import (
    DIMS,
    INPUTS,
    Arrays,
    Build,
    Built,
    conv_net,
    cortex_a76,
    light,
    make_model,
    needs_qemu,
    this_machine,
    value,
)

FILES = {"main.so", "run", "player.py", "libtvm_ffi.so", "libtvm_runtime.so"}


def _reference(model: Path, arrays: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, arrays), strict=True))


def _samples(count: int, dtype: str = "float32") -> Arrays:
    return {"x": np.random.default_rng(7).standard_normal((count, 3, 16, 20)).astype(dtype)}


def _assert_same(got: Arrays, expected: Arrays, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("samples", "batch"), [(1, 1), (11, 8), (5, 3), (9, 64)])
def test_computes_what_onnxruntime_computes_at_any_batch(
    built: Built, tmp_path: Path, samples: int, batch: int
) -> None:
    """11 at 8 is a full entry and 3 padded to 4; 64 is more than the largest entry."""
    arrays = _samples(samples)
    got, ran = built.run(arrays, tmp_path, batch)
    _assert_same(got, _reference(built.model, arrays), 1e-5)
    assert ran.evidence == "device"
    assert ran.latency["p50_ms"] > 0
    assert ran.latency["load_ms"] > 0
    assert ran.latency["peak_rss_bytes"] > 1 << 20
    assert ran.latency["threads"] >= 1


def test_times_the_batch_sizes_that_are_asked_for(built: Built, tmp_path: Path) -> None:
    _, ran = built.run(_samples(2), tmp_path, 1, timed=(1, 2, 8, 64))
    assert list(ran.latency["by_batch"]) == ["1", "2", "8"], "64 is more than the largest entry"
    assert all(taken > 0 for taken in ran.latency["by_batch"].values())


def test_two_variants_are_timed_beside_each_other(build: Build, built: Built, tmp_path: Path) -> None:
    """One of them does nothing."""
    model = make_model(
        [helper.make_node("Relu", ["x"], ["y"])], [value("x", [*INPUTS["x"]])], [value("y", [*INPUTS["x"]])]
    )
    idle = build(model, this_machine())
    jobs = [made.job(_samples(8), tmp_path / name, 8) for name, made in (("net", built), ("idle", idle))]
    found = TvmCompiler().race(*jobs)
    assert found is not None
    assert found[0] > found[1] > 0
    assert not jobs[0].outputs.exists()


@pytest.mark.skipif(run.host.this_host().isa == "aarch64", reason="it runs natively here")
def test_nothing_is_timed_under_an_emulator(built: Built, tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(built, target=cortex_a76()).job(_samples(1), tmp_path)
    assert TvmCompiler().race(elsewhere, elsewhere) is None


def test_a_variant_is_complete_and_its_record_is_neutral(built: Built) -> None:
    compiled = built.compiled
    assert set(compiled.files) == FILES
    assert compiled.artifact == "main.so"
    assert compiled.report["entries"] == [1, 4, 8]
    rules = {kernel["name"]: kernel["rule"] for kernel in compiled.report["kernels"]}
    assert rules
    assert "none" not in rules.values(), rules
    words = [word for command in compiled.commands for word in command]
    assert not any("/" in word for word in words), words
    assert "glibc" in compiled.requires


def test_nothing_of_the_build_machine_is_in_what_is_shipped(built: Built) -> None:
    secrets = [
        str(built.model.parent),
        sys.prefix,
        tempfile.gettempdir() + "/",
        str(Path.home()) + "/",
        "site-packages",
    ]
    for name in ("main.so", "run", "player.py"):
        data = built.compiled.files[name].read_bytes()
        assert [secret for secret in secrets if secret.encode() in data] == []


def test_what_is_shipped_is_stripped(built: Built) -> None:
    """A symbol table would be part of the file, and name every function of the model."""
    for name in ("main.so", "run"):
        assert not re.search(rb"\.(symtab|debug_\w+|strtab)\0", built.compiled.files[name].read_bytes())


def test_a_rebuild_gives_the_same_bytes(build: Build, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another folder, in another process, with another order of Python's sets."""
    fixed = process.environment
    monkeypatch.setattr(process, "environment", lambda extra=None: {**fixed(extra), "PYTHONHASHSEED": "4711"})
    again = build(conv_net(), this_machine())
    for name in FILES:
        assert digest_file(again.compiled.files[name]).digest == digest_file(built.compiled.files[name]).digest


def _arm_profiles() -> list[Any]:
    """All of them; those that add little to the two others are slow: each is a compile and an emulator's run."""
    cpus = [target for target in Registry() if isinstance(target.arch, CpuArchitecture)]
    tags = [target.tag for target in cpus if target.arch.isa == "aarch64" and "tvm" in target.compilers]
    quick = ("cortex-a53", "cortex-a76")
    return [tag if tag in quick else pytest.param(tag, marks=pytest.mark.slow) for tag in tags]


# QEMU's model of the very CPU stops at an instruction that the CPU does not have.
@pytest.mark.qemu
@pytest.mark.parametrize("tag", _arm_profiles())
def test_every_arm_profile_under_qemu(build: Build, tmp_path: Path, tag: str) -> None:
    needs_qemu()
    arrays = _samples(3)
    made = build(conv_net(), Registry().get(tag), dims={"batch": Dim(values=(4,))})
    got, ran = made.run(arrays, tmp_path, 4)
    _assert_same(got, _reference(made.model, arrays), 1e-5)
    assert ran.evidence == "emulator"
    assert ran.latency == {}, "an emulator's time is no latency"
    assert "qemu-aarch64" in ran.notes[0]
    assert str(made.target.arch.qemu_cpu) in ran.notes[0]


def test_the_x86_64_profile_runs_here(build: Build, tmp_path: Path) -> None:
    target = Registry().get("x86-64")
    if TvmCompiler().runner(target) is None:
        pytest.skip(TvmCompiler().runner_hint(target))
    arrays = _samples(3)
    made = build(conv_net(), target, dims={"batch": Dim(values=(4,))})
    got, ran = made.run(arrays, tmp_path, 4)
    _assert_same(got, _reference(made.model, arrays), 1e-5)
    assert ran.evidence == "device"


@pytest.mark.qemu
def test_cortex_a76_in_fp16_under_qemu(build: Build, tmp_path: Path) -> None:
    needs_qemu()
    arrays = _samples(5, "float16")
    made = build(conv_net("float16"), cortex_a76(), dims={"batch": Dim(values=(4,))}, precision="fp16")
    got, _ = made.run(arrays, tmp_path, 4)
    _assert_same(got, _reference(made.model, arrays), 5e-3)


@pytest.mark.qemu
@pytest.mark.parametrize("tokens", [24, 19])
def test_products_of_matrices_under_qemu(build: Build, tmp_path: Path, tokens: int) -> None:
    """Attention over rows and inner axes that fill tiles and loads, and that do not; one row for a classifier."""
    needs_qemu()
    rng = np.random.default_rng(tokens)
    sizes = {"query": (37, 32), "key": (37, 32), "content": (37, 32), "head": (tokens * 32, 10)}
    weights = [numpy_helper.from_array(_scaled(rng, shape), name) for name, shape in sizes.items()]
    shape = numpy_helper.from_array(np.array([tokens, 2, 16]), "heads")
    flat = numpy_helper.from_array(np.array([1, tokens * 32]), "flat")
    turns = {"query": [1, 0, 2], "key": [1, 2, 0], "content": [1, 0, 2]}
    nodes = []
    for name, axes in turns.items():
        nodes.append(helper.make_node("MatMul", ["x", name], [f"{name}/wide"]))
        nodes.append(helper.make_node("Reshape", [f"{name}/wide", "heads"], [f"{name}/split"]))
        nodes.append(helper.make_node("Transpose", [f"{name}/split"], [f"{name}/turned"], perm=axes))
    nodes += [
        helper.make_node("MatMul", ["query/turned", "key/turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "content/turned"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "flat"], ["row"]),
        helper.make_node("MatMul", ["row", "head"], ["y"]),
    ]
    model = make_model(nodes, [value("x", [tokens, 37])], [value("y", [1, 10])], [*weights, shape, flat])
    made = build(model, cortex_a76(), {"x": (tokens, 37)}, {})
    arrays = {"x": rng.standard_normal((tokens, 37)).astype(np.float32)}
    got, _ = made.run(arrays, tmp_path)
    _assert_same(got, _reference(made.model, arrays), 1e-5)


def _scaled(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)


@pytest.mark.qemu
def test_a_mean_in_fp16_is_not_added_up_in_fp16(build: Build, tmp_path: Path) -> None:
    """In FP16 a sum of ones stands still at 2048: the mean of 4096 ones would be 0.5."""
    needs_qemu()
    half = onnx.TensorProto.FLOAT16
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["y"])]
    model = make_model(nodes, [value("x", [1, 2, 64, 64], half)], [value("y", [1, 2, 1, 1], half)])
    made = build(model, cortex_a76(), {"x": (1, 2, 64, 64)}, {}, precision="fp16")
    got, _ = made.run({"x": np.ones((1, 2, 64, 64), np.float16)}, tmp_path)
    np.testing.assert_array_equal(got["y"], np.ones((1, 2, 1, 1), np.float16))


# Two compiles of real networks: more than ten seconds each on two busy cores.
TARGETS = pytest.mark.parametrize(
    "tag", ["this-machine", pytest.param("cortex-a76", marks=[pytest.mark.qemu, pytest.mark.slow])]
)


def _target(tag: str) -> Target:
    if tag == "this-machine":
        return this_machine()
    needs_qemu()
    return cortex_a76()


@TARGETS
def test_ppocr_cls(build: Build, tmp_path: Path, tag: str) -> None:
    # Found, not imported: its own imports (OpenCV) are not wanted here.
    found = find_spec("rapidocr_onnxruntime")
    assert found is not None
    assert found.origin is not None
    model = onnx.load(Path(found.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx")
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim, ("batch", 3, 48, 192), strict=True):
        if isinstance(size, str):
            dimension.dim_param = size
        else:
            dimension.dim_value = size
    made = build(model, _target(tag), {"x": ("batch", 3, 48, 192)}, {"batch": Dim(values=(2,))})
    arrays = {"x": np.random.default_rng(3).random((3, 3, 48, 192), dtype=np.float32)}
    got, _ = made.run(arrays, tmp_path, 2)
    _assert_same(got, _reference(made.model, arrays), 1e-5)


@TARGETS
def test_squeezenet_with_a_fixed_batch(build: Build, tmp_path: Path, tag: str) -> None:
    model = light("squeezenet")
    made = build(model, _target(tag), {"data_0": (1, 3, 224, 224)}, {})
    arrays = {"data_0": np.random.default_rng(3).random((1, 3, 224, 224), dtype=np.float32)}
    expected = _reference(made.model, arrays)
    assert np.ptp(expected["softmaxout_1"]) > 1e-3, "an output that says nothing proves nothing"
    got, _ = made.run(arrays, tmp_path)
    _assert_same(got, expected, 1e-4)


@pytest.mark.qemu
@pytest.mark.slow  # half a minute to compile, and 44 s of emulation on two cores
def test_resnet50_for_cortex_a76_under_qemu(build: Build, tmp_path: Path) -> None:
    needs_qemu()
    model = light("resnet50")
    (given,) = [each.name for each in model.graph.input if each.name not in {w.name for w in model.graph.initializer}]
    made = build(model, cortex_a76(), {given: (1, 3, 224, 224)}, {})
    arrays = {given: np.random.default_rng(3).random((1, 3, 224, 224), dtype=np.float32)}
    expected = _reference(made.model, arrays)
    got, _ = made.run(arrays, tmp_path)
    _assert_same(got, expected, 1e-4)


def test_runs_from_the_store_where_files_are_named_by_digest(built: Built, tmp_path: Path) -> None:
    """As the forge does: read-only, no executable bit, no file extension."""
    store = Store(tmp_path / "home")
    files = {name: store.blob_path(store.add(path).digest) for name, path in built.compiled.files.items()}
    stored = dataclasses.replace(built, compiled=dataclasses.replace(built.compiled, files=files))
    arrays = _samples(2)
    got, _ = stored.run(arrays, tmp_path / "run", 2)
    _assert_same(got, _reference(built.model, arrays), 1e-5)


def test_samples_of_a_model_without_a_batch_are_stacked(build: Build, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["a", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["y z"]),
        helper.make_node("ReduceSum", ["c"], ["total"], keepdims=0),
    ]
    inputs = [value("a", [2, 5]), value("b", [1, 5])]
    model = make_model(nodes, inputs, [value("y z", [2, 5]), value("total", [])])
    made = build(model, this_machine(), {"a": (2, 5), "b": (1, 5)}, {})
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((7, 2, 5)).astype(np.float32),
        "b": rng.standard_normal((7, 5)).astype(np.float32),
    }
    got, _ = made.run(arrays, tmp_path)
    products = arrays["a"] * arrays["b"][:, None]
    np.testing.assert_allclose(got["y z"], np.maximum(products, 0), rtol=1e-6)
    np.testing.assert_allclose(got["total"], products.sum(axis=(1, 2)), rtol=1e-5, atol=1e-5)


def test_integers_and_booleans_pass_through(build: Build, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Greater", ["ids", "limit"], ["above"]),
        helper.make_node("Add", ["ids", "limit"], ["sum"]),
    ]
    limit = onnx.numpy_helper.from_array(np.array([3], np.int64), "limit")
    int64, boolean = onnx.TensorProto.INT64, onnx.TensorProto.BOOL
    outputs = [value("above", ["batch", 4], boolean), value("sum", ["batch", 4], int64)]
    model = make_model(nodes, [value("ids", ["batch", 4], int64)], outputs, [limit])
    made = build(model, this_machine(), {"ids": ("batch", 4)}, {"batch": Dim(values=(2,))})
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    got, _ = made.run({"ids": ids}, tmp_path, 2)
    assert got["above"].dtype == np.bool_
    np.testing.assert_array_equal(got["above"], ids > 3)
    np.testing.assert_array_equal(got["sum"], ids + 3)


def test_an_output_that_mixes_the_batch_is_refused(build: Build) -> None:
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)]
    axes = onnx.numpy_helper.from_array(np.array([0], np.int64), "axes")
    model = make_model(nodes, [value("x", ["batch", 4])], [value("y", [4])], [axes])
    with pytest.raises(UnsupportedError, match=r"output y.*leading dimension"):
        build(model, this_machine(), {"x": ("batch", 4)}, {"batch": Dim(values=(1, 2))})


def test_what_the_importer_cannot_have_is_named_with_its_node(build: Build) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Det", ["r"], ["y"], name="the determinant")]
    model = make_model(nodes, [value("x", [1, 3, 3])], [value("y", [1])])
    with pytest.raises(UnsupportedError, match="Det"):
        build(model, this_machine(), {"x": (1, 3, 3)}, {})


def test_a_node_that_fails_in_the_importer_is_found_in_its_frames(tmp_path: Path) -> None:
    """TVM's own message names neither the node nor the operator."""
    frontend = pytest.importorskip("modelforge.compilers.tvm.frontend")
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Pad", ["r", "pads"], ["y"], name="the padding")]
    inputs = [value("x", [1, 3]), value("pads", [4], onnx.TensorProto.INT64)]
    onnx.save(make_model(nodes, inputs, [value("y", [1, "n"])]), tmp_path / "model.onnx")
    with pytest.raises(Exception, match="pads") as caught:
        frontend.import_entries({"main_b1": tmp_path / "model.onnx"})
    assert "the padding" not in str(caught.value)
    assert frontend.failing_node(caught.value) == "node the padding (Pad)"


def test_a_time_limit_ends_the_compile(tmp_path: Path) -> None:
    onnx.save(conv_net(), tmp_path / "model.onnx")
    job = CompileJob(
        tmp_path / "model.onnx", this_machine(), "fp32", INPUTS, {"batch": Dim(values=(1,))}, tmp_path, 0.3
    )
    with pytest.raises(BuildError, match="time limit"):
        TvmCompiler().compile(job)


def _compile_with(answer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile a model for which the child process gave this answer."""
    (tmp_path / "weights.bin").write_bytes(b"")
    whole = {"weights": str(tmp_path / "weights.bin"), "signature": "modelforge-tvm 2\n", "kernels": [], **answer}
    monkeypatch.setattr("modelforge.toolchains.worker.call", lambda *_, **__: whole)
    onnx.save(conv_net(), tmp_path / "model.onnx")
    (tmp_path / "work").mkdir()
    job = CompileJob(tmp_path / "model.onnx", this_machine(), "fp32", INPUTS, DIMS, tmp_path / "work", 60.0)
    TvmCompiler().compile(job)


def test_what_does_not_link_is_a_build_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib0.o").write_bytes(b"no object file")
    with pytest.raises(BuildError, match=r"made no main\.so[\s\S]*lib0\.o"):
        _compile_with({"objects": [str(tmp_path / "lib0.o")]}, tmp_path, monkeypatch)


def test_a_library_that_the_linker_left_unfinished_is_a_build_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linker that says it is done is not believed."""

    def half(isa: str, objects: object, out: Path, **_: object) -> tuple[str, ...]:
        out.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + b"\x3e\0" + bytes(20) + b"\xff" * 24 + bytes(64))
        return ("ld.lld",)

    monkeypatch.setattr("modelforge.toolchains.linker.link_shared", half)
    with pytest.raises(BuildError, match="is not a model library"):
        _compile_with({"objects": []}, tmp_path, monkeypatch)


def test_a_target_that_is_no_cpu_is_refused(tmp_path: Path, build: Build) -> None:
    with pytest.raises(UnsupportedError, match="t4"):
        build(conv_net(), Registry().get("t4"))


def test_probe_tells_the_pair_and_the_linker_without_importing_tvm() -> None:
    program = (
        "import sys\n"
        "from modelforge.compilers.tvm import TvmCompiler\n"
        "found = TvmCompiler().probe()\n"
        "heavy = {'tvm', 'tvm_ffi', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(sorted(found.versions))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['apache-tvm', 'apache-tvm-ffi', 'linker-aarch64', 'linker-x86-64']"


def test_probe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(runtime.importlib.metadata, "version", version)
    found = TvmCompiler().probe()
    assert isinstance(found, Missing)
    assert "apache-tvm" in found.reason
    assert found.fix == "pip install 'modelforge[build]'"


def test_probe_warns_of_another_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        runtime.importlib.metadata, "version", lambda name: "0.1.15.post2" if name == "apache-tvm-ffi" else real(name)
    )
    found = TvmCompiler().probe()
    assert isinstance(found, Toolchain)
    assert any("0.1.15.post2" in warning and "apache-tvm-ffi==0.1.14.post1" in warning for warning in found.warnings)


def test_the_evidence_follows_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = TvmCompiler()
    assert compiler.runner(this_machine()) == "device"
    assert compiler.runner_hint(this_machine()) == ""
    arch = this_machine().arch
    stronger = dataclasses.replace(this_machine(), arch=arch.model_copy(update={"cpuinfo": ("no-such-flag",)}))
    assert compiler.runner(stronger) is None
    assert "no-such-flag" in compiler.runner_hint(stronger)
    if run.host.this_host().isa == "aarch64":
        pytest.skip("the rest is about a foreign machine")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler.runner(cortex_a76()) is None
    assert "apt-get install qemu-user-static" in compiler.runner_hint(cortex_a76())


def test_a_variant_that_cannot_run_here_says_so(built: Built, tmp_path: Path) -> None:
    arch = built.target.arch.model_copy(update={"cpuinfo": ("no-such-flag",)})
    elsewhere = dataclasses.replace(built, target=dataclasses.replace(built.target, arch=arch))
    with pytest.raises(BuildError, match="cannot run on this machine"):
        elsewhere.run(_samples(1), tmp_path)


def test_inputs_of_the_wrong_shape_end_in_the_runners_own_words(built: Built, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"exit code 1[\s\S]*does not fit the model"):
        built.run({"x": np.zeros((2, 3, 16, 21), np.float32)}, tmp_path)
    with pytest.raises(BuildError, match="hold no array x"):
        built.run({"z": np.zeros((2, 3, 16, 20), np.float32)}, tmp_path)
