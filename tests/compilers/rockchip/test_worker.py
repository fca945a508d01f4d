"""The worker's own pieces, loaded from its file: the stand-in for torch, the comparison, the toolkit's messages."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from modelforge.compilers.rockchip import toolchain


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rockchip_worker", toolchain().worker)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch(worker: ModuleType) -> Iterator[ModuleType]:
    """The stand-in, whether or not the real one is installed."""
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "torch"}
    finder = worker._NoTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("torch")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
            del sys.modules[name]
        sys.modules.update(real)


def test_the_stand_in_is_subclassed_and_decorates(torch: ModuleType) -> None:
    from torch import nn  # type: ignore[import-not-found,unused-ignore]  # an extra of this test

    class Quantizer(nn.Module):  # type: ignore[misc,unused-ignore]  # untyped without torch
        pass

    @torch.no_grad()
    def doubled(value: int) -> int:
        return 2 * value

    assert doubled(3) == 6
    with pytest.raises(NotImplementedError, match=r"torch\.nn\.Module"):
        Quantizer()
    with pytest.raises(NotImplementedError, match=r"torch\.randn"):
        torch.randn(3)


@pytest.mark.parametrize(("shape", "sizes", "dim"), [([20, 21, 5], [16, 4, 1], 1), ([21, 82], [16, 4, 1], 0)])
def test_indices_are_split_and_joined_as_torch_does(
    torch: ModuleType, shape: list[int], sizes: list[int], dim: int
) -> None:
    count = int(np.prod(shape))
    parts = torch.split(torch.arange(count).reshape(shape), sizes, dim=dim)
    assert [part.shape[dim] for part in parts] == sizes
    given = torch.cat([part.reshape(-1) for part in parts], dim=0).reshape(-1).tolist()
    whole = np.arange(count).reshape(shape)
    ends = np.cumsum(sizes)[:-1]
    assert given == np.concatenate([part.reshape(-1) for part in np.split(whole, ends, axis=dim)]).tolist()
    with pytest.raises(NotImplementedError, match="split of"):
        torch.split(torch.arange(5), [2, 2])


def write(path: Path, data: np.ndarray) -> str:
    data.tofile(path)
    return str(path)


def test_only_addresses_may_differ(worker: ModuleType, tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(0, 256, 4096).astype(np.uint8)
    first = data.copy()
    first[800:808] = np.frombuffer((0x5555_5712_3450).to_bytes(8, "little"), np.uint8)
    shipped = write(tmp_path / "a", first)
    assert worker._compare(shipped, write(tmp_path / "b", first)) == 0

    moved = first.copy()
    moved[800:808] = np.frombuffer((0x5555_6789_ABC0).to_bytes(8, "little"), np.uint8)
    assert worker._compare(shipped, write(tmp_path / "b", moved)) == 4

    other = first.copy()
    other[1000:1200] ^= 1
    with pytest.raises(Exception, match="200 bytes differ that are no addresses"):
        worker._compare(shipped, write(tmp_path / "b", other))
    with pytest.raises(Exception, match="4095 bytes instead of 4096"):
        worker._compare(shipped, write(tmp_path / "b", first[:-1]))


def test_pixels_are_got_back(worker: ModuleType) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
    how = {"mean": [123.7, 116.3, 103.5], "std": [58.4, 57.1, 57.4]}
    rows = ((pixels - np.float32(how["mean"])) / np.float32(how["std"])).transpose(0, 3, 1, 2).astype(np.float32)
    raw, distance = worker._pixels(rows, how)
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, pixels)
    assert distance < 1e-3
    assert worker._pixels(rows * 1.5, how)[1] > 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'Traceback (most recent call last):\n  File "rknn/api/rknn_log.py", line 344\nTypeError: bad\n\n'
            "ValueError: \x1b[1;31mE\x1b[0m\nValueError: Unsupport onnx opset 21, need <= 19!\n",
            "Unsupport onnx opset 21, need <= 19!",
        ),
        (
            "ValueError: The input 0 of NonZero('n') need to be constant!\nRemove NonZero('n') manually!\n",
            "The input 0 of NonZero('n') need to be constant! Remove NonZero('n') manually!",
        ),
        ("one line only", "one line only"),
        ("", ""),
    ],
)
def test_the_toolkits_own_words_are_found(worker: ModuleType, text: str, words: str) -> None:
    assert worker._sentence(text) == words


def test_the_folder_has_a_fixed_length(worker: ModuleType, tmp_path: Path) -> None:
    for parent in (tmp_path, tmp_path / "a-longer-one"):
        folder = worker._folder(str(parent))
        assert len(folder) == worker._PATH_LENGTH
        assert Path(folder).is_dir()
