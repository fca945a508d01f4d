"""What compilers share whose toolchain has an environment of its own (:mod:`modelforge.toolchains.environments`), and
whose files have fixed shapes: the probe, the refusals of open shapes and foreign types, a file for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from modelforge.compilers.protocol import Missing, Refusal, Toolchain
from modelforge.graph.facts import ModelFacts
from modelforge.toolchains.definition import Definition
from modelforge.toolchains.environments import Environment, find, install_command

Shapes = Mapping[str, tuple[int | str, ...]]


class OfBatch(Protocol):
    """A file that serves one batch."""

    @property
    def batch(self) -> int: ...


Gear = TypeVar("Gear", bound=OfBatch)


def probe_environment(definition: Definition) -> Toolchain | Missing:
    """Say whether a toolchain's environment is here and whole, for :meth:`Compiler.probe`. Costs milliseconds."""
    found = find(definition)
    if isinstance(found, Environment):
        return Toolchain(versions=found.versions)
    reason = "its environment is not installed" if found is None else f"its environment is broken: {found.reason}"
    return Missing(reason=reason, fix=install_command(definition))


def batch_symbol(inputs: Shapes) -> str | None:
    """The symbol that stands for the batch; None where all shapes are fixed."""
    return next((size for shape in inputs.values() for size in shape[:1] if isinstance(size, str)), None)


def gear_for(gears: Sequence[Gear], batch: int) -> Gear:
    """The file for a batch, of files with rising ones; the smallest where it has none of its own."""
    return next((gear for gear in gears if gear.batch == batch), gears[0])


def open_shapes(inputs: Shapes, file: str, source: str) -> Iterator[Refusal]:
    """Every open size but the batch: ``file`` (``a .rknn file``) has fixed shapes."""
    batch = batch_symbol(inputs)
    for name, shape in inputs.items():
        for position, size in enumerate(shape):
            if isinstance(size, int) or (position == 0 and size == batch):
                continue
            yield Refusal(
                "dynamic-shape",
                f'input {name}: dimension {position} "{size}" is open, and {file} has fixed shapes',
                f'give "{size}" an integer in inputs.{name}.shape, or one recipe per size; a batch may have gears',
                source,
            )


def foreign_dtypes(facts: ModelFacts, takes: Callable[[str], bool], holder: str) -> Iterator[Refusal]:
    """Every input and output of a type that ``holder`` (``a .rknn file``) has not."""
    for tensor in (*facts.inputs, *facts.outputs):
        if not takes(tensor.dtype):
            what = f"{tensor.name} is of type {tensor.dtype}, which {holder} has not"
            yield Refusal("dtype", what, "cast it in the model")
