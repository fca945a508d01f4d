"""Signing a bundle, and trusting one: who signed it, and is it what was asked for?

A signature is a Sigstore bundle (:mod:`modelforge.bundle.dsse`) over a provenance statement
(:mod:`modelforge.bundle.provenance`). It lies in ``signatures/`` of a bundle folder and beside the index in a registry;
the bundle's digest does not know of it.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelforge.bundle import dsse, parts
from modelforge.bundle import format as words
from modelforge.bundle.checked import AGAIN
from modelforge.bundle.keys import PrivateKey, PublicKey, load_public_key
from modelforge.bundle.members import signature_names
from modelforge.bundle.provenance import BUILDER, NotOurs, Statement, read_statement, statement
from modelforge.bundle.read import Bundle, documents_folder, open_bundle, verify_integrity
from modelforge.errors import InputError, IntegrityError

SIGNATURES_LIMIT = 64
"""Documents beside one bundle that are looked at: a bound for readers, far above a few keys' rotation."""


@dataclass(frozen=True)
class Verified:
    """A signature that holds: by one of the given keys, of this bundle, under the name and version asked for."""

    key: Path
    key_id: str
    statement: Statement

    @property
    def name(self) -> str:
        return self.statement.name

    @property
    def version(self) -> str:
        return self.statement.version


@dataclass(frozen=True)
class Signed:
    """What :func:`sign` did; ``unchanged``: the key's signature of this very bundle was there already."""

    path: Path
    digest: str
    key_id: str
    unchanged: bool


def require(
    documents: Sequence[bytes],
    keys: Sequence[Path],
    *,
    index_digest: str,
    name: str,
    version: str,
    manifests: Sequence[str],
) -> Verified:
    """Demand a signature by any of the keys (several: while keys change) over exactly this bundle.

    Documents of other keys and of other kinds do not count. One that names a given key and is not signed by it, or
    that cannot be read, is a refusal even beside a good one.

    Args:
        documents: the Sigstore bundles that were found beside the image index.
        keys: files of public keys.
        index_digest: digest of the image index that was received.
        name, version: what was **asked for**, not what the index says of itself: this is what finds an older release
            under a newer tag.
        manifests: digests of the variants' manifests that are going to be used.

    Raises:
        IntegrityError: not signed; signed by others only; tampered with; of another bundle, name or version; a
            manifest is not among what was signed.
        InputError: a key file cannot be used, or none was given.
    """
    if not keys:
        raise InputError("a signature is required, and no key was given to check it with", fix="give --key NAME.pub")
    trusted = [load_public_key(path) for path in keys]
    where = f"{name}:{version}"
    if not documents:
        raise IntegrityError(
            "is not signed, and a signature is required", where=where, fix="have it signed: modelforge sign --key"
        )
    if len(documents) > SIGNATURES_LIMIT:
        raise IntegrityError(f"{len(documents)} signatures; at most {SIGNATURES_LIMIT} are looked at", where=where)
    found, others = _signed_by(documents, trusted, where)
    if not found:
        known = ", ".join(f"{key.path} ({key.short_id})" for key in trusted)
        raise IntegrityError(
            f"is not signed by {known}; what is there: {'; '.join(others)}",
            where=where,
            fix="give the public key of who released it, after checking that it is theirs",
        )
    faults = [_fault(said, index_digest, name, version, manifests) for _, said in found]
    for (key, said), fault in zip(found, faults, strict=True):
        if fault is None:
            return Verified(key.path, key.id, said)
    raise IntegrityError(str(faults[0]), where=where, fix=AGAIN)


def unchecked(documents: Sequence[bytes], *, index_digest: str) -> list[str]:
    """What documents say of their keys, where no key was given: hex ids of the keys. **This is no verification.**

    Raises:
        IntegrityError: one cannot be read, or is a signature of another bundle: such a one is bad under any key.
    """
    ids = []
    for number, document in enumerate(documents, 1):
        envelope = _envelope(document, f"signature {number} of {len(documents)}")
        if isinstance(envelope, dsse.Foreign):
            continue
        try:
            said = read_statement(envelope.payload)
        except NotOurs:
            continue
        if said.index != index_digest:
            raise IntegrityError(_of_another(said, index_digest), fix=AGAIN)
        ids.append(_key_id(envelope))
    return ids


def verify_bundle(bundle: Bundle, keys: Sequence[Path]) -> Verified:
    """Demand a signature of a bundle in a folder. It has its name and version from itself: nobody asked for others.

    Raises:
        as :func:`require`.
    """
    documents = [document for _, document in signatures(bundle.path)]
    digests = [variant.digest for variant in bundle.variants]
    return require(
        documents, keys, index_digest=bundle.digest, name=bundle.name, version=bundle.version, manifests=digests
    )


def sign(path: Path, key: PrivateKey, *, builder: str = BUILDER, force: bool = False) -> Signed:
    """Sign the bundle in a folder, after every digest of it was checked. Its own digest stays what it is.

    The key's signature of another bundle, or a damaged one, is replaced.

    Args:
        force: sign again what this key has signed already.

    Raises:
        InputError: not a bundle; or signed already by this key with another statement; or the folder cannot be written.
        IntegrityError: damaged.
    """
    verify_integrity(path)
    bundle = open_bundle(path)
    if bundle.is_checkout:
        raise InputError("was pulled, and need not be the whole bundle", where=str(path), fix="sign what `build` wrote")
    payload = statement(bundle, builder=builder)
    target = path / words.SIGNATURES / f"{key.public.short_id}{words.SIGNATURE_END}"
    if not force and _stands(target, key.public, payload, bundle):
        return Signed(target, bundle.digest, key.public.id, unchanged=True)
    document = dsse.seal(payload, key)
    if not dsse.is_signed_by(dsse.parse(document), key.public):
        # The library signs, our own code verifies: a fault of either must not be released.
        raise IntegrityError("the new signature does not verify", where=str(target), fix="try again; check the machine")
    _write(target, document)
    return Signed(target, bundle.digest, key.public.id, unchanged=False)


def signatures(folder: Path) -> list[tuple[str, bytes]]:
    """The signatures that lie in a bundle's folder: file name and document, by name. No link is followed.

    Raises:
        IntegrityError: one cannot be read, is no plain file or is too large; or there are too many.
    """
    root = documents_folder(folder)
    place = root / words.SIGNATURES
    try:
        names = signature_names(root)
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", where=str(place), fix=AGAIN) from None
    if len(names) > SIGNATURES_LIMIT:
        raise IntegrityError(f"{len(names)} signatures; at most {SIGNATURES_LIMIT} are looked at", where=str(place))
    return [(name, _read(place / name)) for name in names]


def add_signature(folder: Path, document: bytes) -> Path:
    """Put a signature that came from elsewhere (a registry) into a bundle's folder, under its key's name.

    Raises:
        IntegrityError: it is no signature. InputError, BuildError: it cannot be written.
    """
    envelope = _envelope(document, str(folder))
    stem = hashlib.sha256(document).hexdigest() if isinstance(envelope, dsse.Foreign) else _key_id(envelope)
    target = documents_folder(folder) / words.SIGNATURES / f"{stem[:16]}{words.SIGNATURE_END}"
    _write(target, document)
    return target


# -- trusting


def _signed_by(
    documents: Sequence[bytes], trusted: Sequence[PublicKey], where: str
) -> tuple[list[tuple[PublicKey, Statement]], list[str]]:
    """What the trusted keys state, and in words whatever else there is."""
    found: list[tuple[PublicKey, Statement]] = []
    others: list[str] = []
    for document in documents:
        envelope = _envelope(document, where)
        if isinstance(envelope, dsse.Foreign):
            others.append(f"a document that {envelope}")
            continue
        key = next((key for key in trusted if dsse.names_key(envelope, key)), None)
        if key is None:
            others.append(f"a signature by the key {_key_id(envelope)[:16]}")
        elif not dsse.is_signed_by(envelope, key):
            raise IntegrityError(
                f"the signature by the key {key.short_id} ({key.path}) is wrong: it was tampered with",
                where=where,
                fix=f"do not use it; {AGAIN}",
            )
        else:
            try:
                found.append((key, read_statement(envelope.payload)))
            except NotOurs as error:
                others.append(f"a statement by the key {key.short_id}, but {error}")
    return found, others


def _fault(said: Statement, index_digest: str, name: str, version: str, manifests: Sequence[str]) -> str | None:
    if said.index != index_digest:
        return _of_another(said, index_digest)
    if (said.name, said.version) != (name, version):
        return (
            f"is signed as {said.name} {said.version}, not as {name} {version}: "
            "another release, perhaps an older one, stands under this name"
        )
    if strangers := sorted(set(manifests) - set(said.variants.values())):
        return f"a variant is not among what was signed, it was swapped: {', '.join(strangers)}"
    return None


def _of_another(said: Statement, index_digest: str) -> str:
    return (
        f"the signature is of another bundle: {said.name} {said.version}, {said.index}; this one is {index_digest}. "
        "Something was swapped, or changed after it was signed"
    )


def _envelope(document: bytes, where: str) -> dsse.Envelope | dsse.Foreign:
    try:
        return dsse.parse(document)
    except dsse.Foreign as error:
        return error
    except dsse.Malformed as error:
        raise IntegrityError(f"a signature {error}", where=where, fix=AGAIN) from None


def _key_id(envelope: dsse.Envelope) -> str:
    """Hex of the key's name in a document, for messages and file names: safe, whatever the document says."""
    try:
        digest = base64.b64decode(envelope.hint, validate=True)
    except ValueError:
        digest = b""
    return digest.hex() if len(digest) == 32 else hashlib.sha256(envelope.hint.encode()).hexdigest()


# -- files


def _stands(target: Path, key: PublicKey, payload: bytes, bundle: Bundle) -> bool:
    """Whether this very signature is there already."""
    if not os.path.lexists(target):
        return False
    try:
        envelope = dsse.parse(_read(target))
        said = read_statement(envelope.payload)
    except (IntegrityError, dsse.Malformed, NotOurs):
        return False
    if said.index != bundle.digest or not dsse.names_key(envelope, key) or not dsse.is_signed_by(envelope, key):
        return False
    if envelope.payload != payload:
        raise InputError(
            "this key has signed the bundle already, with another statement",
            where=str(target),
            fix="replace it with --force",
        )
    return True


def _read(path: Path) -> bytes:
    try:
        with parts.open_regular(path, follow=False) as stream:
            data = stream.read(words.MANIFEST_LIMIT + 1)
    except (OSError, InputError) as error:
        what = error.strerror if isinstance(error, OSError) else error.what
        raise IntegrityError(f"a signature cannot be read: {what}", where=str(path), fix=AGAIN) from None
    if len(data) > words.MANIFEST_LIMIT:
        raise IntegrityError(f"is larger than {words.MANIFEST_LIMIT} bytes", where=str(path), fix=AGAIN)
    return data


def _write(target: Path, document: bytes) -> None:
    place = target.parent
    with parts.writing_to(place, instead="sign a copy of the bundle"):
        place.mkdir(exist_ok=True)
        if place.is_symlink():
            raise InputError("is a symbolic link", where=str(place), fix="remove the link")
        parts.replace_file(target, document)
