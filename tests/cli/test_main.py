"""From exceptions to exit codes, in process."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from modelforge import errors
from modelforge.cli import main as program
from modelforge.cli.console import Console, figure, size_text


def call(monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, *argv: str) -> int:
    def run(args: object, console: Console) -> int:
        if raised is not None:
            raise raised
        console.result({"done": True}, "done")
        return 0

    module = SimpleNamespace(DESCRIPTION="d", EXAMPLE="e", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(program.importlib, "import_module", lambda name: module)
    return program.main(["targets", *argv])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.BuildError, 1),
        (errors.RecipeError, 2),
        (errors.DataError, 2),
        (errors.ModelError, 2),
        (errors.TargetError, 2),
        (errors.UnsupportedError, 2),
        (errors.AccuracyError, 3),
        (errors.ToolchainMissing, 4),
        (errors.IntegrityError, 5),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[errors.ModelForgeError], code: int
) -> None:
    assert call(monkeypatch, kind("it is wrong", where="here", fix="do this"), "--json") == code
    said = capsys.readouterr()
    assert said.err == "error: here: it is wrong\n  how to mend: do this\n"
    fault = json.loads(said.out)["error"]
    assert fault == {
        "type": kind.__name__,
        "what": "it is wrong",
        "where": "here",
        "fix": "do this",
        "exit_code": code,
    }


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, KeyboardInterrupt()) == 130
    assert "goes on from there" in capsys.readouterr().err


def test_a_bug_of_ours_has_no_traceback_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, ZeroDivisionError("oops")) == 1
    said = capsys.readouterr()
    assert "internal error: ZeroDivisionError: oops" in said.err
    assert "--debug" in said.err
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, ZeroDivisionError("oops"), "--debug")


def test_results_go_to_stdout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, None) == 0
    assert capsys.readouterr().out == "done\n"
    assert call(monkeypatch, None, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "done": True}


def test_unknown_option_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, None, "--nonsense") == 2
    assert "modelforge targets" in capsys.readouterr().err


def test_quiet_keeps_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.note("chatter")
    console.error("wrong")
    assert capsys.readouterr().err == "error: wrong\n"


def test_not_a_number_is_a_bug_and_not_a_document() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        Console(json=True).result({"x": float("nan")})


def test_sizes_and_figures() -> None:
    assert [size_text(size) for size in (0, 1023, 8475188, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "8.1 MiB",
        "5.0 GiB",
        "3072.0 GiB",
    ]
    assert figure(None) == "-"
