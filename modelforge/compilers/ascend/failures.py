"""The log of a failed atc run -> why it failed, whose fault that is, and what to do. Reads text, starts nothing.

Matches codes, not prose: their wording changes with every CANN (5 to 9). The codes and what they mean are data
(failure_codes.toml), and so are the few wordings that stand for a code in logs that carry none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

FailureClass = Literal["usage", "model", "unsupported-op", "environment", "resource", "internal"]

# A code may be glued to the line before it ("… informationEZ3003: …"); then a colon tells it from a part of a number.
_CODE = re.compile(
    r"(?<![A-Za-z0-9])(?:[EW][0-9]{5}|[EW][A-Z][0-9]{4})(?![0-9A-Za-z])"
    r"|(?<=[a-z])(?:[EW][0-9]{5}|[EW][A-Z][0-9]{4})(?=:)"
)
_HEAD = re.compile(r"\[PID: *\d+\] *[\d.:-]+ *|\([EW][0-9A-Z]{5}\): *")
_NUMBER = re.compile(r"(?:error ?code(?: is)?|errcode|result|ret)[\s:=\[]*([1235][0-9]{5})(?![0-9])", re.IGNORECASE)
_COMPILE = frozenset({"E20001", "E22001", "E40021", "EB0000", "E90000"})
"""A kernel that could not be compiled: often the consequence of something else in the same log."""

_SUCCESS = "ATC run success"


@dataclass(frozen=True)
class FailedOp:
    """An operator that the log names. ``opset`` as in ``ai.onnx::11::Conv``."""

    name: str | None
    type: str | None
    opset: int | None


@dataclass(frozen=True)
class Diagnosis:
    """Why a run failed.

    Attributes:
        code: the code of the root cause, None where the log has none and its wording stands for none.
        failure_class: whose fault: ``usage`` (options, files), ``model``, ``unsupported-op``, ``environment``,
            ``resource`` (memory, disk), ``internal``.
        title: the code's own title, lower case.
        message: the line of the log that says it.
        cause, fix: one sentence each.
        ops: the operators that are named, in order, each once.
        codes: all codes in the log, in order, each once.
    """

    code: str | None
    failure_class: FailureClass
    title: str
    message: str
    cause: str
    fix: str
    ops: tuple[FailedOp, ...]
    codes: tuple[str, ...]

    @property
    def worth_a_retry(self) -> bool:
        """Whether the same command may pass elsewhere or later."""
        return self.failure_class in ("environment", "resource")


def diagnose(log: str, *, exit_code: int | None = None) -> Diagnosis | None:
    """Read what atc printed, both streams together.

    Args:
        log: the text; may be a part of a log, or hold lines of other programs.
        exit_code: of the process, negative for a signal; tells a kill or a crash that printed nothing.

    Returns:
        None where the log tells of success and of no failure.
    """
    table = _table()
    found = [(match[0], match.start()) for match in _CODE.finditer(log)]
    if all(table.class_of(code) == "internal" for code, _ in found):
        found += table.from_wording(log)
    codes = tuple(dict.fromkeys(code for code, _ in found))
    failures = [code for code in codes if code.startswith("E")]
    signature = table.signature(log, failures)
    if _SUCCESS in log and exit_code in (0, None) and not failures and signature is None:
        return None
    root = min(failures or codes, key=lambda code: _remoteness(code, table), default=None)
    ops = tuple(dict.fromkeys(_ops(log)))
    if signature is not None and _explains(signature, root):
        return Diagnosis(
            root,
            signature["class"],
            table.title(root) if root else "",
            _line_with(log, re.compile(signature["pattern"], re.IGNORECASE | re.MULTILINE)),
            signature["cause"],
            signature["fix"],
            ops,
            codes,
        )
    if root is None:
        return _by_number(log, ops) or _without_code(log, exit_code, ops)
    failure_class = table.class_of(root)
    cause, fix = table.advice(root, failure_class)
    return Diagnosis(root, failure_class, table.title(root), _message(log, root), cause, fix, ops, codes)


def class_of(code: str) -> FailureClass:
    """The class of a code, also of one that no registry has (by how it begins)."""
    return _table().class_of(code)


def _by_number(log: str, ops: tuple[FailedOp, ...]) -> Diagnosis | None:
    """By a number of ACL or GE, six digits whose first is the kind."""
    match = _NUMBER.search(log)
    row = _table().numbers.get(match[1][0]) if match is not None else None
    if match is None or row is None:
        return None
    failure_class, title = row
    cause, fix = _table().advice("", failure_class)
    return Diagnosis(match[1], failure_class, title, _line_with(log, _NUMBER), cause, fix, ops, (match[1],))


def _without_code(log: str, exit_code: int | None, ops: tuple[FailedOp, ...]) -> Diagnosis:
    table = _table()
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    message = lines[-1] if lines else ""
    by_exit: Mapping[int, tuple[FailureClass, str]] = {
        -9: ("resource", "the process was killed, most often because memory ran out"),
        137: ("resource", "the process was killed, most often because memory ran out"),
        -11: ("internal", "atc crashed"),
        139: ("internal", "atc crashed"),
        -6: ("internal", "atc aborted"),
        134: ("internal", "atc aborted"),
        126: ("environment", "atc could not be executed"),
        127: ("environment", "atc, or a library that it needs, was not found"),
    }
    failure_class, cause = by_exit.get(exit_code or 0, ("internal", "the log does not say why it failed"))
    _, fix = table.advice("", failure_class)
    return Diagnosis(None, failure_class, "", message, cause, fix, ops, ())


def _remoteness(code: str, table: _Table) -> int:
    """0: says what is wrong; 1: a kernel failed, perhaps because of that; 2: "internal error", which says nothing."""
    if table.class_of(code) == "internal":
        return 2
    return 1 if code in _COMPILE else 0


def _explains(signature: Mapping[str, Any], root: str | None) -> bool:
    over = signature["over"].split()
    if root is None:
        return "none" in over
    kinds = {root, "internal" if _table().class_of(root) == "internal" else "", "compile" if root in _COMPILE else ""}
    return bool(kinds & set(over))


def _message(log: str, code: str) -> str:
    """The line of the code, without code, process and time; the line below where the code stands alone."""
    for match in re.finditer(rf"(?<![A-Z0-9]){code}", log):
        line, _, rest = log[match.start() :].partition("\n")
        text = _HEAD.sub("", line[len(code) :].lstrip(":").strip()).lstrip(": ").strip()
        if text and not re.fullmatch(r"Inn?ter?n?al Error!?|Inner Error!?", text, flags=re.IGNORECASE):
            return text
        following = rest.strip().partition("\n")[0].strip()
        if following and not following.startswith(code):
            return following
    return _line_with(log, re.compile(re.escape(code))) or _wording_line(log, code)


def _wording_line(log: str, code: str) -> str:
    patterns = [row["pattern"] for row in _table().wordings if row["code"] == code]
    return next((line for each in patterns if (line := _line_with(log, re.compile(each, re.IGNORECASE)))), "")


def _line_with(log: str, pattern: re.Pattern[str]) -> str:
    return next((line.strip() for line in log.splitlines() if pattern.search(line)), "")


# In brackets a name may hold blanks ("model1 div node"); without them it is one word.
_NAME = r"(?:\[(?P<boxed>[^\[\],]+)|(?P<bare>(?!\[)[^\s\[\],]+))\]?"
_TYPE = r"\[?(?P<type>[A-Za-z][\w:.]*)"
_OP_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # Op [Conv_52, optype [Conv]]  ·  for [AddDsl], optype [AddDsl]  ·  Op: a, optype: B  ·  Op a with optype B
        rf"\b(?:op|for|operator):? ?{_NAME},? (?:with )?op ?type:? {_TYPE}",
        # Failed to compile Op [a]. (optype: [B])  ·  Operator a compilation failed. Optype is B
        rf"(?:failed to compile op|operator) {_NAME}(?:\.| compilation failed).{{0,600}}?\bop ?type(?: is|:) {_TYPE}",
        rf"failed to compile op {_NAME}",
        rf"\boptype {_TYPE}\]? of ops kernel",
        rf"(?:parser|plugin) is registered for op ?type {_TYPE}",
        r"(?:parser|plugin) is registered for op: (?P<type>\w+)",
        r"\bop\[(?P<boxed>[^\[\],]+)\]",
        rf"\bop ?name[ :=]+{_NAME}, *op ?type[ :=]+{_TYPE}",
    )
)


def _ops(log: str) -> Iterator[FailedOp]:
    for line in log.splitlines():
        for pattern in _OP_PATTERNS:
            matches = list(pattern.finditer(line))
            for match in matches:
                groups = match.groupdict()
                yield _op(groups.get("boxed") or groups.get("bare"), groups.get("type"))
            if matches:
                break


def _op(name: str | None, full_type: str | None) -> FailedOp:
    # ai.onnx::11::Conv: domain, opset, type
    versioned = re.fullmatch(r"(?:[\w.]*::)?(?:(\d+)::)?(\w+)\.?", full_type or "")
    if versioned is None:
        return FailedOp(name, (full_type or "").rstrip(".") or None, None)
    return FailedOp(name, versioned[2], int(versioned[1]) if versioned[1] else None)


@dataclass(frozen=True)
class _Table:
    """failure_codes.toml."""

    rows: Mapping[str, tuple[FailureClass, str]]
    families: tuple[tuple[str, FailureClass, str], ...]
    classes: Mapping[str, tuple[str, str]]
    advices: Mapping[str, tuple[str, str]]
    wordings: tuple[Mapping[str, str], ...]
    numbers: Mapping[str, tuple[FailureClass, str]]
    signatures: tuple[Mapping[str, Any], ...]

    def class_of(self, code: str) -> FailureClass:
        return self._row(code)[0]

    def title(self, code: str) -> str:
        return self._row(code)[1]

    def _row(self, code: str) -> tuple[FailureClass, str]:
        if code in self.rows:
            return self.rows[code]
        if re.search(r"(9999|8888|7777)$", code):
            return "internal", "inner error"
        return next((kind, title) for begins, kind, title in self.families if code.startswith(begins))

    def advice(self, code: str, failure_class: str) -> tuple[str, str]:
        return self.advices.get(code, self.classes[failure_class])

    def from_wording(self, log: str) -> list[tuple[str, int]]:
        """The codes that the wording of a log without codes stands for, in the order of the log."""
        for row in self.wordings:
            match = re.search(row["pattern"], log, flags=re.IGNORECASE)
            if match is not None:
                return [(row["code"], match.start())]
        return []

    def signature(self, log: str, failures: list[str]) -> Mapping[str, Any] | None:
        for row in self.signatures:
            explains = not failures or any(_explains(row, code) for code in failures)
            if explains and re.search(row["pattern"], log, flags=re.IGNORECASE | re.MULTILINE):
                return row
        return None


@cache
def _table() -> _Table:
    data = tomllib.loads((Path(__file__).parent / "failure_codes.toml").read_text(encoding="utf-8"))
    rows = {
        code: (kind, title)
        for kind, titles in data["codes"].items()
        for title, codes in titles.items()
        for code in codes.split()
    }
    advices = {code: (row["cause"], row["fix"]) for row in data["advice"] for code in row["list"].split()}
    return _Table(
        rows,
        tuple((begins, kind, title) for begins, kind, title in data["families"]),
        {kind: (row["cause"], row["fix"]) for kind, row in data["classes"].items()},
        advices,
        tuple(data["wordings"]),
        {digit: (kind, title) for digit, (kind, title) in data["numbers"].items()},
        tuple(data["signatures"]),
    )
