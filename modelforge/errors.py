"""Everything that can go wrong, one exit code per branch.

ModelForgeError
 ├── BuildError          exit 1   a step failed: a compiler refused, crashed or ran out of time
 ├── InputError          exit 2   bad input, told before any slow step
 │    ├── RecipeError             the recipe, or a command-line value that stands for one
 │    ├── TargetError             a target profile, or a tag that names none
 │    ├── ModelError              the ONNX model
 │    ├── DataError               calibration or evaluation data
 │    └── UnsupportedError        a model, precision or shape that a compiler or target cannot have
 ├── AccuracyError       exit 3   a gate that was not met
 ├── ToolchainMissing    exit 4   vendor software that is not installed here
 └── IntegrityError      exit 5   a digest, signature or registry that says no
      └── RegistryError           a registry that cannot be reached, or refuses

Every message says what was wrong, where, and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED = 130


class ModelForgeError(Exception):
    """Base of all errors that a user can meet.

    Args:
        what: one sentence that says what is wrong.
        where: the file, key, node or command that it is about.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix
        self.reported = False
        """Whether the JSON document on stdout tells it already."""

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.fix is None else f"{text}\n  how to mend: {self.fix}"


class BuildError(ModelForgeError):
    """A step of a build failed."""

    exit_code = 1


class InputError(ModelForgeError):
    """Bad input: refused before any slow step."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe, or a command-line value that stands for a recipe key."""


class TargetError(InputError):
    """A target profile is wrong, or a tag names none."""


class ModelError(InputError):
    """The ONNX model cannot be used."""


class DataError(InputError):
    """Calibration or evaluation data cannot be used."""


class UnsupportedError(InputError):
    """The compiler or the target cannot have this model, precision or shape."""


class AccuracyError(ModelForgeError):
    """A variant did not meet its accuracy gate."""

    exit_code = 3


class ToolchainMissing(ModelForgeError):
    """Vendor software that a required target needs is not installed here."""

    exit_code = 4


class IntegrityError(ModelForgeError):
    """A digest, a signature or a registry says no."""

    exit_code = 5


class RegistryError(IntegrityError):
    """A registry cannot be reached, or refuses. ``status`` is that of HTTP, None where none came."""

    def __init__(
        self, what: str, *, where: str | None = None, fix: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.status = status


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant: ``did you mean "opt"?`` or the list of all that are known."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return "known: " + ", ".join(words)
