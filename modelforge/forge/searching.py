"""The search for the layers that ``mixed`` keeps in float: what a worker process does for the step ``search``.

Each set is judged by the recipe's own gate on the lowered model, in ONNX Runtime. A stage that does not give the
model's outputs is judged by what becomes of them as well: the stages after it run in FP32 on what it gives.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelforge.compilers.onnxruntime_worker import run_model
from modelforge.errors import UnsupportedError
from modelforge.forge import worker
from modelforge.quantize.dialects import get_dialect
from modelforge.quantize.search import search_exclusions
from modelforge.verify.gate import GateRules, Verdict, judge
from modelforge.verify.metrics import ChannelGroup, LabelMetric

Request = dict[str, Any]


def search_layers(request: Request) -> dict[str, Any]:
    """Worker: the fewest layers of ``request["model"]`` that must stay in float; ``onward`` is :class:`_Onward`'s.

    Returns:
        curve, chosen (how many, or None), exclude (their names), worst.
    """
    folder, margin = Path(request["folder"]), get_dialect(request["dialect"]).margin_db
    folder.mkdir(parents=True)
    inputs, _ = worker.read_samples(request["samples"])
    data, outputs = folder / "inputs.npz", folder / "outputs.npz"
    worker.write_arrays(data, inputs)
    own = _Judge.of(request, [request["model"]], margin)
    onward = _Onward(request["onward"], folder, request["batch"], margin) if "onward" in request else None

    def evaluate(exclude: tuple[str, ...]) -> tuple[bool, dict[str, Any]]:
        lowered = folder / "lowered"
        shutil.rmtree(lowered, ignore_errors=True)
        lowered.mkdir()
        try:
            worker.quantize(Path(request["model"]), lowered, request, exclude)
        except UnsupportedError:  # nothing is left to quantize: no INT8 model, and so none that passes
            return False, {}
        _run(lowered / "model.onnx", data, outputs, request["batch"], folder)
        verdict = own(outputs)
        facts = verdict.facts()
        figures = {name: facts[name] for name in ("value", "drop", "sqnr_db", "agreement")}
        if onward is None:
            return verdict.passed, figures
        whole = onward.judge(outputs)
        facts = whole.facts()
        figures |= {name: facts[name] for name in ("value", "drop", "agreement")}
        return verdict.passed and whole.passed, figures

    found = search_exclusions(request["blocks"], evaluate, least=1 if margin else 0)
    exclude = None if found.exclude is None else list(found.exclude)
    return {"curve": list(found.curve), "chosen": found.chosen, "exclude": exclude, "worst": list(found.worst)}


@dataclass(frozen=True)
class _Judge:
    """The recipe's gate for ``mixed`` over a reference; stricter by the dialect's margin.

    INT8 may have failed by the compiler's own arithmetic: what is chosen in ONNX Runtime must hold there, too.
    """

    rules: GateRules
    metric: LabelMetric | None
    reference: Mapping[str, Any]
    labels: Any
    groups: list[ChannelGroup]

    @classmethod
    def of(cls, facts: Request, models: list[str], margin_db: float) -> _Judge:
        """``facts``: metric, and the paths of samples and reference."""
        rules, metric = worker.metric_of(facts["metric"])
        if margin_db:
            allowed = None if rules.max_drop is None else rules.max_drop / 2
            rules = replace(rules, min_sqnr_db=rules.floors("mixed")[0] + margin_db, max_drop=allowed)
        reference, (_, labels) = worker.read_arrays(facts["reference"]), worker.read_samples(facts["samples"])
        return cls(rules, metric, reference, labels, worker.groups_of(models, reference))

    def __call__(self, value: Path) -> Verdict:
        found = worker.read_arrays(str(value))
        return judge(self.rules, self.metric, "mixed", self.reference, found, self.labels, self.groups)


class _Onward:
    """What a stage's outputs make of the whole model's.

    ``facts``: stages after it (name, model, tensors: name -> ``input`` or a stage), outputs (name -> stage), archives
    (``input``, and the FP32 outputs of the stages before), own (the stage's name), metric, samples, reference.
    """

    def __init__(self, facts: Request, folder: Path, batch: int, margin_db: float) -> None:
        self._facts, self._batch = facts, batch
        self._folder = folder / "onward"
        self._folder.mkdir()
        self._judge = _Judge.of(facts, [stage["model"] for stage in facts["stages"]], margin_db)

    def judge(self, outputs: Path) -> Verdict:
        """Of the whole model, with ``outputs`` from the stage and FP32 everywhere else."""
        archives = {**self._facts["archives"], self._facts["own"]: str(outputs)}
        for stage in self._facts["stages"]:
            inputs, given = self._folder / "inputs.npz", self._folder / f"{stage['name']}.npz"
            _gather(archives, stage["tensors"], inputs)
            _run(Path(stage["model"]), inputs, given, self._batch, self._folder)
            archives[stage["name"]] = str(given)
        value = self._folder / "whole.npz"
        _gather(archives, self._facts["outputs"], value)
        return self._judge(value)


def _gather(archives: Mapping[str, str], tensors: Mapping[str, str], out: Path) -> None:
    worker.feed({"archives": archives, "tensors": tensors, "labels": False, "out": str(out)})


def _run(model: Path, inputs: Path, outputs: Path, batch: int, folder: Path) -> None:
    emulated = worker.emulate({"model": str(model), "folder": str(folder / "emulated")})["model"]
    request = {"model": emulated or str(model), "inputs": str(inputs), "outputs": str(outputs), "threads": 1}
    run_model({**request, "batch": batch})
