"""Calls into a child process: whatever way it ends, the parent gets an answer or one clear error.

The functions that misbehave live in a module that the test writes into the child's import path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelforge.errors import BuildError, IntegrityError, ModelForgeError, UnsupportedError
from modelforge.toolchains import worker

MODULE = """
import json, os, signal, sys
from pathlib import Path
from modelforge.errors import IntegrityError, UnsupportedError

def echo(request):
    return {"got": request, "cwd": os.getcwd()}

def crash(request):
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def leave(request):
    print("vendor: fatal error, bye", flush=True)
    sys.exit(0)

def leave_hard(request):
    os._exit(0)

def half(request):
    Path("answer.json").write_text('{"result": {"a"')
    os._exit(0)

def foreign(request):
    Path("answer.json").write_text('[1, 2]')
    os._exit(0)

def answered_then_failed(request):
    Path("answer.json").write_text('{"result": {}}')
    os._exit(9)

def hang(request):
    signal.pause()

def refuse(request):
    raise UnsupportedError("no such layer", where="node 3", fix="remove it")

def distrust(request):
    raise IntegrityError("tampered with")

def throw(request):
    raise RuntimeError("the vendor says no\\nand more lines")

def throw_nothing(request):
    raise RuntimeError

def run_out(request):
    raise MemoryError("16 GB")

def forge(request):
    Path("answer.json").write_text(json.dumps({"error": {"type": "INTERRUPTED", "what": "odd"}}))
    os._exit(0)

def unserialisable(request):
    return {"path": Path("x")}

def chatter(request):
    for _ in range(2000):
        print("y" * 10000)
    return {"done": True}
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "misbehaving.py").write_text(MODULE)

    def calling(function: str, request: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        options = {"workdir": tmp_path / "work", "timeout": 120, "what": "the step"} | more
        return worker.call(f"misbehaving:{function}", request or {}, env={"PYTHONPATH": str(tmp_path)}, **options)

    return calling


def test_a_request_comes_back_and_the_child_stood_in_its_folder(call: Any, tmp_path: Path) -> None:
    request = {"text": "ä", "list": [1, 2.5, None], "nested": {"a": True}}
    answer = call("echo", request)
    assert answer["got"] == request
    assert Path(answer["cwd"]).resolve() == (tmp_path / "work").resolve()


def test_the_module_of_another_package_cannot_shadow_ours(call: Any, tmp_path: Path) -> None:
    """The child stands in its work folder, but does not import from it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "json.py").write_text("raise SystemExit('shadowed')")
    assert call("echo")["got"] == {}


def test_a_crash_names_the_signal_and_keeps_the_log(call: Any) -> None:
    with pytest.raises(BuildError, match="the step was killed by SIGSEGV and gave no answer") as caught:
        call("crash")
    assert "about to crash" in str(caught.value.fix)


@pytest.mark.parametrize("function", ["leave", "leave_hard", "half", "foreign"])
def test_exit_code_zero_without_a_whole_answer_is_no_success(call: Any, function: str) -> None:
    with pytest.raises(BuildError, match="ended with exit code 0 and gave no answer"):
        call(function)


def test_an_answer_does_not_outweigh_a_bad_exit_code(call: Any) -> None:
    with pytest.raises(BuildError) as caught:
        call("answered_then_failed")
    assert caught.value.what == "the step ended with exit code 9"


def test_an_answer_of_an_earlier_call_is_not_taken_for_this_one(call: Any) -> None:
    call("echo")
    with pytest.raises(BuildError, match="gave no answer"):
        call("leave_hard")


def test_a_hang_is_stopped(call: Any) -> None:
    with pytest.raises(BuildError, match="its time limit"):
        call("hang", timeout=1)


def test_our_errors_come_back_as_they_were(call: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        call("refuse")
    error = caught.value
    assert (error.what, error.where, error.fix) == ("the step: no such layer", "node 3", "remove it")
    assert error.exit_code == 2
    with pytest.raises(IntegrityError, match="tampered with"):
        call("distrust")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("throw", "the step: RuntimeError: the vendor says no$"),
        ("throw_nothing", "the step: RuntimeError: $"),
        ("run_out", "the step: MemoryError: 16 GB"),
        ("no_such_function", "AttributeError"),
    ],
)
def test_what_a_vendor_throws_is_one_build_error(call: Any, tmp_path: Path, function: str, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        call(function)
    assert "Traceback" in (tmp_path / "work" / "worker.log").read_text()


def test_an_error_type_that_is_none_is_a_build_error(call: Any) -> None:
    with pytest.raises(ModelForgeError, match="the step: odd") as caught:
        call("forge")
    assert type(caught.value) is BuildError


def test_a_result_that_json_cannot_hold_is_an_error(call: Any) -> None:
    with pytest.raises(BuildError, match="gave no answer") as caught:
        call("unserialisable")
    assert "not JSON serializable" in str(caught.value.fix)


def test_a_child_that_prints_much_still_answers(call: Any, tmp_path: Path) -> None:
    assert call("chatter") == {"done": True}
    assert (tmp_path / "work" / "worker.log").stat().st_size > 15_000_000
