"""What a rule about an atc command line looks at and yields. The rules are in rules.py and shape_rules.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from modelforge.compilers.ascend.command import placeholders_in
from modelforge.compilers.ascend.findings import Finding
from modelforge.compilers.ascend.limits import CHIPS, Chip, Version
from modelforge.compilers.ascend.option_table import OptionSpec


@dataclass(frozen=True)
class Remark:
    """A finding, and the options that it changes in the corrected line (None: taken out)."""

    finding: Finding
    edits: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What the rules look at.

    Attributes:
        given: option -> value, the last of repeated ones.
        table: the options that this atc has.
        cann: its version; None: whatever any release from 6.0 on takes.
        may_hold_more: a bare placeholder (``${common_args}``) stands among the options.
    """

    given: Mapping[str, str]
    table: Mapping[str, OptionSpec]
    cann: Version | None = None
    may_hold_more: bool = False

    def text(self, name: str) -> str:
        return self.given.get(name, "")

    def is_open(self, name: str) -> bool:
        """Whether the value has a placeholder in it."""
        return bool(placeholders_in(self.text(name)))

    @property
    def mode(self) -> str:
        return self.text("mode") or "0"

    @property
    def compiles(self) -> bool:
        return self.mode in ("0", "3", "7", "30") and not self.text("singleop")

    @property
    def chip(self) -> Chip | None:
        """The family of the chip, where its name is filled in and exact."""
        return next((each for each in CHIPS if re.fullmatch(each.pattern, self.text("soc_version"))), None)


Rule = Callable[[Context], Iterator[Remark]]
