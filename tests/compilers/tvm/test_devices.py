"""The devices that the user named, and whether a server is there."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelforge.compilers.tvm import devices
from modelforge.compilers.tvm.devices import Device
from modelforge.errors import InputError

PI = Device("pi5", "192.168.1.20", 9090, "pi5-key")


def test_a_device_is_kept_replaced_and_forgotten(tmp_path: Path) -> None:
    assert devices.known(tmp_path) == {}
    assert devices.add(PI, tmp_path) is False
    moved = Device("pi5", "192.168.1.21", 9090, "pi5-key")
    assert devices.add(moved, tmp_path) is True
    assert devices.get("pi5", tmp_path) == moved
    assert devices.remove("pi5", tmp_path) == moved
    assert devices.known(tmp_path) == {}


def test_an_unknown_device_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    devices.add(PI, tmp_path)
    with pytest.raises(InputError, match='there is no device "pi4"; did you mean "pi5"') as caught:
        devices.get("pi4", tmp_path)
    assert caught.value.fix == "modelforge devices add pi4 HOST:PORT KEY"


@pytest.mark.parametrize(
    ("name", "address", "key", "where"),
    [
        ("Pi 5", "h:1", "k", "NAME"),
        ("pi5", "h", "k", "HOST:PORT"),
        ("pi5", ":9090", "k", "HOST:PORT"),
        ("pi5", "h:0", "k", "HOST:PORT"),
        ("pi5", "h:65536", "k", "HOST:PORT"),
        ("pi5", "h:ninety", "k", "HOST:PORT"),
        ("pi5", "h:1", "a key", "KEY"),
        ("pi5", "h:1", "", "KEY"),
    ],
)
def test_what_is_no_device_is_refused(name: str, address: str, key: str, where: str) -> None:
    with pytest.raises(InputError) as caught:
        devices.parse(name, address, key)
    assert caught.value.where == where


@given(st.ip_addresses(), st.integers(1, 65535))
def test_any_address_is_read_as_it_is_written(host: object, port: int) -> None:
    device = Device("a", str(host), port, "k")
    assert devices.parse("a", device.address, "k") == device


@pytest.mark.parametrize("text", ["", "[]", '{"devices": [1]}', '{"devices": {"a": {}}}', '{"devices": {"a": 3}}'])
def test_a_damaged_file_is_told_and_left(tmp_path: Path, text: str) -> None:
    path = tmp_path / devices.FILE
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read") as caught:
        devices.add(PI, tmp_path)
    assert caught.value.where == str(path)
    assert path.read_text(encoding="utf-8") == text


def test_several_at_once_lose_nothing(tmp_path: Path) -> None:
    names = [f"d{place}" for place in range(12)]
    threads = [threading.Thread(target=devices.add, args=(Device(name, "h", 1, "k"), tmp_path)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads((tmp_path / devices.FILE).read_text(encoding="utf-8"))["devices"]) == sorted(names)


@contextmanager
def _answering(answer: bytes | None) -> Iterator[Device]:
    """A port that answers so; None never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(64)
                if answer is not None:
                    connection.sendall(answer)
                else:
                    done.wait(30)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Device("a", "127.0.0.1", server.getsockname()[1], "k")
        done.set()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((0xFF271).to_bytes(4, "little") + (8).to_bytes(4, "little") + b"server:k", devices.READY),
        ((0xFF273).to_bytes(4, "little"), "has another key"),
        (b"HTTP", "is no RPC server of TVM's"),
        (b"", "is no RPC server of TVM's"),
    ],
)
def test_a_server_is_known_by_its_first_words(answer: bytes, said: str) -> None:
    with _answering(answer) as device:
        assert devices.ask(device) == said


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_SECONDS", 0.2)
    with _answering(None) as device:
        assert devices.ask(device).startswith("gives no answer")


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert devices.ask(Device("a", "127.0.0.1", port, "k")) == "cannot be reached: Connection refused"
