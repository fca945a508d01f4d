"""What TensorRT-RTX itself says of many models: what the preflight is held against (tests, docs/make_agreement.py).

The driver's own build, many in one child process. A model that kills the child is refused by that, and the rest goes on
in a new one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelforge.compilers.tensorrt.profiles import Profile
from modelforge.compilers.tensorrt.switches import Switches
from modelforge.errors import BuildError, ModelForgeError
from modelforge.toolchains import worker

_AT_ONCE = 200
"""Builds of one child: few enough that what it leaks stays small."""


@dataclass(frozen=True)
class Verdict:
    """``reason`` is what was said of a refusal; "" where it built."""

    builds: bool
    reason: str = ""


@dataclass(frozen=True)
class Question:
    """One model for one compute capability. ``profile``: by input with open sizes, its min, opt and max shape."""

    model: Path
    sm: int
    profile: Profile | None = None


def ask(questions: Sequence[Question], workdir: Path, *, timeout: float = 600) -> list[Verdict]:
    """Build every model and keep only whether it builds; in the order of the questions.

    Args:
        timeout: seconds for each child, which builds up to 200.

    Raises:
        ToolchainMissing: TensorRT-RTX is not installed.
        BuildError: our own side of a build failed; that is no verdict.
    """
    verdicts: list[Verdict] = []
    said = workdir / "verdicts.jsonl"
    while len(verdicts) < len(questions):
        batch = questions[len(verdicts) : len(verdicts) + _AT_ONCE]
        request = {
            "said": str(said),
            "engine": str(workdir / "main.engine"),
            "questions": [{"model": str(each.model), "sm": each.sm, "profile": each.profile} for each in batch],
        }
        workdir.mkdir(parents=True, exist_ok=True)
        said.write_text("", encoding="utf-8")
        died = ""
        try:
            worker.call(f"{__name__}:answer", request, workdir=workdir, timeout=timeout, what="TensorRT-RTX")
        except BuildError as error:
            died = str(error.what)
        lines = [json.loads(line) for line in said.read_text(encoding="utf-8").splitlines()]
        if lines and "fault" in lines[-1]:
            raise BuildError(lines[-1]["fault"], where=str(batch[len(lines) - 1].model))
        verdicts += [Verdict(line["builds"], line["reason"]) for line in lines]
        if died and len(lines) < len(batch):
            verdicts.append(Verdict(builds=False, reason=died))
    return verdicts


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The child's side: one line of ``request["said"]`` for each question, as soon as it is known."""
    from modelforge.compilers.tensorrt.worker import build

    with Path(request["said"]).open("a", buffering=1, encoding="utf-8") as said:
        for question in request["questions"]:
            verdict = {"builds": True, "reason": ""}
            try:
                build(_build_request(question, request["engine"]))
            except ModelForgeError as error:
                verdict = {"builds": False, "reason": " ".join(str(error.what).split())}
            except Exception as error:  # not a word of TensorRT's, which never raises: the caller has to know
                said.write(json.dumps({"fault": f"{type(error).__name__}: {error}"}) + "\n")
                raise
            said.write(json.dumps(verdict) + "\n")
    return {}


def _build_request(question: Mapping[str, Any], engine: str) -> dict[str, Any]:
    return {
        "product": "tensorrt-rtx",
        "folder": None,
        "model": question["model"],
        "engine": engine,
        "profiles": [question["profile"]] if question["profile"] else [],
        "timing_cache": None,
        **dataclasses.asdict(Switches(capabilities=(question["sm"],))),
    }
