"""One environment of the real toolchain for all tests here, and the digits model as QNN gets it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelforge.compilers.protocol import CompileJob
from modelforge.graph.fp16 import convert_fp16
from modelforge.graph.prepare import prepare
from modelforge.quantize.calibrate import calibrate
from modelforge.quantize.qdq import quantize_model
from modelforge.recipe import Dim
from modelforge.target import Registry, Target
from tests.compilers.installed import home_with
from tests.conftest import ROOT

DIGITS = ROOT / "recipes" / "digits"


@pytest.fixture(scope="session")
def qualcomm_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home_with("qualcomm", tmp_path_factory.mktemp("qualcomm"))


@pytest.fixture
def installed(qualcomm_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment is the one that the compiler finds."""
    monkeypatch.setenv("MODELFORGE_HOME", str(qualcomm_home))
    return qualcomm_home


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    prepare(DIGITS / "model.onnx", folder, {"x": ("batch", 1, 8, 8)}, sizes={"batch": 2})
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def int8(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    table = calibrate(prepared, DIGITS / "calibration.npz")
    quantize_model(prepared, table, folder, dialect="qualcomm")
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def fp16(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp16")
    convert_fp16(prepared, folder, keep_fp32=set())
    return folder / "model.onnx"


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of the digits: no multiple of the gear that they run at."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(DIGITS / "evaluation.npz") as archive:
        np.savez(path, x=archive["x"][:5])
    return path


@pytest.fixture
def v73() -> Target:
    return Registry().get("qualcomm-htp-v73")


def job(model: Path, target: Target, workdir: Path, precision: str = "int8", **options: object) -> CompileJob:
    """A compile job for the digits at two batches."""
    workdir.mkdir(parents=True)
    dims = {"batch": Dim(values=(1, 3))}
    inputs = {"x": ("batch", 1, 8, 8)}
    return CompileJob(model, target, precision, inputs, dims, workdir, 120.0, dict(options))
