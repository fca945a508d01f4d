"""Turns what pydantic says of a TOML file into one sentence with the file, the line, the key and the way out."""

from __future__ import annotations

import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from modelforge.errors import nearest

# Pydantic speaks of Python; the user wrote TOML.
_IN_TOML = {
    "bool_type": "should be true or false",
    "dict_type": "should be a table",
    "float_type": "should be a number",
    "int_type": "should be a whole number",
    "list_type": "should be an array",
    "model_type": "should be a table",
    "string_pattern_mismatch": "is not of the form that is allowed here",
    "string_type": "should be a string",
    "tuple_type": "should be an array",
}


def explain(
    error: ValidationError, model: type[BaseModel], path: Path, data: Mapping[str, Any]
) -> tuple[str, str, str | None]:
    """Explain the first fault of a file as (what, where, fix).

    Unknown keys come before all else: a misspelt key is also a missing one, and the misspelling is what to mend.

    Args:
        data: what ``path`` holds, as `tomllib` read it: tells keys of the file from the names that pydantic puts among
            them (the branch of a union, say).
    """
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    kind, context = fault["type"], fault.get("ctx", {})
    keys = _real_keys(fault["loc"], data, missing=kind == "missing")
    if kind.startswith("union_tag_"):
        keys.append(context["discriminator"].strip("'"))
    where = f"{path}{line_suffix(path, keys)}: {dotted_key(keys)}" if keys else str(path)
    if kind == "extra_forbidden":
        known = known_keys(model, keys[:-1], data)
        return f'unknown key "{keys[-1]}"; {nearest(str(keys[-1]), known)}', where, None
    if kind in ("missing", "union_tag_not_found"):
        return "this key is required and missing", where, f"add `{keys[-1]} = ...`"
    if kind == "union_tag_invalid":
        known = re.findall(r"'([^']+)'", context["expected_tags"])
        return f'unknown {keys[-1]} "{context["tag"]}"; {nearest(context["tag"], known)}', where, None
    message = _IN_TOML.get(kind) or fault["msg"].removeprefix("Value error, ")
    what = f"{message[:1].lower()}{message[1:]}{_shown(fault['input'])}"
    field = _field_at(model, [key for key in keys if isinstance(key, str)], data)
    return what, where, field.description if field else None


def dotted_key(keys: Sequence[str | int]) -> str:
    """``["target", 0, "tag"]`` as ``target[0].tag``."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else (f".{key}" if text else str(key))
    return text


def line_suffix(path: Path, keys: Sequence[str | int]) -> str:
    """``:12`` for the line that defines the key, or nothing where it cannot be told."""
    line = find_line(path, keys)
    return "" if line is None else f":{line}"


def find_line(path: Path, keys: Sequence[str | int]) -> int | None:
    """The line (1-based) of the longest prefix of ``keys`` that stands in the TOML file.

    Good for messages, not for editing: a line inside a multi-line string that looks like a key is taken for one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    places = list(_places(lines))
    for length in range(len(keys), 0, -1):
        for place, number in places:
            if place[:length] == list(keys[:length]):
                return number
    return None


def known_keys(model: type[BaseModel], keys: Sequence[str | int], data: Mapping[str, Any]) -> list[str]:
    """The keys allowed in the table that ``keys`` leads to."""
    return [
        field.alias or name for found in _models_at(model, keys, data) for name, field in found.model_fields.items()
    ]


def _places(lines: list[str]) -> list[tuple[list[str | int], int]]:
    """What each line defines: the full key of a table header or of an entry, and the line's number."""
    places: list[tuple[list[str | int], int]] = []
    counts: dict[str, int] = {}
    section: list[str | int] = []
    for number, text in enumerate(lines, start=1):
        header = re.match(r"\s*(\[\[?)(.+?)\]\]?\s*(?:#.*)?$", text)
        name = _split_key(header.group(2)) if header else None
        if header and name:
            first = name[0]
            if header.group(1) == "[[" and len(name) == 1:
                counts[first] = counts.get(first, -1) + 1
            section = [first, counts[first], *name[1:]] if first in counts else list(name)
            places.append((section, number))
            continue
        entry = re.match(r"\s*([^=#]+?)\s*=", text)
        key = _split_key(entry.group(1)) if entry else None
        if key:
            places.append(([*section, *key], number))
    return places


def _split_key(text: str) -> list[str] | None:
    """``a."b.c"`` as ``["a", "b.c"]``; none if this is no TOML key."""
    try:
        table: Any = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return None
    key: list[str] = []
    while isinstance(table, dict) and len(table) == 1:
        name, table = next(iter(table.items()))
        key.append(name)
    return key or None


def _real_keys(location: Sequence[str | int], data: Any, *, missing: bool) -> list[str | int]:
    """The location without the names that are not in the file; a missing key's own name stays."""
    keys: list[str | int] = []
    for index, part in enumerate(location):
        if _holds(data, part):
            keys.append(part)
            data = data[part]
        elif missing and index == len(location) - 1:
            keys.append(part)
    return keys


def _holds(data: Any, part: str | int) -> bool:
    if isinstance(data, dict):
        return part in data
    return isinstance(data, list) and isinstance(part, int) and part < len(data)


def _models_at(model: type[BaseModel], keys: Sequence[str | int], data: Any) -> list[type[BaseModel]]:
    models = [model]
    for key in keys:
        data = data[key] if _holds(data, key) else {}
        following: list[type[BaseModel]] = []
        for each in models:
            for name, field in each.model_fields.items():
                if key in (name, field.alias):
                    following += _models_in(field.annotation)
        models = [each for each in following if _is_meant(each, data)] or following or models
    return models


def _is_meant(model: type[BaseModel], data: Any) -> bool:
    """Of the branches of a union that ``kind`` tells apart, whether this is the one of the data."""
    kind = model.model_fields.get("kind")
    return kind is None or not isinstance(data, dict) or data.get("kind") in get_args(kind.annotation)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, list, dict):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _field_at(model: type[BaseModel], keys: Sequence[str], data: Mapping[str, Any]) -> FieldInfo | None:
    for found in _models_at(model, keys[:-1], data) if keys else []:
        for name, field in found.model_fields.items():
            if keys[-1] in (name, field.alias):
                return field
    return None


def _shown(value: Any) -> str:
    if isinstance(value, dict):  # a whole table says nothing that the message does not
        return ""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f" (got {text if len(text) <= 60 else text[:57] + '...'})"
