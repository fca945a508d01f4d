"""What makes atc refuse shapes and gears: the number of -1 against gears, ranges, separators.

Sources: hicann/ge compiler/api/aclgrph/option_utils.cc, compiler/graph/preprocess/multi_batch_options.cc; the pages
--input_shape, --dynamic_batch_size, --dynamic_image_size and --dynamic_dims of ATC's documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from modelforge.compilers.ascend.command import placeholders_in, without_placeholders
from modelforge.compilers.ascend.findings import error, fixed, warning
from modelforge.compilers.ascend.rule import Context, Remark

_OPEN = "\ufffc"  # stands for a placeholder: any digits, unknown to us
_GEARS = ("dynamic_batch_size", "dynamic_image_size", "dynamic_dims")
_TYPOGRAPHIC = "；：，“”‘’～"
_SIGN_OF = {"；": ";", "：": ":", "，": ",", "～": "~", "“": "", "”": "", "‘": "", "’": ""}


@dataclass(frozen=True)
class _Shape:
    """One input: its sizes as written, blanks trimmed; () is a scalar."""

    name: str
    sizes: tuple[str, ...]

    @property
    def dynamic(self) -> int:
        return self.sizes.count("-1")

    @property
    def is_open(self) -> bool:
        return any(_OPEN in each for each in self.sizes)


def shapes_and_gears(context: Context) -> Iterator[Remark]:
    """The shapes by themselves, then the gears against them."""
    text = context.text("input_shape")
    if "[" in text and not context.text("input_shape_range"):
        text, remarks = _without_brackets(context, text)
        yield from remarks
    remarks = list(_typography(context, text))
    yield from remarks
    if remarks:
        return
    yield from _deprecated_range(context)
    gears = [name for name in _GEARS if context.text(name)]
    if not text or context.text("input_shape_range") or re.fullmatch(_OPEN + "*", _opened(text)):
        for name in gears:
            yield from _gear_count(context, name, _gears_of(context, name))
        return
    faults = list(_malformed(text, ranges=not gears))
    yield from faults
    if faults:
        return
    if ":" not in text and not gears:
        return  # ranges by index: nothing more to hold them against
    shapes = _shapes_of(text)
    for name in gears:
        yield from _gear_count(context, name, _gears_of(context, name))
    if gears:
        yield from _against_gears(context, gears[0], shapes)
    else:
        yield from _without_gears(context, shapes)
    names = [each.name for each in shapes]
    for name in dict.fromkeys(each for each in names if names.count(each) > 1 and _OPEN not in each):
        yield Remark(warning("repeated", "input_shape", f'"{name}" has two shapes', "atc takes the first"))


def _typography(context: Context, text: str) -> Iterator[Remark]:
    found = "".join(each for each in _TYPOGRAPHIC if each in text)
    if found:
        plain = "".join(_SIGN_OF.get(each, each) for each in text)
        what = f"--input_shape holds {' '.join(found)}, which are no separators to atc"
        yield Remark(fixed("E10002", "input_shape", what, f'"{plain}"'), {"input_shape": plain})


def _without_brackets(context: Context, text: str) -> tuple[str, list[Remark]]:
    """``name:[1~8,3]``, the form of --input_shape_range: models of Ascend/ModelZoo-PyTorch for CANN 6 are converted so
    (CRNN_Dynamic, 6.0.RC1); CheckInputShapeValueValid of 8.5 and later refuses it."""
    plain = re.sub(r":\s*\[([^\[\]]*)\](?=\s*(?:;|$))", r":\1", text)
    if "[" in plain:
        return text, []
    refuses = context.cann is not None and context.cann >= (8, 5)
    what = "brackets in --input_shape belong to --input_shape_range: CANN 6 read them, 8.5 and later refuse them"
    return plain, [Remark(fixed("E10002", "input_shape", what, f'"{plain}"', refuses=refuses), {"input_shape": plain})]


def _deprecated_range(context: Context) -> Iterator[Remark]:
    text = context.text("input_shape_range")
    if not text:
        return
    shapes = _opened(text)
    parts = re.findall(r"(?:^|;)\s*([^;]+):\[([^\]]*)\]\s*(?=;|$)", shapes)
    well_formed = len(parts) == shapes.count("[") == shapes.count("]") and len(parts) == len(shapes.split(";"))
    by_index = re.fullmatch(r"\s*\[[^\]]*\](?:,\[[^\]]*\])*\s*", shapes) is not None
    if not well_formed and not by_index:
        what = "--input_shape_range is not of the form name:[1~8,3,-1];name:[…]"
        yield Remark(error("E10048", "input_shape_range", what, "give ranges in --input_shape: name:1~8,3,-1"))
        return
    for size in re.split(r"[,\]\[;]+", ",".join(sizes for _, sizes in parts)):
        if not re.fullmatch(rf"\s*(|-?[0-9{_OPEN}]+|[0-9{_OPEN}]+~[0-9{_OPEN}]+)\s*", size):
            what = f'"{size}" in --input_shape_range is neither a size nor a range'
            yield Remark(error("E10048", "input_shape_range", what, "write 1~8, -1 or a size"))
            return
    edits: dict[str, str | None] = {}
    if well_formed:
        plain = re.sub(r":\[([^\]]*)\](?=\s*(?:;|$))", r":\1", text)
        edits = {"input_shape_range": None, "input_shape": plain}
    what = "--input_shape_range is deprecated, and overrides --input_shape"
    fix = "the ranges were moved into --input_shape" if edits else "move the ranges into --input_shape"
    finding = fixed if edits else None
    if finding is not None:
        yield Remark(fixed("deprecated", "input_shape_range", what, fix, refuses=False), edits)
    else:
        yield Remark(warning("deprecated", "input_shape_range", what, fix))


def _malformed(text: str, *, ranges: bool) -> Iterator[Remark]:
    """ParseInputShape, and for ranges ParserShapeRangeByName: what stops the reading itself."""
    opened = _opened(text)
    dynamic = ranges and ("-1" in opened or "~" in opened)
    if opened.endswith(";"):
        plain = text.rstrip("; ")
        yield Remark(
            fixed("E10002", "input_shape", "a ; at the end of --input_shape", f'"{plain}"'), {"input_shape": plain}
        )
        return
    if ":" not in opened and not dynamic:
        yield Remark(error("E10002", "input_shape", "--input_shape has no name of an input", "write name:1,3,224,224"))
        return
    for part in opened.split(";"):
        name, colon, sizes = part.rpartition(":")
        shown = part.replace(_OPEN, "…")
        if not colon and ":" in opened:
            yield Remark(error("E10002", "input_shape", f'"{shown}" has no name', "write name:sizes;name:sizes"))
            return
        if colon and not name.strip():
            yield Remark(error("E10002", "input_shape", f'"{shown}" has an empty name', "write name:sizes"))
            return
        if colon and not sizes:
            continue
        for size in sizes.split(","):
            fault = _size_fault(size.strip())
            if fault is not None:
                yield Remark(
                    error(
                        fault,
                        "input_shape",
                        f'"{size.strip()}" in "{shown}" is no size',
                        "sizes are integers, separated by ,",
                    )
                )
                return


def _size_fault(size: str) -> str | None:
    if re.fullmatch(rf"-?[0-9{_OPEN}]+(~-?[0-9{_OPEN}]+)?", size):
        return "E10013" if len(size.lstrip("-")) > 19 and "~" not in size and _OPEN not in size else None
    return "E10014" if not re.match("[+-]?[0-9]", size) else "E10002"


def _without_gears(context: Context, shapes: Sequence[_Shape]) -> Iterator[Remark]:
    sizes = [(shape, size) for shape in shapes for size in shape.sizes]
    varies = any(size == "-1" or "~" in size for _, size in sizes)
    for shape, size in sizes:
        if re.fullmatch("-[0-9]+", size) and size != "-1":
            yield Remark(
                error("E10011", "input_shape", f"{size} in {shape.name}: a size is positive, or -1", "correct it")
            )
            return
        if re.fullmatch("0+", size) and not varies:
            yield Remark(error("E10011", "input_shape", f"0 in {shape.name}: a size is positive", "correct it"))
            return
        least, _, greatest = size.partition("~")
        if greatest and (least.startswith("-") or greatest.startswith("-")):
            yield Remark(error("E10048", "input_shape", f"{size} in {shape.name} is no range", "write least~greatest"))
            return
    if not varies:
        return
    if context.chip is not None and not context.chip.ranges:
        what = f"{context.chip.title} has no dynamic shapes: -1 and ranges need gears there"
        yield Remark(
            error("EZ3002", "input_shape", what, "give --dynamic_batch_size or --dynamic_dims, or fixed sizes")
        )
    else:
        what = "-1 without gears makes a graph of dynamic shape: slower, its .om is bound to one host architecture"
        yield Remark(
            warning(
                "dynamic-shape",
                "input_shape",
                what,
                "gears (--dynamic_batch_size, --dynamic_dims) run as fast as fixed sizes",
            )
        )


def _against_gears(context: Context, name: str, shapes: Sequence[_Shape]) -> Iterator[Remark]:
    if any("~" in size for shape in shapes for size in shape.sizes):
        what = f"--input_shape holds ranges (~), and --{name} takes -1 only"
        yield Remark(error("E10040", "input_shape", what, "write -1 for the sizes that the gears give"))
        return
    check = {"dynamic_batch_size": _batch, "dynamic_image_size": _image, "dynamic_dims": _dims}[name]
    yield from check(context, shapes)


def _batch(context: Context, shapes: Sequence[_Shape]) -> Iterator[Remark]:
    fix = "write -1 as the first size of each input whose batch varies, and nowhere else"
    for shape in shapes:
        if "-1" in shape.sizes[1:]:
            what = f"-1 in {shape.name} is not its first size, and --dynamic_batch_size is for that alone"
            yield Remark(error("E10018", "input_shape", what, fix + "; else use --dynamic_dims"))
            return
    if not any(shape.sizes[:1] == ("-1",) or (shape.sizes and _OPEN in shape.sizes[0]) for shape in shapes):
        what = "--dynamic_batch_size is given, and no input has -1 as its first size"
        yield Remark(error("E10031", "dynamic_batch_size", what, fix))


def _image(context: Context, shapes: Sequence[_Shape]) -> Iterator[Remark]:
    layout = context.text("input_format") or ("NHWC" if context.text("framework") == "3" else "NCHW")
    if layout not in ("NCHW", "NHWC"):
        if not placeholders_in(layout):
            what = f"--dynamic_image_size with --input_format={layout}: it is for NCHW and NHWC"
            yield Remark(error("E10003", "input_format", what, "use --input_format=NCHW, or --dynamic_dims"))
        return
    where = (2, 3) if layout == "NCHW" else (1, 2)
    for shape in shapes:
        varying = tuple(at for at, size in enumerate(shape.sizes) if size == "-1")
        if varying and not shape.is_open and (len(shape.sizes) != 4 or varying != where):
            what = f"{shape.name}: --dynamic_image_size wants 4 sizes, height and width -1 and nothing else"
            yield Remark(error("E10019", "input_shape", what, "else use --dynamic_dims"))
            return
    if not any(shape.dynamic or shape.is_open for shape in shapes):
        what = "--dynamic_image_size is given, and no input has -1 as height and width"
        yield Remark(error("E10019", "input_shape", what, "write name:1,3,-1,-1"))


def _dims(context: Context, shapes: Sequence[_Shape]) -> Iterator[Remark]:
    varying = sum(shape.dynamic for shape in shapes)
    certain = not any(shape.is_open for shape in shapes)
    if varying == 0 and certain:
        what = "--dynamic_dims is given, and --input_shape has no -1"
        yield Remark(error("E10001", "dynamic_dims", what, "write -1 for each size that the gears give"))
        return
    for gear in _gears_of(context, "dynamic_dims"):
        if len(gear) == varying or any(_OPEN in each for each in gear):
            continue
        what = f"{varying} sizes of --input_shape are -1, and the gear {','.join(gear)} gives {len(gear)}"
        if certain:
            yield Remark(
                error("E10003", "dynamic_dims", what, "give one number for each -1, in the order of --input_shape")
            )
        else:
            yield Remark(warning("not-filled-in", "dynamic_dims", what, "right only if a placeholder is -1"))
        return


def _gears_of(context: Context, name: str) -> list[tuple[str, ...]]:
    text = _opened(context.text(name))
    if name == "dynamic_batch_size":
        return [(each,) for each in text.removesuffix(",").split(",")]
    return [tuple(each.split(",")) for each in text.removesuffix(";").split(";")]


def _gear_count(context: Context, name: str, gears: Sequence[tuple[str, ...]]) -> Iterator[Remark]:
    """CheckDynamicParams; documented: 2 to 100 gears, 256 for the 950."""
    blanks = " " if name == "dynamic_image_size" else ""
    for size in (size for gear in gears for size in gear):
        if not re.fullmatch(rf"[0-9{_OPEN}]+", size.strip(blanks) if blanks else size):
            code = "E10001" if name == "dynamic_dims" else "E10003"
            what = f'"{size}" in --{name} is no number'
            yield Remark(
                error(
                    code,
                    name,
                    what,
                    "digits, separated by , inside a gear"
                    + ("" if name == "dynamic_batch_size" else " and ; between gears"),
                )
            )
            return
    bad = next((gear for gear in gears if len(gear) != 2), None) if name == "dynamic_image_size" else None
    if bad is not None and not any(_OPEN in size for size in bad):
        yield Remark(error("E10020", name, f"the gear {','.join(bad)} is not height,width", "write h,w;h,w"))
        return
    if (
        len({len(gear) for gear in gears}) > 1
        and name == "dynamic_dims"
        and not any(_OPEN in size for gear in gears for size in gear)
    ):
        yield Remark(
            error("E10037", name, "the gears have different lengths", "give each gear the same number of sizes")
        )
        return
    if any(_OPEN in size for gear in gears for size in gear):
        return
    unique = list(dict.fromkeys(tuple(int(size) for size in gear) for gear in gears))
    if len(unique) < len(gears):
        text = (";" if name != "dynamic_batch_size" else ",").join(",".join(map(str, gear)) for gear in unique)
        yield Remark(fixed("E10039", name, "a gear is given twice", f'"{text}"'), {name: text})
    most = context.chip.most_gears if context.chip is not None else 100
    if len(unique) < 2:
        yield Remark(
            error(
                "E10035", name, f"--{name} has one gear; atc wants at least 2", "give a second gear, or a fixed shape"
            )
        )
    elif len(unique) > most:
        yield Remark(
            error("E10036", name, f"--{name} has {len(unique)} gears; at most {most} are documented", "give fewer")
        )


def _shapes_of(text: str) -> list[_Shape]:
    shapes = []
    for part in _opened(text).split(";"):
        name, _, sizes = part.rpartition(":")
        shapes.append(_Shape(name.strip(), tuple(each.strip() for each in sizes.split(",")) if sizes else ()))
    return shapes


def _opened(text: str) -> str:
    return without_placeholders(text, _OPEN)
