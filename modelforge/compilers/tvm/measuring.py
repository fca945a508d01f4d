"""Runs and times compiled modules where a tuning measures: in this process, or on a device over TVM's RPC.

A device is another computer: it may refuse, die, hang or lie. Each ends here as an error that says so.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

import numpy as np

from modelforge.compilers.tvm.api import connect, on_device, relax, tvm
from modelforge.errors import BuildError
from modelforge.toolchains import linker

Array = np.ndarray[Any, Any]
Answer = TypeVar("Answer")

_PATIENCE: Final = 60.0
"""Seconds that a device may take for one answer: a kernel takes microseconds, a model of the largest kind a second."""
_GRACE: Final = 5.0
_ROUND: Final = 0.004
"""Seconds that one round of one kernel shall take: long beside the clock's step and a wake-up, short beside the noise
of a busy machine, which is why rounds of two kernels alternate."""
_MOST_CALLS: Final = 1000


class DeviceFault(BuildError):
    """The device cannot be reached, died, hangs, or gives wrong numbers."""


@dataclass(frozen=True)
class Loaded:
    """A module on the device, one graph of it, with its inputs there.

    Attributes:
        run: gives the graph's outputs.
        seconds: mean over so many calls, one after the other.
        calls: how many fill a round.
    """

    run: Callable[[], list[Array]]
    seconds: Callable[[int], float]
    calls: int


class Bench:
    """Where to measure. ``name`` is for people."""

    def __init__(self, name: str, load: Callable[[Any], Any], device: Any, *, own_thread: bool = False) -> None:
        self.name = name
        self._load = load
        self._device = device
        self._own_thread = own_thread
        self._held: dict[int, Any] = {}
        self._failed = False

    def load(self, executable: Any, inputs: Sequence[Array], entry: str = "main") -> Loaded:
        """Bring a module there.

        Raises:
            DeviceFault: as the class says; so for what is returned.
        """

        def bring() -> Loaded:
            machine = relax.VirtualMachine(self._load(executable), self._device)
            tensors = [on_device(array, self._device) for array in inputs]
            machine.set_input(entry, *tensors)

            def run() -> list[Array]:
                machine.invoke_stateful(entry)
                return _arrays(machine.get_outputs(entry))

            def seconds(calls: int) -> float:
                if self._own_thread:
                    return _thread_seconds(lambda: machine.invoke_stateful(entry), calls)
                return float(machine.time_evaluator("invoke_stateful", self._device, number=calls)(entry).mean)

            machine.invoke_stateful(entry)
            calls = max(1, min(_MOST_CALLS, int(_ROUND / max(seconds(1), 1e-7))))
            loaded = Loaded(lambda: self._ask(run), lambda calls: self._ask(lambda: seconds(calls)), calls)
            self._held[id(loaded)] = (machine, tensors)
            weakref.finalize(loaded, self._let_go, id(loaded))
            return loaded

        return self._ask(bring)

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            with _patience(self.name):
                return question()
        except DeviceFault as fault:
            self._give_up(fault)
            raise
        except Exception as error:  # TVM's RPC raises RuntimeError, RPCError, InternalError, EOFError, OSError ...
            failed = DeviceFault(f"{self.name} failed: {first_line(error)}", where=self.name, fix=_MEND)
            self._give_up(failed)
            raise failed from error

    def _let_go(self, key: int) -> None:
        if not self._failed:
            self._held.pop(key, None)

    def _give_up(self, fault: DeviceFault) -> None:
        """Keep all that lies on the device to the end of the process: what is freed is freed by asking the device, and
        its answer would be waited for for ever. The fault holds what is on its way (its traceback's frames)."""
        self._failed = True
        _KEPT.append((self, fault))


_KEPT: Final[list[Any]] = []
_MEND: Final = "is its rpc_server running, and of the same version of TVM? (docs/guides/tuning.md)"


def here(name: str) -> Bench:
    """This process; with one thread, by that thread's own time, which other programs on the machine do not add to."""
    alone = os.environ.get("TVM_NUM_THREADS") == "1"
    return Bench(name, lambda executable: executable, tvm.cpu(), own_thread=alone)


def _thread_seconds(call: Callable[[], Any], calls: int) -> float:
    begun = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - begun) / calls


def device(name: str, host: str, port: int, key: str, isa: str, folder: Path) -> Bench:
    """A device on which ``python -m tvm.exec.rpc_server`` runs.

    Args:
        isa: its instruction set, ``x86-64`` or ``aarch64``: libraries are linked here.
        folder: an empty one, for these libraries.

    Raises:
        DeviceFault: it does not answer, or another server does.
    """
    try:
        with _patience(name):
            session = connect(host, port, key)
    except BuildError:
        raise
    except Exception as error:  # refused (RuntimeError), another key, no RPC server behind the port (struct.error)
        raise DeviceFault(
            f"{name} cannot be reached at {host}:{port}: {first_line(error)}", where=name, fix=_MEND
        ) from error
    count = 0

    def load(executable: Any) -> Any:
        nonlocal count
        count += 1
        library = folder / f"tuned-{count}.so"
        executable.export_library(
            str(library), fcompile=lambda out, objects, **_: _link(isa, Path(out), [Path(each) for each in objects])
        )
        session.upload(str(library))
        library.unlink()
        return session.load_module(library.name)

    return Bench(name, load, session.cpu())


def _link(isa: str, out: Path, objects: list[Path]) -> None:
    linker.link_shared(isa, objects, out, workdir=out.parent)


def faster(candidate: Loaded, other: Loaded, rounds: int, longer: int = 1) -> tuple[float, float, float]:
    """Time two side by side, in rounds that alternate: medians of both in seconds, and of their ratio.

    ``longer`` times the calls of a round, where it has more than one.
    """
    calls = other.calls * longer if other.calls > 1 else 1
    times = []
    for place in range(rounds):
        pair = [candidate, other] if place % 2 else [other, candidate]
        took = {id(each): each.seconds(calls) for each in pair}
        times.append((took[id(candidate)], took[id(other)]))
    ratios = [mine / theirs for mine, theirs in times]
    return median(mine for mine, _ in times), median(theirs for _, theirs in times), median(ratios)


def same(got: Sequence[Array], expected: Sequence[Array]) -> bool:
    """Whether outputs are equal within what another order of the same sums may change."""
    return len(got) == len(expected) and all(_close(*pair) for pair in zip(got, expected, strict=True))


_TOLERANCE: Final[Mapping[str, float]] = {"float32": 1e-3, "float16": 3e-2, "float64": 1e-6}
"""Of the largest magnitude: sums of some thousand products in another order, and Winograd's transforms."""


def _close(got: Array, expected: Array) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    tolerance = _TOLERANCE.get(expected.dtype.name)
    if tolerance is None:  # integers may round differently, bits may not
        wide = np.int64 if expected.dtype.kind in "iu" else expected.dtype
        apart = 1 if expected.dtype.kind in "iu" else 0
        return (
            bool(np.all(np.abs(got.astype(wide) - expected.astype(wide)) <= apart))
            if apart
            else bool(np.all(got == expected))
        )
    limit = tolerance * max(float(np.abs(expected).max(initial=0)), 1e-30)
    return bool(np.isfinite(got).all()) and float(np.abs(got - expected).max(initial=0)) <= limit


def _arrays(value: Any) -> list[Array]:
    if hasattr(value, "numpy"):
        return [value.numpy()]
    return [array for each in value for array in _arrays(each)]


@contextmanager
def _patience(name: str) -> Iterator[None]:
    """An error where no answer comes: a device that lost its power never closes its connection.

    TVM's socket calls Python's signal handlers when a wait is interrupted; what never does so ends with the process.
    """

    def late(*_: object) -> None:
        raise DeviceFault(
            f"{name} gave no answer within {_PATIENCE:.0f} s", where=name, fix="is it alive? look at its screen"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
    try:
        with deadline(_PATIENCE + _GRACE):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End the process where what is inside takes longer: code of a candidate that runs for ever, or a pass that does,
    never comes back to Python, where a signal would be seen. The parent then goes on without it (:mod:`.tuner`)."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # the log of the process, whatever sys.stderr is
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def first_line(error: Exception) -> str:
    """What an error of TVM says, without its trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if lines and lines[0].startswith("Traceback") else 0][:300]
