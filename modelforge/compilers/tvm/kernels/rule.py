"""What a rule is: it replaces an operator by a kernel of its own, and schedules that kernel."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from modelforge.compilers.tvm.machine import Machine

RULE = "modelforge.rule"
MACS = "modelforge.macs"
TILE = "modelforge.tile"
"""Annotations of a kernel's main block: the rule's name, its multiply-adds, the numbers that its schedule needs."""


@runtime_checkable
class Anchored(Protocol):
    """A rule for an operator: its kernels are known by the annotation ``RULE`` of their main block."""

    @property
    def name(self) -> str:
        """What the report calls the rule."""

    @property
    def operators(self) -> tuple[str, ...]:
        """Relax operators that :meth:`rewrite` is asked about."""

    def rewrite(self, call: Any, builder: Any, machine: Machine) -> Any | None:
        """Return what stands for the call, or None where the rule does not apply. ``call`` has constants resolved."""

    def schedule(self, sch: Any, anchor: Any, machine: Machine) -> str:
        """Schedule the kernel around ``anchor``; return a few words on the tile for the report."""


@runtime_checkable
class AmongEntries(Protocol):
    """A rule that packs weights in one of several ways, which should be the same for all entries that read them."""

    def among(self, batches: tuple[int, ...]) -> Anchored:
        """The rule for a module that has an entry for each of these batches."""


class General(Protocol):
    """A rule for kernels by their form alone."""

    @property
    def name(self) -> str:
        """What the report calls the rule."""

    def schedule(self, sch: Any, machine: Machine) -> str | None:
        """Schedule the kernel and say how, or return None (having changed nothing) where its form is another."""
