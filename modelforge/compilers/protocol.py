"""The seam between the forge and a vendor's compiler: probe, supports, compile, run.

A compiler is one module and one entry point in the group ``modelforge.compilers``. ``probe`` and ``supports`` are
cheap and pure: they import no vendor module and start no process. ``compile`` and ``run`` work in a child process
(:func:`modelforge.toolchains.worker.call`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

if TYPE_CHECKING:  # child processes import this for its plain values, and need no pydantic
    from modelforge.graph.facts import ModelFacts
    from modelforge.options import Options, PreprocessSection
    from modelforge.recipe import Dim
    from modelforge.target import Target

_NO_OPTIONS: Final[Mapping[str, Any]] = {}


@dataclass(frozen=True)
class Toolchain:
    """Vendor software as installed. ``versions`` goes into content keys and into the variant record.

    Attributes:
        warnings: what works but not as well as it could, and how to raise it (shown by ``doctor`` and ``plan``).
    """

    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missing:
    """Vendor software that is not here, and how to get it."""

    reason: str
    fix: str


@dataclass(frozen=True)
class Refusal:
    """Why a compiler cannot have a model. ``rule`` is a short stable name, ``source`` where the rule comes from."""

    rule: str
    what: str
    fix: str
    source: str = ""


@dataclass(frozen=True)
class Wanted:
    """All that a recipe asks of a compiler for one rung of a target: for :class:`ChecksRecipe`.

    Attributes:
        model: the user's own model; None for a stage of a split, which is no file yet.
        facts: of the model, or of the stage.
    """

    model: Path | None
    facts: ModelFacts
    target: Target
    precision: str
    inputs: Mapping[str, tuple[int | str, ...]]
    dims: Mapping[str, Dim]
    options: Options = field(default_factory=dict)
    preprocess: Mapping[str, PreprocessSection] = field(default_factory=dict)


OWN_FILE: Final = "own-file"
"""The rule of a refusal for want of a file that the user makes and the recipe names."""


@dataclass(frozen=True)
class CompileJob:
    """What a compiler gets.

    Attributes:
        model: the lowered model, with its external data beside it if any. Not to be changed.
        inputs: shape by input name; an int, or the symbol of a dimension bounded in ``dims``.
        workdir: a private empty folder; all files of the result lie below it.
        timeout: seconds for each child process.
        options: what the recipe's target says to this compiler (``Compiler.section``).
        preprocess: by input name, what the device does to a raw image before the model sees it.
        calibration: an .npz of calibration samples, as ``RunJob.inputs``; only where the recipe leaves INT8 to the
            compiler: ``model`` is FP32 then.
    """

    model: Path
    target: Target
    precision: str
    inputs: Mapping[str, tuple[int | str, ...]]
    dims: Mapping[str, Dim]
    workdir: Path
    timeout: float
    options: Options = field(default_factory=dict)
    preprocess: Mapping[str, PreprocessSection] = field(default_factory=dict)
    calibration: Path | None = None


@dataclass(frozen=True)
class Compiled:
    """What a compiler gives.

    Attributes:
        artifact: name of the main file, a key of ``files``.
        files: bundle file name -> path. Names are plain (no folders).
        commands: what was run, in neutral words: no path of this machine.
        requires: what the device needs to run it, in one sentence.
        needs: the same for programs, by name: ``{"tensorrt_rtx": "==1.7.1.116", "sm": 75}``. Stands beside ``requires``
            in the variant record.
        notes: what a reader of the record must know.
        report: facts worth keeping (sizes, functions, rules that applied); JSON.
    """

    artifact: str
    files: Mapping[str, Path]
    commands: tuple[tuple[str, ...], ...]
    requires: str
    notes: tuple[str, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """What a tuning gives: the path of its database, and JSON facts for people."""

    database: Path
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunJob:
    """What a runner gets: the files of a variant, and inputs to run them on.

    Attributes:
        files: as in :class:`Compiled`, read back from the store or the bundle, each under its own name; with them the
            lowered model, ``model.onnx``, for runners that build again (a simulator).
        inputs: an .npz with one array per model input, shape ``[samples, ...]``: sample ``i`` of input ``x`` is
            ``x[i:i+1]`` where the model's first dimension is 1 or a symbol, else ``x[i]``.
        batch: how many samples to run at once (1 where the first dimension is fixed).
        outputs: where to write an .npz with one array per model output, samples along the first axis as in
            ``inputs``.
        timed: batch sizes to time after that, where the evidence is ``device``: ``latency.by_batch`` of the answer
            has medians in milliseconds by size. A runner that cannot leaves it out.
        calibration: as in :class:`CompileJob`, for runners that build again; a bundle does not carry it.
    """

    files: Mapping[str, Path]
    artifact: str
    target: Target
    inputs: Path
    batch: int
    outputs: Path
    workdir: Path
    timeout: float
    timed: tuple[int, ...] = ()
    calibration: Path | None = None


@dataclass(frozen=True)
class Ran:
    """How it ran: ``evidence`` is one of ``device``, ``emulator``, ``simulator``.

    Attributes:
        files: reports of the run, by bundle file name: ``layers.json`` has the time of each layer.
    """

    evidence: str
    notes: tuple[str, ...] = ()
    latency: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)


@runtime_checkable
class ChecksRecipe(Protocol):
    """A compiler that also holds the whole of what is asked against its rules; not every one has to."""

    def supports_recipe(self, wanted: Wanted) -> list[Refusal]:
        """Say what stands against it that ``supports`` and ``supports_model`` do not. As cheap and as pure as they."""


@runtime_checkable
class Tuner(Protocol):
    """A compiler whose code can be tuned by measuring: asked where the recipe has ``[target.tune]``.

    The database goes to :meth:`Compiler.compile` as the option ``tuning``, a path; the other options do not.
    """

    def tuned_on(self, options: Options) -> str:
        """On what it would measure, in words: part of the tuning step's content key. Cheap and pure."""

    def tune(self, job: CompileJob) -> Tuned:
        """Measure, or take what was measured before.

        Raises:
            BuildError: nothing could be measured; the variant can still be built untuned.
            InputError: what the recipe gives cannot be used.
        """


class Compiler(Protocol):
    """One vendor's compiler."""

    name: str
    title: str
    section: str | None
    """The sub-table of a recipe's target that speaks to it, ``options`` for other packages' compilers; None where it
    takes no options."""
    code_version: str
    """Raised whenever the same inputs would give another artifact: part of the content key."""

    def probe(self, target: Target | None = None) -> Toolchain | Missing:
        """Say what is installed, without importing it, and whether it can build for a target. Costs milliseconds."""

    def dialect(self, target: Target) -> str:
        """How it wants quantization written for this target: a name of :mod:`modelforge.quantize.dialects`."""

    def supports(
        self,
        facts: ModelFacts,
        target: Target,
        precision: str,
        inputs: Mapping[str, tuple[int | str, ...]],
        dims: Mapping[str, Dim],
        options: Options = _NO_OPTIONS,
    ) -> list[Refusal]:
        """Say why this model cannot be compiled for this target at this precision with these options of the recipe.

        Empty if nothing is known against it.
        """

    def supports_model(self, model: Path, target: Target, options: Options = _NO_OPTIONS) -> list[Refusal]:
        """Say what else stands against the user's own model, whatever precision it is lowered to: down to its nodes."""

    def compile(self, job: CompileJob) -> Compiled:
        """Compile in a child process.

        Raises:
            BuildError: the compiler failed, crashed, ran out of time, or left no artifact.
            UnsupportedError: the compiler says that it cannot have this model.
        """

    def runner(self, target: Target) -> str | None:
        """The evidence that :meth:`run` would give on this machine, or None where the artifact cannot run here."""

    def runner_hint(self, target: Target) -> str:
        """How to raise the evidence on this machine, for notes and ``doctor``; empty where it is the best."""

    def race(self, first: RunJob, second: RunJob) -> tuple[float, float] | None:
        """Median milliseconds that two artifacts take for one batch of the first samples, in interleaved rounds.

        None where this machine cannot time them side by side as the device would run them. ``outputs`` of the jobs is
        not written.
        """

    def run(self, job: RunJob) -> Ran:
        """Run the compiled artifact here, in a child process.

        Raises:
            BuildError: it cannot run here, or failed.
            UnsupportedError: something that running it takes is not among what the job has.
        """
