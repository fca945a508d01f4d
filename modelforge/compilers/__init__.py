"""Compilers: one module each, found by the entry point group ``modelforge.compilers``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from modelforge.errors import BuildError, nearest

if TYPE_CHECKING:  # every child process that runs a compiler imports this package: it stays light
    from importlib.metadata import EntryPoints

    from modelforge.compilers.protocol import Compiler

GROUP = "modelforge.compilers"


@cache
def compiler_names() -> frozenset[str]:
    """The compilers that are built: ours, and those that other installed packages add."""
    return frozenset(point.name for point in _points())


@cache
def get_compiler(name: str) -> Compiler:
    """The compiler of that name.

    Raises:
        BuildError: there is none, or its module cannot be imported.
    """
    for point in _points():
        if point.name == name:
            try:
                compiler: Compiler = point.load()()
            except Exception as error:  # another package's module may raise anything; only this compiler is lost
                raise BuildError(f'the compiler "{name}" cannot be loaded: {error}', where=point.value) from error
            return compiler
    raise BuildError(f'there is no compiler "{name}"; {nearest(name, compiler_names())}')


def _points() -> EntryPoints:
    from importlib.metadata import entry_points  # slow to import, and no child process asks

    return entry_points(group=GROUP)
