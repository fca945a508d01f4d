"""Writing HTML where everything is escaped that was not made here, and numbers, sizes and names as people read them.

Knows nothing of bundles. What comes from outside goes through :func:`text`, also in attributes: markup cannot get in.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NONE = "–"
LONGEST = 240
"""Characters of one piece of text from outside; more is cut out of its middle."""

_EMPTY_TAGS = frozenset({"meta", "link", "rect", "line", "path", "circle", "br"})


class Html(str):
    """Markup that was made here, and is not escaped again."""

    __slots__ = ()


Child = str | float | int | None | Iterable["Child"]
Attribute = str | float | int | None


def element(tag: str, *children: Child, **attributes: Attribute) -> Html:
    """An element. Strings among the children are escaped, :class:`Html` is not, None is left out.

    Attribute names lose a final underscore, the others become hyphens: ``class_``, ``data_key``.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _EMPTY_TAGS and not children:
        return Html(f"<{tag}{written}/>" if tag not in ("meta", "link", "br") else f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Html:
    return Html("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, str | int | float):
        return text(child)
    return join(child)


def text(value: str | float) -> Html:
    """Escaped for text and for quoted attributes; shortened; :class:`Html` as it is."""
    if isinstance(value, Html):
        return value
    if isinstance(value, str):
        return Html(html.escape(shortened(printable(value)), quote=True))
    return Html(coordinate(value) if isinstance(value, float) else str(value))


def printable(value: str) -> str:
    """With what does not print made visible: control characters, what turns the direction of text, lone surrogates."""
    if value.isprintable():
        return value
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "backslashreplace").decode()
        for character in value
    )


def shortened(value: str, limit: int = LONGEST) -> str:
    if len(value) <= limit:
        return value
    half = limit // 2 - 1
    return f"{value[:half]} … {value[-half:]}"


def coordinate(value: float) -> str:
    """A position in a drawing: a tenth is finer than a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def number(value: float | None, digits: int = 4) -> str:
    """``0.9800``; in powers of ten where that would be long, or nothing but zeros."""
    if value is None:
        return NONE
    if value and (abs(value) >= 1e6 or abs(value) < 0.5 * 10**-digits):
        return f"{value:.2e}"
    return f"{value:.{digits}f}"


def significant(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def percent(share: float | None) -> str:
    """``0.02 %``; a share above zero never reads as zero, one below all never as all."""
    if share is None:
        return NONE
    if 0 < share < 0.00005:
        return "< 0.01 %"
    if 0.99995 <= share < 1:
        return "> 99.99 %"
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + " %"


def cosine_text(value: float | None) -> str:
    """``0.999123``; what is near 1 by its distance, so that it never reads as 1."""
    if value is None or not 0.999995 < value < 1:
        return number(value, 6)
    return f"1 − {1 - value:.1e}"


def decibels(value: float | None, *, identical: bool = False) -> str:
    return "identical" if identical else NONE if value is None else f"{number(value, 1)} dB"


def milliseconds(value: float | None) -> str:
    """``8.24 ms``; what is less than one with three significant digits."""
    if value is None:
        return NONE
    return f"{value:.3g} ms" if 0 < value < 1 else f"{number(value, 2)} ms"


def rate(per_second: float | None, unit: str = "B") -> str:
    """``10 MB/s``, in powers of 1000 as links are sold."""
    if per_second is None or not math.isfinite(per_second):
        return NONE
    return f"{scaled(per_second, ' ')}{unit}/s"


def scaled(value: float, space: str = "") -> str:
    """Three significant digits with ``k``, ``M``, ``G`` or ``T``."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g}{space}{prefix}"


def bytes_text(size: float) -> str:
    """``8475188`` as ``8.1 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# -- tables


@dataclass(frozen=True)
class Cell:
    """A table's cell: what it shows, and the number that it is sorted by (None: it has none, and stands last)."""

    content: Child
    key: float | None


@dataclass(frozen=True)
class Drawing:
    """A table's cell that only draws what another says in figures: nothing to sort by."""

    svg: Html


Row = Sequence[Child | Cell | Drawing]


def figure_cell(value: float | None, shown: str) -> Cell:
    return Cell(shown, value if value is not None and math.isfinite(value) else None)


def table(caption: str, columns: Sequence[str], rows: Sequence[Row]) -> Html:
    """A sortable table in a box that scrolls by itself, never the page. The first column names the row."""
    head = element("tr", [_heading(name, [row[at] for row in rows]) for at, name in enumerate(columns)])
    body = [element("tr", [_cell(cell, first=not at) for at, cell in enumerate(row)]) for row in rows]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", head),
            element("tbody", body),
            data_sortable="",
        ),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )


def _heading(name: str, cells: Sequence[Child | Cell | Drawing]) -> Html:
    if any(isinstance(cell, Drawing) for cell in cells):
        return element("th", name, scope="col", data_unsorted="")
    return element("th", name, scope="col", class_="n" if any(isinstance(cell, Cell) for cell in cells) else None)


def _cell(cell: Child | Cell | Drawing, *, first: bool) -> Html:
    if isinstance(cell, Drawing):
        return element("td", cell.svg, class_="drawing")
    if isinstance(cell, Cell):
        return element("td", cell.content, class_="n", data_key="" if cell.key is None else repr(float(cell.key)))
    return element("th", cell, scope="row") if first else element("td", cell)


def facts(rows: Iterable[tuple[str, Child]]) -> Html:
    """A list of names with their values; values of None are left out."""
    return element(
        "dl",
        [element("div", element("dt", name), element("dd", value)) for name, value in rows if value is not None],
        class_="facts",
    )


def folded(title: Child, *children: Child, open_: bool = False) -> Html:
    """A part that is opened by its title."""
    return element("details", element("summary", title), *children, open="" if open_ else None)


def badge(word: str, kind: str | None = None) -> Html:
    """A word in a coloured pill; the colour never says more than the word."""
    return element("span", word, class_=f"badge {kind or _KINDS.get(word, 'plain')}")


_KINDS = {
    "compiled": "good", "passed": "good", "device": "good", "emulator": "good", "deferred": "warn", "skipped": "warn",
    "overridden": "warn", "failed": "bad",
}  # fmt: skip


# -- what several parts of a page share


@dataclass(frozen=True)
class Limits:
    """How many rows of each kind a page shows; what is left out is said."""

    layers: int
    histograms: int
    rows: int


def digest(value: str) -> Html:
    return element("code", value, class_="digest")


def headed(title: str, *children: Child) -> Html:
    return element("section", element("h4", title), *children)


def left_out(count: int, noun: str, which: str = "") -> Html | None:
    if count <= 0:
        return None
    return element("p", f"{plural(count, noun)} {which}".rstrip() + " not shown; `--json` has all.", class_="soft")


def verdict_kind(gate: str | None) -> str:
    """The class of a bar by its gate."""
    return {"passed": "ok", "failed": "not-ok"}.get(gate or "", "unknown")


def drop_text(drop: float | None) -> str:
    """A drop as people say it: ``-0.0020`` of the metric, ``+0.0005`` where the variant is better."""
    if drop is None:
        return number(None)
    return "±0" if not drop else f"{'−' if drop > 0 else '+'}{number(abs(drop))}"
