"""`modelforge devices`: the devices that tuning may measure on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from modelforge.cli.console import Console

DESCRIPTION = """Name the devices that `[target.tune] device = "NAME"` in a recipe measures on. On the device runs

  ./rpc_server 0.0.0.0 9090 KEY

which `devices server aarch64 -o DIR` writes, with the libraries that it needs, or the rpc_server of TVM's own Python
package, of the same version. It runs whatever code it is sent, and KEY keeps nobody out: only in a network where you
trust everyone.

add     name a device, or give a name another address; --check asks it whether it is there
list    show them; --check asks each
remove  forget one
server  write the server for a device: x86-64 or aarch64"""
EXAMPLE = "modelforge devices add pi5 192.168.1.20:9090 pi5-key"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("add", "list", "remove", "server"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a device; for server: x86-64 or aarch64")
    parser.add_argument("address", nargs="?", metavar="HOST:PORT", help="for add")
    parser.add_argument("key", nargs="?", metavar="KEY", help="for add: as given to rpc_server --key")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="for server: where it goes; default rpc-server"
    )
    parser.add_argument("--check", action="store_true", help="ask whether a server with this key answers there")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError

    given = [each for each in (args.name, args.address, args.key) if each is not None]
    wanted = {"add": 3, "list": 0, "remove": 1, "server": 1}[args.action]
    if len(given) != wanted:
        usage = {"add": " NAME HOST:PORT KEY", "list": "", "remove": " NAME", "server": " x86-64"}[args.action]
        raise InputError(
            f"`devices {args.action}` takes {wanted} words, not {len(given)}",
            where="modelforge devices",
            fix=f"modelforge devices {args.action}{usage}",
        )
    if args.action == "list":
        return _list(console, check=args.check)
    if args.action == "server":
        return _server(args, console)
    return _add(args, console) if args.action == "add" else _remove(args.name, console)


def _add(args: argparse.Namespace, console: Console) -> int:
    from modelforge.compilers.tvm import devices

    device = devices.parse(args.name, args.address, args.key)
    state = devices.ask(device) if args.check else None
    if state is not None and state != devices.READY:
        from modelforge.errors import BuildError

        raise BuildError(f"{device.name} {state}", where=device.address, fix="nothing was kept; start rpc_server there")
    replaced = devices.add(device)
    said = f"{device.name}: {device.address}" + (", in place of what it was before" if replaced else "")
    console.result({"device": _document(device, state), "replaced": replaced}, said)
    return 0


def _list(console: Console, *, check: bool) -> int:
    from modelforge.compilers.tvm import devices

    found = list(devices.known().values())
    states = {device.name: devices.ask(device) if check else None for device in found}
    console.result({"devices": [_document(device, states[device.name]) for device in found]})
    if not found:
        console.text("no devices; `modelforge devices add NAME HOST:PORT KEY` names one")
        return 0
    columns = ["device", "address", "key", *(["state"] if check else [])]
    rows = [
        [device.name, device.address, device.key, *([states[device.name] or ""] if check else [])] for device in found
    ]
    console.table(columns, rows)
    return 0


def _remove(name: str, console: Console) -> int:
    from modelforge.compilers.tvm import devices

    device = devices.remove(name)
    console.result({"removed": _document(device, None)}, f"{name}: forgotten")
    return 0


def _server(args: argparse.Namespace, console: Console) -> int:
    from modelforge.compilers.tvm import runtime
    from modelforge.errors import InputError, nearest
    from modelforge.store import Store

    known = ("aarch64", "x86-64")
    if args.name not in known:
        raise InputError(f'there is no server for "{args.name}"; {nearest(args.name, known)}', where="NAME")
    folder = args.output or Path("rpc-server")
    files = runtime.server_files(args.name, Store(), folder)
    document = {"isa": args.name, "path": str(folder), "files": [file.name for file in files]}
    console.result(document, f"{folder}: copy it to the device, and run there: ./{files[0].name} 0.0.0.0 9090 KEY")
    return 0


def _document(device: Any, state: str | None) -> dict[str, Any]:
    document = {"name": device.name, "host": device.host, "port": device.port, "key": device.key}
    return document if state is None else {**document, "state": state}
