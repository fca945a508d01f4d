"""`modelforge logout`: forget the credentials for a registry."""

from __future__ import annotations

import argparse

from modelforge.cli.console import Console

DESCRIPTION = "Forget the credentials for a registry: out of the file that `login` writes, or its credential helper."
EXAMPLE = "modelforge logout registry.example.com"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", metavar="HOST[:PORT]")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError
    from modelforge.registry import credentials, reference

    host = reference.host(args.host)
    was = credentials.erase(host)
    if was is None:
        raise InputError("there are no credentials", where=host, fix=f"looked into {credentials.files()[0]}")
    console.result({"host": host, "removed_from": was.place}, f"{host}: forgotten by {was.place}")
    return 0
