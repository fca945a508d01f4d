"""What compilers share whose toolchain has an environment of its own (:mod:`modelforge.toolchains.environments`)."""

from __future__ import annotations

from modelforge.compilers.protocol import Missing, Toolchain
from modelforge.toolchains.definition import Definition
from modelforge.toolchains.environments import Environment, find, install_command


def probe_environment(definition: Definition) -> Toolchain | Missing:
    """Say whether a toolchain's environment is here and whole, for :meth:`Compiler.probe`. Costs milliseconds."""
    found = find(definition)
    if isinstance(found, Environment):
        return Toolchain(versions=found.versions)
    reason = "its environment is not installed" if found is None else f"its environment is broken: {found.reason}"
    return Missing(reason=reason, fix=install_command(definition))
