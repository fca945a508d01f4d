"""The devices that the user has named: where TVM's RPC server runs on each. Imports no TVM, and connects to none.

``$MODELFORGE_HOME/devices.json``: ``{"schema": 1, "devices": {NAME: {"host": …, "port": …, "key": …}}}``.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from modelforge.errors import InputError, nearest
from modelforge.store import Store, canonical_json, default_home, write_atomically

FILE: Final = "devices.json"
_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*\Z")
_KEY = re.compile(r"[^\s:]+\Z")
"""TVM's handshake separates the key from options by spaces (tvm/rpc/server.py)."""


@dataclass(frozen=True)
class Device:
    """``key`` is what ``rpc_server --key`` was started with: it tells devices apart, and keeps nobody out."""

    name: str
    host: str
    port: int
    key: str

    @property
    def address(self) -> str:
        """``HOST:PORT``, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(name: str, address: str, key: str) -> Device:
    """A device as the user gives it.

    Raises:
        InputError: a name, an address or a key that is none.
    """
    if not _NAME.match(name):
        raise InputError(
            f'"{name}" is no name for a device',
            where="NAME",
            fix="lower-case letters and digits, with single dots, hyphens or underscores between",
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f'"{address}" is no HOST:PORT', where="HOST:PORT", fix="such as 192.168.1.20:9090")
    if not _KEY.match(key):
        raise InputError(f'"{key}" is no key', where="KEY", fix="the word after `rpc_server --key`")
    return Device(name, host.removeprefix("[").removesuffix("]"), int(port), key)


def known(home: Path | None = None) -> dict[str, Device]:
    """The devices, by name.

    Raises:
        InputError: the file is damaged.
    """
    path = (home or default_home()) / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {name: _device(name, entry) for name, entry in sorted(data["devices"].items())}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(path), fix="mend it, or remove it") from error


def get(name: str, home: Path | None = None) -> Device:
    """One device.

    Raises:
        InputError: there is none of that name.
    """
    devices = known(home)
    if name not in devices:
        hint = f"; {nearest(name, devices)}" if devices else ""
        raise InputError(f'there is no device "{name}"{hint}', fix=f"modelforge devices add {name} HOST:PORT KEY")
    return devices[name]


def add(device: Device, home: Path | None = None) -> bool:
    """Keep a device; gives whether it took the place of one of the same name."""
    with _changing(home) as devices:
        replaced = device.name in devices
        devices[device.name] = device
    return replaced


def remove(name: str, home: Path | None = None) -> Device:
    """Forget a device.

    Raises:
        InputError: there is none of that name.
    """
    with _changing(home) as devices:
        found = get(name, home)
        del devices[name]
    return found


@contextmanager
def _changing(home: Path | None) -> Iterator[dict[str, Device]]:
    """The devices, to be changed; written on leaving, whole or not at all."""
    store = Store(home)
    with store.writing():
        store.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(store.home / f"{FILE}.lock")
    with lock:
        devices = known(store.home)
        yield devices
        entries = {name: _entry(device) for name, device in devices.items()}
        with store.writing():
            write_atomically(store.home / FILE, canonical_json({"schema": 1, "devices": entries}))


def _entry(device: Device) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(device).items() if name != "name"}


def _device(name: str, entry: Mapping[str, Any]) -> Device:
    device = Device(name, entry["host"], entry["port"], entry["key"])
    if not isinstance(device.port, int) or not isinstance(device.host, str) or not isinstance(device.key, str):
        raise ValueError(f"device {name} has another form")
    return device


READY: Final = "answers"
_SECONDS: Final = 5.0
_MAGIC: Final = 0xFF271
"""RPC_MAGIC of tvm/rpc/base.py; the server answers with it, or one more (duplicate) or two more (another key)."""


def ask(device: Device) -> str:
    """Whether a server of TVM's with this key is there, in words that go on ``NAME …``; :data:`READY` where it is.

    Speaks the first words of TVM's RPC (tvm/rpc/server.py, ``_accept_conn``), which need no TVM, and hangs up once it
    has heard all that the server says: TVM's server ends for good where a client leaves with words unread.
    """
    header = f"client:{device.key}".encode()
    try:
        with socket.create_connection((device.host, device.port), _SECONDS) as connection:
            connection.settimeout(_SECONDS)
            connection.sendall(struct.pack("<ii", _MAGIC, len(header)) + header)
            code = _number(connection)
            if code == _MAGIC:
                connection.recv(_number(connection) or 0, socket.MSG_WAITALL)
    except TimeoutError:
        return f"gives no answer within {_SECONDS:.0f} s"
    except OSError as error:
        return f"cannot be reached: {error.strerror or error}"
    return {_MAGIC: READY, _MAGIC + 2: "has another key"}.get(code or 0, "is no RPC server of TVM's")


def _number(connection: socket.socket) -> int | None:
    said = connection.recv(4, socket.MSG_WAITALL)
    return int(struct.unpack("<i", said)[0]) if len(said) == 4 else None
