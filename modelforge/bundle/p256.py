"""Verification of ECDSA signatures on the curve P-256 with SHA-256, in plain Python.

So that a deployer's install can verify: `cryptography` would add more than half its size (docs/guides/signing.md).
All values are public, so that there is nothing for a timing attack to learn; signing is never done here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

# SEC 2, version 2.0, section 2.4.2 (secp256r1). a = p - 3.
_P = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_G = (
    0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
    0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
)

# SubjectPublicKeyInfo (RFC 5480) of an uncompressed P-256 point, up to the point's X: everything before is fixed.
_SPKI_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")

_Jacobian = tuple[int, int, int]
_INFINITY: _Jacobian = (1, 1, 0)


@dataclass(frozen=True)
class Point:
    """A public key: a point that was found to be on the curve."""

    x: int
    y: int


def point_from_spki(der: bytes) -> Point | None:
    """The key in a SubjectPublicKeyInfo (RFC 5480); None if that is anything but a P-256 point, uncompressed.

    Every point of the curve but infinity, which has no such encoding, has the order n: no more to check.
    """
    head, x, y = der[: len(_SPKI_HEAD)], der[len(_SPKI_HEAD) : -32], der[-32:]
    if len(der) != len(_SPKI_HEAD) + 64 or head != _SPKI_HEAD:
        return None
    point = Point(int.from_bytes(x), int.from_bytes(y))
    on_curve = (point.y**2 - point.x**3 + 3 * point.x - _B) % _P == 0
    return point if point.x < _P and point.y < _P and on_curve else None


def is_signed(message: bytes, signature: bytes, key: Point) -> bool:
    """Whether ``signature`` is one of ``message`` by ``key``: FIPS 186-5, section 6.4.2, with SHA-256.

    Args:
        signature: the DER of ``Ecdsa-Sig-Value`` (RFC 3279); only its one canonical spelling is taken.
    """
    numbers = _numbers(signature)
    if numbers is None or not all(1 <= number < _N for number in numbers):
        return False
    r, s = numbers
    inverse = pow(s, -1, _N)
    z = int.from_bytes(hashlib.sha256(message).digest())
    found = _sum_of_products(z * inverse % _N, _G, r * inverse % _N, (key.x, key.y))
    return found is not None and found % _N == r


def _numbers(der: bytes) -> tuple[int, int] | None:
    """r and s of SEQUENCE { INTEGER r, INTEGER s }. All lengths are below 128: one byte each."""
    if len(der) < 8 or der[0] != 0x30 or der[1] != len(der) - 2 or der[1] >= 0x80:
        return None
    r_end = 4 + der[3]
    r, s = _integer(der[2:r_end]), _integer(der[r_end:])
    return None if r is None or s is None else (r, s)


def _integer(der: bytes) -> int | None:
    """A positive INTEGER in the fewest bytes that DER allows."""
    body = der[2:]
    if len(der) < 3 or der[0] != 0x02 or der[1] != len(body) or body[0] & 0x80:
        return None
    if len(body) > 1 and body[0] == 0 and not body[1] & 0x80:
        return None
    return int.from_bytes(body)


def _sum_of_products(u: int, p: tuple[int, int], v: int, q: tuple[int, int]) -> int | None:
    """The affine x of ``u p + v q``; None at infinity. Both products at once, from the top bit down (Shamir)."""
    both = _add((*p, 1), (*q, 1))
    table = {(1, 0): (*p, 1), (0, 1): (*q, 1), (1, 1): both}
    total = _INFINITY
    for bit in range(max(u.bit_length(), v.bit_length()) - 1, -1, -1):
        total = _double(total)
        if addend := table.get((u >> bit & 1, v >> bit & 1)):
            total = _add(total, addend)
    x, _, z = total
    return None if z == 0 else x * pow(z, -2, _P) % _P


def _double(point: _Jacobian) -> _Jacobian:
    """Jacobian doubling for a = -3 (hyperelliptic.org/EFD, dbl-2001-b). No point of this curve has y = 0."""
    x, y, z = point
    delta, gamma = z * z % _P, y * y % _P
    beta = x * gamma % _P
    alpha = 3 * (x - delta) * (x + delta) % _P
    x3 = (alpha * alpha - 8 * beta) % _P
    z3 = ((y + z) ** 2 - gamma - delta) % _P
    return x3, (alpha * (4 * beta - x3) - 8 * gamma * gamma) % _P, z3


def _add(left: _Jacobian, right: _Jacobian) -> _Jacobian:
    """Jacobian addition (hyperelliptic.org/EFD, add-1998-cmo-2), with its exceptions: infinity, and equal x."""
    if left[2] == 0:
        return right
    if right[2] == 0:
        return left
    (x1, y1, z1), (x2, y2, z2) = left, right
    z1z1, z2z2 = z1 * z1 % _P, z2 * z2 % _P
    u1, u2 = x1 * z2z2 % _P, x2 * z1z1 % _P
    s1, s2 = y1 * z2 * z2z2 % _P, y2 * z1 * z1z1 % _P
    if u1 == u2:
        return _double(left) if s1 == s2 else _INFINITY
    h, r = u2 - u1, s2 - s1
    hh = h * h % _P
    hhh = h * hh % _P
    v = u1 * hh % _P
    x3 = (r * r - hhh - 2 * v) % _P
    return x3, (r * (v - x3) - s1 * hhh) % _P, h * z1 * z2 % _P
