"""The program that a deployer runs: what it says and how it ends when something is wrong. The real binary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.compilers.tvm.models import Built


@pytest.fixture
def folder(built: Built, tmp_path: Path) -> Path:
    """A variant as a deployer has it: all files in one folder."""
    for name, path in built.compiled.files.items():
        shutil.copy(path, tmp_path / name)
    return tmp_path


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [folder / "run", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def _save(folder: Path, array: np.ndarray, name: str = "x.npy") -> str:
    np.save(folder / name, array)
    return f"x={name}"


def _samples(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 16, 20)).astype(np.float32)


def test_describe_prints_what_the_model_takes_and_gives(folder: Path) -> None:
    done = _run(folder, "--describe", "main.so")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "modelforge-tvm 2",
        "threads 2",
        "input float32 4 * 3 16 20 x",
        "output float32 2 * 10 y",
        "output float32 4 * 8 4 5 features/map",
    ]
    assert [line.split()[:3] for line in lines if line.startswith("entry ")] == [
        ["entry", "1", "main_b1"],
        ["entry", "4", "main_b4"],
        ["entry", "8", "main_b8"],
    ]


def test_a_batch_gives_what_its_samples_give_one_by_one(folder: Path) -> None:
    (folder / "one").mkdir()
    (folder / "many").mkdir()
    given = _save(folder, _samples(7))
    assert _run(folder, "-o", "one", "-b", "1", "main.so", given).returncode == 0
    assert _run(folder, "-o", "many", "main.so", given).returncode == 0
    for name in ("0.npy", "1.npy"):
        one, many = np.load(folder / "one" / name), np.load(folder / "many" / name)
        assert len(one) == 7
        assert np.ptp(one) > 0
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


def test_runs_from_any_folder_and_through_a_link(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "go").symlink_to(folder / "run")
    given = _save(elsewhere, _samples())
    done = subprocess.run(
        [elsewhere / "go", folder / "main.so", given], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert np.load(elsewhere / "0.npy").shape == (2, 10)


def test_latency_is_one_json_line(folder: Path) -> None:
    done = _run(folder, "-r", "20", "-b", "4", "main.so", _save(folder, _samples(4)))
    measured = json.loads(done.stdout)
    assert (measured["batch"], measured["rounds"]) == (4, 20)
    assert 0 < measured["min_ms"] <= measured["p50_ms"] <= measured["p90_ms"] <= measured["p99_ms"]
    assert 0 < measured["load_ms"] < 10_000
    assert measured["min_ms"] <= measured["first_ms"] < 10_000
    size = sum(path.stat().st_size for path in folder.glob("*.so"))
    assert 1 << 20 < measured["peak_rss_bytes"] < 64 << 20, size


def test_latency_by_batch(folder: Path) -> None:
    """3 is padded to 4; the outputs are those of the samples that were given, all the same."""
    given = _save(folder, _samples(2))
    assert _run(folder, "main.so", given).returncode == 0
    alone = np.load(folder / "0.npy")
    done = _run(folder, "-r", "5", "-t", "1,3,8", "main.so", given)
    by_batch = json.loads(done.stdout)["by_batch"]
    assert list(by_batch) == ["1", "3", "8"]
    assert min(by_batch.values()) > 0
    np.testing.assert_array_equal(np.load(folder / "0.npy"), alone)


@pytest.mark.parametrize(("environment", "threads"), [({}, None), ({"TVM_NUM_THREADS": "1"}, 1)])
def test_as_many_threads_as_the_profile_has_cores(
    folder: Path, environment: dict[str, str], threads: int | None
) -> None:
    given = _save(folder, _samples(4))
    done = subprocess.run(
        [folder / "run", "-r", "1", "main.so", given],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = threads or min(2, len(os.sched_getaffinity(0)))  # 2: what `this_machine` says
    assert json.loads(done.stdout)["threads"] == expected


def test_reads_the_second_version_of_the_format(folder: Path) -> None:
    with (folder / "x.npy").open("wb") as stream:
        np.lib.format.write_array(stream, _samples(), version=(2, 0))
    assert _run(folder, "main.so", "x=x.npy").returncode == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 16, 20), np.float64), "holds <f8, the model takes <f4"),
        (np.zeros((2, 3, 16, 20), ">f4"), "holds >f4"),
        (np.zeros((2, 3, 16), np.float32), "does not fit the model"),
        (np.zeros((2, 3, 16, 20, 1), np.float32), "does not fit the model"),
        (np.zeros((2,) + (1,) * 20, np.float32), "does not fit the model"),
        (np.zeros((), np.float32), "does not fit the model"),
        (np.zeros((0, 3, 16, 20), np.float32), "hold no sample"),
        (np.asfortranarray(np.zeros((2, 3, 16, 20), np.float32)), "not an array in C order"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(folder: Path, array: np.ndarray, message: str) -> None:
    done = _run(folder, "main.so", _save(folder, array))
    assert done.returncode == 1
    assert message in done.stderr
    assert "input" in done.stderr


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04 a zip", b"\x93NUMPY\x01\x00\xff\xff{'descr'"])
def test_a_file_that_is_no_array_is_refused(folder: Path, content: bytes) -> None:
    (folder / "x.npy").write_bytes(content)
    done = _run(folder, "main.so", "x=x.npy")
    assert done.returncode == 1
    assert "x.npy" in done.stderr


def test_a_file_that_ends_too_soon_is_refused(folder: Path) -> None:
    given = _save(folder, _samples(3))
    data = (folder / "x.npy").read_bytes()
    (folder / "x.npy").write_bytes(data[:-4])
    done = _run(folder, "main.so", given)
    assert done.returncode == 1
    assert "ends too soon" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage"),
        (["--nonsense", "main.so"], "usage"),
        (["main.so"], "input x is missing"),
        (["main.so", "z=x.npy"], "not NAME=FILE.npy"),
        (["-b", "0", "main.so", "x=x.npy"], "-b takes a number above zero"),
        (["-b", "9", "main.so", "x=x.npy"], "largest entry of the model takes 8"),
        (["-r", "1", "-t", "1,9", "main.so", "x=x.npy"], "-t takes batch sizes from 1 to 8"),
        (["-r", "1", "-t", "1;4", "main.so", "x=x.npy"], "-t takes batch sizes from 1 to 8"),
    ],
)
def test_a_wrong_command_line_ends_with_2(folder: Path, arguments: list[str], message: str) -> None:
    _save(folder, _samples())
    done = _run(folder, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.so", "x=x.npy"], "missing.so"),
        (["x.npy", "x=x.npy"], "is not a model library"),
        (["libtvm_ffi.so", "x=x.npy"], "ModelForge did not make it"),
        (["main.so", "x=missing.npy"], "missing.npy"),
        (["-o", "no/such/folder", "main.so", "x=x.npy"], "no/such/folder"),
        (["-o", "/dev/full/x", "main.so", "x=x.npy"], "cannot write"),
    ],
)
def test_a_failure_ends_with_1(folder: Path, arguments: list[str], message: str) -> None:
    _save(folder, _samples())
    done = _run(folder, *arguments)
    assert done.returncode == 1
    assert message in done.stderr


def _patched(folder: Path, old: bytes, new: bytes) -> None:
    data = (folder / "main.so").read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    (folder / "main.so").write_bytes(data.replace(old, new))


def _line(folder: Path, word: str) -> bytes:
    """The last line of the description that begins with a word."""
    said = _run(folder, "--describe", "main.so").stdout.splitlines()
    return [line for line in said if line.startswith(f"{word} ")][-1].encode()


@pytest.mark.parametrize("left", [0.999, 0.5, 0.01])
def test_a_library_that_was_cut_off_is_refused(folder: Path, left: float) -> None:
    """It would be loaded, and end in a bus error once the part that is missing is read."""
    given = _save(folder, _samples())
    data = (folder / "main.so").read_bytes()
    (folder / "main.so").write_bytes(data[: int(len(data) * left)])
    done = _run(folder, "main.so", given)
    assert done.returncode == 1
    assert f"cut off: {int(len(data) * left)} bytes of {len(data)}" in done.stderr


def test_a_description_of_another_version_is_refused(folder: Path) -> None:
    given = _save(folder, _samples())
    _patched(folder, b"modelforge-tvm 2\n", b"modelforge-tvm 3\n")
    done = _run(folder, "main.so", given)
    assert done.returncode == 1
    assert '"modelforge-tvm 3"' in done.stderr
    assert "different versions" in done.stderr


def test_weights_of_another_length_are_refused(folder: Path) -> None:
    given = _save(folder, _samples())
    line = _line(folder, "weights")
    _patched(folder, line + b"\n", line[:-1] + (b"1\n" if line[-1:] != b"1" else b"2\n"))
    done = _run(folder, "main.so", given)
    assert done.returncode == 1
    assert "bytes of weights, its description says" in done.stderr


@pytest.mark.parametrize(("word", "message"), [("weight", "names a weight beyond"), ("entry", "names no such weight")])
def test_what_points_beyond_the_weights_is_refused(folder: Path, word: str, message: str) -> None:
    given = _save(folder, _samples())
    line = _line(folder, word)
    number = line.split(b" ")[1 if word == "weight" else -1]
    at = line.index(b" ") + 1 if word == "weight" else len(line) - len(number)
    _patched(folder, line + b"\n", line[:at] + b"9" * len(number) + line[at + len(number) :] + b"\n")
    done = _run(folder, "main.so", given)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_full_disk_is_no_success(folder: Path) -> None:
    (folder / "0.npy").symlink_to("/dev/full")
    done = _run(folder, "main.so", _save(folder, _samples()))
    assert done.returncode == 1
    assert "No space left" in done.stderr


def test_without_its_libraries_it_says_which_one(folder: Path) -> None:
    (folder / "libtvm_runtime.so").unlink()
    done = _run(folder, "main.so", "x=x.npy")
    assert done.returncode == 1
    assert "libtvm_runtime.so" in done.stderr
