"""Our verification of ECDSA against the `cryptography` package: what it signs holds, what it refuses is refused."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from modelforge.bundle.p256 import Point, is_signed, point_from_spki

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
PRIME = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
# RFC 6979's nonces: hypothesis needs the same data for the same draws.
REPEATABLE = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
SECRETS = st.one_of(
    st.integers(1, ORDER - 1), st.sampled_from([1, 2, 3, ORDER - 1, ORDER - 2, ORDER // 2, 2**255, 2**128])
)


def spki(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def point(public: ec.EllipticCurvePublicKey) -> Point:
    found = point_from_spki(spki(public))
    assert found is not None
    return found


def accepts(public: ec.EllipticCurvePublicKey, message: bytes, signature: bytes) -> bool:
    """The oracle."""
    try:
        public.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(secret=SECRETS, message=st.binary(max_size=200))
def test_what_is_signed_holds(secret: int, message: bytes) -> None:
    """Also for the keys G and -G, where the sums of Shamir's trick meet their exceptions."""
    key = ec.derive_private_key(secret, ec.SECP256R1())
    signature = key.sign(message, REPEATABLE)
    assert is_signed(message, signature, point(key.public_key()))
    assert not is_signed(message + b"\0", signature, point(key.public_key()))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), secret=SECRETS)
def test_as_the_library_decides(data: st.DataObject, secret: int) -> None:
    """Chosen numbers and broken encodings: both say the same."""
    key = ec.derive_private_key(secret, ec.SECP256R1())
    message = data.draw(st.binary(max_size=20))
    r, s = decode_dss_signature(key.sign(message, REPEATABLE))
    special = st.sampled_from([0, 1, 2, ORDER - 1, ORDER, ORDER + 1, PRIME, 2**256 - 1])
    r, s = (
        data.draw(st.one_of(st.sampled_from([n, ORDER - n, n + ORDER, n ^ 1]), special)) for n in (r, s)
    )  # the negated s is valid too: ECDSA is so
    signature = bytearray(encode_dss_signature(r, s))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(signature) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                signature[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del signature[at]
            case _:
                signature.insert(at, data.draw(st.integers(0, 255)))
        if not signature:
            break
    expected = accepts(key.public_key(), message, bytes(signature))
    assert is_signed(message, bytes(signature), point(key.public_key())) == expected


def test_numbers_have_one_spelling() -> None:
    """A zero more, or a length in two bytes, is the same number in BER, and no signature in DER."""
    key = ec.derive_private_key(99, ec.SECP256R1())
    signature = key.sign(b"message", REPEATABLE)
    longer = bytes([0x30, signature[1] + 1, 0x02, signature[3] + 1, 0]) + signature[4:]
    ber = bytes([0x30, 0x81]) + signature[1:]
    assert is_signed(b"message", signature, point(key.public_key()))
    for other in (longer, ber, signature + b"\0"):
        assert not is_signed(b"message", other, point(key.public_key()))


def test_a_sum_at_infinity() -> None:
    """r = -z/d makes u1 G + u2 Q infinite for any s: refused, not computed with."""
    secret, message = 12345, b"message"
    key = ec.derive_private_key(secret, ec.SECP256R1())
    z = int.from_bytes(hashlib.sha256(message).digest())
    signature = encode_dss_signature(-z * pow(secret, -1, ORDER) % ORDER, 77)
    assert not is_signed(message, signature, point(key.public_key()))
    assert not accepts(key.public_key(), message, signature)


def test_known_answer() -> None:
    """RFC 6979, A.2.5: P-256 with SHA-256, message "sample"."""
    key = Point(
        0x60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6,
        0x7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299,
    )
    signature = encode_dss_signature(
        0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
        0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8,
    )
    assert is_signed(b"sample", signature, key)
    assert not is_signed(b"test", signature, key)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP256K1()], ids=lambda curve: curve.name)
def test_other_curves_are_no_keys(curve: ec.EllipticCurve) -> None:
    assert point_from_spki(spki(ec.generate_private_key(curve).public_key())) is None


def test_points_off_the_curve_are_no_keys() -> None:
    der = bytearray(spki(ec.derive_private_key(7, ec.SECP256R1()).public_key()))
    good = point_from_spki(bytes(der))
    assert good is not None
    der[-1] ^= 1
    assert point_from_spki(bytes(der)) is None
    # The same point with x + p does not fit; zero is not on the curve; nor is anything cut or longer.
    head = bytes(der[:27])
    assert point_from_spki(head + bytes(64)) is None
    assert point_from_spki(head + PRIME.to_bytes(32) + bytes(32)) is None
    assert point_from_spki(bytes(der[:-1])) is None
    assert point_from_spki(bytes(der) + b"\0") is None
    assert point_from_spki(b"") is None
