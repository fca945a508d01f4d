"""Shell text -> words: what people paste."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelforge.compilers.ascend.command import placeholders_in, read_command, shell_text, without_placeholders
from modelforge.errors import InputError

BASH = shutil.which("bash")

READS = {
    "plain": ("atc --model=a --log error", ["--model=a", "--log", "error"]),
    "quotes": ("""atc --a="x y;z" --b='$p;"q"' --c=x\\ y""", ["--a=x y;z", '--b=$p;"q"', "--c=x y"]),
    "escapes in double quotes": (r'atc --a="\"q\" \\ \n"', [r'--a="q" \ \n']),
    "continued": ("atc --a=1 \\\n   --b=2 \\\n--c=3", ["--a=1", "--b=2", "--c=3"]),
    "continued without a blank glues": ("atc --a=1\\\n--b=2", ["--a=1--b=2"]),
    "continued inside quotes": ('atc --a="1;\\\n2"', ["--a=1;2"]),
    "carriage returns": ("atc --a=1 \\\r\n  --b=2\r\n", ["--a=1", "--b=2"]),
    "ends at the line": ("atc --a=1\necho done", ["--a=1"]),
    "comment": ("atc --a=1 # --b=2", ["--a=1"]),
    "no comment inside a word": ("atc --a=x#y", ["--a=x#y"]),
    "environment": ("A=1 B='2 3' atc --a=1", ["--a=1"]),
    "path of the program": ("/usr/local/Ascend/latest/bin/atc --a=1", ["--a=1"]),
    "quoted variable path": ('"$HOME/bin/atc" --a=1', ["--a=1"]),
    "chain": ("cd out && source /x/atc/set_env.sh; atc --a=1 && ls", ["--a=1"]),
    "wrapper": ("nohup time atc --a=1 &", ["--a=1"]),
    "module": ("python3 -m ge.pyatc --a=1", ["--a=1"]),
    "pipe": ("atc --a=1 2>&1 | tee log.txt", ["--a=1"]),
    "redirections": ("atc --a=1 >1.txt 2>/dev/null --b=2 &>x < in", ["--a=1", "--b=2"]),
    "a variable before a redirection": ("atc --soc_version=$1>after.log", ["--soc_version=$1"]),
    "subshell": ("(cd x && atc --a=1)", ["--a=1"]),
    "substitution": ("atc --a=$(pwd)/x --b=`pwd`/y", ["--a=$(pwd)/x", "--b=`pwd`/y"]),
    "placeholders": (
        "atc --a=Ascend${chip name} --b=<soc> --c={bs}",
        ["--a=Ascend${chip name}", "--b=<soc>", "--c={bs}"],
    ),
    "Markdown escapes": (r"atc --soc\_version=$\{soc\_version\}", ["--soc_version=${soc_version}"]),
    "inline code": ("`atc --a=1`", ["--a=1"]),
    "fenced": ("```bash\natc --a=1\n```", ["--a=1"]),
    "prompt": ("(base) [root@host dir]# atc --a=1", ["--a=1"]),
    "dollar prompt": ("$ atc --a=1", ["--a=1"]),
    "arguments alone": ("--a=1 --b", ["--a=1", "--b"]),
}


@pytest.mark.parametrize("name", READS)
def test_reads(name: str) -> None:
    text, words = READS[name]
    line = read_command(text)
    assert list(line.words) == words
    assert not [each for each in line.findings if each.refuses]


FOUND = {
    "continuation": ("atc --a=1\\ \n  --b=2", ["--a=1", "--b=2"], False),
    "trailing-backslash": ("atc --a=1 \\", ["--a=1"], False),
    "several-commands": ("atc --a=1; atc --a=2", ["--a=1"], False),
    "non-option": ("atc --a=1 \\\n```", ["--a=1"], True),
    "shell-syntax": ("atc --a=Ascend310`", ["--a=Ascend310"], True),
    "shell-syntax: the end of a string in a script": ('atc --a=1"', ["--a=1"], True),
    "shell-syntax: the end of a quoted line": ("atc --a=1 '", ["--a=1"], True),
    "shell-syntax: quote": ('atc --a="1;2', ["--a=1;2"], True),
    "shell-syntax: parenthesis": ("atc --a=x:(1,2)", ["--a=x:(1,2"], True),
    "not-filled-in": ("atc --soc_version=<soc version>", ["--soc_version=<soc version>"], True),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_a_shell_stumbles_over_is_found(name: str) -> None:
    text, words, refuses = FOUND[name]
    line = read_command(text)
    assert [(each.code, each.refuses) for each in line.findings] == [(name.partition(":")[0], refuses)]
    assert list(line.words) == words


@pytest.mark.parametrize("text", ["", "   ", "echo hello", "cat atc", "cd atc && ls"])
def test_text_without_atc_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no atc command"):
        read_command(text)


WORDS = st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r")), max_size=6)


@settings(max_examples=200, deadline=None)
@given(WORDS)
def test_what_a_shell_was_given_is_what_is_read(words: list[str]) -> None:
    """shlex.join is the other side: independent of our reader."""
    line = read_command(shlex.join(["atc", "--model=a", *words]))
    assert list(line.words) == ["--model=a", *words]


def read_by_bash(text: str, folder: Path) -> list[str] | None:
    """The words that a real shell gives a program called atc; None where it gives none, or gives it more than once."""
    told = folder / "words"
    told.write_bytes(b"")
    script = 'atc() { printf "%s\\0" "$@" >&9; printf "\\n\\0" >&9; }\n' + text
    with told.open("wb") as stream:
        command = ["bash", "-c", f"exec 9>&{stream.fileno()}\n{script}"]
        subprocess.run(
            command,
            env={"PATH": ""},
            pass_fds=[stream.fileno()],
            cwd=folder,
            capture_output=True,
            check=False,
            executable=BASH,
        )
    words = told.read_bytes().decode().split("\0")[:-1]
    return words[:-1] if words.count("\n") == 1 and words[-1] == "\n" else None


FOR_BASH = (
    "quotes", "escapes in double quotes", "continued", "continued without a blank glues", "continued inside quotes",
    "ends at the line", "comment", "no comment inside a word", "environment", "pipe", "subshell",
)  # fmt: skip


@pytest.mark.parametrize("name", FOR_BASH)
def test_a_shell_reads_it_alike(name: str, tmp_path: Path) -> None:
    text, words = READS[name]
    (tmp_path / "x").mkdir()
    assert read_by_bash(text, tmp_path) == words


PARTS = ["--a=", "b", "'", '"', "\\", " ", "\n", "#", "\\\n", "1,2;", '\\"', "x y", "=", "-"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PARTS), max_size=14))
def test_any_text_is_read_as_a_shell_reads_it(tmp_path: Path, parts: list[str]) -> None:
    text = "atc --m=1 " + "".join(parts)
    expected = read_by_bash(text, tmp_path)
    if expected is None or re.search(r"\\[ \t]*(\n|\Z)", re.sub(r"\\\n", "", text)):
        return  # no words for atc, or a backslash at the end, which we read as it was meant
    line = read_command(text)
    if not line.findings:
        assert list(line.words) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    read_command("atc --a=1 " + text)


@pytest.mark.parametrize(
    ("value", "holes"),
    [
        ("Ascend${chip_name}", ("${chip_name}",)),
        ("${run_model[i]}", ("${run_model[i]}",)),
        ("$1", ("$1",)),
        ("Ascend{$chip}", ("{$chip}",)),
        ("<soc_version>", ("<soc_version>",)),
        ("bs_$｛bs｝", ("$｛bs｝",)),
        ("x:{},3", ("{}",)),
        ("{args.batch}", ("{args.batch}",)),
        ("x:%d,3", ("%d",)),
        ("Ascendxxx", ("xxx",)),
        ("Ascend***", ("***",)),
        ("x:1,3", ()),
        ("a{b", ()),
        ("3<4", ()),
    ],
)
def test_placeholders(value: str, holes: tuple[str, ...]) -> None:
    assert placeholders_in(value) == holes
    assert placeholders_in(without_placeholders(value, "0")) == ()


def test_the_corrected_line_keeps_variables_and_quotes_the_rest() -> None:
    text = shell_text(
        ["atc", "--input_shape=x:${bs},3;y:1", "--soc_version=Ascend${chip}", "--out_nodes=a;b", "--log=error"]
    )
    assert text == "atc \"--input_shape=x:${bs},3;y:1\" --soc_version=Ascend${chip} '--out_nodes=a;b' --log=error"
    assert read_command(text).words[0] == "--input_shape=x:${bs},3;y:1"
