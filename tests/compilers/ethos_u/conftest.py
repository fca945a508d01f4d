"""One environment of the real toolchain for all tests here, and the digits as int8 and as float TFLite."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelforge.compilers.ethos_u import toolchain
from modelforge.errors import ModelForgeError
from modelforge.toolchains import environments
from modelforge.toolchains.environments import Environment
from tests.compilers.ethos_u.digits import describe, write


@pytest.fixture(scope="session")
def ethos_u_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home that holds the installed environment; removed at the end."""
    home = tmp_path_factory.mktemp("ethos-u")
    try:
        environments.install(toolchain(), accept_license=False, home=home)
    except ModelForgeError as error:
        pytest.skip(f"the ethos-u toolchain cannot be had here: {error.what}")
    yield home
    shutil.rmtree(home / "toolchains", ignore_errors=True)


@pytest.fixture(scope="session")
def environment(ethos_u_home: Path) -> Environment:
    return environments.require(toolchain(), ethos_u_home)


@pytest.fixture(scope="session")
def int8_tflite(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    return write(describe(folder), folder / "digits.tflite", environment.python)


@pytest.fixture(scope="session")
def float_tflite(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    return write(describe(folder, floats=True), folder / "digits.tflite", environment.python)
