"""Puts ONNX's test cases of single operators through TVM, and writes the section of docs/coverage.md about them.

    python docs/make_node_coverage.py                  # all of them, then the section: a quarter of an hour
    python docs/make_node_coverage.py Resize LSTM      # cases that hold these operators, printed with their reasons

Each case goes the way of `modelforge build`: inspected, asked the preflight, prepared, compiled, linked, run by the
runner that ships; its outputs are held against those of the test case. A sample is run for Cortex-A76 as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import onnx
from make_agreement import frozen
from make_coverage import put_section
from onnx import numpy_helper

HEADING = "## TVM: ONNX's node cases"
HERE, ARM = "x86-64", "cortex-a76"
ARM_SHARE = 12
"""One case of so many is run under QEMU as well, drawn by its name."""
FP16_RTOL = 5e-3
"""The cases want 1e-3, two steps of FP16, and were computed in another order."""
SECONDS = 120.0
"""For one case: a hang costs itself only."""
TITLES = {"as it stands": "as they stand", "constants": "constants for all inputs but the first"}


@dataclass(frozen=True)
class Case:
    """One test case: ``form`` is how its inputs are given."""

    form: str
    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, Any]
    outputs: Sequence[Any]
    rtol: float
    atol: float

    @property
    def operators(self) -> list[str]:
        return sorted({node.op_type for node in self.model.graph.node})

    @property
    def operator(self) -> str:
        """What it tests: a function that is written out stands under its own name."""
        found = self.operators
        return found[0] if len(found) == 1 else "functions written out, and several operators"


@dataclass(frozen=True)
class Outcome:
    """``right``, ``refused`` (told by ModelForge, ``what`` names the operator), or what a defect is called."""

    verdict: str
    what: str = ""


def cases() -> list[Case]:
    """As they stand, every input open; and with every input but the first a constant, as in a real model."""
    from onnx.backend.test.loader import load_model_tests

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases overflow and divide by zero on purpose
        for test in load_model_tests(kind="node"):
            given, expected = test.data_sets[0]
            names = [each.name for each in test.model.graph.input]
            given, expected = [_arrays(given), _arrays(expected)]
            inputs = dict(zip(names, given, strict=False))
            rest = (expected, test.rtol, test.atol)
            found.append(Case("as it stands", test.name, test.model, inputs, *rest))
            fixed = frozen(test.model, given)
            if fixed is not None:
                fixed.ir_version = max(fixed.ir_version, 4)  # before it, constants had to be inputs too
                left = {each.name: inputs[each.name] for each in fixed.graph.input}
                found.append(Case("constants", test.name, fixed, left, *rest))
    return found


def _arrays(values: Sequence[Any]) -> list[Any]:
    """As arrays, but for sequences and what is optional."""
    made = [numpy_helper.to_array(each) if isinstance(each, onnx.TensorProto) else each for each in values]
    return [np.asarray(each) if isinstance(each, np.generic) else each for each in made]


def attempt(case: Case, tag: str) -> Outcome:
    """Bring one case to its end, in this process."""
    from modelforge.errors import ModelForgeError

    with tempfile.TemporaryDirectory(prefix="node-case-") as name:
        try:
            got = _run(case, tag, Path(name))
        except ModelForgeError as error:
            said = " ".join(f"{error.what} {error.where or ''}".split())
            return Outcome("refused" if _names(case, said) else "refused without a name", said)
        except Exception as error:  # a defect of ours: the build would call it an internal error
            return Outcome("failed", " ".join(f"{type(error).__name__}: {error}".split()))
    return _judged(case, got)


def _run(case: Case, tag: str, folder: Path) -> list[np.ndarray[Any, Any]]:
    from modelforge.compilers.protocol import CompileJob, RunJob
    from modelforge.compilers.tvm import TvmCompiler
    from modelforge.errors import UnsupportedError
    from modelforge.graph.inspect import inspect_model
    from modelforge.graph.load import check_model
    from modelforge.graph.prepare import prepare
    from modelforge.target import Registry

    source = folder / "source.onnx"
    source.write_bytes(case.model.SerializeToString())
    check_model(source)
    target, compiler = Registry().get(tag), TvmCompiler()
    shapes = {given: tuple(array.shape) for given, array in case.inputs.items() if isinstance(array, np.ndarray)}
    refused = compiler.supports(inspect_model(source, cost=False), target, "fp32", shapes, {})
    refused = refused or compiler.supports_model(source, target)
    if refused:
        raise UnsupportedError(refused[0].what)
    prepare(source, folder / "prepared", shapes)
    (folder / "work").mkdir()
    model = folder / "prepared" / "model.onnx"
    compiled = compiler.compile(CompileJob(model, target, "fp32", shapes, {}, folder / "work", SECONDS))
    # As samples are kept: along the first axis, which a model with a batch of one has already.
    samples = {given: array if array.shape[:1] == (1,) else array[None] for given, array in case.inputs.items()}
    np.savez(folder / "in.npz", **samples)
    files = (compiled.files, compiled.artifact, target, folder / "in.npz", 1, folder / "out.npz", folder / "run")
    compiler.run(RunJob(*files, SECONDS))
    with np.load(folder / "out.npz") as outputs:
        names = [each.name for each in case.model.graph.output]
        return [outputs[each] for each in names]


def _judged(case: Case, got: Sequence[np.ndarray[Any, Any]]) -> Outcome:
    for place, (ours, theirs) in enumerate(zip(got, case.outputs, strict=True)):
        expected = np.asarray(theirs)
        shape = ours.shape if ours.shape == expected.shape else ours.shape[1:]
        if shape != expected.shape or ours.dtype != expected.dtype:
            return Outcome(
                "wrong", f"output {place} is {ours.dtype}{list(shape)}, not {expected.dtype}{list(expected.shape)}"
            )
        value = ours.reshape(expected.shape)
        rtol = FP16_RTOL if expected.dtype == np.float16 else case.rtol
        close = np.isclose(value.astype(np.float64), expected.astype(np.float64), rtol, case.atol, equal_nan=True)
        if not close.all():
            at = tuple(int(each[0]) for each in np.nonzero(~close))
            return Outcome(
                "wrong", f"output {place}: {(~close).mean():.0%} differ, {list(at)} is {value[at]}, not {expected[at]}"
            )
    return Outcome("right")


def _names(case: Case, said: str) -> bool:
    """Whether it says what is to blame: an operator, or an input or output of a type that is not had."""
    graph = case.model.graph
    names = [*case.operators, *(each.name for each in (*graph.input, *graph.output))]
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", said) for name in names)


def serve(connection: Connection) -> None:
    """A child process: outcomes of cases, until there are none. TVM is imported once, not once a case."""
    from modelforge.toolchains import worker

    def here(function: str, request: Mapping[str, Any], **_: object) -> Any:
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(json.loads(json.dumps(request)))

    worker.call = here  # type: ignore[assignment]  # a double in this process alone
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    while (asked := connection.recv()) is not None:
        connection.send(attempt(*asked))


class Child:
    """A child process that is made anew where a case ends it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, case: Case, tag: str) -> Outcome:
        try:
            self._connection.send((case, tag))
            if self._connection.poll(SECONDS):
                answer: Outcome = self._connection.recv()
                return answer
            outcome = Outcome("failed", f"no end within {SECONDS:.0f} s")
        except (EOFError, OSError):
            self._process.join()
            outcome = Outcome("failed", f"the process ended with {self._process.exitcode}")
        self.close()
        self._start()
        return outcome

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


Asked = tuple[Case, str]


def measure(asked: Sequence[Asked], jobs: int) -> list[Outcome]:
    """The outcome of each, in their order."""
    waiting: SimpleQueue[int] = SimpleQueue()
    for place in range(len(asked)):
        waiting.put(place)
    found: list[Outcome] = [Outcome("failed", "was not run")] * len(asked)

    def work() -> None:
        child = Child()
        try:
            while True:
                place = waiting.get_nowait()
                found[place] = child.ask(*asked[place])
                if place % 100 == 99:
                    print(f"{place + 1} of {len(asked)}", flush=True)
        except Empty:
            child.close()

    with ThreadPoolExecutor(jobs) as pool:
        for running in [pool.submit(work) for _ in range(jobs)]:
            running.result()
    return found


def drawn(case: Case) -> bool:
    return int(hashlib.sha256(f"arm {case.form} {case.name}".encode()).hexdigest(), 16) % ARM_SHARE == 0


def section(asked: Sequence[Asked], found: Sequence[Outcome]) -> str:
    """The part of docs/coverage.md."""
    from importlib.metadata import version

    done = list(zip(asked, found, strict=True))
    shares = [["cases", "on", "number", "right", "refused, naming what", "refused without", "wrong", "failed"]]
    for tag in (HERE, ARM):
        for form, title in TITLES.items():
            counts = Counter(each.verdict for (case, on), each in done if on == tag and case.form == form)
            if total := counts.total():
                kinds = ("refused", "refused without a name", "wrong", "failed")
                shares.append(
                    [title, tag, str(total), f"{counts['right'] / total:.1%}", *(str(counts[kind]) for kind in kinds)]
                )
    return f"""{HEADING}

ONNX's own test cases (onnx {version("onnx")}), each put through what `modelforge build` does for a target that TVM
{version("apache-tvm")} serves, its outputs held against those that the case brings, in its own tolerance. Written by
`python docs/make_node_coverage.py`. *Constants for all inputs but the first* is how real models give shapes, axes
and weights; *as they stand*, they come with the data. For {ARM} a sample is run under QEMU, drawn by name.

{_table(shares)}

What is not right on {HERE}, by operator, both forms together; the reason is the most frequent one.

{_table([["operator", "cases", "right", "refused", "wrong or failed", "why"], *_rows(done)])}
"""


def _rows(done: Sequence[tuple[Asked, Outcome]]) -> Iterator[list[str]]:
    groups: defaultdict[str, list[Outcome]] = defaultdict(list)
    for (case, tag), outcome in done:
        if tag == HERE:
            groups[case.operator].append(outcome)
    for operator, found in sorted(groups.items()):
        counts = Counter(each.verdict for each in found)
        if counts["right"] == len(found):
            continue
        bad = counts["wrong"] + counts["failed"]
        worst = [each.what for each in found if each.verdict in ("wrong", "failed")]
        told = Counter(worst or [each.what for each in found if each.verdict != "right"]).most_common(1)[0][0]
        said = re.sub(rf" \(node [^()]*\)| {re.escape(tempfile.gettempdir())}\S*", "", told).replace("|", "\\|")[:160]
        refused = len(found) - counts["right"] - bad
        yield [operator, *map(str, (len(found), counts["right"], refused, bad)), said]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rest])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("operators", nargs="*", metavar="OPERATOR")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case, printed")
    parser.add_argument("--details", type=Path, metavar="FILE", help="write every outcome there, as JSON lines")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    chosen = [case for case in cases() if not options.operators or {*options.operators} & {*case.operators}]
    chosen = chosen[:: options.every]
    asked = [(case, HERE) for case in chosen] + [(case, ARM) for case in chosen if drawn(case)]
    found = measure(asked, options.jobs)
    if options.details:
        lines = [
            json.dumps([case.form, case.name, tag, case.operators, outcome.verdict, outcome.what])
            for (case, tag), outcome in zip(asked, found, strict=True)
        ]
        options.details.write_text("\n".join(lines), encoding="utf-8")
    text = section(asked, found)
    print(f"\n{text}\n{(time.monotonic() - begun) / 60:.1f} minutes")
    if not options.operators and options.every == 1:
        put_section(HEADING, text)
    return int(any(each.verdict not in ("right", "refused") for each in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
