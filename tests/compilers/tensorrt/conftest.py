"""The double of TensorRT for in-process tests: found as a real one would be, through the search paths of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelforge.compilers.tensorrt import device
from tests.doubles.install_tensorrt import Doubles, install


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Doubles]]:
    """Install the double: ``double(version=…, sm=…, memory=…)``. MODELFORGE_HOME is a folder of the test."""

    def make(**settings: object) -> Doubles:
        doubles = install(tmp_path / "installed", **settings)  # type: ignore[arg-type]  # as install() takes them
        monkeypatch.syspath_prepend(str(doubles.folder))
        monkeypatch.setenv("LD_LIBRARY_PATH", doubles.env["LD_LIBRARY_PATH"])
        return doubles

    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
    yield make
    device._gpus.cache_clear()
