"""A device over TVM's own RPC server that fails on purpose: `rpc_double.py PORT KEY HOW FIRST`.

HOW is what happens from the FIRST library on that it is sent: ``lies`` (one weight, :data:`WEIGHT`, is another one),
``dies`` or ``hangs``; ``serves`` is a device as it should be.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

WEIGHT = 0.12345678
"""All weights of the model that is tuned have this value: it is found in a library whatever the tile."""


def main(port: str, key: str, how: str, first: str) -> None:
    from tvm.rpc import server

    load = server._load_module
    loads = 0

    def loaded(path: str) -> Any:
        nonlocal loads
        loads += 1
        if loads >= int(first):
            if how == "dies":
                os._exit(1)
            if how == "hangs":
                time.sleep(600)  # until the test kills it
            if how == "lies":
                true, false = struct.pack("<f", WEIGHT), struct.pack("<f", 2 * WEIGHT)
                Path(path).write_bytes(Path(path).read_bytes().replace(true, false))
        return load(path)

    server._load_module = loaded
    listening = socket.create_server(("127.0.0.1", int(port)))
    print(f"listening on {listening.getsockname()[1]}", flush=True)  # noqa: T201 - the test waits for it
    server._listen_loop(listening, listening.getsockname()[1], key, None, None, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
