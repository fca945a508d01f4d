"""The real toolkit, where it is installed: its environment is shared by all tests, and nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.compilers.rockchip import toolchain
from modelforge.store import default_home
from modelforge.toolchains.environments import Environment, find
from tests.conftest import Forge


@pytest.fixture(scope="session")
def environment() -> Environment:
    found = find(toolchain())
    if not isinstance(found, Environment):
        pytest.skip("needs `modelforge toolchain install rockchip --accept-license`")
    return found


@pytest.fixture
def rockchip_forge(environment: Environment, tmp_path: Path) -> Forge:
    """The program with a cache of its own, and the toolchains that are installed."""
    forge = Forge(tmp_path / "home", tmp_path)
    forge.home.mkdir()
    (forge.home / "toolchains").symlink_to(default_home() / "toolchains")
    return forge
