"""`modelforge login`: keep credentials for a registry where docker and podman look for theirs."""

from __future__ import annotations

import argparse
import sys

from modelforge.cli.connection import add_connection, connection
from modelforge.cli.console import Console

DESCRIPTION = """Ask a registry whether it takes these credentials, and keep them: with the credential helper that the
file names, else in the file (REGISTRY_AUTH_FILE, DOCKER_CONFIG/config.json or ~/.docker/config.json). The password is
read from the terminal or, with --password-stdin, from standard input; never from the command line."""
EXAMPLE = "modelforge login registry.example.com -u robot --password-stdin < token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("host", metavar="HOST[:PORT]")
    parser.add_argument("-u", "--username", metavar="NAME")
    parser.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    add_connection(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.registry import credentials, reference

    host = reference.host(args.host)
    user, password = _ask(args)
    login = credentials.Login(user, password)
    connection(args).check_login(host, login)
    kept = credentials.store(host, login)
    console.result(
        {"host": host, "username": user, "stored_in": kept.place}, f"{host}: logged in as {user}; kept in {kept.place}"
    )
    if kept.plain:
        console.note("note: the file holds the password readably; a credential helper (credsStore) would not")
    return 0


def _ask(args: argparse.Namespace) -> tuple[str, str]:
    from modelforge.errors import InputError

    if args.password_stdin:
        if not args.username:
            raise InputError("--password-stdin needs a user name", fix="-u NAME")
        user, password = args.username, sys.stdin.readline().rstrip("\r\n")
    elif not sys.stdin.isatty():
        raise InputError("there is no terminal to ask for the password", fix="--password-stdin")
    else:
        import getpass

        user = args.username or input("user name: ")
        password = getpass.getpass("password: ")
    if not user or not password or ":" in user:
        raise InputError("a user name without colon, and a password, are needed")
    return user, password
