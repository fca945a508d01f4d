"""A store for the session, so that the runner is compiled once, and a variant that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from modelforge.compilers.protocol import CompileJob
from modelforge.compilers.tvm import TvmCompiler
from modelforge.recipe import Dim
from modelforge.target import Target
from tests.compilers.tvm.models import DIMS, INPUTS, Build, Built, conv_net, this_machine


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELFORGE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile a model for a target."""

    def compile_it(
        model: onnx.ModelProto,
        target: Target,
        inputs: dict[str, tuple[int | str, ...]] | None = None,
        dims: dict[str, Dim] | None = None,
        precision: str = "fp32",
    ) -> Built:
        folder = tmp_path_factory.mktemp("build")
        path = folder / "model.onnx"
        onnx.save(model, path)
        inputs = INPUTS if inputs is None else inputs
        dims = DIMS if dims is None else dims
        job = CompileJob(path, target, precision, inputs, dims, folder / "work", 300.0)
        job.workdir.mkdir()
        return Built(path, target, TvmCompiler().compile(job))

    return compile_it


@pytest.fixture(scope="session")
def built(build: Build) -> Built:
    """The conv net for this machine, with entries for 1, 4 and 8."""
    return build(conv_net(), this_machine())
