"""The header reader against made-up files; real engines are read in tensorrt/test_build."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.engine_header import read_header
from modelforge.errors import IntegrityError


def engine_bytes(version: tuple[int, ...] = (1, 7, 1, 116), body: bytes = b"x" * 100) -> bytes:
    """Of TensorRT-RTX."""
    size = 0x40 + 4 + len(body)
    head = b"vtrt" + struct.pack("<IQQ", 0, 2, size) + bytes(version) + b"vtrt"
    return head.ljust(0x40, b"\0") + b"NGNE" + body


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "main.engine"
    path.write_bytes(engine_bytes())
    return path


def test_a_whole_engine_tells_its_version_and_size(engine: Path) -> None:
    header = read_header(engine)
    assert header.magic == "vtrt"
    assert header.version == (1, 7, 1, 116)
    assert header.size == engine.stat().st_size


def test_a_shorter_and_a_longer_file_are_told_apart(engine: Path) -> None:
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1])
    with pytest.raises(IntegrityError, match="truncated: its header says 168 bytes, the file has 167"):
        read_header(engine)
    engine.write_bytes(whole + b"\0")
    with pytest.raises(IntegrityError, match="longer than it should be"):
        read_header(engine)


@pytest.mark.parametrize("length", [1, 4, 0x18, 0x40, 0x43])
def test_a_file_shorter_than_its_header_is_refused(engine: Path, length: int) -> None:
    engine.write_bytes(engine.read_bytes()[:length])
    with pytest.raises(IntegrityError):
        read_header(engine)


def test_an_empty_file_is_called_empty(engine: Path) -> None:
    engine.write_bytes(b"")
    with pytest.raises(IntegrityError, match="an empty file"):
        read_header(engine)


def test_a_damaged_magic_is_refused_wherever_it_stands(engine: Path) -> None:
    whole = engine.read_bytes()
    for offset in (0, 0x1C, 0x40):
        damaged = bytearray(whole)
        damaged[offset] ^= 0xFF
        engine.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            read_header(engine)


def test_another_version_is_named_with_the_wanted_one(engine: Path) -> None:
    assert read_header(engine, version="1.7.1.116").version_text == "1.7.1.116"
    with pytest.raises(IntegrityError, match=r"built by TensorRT-RTX 1\.7\.1\.116, not 1\.8\.0\.1") as caught:
        read_header(engine, version="1.8.0.1")
    assert caught.value.exit_code == 5


def classic_bytes(size: int = 96, said: int = 96, serialization: int = 0) -> bytes:
    """What `trtexec --getPlanVersionOnly` reads of an engine of classic TensorRT 10.3.0.26."""
    head = b"ftrt" + struct.pack("<IQQ", serialization, 0, said) + bytes((10, 3, 0, 26))
    return head.ljust(size, b"\0")


def test_an_engine_of_classic_tensorrt_is_read_too(engine: Path) -> None:
    engine.write_bytes(classic_bytes())
    header = read_header(engine, magic="ftrt", version="10.3.0")
    assert (header.product, header.version_text, header.size, header.is_whole) == ("TensorRT", "10.3.0.26", 96, True)
    engine.write_bytes(classic_bytes(said=7))
    assert read_header(engine).is_whole is None


def test_a_classic_engine_of_another_version_or_layout_is_refused(engine: Path) -> None:
    engine.write_bytes(classic_bytes())
    with pytest.raises(IntegrityError, match=r"built by TensorRT 10\.3\.0\.26, not 10\.13\.3\.9"):
        read_header(engine, version="10.13.3.9")
    engine.write_bytes(classic_bytes(serialization=1))
    with pytest.raises(IntegrityError, match="layout is not known"):
        read_header(engine)
    engine.write_bytes(classic_bytes()[:20])
    with pytest.raises(IntegrityError, match="truncated: 20 bytes are less than its header"):
        read_header(engine)


def test_the_products_are_told_apart(engine: Path) -> None:
    with pytest.raises(IntegrityError, match="not a TensorRT engine but one of TensorRT-RTX") as caught:
        read_header(engine, magic="ftrt")
    assert "do not load" in str(caught.value.fix)
    engine.write_bytes(b"\x10\0\0\0" + b'{"task": "detect"}' + classic_bytes())
    with pytest.raises(IntegrityError, match="metadata in JSON stands before it, as Ultralytics writes"):
        read_header(engine)


def test_a_missing_file_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="cannot be read"):
        read_header(tmp_path / "nothing.engine")


@given(st.binary(max_size=200))
def test_garbage_never_raises_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "e"
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        read_header(path)


@given(st.tuples(*[st.integers(0, 255)] * 4), st.binary(max_size=64))
def test_every_version_and_body_reads_back(
    tmp_path_factory: pytest.TempPathFactory, version: tuple[int, int, int, int], body: bytes
) -> None:
    path = tmp_path_factory.mktemp("whole") / "e"
    path.write_bytes(engine_bytes(version, body))
    assert read_header(path).version == version
