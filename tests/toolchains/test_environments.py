"""Toolchain environments, with a third party's package that is a double: a real venv by uv, and a worker in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelforge.errors import BuildError, InputError, ToolchainMissing, UnsupportedError
from modelforge.toolchains import environments
from modelforge.toolchains.definition import Definition, load_definition
from modelforge.toolchains.environments import Broken, Environment, call, find, install, remove, require

DUMMY = Path(__file__).parent.parent / "doubles" / "dummy_toolchain"


@pytest.fixture(scope="module")
def definition() -> Definition:
    return load_definition("dummy", DUMMY / "dummy_toolchain" / "toolchain.toml")


@pytest.fixture(scope="module")
def installed(definition: Definition, tmp_path_factory: pytest.TempPathFactory) -> tuple[Environment, Path]:
    home = tmp_path_factory.mktemp("home")
    environment, made = install(definition, accept_license=True, home=home)
    assert made
    return environment, home


def spoiled(definition: Definition, installed: tuple[Environment, Path], tmp_path: Path) -> Path:
    """A copy of the environment to spoil; gives its folder."""
    shutil.copytree(installed[1], tmp_path / "home", symlinks=True)
    found = find(definition, tmp_path / "home")
    assert isinstance(found, Environment)
    return found.folder


def ask(environment: Environment, tmp_path: Path, timeout: float = 60, **request: Any) -> dict[str, Any]:
    return call(environment, request, workdir=tmp_path / "work", timeout=timeout, what="the dummy")


def test_the_worker_runs_in_its_own_environment(installed: tuple[Environment, Path], tmp_path: Path) -> None:
    answer = ask(installed[0], tmp_path)
    assert answer["greeting"] == "hello"
    assert answer["isolated"] == 1
    assert answer["version"] == "25.12.19"
    assert not answer["modelforge"]
    assert any(str(installed[0].folder) in place for place in answer["path"])
    assert "a vendor prints" in (tmp_path / "work" / "worker.log").read_text()


@pytest.mark.parametrize("how", ["crash", "exit", "half", "garbage", "wrong"])
def test_a_worker_that_misbehaves_is_a_clear_failure(
    installed: tuple[Environment, Path], tmp_path: Path, how: str
) -> None:
    with pytest.raises(
        BuildError, match=r"the dummy (was killed by SIGABRT|ended with exit code 0 and gave no answer)"
    ):
        ask(installed[0], tmp_path, how=how)


def test_a_worker_that_hangs_is_stopped(installed: tuple[Environment, Path], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="was stopped after"):
        ask(installed[0], tmp_path, how="hang", timeout=1)


def test_no_child_of_a_worker_survives(installed: tuple[Environment, Path], tmp_path: Path) -> None:
    child = ask(installed[0], tmp_path, how="child")["child"]
    for _ in range(1500):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    pytest.fail("the worker's child still runs")


def test_a_worker_names_the_branch_of_its_error(installed: tuple[Environment, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the dummy: no such operator") as caught:
        ask(installed[0], tmp_path, how="error")
    assert (caught.value.where, caught.value.fix) == ("node n", "export anew")


def test_the_licence_must_be_accepted(definition: Definition, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Dummy Licence") as caught:
        install(definition, accept_license=False, home=tmp_path)
    assert "--accept-license" in (caught.value.fix or "")
    assert "LICENCE of the dummy" in (caught.value.fix or "")
    assert list(tmp_path.iterdir()) == []


def test_the_choice_is_recorded_and_the_identity_is_stable(
    definition: Definition, installed: tuple[Environment, Path]
) -> None:
    environment, home = installed
    assert environment.accepted == "Dummy Licence"
    again, made = install(definition, accept_license=False, home=home)  # accepted once, here already
    assert not made
    assert again.identity == environment.identity
    assert environment.versions == {"flatbuffers": "25.12.19", "dummy-environment": environment.identity[:23]}


@pytest.mark.parametrize("spoil", ["manifest", "python", "package", "record"])
def test_a_broken_environment_is_told_and_mended(
    definition: Definition, installed: tuple[Environment, Path], tmp_path: Path, spoil: str
) -> None:
    folder = spoiled(definition, installed, tmp_path)
    site = next(folder.glob("lib/python*/site-packages"))
    if spoil == "manifest":
        (folder / "installed.json").write_text('{"schema": 1')
    elif spoil == "python":
        (folder / "bin" / "python").unlink()
    elif spoil == "package":
        shutil.rmtree(next(site.glob("flatbuffers-*.dist-info")))
    else:
        next(site.glob("flatbuffers-*.dist-info/RECORD")).write_text("changed")
    assert isinstance(find(definition, tmp_path / "home"), Broken)
    with pytest.raises(ToolchainMissing, match="is broken") as caught:
        require(definition, tmp_path / "home")
    assert caught.value.fix == "modelforge toolchain install dummy --accept-license"
    environment, made = install(definition, accept_license=True, home=tmp_path / "home")
    assert made
    assert environment.identity == installed[0].identity


def test_a_package_that_cannot_be_had_leaves_nothing(definition: Definition, tmp_path: Path) -> None:
    from dataclasses import replace

    absent = replace(definition, packages=("flatbuffers==0.0.1.dev999",))
    with pytest.raises(BuildError, match="installing The dummy toolchain"):
        install(absent, accept_license=True, home=tmp_path)
    assert find(absent, tmp_path) is None
    assert not list((tmp_path / "toolchains" / "dummy").glob(".part-*"))


def test_two_installations_at_once_make_one(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from modelforge.toolchains.definition import load_definition\n"
        "from modelforge.toolchains.environments import install\n"
        "made = install(load_definition('dummy', Path(sys.argv[1])), accept_license=True, home=Path(sys.argv[2]))[1]\n"
        "print(made)\n"
    )
    argv = [sys.executable, "-c", code, str(DUMMY / "dummy_toolchain" / "toolchain.toml"), str(tmp_path)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].strip() for process in both]
    assert sorted(said) == ["False", "True"]


def test_no_room_is_told_before_anything_is_fetched(definition: Definition, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(BuildError, match="MiB are free"):
        install(replace(definition, install_bytes=1 << 60), accept_license=True, home=tmp_path)
    assert not (tmp_path / "toolchains").exists()


def test_a_python_that_is_not_here(definition: Definition, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ToolchainMissing, match=r"needs Python 3\.2") as caught:
        install(replace(definition, python=("3.2",)), accept_license=True, home=tmp_path)
    assert "install python3.2" in (caught.value.fix or "")


def test_remove(definition: Definition, installed: tuple[Environment, Path], tmp_path: Path) -> None:
    spoiled(definition, installed, tmp_path)
    assert remove(definition, tmp_path / "home")
    assert find(definition, tmp_path / "home") is None
    assert not remove(definition, tmp_path / "home")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('packages = ["flatbuffers"]', "every package is pinned"),
        ('packages = ["flatbuffers==25.12.19"]\nprobes = "x"', 'unknown key "probes"'),
        ('packages = ["numpy==2.0.0"]', "not among the packages"),
    ],
)
def test_a_wrong_definition_is_explained(tmp_path: Path, text: str, words: str) -> None:
    original = (DUMMY / "dummy_toolchain" / "toolchain.toml").read_text()
    (tmp_path / "toolchain.toml").write_text(original.replace('packages = ["flatbuffers==25.12.19"]', text))
    (tmp_path / "worker.py").write_text("")
    with pytest.raises(ToolchainMissing) as caught:
        load_definition("dummy", tmp_path / "toolchain.toml")
    assert words in str(caught.value)


def test_a_third_party_toolchain_from_the_command_line(tmp_path: Path) -> None:
    """Found by its entry point alone: its package is on the path, and nothing of ours names it."""

    def modelforge(*args: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(DUMMY), "MODELFORGE_HOME": str(tmp_path)}
        argv = [sys.executable, "-m", "modelforge.cli.main", "toolchain", *args]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)

    def row() -> dict[str, Any]:
        rows = json.loads(modelforge("list", "--json").stdout)["toolchains"]
        return next(each for each in rows if each["name"] == "dummy")

    assert row()["status"] == "missing"
    refused = modelforge("install", "dummy")
    assert (refused.returncode, "Dummy Licence" in refused.stderr) == (2, True)
    assert modelforge("install", "dummy", "--accept-license").returncode == 0
    assert row()["status"] == "ready"
    assert json.loads(modelforge("remove", "dummy", "--json").stdout)["removed"]
    assert row()["status"] == "missing"
    unknown = modelforge("install", "dumy")
    assert (unknown.returncode, 'did you mean "dummy"' in unknown.stderr) == (4, True), unknown.stderr


def test_environments_name_no_other_folder(installed: tuple[Environment, Path]) -> None:
    """It was made under another name and renamed: nothing in it may point there."""
    scripts = [path for path in (installed[0].folder / "bin").iterdir() if path.is_file() and not path.is_symlink()]
    assert not [path for path in scripts if b".part-" in path.read_bytes()]
    assert environments.find(installed[0].definition, installed[1]) == installed[0]
