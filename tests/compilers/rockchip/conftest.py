"""The real toolkit, where it is installed: its environment is shared by all tests, and nothing is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.compilers.rockchip import toolchain
from modelforge.toolchains.environments import Environment, find
from tests.compilers.installed import home_with
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
    del environment  # it is there: one home for what is built, another for what is installed
    return Forge(home_with("rockchip", tmp_path / "home"), tmp_path)
