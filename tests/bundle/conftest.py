"""Small bundles of real files: two targets that share a lowered model, one deferred, one skipped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent
from modelforge.bundle.record import VariantRecord
from modelforge.store import digest_file
from tests.bundle.bundle_contents import MakeContent, compiled_record
from tests.bundle.signing_keys import KeyPair, make_pair

ABOUT = {
    "serving": {"task": "image-classification <&> é", "latency_budget_ms": 50.0, "fallback": ["t4", "a100"]},
    "model": {"digest": "sha256:" + "1" * 64},
}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of files to pack; the bytes are the same in every run."""
    folder = tmp_path / "sources"
    folder.mkdir()
    dice = random.Random(7)
    for name in ("t4.engine", "a100.engine", "model.onnx", "golden.npz", "build.log", "report.html"):
        (folder / name).write_bytes(dice.randbytes(3000))
    return folder


@pytest.fixture
def make_content(sources: Path) -> MakeContent:
    """Build the content; ``digests`` says whether digests are given or left to be found."""

    def make(*, digests: bool = True, version: str = "1.2.0") -> BundleContent:
        def file(name: str, role: str, source: str) -> BundleFile:
            blob = digest_file(sources / source)
            known = (blob.digest, blob.size) if digests else (None, None)
            return BundleFile(name, role, "application/octet-stream", sources / source, *known)

        shared = [file("lowered.onnx", "lowered-model", "model.onnx"), file("golden.npz", "golden", "golden.npz")]
        variants = [
            VariantContent(
                compiled_record(tag, sources / f"{tag}.engine"),
                [*shared, file("main.engine", "artifact", f"{tag}.engine"), file("build.log", "log", "build.log")],
            )
            for tag in ("t4", "a100")
        ]
        deferred = VariantRecord(
            target="jetson-agx-orin", status="deferred", compiler="tensorrt", precision="int8", notes=("on the device",)
        )
        skipped = VariantRecord(target="rk3588", status="skipped", compiler=None, precision=None, notes=("no rknn",))
        variants += [VariantContent(deferred, shared), VariantContent(skipped)]
        return BundleContent("ppocr-cls", version, ABOUT, variants, [file("report.html", "report", "report.html")])

    return make


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """The releaser's keys."""
    return make_pair(tmp_path_factory.mktemp("keys") / "release")


@pytest.fixture(scope="session")
def other_pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    """Somebody else's keys."""
    return make_pair(tmp_path_factory.mktemp("others") / "mallory")
