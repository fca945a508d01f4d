"""`kill -9` at twenty random moments of a push and of a pull: the same command then brings the rest, and only that."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from modelforge.bundle.read import Bundle, open_bundle, verify_integrity
from tests.conftest import Forge
from tests.registry.conftest import MakeBundle
from tests.registry.pulling import pull_from, push_to, tree
from tests.registry.servers import Registry, needs_registry

pytestmark = [*needs_registry, pytest.mark.slow]  # forty kills and as many whole transfers: about two minutes

MOMENTS = 20
SIZE = 40_000_000


@pytest.fixture
def bundle(make_bundle: MakeBundle) -> Bundle:  # type: ignore[override]  # a larger one here
    """Large enough that most of the time goes into the transfer: 60 MB in a target, 100 MB in all."""
    return make_bundle(size=SIZE, targets=("a100", "t4"))


def kill_when(forge: Forge, came: Callable[[], int], enough: int, *args: str | Path) -> bool:
    """Start the program and kill it once so many bytes have come through; False if it had ended before."""
    process = subprocess.Popen(
        forge.argv(*args), cwd=forge.cwd, env=forge.env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        if came() >= enough:
            process.kill()
            process.wait()
            return process.returncode == -signal.SIGKILL
        time.sleep(0.001)
    return False


def test_pulls(tmp_path: Path, forge: Forge, bundle: Bundle, repository: str) -> None:
    push_to(bundle, repository)
    (variant,) = bundle.select("t4")
    needed = {entry.digest: entry.size for entry in variant.files.values()}
    command = ("pull", f"{repository}:1.2.0", "--target", "t4", "-o", "out")
    dice = random.Random(11)
    kept_something = killed = 0
    for _ in range(MOMENTS):
        shutil.rmtree(forge.home, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        enough = dice.randrange(sum(needed.values()))
        killed += kill_when(forge, lambda: present(forge.home, needed), enough, *command)
        if (tmp_path / "out").exists():
            assert verify_integrity(tmp_path / "out").digest == bundle.digest, "whole, or not there at all"
            shutil.rmtree(tmp_path / "out")
        kept = present(forge.home, needed)
        kept_something += 0 < kept < sum(needed.values())
        again = forge(*command, "--json")
        assert again.code == 0, again.err
        assert again.json["fetched"] == sum(needed.values()) - kept
        assert open_bundle(tmp_path / "out").select("t4") == (variant,)
        assert verify_integrity(tmp_path / "out").digest == bundle.digest
        assert not list(tmp_path.glob(".part-*")), "what the killed one left is swept"
    assert killed >= MOMENTS // 2
    assert kept_something >= 3, "some were killed in the middle of the transfer"


def test_pushes(tmp_path: Path, forge: Forge, bundle: Bundle, open_registry: Registry) -> None:
    """docker-registry throws away an upload that broke within a chunk: what lacks is counted in whole blobs."""
    documents = {bundle.digest, *bundle.manifests}
    blobs = {digest: size for digest, size in bundle.blobs.items() if digest not in documents}
    dice = random.Random(12)
    killed = between = 0
    for number in range(MOMENTS):
        place = fresh(open_registry)
        enough = dice.randrange(sum(blobs.values()))
        killed += kill_when(forge, partial(uploaded, open_registry, place, blobs), enough, "push", bundle.path, place)
        there = in_registry(open_registry, place)
        lacking = sum(size for digest, size in blobs.items() if digest not in there)
        between += 0 < lacking < sum(blobs.values())
        again = forge("push", bundle.path, place, "--json")
        assert again.code == 0, again.err
        assert again.json["sent"] <= lacking
        assert again.json["digest"] == bundle.digest
        assert forge("push", bundle.path, place, "--json").json["sent"] == 0
        if number % 10 == 0:
            pull_from(f"{place}:1.2.0", None, tmp_path / f"all{number}")
            assert tree(tmp_path / f"all{number}") == tree(bundle.path)
    assert killed >= MOMENTS // 2
    assert between >= 1, "some were killed between two blobs"


def fresh(registry: Registry) -> str:
    """A repository that holds nothing; its blobs are not those of another one."""
    return f"{registry.host}/killed/r{uuid.uuid4().hex}"


def present(home: Path, needed: dict[str, int]) -> int:
    """Bytes of the needed blobs that the store has, whole or in part."""
    total = 0
    for digest in needed:
        for file in (home / "blobs" / "sha256" / digest[7:], home / "ingest" / f"{digest[7:]}.part"):
            with contextlib.suppress(OSError):  # not there, or moved since it was looked for
                total += file.stat().st_size
    return total


def uploaded(registry: Registry, place: str, blobs: dict[str, int]) -> int:
    """Bytes that a repository has, begun uploads included."""
    begun = registry.root / "docker/registry/v2/repositories" / place.partition("/")[2] / "_uploads"
    total = sum(blobs[digest] for digest in in_registry(registry, place))
    for data in begun.glob("*/data"):
        with contextlib.suppress(OSError):  # finished since it was listed
            total += data.stat().st_size
    return total


def in_registry(registry: Registry, place: str) -> set[str]:
    """The blobs that a repository of the registry leads to, as its files say."""
    layers = registry.root / "docker/registry/v2/repositories" / place.partition("/")[2] / "_layers/sha256"
    return {f"sha256:{path.parent.name}" for path in layers.glob("*/link")}
