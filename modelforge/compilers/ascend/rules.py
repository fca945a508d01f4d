"""What makes atc refuse a set of options, as a list of small rules; shapes and gears are in shape_rules.py.

Each rule yields remarks: a finding, and what the corrected line has instead. Sources are named at the rules; paths are
those of hicann/ge. Values with placeholders in them satisfy any type.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from modelforge.compilers.ascend.command import placeholders_in, without_placeholders
from modelforge.compilers.ascend.findings import Finding, error, fixed, warning
from modelforge.compilers.ascend.limits import CHIPS, Chip, Version, chip_of, spell
from modelforge.compilers.ascend.option_table import OptionSpec
from modelforge.compilers.ascend.rule import Context, Remark, Rule
from modelforge.errors import UnsupportedError

# Words that are no chip to any ATC, and Ascend910B, which is one, but seldom the one that is meant.
_FAMILIES = (
    "Ascend", "Ascend310P", "Ascend310B", "Ascend910B", "Ascend910_93", "Ascend950", "Ascend950PR", "Ascend950DT",
)  # fmt: skip


def required(context: Context) -> Iterator[Remark]:
    """api/atc/main_impl.cc: CheckWeightAndFrameWork, IsRequiredParameterExists."""
    if context.may_hold_more:
        return
    if context.compiles and not context.text("framework"):
        if context.text("model").endswith(".onnx"):
            yield Remark(
                fixed(
                    "E10007",
                    "framework",
                    "--framework is missing, and atc has no default for it",
                    "--framework=5: ONNX",
                ),
                {"framework": "5"},
            )
        else:
            yield Remark(error("E10007", "framework", "--framework is missing", "give --framework=5 for an ONNX model"))
    examples = {
        "soc_version": "give the exact chip, for example --soc_version=Ascend310P3",
        "output": "give a path without .om, for example --output=model",
        "model": "give the ONNX file, --model=model.onnx",
        "om": "give the .om file",
        "json": "give the JSON file to write",
    }
    for name in _required_names(context):
        if not context.text(name):
            code = "E10054" if name not in ("om", "json") else "E10004"
            yield Remark(error(code, name, f"--{name} is missing", examples[name]))


def _required_names(context: Context) -> tuple[str, ...]:
    if context.text("singleop"):
        return ("output", "soc_version")
    return {
        "1": ("om", "json"), "5": ("om", "json"), "6": ("om",), "3": ("soc_version", "model"),
    }.get(context.mode, ("soc_version", "output", "model"))  # fmt: skip


def values(context: Context) -> Iterator[Remark]:
    """kStrValueRange of api/atc/cmd_flag_info.cc, and the checks of compiler/api/aclgrph/option_utils.cc."""
    for name, text in context.given.items():
        spec = context.table[name]
        if context.is_open(name):
            yield Remark(_not_filled_in(name, text))
        elif spec.kind in ("choice", "integer", "flag", "booleans") or name in ("host_env_os", "host_env_cpu"):
            yield from _value(spec, text, context)


def _value(spec: OptionSpec, text: str, context: Context) -> Iterator[Remark]:
    if spec.kind == "integer":
        if not re.fullmatch("-?[0-9]+", text):
            yield Remark(
                error("E10003", spec.name, f'--{spec.name}="{text}" is no integer', f"for example {spec.default}")
            )
        return
    if spec.kind == "flag":
        if text.lower() not in ("", "1", "t", "true", "y", "yes", "0", "f", "false", "n", "no"):
            yield Remark(
                error("E10003", spec.name, f'--{spec.name}="{text}" is neither true nor false', "true or false")
            )
        return
    parts = [each.strip() for each in text.split(",")] if spec.kind == "booleans" else [text]
    allowed = spec.values or ("true", "false")
    for part in parts:
        since = spec.values_since.get(part)
        if part not in allowed:
            yield _wrong_value(spec, part, allowed)
        elif since is not None and context.cann is not None and context.cann < _release(since):
            code, listed = spec.code, ", ".join(each for each in allowed if each not in spec.values_since)
            what = f"--{spec.name}={part} came with CANN {since}"
            yield Remark(error(code, spec.name, what, f"with CANN {spell(context.cann)} it may be {listed}"))


def _wrong_value(spec: OptionSpec, text: str, allowed: tuple[str, ...]) -> Remark:
    what = f'"{text}" is not a value of --{spec.name}' if text else f"--{spec.name} has no value"
    listed = ", ".join(allowed)
    meant = next((each for each in allowed if each.lower() == text.strip().lower()), None)
    close = [meant] if meant else difflib.get_close_matches(text, allowed, n=1, cutoff=0.75)
    if close and spec.kind == "choice":
        return Remark(
            fixed(spec.code, spec.name, f"{what}; it may be {listed}", f"--{spec.name}={close[0]}"),
            {spec.name: close[0]},
        )
    return Remark(error(spec.code, spec.name, what, f"it may be {listed}"))


def input_format(context: Context) -> Iterator[Remark]:
    """api/atc/main_impl.cc CheckInputFormat; the pages --input_format and --dynamic_image_size."""
    text = context.text("input_format")
    if not text or context.is_open("input_format"):
        return
    allowed = {"5": ("NCHW", "ND", "NCDHW"), "0": ("NCHW", "ND"), "3": ("NCHW", "NHWC", "ND", "NCDHW", "NDHWC")}.get(
        context.text("framework") or "5"
    )
    if allowed is not None and text not in allowed:
        images = bool(context.text("insert_op_conf") or context.text("dynamic_image_size"))
        instead = text.upper() if text.upper() in allowed else ("NCHW" if images else "ND")
        what = f"--input_format={text}: for this framework atc takes {', '.join(allowed)} only"
        note = "" if instead == text.upper() else "; an ONNX model keeps the layout it was exported with"
        yield Remark(
            fixed("E10001", "input_format", what, f"--input_format={instead}{note}"), {"input_format": instead}
        )
    elif text not in ("NCHW", "NHWC") and context.text("insert_op_conf"):
        what = f"--input_format={text} with AIPP: the documents allow NCHW and NHWC only"
        yield Remark(warning("documented", "input_format", what, "use --input_format=NCHW"))


def soc_version(context: Context) -> Iterator[Remark]:
    """Names of chips: limits.py. atc's parser takes any word; the platform files decide later."""
    name = "soc_version"
    text = context.text(name)
    if not text or context.is_open(name):
        return
    if context.chip is not None:
        yield from _chip_limits(context, context.chip)
        return
    prefixed = next((each for each in ("Ascend" + text, "Ascend" + text[6:]) if _is_chip(each)), None)
    if prefixed is not None:
        yield Remark(
            fixed("soc-version", name, f'"{text}" is no name of a chip', f"--soc_version={prefixed}"), {name: prefixed}
        )
        return
    try:
        chip_of(text)
    except UnsupportedError as fault:
        if text in _FAMILIES or not re.match(r"[A-Z]", text):
            yield Remark(error("soc-version", name, fault.what, fault.fix or ""))
        else:
            # Ascend910 and Ascend710 of old CANN, HiSilicon's own names (SS928: OPTG): other ATCs know them.
            yield Remark(warning("soc-version", name, f'"{text}" is none of the chips that we know', fault.fix or ""))


def _chip_limits(context: Context, chip: Chip) -> Iterator[Remark]:
    if context.cann is not None and chip.until is not None and context.cann > chip.until:
        what = f"{chip.title} is in no CANN after {spell(chip.until)}"
        yield Remark(error("soc-version", "soc_version", what, f"use CANN {spell(chip.until)} or older"))
    if context.cann is not None and chip.since is not None and context.cann < chip.since:
        what = f"the oldest documents with {chip.title} that were read are those of CANN {spell(chip.since)}"
        yield Remark(warning("soc-version", "soc_version", what, f"use CANN {spell(chip.since)} or newer"))
    for name in context.given:
        if chip.image in context.table[name].not_on:
            what = f"--{name} is documented as not for {chip.title}"
            yield Remark(warning("documented", name, what, "leave it out"))


def exclusions(context: Context) -> Iterator[Remark]:
    told: set[frozenset[str]] = set()
    for name in context.given:
        spec = context.table[name]
        for other in spec.excludes:
            pair = frozenset((name, other))
            if not context.text(name) or not context.text(other) or pair in told:
                continue
            told.add(pair)
            if (
                pair == {"enable_compress_weight", "compress_weight_conf"}
                and context.text("enable_compress_weight") != "true"
            ):
                continue
            what = f"--{name} and --{other} cannot stand together"
            fix = {
                "E10056": "keep --precision_mode_v2 if your CANN has it",
                "E10009": "keep the one that fits: batch sizes, image sizes, or any dimensions (--dynamic_dims)",
            }.get(spec.excludes_code or "", f"leave out --{name} or --{other}")
            yield Remark(error(spec.excludes_code or "E10001", name, what, fix))


def needs(context: Context) -> Iterator[Remark]:
    for name, text in context.given.items():
        spec = context.table[name]
        for other in spec.needs:
            if not text or context.text(other) or context.may_hold_more:
                continue
            if other == "input_shape" and context.text("input_shape_range"):
                continue  # told as an exclusion
            what = f"--{name} needs --{other}"
            if spec.needs_code is not None:
                yield Remark(error(spec.needs_code, name, what, f"give --{other}"))
            else:
                yield Remark(warning("documented", name, f"{what} to have an effect", f"give --{other}"))


def precision(context: Context) -> Iterator[Remark]:
    """CheckModifyMixlistParamValid; the pages --keep_dtype, --op_select_implmode."""
    mixed = ("allow_mix_precision", "allow_mix_precision_fp16", "allow_mix_precision_bf16", "mixed_float16")
    modes = [context.text("precision_mode"), context.text("precision_mode_v2")]
    open_modes = context.is_open("precision_mode") or context.is_open("precision_mode_v2")
    if context.text("modify_mixlist") and not open_modes and not {*modes} & {*mixed, "mixed_bfloat16", "mixed_hif8"}:
        what = "--modify_mixlist needs a mixed precision mode"
        yield Remark(error("E10001", "modify_mixlist", what, "give --precision_mode_v2=mixed_float16"))
    if context.text("keep_dtype") and {*modes} & {"must_keep_origin_dtype", "origin"}:
        what = "--keep_dtype has no effect when the whole graph keeps its types"
        yield Remark(warning("documented", "keep_dtype", what, "leave it out"))


def deterministic(context: Context) -> Iterator[Remark]:
    """CheckDeterministicConfig."""
    level, switch = context.text("deterministic_level"), context.text("deterministic") or "0"
    known = level and not context.is_open("deterministic") and not context.is_open("deterministic_level")
    if known and (level == "0") != (switch == "0"):
        what = f"--deterministic={switch} with --deterministic_level={level}: both 0 or both not"
        yield Remark(error("E10001", "deterministic_level", what, "give --deterministic=1 with level 1, 2 or 3"))


def paths(context: Context) -> Iterator[Remark]:
    """base/common/util.cc IsPathCharsValid; main_impl.cc CheckPathWithName."""
    for name in ("model", "output"):
        text = without_placeholders(context.text(name), "x").partition("{")[0]
        odd = sorted(set(re.findall(r"[^\w./-]|[^\x00-\x7f\u4e00-\u9fa5]", text, flags=re.ASCII) if text else []))
        odd = [each for each in odd if not "\u4e00" <= each <= "\u9fa5"]
        if odd:
            signs = " ".join(map(repr, odd))
            what = f"--{name}: a path may hold letters, digits, . _ - / and Chinese characters, not {signs}"
            yield Remark(error("E10001", name, what, "rename it"))
    output = context.text("output")
    if output.endswith(("/", "\\")):
        yield Remark(
            error("E10022", "output", "--output names a folder, not a file", f"for example --output={output}model")
        )
    elif output.endswith(".om") and context.mode == "0" and not context.text("singleop"):
        what = f"atc always appends .om: this writes {output}.om"
        yield Remark(fixed("suffix", "output", what, f"--output={output[:-3]}", refuses=False), {"output": output[:-3]})


def outputs(context: Context) -> Iterator[Remark]:
    """api/atc/omg.cc ParseOutNodes, ParseOutputType; the page --output_type."""
    nodes = context.text("out_nodes")
    if nodes and context.text("framework") in ("5", "0", "") and not context.is_open("out_nodes"):
        yield from _out_nodes(nodes)
    text = context.text("output_type")
    if not text or context.is_open("output_type"):
        return
    named = [each.split(":") for each in text.split(";")] if ":" in text else []
    for parts in named:
        if len(parts) != 3 or not parts[1].isdigit():
            what = f'"{":".join(parts)}" is not of the form node:index:TYPE'
            yield Remark(error("E10001", "output_type", what, "--output_type=node:0:FP16, or one type for all outputs"))
            return
        if not context.is_open("out_nodes") and ":".join(parts[:2]) not in nodes.split(";"):
            what = f"{':'.join(parts[:2])} of --output_type is not in --out_nodes"
            yield Remark(error("E10001", "output_type", what, f"add it: --out_nodes={':'.join(parts[:2])}"))
    for dtype in [each[2] for each in named] or [text]:
        if dtype not in context.table["output_type"].values:
            yield _wrong_value(context.table["output_type"], dtype, context.table["output_type"].values)
        elif dtype not in ("FP32", "FP16", "UINT8", "INT8", "HIF8", "HIF4", "FP8E5M2", "FP8E4M3FN"):
            what = f"{dtype} is documented, but no source of atc that was read takes it (E10001 there)"
            yield Remark(warning("documented", "output_type", what, "use FP32, FP16, UINT8 or INT8"))


def _out_nodes(nodes: str) -> Iterator[Remark]:
    parts = nodes.split(";")
    if parts[-1] == "" and len(parts) > 1:
        text = nodes.rstrip(";")
        yield Remark(
            fixed("E10001", "out_nodes", "a ; at the end of --out_nodes", f"--out_nodes={text}"), {"out_nodes": text}
        )
        parts = text.split(";")
    forms = {len(each.split(":")) for each in parts}
    bad = next(
        (
            each
            for each in parts
            if len(each.split(":")) > 2 or (":" in each and not each.split(":")[1].strip().isdigit())
        ),
        None,
    )
    if bad is not None:
        yield Remark(
            error("E10001", "out_nodes", f'"{bad}" is not of the form node:index', "for example Conv_1:0;Conv_2:0")
        )
    elif forms == {1, 2}:
        what = "--out_nodes mixes node:index with names of outputs"
        yield Remark(error("E10001", "out_nodes", what, "use one of the two forms"))


def frameworks(context: Context) -> Iterator[Remark]:
    """CheckWeightAndFrameWork, CheckSocVersionAndRunmode, CheckAndRunSingleOp of api/atc/main_impl.cc."""
    framework = context.text("framework")
    if framework == "0" and context.compiles and not context.text("weight") and not context.may_hold_more:
        yield Remark(error("E10008", "weight", "a Caffe model needs --weight", "give the .caffemodel"))
    if framework in ("1", "3", "5") and context.text("weight"):
        yield Remark(
            fixed("ignored", "weight", "--weight is for Caffe only; atc ignores it here", "left out", refuses=False),
            {"weight": None},
        )
    if framework in ("0", "1", "3"):
        what = f"framework {framework} is not ONNX: atc takes it, ModelForge builds ONNX models only"
        yield Remark(warning("not-onnx", "framework", what, "export the model as ONNX"))
    small = context.text("soc_version") in ("Ascend035", "Ascend035A", "Ascend035B")
    if (
        "soc_version" in context.given
        and not context.is_open("soc_version")
        and small != (context.mode == "30")
        and context.compiles
    ):
        what = "--mode=30 and --soc_version=Ascend035, Ascend035A or Ascend035B belong together"
        yield Remark(error("E10055", "mode", what, "--mode=0 for every other chip"))
    if context.mode == "6" and framework:
        yield Remark(error("E10057", "om", "--mode=6 takes --om alone", "leave out --framework"))
    if context.text("singleop") and context.mode != "0":
        yield Remark(error("E10001", "singleop", "--singleop is for --mode=0 only", "leave out --mode"))


def deprecated(context: Context) -> Iterator[Remark]:
    for name, text in context.given.items():
        if name == "auto_tune_mode" and text:
            yield _auto_tune(context, text)
        elif context.table[name].deprecated and name != "input_shape_range":  # that one: shape_rules
            instead = context.table[name].replaced_by
            yield Remark(warning("deprecated", name, f"--{name} is deprecated", f"use --{instead}"))


def _auto_tune(context: Context, text: str) -> Remark:
    """CheckDeprecatedAutoTuneMode: E10001 in every source from 8.5.0 on; CANN 5.0's documents still had it."""
    if context.cann is not None and context.cann < (5, 1):
        what = f"--auto_tune_mode={text} works in CANN 5.0 only, and needs an NPU in the machine"
        return Remark(warning("deprecated", "auto_tune_mode", what, "newer CANN: tune with the aoe command"))
    return Remark(
        fixed(
            "E10001",
            "auto_tune_mode",
            f"--auto_tune_mode={text}: tuning was taken out of atc (it worked in CANN 5.0)",
            "left out; tune with the aoe command and give what it wrote by --op_bank_path and --mdl_bank_path",
        ),
        {"auto_tune_mode": None},
    )


def versions(context: Context) -> Iterator[Remark]:
    if context.cann is None:
        return
    for name in context.given:
        spec = context.table[name]
        if context.cann >= _release(spec.since):
            continue
        if spec.since_exact:
            what = f"--{name} came with CANN {spec.since}; CANN {spell(context.cann)} does not know it"
            yield Remark(error("unknown-flag", name, what, "leave it out, or use a newer CANN"))
        else:
            seen, asked = spec.since, spell(context.cann)
            what = f"--{name} was seen from CANN {seen} on; whether CANN {asked} has it was not verified"
            yield Remark(warning("version", name, what, "look at `atc --help`"))


def _not_filled_in(name: str, text: str) -> Finding:
    holes = ", ".join(dict.fromkeys(placeholders_in(text)))
    return warning("not-filled-in", name, f"--{name} is not filled in: {holes}", "its value was not checked")


def _is_chip(name: str) -> bool:
    return any(re.fullmatch(each.pattern, name) for each in CHIPS)


def _release(text: str) -> Version:
    return tuple(int(each) for each in text.split("."))


RULES: tuple[Rule, ...] = (
    required, values, input_format, soc_version, exclusions, needs, precision, deterministic, paths, outputs,
    frameworks, deprecated, versions,
)  # fmt: skip
