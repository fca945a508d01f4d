"""`modelforge toolchain`: vendor toolchains that live in an environment of their own."""

from __future__ import annotations

import argparse
from typing import Any

from modelforge.cli.console import Console

DESCRIPTION = """Install, list or remove vendor toolchains whose packages conflict with others. Each gets an environment
of its own under $MODELFORGE_HOME/toolchains, made by uv from pinned packages, whole or not at all. Where the vendor's
licence must be accepted, it is named, and --accept-license says that you do; the choice is recorded."""
EXAMPLE = "modelforge toolchain install rockchip --accept-license"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("install", "list", "remove"))
    parser.add_argument("name", nargs="?", help="a toolchain; `modelforge toolchain list` shows them")
    parser.add_argument("--accept-license", action="store_true", help="accept the vendor's licence")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError

    if args.action == "list":
        if args.name is not None:
            raise InputError("`toolchain list` takes no name", where="modelforge toolchain")
        return _list(console)
    if args.name is None:
        raise InputError(
            f"which toolchain? `toolchain {args.action} NAME`", where="modelforge toolchain",
            fix="`modelforge toolchain list` shows them",
        )  # fmt: skip
    return _install(args, console) if args.action == "install" else _remove(args, console)


def _list(console: Console) -> int:
    from modelforge.toolchains.definition import get_definition, toolchain_names
    from modelforge.toolchains.environments import Environment, find, install_command

    rows: list[dict[str, Any]] = []
    for name in toolchain_names():
        definition = get_definition(name)
        found = find(definition)
        row: dict[str, Any] = {
            "name": name,
            "title": definition.title,
            "status": "missing",
            "version": next(pin for pin in definition.packages if pin.startswith(definition.probe)).partition("==")[2],
            "licence": definition.licence.name,
            "fix": install_command(definition),
        }
        if isinstance(found, Environment):
            row |= {"status": "ready", "identity": found.identity, "path": str(found.folder), "fix": None}
        elif found is not None:
            row |= {"status": "broken", "reason": found.reason}
        rows.append(row)
    console.result({"toolchains": rows})
    console.table(
        ["toolchain", "status", "version", "licence", "to get it"],
        [[row["name"], row["status"], row["version"], row["licence"], row["fix"] or "-"] for row in rows],
    )
    for row in rows:
        if "reason" in row:
            console.note(f"note: {row['name']}: {row['reason']}")
    return 0


def _install(args: argparse.Namespace, console: Console) -> int:
    from modelforge.toolchains.definition import get_definition
    from modelforge.toolchains.environments import Broken, find, install

    definition = get_definition(args.name)
    before = find(definition)
    if isinstance(before, Broken):
        console.note(f"note: the environment was broken ({before.reason}); it is made anew")
    environment, made = install(definition, accept_license=args.accept_license)
    console.result(
        {
            "name": args.name,
            "version": environment.version,
            "identity": environment.identity,
            "path": str(environment.folder),
            "licence": environment.accepted,
            "installed": made,
        },
        f"{definition.title} {environment.version} is {'installed' if made else 'here already'}: {environment.folder}",
    )
    return 0


def _remove(args: argparse.Namespace, console: Console) -> int:
    from modelforge.toolchains.definition import get_definition
    from modelforge.toolchains.environments import remove

    definition = get_definition(args.name)
    removed = remove(definition)
    text = f"{definition.title} is removed" if removed else f"{definition.title} was not installed"
    console.result({"name": args.name, "removed": removed}, text)
    return 0
