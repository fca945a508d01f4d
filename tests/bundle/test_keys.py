"""Key files: made once, never overwritten, opened with the password only; what is none is refused in one line."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from modelforge.bundle.keys import generate, load_private_key, load_public_key, needs_password
from modelforge.errors import InputError
from tests.bundle.signing_keys import PASSWORD, KeyPair

SPKI = serialization.PublicFormat.SubjectPublicKeyInfo


def pkcs8(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, password: str | None = None) -> bytes:
    sealing: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        sealing = serialization.BestAvailableEncryption(password.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealing)


def test_a_new_pair(tmp_path: Path) -> None:
    private, public = generate(tmp_path / "release-2026", PASSWORD)
    assert (private.name, public.name) == ("release-2026.key", "release-2026.pub")
    assert sorted(os.listdir(tmp_path)) == ["release-2026.key", "release-2026.pub"]
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert private.read_text().startswith("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert public.read_text().startswith("-----BEGIN PUBLIC KEY-----\n")
    der = serialization.load_pem_public_key(public.read_bytes()).public_bytes(serialization.Encoding.DER, SPKI)
    key = load_public_key(public)
    assert key.id == hashlib.sha256(der).hexdigest()
    opened = load_private_key(private, PASSWORD)
    assert (opened.public.id, opened.exposed) == (key.id, None)
    assert "EllipticCurve" not in repr(opened)


@pytest.mark.parametrize("end", [".key", ".pub"])
def test_no_key_is_overwritten(tmp_path: Path, end: str) -> None:
    (tmp_path / f"release{end}").write_text("precious")
    with pytest.raises(InputError, match="never overwritten"):
        generate(tmp_path / "release", PASSWORD)
    assert os.listdir(tmp_path) == [f"release{end}"]
    assert (tmp_path / f"release{end}").read_text() == "precious"


def test_nothing_is_left_where_the_second_file_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody makes the private key's file between the look and the writing."""
    link = os.link

    def racing(source: Path, target: Path) -> None:
        if Path(target).suffix == ".key":
            Path(target).write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", racing)
    with pytest.raises(InputError, match="never overwritten"):
        generate(tmp_path / "release", PASSWORD)
    assert os.listdir(tmp_path) == ["release.key"]
    assert (tmp_path / "release.key").read_text() == "theirs"


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    private, public = generate(tmp_path / "release", PASSWORD)
    assert load_private_key(private, PASSWORD).public.id == load_public_key(public).id
    assert sorted(os.listdir(tmp_path)) == ["release.key", "release.pub"]


@pytest.mark.parametrize("password", ["", "x" * 11, "x" * 1024], ids=["none", "short", "long"])
def test_passwords_have_bounds(tmp_path: Path, password: str) -> None:
    with pytest.raises(InputError, match="at least 12 characters, and at most 1023"):
        generate(tmp_path / "release", password)
    assert os.listdir(tmp_path) == []


def test_a_password_that_is_no_text(tmp_path: Path) -> None:
    """Bytes of the environment that are not UTF-8 come as surrogates."""
    private, _ = generate(tmp_path / "release", "caf\udce9 au lait")
    assert load_private_key(private, "caf\udce9 au lait")


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder is not there"):
        generate(tmp_path / "absent" / "release", PASSWORD)


def test_wrong_password(pair: KeyPair) -> None:
    with pytest.raises(InputError) as caught:
        load_private_key(pair.private, "not the password")
    assert str(caught.value) == (
        f"{pair.private}: the password is wrong, or the key is damaged\n  how to mend: check MODELFORGE_KEY_PASSWORD"
    )
    # Nothing of the library's own error, nor of the password, hangs on it: --debug prints the chain.
    assert caught.value.__suppress_context__
    assert "not the password" not in str(caught.value)
    with pytest.raises(InputError, match="no password was given"):
        load_private_key(pair.private, None)


def test_a_key_without_encryption_is_told(tmp_path: Path) -> None:
    """openssl makes such ones; the password that stands in the environment is not used on it."""
    path = tmp_path / "plain.key"
    path.write_bytes(pkcs8(ec.generate_private_key(ec.SECP256R1())))
    assert not needs_password(path)
    assert load_private_key(path, PASSWORD).exposed == "the private key is not encrypted"


def test_a_key_that_others_can_read_is_told(tmp_path: Path) -> None:
    private, _ = generate(tmp_path / "release", PASSWORD)
    private.chmod(0o640)
    assert "chmod 600" in str(load_private_key(private, PASSWORD).exposed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a PEM key"),
        (b"garbage", "not a PEM key"),
        (b"\0" * (1 << 17), "not a PEM key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not an ECDSA P-256 public key"),
        (b"-----BEGIN PUBLIC KEY-----\nA!AA\n-----END PUBLIC KEY-----\n", "not a PEM key"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", 'holds "CERTIFICATE"'),
        (pkcs8(ec.generate_private_key(ec.SECP256R1())), "is a private key"),
        (rsa.generate_private_key(65537, 2048).public_key().public_bytes(serialization.Encoding.PEM, SPKI), "P-256"),
        (ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(serialization.Encoding.PEM, SPKI), "P-256"),
    ],
    ids=["empty", "garbage", "huge", "short", "base64", "certificate", "private", "rsa", "p384"],
)
def test_what_is_no_public_key(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "some.pub"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        load_public_key(path)
    assert str(path) in str(caught.value)


def test_two_keys_in_one_file_are_refused(tmp_path: Path, pair: KeyPair, other_pair: KeyPair) -> None:
    """Readers would differ on which one counts."""
    path = tmp_path / "both.pub"
    path.write_bytes(pair.public.read_bytes() + other_pair.public.read_bytes())
    with pytest.raises(InputError, match="not a PEM key"):
        load_public_key(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_line_ends_make_no_difference(tmp_path: Path, pair: KeyPair, end: str) -> None:
    path = tmp_path / "copied.pub"
    path.write_bytes(end.join(pair.public.read_text().splitlines()).encode() + end.encode())
    assert load_public_key(path).id == pair.key.public.id


def pem(label: str) -> bytes:
    return f"-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n".encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"garbage", "not a PEM key"),
        (pem("EC PRIVATE KEY"), "not a PKCS#8 private key"),
        (pem("ENCRYPTED SIGSTORE PRIVATE KEY"), "not a PKCS#8 private key"),
        (pem("PRIVATE KEY"), "the key is damaged"),
        (pem("ENCRYPTED PRIVATE KEY"), "password is wrong, or the key is damaged"),
        (pkcs8(rsa.generate_private_key(65537, 2048)), "not an ECDSA P-256 key"),
        (pkcs8(ec.generate_private_key(ec.SECP384R1()), PASSWORD), "not an ECDSA P-256 key"),
    ],
    ids=["garbage", "sec1", "cosign", "damaged", "damaged encrypted", "rsa", "p384"],
)
def test_what_is_no_private_key(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "some.key"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_private_key(path, PASSWORD)


def test_absent_and_swapped_files(tmp_path: Path, pair: KeyPair) -> None:
    for load in (load_public_key, needs_password):
        with pytest.raises(InputError, match="cannot be read: No such file"):
            load(tmp_path / "absent")
        with pytest.raises(InputError, match="is not a file"):
            load(tmp_path)
    with pytest.raises(InputError, match="is a public key"):
        load_private_key(pair.public, PASSWORD)
    with pytest.raises(InputError, match="is a private key"):
        load_public_key(pair.private)
