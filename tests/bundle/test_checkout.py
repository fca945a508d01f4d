"""Checkouts: opened, verified and exported as the bundle that they are a part of; damage and strays are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelforge.bundle import format as words
from modelforge.bundle.checkout import checkout_root, replacing, standing, write_documents
from modelforge.bundle.layout import write_bundle
from modelforge.bundle.read import (
    CHECKOUT,
    Bundle,
    documents_folder,
    export_files,
    open_bundle,
    place,
    verify_integrity,
)
from modelforge.errors import InputError, IntegrityError
from tests.bundle.bundle_contents import MakeContent


@pytest.fixture
def bundle(tmp_path: Path, make_content: MakeContent) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "bundle", make_content()).path)


@pytest.fixture
def checkout(tmp_path: Path, bundle: Bundle) -> Path:
    """The targets t4 and jetson-agx-orin (deferred) of the bundle."""
    write_checkout(bundle, tmp_path / "out", "t4", "jetson-agx-orin")
    return tmp_path / "out"


def write_checkout(bundle: Bundle, destination: Path, *targets: str) -> None:
    chosen = [variant for target in targets for variant in bundle.select(target)]

    def blob(digest: str) -> bytes:
        return (bundle.path / words.blob_name(digest)).read_bytes()

    with replacing(destination, force=False) as part:
        documents = {}
        for digest in [*(variant.digest for variant in chosen), bundle.manifests[-1]]:
            documents[digest] = blob(digest)
            config = _config(documents[digest])
            documents[config] = blob(config)
        for variant in chosen:
            for title, entry in variant.files.items():
                path = part / place(variant.record.target, variant.record.stage, title)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(blob(entry.digest))
        write_documents(checkout_root(part), documents, blob(bundle.digest), bundle.name, bundle.version)


def _config(manifest: bytes) -> str:
    return str(json.loads(manifest)["config"]["digest"])


def test_it_opens_as_the_bundle(bundle: Bundle, checkout: Path) -> None:
    opened = open_bundle(checkout)
    assert opened.is_checkout
    assert (opened.digest, opened.name, opened.version) == (bundle.digest, bundle.name, bundle.version)
    assert opened.about == bundle.about
    assert opened.select("t4") == bundle.select("t4")
    assert opened.manifests == bundle.manifests
    assert opened.file(opened.select("t4")[0], "main.engine") == checkout / "t4" / "main.engine"
    assert {each["target"] for each in opened.summary()["absent"]} == {"a100", "rk3588"}
    assert "absent" not in bundle.summary()
    with pytest.raises(InputError, match="not pulled"):
        opened.select("a100")
    with pytest.raises(InputError, match="--all"):
        opened.file(None, "report.html")


def test_it_verifies(bundle: Bundle, checkout: Path) -> None:
    report = verify_integrity(checkout)
    assert report.digest == bundle.digest
    assert report.strays == report.unreferenced == ()
    (checkout / "t4" / "mine.txt").write_text("")
    (checkout / "more").mkdir()
    (checkout / CHECKOUT / "x").write_text("")
    assert verify_integrity(checkout).strays == (".modelforge/x", "more", "t4/mine.txt")


@pytest.mark.parametrize("name", ["t4/main.engine", "jetson-agx-orin/lowered.onnx", "t4/golden.npz"])
@pytest.mark.parametrize("how", ["flip", "shorten", "remove", "link", "folder"])
def test_damage_is_found(checkout: Path, tmp_path: Path, name: str, how: str) -> None:
    file = checkout / name
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[7] ^= 1
        file.write_bytes(data)
    elif how == "shorten":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
        if how == "link":
            (tmp_path / "same").write_bytes(data)
            file.symlink_to(tmp_path / "same")
        elif how == "folder":
            file.mkdir()
    with pytest.raises(IntegrityError, match=file.name):
        verify_integrity(checkout)
    if how != "flip":  # `open_bundle` does not hash files
        with pytest.raises(IntegrityError, match=file.name):
            open_bundle(checkout)


def test_damaged_documents_are_found(checkout: Path) -> None:
    for file in sorted((checkout / CHECKOUT / "blobs" / "sha256").iterdir()):
        data = file.read_bytes()
        file.chmod(0o644)
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(IntegrityError):
            open_bundle(checkout)
        file.write_bytes(data)
    assert open_bundle(checkout)


def test_export_takes_the_plain_files(tmp_path: Path, bundle: Bundle, checkout: Path) -> None:
    opened = open_bundle(checkout)
    (variant,) = opened.select("t4")
    copied = export_files(opened, variant, tmp_path / "exported")
    for title, path in copied.items():
        assert path.read_bytes() == bundle.file(bundle.select("t4")[0], title).read_bytes()


def test_a_linked_documents_folder_is_refused(tmp_path: Path, checkout: Path) -> None:
    (checkout / CHECKOUT).rename(tmp_path / "elsewhere")
    (checkout / CHECKOUT).symlink_to(tmp_path / "elsewhere")
    for look in (open_bundle, verify_integrity, documents_folder):
        with pytest.raises(IntegrityError, match="symbolic link"):
            look(checkout)


def test_what_may_be_replaced(tmp_path: Path, checkout: Path, bundle: Bundle) -> None:
    assert standing(tmp_path / "nothing", force=False) is None
    (tmp_path / "empty").mkdir()
    assert standing(tmp_path / "empty", force=False) is None
    assert (standing(checkout, force=False) or bundle).is_checkout
    assert standing(bundle.path, force=False) is not None
    (checkout / "t4" / "main.engine").write_bytes(b"")
    with pytest.raises(InputError, match="changed"):
        standing(checkout, force=False)
    assert standing(checkout, force=True) is None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(InputError, match="not a bundle"):
        standing(tmp_path / "other", force=True)


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "deep" / "out", force=False) as part:
            (part / "file").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []
