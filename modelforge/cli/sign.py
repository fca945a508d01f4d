"""`modelforge sign`: sign a bundle, or make the keys to sign with."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from modelforge.cli.console import Console

DESCRIPTION = """Sign a bundle with an ECDSA P-256 key, after every digest of it was checked. What is signed says which
bundle of which version it is, which variants it holds, and how they were made. The bundle's own digest does not change.

The key's password is taken from MODELFORGE_KEY_PASSWORD, or asked for on a terminal. Needs the extra `sign`."""
EXAMPLE = """modelforge sign --generate-key release
  modelforge sign dist/digits-1.0.0 --key release.key"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--key", type=Path, metavar="NAME.key", help="the private key to sign with")
    parser.add_argument(
        "--generate-key", type=Path, metavar="NAME", help="make NAME.key (encrypted) and NAME.pub; overwrites nothing"
    )
    parser.add_argument("--builder", metavar="URI", help="who built it, for the provenance: taken on your word")
    parser.add_argument("--force", action="store_true", help="sign again what this key has signed already")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.errors import InputError

    if args.generate_key is not None:
        if args.bundle or args.key or args.builder or args.force:
            raise InputError("--generate-key makes keys and signs nothing: give it alone", where="modelforge sign")
        return _generate(args.generate_key, console)
    if args.bundle is None or args.key is None:
        fix = "`modelforge sign --generate-key NAME` makes a key"
        raise InputError("a bundle and --key are needed", where="modelforge sign", fix=fix)
    return _sign(args, console)


def _generate(stem: Path, console: Console) -> int:
    from modelforge.bundle.keys import generate, load_public_key, require_cryptography

    require_cryptography()
    private, public = generate(stem, _password(f"new password for {stem}.key", twice=True))
    key = load_public_key(public)
    console.result(
        {"private_key": str(private), "public_key": str(public), "key_id": key.id},
        f"{private}  keep it to yourself\n{public}  give it to those who pull, on a way that they trust\nkey {key.id}",
    )
    return 0


def _sign(args: argparse.Namespace, console: Console) -> int:
    from modelforge.bundle.keys import load_private_key, needs_password, require_cryptography
    from modelforge.bundle.provenance import BUILDER
    from modelforge.bundle.signing import sign

    require_cryptography()
    password = _password(f"password for {args.key}", twice=False) if needs_password(args.key) else None
    key = load_private_key(args.key, password)
    if key.exposed:
        console.note(f"warning: {key.exposed}")
    signed = sign(args.bundle, key, builder=_uri(args.builder) if args.builder else BUILDER, force=args.force)
    done = "was signed by this key already" if signed.unchanged else "is signed"
    console.result(
        {
            "path": str(args.bundle),
            "digest": signed.digest,
            "signature": str(signed.path),
            "key_id": signed.key_id,
            "unchanged": signed.unchanged,
        },
        f"{args.bundle} {done}\n{signed.digest}\n{signed.path}",
    )
    return 0


def _password(prompt: str, *, twice: bool) -> str:
    """From the environment, else from a terminal; never echoed."""
    from modelforge.bundle.keys import PASSWORD_VARIABLE
    from modelforge.errors import InputError

    password = os.environ.get(PASSWORD_VARIABLE)
    if password:
        return password
    if not sys.stdin.isatty():
        raise InputError(
            "the key needs a password, and there is no terminal to ask on", where="modelforge sign",
            fix=f"set {PASSWORD_VARIABLE}",
        )  # fmt: skip
    import getpass

    password = getpass.getpass(f"{prompt}: ", stream=sys.stderr)
    if twice and getpass.getpass("again: ", stream=sys.stderr) != password:
        raise InputError("the two passwords differ", where="modelforge sign")
    if not password:
        raise InputError("no password was given", where="modelforge sign")
    return password


def _uri(text: str) -> str:
    """SLSA: ``builder.id`` is a URI."""
    from urllib.parse import urlsplit

    from modelforge.errors import InputError

    try:
        sound = bool(urlsplit(text).scheme) and text.isprintable() and not text.count(" ")
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"{text!r} is not a URI", where="--builder", fix="for example https://ci.example.com/release")
    return text
