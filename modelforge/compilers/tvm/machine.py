"""The CPU that code is generated for, as plain values: what schedules may know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_VECTOR_REGISTERS: Final = {("x86_64", 512): 32, ("x86_64", 256): 16, ("x86_64", 128): 16, ("aarch64", 128): 32}
"""Intel 64 SDM volume 1, 15.1 (AVX-512: 32) and 14.1 (AVX: 16); Arm ARM, A1.4: 32 SIMD registers."""


@dataclass(frozen=True)
class Machine:
    """What code is generated for, in LLVM's words, and the sizes that tiles are chosen by.

    Attributes:
        cores: threads to make work for.
        vector_bits: width of a vector register.
        l1d: bytes of one core's first-level data cache.
        l2: bytes of the second-level cache that one core may fill.
        dot: int8 dot products: ``vnni`` (u8 x s8), ``sdot`` (s8 x s8), or empty.
        fp16: whether arithmetic in half precision runs at full rate.
    """

    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    cores: int
    vector_bits: int
    l1d: int = 32 << 10
    l2: int = 512 << 10
    dot: str = ""
    fp16: bool = False

    @property
    def isa(self) -> str:
        """``x86_64`` or ``aarch64``."""
        return self.triple.split("-", 1)[0]

    @property
    def registers(self) -> int:
        """Vector registers that the instruction set has."""
        return _VECTOR_REGISTERS.get((self.isa, self.vector_bits), 16)

    def lanes(self, dtype: str = "float32") -> int:
        """Elements of a type in one vector register."""
        bits = int("".join(character for character in dtype if character.isdigit()) or 8)
        return max(1, self.vector_bits // bits)
