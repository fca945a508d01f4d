"""One environment of the real toolchain for all tests here, and the digits as int8 and as float TFLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.compilers.ethos_u import toolchain
from modelforge.toolchains import environments
from modelforge.toolchains.environments import Environment
from tests.compilers.ethos_u.digits import describe, write
from tests.compilers.installed import home_with


@pytest.fixture(scope="session")
def ethos_u_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home_with("ethos-u", tmp_path_factory.mktemp("ethos-u"))


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
