"""Signed envelopes: DSSE with one ECDSA P-256 signature, carried as a Sigstore bundle v0.3 with a public key's hint.

DSSE: github.com/secure-systems-lab/dsse, protocol.md and envelope.md. Sigstore bundle: sigstore/protobuf-specs,
sigstore_bundle.proto. Transparency logs, certificates and time stamps are no part of this: a key is all there is.
Knows nothing of what is signed.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelforge.bundle import p256
from modelforge.bundle.format import MANIFEST_LIMIT
from modelforge.bundle.keys import PrivateKey, PublicKey
from modelforge.store import canonical_json

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
"""Media type of the document, and ``artifactType`` of the OCI referrer that carries it (cosign's BUNDLE_SPEC.md)."""
STATEMENT_TYPE = "application/vnd.in-toto+json"


class Malformed(ValueError):
    """Not a document of this kind; the message says why."""


class Foreign(Malformed):
    """A Sigstore bundle of another kind: certificates, logs, another version or payload. Not bad, but no use here."""


@dataclass(frozen=True)
class Envelope:
    """A document taken apart; **nothing in it is to be believed** before :func:`is_signed_by` said yes.

    Attributes:
        hint: what the document says of its key: ``PublicKey.hint``.
        key_id: hex of the same, or "" where the signer gave none.
    """

    payload: bytes
    signature: bytes
    hint: str
    key_id: str


def pae(payload: bytes, payload_type: str = STATEMENT_TYPE) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, key: PrivateKey) -> bytes:
    """Sign a statement; the Sigstore bundle as JSON bytes."""
    signature = {"sig": _base64(key.sign(pae(payload))), "keyid": key.public.id}
    return canonical_json(
        {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": key.public.hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": _base64(payload),
                "payloadType": STATEMENT_TYPE,
                "signatures": [signature],
            },
        }
    )


def parse(document: bytes) -> Envelope:
    """Take a document apart. Strict: a key that is not known here might say something that matters.

    Raises:
        Foreign: a Sigstore bundle of another kind.
        Malformed: not a Sigstore bundle.
    """
    if len(document) > MANIFEST_LIMIT:
        raise Malformed(f"is larger than {MANIFEST_LIMIT} bytes")
    try:
        value = json.loads(document.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise Malformed("is not JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("mediaType"), str):
        raise Malformed("is not a Sigstore bundle")
    if value["mediaType"] != BUNDLE_TYPE:
        raise Foreign(f'is of the type "{value["mediaType"][:80]}"; this version reads {BUNDLE_TYPE}')
    material = _object(value.get("verificationMaterial"), "verificationMaterial")
    if "publicKey" not in material or "dsseEnvelope" not in value or material.get("tlogEntries", []) != []:
        raise Foreign("is not signed with a plain key: certificates and transparency logs are not read here")
    return _envelope(value, material)


def is_signed_by(envelope: Envelope, key: PublicKey) -> bool:
    return p256.is_signed(pae(envelope.payload), envelope.signature, key.point)


def names_key(envelope: Envelope, key: PublicKey) -> bool:
    """Whether the document says that it was signed by this key."""
    return envelope.hint == key.hint and envelope.key_id in ("", key.id)


def _envelope(value: Mapping[str, Any], material: Mapping[str, Any]) -> Envelope:
    _known(value, {"mediaType", "verificationMaterial", "dsseEnvelope"})
    _known(material, {"publicKey", "tlogEntries"})
    public_key = _object(material["publicKey"], "publicKey")
    _known(public_key, {"hint"})
    envelope = _object(value["dsseEnvelope"], "dsseEnvelope")
    _known(envelope, {"payload", "payloadType", "signatures"})
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise Malformed("has not exactly one signature")
    signature = _object(signatures[0], "a signature")
    _known(signature, {"sig", "keyid"})
    if envelope.get("payloadType") != STATEMENT_TYPE:
        raise Foreign(f"does not sign an in-toto statement ({STATEMENT_TYPE})")
    return Envelope(
        _bytes(envelope.get("payload"), "payload"),
        _bytes(signature.get("sig"), "sig"),
        _text(public_key.get("hint"), "hint"),
        _text(signature.get("keyid", ""), "keyid"),
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may choose differently between two keys of one name."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError
    return value


def _known(value: Mapping[str, Any], keys: set[str]) -> None:
    if unknown := sorted(value.keys() - keys):
        raise Malformed(f"has keys that are not known here: {', '.join(unknown)[:80]}")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{what} is not an object")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{what} is not a string")
    return value


def _bytes(value: object, what: str) -> bytes:
    """Base64 in its one canonical spelling: no stray bits in the last character, no other characters."""
    try:
        data = base64.b64decode(_text(value, what), validate=True)
    except (ValueError, binascii.Error):
        data = b""
    if not data or _base64(data) != value:
        raise Malformed(f"{what} is not base64")
    return data


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
