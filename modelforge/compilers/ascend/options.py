"""The options of one atc run as a typed, frozen value; its rendering as argv, and the way back.

`render` never makes a shell string: each argv element is `--name=value`, so no value can become an option or a command.
`parse(render(options)) == options` for every value that can be made.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from modelforge.compilers.ascend.arguments import read_arguments
from modelforge.compilers.ascend.option_table import option_table
from modelforge.errors import InputError, nearest

Dimension = int | tuple[int, int]
"""A size, -1 for one that varies, or (least, greatest) for a range."""


@dataclass(frozen=True)
class AtcOptions:
    """What one run of atc is told. Fields are named as the options; None, "" and empty mean "not given".

    Attributes:
        input_shape: input name -> dimensions, in the order of the command line (gears follow it); () is a scalar.
        dynamic_image_size: (height, width) of each gear.
        dynamic_dims: one number for each -1 of ``input_shape``, for each gear.
        out_nodes: ``node:index`` each, or names of ONNX outputs each.
        extra: any other known option by its name, as text; also a typed one whose text is not of its type (a
            placeholder, the form of ``input_shape`` without names).

    Raises:
        InputError: a value that cannot stand in a command line: control characters, blanks at its ends, a separator
            inside a name, an unknown option in ``extra``.
    """

    model: str = ""
    framework: int = 5
    output: str = ""
    soc_version: str = ""
    input_format: str | None = None
    input_shape: Mapping[str, tuple[Dimension, ...]] = field(default_factory=dict)
    dynamic_batch_size: tuple[int, ...] = ()
    dynamic_image_size: tuple[tuple[int, int], ...] = ()
    dynamic_dims: tuple[tuple[int, ...], ...] = ()
    out_nodes: tuple[str, ...] = ()
    output_type: str | None = None
    input_fp16_nodes: tuple[str, ...] = ()
    insert_op_conf: str | None = None
    precision_mode: str | None = None
    precision_mode_v2: str | None = None
    op_precision_mode: str | None = None
    keep_dtype: str | None = None
    op_select_implmode: str | None = None
    optypelist_for_implmode: tuple[str, ...] = ()
    external_weight: int | None = None
    host_env_os: str | None = None
    host_env_cpu: str | None = None
    log: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", dict(self.input_shape))
        object.__setattr__(self, "extra", dict(self.extra))
        for name, text in _texts(self):
            _check_text(name, text)
        for name, codec in _CODECS.items():
            value = getattr(self, name)
            if not _is_unset(value) and _decoded(codec, codec.encode(value)) != value:
                raise InputError(
                    f"{value!r} cannot be written so that atc reads it back the same",
                    where=f"--{name}",
                    fix="names must not hold ; or ends that are blank, and must not be empty",
                )
        for name, text in self.extra.items():
            _check_extra(self, name, text)

    def __hash__(self) -> int:
        return hash(tuple(render(self)))


def render(options: AtcOptions) -> list[str]:
    """The arguments for atc (without the program), one ``--name=value`` each. Never join them into a shell string."""
    return [f"--{name}={text}" for name, text in _texts(options)]


def parse(argv: Sequence[str]) -> AtcOptions:
    """The typed options of an argv (without the program), read as atc reads it; the last of repeated options counts.

    Raises:
        InputError: a word that atc's parser stops at, or a value that no command line can hold.
    """
    arguments = read_arguments(argv)
    if arguments.faults:
        fault = arguments.faults[0]
        raise InputError(fault.what, where=f"atc … {fault.word}", fix='`modelforge ascend check "atc …"` explains it')
    return typed(arguments.last)


def typed(given: Mapping[str, str]) -> AtcOptions:
    """Options from texts by name; a text that is not of its field's type stays text, in ``extra``."""
    values: dict[str, Any] = {"framework": -1} if "framework" not in given else {}
    extra: dict[str, str] = {}
    for name, text in given.items():
        codec = _CODECS.get(name)
        value = _decoded(codec, text) if codec is not None else None
        if codec is None or value is None:
            extra[name] = text
        else:
            values[name] = value
    if "framework" in extra:
        values["framework"] = -1
    return AtcOptions(**values, extra=extra)


@dataclass(frozen=True)
class _Codec:
    """How one field is written in the command line. ``decode`` raises ValueError for what is not of the type."""

    encode: Callable[[Any], str]
    decode: Callable[[str], Any]


def _decoded(codec: _Codec, text: str) -> Any:
    """The value of ``text``, or None if writing it again would not give ``text`` back."""
    try:
        value = codec.decode(text)
    except ValueError:
        return None
    return value if not _is_unset(value) and codec.encode(value) == text else None


def _number(text: str) -> int:
    if not re.fullmatch(r"0|-?[1-9][0-9]*", text, flags=re.ASCII):
        raise ValueError(text)
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_number(each) for each in text.split(","))


def _pair(text: str) -> tuple[int, int]:
    height, width = _numbers(text)
    return height, width


def _words(separator: str) -> _Codec:
    def decode(text: str) -> tuple[str, ...]:
        parts = tuple(text.split(separator))
        if any(not part or part != part.strip() for part in parts):
            raise ValueError(text)
        return parts

    return _Codec(separator.join, decode)


def _dimension(text: str) -> Dimension:
    least, tilde, greatest = text.partition("~")
    return (_number(least), _number(greatest)) if tilde else _number(least)


def _dimension_text(dimension: Dimension) -> str:
    return str(dimension) if isinstance(dimension, int) else "~".join(map(str, dimension))


def _shapes(text: str) -> dict[str, tuple[Dimension, ...]]:
    shapes: dict[str, tuple[Dimension, ...]] = {}
    for part in text.split(";"):
        name, colon, sizes = part.rpartition(":")  # atc splits at the last colon: names may hold some
        if not colon or not name or name != name.strip() or name in shapes:
            raise ValueError(text)
        shapes[name] = tuple(_dimension(each) for each in sizes.split(",")) if sizes else ()
    return shapes


def _shapes_text(shapes: Mapping[str, tuple[Dimension, ...]]) -> str:
    return ";".join(f"{name}:{','.join(map(_dimension_text, sizes))}" for name, sizes in shapes.items())


def _rows_text(rows: Sequence[Sequence[int]]) -> str:
    return ";".join(",".join(map(str, row)) for row in rows)


_TEXT = _Codec(str, str)
_INTEGER = _Codec(str, _number)
_CODECS: dict[str, _Codec] = {
    **{each.name: _TEXT for each in fields(AtcOptions) if each.name != "extra"},
    "framework": _INTEGER,
    "external_weight": _INTEGER,
    "input_shape": _Codec(_shapes_text, _shapes),
    "dynamic_batch_size": _Codec(lambda sizes: ",".join(map(str, sizes)), _numbers),
    "dynamic_image_size": _Codec(_rows_text, lambda text: tuple(_pair(row) for row in text.split(";"))),
    "dynamic_dims": _Codec(_rows_text, lambda text: tuple(_numbers(row) for row in text.split(";"))),
    "out_nodes": _words(";"),
    "input_fp16_nodes": _words(";"),
    "optypelist_for_implmode": _words(","),
}


def _texts(options: AtcOptions) -> list[tuple[str, str]]:
    """(name, text) of all that is given, in the order of the fields, then extra's."""
    texts = []
    for name, codec in _CODECS.items():
        value = getattr(options, name)
        if not _is_unset(value) and not (name == "framework" and value == -1):
            texts.append((name, codec.encode(value)))
    return texts + list(options.extra.items())


def _is_unset(value: object) -> bool:
    return value is None or (not value and not isinstance(value, int))


def _check_text(name: str, text: str) -> None:
    if any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in text):
        raise InputError("the value holds a control character or a line break", where=f"--{name}", fix="remove it")
    if text != text.strip():
        # atc's documentation: a value that begins with a blank is cut off.
        raise InputError(f"the value {text!r} begins or ends with a blank", where=f"--{name}", fix="remove it")


def _check_extra(options: AtcOptions, name: str, text: str) -> None:
    if name not in option_table():
        raise InputError(f"atc has no option --{name}; {nearest(name, option_table())}", where="extra")
    codec = _CODECS.get(name)
    if codec is None:
        return
    taken = not _is_unset(getattr(options, name)) and not (name == "framework" and options.framework == -1)
    if taken or _decoded(codec, text) is not None:
        raise InputError(f"--{name} has a field of its own", where="extra", fix=f"AtcOptions({name}=…)")
