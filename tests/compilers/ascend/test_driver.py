"""One run of ATC against the double: what counts as success, and a clear failure for everything else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from modelforge.compilers.ascend.driver import Run, run_atc, survey
from modelforge.compilers.ascend.install import Place
from modelforge.compilers.ascend.launcher import Settings
from modelforge.errors import BuildError, ModelForgeError, UnsupportedError
from tests.compilers.ascend import double
from tests.compilers.ascend.double import Double
from tests.compilers.ascend.models import conv_model


@pytest.fixture
def made(tmp_path: Path) -> Double:
    return double.install(tmp_path)


def place(made: Double) -> Place:
    return Place("local", str(made.program), "8.2.RC1-double", made.root, made.root / "set_env.sh")


def run(made: Double, tmp_path: Path, *extra: str, model: Path | None = None, timeout: float = 60.0) -> dict[str, Path]:
    workdir = tmp_path / "work"
    workdir.mkdir(exist_ok=True)
    words = ("--model=model.onnx", "--framework=5", "--output=main", "--soc_version=Ascend310P3", *extra)
    files = {"model.onnx": model or conv_model(tmp_path / "m.onnx")}
    call = Run(("atc", *words), files, "main", weights="--external_weight=1" in extra)
    return run_atc(place(made), call, Settings(timeout), workdir, tmp_path / "log", "ATC, compiling main")


def test_a_good_run(made: Double, tmp_path: Path) -> None:
    files = run(made, tmp_path)
    assert list(files) == ["main.om"]
    data = files["main.om"].read_bytes()
    assert data.startswith(b"IMOD")
    # The .om embeds the command line: no path of this machine may be in it.
    assert str(tmp_path).encode() not in data
    assert "ATC run success" in (tmp_path / "log").read_text()
    (call,) = made.calls
    assert call["leaked"] == []
    assert call["argv"][0] == "--model=model.onnx"
    # Litter (kernel_meta, fusion_result.json) went with the private folder.
    assert not Path(call["cwd"]).exists()


def test_a_name_bound_to_its_host_is_found_by_listing(made: Double, tmp_path: Path) -> None:
    model = conv_model(tmp_path / "open.onnx", "n")
    files = run(
        made, tmp_path, "--input_shape=x:-1,3,8,8", "--host_env_os=linux", "--host_env_cpu=aarch64", model=model
    )
    assert list(files) == ["main_linux_aarch64.om"]


def test_weights_of_their_own_come_along_flat(made: Double, tmp_path: Path) -> None:
    assert list(run(made, tmp_path, "--external_weight=1")) == ["main.om", "weight-weight_0"]


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("nothing", "did not say that it succeeded"),
        ("exit 0 without om", "did not say that it succeeded"),
        ("no success line", "did not say that it succeeded"),
        ("success line without om", "left no .om"),
        ("success line, then 255", "exit code 255"),
        ("empty om", "0 bytes"),
        ("no model", "does not begin with IMOD"),
        ("two om", "where main.om was expected"),
        ("killed", "killed by SIGKILL"),
        ("loader", "exit code 127"),
    ],
)
def test_what_is_no_success_fails(behaviour: str, says: str, made: Double, tmp_path: Path) -> None:
    made.drive(behaviour)
    with pytest.raises(BuildError, match="ATC, compiling main") as caught:
        run(made, tmp_path)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message", "kind", "says"),
    [
        (
            "E19010",
            "No parser is registered for Op [div, optype [ai.onnx::23::Div]].",
            UnsupportedError,
            "div (Div, opset 23)",
        ),
        (
            "E10016",
            "Opname [y] specified in [--input_shape] is not found in the model.",
            UnsupportedError,
            "usage, E10016",
        ),
        ("EC0010", "Failed to import Python module [No module named 'decorator'].", BuildError, "environment, EC0010"),
        ("E19999", "Inner Error!", BuildError, "internal, E19999"),
    ],
)
@pytest.mark.parametrize("stamp", ["", "[PID: 4242] 2025-06-01-12:00:00.000.000 "], ids=["CANN 7", "CANN 8"])
def test_a_failure_is_read(
    code: str, message: str, kind: type[ModelForgeError], says: str, stamp: str, made: Double, tmp_path: Path
) -> None:
    made.drive(code=code, message=message, stamp=stamp)
    with pytest.raises(kind) as caught:
        run(made, tmp_path)
    assert says in str(caught.value)
    assert caught.value.fix


def test_a_kill_is_told_as_a_lack_of_memory(made: Double, tmp_path: Path) -> None:
    made.drive("killed")
    with pytest.raises(BuildError, match=r"resource.*memory"):
        run(made, tmp_path)


def test_a_lost_library_is_told_as_the_environment(made: Double, tmp_path: Path) -> None:
    made.drive("loader")
    with pytest.raises(BuildError, match="environment"):
        run(made, tmp_path)


def test_a_hanging_run_leaves_no_process(made: Double, tmp_path: Path) -> None:
    made.drive("hangs", pids=str(tmp_path / "pids"))
    with pytest.raises(BuildError, match="time limit"):
        run(made, tmp_path, timeout=8.0)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    """Whether a process runs; one that was killed may take a moment to be reaped."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        os.sched_yield()
    return True


def test_a_leaked_environment_would_have_been_noticed(
    made: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The double dies of what kills the real one; with our environment scrubbed, it does not."""
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"):
        monkeypatch.setenv(name, "/ours")
    run(made, tmp_path)
    (made.root / "set_env.sh").write_text((made.root / "set_env.sh").read_text() + "export PYTHONPATH=/ours\n")
    with pytest.raises(BuildError, match="EC0010"):
        run(made, tmp_path)


def test_a_program_that_is_gone_is_told(made: Double, tmp_path: Path) -> None:
    made.program.unlink()
    with pytest.raises(BuildError, match="exit code 127"):
        run(made, tmp_path)


class TestSurvey:
    def test_it_gives_the_help_text(self, made: Double, tmp_path: Path) -> None:
        text = survey(place(made), Settings(60), tmp_path, tmp_path / "log")
        assert "--soc_version" in text

    def test_an_atc_that_cannot_run_is_told_before_any_model(self, made: Double, tmp_path: Path) -> None:
        made.drive("loader")
        with pytest.raises(BuildError, match="environment"):
            survey(place(made), Settings(60), tmp_path, tmp_path / "log")
