"""An independent OCI client reads and copies our bundles, and every digest stays what it was."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from modelforge.bundle.layout import Written, write_bundle
from modelforge.bundle.read import open_bundle, verify_integrity
from modelforge.errors import InputError
from tests.bundle.bundle_contents import MakeContent

pytestmark = [
    pytest.mark.skopeo,
    pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed"),
]


@pytest.fixture
def written(tmp_path: Path, make_content: MakeContent) -> Written:
    return write_bundle(tmp_path / "ppocr-cls-1.2.0", make_content())


def skopeo(*arguments: str) -> bytes:
    return subprocess.run(["skopeo", *arguments], check=True, capture_output=True).stdout


def blobs(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "blobs" / "sha256").iterdir()}


@pytest.mark.parametrize("tag", ["", ":1.2.0"])
def test_inspect_gives_our_index(written: Written, tag: str) -> None:
    raw = skopeo("inspect", "--raw", f"oci:{written.path}{tag}")
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == written.digest


@pytest.mark.parametrize("tag", ["", ":1.2.0"])
@pytest.mark.parametrize("options", [(), ("--preserve-digests",)])
def test_copy_of_all_is_the_same_bundle(
    tmp_path: Path, written: Written, make_content: MakeContent, tag: str, options: tuple[str, ...]
) -> None:
    skopeo("copy", "--all", *options, f"oci:{written.path}{tag}", f"oci:{tmp_path / 'other'}{tag}")
    assert blobs(tmp_path / "other") == blobs(written.path)
    assert verify_integrity(tmp_path / "other").digest == written.digest
    assert open_bundle(tmp_path / "other").variants == open_bundle(written.path).variants
    assert write_bundle(tmp_path / "other", make_content()).unchanged


@pytest.mark.parametrize("tag", ["", ":1.2.0"])
@pytest.mark.parametrize("options", [(), ("--preserve-digests",)])
def test_plain_copy_takes_the_first_variant_unchanged(
    tmp_path: Path, written: Written, tag: str, options: tuple[str, ...]
) -> None:
    """Without --all skopeo copies one image of an index; what it copies keeps its digests, and is no whole bundle."""
    skopeo("copy", *options, f"oci:{written.path}{tag}", f"oci:{tmp_path / 'other'}{tag}")
    first = open_bundle(written.path).variants[0]
    raw = skopeo("inspect", "--raw", f"oci:{tmp_path / 'other'}{tag}")
    assert f"sha256:{hashlib.sha256(raw).hexdigest()}" == first.digest
    copied = blobs(tmp_path / "other")
    assert copied.items() <= blobs(written.path).items()
    assert {entry.digest[7:] for entry in first.files.values()} < set(copied)
    with pytest.raises(InputError, match="--all"):
        open_bundle(tmp_path / "other")


def test_the_example_of_the_docs(tmp_path: Path, written: Written, sources: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(# one-target\n.*?)```", page, re.DOTALL)
    (tmp_path / "device").mkdir()
    said = subprocess.run(
        ["sh", "-euc", script],
        check=True,
        capture_output=True,
        cwd=tmp_path / "device",
        env={**os.environ, "BUNDLE": str(written.path), "TARGET": "t4"},
    )
    assert said.stdout == b"main.engine: OK\n"
    assert (tmp_path / "device" / "main.engine").read_bytes() == (sources / "t4.engine").read_bytes()
