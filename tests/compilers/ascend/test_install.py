"""Finding ATC: by files and names alone, never by running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelforge.compilers.ascend import install
from modelforge.compilers.ascend.install import NotHere, Place, find, read_version
from modelforge.toolchains import process
from tests.compilers.ascend import double


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without CANN, on which starting a process is an error."""
    for name in ("MODELFORGE_ATC", "MODELFORGE_CANN_VERSION", "ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setattr(install, "_ROOTS", ())
    monkeypatch.setattr(process, "run", lambda *_, **__: pytest.fail("a process was started"))


def test_nothing_is_here() -> None:
    found = find()
    assert isinstance(found, NotHere)
    assert "no ATC is installed" in found.reason
    assert "MODELFORGE_ATC" in found.fix


@pytest.mark.parametrize("where", ["root", "program"])
def test_the_variable_names_an_install_or_its_program(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double.install(tmp_path, "7.0.0")
    monkeypatch.setenv("MODELFORGE_ATC", str(made.root if where == "root" else made.program))
    found = find()
    assert found == Place("local", str(made.program), "7.0.0-double", made.root, made.root / "set_env.sh")


@pytest.mark.parametrize("variable", ["ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "PATH", "HOME"])
def test_a_local_install_is_found(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = double.install(tmp_path if variable != "HOME" else tmp_path / "Ascend")
    value = {"PATH": made.program.parent, "HOME": tmp_path}.get(variable, made.root)
    monkeypatch.setenv(variable, str(value))
    found = find()
    assert isinstance(found, Place)
    assert found.where == str(made.program)


def test_a_variable_that_names_no_atc_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The install that PATH has is not taken instead: what the user said is wrong."""
    monkeypatch.setenv("PATH", str(double.install(tmp_path).program.parent))
    monkeypatch.setenv("MODELFORGE_ATC", str(tmp_path / "gone"))
    found = find()
    assert isinstance(found, NotHere)
    assert "gone" in found.reason


def test_an_atc_without_a_version_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = double.install(tmp_path)
    (made.root / "x86_64-linux" / "ascend_toolkit_install.info").unlink()
    monkeypatch.setenv("MODELFORGE_ATC", str(made.root))
    found = find()
    assert isinstance(found, NotHere)
    assert "no version file" in found.reason


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        (
            "ascend_toolkit_install.info",
            "package_name=Ascend-cann-toolkit\nversion=8.0.RC1\ninnerversion=V1\n",
            "8.0.RC1",
        ),
        ("aarch64-linux/ascend_toolkit_install.info", "version=7.0.0\npath=/x\n", "7.0.0"),
        ("compiler/version.info", "Version=7.3.0.1.231\nversion_dir=8.0.RC2\ntimestamp=1\n", "8.0.RC2"),
        ("compiler/version.info", "Version=1.84.15.1.310\n", "1.84.15.1.310"),
        ("version.cfg", "# version: 1.0\nruntime_running_version=[1.84.15.1.310:6.0.1]\n", "6.0.1"),
    ],
)
def test_versions_as_cann_writes_them(file: str, text: str, version: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert read_version(tmp_path) == version


def test_devlib_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = double.install(tmp_path)
    (made.root / "x86_64-linux" / "devlib").mkdir()
    monkeypatch.setenv("MODELFORGE_ATC", str(made.root))
    found = find()
    assert isinstance(found, Place)
    assert found.devlib == (made.root / "x86_64-linux" / "devlib",)


class TestElsewhere:
    @pytest.fixture(autouse=True)
    def programs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("docker", "ssh"):
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def test_an_image_tells_its_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = "quay.io/ascend/cann:8.2.rc1-910b-ubuntu22.04-py3.11"
        monkeypatch.setenv("MODELFORGE_ATC", f"docker:{image}")
        assert find() == Place("docker", image, "8.2.RC1")

    def test_a_host_has_to_be_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MODELFORGE_ATC", "ssh:builder@atlas")
        found = find()
        assert isinstance(found, NotHere)
        assert "MODELFORGE_CANN_VERSION" in found.fix
        monkeypatch.setenv("MODELFORGE_CANN_VERSION", "8.0.RC3")
        assert find() == Place("ssh", "builder@atlas", "8.0.RC3")

    @pytest.mark.parametrize("where", ["-oProxyCommand=touch x", "a b", "host;reboot", ""])
    def test_a_name_that_smuggles_is_refused(self, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MODELFORGE_CANN_VERSION", "8.0.RC3")
        monkeypatch.setenv("MODELFORGE_ATC", f"ssh:{where}")
        found = find()
        assert isinstance(found, NotHere)
        assert "no name of a host" in found.reason

    def test_a_missing_program_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MODELFORGE_ATC", "podman:an/image:8.0.0-310p")
        found = find()
        assert isinstance(found, NotHere)
        assert "podman" in found.reason
