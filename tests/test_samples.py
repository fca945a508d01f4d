"""Data from every kind of source, and every way in which it can be wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelforge.errors import DataError
from modelforge.graph.facts import TensorFacts
from modelforge.samples import Samples, load_samples, write_samples

X = TensorFacts("x", "float32", ("batch", 3))
FIXED = TensorFacts("x", "float32", (4, 3))


def load(data: str, folder: Path, inputs: tuple[TensorFacts, ...] = (X,), limit: int | None = None) -> Samples:
    return load_samples(data, folder=folder, inputs=inputs, dims={"batch": (1, 8)}, limit=limit, where="accuracy.data")


def array(*shape: int) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_npz_with_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=array(5, 3), label=np.arange(5))
    samples = load("d.npz", tmp_path)
    assert samples.count == 5
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    """An .npz, an .npy, a folder, a glob and a function of the same samples have one digest."""
    values = array(5, 3)
    np.savez(tmp_path / "d.npz", x=values)
    np.save(tmp_path / "d.npy", values)
    (tmp_path / "folder").mkdir()
    for index, row in enumerate(values):
        np.savez(tmp_path / "folder" / f"{index}.npz", x=row)
    (tmp_path / "batched").mkdir()
    for index, row in enumerate(values):
        np.save(tmp_path / "batched" / f"{index}.npy", row[None])
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    for row in np.arange(15, dtype=np.float32).reshape(5, 3): yield {'x': row}\n"
    )
    sources = ["d.npz", "d.npy", "folder", "batched/*.npy", "mine:rows"]
    assert len({load(source, tmp_path).digest for source in sources}) == 1


def test_digest_sees_every_part(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=array(5, 3))
    np.savez(tmp_path / "b.npz", x=array(5, 3), label=np.arange(5))
    other = array(5, 3)
    other[4, 2] += 1
    np.savez(tmp_path / "c.npz", x=other)
    assert len({load(name, tmp_path).digest for name in ("a.npz", "b.npz", "c.npz")}) == 3
    assert load("a.npz", tmp_path, limit=4).digest != load("a.npz", tmp_path).digest


def test_limit(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=array(5, 3), label=np.arange(5))
    samples = load("d.npz", tmp_path, limit=2)
    assert (samples.count, len(samples.arrays["x"])) == (2, 2)
    with pytest.raises(DataError, match="holds 5 samples, fewer than the 6"):
        load("d.npz", tmp_path, limit=6)


def test_fixed_first_dimension_has_an_axis_for_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=array(7, 4, 3))
    assert load("d.npz", tmp_path, (FIXED,)).count == 7
    np.savez(tmp_path / "e.npz", x=array(4, 3))
    with pytest.raises(DataError, match=r"\[samples, 4, 3\]"):
        load("e.npz", tmp_path, (FIXED,))


def test_symbols_are_bounded(tmp_path: Path) -> None:
    inputs = (TensorFacts("x", "float32", ("n", "batch")),)
    np.savez(tmp_path / "d.npz", x=array(2, 9))
    with pytest.raises(DataError, match=r"\[samples, batch\]"):
        load("d.npz", tmp_path, inputs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_names_the_sample(tmp_path: Path, bad: float) -> None:
    values = array(200, 3)
    values[157, 1] = bad
    np.savez(tmp_path / "d.npz", x=values)
    with pytest.raises(DataError, match="sample 157"):
        load("d.npz", tmp_path)


def test_odd_one_out_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for index in range(3):
        np.save(tmp_path / "folder" / f"{index}.npy", array(3 if index != 1 else 2))
    with pytest.raises(DataError, match=r"1\.npy"):
        load("folder", tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (sys.exit, (3,))

    np.save(tmp_path / "d.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        load("d.npy", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.npz", None, "no such file"),
        ("garbage.npz", b"hello", "cannot be read"),
        ("empty", "folder", "no .npz or .npy file"),
        ("none:rows", None, 'module "none" cannot be imported'),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, content: bytes | str | None, said: str) -> None:
    if content == "folder":
        (tmp_path / name).mkdir()
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        load(name, tmp_path)


def test_functions_that_fail(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def rows():\n    raise OSError('disk on fire')\ndef ones():\n    yield 1\n")
    with pytest.raises(DataError, match="disk on fire"):
        load("mine:rows", tmp_path)
    with pytest.raises(DataError, match="must yield dicts"):
        load("mine:ones", tmp_path)
    with pytest.raises(DataError, match='did you mean "rows"'):
        load("mine:row", tmp_path)


def test_two_inputs_must_agree_in_number(tmp_path: Path) -> None:
    inputs = (X, TensorFacts("y", "int64", ("batch",)))
    np.savez(tmp_path / "d.npz", x=array(5, 3), y=np.arange(4))
    with pytest.raises(DataError, match="different numbers of samples"):
        load("d.npz", tmp_path, inputs)


def test_written_and_read_again(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=array(5, 3), label=np.arange(5))
    samples = load("d.npz", tmp_path)
    write_samples(samples, tmp_path / "again.npz")
    assert load("again.npz", tmp_path).digest == samples.digest
