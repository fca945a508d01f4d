"""Homes for tests on real toolchains: those that are installed are linked in, and nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.store import default_home
from modelforge.toolchains.definition import get_definition
from modelforge.toolchains.environments import Environment, find


def home_with(toolchain: str, folder: Path) -> Path:
    """A home with a cache of its own; the test is skipped where the toolchain is not installed."""
    if not isinstance(find(get_definition(toolchain)), Environment):
        pytest.skip(f"needs `modelforge toolchain install {toolchain} --accept-license`")
    folder.mkdir(exist_ok=True)
    (folder / "toolchains").symlink_to(default_home() / "toolchains")
    return folder
