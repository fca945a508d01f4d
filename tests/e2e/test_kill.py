"""`kill -9` at random moments: the same command then completes, and nothing half-written is left."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, Forge, edit_targets


@pytest.mark.slow  # more than twenty builds
def test_killed_builds_go_on(tmp_path: Path) -> None:
    recipe = tmp_path / "digits"
    shutil.copytree(ROOT / "recipes" / "digits", recipe)
    forge = Forge(tmp_path / "home", tmp_path)
    begun = time.monotonic()
    assert forge("build", recipe).code == 0
    whole = time.monotonic() - begun
    dice = random.Random(20261122)
    digests = set()
    kills = 0
    while kills < 24:
        # A cold cache every few kills, so that they fall into every part of the build.
        if kills % 4 == 0:
            shutil.rmtree(forge.home)
            shutil.rmtree(forge.cwd / "dist", ignore_errors=True)
            edit_targets(recipe, {"t4": ["fp16"], "cortex-a76": ["fp32"], "x86-64": ["fp32"]})
        process = subprocess.Popen(
            forge.argv("build", recipe),
            cwd=tmp_path,
            env=forge.env(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=dice.uniform(0.05, whole))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        bundle = tmp_path / "dist" / "digits-1.0.0"
        if bundle.exists():
            assert forge("verify", bundle, "--no-run").code == 0
        assert forge("cache", "verify").code == 0
        if kills % 4 == 0:
            done = forge("build", recipe, "--json")
            assert done.code == 0, done.err
            assert forge("verify", bundle, "--no-run").code == 0
            records = done.json["variants"]
            # TensorRT-RTX engines are not reproducible byte for byte; everything else is.
            digests.add(tuple(record["artifact"]["digest"] for record in records if record["target"] != "t4"))
            assert [
                path for path in (tmp_path / "dist").iterdir() if path != bundle and not path.name.startswith(".")
            ] == []
    assert len(digests) == 1


@pytest.mark.slow  # waits for children to die
def test_no_child_outlives_an_interrupted_build(tmp_path: Path) -> None:
    """SIGTERM ends the build with 130 and takes its children with it; so does kill -9, within moments."""
    recipe = tmp_path / "digits"
    shutil.copytree(ROOT / "recipes" / "digits", recipe)
    forge = Forge(tmp_path / "home", tmp_path)
    for sent, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            forge.argv("build", recipe),
            cwd=tmp_path,
            env=forge.env(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        children = _wait_for_children(str(forge.home))
        assert children
        process.send_signal(sent)
        assert process.wait(timeout=120) == code
        deadline = time.monotonic() + 60
        while _children(str(forge.home)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _children(str(forge.home)) == []
        shutil.rmtree(forge.home)


def _wait_for_children(home: str) -> list[str]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := _children(home):
            return found
        time.sleep(0.05)
    return []


def _children(home: str) -> list[str]:
    """Worker processes that work below this cache folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "modelforge.toolchains.child" in words and any(home in word for word in words):
            found.append(path.parent.name)
    return found
