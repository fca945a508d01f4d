"""TensorRT in another interpreter, as on a stock JetPack: found, told, and everything of NVIDIA's run in there.

The other interpreter is a virtual environment that has the double; this one has it not.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import modelforge
from modelforge.compilers.protocol import CompileJob, Missing, RunJob, Toolchain
from modelforge.compilers.tensorrt import device, foreign, installation
from modelforge.compilers.tensorrt.driver import TensorRtCompiler, TensorRtRtxCompiler
from modelforge.compilers.tensorrt.product import PRODUCTS, TENSORRT
from tests.compilers.tensorrt.models import BATCH, conv_net, gpu
from tests.doubles.install_tensorrt import Doubles, install, make_python

COMPILER = TensorRtCompiler()
VARIABLE = "MODELFORGE_TENSORRT_PYTHON"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Doubles, Path]:
    folder = tmp_path_factory.mktemp("jetpack")
    doubles = install(folder / "dist-packages", version="10.3.0", sm=75)
    return doubles, make_python(folder / "python", doubles.folder, sysconfig.get_path("purelib"))


@pytest.fixture
def other(installed: tuple[Doubles, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That interpreter, named by the variable; a GPU is here."""
    doubles, python = installed
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LD_LIBRARY_PATH", doubles.env["LD_LIBRARY_PATH"])
    monkeypatch.setenv(VARIABLE, str(python))
    device._gpus.cache_clear()
    return python


def test_it_is_found_there_and_said_where_it_runs(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = COMPILER.probe()
    assert isinstance(found, Toolchain)
    assert found.versions == {"tensorrt": "10.3.0+double", "python": ".".join(map(str, sys.version_info[:3]))}
    assert found.warnings == (f"NVIDIA TensorRT runs in {other}, as {VARIABLE} says",)
    monkeypatch.delenv(VARIABLE)
    assert isinstance(COMPILER.probe(), Missing)


def test_it_builds_and_runs_there(other: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    model = conv_net(tmp_path / "model.onnx", np.float32)
    job = CompileJob(
        model=model, target=gpu(75), precision="fp16", inputs={"x": ("batch", 1, 8, 8)}, dims={"batch": BATCH},
        workdir=tmp_path / "work", timeout=60,
    )  # fmt: skip
    compiled = COMPILER.compile(job)
    assert compiled.report["engine_version"] == "10.3.0+double"
    np.savez(tmp_path / "inputs.npz", x=np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32))
    (tmp_path / "run").mkdir()
    run = RunJob(
        files=compiled.files, artifact=compiled.artifact, target=gpu(75), inputs=tmp_path / "inputs.npz", batch=2,
        outputs=tmp_path / "outputs.npz", workdir=tmp_path / "run", timeout=60,
    )  # fmt: skip
    ran = COMPILER.run(run)
    assert ran.evidence == "device"
    assert len(np.load(run.outputs)["y"]) == 3
    assert json.loads(ran.files["layers.json"].read_text())["layers"]
    raced = COMPILER.race(run, dataclasses.replace(run))
    assert raced is not None
    assert min(raced) > 0


def test_no_bytecode_of_that_interpreter_is_left_beside_ours(other: Path) -> None:
    cached = Path(foreign.__file__).parent / "__pycache__"
    before = {path.name: path.stat().st_mtime_ns for path in cached.glob("*")}
    installation._ask.cache_clear()
    assert isinstance(COMPILER.probe(), Toolchain)
    assert {path.name: path.stat().st_mtime_ns for path in cached.glob("*")} == before


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_what_is_no_such_interpreter_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_python(tmp_path / "plain")
    answer = """printf '{"error": {"type": "ToolchainMissing", "what": "it is Python 3.8"}}' > "${6}" """
    for named, words in {
        str(tmp_path / "nothing"): "which is no program here",
        str(script(tmp_path / "false", "exit 1")): "ended with exit code 1",
        str(script(tmp_path / "old", answer)): "it is Python 3.8",
        str(plain): "has no NVIDIA TensorRT",
    }.items():
        monkeypatch.setenv(VARIABLE, named)
        missing = COMPILER.probe()
        assert isinstance(missing, Missing)
        assert words in missing.reason
        assert f"{VARIABLE} names {named}" in missing.reason
        assert "/usr/bin/python3" in missing.fix
        assert COMPILER.runner(gpu(75)) is None


def test_numpy_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubles = install(tmp_path / "double")
    monkeypatch.setenv(VARIABLE, str(make_python(tmp_path / "python", doubles.folder)))
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert "NumPy is not" in missing.reason
    assert "apt install python3-numpy" in missing.fix


def test_each_product_has_a_variable_of_its_own(other: Path) -> None:
    assert isinstance(TensorRtRtxCompiler().probe(), Toolchain)
    assert {each.python_variable for each in PRODUCTS.values()} == {VARIABLE, "MODELFORGE_TENSORRT_RTX_PYTHON"}


def test_where_the_system_has_it_the_message_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_SYSTEM", tmp_path)
    package = tmp_path / "lib" / "python3.10" / "dist-packages" / "tensorrt" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text("")
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert missing.fix == f"the system's own Python has it: set {VARIABLE}={tmp_path}/bin/python3"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3.10").touch()
    missing = COMPILER.probe()
    assert isinstance(missing, Missing)
    assert missing.fix.endswith("bin/python3.10")


# -- Python 3.10, with NumPy and NVIDIA's module and nothing else

ROOTS = ("toolchains/child.py", "compilers/tensorrt/worker.py", "compilers/tensorrt/running.py")
ALLOWED = {"numpy", "modelforge"}


def closure() -> dict[Path, ast.Module]:
    """The sources that the other interpreter imports, by following their imports, those inside functions too."""
    package = Path(modelforge.__file__).parent
    found: dict[Path, ast.Module] = {}
    todo = [Path(foreign.__file__), *(package / root for root in ROOTS)]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found[path] = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
        todo += [beside for name in _imports(found[path]) for beside in _files(package, name)]
    return found


def _imports(tree: ast.Module) -> list[str]:
    """What a module imports as it runs: annotations alone do not count."""
    unseen = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {each for block in unseen for statement in block.body for each in ast.walk(statement)}
    names = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _files(package: Path, name: str) -> list[Path]:
    parts = name.split(".")
    if parts[0] != "modelforge":
        return []
    places = [package.joinpath(*parts[1:end]) for end in range(1, len(parts) + 1)]
    candidates = [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")]
    return [path for path in candidates if path.is_file()]


def test_it_needs_no_other_package_and_no_newer_syntax() -> None:
    found = closure()
    assert {"foreign.py", "worker.py", "running.py", "engine.py", "samples.py", "errors.py"} <= {p.name for p in found}
    outside = {name.split(".")[0] for tree in found.values() for name in _imports(tree)}
    assert outside - ALLOWED - set(sys.stdlib_module_names) == set()
    assert "filelock" not in outside


def test_what_python_3_10_has_not_is_not_used() -> None:
    """Names of the standard library that came with 3.11 or later, and that were tempting."""
    newer = {"tomllib", "StrEnum", "Self", "assert_never", "Never", "LiteralString", "UTC", "ExceptionGroup", "batched",
             "override", "file_digest", "TaskGroup", "NotRequired", "Required", "chdir", "add_note"}  # fmt: skip
    for path, tree in closure().items():
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {part for name in _imports(tree) for part in name.split(".")}
        assert used & newer == set(), path


OLD_NUMPY = "class ndarray: ...\nfloat32 = float16 = int64 = int32 = int8 = uint8 = bool_ = float\n"


def test_it_sees_none_of_our_packages(tmp_path: Path) -> None:
    """In an interpreter with NumPy and nothing else, with a search path that would lead to others.

    NumPy is one of which no array type can be subscripted, as 1.21 of JetPack 6.
    """
    (tmp_path / "packages" / "numpy").mkdir(parents=True)
    (tmp_path / "packages" / "numpy" / "__init__.py").write_text(OLD_NUMPY)
    python = make_python(tmp_path / "python", tmp_path / "packages")
    program = (
        "import runpy, sys; sys.argv = ['x']; own = runpy.run_path(sys.orig_argv[-1]); own['_open_package']();"
        "import modelforge.toolchains.child, modelforge.compilers.tensorrt.worker;"
        "import modelforge.compilers.tensorrt.running, modelforge.compilers.tensorrt.cuda;"
        "assert not [each for each in sys.modules if each.split('.')[0] in ('onnx', 'pydantic', 'filelock')]"
    )
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    subprocess.run([python, "-I", "-B", "-c", program, foreign.__file__], env=env, check=True, timeout=60)


def test_an_older_interpreter_is_told_in_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "OLDEST", (4, 0))
    assert foreign.main(["x:y", str(tmp_path / "request"), str(tmp_path / "answer")]) == 0
    told = json.loads((tmp_path / "answer").read_text())["error"]
    assert told["type"] == "ToolchainMissing"
    assert told["what"].endswith("and 4.0 is the oldest that will do")


def test_the_table_names_what_the_facts_say() -> None:
    assert TENSORRT.python_variable == VARIABLE
