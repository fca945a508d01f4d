"""Sessions: the environment that ATC gets, and one code path for this machine, containers and other hosts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelforge.compilers.ascend.install import Place
from modelforge.compilers.ascend.launcher import Settings, open_session
from modelforge.errors import BuildError
from tests.compilers.ascend import double
from tests.compilers.ascend.double import Double

NASTY = ["plain", "two words", "$(touch smuggled)", "a;b|c&d", "'quoted\"", "-rf", "*", "new\nline", "`x`", "é"]

SHOW = "import json, sys, os; json.dump([sys.argv[1:], dict(os.environ), os.getcwd()], open('shown.json', 'w'))"


@pytest.fixture
def made(tmp_path: Path) -> Double:
    return double.install(tmp_path)


def local(made: Double) -> Place:
    return Place("local", str(made.program), "8.2.RC1-double", made.root, made.root / "set_env.sh")


def shown(
    place: Place, workdir: Path, words: list[str], settings: Settings | None = None
) -> tuple[list[str], dict[str, str]]:
    """What a program that runs in the session sees: its words and its environment."""
    with open_session(place, workdir, workdir / "log") as session:
        finished = session.run(["python3", "-c", SHOW, *words], settings or Settings(60))
        assert finished.ok, finished.tail()
        session.get("shown.json", workdir / "shown.json")
    argv, environment, _ = json.loads((workdir / "shown.json").read_text())
    return argv, environment


def test_words_arrive_as_they_are(made: Double, tmp_path: Path) -> None:
    argv, _ = shown(local(made), tmp_path, NASTY)
    assert argv == NASTY


def test_the_environment_is_cann_s_and_not_ours(made: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").touch()
    for name, value in {"VIRTUAL_ENV": str(venv), "PYTHONPATH": "/ours", "PYTHONHOME": "/ours", "SECRET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{venv}/bin:{Path(sys.executable).parent}:/usr/bin:/bin")
    (made.root / "x86_64-linux" / "devlib").mkdir()
    _, seen = shown(local(made), tmp_path, [], Settings(60, {"TE_PARALLEL_COMPILER": "2"}))
    assert not {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "SECRET"} & set(seen)
    assert seen["ASCEND_TOOLKIT_HOME"] == str(made.root)
    assert seen["TE_PARALLEL_COMPILER"] == "2"
    # Logs and caches go away with the private folder.
    assert seen["ASCEND_WORK_PATH"] == seen["ASCEND_PROCESS_LOG_PATH"] == str(tmp_path / "atc")
    path = seen["PATH"].split(":")
    assert path[0] == str(made.root / "bin")
    assert str(venv / "bin") not in path
    assert os.path.join(sys.prefix, "bin") not in path
    # Stub libraries come last: a real driver's come first.
    assert seen["LD_LIBRARY_PATH"].split(":")[-1] == str(made.root / "x86_64-linux" / "devlib")
    assert seen["LD_LIBRARY_PATH"].split(":")[0] == str(made.root / "lib64")


def test_the_python_that_was_asked_for_comes_first(made: Double, tmp_path: Path) -> None:
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "python3").symlink_to("/usr/bin/python3")
    _, seen = shown(local(made), tmp_path, [], Settings(60, python=str(tmp_path / "py")))
    assert seen["PATH"].split(":")[0] == str(tmp_path / "py")


def test_a_limit_of_memory_holds(made: Double, tmp_path: Path) -> None:
    with open_session(local(made), tmp_path, tmp_path / "log") as session:
        hungry = ["python3", "-c", "x = bytearray(800_000_000)"]
        assert session.run(hungry, Settings(60)).ok
        finished = session.run(hungry, Settings(60, memory=400_000_000))
        assert not finished.ok
        assert "MemoryError" in finished.tail()


def test_the_folder_is_private_empty_and_gone_afterwards(made: Double, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open_session(local(made), tmp_path, tmp_path / "log") as session:
        assert session.names() == []
        session.put(tmp_path / "file", "weight/in")
        session.run(["sh", "-c", "cp weight/in out; mkdir kernel_meta; touch kernel_meta/litter"], Settings(60))
        assert session.names() == ["kernel_meta/litter", "out", "weight/in"]
        session.get("out", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"content"
    assert not (tmp_path / "atc").exists()


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "-rf", "a/b/c", "a b", ""])
def test_names_that_leave_the_folder_are_refused(name: str, made: Double, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open_session(local(made), tmp_path, tmp_path / "log") as session, pytest.raises(BuildError, match="plain"):
        session.put(tmp_path / "file", name)


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """ssh and scp to a "host" that is this machine: like sshd, the words are joined and given to a shell."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    (folder / "ssh").write_text(
        '#!/bin/bash\nwhile [ "$1" != -- ]; do shift; done\nshift\necho "$@" >> ' + f"{tmp_path}/ssh.log\n"
        '[ "$1" = builder@atlas ] || { echo "no such host" >&2; exit 255; }\nshift\nexec bash -c "$*"\n'
    )
    (folder / "scp").write_text(
        '#!/bin/bash\nwhile [ "$1" != -- ]; do shift; done\nshift\n'
        'exec cp "${1#builder@atlas:}" "${2#builder@atlas:}"\n'
    )
    for name in ("ssh", "scp"):
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return tmp_path / "ssh.log"


class TestSsh:
    HOST = Place("ssh", "builder@atlas", "8.2.RC1")

    def test_words_survive_the_other_shell(self, fake_ssh: Path, tmp_path: Path) -> None:
        argv, _ = shown(self.HOST, tmp_path, NASTY)
        assert argv == NASTY
        assert not (tmp_path / "smuggled").exists()

    def test_the_agent_is_reached(self, fake_ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The fake's far end is this machine; a real sshd hands the variable on to no program."""
        monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent")
        _, seen = shown(self.HOST, tmp_path, [])
        assert seen["SSH_AUTH_SOCK"] == "/run/agent"

    def test_files_go_in_and_out_and_the_folder_goes(self, fake_ssh: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"content")
        with open_session(self.HOST, tmp_path, tmp_path / "log") as session:
            session.put(tmp_path / "file", "model.onnx")
            session.put(tmp_path / "file", "weight/in")
            session.run(["sh", "-c", "cp model.onnx main.om"], Settings(60))
            assert session.names() == ["main.om", "model.onnx", "weight/in"]
            session.get("main.om", tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == b"content"
        folder = next(line for line in fake_ssh.read_text().splitlines() if " rm -rf -- " in line).split()[-1]
        assert Path(folder).name.startswith("modelforge.")
        assert not Path(folder).exists()

    def test_the_far_end_stops_by_itself(self, fake_ssh: Path, tmp_path: Path) -> None:
        """Killing ssh here would leave ATC running there: its own time limit ends it."""
        with open_session(self.HOST, tmp_path, tmp_path / "log") as session:
            finished = session.run(["sleep", "60"], Settings(0.5))
        assert finished.returncode == 124
        assert finished.seconds < 20

    def test_a_host_that_does_not_answer_is_told(self, fake_ssh: Path, tmp_path: Path) -> None:
        place = Place("ssh", "nobody@nowhere", "8.2.RC1")
        with (
            pytest.raises(BuildError, match="ssh ended with exit code 255"),
            open_session(place, tmp_path, tmp_path / "l"),
        ):
            pass


class TestContainer:
    IMAGE = Place("docker", "quay.io/ascend/cann:8.2.rc1-910b-ubuntu22.04-py3.11", "8.2.RC1")

    @pytest.fixture(autouse=True)
    def fake_docker(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A docker that runs the entrypoint here, in the folder that is mounted."""
        folder = tmp_path / "fakes"
        folder.mkdir()
        (folder / "docker").write_text(
            f"#!/usr/bin/python3\nimport json, os, subprocess, sys\nlog = open({str(tmp_path / 'docker.log')!r}, 'a')\n"
            "log.write(json.dumps(sys.argv[1:]) + '\\n')\nlog.close()\n"
            "if sys.argv[1] == 'rm': sys.exit()\n"
            "options = [word for word in sys.argv[2:] if word.startswith('--')]\n"
            "words = sys.argv[2 + len(options):]\n"
            "folder = next(word for word in options if word.startswith('--volume=')).split('=')[1].split(':')[0]\n"
            "os.chdir(folder)\nos.execvp('bash', ['bash', *words[1:]])\n"
        )
        (folder / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def calls(self, tmp_path: Path) -> list[list[str]]:
        return [json.loads(line) for line in (tmp_path / "docker.log").read_text().splitlines()]

    def test_it_runs_without_network_as_the_caller(self, tmp_path: Path) -> None:
        argv, _ = shown(self.IMAGE, tmp_path, NASTY, Settings(60, memory=1_000_000_000))
        assert argv == NASTY
        call = self.calls(tmp_path)[0]
        assert {"--rm", "--init", "--network=none", "--memory=1000000000"} <= set(call)
        assert f"--user={os.getuid()}:{os.getgid()}" in call
        assert call[call.index("--entrypoint=bash") + 1] == self.IMAGE.where

    def test_a_container_does_not_outlive_its_time(self, tmp_path: Path) -> None:
        with open_session(self.IMAGE, tmp_path, tmp_path / "log") as session:
            finished = session.run(["sleep", "60"], Settings(0.5))
        assert finished.timed_out
        run, removed = self.calls(tmp_path)
        name = next(word for word in run if word.startswith("--name=")).removeprefix("--name=")
        assert removed == ["rm", "--force", name]
