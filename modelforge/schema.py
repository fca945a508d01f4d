"""Turns what pydantic says of a TOML file into one sentence with the file, the line, the key and the way out."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from modelforge.errors import nearest


def explain(error: ValidationError, model: type[BaseModel], path: Path) -> tuple[str, str, str | None]:
    """Explain the first fault of a file as (what, where, fix).

    Unknown keys come before all else: a misspelt key is also a missing one, and the misspelling is what to mend.
    """
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    keys = [part for part in fault["loc"] if not _is_union_tag(part, fault["loc"])]
    dotted = dotted_key(keys)
    where = f"{path}{line_suffix(path, keys)}: {dotted}" if dotted else str(path)
    if fault["type"] == "extra_forbidden":
        known = known_keys(model, keys[:-1])
        return f'unknown key "{keys[-1]}"; {nearest(str(keys[-1]), known)}', where, None
    if fault["type"] == "missing":
        return "this key is required and missing", where, f"add `{keys[-1]} = ...`"
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{message[:1].lower()}{message[1:]} (got {_shown(fault['input'])})", where, None


def dotted_key(keys: list[Any]) -> str:
    """``["target", 0, "tag"]`` as ``target[0].tag``."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else str(key))
    return text


def line_suffix(path: Path, keys: list[Any]) -> str:
    """``:12`` for the line that defines the key, or nothing where it cannot be told."""
    line = find_line(path, keys)
    return "" if line is None else f":{line}"


def find_line(path: Path, keys: list[Any]) -> int | None:
    """The line (1-based) of the longest prefix of ``keys`` that stands in the TOML file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for length in range(len(keys), 0, -1):
        line = _find_exact(lines, keys[:length])
        if line is not None:
            return line
    return None


def _find_exact(lines: list[str], keys: list[Any]) -> int | None:
    section: list[Any] = []
    counts: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$", text)
        if header:
            name = header.group(2)
            section = [part.strip().strip("\"'") for part in name.split(".")]
            if header.group(1) == "[[":
                counts[name] = counts.get(name, -1) + 1
                section = [*section, counts[name]]
            elif section and section[0] in counts:
                section = [section[0], counts[section[0]], *section[1:]]
            if section == keys:
                return number
            continue
        entry = re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", text)
        if entry and [*section, *(part.strip("\"'") for part in entry.group(1).split("."))] == keys:
            return number
    return None


def known_keys(model: type[BaseModel], keys: list[Any]) -> list[str]:
    """The keys allowed in the table that ``keys`` leads to."""
    models = _models_at([model], keys)
    names: list[str] = []
    for found in models:
        names += [field.alias or name for name, field in found.model_fields.items()]
    return names


def _models_at(models: list[type[BaseModel]], keys: list[Any]) -> list[type[BaseModel]]:
    for key in keys:
        following: list[type[BaseModel]] = []
        for model in models:
            for name, field in model.model_fields.items():
                if key in (name, field.alias):
                    following += _models_in(field.annotation)
        models = following or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, list, dict):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _is_union_tag(part: Any, location: tuple[Any, ...]) -> bool:
    """Pydantic puts the tag of a discriminated union, or the class of a plain one, into the location."""
    if not isinstance(part, str):
        return False
    if part in ("cuda", "cpu", "ascend", "rockchip", "qualcomm") and "arch" in location:
        return True
    return bool(re.match(r"^(constrained-|function-|[A-Z]\w+$)|^(int|str|float|list|tuple|dict)(\[|$)", part))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
