"""What runs in the child process of a tuning: measures the candidates that the rules name, and judges the whole model.

Each operator that a rule made a kernel of is built alone, in its real sizes, with other answers to what the rule asks
(:mod:`.choices`), and timed beside the best so far in rounds that alternate. What came out is then held against the
untuned model on the same machine: only a model that is measurably faster is kept.
"""

from __future__ import annotations

import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from modelforge.compilers.tvm import alone, choices, lowering, measuring, pipeline, scheduling
from modelforge.compilers.tvm.api import host_triple, parameters_of, same_structure, target
from modelforge.compilers.tvm.choices import Session, Site
from modelforge.compilers.tvm.journal import Journal, Trial
from modelforge.compilers.tvm.kernels import GENERAL
from modelforge.compilers.tvm.machine import Machine
from modelforge.compilers.tvm.measuring import Array, Bench, DeviceFault, Loaded
from modelforge.compilers.tvm.worker import imported
from modelforge.errors import BuildError

_BRIEF, _SURE = 3, 9
"""Rounds: to see that a candidate is no better, and before it takes the place of the best."""
_GAIN: Final = 0.97
"""A kernel is taken where it needs less of the other's time than this: what is nearer is noise."""
_MODEL_GAIN: Final = 0.99
_MODEL_ROUNDS: Final = 21
_LONGER: Final = 5
"""The gain of a whole model is small, and what decides: it is worth longer rounds."""
_COMPILE_SECONDS: Final = 120.0
"""What building one kernel may take: they take a fraction of a second."""
_SAME: Final = "same"
_WORDS: Final = frozenset(rule.name for rule in GENERAL) | {"none"}


def survey(request: dict[str, Any]) -> dict[str, Any]:
    """Say which kernels of a model have something to choose: what a database is found again by.

    The request is that of :func:`.worker.compile_model`. The answer holds ``kernels``: geometry, how often it occurs.
    """
    module, _, machine = imported(request)
    with choices.session(listing=True) as said:
        lowering.lower(module, machine)
    return {"kernels": [{"geometry": name, "count": count} for name, count in Counter(_names(said)).items()]}


def tune(request: dict[str, Any]) -> dict[str, Any]:
    """Search, and judge.

    Beside what :func:`.worker.compile_model` wants, the request holds ``trials`` (candidates built, over all kernels),
    ``device`` (``name``, and ``host``, ``port``, ``key`` where it is not this machine), ``isa``, ``choices`` (label by
    key, of an imported database: what it decides is not searched again) and ``journal`` (path of a :class:`.Journal`:
    where a candidate ended the process before this one, the search goes on behind it).

    The answer holds what a database is made of: ``choices``, ``kept``, ``reason``, ``kernels``, ``measured`` and
    ``model``.

    Raises:
        DeviceFault: the device cannot be reached, died, hangs, or gives wrong numbers.
        BuildError: there was nothing to choose, or no candidate could be measured.
    """
    module, models, machine = imported(request)
    with tempfile.TemporaryDirectory(dir=request["folder"]) as folder:
        bench = _bench(request, Path(folder))
        known = dict(request["choices"])
        journal = Journal(Path(request["journal"]))
        search = _Search(machine, bench, known, journal, remote="host" in request["device"])
        with choices.session(known, listing=True) as said:
            lowering.lower(module, machine)
        if request["trials"]:
            search.run(said.sites, request["trials"])
        taken = {**known, **search.taken}
        verdict = judge(module, list(models), machine, bench, taken)
    return {
        **verdict,
        "choices": taken if verdict["kept"] else {},
        "kernels": [kernel.report() for kernel in search.kernels],
        "measured": asdict(search.counts),
    }


def _names(said: Session) -> list[str]:
    return [site.geometry for site in said.sites if any(len(labels) > 1 for labels in site.asked.values())]


def _bench(request: Mapping[str, Any], folder: Path) -> Bench:
    where = request["device"]
    if "host" not in where:
        return measuring.here(where["name"])
    return measuring.device(where["name"], where["host"], where["port"], where["key"], request["isa"], folder)


@dataclass
class Counts:
    """What became of the candidates.

    Attributes:
        measured: built, run and timed.
        refused: no such kernel can be scheduled or built.
        wrong: gave other outputs than the untuned kernel.
        crashed: ended the process that built or ran it, or the session on the device.
    """

    measured: int = 0
    refused: int = 0
    wrong: int = 0
    crashed: int = 0
    first_refusal: str = ""

    @property
    def tried(self) -> int:
        return self.measured + self.refused + self.wrong + self.crashed

    def add(self, trial: Trial) -> None:
        """Count one; one that is the same code as another is none."""
        if trial.outcome != _SAME:
            setattr(self, trial.outcome, getattr(self, trial.outcome) + 1)
            self.first_refusal = self.first_refusal or trial.said


@dataclass
class _Kernel:
    """One operator on its way: the untuned kernel, and the best so far with what was answered for it."""

    site: Site
    count: int
    inputs: list[Array]
    expected: list[Array]
    first: Loaded
    best: Loaded
    untuned: float
    seconds: float
    asked: Mapping[str, tuple[str, ...]]
    hashes: set[str]
    done: set[tuple[str, str]] = field(default_factory=set)
    taken: dict[str, str] = field(default_factory=dict)
    candidates: int = 0

    @property
    def share(self) -> float:
        """What a trial of it is worth: its time in the model, less with each that it has had (D'Hondt's method)."""
        return self.count * self.seconds / (self.candidates + 1)

    def propose(self) -> Iterator[tuple[str, str]]:
        """Other answers to one question at a time, those that the rules think best first, for the best so far."""
        rank = 1
        while rank < max(len(labels) for labels in self.asked.values()):
            for key in list(self.asked):
                labels = self.asked.get(key, ())  # another rule may have the operator by now, and ask other things
                if rank < len(labels) and (key, labels[rank]) not in self.done:
                    yield key, labels[rank]
            rank += 1

    def note(self, trial: Trial) -> None:
        """Remember what became of a candidate."""
        self.done.add((trial.key, trial.label))
        self.hashes.add(trial.identity)
        self.candidates += trial.outcome != _SAME

    def report(self) -> dict[str, Any]:
        micro = {"untuned_us": round(self.untuned * 1e6, 2), "tuned_us": round(self.seconds * 1e6, 2)}
        return {"geometry": self.site.geometry, "count": self.count, "candidates": self.candidates, **micro}


class _Search:
    """Spends trials on kernels, in order of what they may give."""

    def __init__(
        self, machine: Machine, bench: Bench, known: Mapping[str, str], journal: Journal, *, remote: bool
    ) -> None:
        self._machine = machine
        self._bench = bench
        self._known = known
        self._journal = journal
        self._remote = remote
        self.counts = Counts()
        self.kernels: list[_Kernel] = []

    @property
    def taken(self) -> dict[str, str]:
        return {key: label for kernel in self.kernels for key, label in kernel.taken.items()}

    def run(self, sites: Sequence[Site], trials: int) -> None:
        """Search.

        Raises:
            BuildError: nothing to choose, or nothing was measured.
        """
        count = Counter(site.geometry for site in sites)
        open_sites = {site.geometry: site for site in sites if self._is_open(site)}
        if not open_sites and not self._known:
            raise BuildError("no kernel of this model has anything to choose: there is nothing to tune")
        self.kernels = [self._begin(site, count[name]) for name, site in open_sites.items()]
        self._resume()
        waiting = {id(kernel): kernel.propose() for kernel in self.kernels}
        while waiting and self.counts.tried < trials:
            kernel = max((each for each in self.kernels if id(each) in waiting), key=lambda each: each.share)
            proposal = next(waiting[id(kernel)], None)
            if proposal is None:
                del waiting[id(kernel)]
            else:
                self._try(kernel, *proposal)
        for kernel in self.kernels:
            self._confirm(kernel)
        if self.kernels and not self.counts.measured:
            refusal = self.counts.first_refusal or "there were none"
            raise BuildError(f"not one candidate could be measured ({self.counts.tried} tried); the first: {refusal}")

    def _is_open(self, site: Site) -> bool:
        return any(len(labels) > 1 for labels in site.asked.values()) and not self._known.keys() & site.asked.keys()

    def _begin(self, site: Site, count: int) -> _Kernel:
        """Build and time the untuned kernel.

        Raises:
            DeviceFault: its outputs there are not those that it has here.
        """
        module, said = self._lowered(site, {})
        inputs = _inputs(alone.module_of(site.call)["main"])
        best = self._bench.load(_compiled(module, self._machine), inputs)
        got = best.run()
        expected = _reference(site, inputs) if self._remote else got
        if not measuring.same(got, expected):
            raise DeviceFault(
                f"{self._bench.name} gives wrong numbers: {site.geometry} computes something else there than here",
                where=self._bench.name,
                fix="is it the CPU that the target says? is its memory sound? Nothing that it says is used",
            )
        seconds = median(best.seconds(best.calls) for _ in range(_BRIEF))
        known = {str(same_structure(module))}
        return _Kernel(site, count, inputs, expected, best, best, seconds, seconds, said.asked, known)

    def _resume(self) -> None:
        """Go on behind the candidate at which the process before this one ended."""
        kernels = {kernel.site.geometry: kernel for kernel in self.kernels}
        for trial in self._journal.trials:
            self.counts.add(trial)
            kernels[trial.geometry].note(trial)
            kernels[trial.geometry].taken = dict(trial.taken) or kernels[trial.geometry].taken
        for kernel in (kernel for kernel in self.kernels if kernel.taken):
            module, said = self._lowered(kernel.site, kernel.taken)
            kernel.best = self._bench.load(_compiled(module, self._machine), kernel.inputs)
            kernel.seconds, _, _ = measuring.faster(kernel.best, kernel.first, _BRIEF)
            kernel.asked = said.asked

    def _try(self, kernel: _Kernel, key: str, label: str) -> None:
        begun = Trial(kernel.site.geometry, key, label)
        self._journal.write(begun)
        ended = self._tried(kernel, begun)
        self._journal.write(ended)
        self.counts.add(ended)
        kernel.note(ended)

    def _tried(self, kernel: _Kernel, trial: Trial) -> Trial:
        """What became of one candidate; where it is the best so far, the kernel has it."""
        proposal = {**kernel.taken, trial.key: trial.label}
        try:
            with measuring.deadline(_COMPILE_SECONDS):
                module, said = self._lowered(kernel.site, proposal)
                trial = replace(trial, identity=str(same_structure(module)))
                if trial.identity in kernel.hashes:
                    return replace(trial, outcome=_SAME)
                executable = _compiled(module, self._machine)
        except Exception as error:  # whatever a pass or LLVM refuses: this candidate is none
            traceback.print_exc()
            return replace(trial, outcome="refused", said=measuring.first_line(error))
        loaded = self._bench.load(executable, kernel.inputs)
        if not measuring.same(loaded.run(), kernel.expected):
            return replace(trial, outcome="wrong", said="its outputs differ from the untuned kernel's")
        trial = replace(trial, outcome="measured")
        for rounds in (_BRIEF, _SURE):
            seconds, _, ratio = measuring.faster(loaded, kernel.best, rounds)
            if ratio >= _GAIN:
                return trial
        kernel.best, kernel.seconds, kernel.taken, kernel.asked = loaded, seconds, proposal, said.asked
        return replace(trial, taken=proposal)

    @staticmethod
    def _confirm(kernel: _Kernel) -> None:
        """Hold what was found against the untuned kernel once more: the best of many noisy figures is too good."""
        if not kernel.taken:
            return
        kernel.seconds, kernel.untuned, ratio = measuring.faster(kernel.best, kernel.first, _SURE)
        if ratio >= _GAIN:
            kernel.taken, kernel.seconds = {}, kernel.untuned

    def _lowered(self, site: Site, taken: Mapping[str, str]) -> tuple[Any, Site]:
        """The operator's scheduled kernels with these answers, and what was asked on the way.

        Raises:
            BuildError: its rule cannot schedule it so.
        """
        with choices.session(taken, listing=True) as said:
            module = lowering.to_kernels(alone.module_of(site.call), self._machine)
        module, reports = scheduling.schedule_all(module, self._machine)
        fallen = [report.note for report in reports if report.macs and report.rule in _WORDS]
        if fallen:
            raise BuildError(f"its rule cannot schedule it: {fallen[0]}")
        return module, said.sites[-1] if said.sites else site


def _compiled(module: Any, machine: Machine) -> Any:
    return pipeline.compile_module(module, target(machine))


def _inputs(graph: Any) -> list[Array]:
    """Random inputs of the right types, always the same."""
    random = np.random.default_rng(0)
    arrays = []
    for shape, dtype in parameters_of(graph):
        kind = np.dtype(dtype).kind
        if kind in "iu":
            low, high = (-100, 100) if kind == "i" and dtype != "int64" else (0, 2)
            arrays.append(random.integers(low, high, shape).astype(dtype))
        else:
            arrays.append((random.random(shape) - 0.5).astype(dtype) if kind == "f" else random.random(shape) > 0.5)
    return arrays


def _reference(site: Site, inputs: Sequence[Array]) -> list[Array]:
    """What the operator gives in this process, by code for any CPU of its kind."""
    machine = Machine(host_triple(), "generic" if host_triple().startswith("aarch64") else "x86-64", (), 1, 128)
    module, _ = scheduling.schedule_all(lowering.to_kernels(alone.module_of(site.call), machine), machine)
    return measuring.here("this machine").load(_compiled(module, machine), inputs).run()


def judge(
    module: Any, entries: Sequence[str], machine: Machine, bench: Bench, taken: Mapping[str, str]
) -> dict[str, Any]:
    """Hold the whole model with these choices against the untuned one, entry by entry, in alternating rounds.

    Facts: ``kept``; ``reason`` where it is not; ``model``: by entry, medians of both in milliseconds and of their
    ratio.

    Raises:
        DeviceFault: the tuned model gives other outputs.
    """
    if not taken:
        return {"kept": False, "reason": "no candidate was faster than the untuned kernel", "model": []}
    untuned, tuned = (_whole(module, machine, picks) for picks in ({}, taken))
    rows: list[dict[str, Any]] = []
    for entry in entries:
        inputs = _inputs(module[entry])
        first, second = (bench.load(executable, inputs, entry) for executable in (untuned, tuned))
        if not measuring.same(second.run(), first.run()):
            raise DeviceFault(f"the tuned model gives other outputs than the untuned one on {bench.name}", where=entry)
        rounds = _MODEL_ROUNDS
        mine, theirs, ratio = measuring.faster(second, first, rounds, _LONGER)
        if ratio > 1:  # by noise or for real: an entry that has none of the choices is as likely above as below
            rounds *= 3
            mine, theirs, ratio = measuring.faster(second, first, rounds, _LONGER)
        figures = {"tuned_ms": round(mine * 1e3, 4), "untuned_ms": round(theirs * 1e3, 4), "ratio": round(ratio, 4)}
        rows.append({"entry": entry, **figures, "rounds": rounds})
    mean = exp(sum(log(row["ratio"]) for row in rows) / len(rows))
    kept = mean <= _MODEL_GAIN and all(row["ratio"] <= 1 for row in rows)
    reason = "" if kept else f"the tuned model takes {mean:.3f} of the untuned one's time: no gain beyond noise"
    return {"kept": kept, "reason": reason, "model": rows}


def _whole(module: Any, machine: Machine, taken: Mapping[str, str]) -> Any:
    with choices.session(taken):
        lowered = lowering.lower(module, machine)
    return _compiled(scheduling.schedule_all(lowered, machine)[0], machine)
