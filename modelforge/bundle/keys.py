"""Key files: ECDSA P-256, the public one as PEM SubjectPublicKeyInfo, the private one as encrypted PEM PKCS#8.

Reading public keys needs nothing but Python; `cryptography` (the extra `sign`) makes, opens and uses private ones.
No message holds a password, or a byte of a private key.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modelforge.bundle import p256, parts
from modelforge.errors import InputError, ToolchainMissing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PASSWORD_VARIABLE = "MODELFORGE_KEY_PASSWORD"
PASSWORD_LENGTH = 12
"""Characters that a new password has at least. `cryptography` seals with 2048 rounds of PBKDF2 (seen in release 50)
and cannot be asked for more, so the password itself must withstand guessing."""

_PASSWORD_LIMIT = 1023  # what OpenSSL takes
_KEY_LIMIT = 64 << 10
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END \1-----\s*")


@dataclass(frozen=True)
class PublicKey:
    """A public key and what it is called by.

    Attributes:
        id: SHA-256 of its SubjectPublicKeyInfo (DER), in hex.
        hint: the same digest in base64: how cosign names a key in a Sigstore bundle.
    """

    path: Path
    point: p256.Point
    id: str
    hint: str

    @property
    def short_id(self) -> str:
        """The first 16 hex digits: names a signature's file."""
        return self.id[:16]


@dataclass(frozen=True)
class PrivateKey:
    """An opened private key. What it holds is kept out of its representation."""

    public: PublicKey
    exposed: str | None
    """Why others may know it (not encrypted, readable by others), or None."""
    _key: EllipticCurvePrivateKey = field(repr=False)

    def sign(self, message: bytes) -> bytes:
        """ECDSA with SHA-256; the DER of ``Ecdsa-Sig-Value``. Two signatures of one message differ."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return self._key.sign(message, ec.ECDSA(hashes.SHA256()))


def load_public_key(path: Path) -> PublicKey:
    """Read a public key.

    Raises:
        InputError: it cannot be read, or is no P-256 public key.
    """
    kind, der = _read_pem(path)
    if "PRIVATE" in kind:
        raise InputError("is a private key", where=str(path), fix="give the .pub file, and keep this one to yourself")
    if kind != "PUBLIC KEY":
        raise InputError(f'holds "{kind}", not a public key', where=str(path), fix=_GENERATE)
    return _public_key(path, der)


def load_private_key(path: Path, password: str | None) -> PrivateKey:
    """Open a private key.

    Args:
        password: not used where the key is not encrypted.

    Raises:
        InputError: it cannot be read or opened, or is no P-256 key.
        ToolchainMissing: `cryptography` is not installed.
    """
    require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    kind, der = _read_pem(path)
    encrypted = _check_private(path, kind)
    if encrypted and not password:
        raise InputError("is encrypted, and no password was given", where=str(path), fix=f"set {PASSWORD_VARIABLE}")
    secret = _bytes(password) if encrypted and password else None
    try:
        key = serialization.load_der_private_key(der, secret)
    # The library's errors are not passed on: what they quote is not ours to promise.
    except (ValueError, TypeError, UnsupportedAlgorithm):
        what = "the password is wrong, or the key is damaged" if encrypted else "the key is damaged"
        raise InputError(what, where=str(path), fix=f"check {PASSWORD_VARIABLE}" if encrypted else None) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError("is not an ECDSA P-256 key", where=str(path), fix=_GENERATE)
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PrivateKey(_public_key(path, spki), _exposed(path, encrypted), key)


def needs_password(path: Path) -> bool:
    """Whether a private key is encrypted.

    Raises:
        InputError: it cannot be read, or is no private key.
    """
    return _check_private(path, _read_pem(path)[0])


def generate(stem: Path, password: str) -> tuple[Path, Path]:
    """Make a key pair: ``stem.key`` (mode 0600) and ``stem.pub``. What stands there is never overwritten.

    Raises:
        InputError: the password is too short; a file stands there; it cannot be written.
        ToolchainMissing: `cryptography` is not installed.
    """
    require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = (stem.parent / f"{stem.name}{end}" for end in (".key", ".pub"))
    for path in (private, public):
        if os.path.lexists(path):
            raise _stands(path)
    if len(password) < PASSWORD_LENGTH or len(_bytes(password)) > _PASSWORD_LIMIT:
        bounds = f"at least {PASSWORD_LENGTH} characters, and at most {_PASSWORD_LIMIT} bytes"
        raise InputError(f"a password has {bounds}", where=PASSWORD_VARIABLE)
    key = ec.generate_private_key(ec.SECP256R1())
    sealed = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(_bytes(password)),
    )
    opened = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if not stem.parent.is_dir():
        raise InputError("the folder is not there", where=str(stem.parent), fix="make it, or give another NAME")
    with parts.writing_to(stem.parent, instead="give another NAME"):
        # The private one last: a kill between the two loses nothing that was ever used.
        _put(public, opened, mode=0o644)
        try:
            _put(private, sealed, mode=0o600)
        except BaseException:
            public.unlink()
            raise
    return private, public


def require_cryptography() -> None:
    """Raises: ToolchainMissing: `cryptography` is not installed."""
    try:
        import cryptography  # noqa: F401 - only whether it is there
    except ImportError:
        raise ToolchainMissing(
            "signing needs the package `cryptography`, which is not installed",
            fix="pip install 'modelforge[sign]' (verifying needs nothing)",
        ) from None


_GENERATE = "`modelforge sign --generate-key NAME` makes a pair"


def _bytes(password: str) -> bytes:
    """As it came from the environment, also where that is no UTF-8."""
    return os.fsencode(password)


def _check_private(path: Path, kind: str) -> bool:
    if kind == "PUBLIC KEY":
        raise InputError("is a public key", where=str(path), fix="sign with the .key file")
    if kind not in ("ENCRYPTED PRIVATE KEY", "PRIVATE KEY"):
        raise InputError(f'holds "{kind}", not a PKCS#8 private key', where=str(path), fix=_GENERATE)
    return kind == "ENCRYPTED PRIVATE KEY"


def _read_pem(path: Path) -> tuple[str, bytes]:
    """The label and the bytes of a file that is one PEM block (RFC 7468) and nothing else."""
    try:
        with parts.open_regular(path) as stream:
            data = stream.read(_KEY_LIMIT + 1)
    except OSError as error:
        raise InputError(f"the key cannot be read: {error.strerror}", where=str(path), fix=_GENERATE) from None
    block = _PEM.fullmatch(data.strip() + b"\n") if len(data) <= _KEY_LIMIT else None
    try:
        if block is None:
            raise ValueError
        der = base64.b64decode(b"".join(block[2].split()), validate=True)
    except (ValueError, binascii.Error):
        raise InputError("is not a PEM key", where=str(path), fix=_GENERATE) from None
    return block[1].decode(), der


def _public_key(path: Path, der: bytes) -> PublicKey:
    point = p256.point_from_spki(der)
    if point is None:
        raise InputError("is not an ECDSA P-256 public key, uncompressed", where=str(path), fix=_GENERATE)
    digest = hashlib.sha256(der)
    return PublicKey(path, point, digest.hexdigest(), base64.b64encode(digest.digest()).decode())


def _exposed(path: Path, encrypted: bool) -> str | None:
    if not encrypted:
        return "the private key is not encrypted"
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return "the private key can be read by other users: chmod 600"
    return None


def _put(path: Path, data: bytes, *, mode: int) -> None:
    """Appears whole, and never in the place of something: a link, unlike a rename, fails where a file stands."""
    part = path.parent / f".part-{secrets.token_hex(8)}"
    try:
        parts.write_file(part, data, mode=mode)
        try:
            os.link(part, path)
        except FileExistsError:
            raise _stands(path) from None
        except PermissionError:  # a file system without hard links
            if os.path.lexists(path):
                raise _stands(path) from None
            os.rename(part, path)
        parts.sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()


def _stands(path: Path) -> InputError:
    return InputError("stands there already; a key is never overwritten", where=str(path), fix="choose another name")
