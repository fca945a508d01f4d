"""Would atc take it? Real command lines, and each rule of its documents and sources."""

from __future__ import annotations

import json
import shlex
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelforge.compilers.ascend.check import Verdict, check
from modelforge.compilers.ascend.command import placeholders_in
from modelforge.compilers.ascend.options import AtcOptions, parse, render
from modelforge.errors import InputError

DATA = Path(__file__).parents[2] / "data" / "ascend"
COMMANDS = [json.loads(line) for line in (DATA / "commands.jsonl").read_text(encoding="utf-8").splitlines()]
REFUSED = tomllib.loads((DATA / "verdicts.toml").read_text(encoding="utf-8"))

BASE = "atc --model=m.onnx --framework=5 --output=m --soc_version=Ascend310P3"


@pytest.mark.parametrize("line", range(1, len(COMMANDS) + 1))
def test_verdict_of_a_real_command_line(line: int) -> None:
    verdict = check(COMMANDS[line - 1]["command"])
    expected = REFUSED.get(str(line))
    assert verdict.accepted == (expected is None), [each for each in verdict.findings if each.refuses]
    if expected is None:
        assert verdict.reason is None
        return
    assert verdict.reason is not None
    assert verdict.reason.code == expected["code"]
    assert verdict.reason.option == expected.get("option")
    assert {*expected.get("also", ())} <= {each.option for each in verdict.findings if each.refuses}


@pytest.mark.parametrize("line", range(1, len(COMMANDS) + 1))
def test_what_was_corrected_is_accepted_and_stays_as_it_is(line: int) -> None:
    verdict = check(COMMANDS[line - 1]["command"])
    if any(each.level == "error" for each in verdict.findings):
        return
    again = check(verdict.argv)
    assert again.accepted
    assert again.argv == verdict.argv
    assert not [each for each in again.findings if each.level == "fixed"]


# Options after BASE (a later one of the same name counts), the code, the option: all refused.
WRONG = {
    # the parser: api/atc/cmd_flag_info.cc
    "junk word": ("junk", "non-option", None),
    "unknown": ("--no_such_option=1", "unknown-flag", None),
    "ambiguous prefix": ("--dynamic=1,2", "unknown-flag", None),
    "no value": ("--log", "missing-argument", "log"),
    "swallows the next": ("--enable_small_channel --insert_op_conf=a.cfg", "swallowed", "enable_small_channel"),
    "blank after =": ("--log= error", "non-option", "log"),
    "typographic dash": ("—log=error", "non-option", None),
    "flag with a word": ("--raw_ge_options=a.json --raw_ge_options_ignore_unsupported true", "non-option", None),
    # values: kStrValueRange and the checks of option_utils.cc
    "typo in a value": ("--op_select_implmode=high_preformance", "E10001", "op_select_implmode"),
    "value of none": ("--precision_mode=fp16", "E10001", "precision_mode"),
    "v2 value": ("--precision_mode_v2=force_fp16", "E10001", "precision_mode_v2"),
    "log": ("--log=warn", "E10010", "log"),
    "not 0 or 1": ("--sparsity=2", "E10006", "sparsity"),
    "not true or false": ("--enable_single_stream=1", "E10005", "enable_single_stream"),
    "framework": ("--framework=4", "E10007", "framework"),
    "no integer": ("--op_debug_level=one", "E10001", "op_debug_level"),
    "empty choice": ("--buffer_optimize=", "E10001", "buffer_optimize"),
    "host": ("--host_env_os=windows", "E10001", "host_env_os"),
    "tuning": ("--auto_tune_mode=GA", "E10001", "auto_tune_mode"),
    "output type": ("--output_type=FLOAT", "E10001", "output_type"),
    "output type of a node": ("--output_type=a:FP16 --out_nodes=a:0", "E10001", "output_type"),
    "output type without its node": ("--output_type=a:0:FP16 --out_nodes=b:0", "E10001", "output_type"),
    "mixed output nodes": ("'--out_nodes=a:0;b'", "E10001", "out_nodes"),
    "index of an output": ("--out_nodes=a:b", "E10001", "out_nodes"),
    "semicolon after output nodes": ("'--out_nodes=a:0;b:0;'", "E10001", "out_nodes"),
    # formats: main_impl.cc CheckInputFormat
    "NHWC": ("--input_format=NHWC", "E10001", "input_format"),
    "lower case": ("--input_format=nchw", "E10001", "input_format"),
    # shapes: ParseInputShape
    "no name": ("--input_shape=1,3,224,224", "E10002", "input_shape"),
    "zero": ("--input_shape=x:0,3", "E10011", "input_shape"),
    "negative": ("--input_shape=x:-2,3", "E10011", "input_shape"),
    "float": ("--input_shape=x:1.5,3", "E10002", "input_shape"),
    "word": ("--input_shape=x:a,3", "E10014", "input_shape"),
    "missing size": ("--input_shape=x:1,,3", "E10014", "input_shape"),
    "semicolon at the end": ("'--input_shape=x:1,3;'", "E10002", "input_shape"),
    "too large": ("--input_shape=x:99999999999999999999", "E10013", "input_shape"),
    "empty name": ("'--input_shape=x:1;:2'", "E10002", "input_shape"),
    "full-width separators": ("--input_shape=x：1，3", "E10002", "input_shape"),
    "typographic quotes": ("--input_shape=“x:1,3”", "E10002", "input_shape"),
    "range with gears": ("--input_shape=x:1~8,3 --dynamic_batch_size=1,2", "E10040", "input_shape"),
    "range backwards": ("--input_shape=x:1~-1,3", "E10048", "input_shape"),
    "dynamic shape on 310B": ("--input_shape=x:-1,3 --soc_version=Ascend310B1", "EZ3002", "input_shape"),
    "old range form": ("--input_shape_range=x:1~8,3", "E10048", "input_shape_range"),
    # gears
    "gears without shape": ("--dynamic_batch_size=1,2", "E10004", "dynamic_batch_size"),
    "two kinds of gears": (
        "--input_shape=x:-1,3 --dynamic_batch_size=1,2 '--dynamic_dims=1;2'",
        "E10009",
        "dynamic_batch_size",
    ),
    "gears and range": ("--input_shape_range=x:[1~2,3] --dynamic_batch_size=1,2", "E10009", "input_shape_range"),
    "no -1 in N": ("--input_shape=x:4,3 --dynamic_batch_size=1,2", "E10031", "dynamic_batch_size"),
    "-1 beside N": ("--input_shape=x:-1,-1 --dynamic_batch_size=1,2", "E10018", "input_shape"),
    "batch no number": ("--input_shape=x:-1,3 --dynamic_batch_size=1.5,2", "E10003", "dynamic_batch_size"),
    "one gear": ("--input_shape=x:-1,3 --dynamic_batch_size=4", "E10035", "dynamic_batch_size"),
    "one gear of dims": ("--input_shape=x:-1,3 --dynamic_dims=4", "E10035", "dynamic_dims"),
    "101 gears": (
        f"--input_shape=x:-1,3 --dynamic_batch_size={','.join(map(str, range(1, 102)))}",
        "E10036",
        "dynamic_batch_size",
    ),
    "gear twice": ("--input_shape=x:-1,3 --dynamic_batch_size=1,2,2", "E10039", "dynamic_batch_size"),
    "more -1 than dims": ("--input_shape=x:-1,-1 '--dynamic_dims=1;2'", "E10003", "dynamic_dims"),
    "fewer -1 than dims": ("--input_shape=x:-1,3 '--dynamic_dims=1,2;2,3'", "E10003", "dynamic_dims"),
    "uneven dims": ("--input_shape=x:-1,-1 '--dynamic_dims=1,2;3'", "E10037", "dynamic_dims"),
    "dims without -1": ("--input_shape=x:1,3 '--dynamic_dims=1;2'", "E10001", "dynamic_dims"),
    "dims no number": ("--input_shape=x:-1,3 '--dynamic_dims=1;a'", "E10001", "dynamic_dims"),
    "image sizes of three": (
        "--input_shape=x:1,3,-1,-1 '--dynamic_image_size=1,2,3;4,5,6'",
        "E10020",
        "dynamic_image_size",
    ),
    "image with -1 in N": ("--input_shape=x:-1,3,-1,-1 '--dynamic_image_size=1,2;3,4'", "E10019", "input_shape"),
    "image in ND": (
        "--input_shape=x:1,3,-1,-1 --input_format=ND '--dynamic_image_size=1,2;3,4'",
        "E10003",
        "input_format",
    ),
    "hint with gears": (
        "--input_shape=x:-1,3 --dynamic_batch_size=1,2 --input_hint_shape=0:[1,3]",
        "E10001",
        "input_hint_shape",
    ),
    "AIPP with dims": ("--insert_op_conf=a --input_shape=x:-1,3 '--dynamic_dims=1;2'", "E10001", "insert_op_conf"),
    # what belongs together
    "two precisions": ("--precision_mode=force_fp16 --precision_mode_v2=fp16", "E10056", "precision_mode"),
    "mix list without mixed mode": ("--modify_mixlist=a.json", "E10001", "modify_mixlist"),
    "operator list without mode": ("--optypelist_for_implmode=Gelu", "E10001", "optypelist_for_implmode"),
    "two compressions": ("--enable_compress_weight=true --compress_weight_conf=a", "E10047", "enable_compress_weight"),
    "level without switch": ("--deterministic_level=2", "E10001", "deterministic_level"),
    "Caffe without weights": ("--framework=0", "E10008", "weight"),
    "mode 30 elsewhere": ("--mode=30", "E10055", "mode"),
    "mode 6 with framework": ("--mode=6 --om=a.om", "E10057", "om"),
    # paths
    "folder": ("--output=out/", "E10022", "output"),
    "signs in a path": ("'--model=a b.onnx'", "E10001", "model"),
    "empty soc": ("--soc_version=", "E10054", "soc_version"),
    # chips
    "910B without a digit": ("--soc_version=Ascend910B", "soc-version", "soc_version"),
    "family": ("--soc_version=Ascend310P", "soc-version", "soc_version"),
    "without Ascend": ("--soc_version=310P3", "soc-version", "soc_version"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_atc_refuses(name: str) -> None:
    words, code, option = WRONG[name]
    verdict = check(f"{BASE} {words}")
    assert not verdict.accepted
    found = [(each.code, each.option) for each in verdict.findings if each.refuses]
    assert (code, option) in found
    assert all(each.fix for each in verdict.findings), "each says what to do"


RIGHT = [
    "",
    "--input_shape=x:1,3,224,224 --input_format=NCHW",
    "'--input_shape=a:0:1,3;b:' --input_format=ND",
    "'--input_shape=x:1, 3, 224;y: 1'",
    "--input_shape=x:-1,3 --dynamic_batch_size=1,2,4,",
    "'--input_shape=x:-1,3;y:2' '--dynamic_dims=1;2;'",
    "'--input_shape=x:1,3,-1,-1' '--dynamic_image_size=112,112;224, 224'",
    "--input_shape=x:-1,3 --soc_version=Ascend950PR_9589 --dynamic_batch_size=" + ",".join(map(str, range(1, 200))),
    "--input_shape=x:1~8,-1,3",
    "'--input_shape=-1,3;2,1~4'",
    "--input_shape_range='x:[1~8,3,-1];y:[]'",
    "--out_nodes='a:0;b:1' --output_type='a:0:FP16;b:1:FP32'",
    "--out_nodes='o1;o2' --output_type=FP16",
    "--precision_mode=allow_mix_precision --modify_mixlist=a.json",
    "--precision_mode_v2=mixed_float16 --keep_dtype=k.cfg",
    "--op_select_implmode=high_precision --optypelist_for_implmode=Gelu,Sigmoid",
    "--enable_compress_weight=false --compress_weight_conf=a",
    "--deterministic=1 --deterministic_level=2",
    "--insert_op_conf=a.cfg --enable_small_channel=1 --buffer_optimize=off_optimize",
    "--framework 3 --model m.pb --input_format=NHWC",
    "--framework=0 --model=m.prototxt --weight=m.caffemodel",
    "--soc_version=Ascend310 -log=error --device 0",
    "--model=./模型/m.onnx --external_weight=1 --host_env_os=linux --host_env_cpu=aarch64",
    "${common_arguments}",
    "--soc_version=xxx",
    "--framework=3 --input_shape=x:1,-1,-1,3 '--dynamic_image_size=1,2;3,4'",
    "--input_shape=${shape} --dynamic_batch_size=${gears}",
    "--input_shape='x:${n},-1' '--dynamic_dims=1;2'",
    "--precision_mode=${mode} --log={level}",
]


@pytest.mark.parametrize("words", RIGHT)
def test_what_atc_takes(words: str) -> None:
    verdict = check(f"{BASE} {words}")
    assert verdict.accepted, [each for each in verdict.findings if each.refuses]


@pytest.mark.parametrize("words", ["--help", "-h", "--mode=6 --om=a.om", "--mode=1 --om=a.om --json=a.json",
                                   "--singleop=a.json --output=o --soc_version=Ascend310P3"])  # fmt: skip
def test_other_uses_of_atc(words: str) -> None:
    assert check(f"atc {words}").accepted


@pytest.mark.parametrize(
    ("missing", "code"), [("model", "E10054"), ("output", "E10054"), ("soc_version", "E10054"), ("framework", "E10007")]
)
def test_required_options(missing: str, code: str) -> None:
    words = [word for word in shlex.split(BASE)[1:] if not word.startswith(f"--{missing}")]
    verdict = check(words)
    assert verdict.reason is not None
    assert (verdict.reason.code, verdict.reason.option) == (code, missing)


CORRECTED = {
    f"{BASE} --input_format=NHWC": {"input_format": "ND"},
    f"{BASE} --input_format=NHWC --insert_op_conf=a": {"input_format": "NCHW"},
    f"{BASE} --auto_tune_mode=RL,GA": {"auto_tune_mode": None},
    f"{BASE} --op_select_implmode=high_preformance": {"op_select_implmode": "high_performance"},
    f"{BASE} --buffer_optimize=l2_buffer_optimize": {"buffer_optimize": "l2_optimize"},
    f"{BASE} --output=m.om": {"output": "m"},
    f"{BASE} --soc_version=310P3": {"soc_version": "Ascend310P3"},
    f"{BASE} --input_shape_range='x:[1~2,3];y:[-1]'": {"input_shape_range": None, "input_shape": "x:1~2,3;y:-1"},
    f"{BASE} --input_shape='x:[1~2,3]'": {"input_shape": "x:1~2,3"},
    f"{BASE} --input_shape=x：1，3": {"input_shape": "x:1,3"},
    f"{BASE} --dynamic_batch_size=1,1,2 --input_shape=x:-1": {"dynamic_batch_size": "1,2"},
    f"{BASE} --log= error": {"log": "error"},
    f"{BASE} --input_shapes=x:1,3": {"input_shape": "x:1,3"},
    f"{BASE} --weight=w.bin": {"weight": None},
    "atc --model=a.onnx --output=m --soc_version=Ascend310P3": {"framework": "5"},
}


@pytest.mark.parametrize("text", CORRECTED)
def test_corrections(text: str) -> None:
    verdict = check(text)
    corrected = {word[2:].partition("=")[0]: word.partition("=")[2] for word in verdict.argv}
    for name, value in CORRECTED[text].items():
        assert corrected.get(name) == value
    assert check(verdict.argv).accepted


def test_releases() -> None:
    tuned = f"{BASE} --auto_tune_mode=RL,GA"
    assert check(tuned, cann="5.0.4").accepted
    assert not check(tuned, cann="8.2.RC1").accepted
    external = f"{BASE} --external_weight=2"
    assert check(external, cann="9.0.0").accepted
    assert not check(external, cann="8.5.0").accepted
    level = f"{BASE} --deterministic=1 --deterministic_level=1"
    assert not check(level, cann="8.5.0-beta.1").accepted
    assert check(level, cann="9.0.0").accepted
    assert check(f"{BASE} --soc_version=Ascend310", cann="7.0.0").accepted
    assert not check(f"{BASE} --soc_version=Ascend310", cann="9.0.0").accepted
    brackets = f"{BASE} --input_shape='x:[1~8,3]'"
    assert check(brackets, cann="6.0.RC1").accepted
    assert not check(brackets, cann="8.5.0").accepted
    with pytest.raises(InputError, match="no CANN version"):
        check(BASE, cann="newest")


HELP = "\n".join(f"  --{name}   text" for name in ("model", "framework", "output", "soc_version", "tomorrow"))


def test_the_installed_atc_decides() -> None:
    assert check(BASE, help_text=HELP).accepted
    refused = check(f"{BASE} --precision_mode_v2=fp16", help_text=HELP)
    assert refused.reason is not None
    assert refused.reason.code == "unknown-flag"
    assert "installed" in refused.reason.what
    assert check(f"{BASE} --tomorrow=1", help_text=HELP).accepted
    assert not check(f"{BASE} --tomorrow=1").accepted


def test_the_first_reason_is_what_stops_atc_first() -> None:
    verdict = check(f"{BASE} --log=loud junk --input_format=NHWC")
    assert verdict.reason is not None
    assert verdict.reason.code == "non-option"
    assert len([each for each in verdict.findings if each.refuses]) == 3, "and the others are told too"


def test_placeholders_are_told_and_satisfy_any_type() -> None:
    verdict = check(f"{BASE} --soc_version=Ascend${{chip}} --log=$level --input_shape=x:{{bs}},3")
    assert verdict.accepted
    assert {each.option for each in verdict.findings if each.code == "not-filled-in"} == {
        "soc_version",
        "log",
        "input_shape",
    }


def test_a_typed_object_is_checked_by_its_rendering() -> None:
    options = AtcOptions(
        model="m.onnx", output="m", soc_version="Ascend310P3", input_shape={"x": (-1, 3)}, dynamic_batch_size=(1, 2, 4)
    )
    verdict = check(render(options))
    assert verdict.accepted
    assert verdict.options == options == parse(verdict.argv)


LITERAL = [
    each["command"] for each in COMMANDS if not placeholders_in(each["command"]) and check(each["command"]).accepted
]
SPELL = {
    "apart": lambda name, value: [f"--{name}", value],
    "together": lambda name, value: [f"--{name}={value}"],
    "hyphens": lambda name, value: [f"--{name.replace('_', '-')}={value}"],
    "single dash": lambda name, value: [f"-{name}", value],
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LITERAL), st.lists(st.sampled_from(sorted(SPELL)), min_size=12, max_size=12), st.randoms())
def test_spelling_and_order_change_nothing(text: str, spellings: list[str], random: st.random.Random) -> None:  # type: ignore[name-defined]  # hypothesis's own
    before: Verdict = check(text)
    pairs = list(before.given.items())
    random.shuffle(pairs)
    words = [word for at, (name, value) in enumerate(pairs) for word in SPELL[spellings[at % 12]](name, value)]
    after = check("atc " + shlex.join(words))
    assert after.given == before.given
    assert after.accepted
    assert after.options == before.options


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *"abc123",
                "--input_shape=",
                "--dynamic_dims=",
                "x:",
                "-1",
                "~",
                "[",
                "]",
                ";",
                ",",
                "${n}",
                " ",
                "'",
                "--",
                "=",
            ]
        ),
        max_size=25,
    )
)
def test_any_line_gets_a_verdict(parts: list[str]) -> None:
    verdict = check("atc " + "".join(parts))
    assert verdict.accepted == (verdict.reason is None)
