"""The `modelforge` program: finds the command, imports only that one, and turns exceptions into exit codes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Never

from modelforge import __version__
from modelforge.cli.console import Console
from modelforge.errors import INTERRUPTED, InputError, ModelForgeError, nearest

# name -> one line of help; the module is modelforge.cli.NAME. Adding a command is a file and a line.
COMMANDS = {
    "init": "write a recipe for a model",
    "plan": "show what a build would do, and do nothing",
    "build": "build a bundle from a recipe",
    "finalize": "compile a deferred variant on its device",
    "inspect": "show what is in a bundle or an ONNX model",
    "verify": "check a bundle's digests, and run its golden samples where possible",
    "sign": "sign a bundle, or make the keys for it",
    "bom": "write a bundle's bill of materials (CycloneDX ML-BOM)",
    "report": "show how each variant was judged, on the terminal or as one HTML page",
    "targets": "list the target profiles",
    "devices": "name the devices that tuning may measure on",
    "tuning": "list what was tuned here, and take it to other machines",
    "toolchain": "install, list or remove vendor toolchains that need an environment of their own",
    "doctor": "tell which toolchains are here, and how to get the others",
    "ascend": "check an atc command line, or explain the log of an atc run that failed",
    "calibrate": "measure the ranges of a model's activations, or merge range tables",
    "quantize": "write the INT8 (QDQ) form of a model in one dialect",
    "split": "cut a model into stages, over device, edge and cloud where asked",
    "select": "choose the variant to run on this device, and where to go if not here",
    "export": "write a variant as plain files or as a Triton model repository",
    "diff": "show what differs between two bundles",
    "push": "push a bundle into a registry",
    "pull": "pull the variants that a device needs",
    "ls": "list tags and variants in a registry",
    "tag": "give what is in a registry another tag",
    "login": "keep credentials for a registry",
    "logout": "forget credentials for a registry",
    "prune": "remove what pulls left in the store",
    "cache": "list, prune or verify the cache",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code (see :mod:`modelforge.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(json="--json" in arguments, quiet="--quiet" in arguments or "-q" in arguments)
    debug = "--debug" in arguments
    try:
        with _terminable():
            return _dispatch(arguments, console)
    except ModelForgeError as error:
        if debug:
            raise
        return _fail(console, error)
    except KeyboardInterrupt:
        console.error("interrupted; what was finished is kept, the same command goes on from there")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: no complaint, and none at shutdown either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # a bug of ours: one line for the user, the trace with --debug
        if debug:
            raise
        console.error(
            f"internal error: {type(error).__name__}: {error}\n  how to mend: run again with --debug and report it"
        )
        if console.json:
            console.result({"error": {"type": "InternalError", "what": str(error), "exit_code": 1}})
        return 1


def _dispatch(arguments: list[str], console: Console) -> int:
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is None:
        return _top_level(arguments)
    if name not in COMMANDS:
        raise InputError(f'there is no command "{name}"; {nearest(name, COMMANDS)}', where="modelforge")
    module: Any = importlib.import_module(f"modelforge.cli.{name}")
    parser = _Parser(
        prog=f"modelforge {name}",
        description=module.DESCRIPTION,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    common = parser.add_argument_group("everywhere")
    common.add_argument("--json", action="store_true", help="one JSON document on stdout, all else on stderr")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress, no notes")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    rest = list(arguments)
    rest.remove(name)
    code: int = module.run(parser.parse_args(rest), console)
    return code


def _top_level(arguments: list[str]) -> int:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="modelforge",
        usage="modelforge COMMAND [options]",
        description="One ONNX model in; one versioned bundle out, compiled and accuracy-checked for every target.",
        epilog=f"commands:\n{lines}\n\nexample:\n  modelforge build recipes/digits\n\n"
        "`modelforge COMMAND --help` tells more. Exit codes: 0 done, 1 build failed, 2 bad input, 3 accuracy gate\n"
        "failed, 4 toolchain missing, 5 integrity, signature or registry refusal, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"modelforge {__version__}")
    parser.parse_args(arguments)
    parser.print_help()
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        raise InputError(message, where=self.prog, fix=f"`{self.prog} --help`")


def _fail(console: Console, error: ModelForgeError) -> int:
    console.error(str(error))
    if console.json and not error.reported:
        fault = {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
        console.result({"error": {**fault, "exit_code": error.exit_code}})
    return error.exit_code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: children killed, nothing half-written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
