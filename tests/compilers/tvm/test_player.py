"""The player as a deployer uses it: the files of a variant, NumPy, and nothing else. Each in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from modelforge.recipe import Dim
from tests.compilers.tvm.models import Build, Built, make_model, this_machine, value


def _lay_out(built: Built, folder: Path) -> Path:
    for name, path in built.compiled.files.items():
        shutil.copy(path, folder / name)
    return folder


@pytest.fixture
def folder(built: Built, tmp_path: Path) -> Path:
    return _lay_out(built, tmp_path)


def _python(folder: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Isolated: neither this folder nor the user's environment is looked at, only the variant's."""
    begin = f"import json, sys\nsys.path.insert(0, {str(folder)!r})\nimport numpy as np\n"
    return subprocess.run(
        [sys.executable, "-I", "-c", f"{begin}{program}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _said(folder: Path, program: str, **environment: str) -> Any:
    done = _python(folder, program, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


_OPEN = "from player import Model\nmodel = Model(sys.path[0])\n"


def _samples(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 16, 20)).astype(np.float32)


def test_says_what_it_takes_and_needs_nothing_else(folder: Path) -> None:
    said = _said(
        folder,
        f"{_OPEN}heavy = sorted({{'modelforge', 'tvm', 'tvm_ffi', 'onnx'}} & set(sys.modules))\n"
        "tensors = [(t.name, t.dtype, t.shape) for t in (*model.inputs, *model.outputs)]\n"
        "print(json.dumps([heavy, tensors, model.batches]))",
    )
    shapes = [
        ["x", "float32", ["*", 3, 16, 20]],
        ["y", "float32", ["*", 10]],
        ["features/map", "float32", ["*", 8, 4, 5]],
    ]
    assert said == [[], shapes, [1, 4, 8]]


@pytest.mark.parametrize("samples", [1, 3, 8, 19])
def test_gives_what_the_runner_gives(folder: Path, samples: int) -> None:
    """3 is a batch filled up to 4; 19 is two full ones and 3."""
    np.save(folder / "x.npy", _samples(samples))
    program = (
        f"{_OPEN}x = np.load('x.npy')\n"
        "found = model.run({'x': x})\n"
        "np.savez('found.npz', **found)\n"
        "kept = [array.copy() for array in found.values()]\n"
        "again = model(x=x[:, :, ::-1][:, :, ::-1])\n"  # another order in memory
        "same = all((a == b).all() for a, b in zip(again.values(), kept))\n"
        "print(json.dumps([list(found), bool(same), all((a == b).all() for a, b in zip(found.values(), kept))]))"
    )
    assert _said(folder, program) == [["y", "features/map"], True, True]
    subprocess.run([folder / "run", "main.so", "x=x.npy"], cwd=folder, check=True)
    with np.load(folder / "found.npz") as found:
        for position, name in enumerate(("y", "features/map")):
            np.testing.assert_array_equal(found[name], np.load(folder / f"{position}.npy"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("{}", "input x is missing"),
        ("{'x': np.zeros((1, 3, 16, 20))}", "input x is float64, the model takes float32"),
        ("{'x': np.zeros((1, 3, 16, 21), 'f4')}", "the model takes (*, 3, 16, 20)"),
        ("{'x': np.zeros((3, 16, 20), 'f4')}", "the model takes (*, 3, 16, 20)"),
        ("{'x': np.zeros((0, 3, 16, 20), 'f4')}", "hold no sample"),
        ("{'x': np.zeros((1, 3, 16, 20), 'f4'), 'z': 0}", "no input is called z; there are x"),
    ],
)
def test_what_does_not_fit_is_a_value_error(folder: Path, inputs: str, message: str) -> None:
    program = f"{_OPEN}try:\n    model.run({inputs})\nexcept ValueError as error:\n    print(json.dumps(str(error)))"
    assert message in _said(folder, program)


def _libm() -> str:
    """A library that is none of ours."""
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return next(name for name in names if "/libm.so" in name or "/libm-" in name)


def _patch(folder: Path, old: bytes, new: bytes) -> None:
    data = (folder / "main.so").read_bytes()
    assert data.count(old) == 1
    (folder / "main.so").write_bytes(data.replace(old, new))


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (lambda folder: (folder / "main.so").unlink(), "OSError", "main.so"),
        (lambda folder: (folder / "main.so").write_bytes(b"not a library"), "OSError", "not a model library"),
        (lambda f: (f / "main.so").write_bytes((f / "main.so").read_bytes()[:-200]), "OSError", "is cut off"),
        (lambda f: shutil.copy(_libm(), f / "main.so"), "RuntimeError", "ModelForge did not make it"),
        (lambda folder: (folder / "libtvm_runtime.so").unlink(), "OSError", "libtvm_runtime.so is missing"),
        (lambda f: _patch(f, b"modelforge-tvm 2\n", b"modelforge-tvm 7\n"), "RuntimeError", "different versions"),
        (lambda f: _patch(f, b"\nweights ", b"\nweighty "), "RuntimeError", "cannot be read"),
    ],
)
def test_a_variant_that_is_broken_is_told(folder: Path, harm: Any, kind: str, message: str) -> None:
    harm(folder)
    program = f"try:\n    exec({_OPEN!r})\nexcept {kind} as error:\n    print(json.dumps(str(error)))"
    assert message in _said(folder, program)


def test_weights_of_another_length_are_refused(folder: Path) -> None:
    data = (folder / "main.so").read_bytes()
    begin = data.index(b"\nweights ") + 9
    digit = data[begin : begin + 1]
    (folder / "main.so").write_bytes(data[:begin] + (b"9" if digit != b"9" else b"8") + data[begin + 1 :])
    program = f"try:\n    exec({_OPEN!r})\nexcept RuntimeError as error:\n    print(json.dumps(str(error)))"
    assert "bytes of weights" in _said(folder, program)


@pytest.fixture(scope="module")
def heavy(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant with 16 MB of weights and hardly any arithmetic."""
    weight = np.random.default_rng(0).standard_normal((2000, 2000)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    arrays = [numpy_helper.from_array(weight, "w")]
    model = make_model(nodes, [value("x", ["batch", 2000])], [value("y", ["batch", 2000])], arrays)
    made = build(model, this_machine(), {"x": ("batch", 2000)}, {"batch": Dim(values=(1,))})
    folder = _lay_out(made, tmp_path_factory.mktemp("heavy"))
    np.save(folder / "x.npy", np.ones((1, 2000), np.float32))
    np.save(folder / "y.npy", np.ones((1, 2000), np.float32) @ weight)
    return folder


def test_weights_are_used_where_they_are_mapped(heavy: Path) -> None:
    """What a process holds of its own grows by far less than the weights, what it maps of files by all of them."""
    program = (
        "def held():\n"
        "    lines = [line.split() for line in open('/proc/self/status')]\n"
        "    return [int(line[1]) / 1024 for line in lines if line[0] in ('RssAnon:', 'RssFile:')]\n"
        "from player import Model\n"
        "before = held()\n"
        "model = Model(sys.path[0], threads=1)\n"
        "outputs = model.run({'x': np.load('x.npy')})\n"
        "right = np.allclose(outputs['y'], np.load('y.npy'), rtol=1e-4, atol=1e-3)\n"
        "print(json.dumps([bool(right), *(after - then for after, then in zip(held(), before))]))"
    )
    right, own, of_files = _said(heavy, program)
    assert right
    assert own < 5
    assert of_files > 15


def test_loading_again_and_again_holds_no_more(heavy: Path) -> None:
    program = (
        "import gc\n"
        "from player import Model\n"
        "def held(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line[:5] == 'VmRSS')\n"
        "x, sizes = np.load('x.npy'), []\n"
        "for _ in range(30):\n"
        "    Model(sys.path[0], threads=1).run({'x': x})\n"
        "    gc.collect()\n"
        "    sizes.append(held())\n"
        "print(json.dumps(sizes))"
    )
    sizes = _said(heavy, program)
    assert sizes[-1] - sizes[4] < 2048


def test_threads_may_share_a_model(folder: Path) -> None:
    program = (
        f"{_OPEN}"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "xs = [np.random.default_rng(n).standard_normal((n % 9 + 1, 3, 16, 20)).astype('f4') for n in range(24)]\n"
        "alone = [model.run({'x': x})['y'] for x in xs]\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    together = [found['y'] for found in pool.map(lambda x: model.run({'x': x}), xs)]\n"
        "import os\n"
        "same = all((a == b).all() for a, b in zip(alone, together, strict=True))\n"
        "print(json.dumps([same, len(os.listdir('/proc/self/task'))]))"
    )
    same, threads = _said(folder, program, TVM_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1")
    assert same
    assert threads <= 4, "this one, the one that runs models, and TVM's two: not two more for each that calls"


def test_a_process_keeps_to_its_cores(folder: Path) -> None:
    """TVM's pinning would move it to cores that it was kept from."""
    program = (
        "import os\n"
        "core = max(os.sched_getaffinity(0))\n"
        "os.sched_setaffinity(0, {core})\n"
        f"{_OPEN}model.run({{'x': np.zeros((8, 3, 16, 20), 'f4')}})\n"
        "used = {c for task in os.listdir('/proc/self/task') for c in os.sched_getaffinity(int(task))}\n"
        "print(json.dumps([core, *used]))"
    )
    core, *used = _said(folder, program, TVM_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1")
    assert used == [core]


def test_two_models_share_one_runtime(folder: Path, heavy: Path) -> None:
    """Their folders hold equal libraries, which must be loaded once."""
    program = (
        f"from player import Model\nfirst, second = Model({str(folder)!r}), Model({str(heavy)!r})\n"
        "libraries = {line.split()[-1] for line in open('/proc/self/maps') if 'libtvm_' in line}\n"
        "first.run({'x': np.zeros((1, 3, 16, 20), 'f4')})\n"
        "second.run({'x': np.load('x.npy')})\n"
        "print(json.dumps(len(libraries)))"
    )
    np.save(folder / "x.npy", np.ones((1, 2000), np.float32))
    assert _said(folder, program) == 2


def test_a_second_runtime_that_differs_is_refused(folder: Path, heavy: Path) -> None:
    with (folder / "libtvm_runtime.so").open("ab") as stream:
        stream.write(b"another version")
    program = (
        f"from player import Model\nModel({str(heavy)!r})\n"
        f"try:\n    Model({str(folder)!r})\nexcept RuntimeError as error:\n    print(json.dumps(str(error)))"
    )
    assert "a process of its own" in _said(folder, program)


def test_beside_the_installed_package_its_library_is_used(folder: Path) -> None:
    """Two copies in one process would register everything twice."""
    program = (
        f"import tvm_ffi\n{_OPEN}"
        "libraries = {line.split()[-1] for line in open('/proc/self/maps') if 'libtvm_ffi.so' in line}\n"
        "model.run({'x': np.zeros((1, 3, 16, 20), 'f4')})\n"
        "print(json.dumps(len(libraries)))"
    )
    assert _said(folder, program) == 1
