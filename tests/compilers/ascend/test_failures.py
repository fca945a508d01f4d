"""Logs of failed runs: real ones, the wordings of CANN 5 to 9, and what lies behind a generic code."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelforge.compilers.ascend.failures import class_of, diagnose

DATA = Path(__file__).parents[2] / "data" / "ascend"
LOGS = [json.loads(line) for line in (DATA / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
EXPECTED = tomllib.loads((DATA / "diagnoses.toml").read_text(encoding="utf-8"))
EXAMPLES = {code: kind for kind, codes in EXPECTED["examples"].items() for code in codes.split()}


def expected_of(line: int) -> tuple[str | None, str, list[Any]]:
    entry = LOGS[line - 1]
    if entry["kind"] == "official example":
        code = entry["log"].partition(":")[0]
        return code, EXAMPLES[code], []
    row = EXPECTED["observed"][str(line)]
    return row.get("code"), row["class"], row.get("ops", [])


@pytest.mark.parametrize("line", range(1, len(LOGS) + 1))
def test_diagnosis_of_a_real_log(line: int) -> None:
    code, kind, ops = expected_of(line)
    diagnosis = diagnose(LOGS[line - 1]["log"])
    assert diagnosis is not None
    assert (diagnosis.code, diagnosis.failure_class) == (code, kind)
    assert diagnosis.cause
    assert diagnosis.fix
    assert diagnosis.message
    if ops:
        assert [[op.name or "", op.type, op.opset or 0] for op in diagnosis.ops] == ops


@pytest.mark.parametrize("line", [line for line in range(1, len(LOGS) + 1) if expected_of(line)[0]])
def test_other_wordings_of_the_same_log(line: int) -> None:
    """CANN 8.1 and later put process and time behind the code; older ones put values in brackets; both streams mix."""
    log = LOGS[line - 1]["log"]
    code, kind, _ = expected_of(line)
    stamped = log.replace(f"{code}:", f"{code}: [PID: 200452] 2025-06-16-13:02:36.801.136", 1)
    around = (
        f"ATC start working now, please wait for a moment.\n...\nATC run failed, Please check the detail log{stamped}\n"
    )
    for text in (stamped, around, around + "E19999: Inner Error!\n        TraceBack (most recent call last):\n"):
        diagnosis = diagnose(text)
        assert diagnosis is not None
        assert (diagnosis.code, diagnosis.failure_class) == (code, kind)


CASES = {
    "glued to the line before": (
        "for more informationEZ3003: No supported Ops kernel and engine are found for [a], optype [B].",
        "EZ3003",
        "unsupported-op",
        [("a", "B", None)],
    ),
    "import before the kernel that failed for it": (
        "E40021: Failed to compile Op [Index2]. (oppath: [x.py failed: ModuleNotFoundError: No module named 'tbe'])\n"
        "EC0010: [PID: 7] 2025-01-02-03:04:05.000.001 Failed to import Python module [No module named 'scipy'].",
        "EC0010",
        "environment",
        [("Index2", None, None)],
    ),
    "import behind a kernel without its code": (
        "E40021: Failed to compile Op [Index2]. (optype: [Index])\nModuleNotFoundError: No module named 'decorator'",
        "E40021",
        "environment",
        [("Index2", "Index", None)],
    ),
    "kernel of a gear": (
        "E20001: [PID: 2] 2025-06-16-13:02:36.801.136 "
        "Failed to compile Op [/l/Slice_ascend_mbatch_batch_5]. (optype: [StridedSliceD])",
        "E20001",
        "unsupported-op",
        [("/l/Slice_ascend_mbatch_batch_5", "StridedSliceD", None)],
    ),
    "the argument before the internal error": (
        "E19999: Inner Error!\nE10016: Opname [input] specified in [--input_shape] is not found in the model",
        "E10016",
        "usage",
        [],
    ),
    "only internal": (
        "EZ9999: Inner Error!\nEZ9999: [PID: 1] 2024 op[Grid75], runParams is null.",
        "EZ9999",
        "internal",
        [("Grid75", None, None)],
    ),
    "internal, but the operator package is another": (
        "E19999: Internal Error\nE19999 The opp version of the model does not match the current opp run package",
        "E19999",
        "environment",
        [],
    ),
    "atc's parser": (
        "ERROR: unknown command line flag 'foo'\nATC run failed\nE19999: Internal Error!",
        "E19999",
        "usage",
        [],
    ),
    "a word too many": ("ERROR: Non-option parameter: x\nATC run failed", None, "usage", []),
    "chip": (
        "EZ3002: Optype [Conv2D] of Ops kernel [AIcoreEngine] is unsupported. Reason: dtype",
        "EZ3002",
        "unsupported-op",
        [(None, "Conv2D", None)],
    ),
    "parser of CANN 9": (
        "EZ9010: No parser is registered for Op [C, optype [ai.onnx::11::Convx]].",
        "EZ9010",
        "unsupported-op",
        [("C", "Convx", 11)],
    ),
    "parser without a name": (
        "E76002: No ONNX parser is registered for optype [ai.onnx::20::Gelu].",
        "E76002",
        "unsupported-op",
        [(None, "Gelu", 20)],
    ),
    "compile result": (
        "E22001: Compilation result for operator a not found. Optype is B.",
        "E22001",
        "unsupported-op",
        [],
    ),
    "runtime": ("EE1001: The argument is invalid.Reason: rtSetDevice", "EE1001", "environment", []),
    "runtime memory": (
        "EE1013: Failed to allocate 5 bytes of host memory via malloc to Runtime.",
        "EE1013",
        "resource",
        [],
    ),
    "driver": ("EL0004: Failed to allocate memory requested by GE module.", "EL0004", "resource", []),
    "disk": ("E13004: Failed to write file /o. Reason: [Error 28] No space left on device.", "E13004", "resource", []),
    "killed": (
        "ATC start working now\n...\nrun.sh: line 7: 257060 Killed                  atc --model=a",
        None,
        "resource",
        [],
    ),
    "bad_alloc": ("terminate called after throwing an instance of 'std::bad_alloc'", None, "resource", []),
    "crash": ("line 7: 2570 Segmentation fault      (core dumped) atc", None, "internal", []),
    "loader": (
        "atc.bin: error while loading shared libraries: libge_runner.so: cannot open shared object file",
        None,
        "environment",
        [],
    ),
    "no atc": ("bash: atc: command not found", None, "environment", []),
    "NumPy 2": ("AttributeError: `np.float_` was removed in the NumPy 2.0 release.", None, "environment", []),
    "number": ("aclgrphBuildModel failed, error code is 145000", "145000", "usage", []),
    "a code of tomorrow": ("E10099: something new is wrong with an option", "E10099", "usage", []),
    "a warning alone": ("ATC run failed\nW11001: Op [x] does not hit the library", "W11001", "unsupported-op", []),
    "nothing": ("ATC start working now, please wait for a moment.", None, "internal", []),
}


@pytest.mark.parametrize("name", CASES)
def test_root_cause(name: str) -> None:
    log, code, kind, ops = CASES[name]
    diagnosis = diagnose(log)
    assert diagnosis is not None
    assert (diagnosis.code, diagnosis.failure_class) == (code, kind)
    assert [(op.name, op.type, op.opset) for op in diagnosis.ops] == ops


@pytest.mark.parametrize(
    ("exit_code", "kind"),
    [(-9, "resource"), (137, "resource"), (-11, "internal"), (139, "internal"), (127, "environment"), (1, "internal")],
)
def test_a_run_that_printed_nothing(exit_code: int, kind: str) -> None:
    diagnosis = diagnose("ATC start working now, please wait for a moment.\n", exit_code=exit_code)
    assert diagnosis is not None
    assert (diagnosis.code, diagnosis.failure_class) == (None, kind)


def test_success_is_no_failure() -> None:
    log = "ATC start working now\nATC run success, welcome to the next use.\nW11001: Op [x] does not hit the library"
    assert diagnose(log) is None
    assert diagnose(log, exit_code=0) is None
    assert diagnose(log, exit_code=1) is not None, "the line alone does not make a success"


def test_message_is_without_code_process_and_time() -> None:
    diagnosis = diagnose("E10007: [PID: 10490] 2025-03-18-09:02:18.501.341 [--framework] is required.\n")
    assert diagnosis is not None
    assert diagnosis.message == "[--framework] is required."
    assert not diagnosis.worth_a_retry


def test_all_codes_are_listed_once_in_order() -> None:
    diagnosis = diagnose("E19999: a\nE40021: b\nEC0010: c\nE19999: d (version 8.0.RC1, file E123456.so, ERR01100 OPS)")
    assert diagnosis is not None
    assert diagnosis.codes == ("E19999", "E40021", "EC0010")
    assert diagnosis.code == "EC0010"


@pytest.mark.parametrize(
    ("code", "kind"),
    [("E39999", "internal"), ("EI9999", "internal"), ("E29001", "unsupported-op"), ("EL0099", "environment")],
)
def test_codes_that_no_registry_has(code: str, kind: str) -> None:
    assert class_of(code) == kind


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.none() | st.integers(-20, 255))
def test_any_text_gets_an_answer(log: str, exit_code: int | None) -> None:
    diagnosis = diagnose(log, exit_code=exit_code)
    assert diagnosis is None or diagnosis.fix
