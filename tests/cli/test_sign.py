"""`sign`, `bom` and `verify --key` as a release pipeline and a deployer call them, in processes of their own."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
from pathlib import Path

import pytest

from modelforge.bundle.layout import BundleContent, BundleFile, VariantContent, write_bundle
from modelforge.bundle.record import Artifact, Runtime, VariantRecord
from modelforge.store import digest_file
from tests.conftest import Forge

PASSWORD = "correct horse battery staple"
SECRET = {"MODELFORGE_KEY_PASSWORD": PASSWORD}


def make_bundle(folder: Path, version: str = "1.0.0") -> Path:
    path = folder / "main.onnx"
    path.write_bytes(b"an artifact")
    blob = digest_file(path)
    record = VariantRecord(
        target="x86-64",
        status="compiled",
        compiler="onnxruntime",
        precision="fp32",
        artifact=Artifact(file="main.onnx", digest=blob.digest, size=blob.size),
        runtime=Runtime(requires="ONNX Runtime"),
    )
    files = (BundleFile("main.onnx", "artifact", "application/vnd.onnx", path, blob.digest, blob.size),)
    content = BundleContent("tiny", version, {}, (VariantContent(record, files),))
    return write_bundle(folder / f"tiny-{version}", content).path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path)


@pytest.fixture
def keys(forge: Forge, tmp_path: Path) -> tuple[Path, Path]:
    done = forge("sign", "--generate-key", "release", **SECRET)
    assert done.code == 0, done.err
    return tmp_path / "release.key", tmp_path / "release.pub"


def test_the_whole_way(forge: Forge, bundle: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    before = forge("verify", bundle, "--no-run", "--json")
    assert before.json["signature"] == {"state": "unsigned", "claimed_key_ids": []}
    assert "NOT SIGNED" in before.err
    signed = forge("sign", bundle, "--key", private, "--builder", "https://ci.example.com/7", "--json", **SECRET)
    assert (signed.code, signed.json["unchanged"], signed.json["digest"]) == (0, False, before.json["digest"])
    unchecked = forge("verify", bundle, "--no-run", "--json")
    assert unchecked.json["signature"] == {"state": "unchecked", "claimed_key_ids": [signed.json["key_id"]]}
    assert "NOT CHECKED" in unchecked.err
    verified = forge("verify", bundle, "--no-run", "--key", public, "--require-signature", "--json")
    assert verified.json["signature"] == {
        "state": "verified",
        "key_id": signed.json["key_id"],
        "name": "tiny",
        "version": "1.0.0",
        "builder": "https://ci.example.com/7",
    }
    assert verified.json["strays"] == []
    assert "warning" not in verified.err
    assert "signed as tiny 1.0.0" in forge("verify", bundle, "--no-run", "--key", public).out
    again = forge("sign", bundle, "--key", private, "--builder", "https://ci.example.com/7", **SECRET)
    assert "already" in again.out
    for done in (signed, verified, again):
        assert PASSWORD not in done.out + done.err


def test_verifying_needs_no_package(forge: Forge, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """A deployer's install has no `cryptography`; signing without it says what to install."""
    private, public = keys
    assert forge("sign", bundle, "--key", private, **SECRET).code == 0
    absent = tmp_path / "absent"
    absent.mkdir()
    (absent / "cryptography.py").write_text("raise ImportError('not installed')\n")
    lean = {"PYTHONPATH": str(absent), **SECRET}
    assert forge("verify", bundle, "--no-run", "--key", public, **lean).code == 0
    (tmp_path / "other.pub").write_bytes(public.read_bytes())
    for argv in (["sign", str(bundle), "--key", str(private)], ["sign", "--generate-key", "more"]):
        done = forge(*argv, **lean)
        assert (done.code, "modelforge[sign]" in done.err) == (4, True), done.err
    assert not (tmp_path / "more.pub").exists()


def test_refusals_of_verify(forge: Forge, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    unsigned = forge("verify", bundle, "--no-run", "--key", public, "--json")
    assert (unsigned.code, "is not signed" in unsigned.err) == (5, True)
    assert unsigned.json["error"]["type"] == "IntegrityError"
    keyless = forge("verify", bundle, "--no-run", "--require-signature")
    assert (keyless.code, "--key" in keyless.err) == (2, True)
    assert forge("sign", "--generate-key", "other", **SECRET).code == 0
    assert forge("sign", bundle, "--key", tmp_path / "other.key", **SECRET).code == 0
    assert forge("verify", bundle, "--no-run", "--key", public).code == 5
    assert forge("verify", bundle, "--no-run", "--key", public, "--key", tmp_path / "other.pub").code == 0
    assert forge("verify", bundle, "--no-run", "--key", private).code == 2
    (bundle / "signatures" / "bad.sigstore.json").write_text("{}")
    for key in ([], ["--key", public]):  # bad is bad, with a key or without
        bad = forge("verify", bundle, "--no-run", *key)
        assert (bad.code, "a signature is not a Sigstore bundle" in bad.err) == (5, True), bad.err


def test_the_signature_of_another_version(forge: Forge, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    newer = make_bundle(tmp_path, "1.1.0")
    assert forge("sign", bundle, "--key", private, **SECRET).code == 0
    (bundle / "signatures").rename(newer / "signatures")
    for key in ([], ["--key", public]):
        done = forge("verify", newer, "--no-run", *key)
        assert (done.code, "of another bundle: tiny 1.0.0" in done.err) == (5, True), done.err


def test_a_bad_signature_is_found_before_anything_runs(forge: Forge, bundle: Path, keys: tuple[Path, Path]) -> None:
    """Without --no-run: the artifact here is no model, and running it would end otherwise."""
    done = forge("verify", bundle, "--key", keys[1])
    assert (done.code, "is not signed" in done.err) == (5, True)


def test_strays_are_told(forge: Forge, bundle: Path) -> None:
    (bundle / "signatures").mkdir()
    (bundle / "signatures" / "readme").write_text("")
    done = forge("verify", bundle, "--no-run", "--json")
    assert (done.code, done.json["strays"]) == (0, ["signatures/readme"])


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
def test_a_wrong_password_is_one_line(forge: Forge, bundle: Path, keys: tuple[Path, Path], debug: list[str]) -> None:
    argv = forge.argv("sign", bundle, "--key", keys[0], *debug)
    done = subprocess.run(
        argv,
        cwd=forge.cwd,
        env=forge.env(MODELFORGE_KEY_PASSWORD="wrong horse battery"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the password is wrong" in done.stderr
    assert "wrong horse" not in done.stdout + done.stderr
    sealed = "".join(keys[0].read_text().splitlines()[1:-1])
    assert sealed[:40] not in done.stdout + done.stderr
    if not debug:
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {keys[0]}: the password is wrong, or the key is damaged\n"
            "  how to mend: check MODELFORGE_KEY_PASSWORD\n"
        )
    assert not (bundle / "signatures").exists()


def test_no_password_and_no_terminal(forge: Forge, bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    for argv in (["sign", str(bundle), "--key", str(keys[0])], ["sign", "--generate-key", "second"]):
        done = subprocess.run(
            forge.argv(*argv),
            cwd=forge.cwd,
            env=forge.env(MODELFORGE_KEY_PASSWORD=""),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, "no terminal to ask on" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "second.key").exists()
    assert not (tmp_path / "second.pub").exists()


def on_a_terminal(forge: Forge, answers: list[str], *argv: str) -> tuple[int, str]:
    """Exit code, and all that is seen on the terminal; each answer is typed when its prompt stands there."""
    ours, theirs = pty.openpty()
    env = {name: value for name, value in forge.env().items() if name != "MODELFORGE_KEY_PASSWORD"}
    process = subprocess.Popen(
        forge.argv(*argv), cwd=forge.cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen, left = b"", list(answers)
    try:
        while select.select([ours], [], [], 60)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the last writer has gone
                break
            # getpass drops what was typed before its prompt: the prompt is whole when its last space is there.
            if left and seen.endswith(b": "):
                os.write(ours, f"{left.pop(0)}\n".encode())
        return process.wait(timeout=60), seen.decode()
    finally:
        process.kill()
        os.close(ours)


def test_the_password_is_asked_for_and_not_shown(forge: Forge, bundle: Path, tmp_path: Path) -> None:
    code, seen = on_a_terminal(forge, [PASSWORD, "something else"], "sign", "--generate-key", "mine")
    assert (code, "differ" in seen) == (2, True), seen
    assert not (tmp_path / "mine.key").exists()
    code, seen = on_a_terminal(forge, [PASSWORD, PASSWORD], "sign", "--generate-key", "mine")
    assert code == 0, seen
    assert PASSWORD not in seen
    code, seen = on_a_terminal(forge, [PASSWORD], "sign", str(bundle), "--key", "mine.key")
    assert code == 0, seen
    assert PASSWORD not in seen
    assert forge("verify", bundle, "--no-run", "--key", tmp_path / "mine.pub").code == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sign"], "a bundle and --key are needed"),
        (["sign", "BUNDLE"], "a bundle and --key are needed"),
        (["sign", "BUNDLE", "--key", "absent.key"], "cannot be read: No such file"),
        (["sign", "BUNDLE", "--key", "release.pub"], "is a public key"),
        (["sign", "absent", "--key", "release.key"], "absent"),
        (["sign", "BUNDLE", "--key", "release.key", "--builder", "us"], "is not a URI"),
        (["sign", "BUNDLE", "--generate-key", "x"], "give it alone"),
        (["sign", "--generate-key", "release"], "never overwritten"),
        (["sign", "--generate-key", "absent/x"], "the folder is not there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(forge: Forge, bundle: Path, keys: tuple[Path, Path], argv: list[str], said: str) -> None:
    done = forge(*(str(bundle) if word == "BUNDLE" else word for word in argv), **SECRET)
    assert (done.code, said in done.err) == (2, True), done.err
    assert not (bundle / "signatures").exists()


def test_a_damaged_bundle_is_not_signed(forge: Forge, bundle: Path, keys: tuple[Path, Path]) -> None:
    blob = max((bundle / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    done = forge("sign", bundle, "--key", keys[0], **SECRET)
    assert (done.code, "damaged" in done.err) == (5, True), done.err
    assert not (bundle / "signatures").exists()


def test_bom(forge: Forge, bundle: Path, tmp_path: Path) -> None:
    done = forge("bom", bundle, "--json")
    assert (done.code, done.json["path"]) == (0, "tiny-1.0.0.cdx.json")
    document = json.loads((tmp_path / "tiny-1.0.0.cdx.json").read_text())
    assert (document["bomFormat"], document["metadata"]["component"]["name"]) == ("CycloneDX", "tiny")
    inside = forge("bom", bundle, "-o", bundle / "tiny.cdx.json")
    assert (inside.code, "inside the bundle" in inside.err) == (2, True)
    assert forge("bom", bundle, "-o", "absent/x.json").code == 2
    assert forge("bom", bundle, "-o", tmp_path).code == 2
