"""`modelforge targets`: the profiles that a recipe can name."""

from __future__ import annotations

import argparse
from typing import Any

from modelforge.cli.console import Console, size_text

DESCRIPTION = "List the target profiles, or show one. `not built yet`: no compiler of the profile is in this version."
EXAMPLE = "modelforge targets cortex-a76"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tag", nargs="?", help="show this one in full")


def run(args: argparse.Namespace, console: Console) -> int:
    from modelforge.compilers import compiler_names
    from modelforge.target import Registry, Target

    registry = Registry()
    chosen = [registry.get(args.tag)] if args.tag else list(registry)
    built = compiler_names()

    def status(target: Target) -> str:
        return "ready" if built.intersection(target.compilers) else "not built yet"

    documents: list[dict[str, Any]] = [
        {
            "tag": target.tag,
            "title": target.title,
            "vendor": target.vendor,
            "tier": target.tier,
            "status": status(target),
            "compilers": [{"name": name, "built": name in built} for name in target.compilers],
            "precisions": list(target.precisions),
            "arch": target.arch.model_dump(mode="json", exclude_none=True),
            "memory": target.memory.model_dump(mode="json"),
            "peak": target.peak.model_dump(mode="json"),
            "notes": list(target.notes),
        }
        for target in chosen
    ]
    console.result({"targets": documents})
    if args.tag and not console.json:
        _show(console, documents[0])
    else:
        rows = [_row(each) for each in documents]
        console.table(["tag", "title", "tier", "architecture", "precisions", "memory", "compilers", "status"], rows)
    return 0


def _row(each: dict[str, Any]) -> list[str]:
    return [
        each["tag"],
        each["title"],
        each["tier"],
        _arch(each["arch"]),
        ", ".join(each["precisions"]),
        size_text(each["memory"]["bytes"]),
        ", ".join(compiler["name"] for compiler in each["compilers"] if compiler["built"]) or "-",
        each["status"],
    ]


def _show(console: Console, document: dict[str, Any]) -> None:
    for key, value in document.items():
        console.text(f"{key:<11} {_shown(key, value)}")


def _shown(key: str, value: Any) -> str:
    if key == "compilers":
        return ", ".join(each["name"] + ("" if each["built"] else " (not built yet)") for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_number(entry)}" for name, entry in value.items() if entry not in (None, [], False))
    return (", ".join(map(str, value)) or "-") if isinstance(value, list) else str(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_ARCH_KEYS = {
    "cuda": "sm", "cpu": "mcpu", "ascend": "soc_version", "rockchip": "platform", "qualcomm": "htp_arch",
    "ethos-u": "accelerator",
}  # fmt: skip


def _arch(arch: dict[str, Any]) -> str:
    key = _ARCH_KEYS[arch["kind"]]
    prefix = {"cuda": "sm_", "qualcomm": "htp v"}.get(arch["kind"], "")
    return f"{prefix}{arch[key]}"
