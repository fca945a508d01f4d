"""`modelforge devices`: naming, showing and forgetting devices, and the server for one."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelforge.toolchains.host import this_host
from tests.conftest import Forge


@pytest.fixture
def forge(tmp_path: Path) -> Forge:
    return Forge(tmp_path / "home", tmp_path)


def test_a_device_is_added_listed_and_removed(forge: Forge) -> None:
    added = forge("devices", "add", "pi5", "192.168.1.20:9090", "pi5-key", "--json")
    device = {"name": "pi5", "host": "192.168.1.20", "port": 9090, "key": "pi5-key"}
    assert (added.code, added.json["device"], added.json["replaced"]) == (0, device, False)
    assert forge("devices", "list", "--json").json["devices"] == [device]
    assert "192.168.1.20:9090" in forge("devices", "list").out
    assert forge("devices", "remove", "pi5").code == 0
    assert forge("devices", "list", "--json").json["devices"] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "pi5"), "takes 3 words, not 1"),
        (("list", "pi5"), "takes 0 words, not 1"),
        (("remove",), "takes 1 words, not 0"),
        (("remove", "pi5"), 'there is no device "pi5"'),
        (("add", "pi5", "here", "k"), '"here" is no HOST:PORT'),
        (("server", "riscv"), "known: aarch64, x86-64"),
    ],
)
def test_bad_words_are_told_with_what_to_do(forge: Forge, words: tuple[str, ...], told: str) -> None:
    done = forge("devices", *words)
    assert done.code == 2
    assert told in done.err
    assert done.out == ""


def test_a_device_that_does_not_answer_is_not_kept(forge: Forge) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = forge("devices", "add", "pi5", f"127.0.0.1:{port}", "k", "--check")
    assert done.code == 1
    assert "cannot be reached: Connection refused" in done.err
    assert forge("devices", "list", "--json").json["devices"] == []


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server for this machine; compiled once."""
    folder = tmp_path_factory.mktemp("server")
    forge = Forge(folder / "home", folder)
    done = forge("devices", "server", this_host().isa, "-o", "served", "--json")
    assert done.code == 0, done.err
    assert done.json["files"] == ["rpc_server", "libtvm_runtime.so", "libtvm_ffi.so"]
    return folder / "served" / "rpc_server"


@pytest.fixture
def server(program: Path) -> Iterator[int]:
    process = subprocess.Popen([str(program), "127.0.0.1", "0", "k"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield int(process.stdout.readline().rsplit(" ", 1)[-1])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_the_server_answers_who_has_its_key(forge: Forge, server: int) -> None:
    address = f"127.0.0.1:{server}"
    assert forge("devices", "add", "here", address, "k", "--check", "--json").json["device"]["state"] == "answers"
    assert "has another key" in forge("devices", "add", "other", address, "x", "--check").err
    assert [each["state"] for each in forge("devices", "list", "--check", "--json").json["devices"]] == ["answers"]


@pytest.mark.parametrize(
    "words",
    [b"", b"GET / HTTP/1.1\r\n\r\n", struct.pack("<ii", 0xFF271, -1), struct.pack("<ii", 0xFF271, 1 << 30),
     struct.pack("<ii", 0xFF271, 3) + b"abc"],
)  # fmt: skip
def test_the_server_outlives_strangers(forge: Forge, server: int, words: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server)) as connection:
        connection.sendall(words)
    assert forge("devices", "add", "here", f"127.0.0.1:{server}", "k", "--check").code == 0


@pytest.mark.parametrize(
    "words", [[], ["0.0.0.0", "9090"], ["::", "9090", "k"], ["0.0.0.0", "x", "k"], ["0.0.0.0", "1", "a b"]]
)
def test_the_server_refuses_a_wrong_command_line(program: Path, words: list[str]) -> None:
    done = subprocess.run([str(program), *words], capture_output=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr
