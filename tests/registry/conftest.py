"""A bundle for four targets, a registry that is started once, and the program with a store of its own."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.read import Bundle, open_bundle
from modelforge.registry.limits import Limits
from modelforge.store import Store
from tests.bundle.bundle_contents import compiled_record
from tests.registry.servers import REGISTRY, Registry, docker_registry

TARGETS = ("a100", "cortex-a76", "jetson-agx-orin", "t4")
QUICK = Limits(
    connect=60.0, answer=60.0, idle=60.0, window=60.0, document=60.0, attempts=3, patience=60.0, backoff=0.01,
    longest_wait=0.05, progress=1000, chunk=1 << 20, pages=20,
)  # fmt: skip
"""Bounds for tests: few attempts that follow at once, and all the time that an answer may take on a busy machine."""
HASTY = replace(QUICK, connect=2.0, answer=0.5, idle=0.3, window=0.3, document=0.6, patience=2.0)
"""Where a test waits for the end of patience: an honest answer may come too late as well."""

MakeBundle = Callable[..., Bundle]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Write a bundle of made-up variants, which share a lowered model: the same bytes in every run."""
    return partial(write_made_up, tmp_path)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One for all tests: they only read it."""
    return write_made_up(tmp_path_factory.mktemp("bundle"))


def write_made_up(
    parent: Path, *, version: str = "1.2.0", size: int = 200_000, targets: tuple[str, ...] = TARGETS, seed: int = 7
) -> Bundle:
    folder = parent / f"sources-{version}-{seed}"
    folder.mkdir()
    dice = random.Random(seed)
    (folder / "lowered.onnx").write_bytes(dice.randbytes(size // 2))
    variants = []
    for target in targets:
        engine = folder / f"{target}.engine"
        engine.write_bytes(dice.randbytes(size))
        files = [
            BundleFile("main.engine", "artifact", "application/octet-stream", engine),
            BundleFile("lowered.onnx", "lowered-model", "application/vnd.onnx", folder / "lowered.onnx"),
        ]
        variants.append(VariantContent(compiled_record(target, engine), files))
    content = BundleContent("ppocr-cls", version, {"serving": {"task": "ocr"}}, variants)
    return open_bundle(write_bundle(parent / f"bundle-{version}-{seed}", content).path)


@pytest.fixture(scope="session")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """docker-registry without a login; tests use repositories of their own."""
    if REGISTRY is None:
        pytest.skip("docker-registry is not installed (apt install docker-registry)")
    with docker_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def repository(open_registry: Registry) -> str:
    """``HOST/REPO``, empty."""
    return f"{open_registry.host}/test/r{uuid.uuid4().hex}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture(autouse=True)
def nothing_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials, policy, proxy or store of whoever runs the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("DOCKER_", "REGISTRY_", "XDG_", "MODELFORGE_")):
            monkeypatch.delenv(name)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("MODELFORGE_HOME", str(tmp_path / "home"))
