"""The table of options, the typed object, and the way from one to argv and back."""

from __future__ import annotations

import getopt
import pickle
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelforge.compilers.ascend.arguments import read_arguments
from modelforge.compilers.ascend.option_table import installed_options, option_table, options_in_help, resolve
from modelforge.compilers.ascend.options import AtcOptions, parse, render, typed
from modelforge.errors import InputError

TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1).filter(
    lambda text: text == text.strip()
)
NASTY = st.sampled_from(
    ["--output=x", "-h", "a; rm -rf b", "$(touch x)", "`id`", "a b", "a=b", "=", "--", "'", '"', "a&&b", "x|y", ">z"]
)
VALUE = TEXT | NASTY
NAME = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters=";,"), min_size=1).filter(
    lambda text: text == text.strip()
)
SIZE = st.integers(-1, 10**6)
DIMENSION = SIZE | st.tuples(st.integers(0, 99), st.integers(100, 9999))
TYPED = {"model", "framework", "output", "soc_version"} | set(AtcOptions.__dataclass_fields__)
EXTRA = sorted(option_table().keys() - TYPED)


@st.composite
def atc_options(draw: st.DrawFn) -> AtcOptions:
    maybe = st.none() | VALUE
    width = draw(st.integers(1, 4))
    return AtcOptions(
        model=draw(st.just("") | VALUE),
        framework=draw(st.sampled_from([5, 0, -1])),
        output=draw(st.just("") | VALUE),
        soc_version=draw(st.just("") | VALUE),
        input_format=draw(maybe),
        input_shape=draw(st.dictionaries(NAME, st.lists(DIMENSION, max_size=5).map(tuple), max_size=4)),
        dynamic_batch_size=tuple(draw(st.lists(st.integers(0, 512), max_size=5))),
        dynamic_image_size=tuple(draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3))),
        dynamic_dims=tuple(draw(st.lists(st.tuples(*[st.integers(0, 99)] * width), max_size=3))),
        out_nodes=tuple(draw(st.lists(NAME, max_size=3))),
        output_type=draw(maybe),
        input_fp16_nodes=tuple(draw(st.lists(NAME, max_size=3))),
        insert_op_conf=draw(maybe),
        precision_mode=draw(maybe),
        precision_mode_v2=draw(maybe),
        op_precision_mode=draw(maybe),
        keep_dtype=draw(maybe),
        op_select_implmode=draw(maybe),
        optypelist_for_implmode=tuple(draw(st.lists(NAME, max_size=3))),
        external_weight=draw(st.none() | st.integers(0, 2)),
        host_env_os=draw(maybe),
        host_env_cpu=draw(maybe),
        log=draw(maybe),
        extra=draw(st.dictionaries(st.sampled_from(EXTRA), VALUE, max_size=4)),
    )


@settings(max_examples=150, deadline=None)
@given(atc_options())
def test_parsing_what_was_rendered_gives_it_back(options: AtcOptions) -> None:
    assert parse(render(options)) == options
    assert list(parse(render(options)).input_shape) == list(options.input_shape), "gears follow the order of the inputs"


@settings(max_examples=150, deadline=None)
@given(atc_options())
def test_no_value_becomes_an_option_or_a_word_of_its_own(options: AtcOptions) -> None:
    argv = render(options)
    assert all(re.match(r"--[a-z_0-9]+=.", word) for word in argv)
    assert not any(ord(sign) < 32 or ord(sign) == 127 for word in argv for sign in word)
    given_options = read_arguments(argv)
    assert not given_options.faults
    names = [word[2:].partition("=")[0] for word in argv]
    assert [each.name for each in given_options.given] == names, "one element, one option, the one that was meant"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("sign", ["\n", "\r", "\0", "\t", "\x1b", "\x7f", "\u2028", "\ud800"])
@pytest.mark.parametrize("where", ["model", "extra", "input_shape", "out_nodes"])
def test_control_characters_are_refused(sign: str, where: str) -> None:
    bad = f"a{sign}b"
    values = {
        "model": {"model": bad},
        "extra": {"extra": {"debug_dir": bad}},
        "input_shape": {"input_shape": {bad: (1,)}},
        "out_nodes": {"out_nodes": (bad,)},
    }
    with pytest.raises(InputError):
        AtcOptions(**values[where])  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "values",
    [
        {"input_shape": {"a;b": (1,)}},
        {"input_shape": {"": (1,)}},
        {"input_shape": {" a": (1,)}},
        {"out_nodes": ("a;b",)},
        {"optypelist_for_implmode": ("Gelu,Sigmoid",)},
        {"model": " a.onnx"},
        {"extra": {"log": "debug"}},
        {"extra": {"no_such_option": "1"}},
        {"framework": True},
    ],
)
def test_what_cannot_be_written_faithfully_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        AtcOptions(**values)  # type: ignore[arg-type]  # wrong on purpose


def test_options_are_plain_values() -> None:
    options = AtcOptions(model="m.onnx", output="m", soc_version="Ascend310P3", input_shape={"x:0": (-1, 3), "s": ()})
    assert pickle.loads(pickle.dumps(options)) == options
    assert hash(options) == hash(pickle.loads(pickle.dumps(options)))
    assert render(options) == [
        "--model=m.onnx", "--framework=5", "--output=m", "--soc_version=Ascend310P3", "--input_shape=x:0:-1,3;s:",
    ]  # fmt: skip


def test_text_that_is_not_of_its_type_stays_text() -> None:
    options = typed({"framework": "5", "input_shape": "x:${bs},3", "dynamic_dims": "1,2;3,4"})
    assert options.extra == {"input_shape": "x:${bs},3"}
    assert options.dynamic_dims == ((1, 2), (3, 4))
    assert parse(render(options)) == options


@pytest.mark.parametrize("words", [["junk"], ["--no_such=1"], ["--model"], ["--", "--model=a"], ["-x"]])
def test_parse_refuses_what_atc_stops_at(words: list[str]) -> None:
    with pytest.raises(InputError, match="atc"):
        parse(["--framework=5", *words])


SPELLINGS = [
    ["--soc_version=Ascend310P3"],
    ["--soc-version=Ascend310P3"],
    ["-soc_version=Ascend310P3"],
    ["-soc-version", "Ascend310P3"],
    ["--soc_version", "Ascend310P3"],
    ["--soc", "Ascend310P3"],
    ["--soc_v=Ascend310P3"],
    ["--soc_version=Ascend310", "--soc_version=Ascend310P3"],
]


@pytest.mark.parametrize("words", SPELLINGS)
def test_all_spellings_of_an_option_are_read(words: list[str]) -> None:
    arguments = read_arguments(words)
    assert arguments.last == {"soc_version": "Ascend310P3"}
    assert not arguments.faults


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("device", "device_id"),
        ("op_precision", "op_precision_mode"),
        ("out_node", "out_nodes"),
        ("compression_optimize", "compression_optimize_conf"),
        ("precision_mode", "precision_mode"),  # exact, although precision_mode_v2 begins so
        ("h", "help"),
        ("dynamic", None),
        ("out", None),
        ("", None),
    ],
)
def test_prefixes_as_getopt_long_takes_them(prefix: str, expected: str | None) -> None:
    assert resolve(prefix, option_table())[0] == expected


def test_a_flag_does_not_take_the_next_word_and_an_option_does() -> None:
    flag = read_arguments(["--raw_ge_options_ignore_unsupported", "true"])
    assert [fault.word for fault in flag.faults] == ["true"]
    swallowing = read_arguments(["--enable_small_channel", "--log=error"])
    assert swallowing.last == {"enable_small_channel": "--log=error"}


def test_the_table_is_consistent() -> None:
    table = option_table()
    assert len(table) == 90  # 85 DEFINE_ flags and 5 registered ones in hicann/ge at ffdcbc9f
    for spec in table.values():
        assert spec.sources, spec.name
        assert set(spec.needs) | set(spec.excludes) <= table.keys()
        assert not spec.default or not spec.values or spec.default in (*spec.values, "-1"), spec.name
        assert set(spec.values_since) <= set(spec.values)
        assert all(spec.name in table[other].excludes or other == "framework" for other in spec.excludes
                   if spec.excludes_code in ("E10009", "E10056", "E10047")), spec.name  # fmt: skip
    assert {name for name, spec in table.items() if not spec.in_help} == {
        "auto_tune_mode", "cal_conf", "device_id", "target",
    }  # fmt: skip


FRAGMENTS = [
    "--model", "--model=a", "--soc", "--out_node=x", "--log", "--dynamic", "--precision_mode", "--precision_mode_v2=",
    "--no_such", "a", "b=c", "--", "--framework=5", "--help",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=7))
def test_words_are_read_as_getopt_reads_them(words: list[str]) -> None:
    """The standard library's getopt is the other side: the same contract, written by others."""
    table = option_table()
    names = [name if spec.kind == "flag" else f"{name}=" for name, spec in table.items()]
    arguments = read_arguments(words)
    try:
        pairs, left = getopt.gnu_getopt(words, "h", names)
    except getopt.GetoptError:
        assert [fault for fault in arguments.faults if fault.code != "non-option"]
        return
    assert [(each.name, each.value) for each in arguments.given] == [(name[2:], value) for name, value in pairs]
    assert [fault.word for fault in arguments.faults] == left


HELP = """usage: atc <args>
===== Basic Functionality =====
[General]
  --h/help            Show this help message
  --mode              Run mode.
                       0: default, generate offline model;
[Input]
  --model             Model file
  --framework         Framework type. 0:Caffe; 5:Onnx
  --output            Output file
  --soc_version       The soc version.
  --dynamic_batch_size Set dynamic batch size. E.g.: "batchsize1,batchsize2"
  --brand_new_switch  Something of tomorrow; --not_an_option in a text is none
"""


def test_help_text_is_read() -> None:
    assert options_in_help(HELP) == {
        "help", "mode", "model", "framework", "output", "soc_version", "dynamic_batch_size", "brand_new_switch",
    }  # fmt: skip
    installed = installed_options(HELP)
    assert "precision_mode_v2" not in installed
    assert "auto_tune_mode" in installed, "no help lists it, the parser has it"
    assert installed["brand_new_switch"].kind == "text"
    assert installed_options("no options here") == option_table(), "a help that cannot be read forbids nothing"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(string.printable, max_size=12), max_size=6))
def test_any_words_are_read_without_an_exception(words: list[str]) -> None:
    arguments = read_arguments(words)
    assert len(arguments.given) + len(arguments.faults) <= len(words)
