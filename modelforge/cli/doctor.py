"""`modelforge doctor`: what can be built and run on this machine, and how to get the rest."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from modelforge.cli.console import Console

DESCRIPTION = (
    "Tell which toolchains are here, which targets they serve, how variants can be checked, and how to get the rest."
)
EXAMPLE = "modelforge doctor"

_DEFERRED = "`build --allow-deferred` prepares all but the compile, which `finalize` does on the device"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(args: argparse.Namespace, console: Console) -> int:
    del args
    from modelforge import __version__
    from modelforge.compilers import compiler_names, get_compiler
    from modelforge.compilers.protocol import Missing
    from modelforge.store import default_home
    from modelforge.target import Registry

    registry = Registry()
    compilers: list[dict[str, Any]] = []
    for name in sorted(compiler_names()):
        found = get_compiler(name).probe()
        if isinstance(found, Missing):
            compilers.append({"name": name, "status": "missing", "reason": found.reason, "fix": found.fix})
        else:
            compilers.append(
                {"name": name, "status": "ready", "versions": dict(found.versions), "warnings": list(found.warnings)}
            )
    missing = {each["name"]: each["reason"] for each in compilers if each["status"] == "missing"}
    ready = {each["name"] for each in compilers if each["status"] == "ready"}
    targets: list[dict[str, Any]] = []
    for target in registry:
        built = [name for name in target.compilers if name in compiler_names()]
        usable = next((name for name in built if name in ready), None)
        entry: dict[str, Any] = {"tag": target.tag, "compiler": usable, "evidence": None, "hint": ""}
        if usable:
            compiler = get_compiler(usable)
            entry["evidence"] = compiler.runner(target) or "reference"
            entry["hint"] = compiler.runner_hint(target)
        entry["status"] = "ready" if usable else ("deferred" if built else "not built yet")
        entry["why"] = "" if usable or not built else missing[built[0]]
        targets.append(entry)
    console.result(
        {
            "modelforge": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "home": str(default_home()),
            "compilers": compilers,
            "targets": targets,
        }
    )
    if console.json:
        return 0
    console.text(f"modelforge {__version__}, Python {platform.python_version()} on {platform.machine()}\n")
    console.table(
        ["compiler", "status", "toolchain"],
        [
            [
                each["name"],
                each["status"],
                each.get("reason") or ", ".join(f"{package} {number}" for package, number in each["versions"].items()),
            ]
            for each in compilers
        ],
    )
    console.text("")
    console.table(
        ["target", "status", "compiler", "evidence here"],
        [[each["tag"], each["status"], each["compiler"] or "-", each["evidence"] or "-"] for each in targets],
    )
    for why in dict.fromkeys(each["why"] for each in targets if each["why"]):
        tags = ", ".join(each["tag"] for each in targets if each["why"] == why)
        console.text(f"\n{tags}: {why}; {_DEFERRED}")
    for each in compilers:
        for advice in [each["fix"]] if "fix" in each else each["warnings"]:
            console.text(f"\n{each['name']}: {advice}")
    for hint in dict.fromkeys(each["hint"] for each in targets if each["hint"]):
        tags = ", ".join(each["tag"] for each in targets if each["hint"] == hint)
        console.text(f"\n{tags}: {hint}")
    return 0
