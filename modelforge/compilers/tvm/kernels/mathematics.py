"""Functions of FP32 numbers as polynomials of vector instructions: no call, no branch, no table.

Errors are against float64 over all finite floats unless said otherwise; one ulp is the spacing of floats at the true
result. Infinities and NaN give what IEEE 754 asks for. Other element types go through FP32.

Sources: S. Moshier's Cephes (single/expf.c, single/logf.c) for exp and log. The rational forms of tanh and erf are
least-squares fits of f(x)/x in x squared, weighted to an even relative error, and nudged to the least error in FP32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt as root
from typing import Any, Final

from modelforge.compilers.tvm.api import tirx
from modelforge.compilers.tvm.arm import USQADD
from modelforge.compilers.tvm.machine import Machine

LOG2E: Final = 1.4426950408889634
_LN2: Final = (0.693359375, -2.12194440e-4)
"""ln 2 in two parts, the first with few bits: its product with a small integer is exact (Cody and Waite)."""
_ROUND: Final = 12582912.0
"""1.5 * 2**23: added to a float, its last bits are the nearest integer."""
_EXP: Final = (
    1.0,
    1.0,
    5.0000001201e-1,
    1.6666665459e-1,
    4.1665795894e-2,
    8.3334519073e-3,
    1.3981999507e-3,
    1.9875691500e-4,
)
_LEAST: Final = (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105)
"""Powers of two over [-1/2, 1/2], with the least relative error of four terms: 7.5e-5."""
COARSE_UNIT: Final = 1 / _LEAST[3]
"""What sums of 1 and such powers are multiplied by, for a polynomial whose highest term has no factor."""
_EXP2: Final = (
    _LEAST[2] / _LEAST[3],
    _LEAST[1] / _LEAST[3],
    (_LEAST[0] - _LEAST[1] * _LEAST[2] / _LEAST[3]) / _LEAST[3],
)
"""a, b and c of (f + a) (f f + b) + c, which is that polynomial in that unit: products and sums without copies."""
_FARTHEST: Final = 120.0
_LOG: Final = (
    3.3333331174e-1,
    -2.4999993993e-1,
    2.0000714765e-1,
    -1.6668057665e-1,
    1.4249322787e-1,
    -1.2420140846e-1,
    1.1676998740e-1,
    -1.1514610310e-1,
    7.0376836292e-2,
)
_TANH: Final = (
    9.01,
    (0.7254192233085632, 0.09706447273492813, 0.0025352826341986656, 1.4942173947929405e-05, 9.676380585688094e-09),
    (0.7254191637039185, 0.3388707637786865, 0.018769823014736176, 0.00023826675896998495, 5.636662763208733e-07),
)
_ERF: Final = (
    3.925,
    (
        0.7930617332458496,
        0.1339424103498459,
        0.03708629682660103,
        0.0026509282179176807,
        0.00020018794748466462,
        1.438145773136057e-06,
    ),
    (
        0.7028326392173767,
        0.35298049449920654,
        0.0802459716796875,
        0.01052958332002163,
        0.0008178713615052402,
        2.6742101908894256e-05,
    ),
)
"""Where the function is one to half an ulp, and the coefficients above and below the line."""


def exp(x: Any) -> Any:
    """e to the x; at most 2 ulp, subnormal results included."""
    # 2**n in two factors: n reaches from -150 (half the least subnormal) to 128 (infinity).
    return _exp(x, -104.0, 89.0, lambda p, n: p * _power_of_two(n >> 1) * _power_of_two(n - (n >> 1)))


def exp_of_negative(x: Any) -> Any:
    """e to the x for x <= 0, for sums of such: at most 2 ulp; zero below -87.7, where results would be subnormal."""
    return _exp(x, -88.0, 88.0, _scaled)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e to the -x); at most 4 ulp; zero below -87.7."""
    return let(x, lambda x: number(1.0) / (number(1.0) + _exp(-x, -88.0, 88.7, _scaled)))


def coarse_quotient(numerator: Any, t: Any, machine: Machine) -> Any:
    """``numerator / (1 + 2**t) / COARSE_UNIT``, within 8e-5 of it, relatively; zero for infinite ``t``.

    ``t`` counts between -120 and 120, which is far beyond what 8 bits of the result can tell.
    """

    def power(t: Any) -> Any:
        if machine.isa == "aarch64":
            return let(tirx.min(number(_FARTHEST), t), lambda t: let(tirx.round(t), lambda n: saturated(t, n)))
        bounded = tirx.max(number(-_FARTHEST), tirx.min(number(_FARTHEST), t))
        return let(bounded, lambda t: let(t + number(_ROUND), lambda rounded: shifted(t, rounded)))

    def shifted(t: Any, rounded: Any) -> Any:
        # The last bits of ``rounded`` are the power of two, and what stands above them is shifted out.
        return tirx.reinterpret("float32", _bits(polynomial(t - (rounded - number(_ROUND)))) + (_bits(rounded) << 23))

    def saturated(t: Any, n: Any) -> Any:
        # FCVTZS shifts and bounds, USQADD ends at zero, which is what two to the least powers should give.
        power = tirx.call_llvm_pure_intrin("int32", "llvm.fptosi.sat", n * number(float(1 << 23)))
        return tirx.reinterpret("float32", tirx.call_llvm_pure_intrin("int32", USQADD, _bits(polynomial(t - n)), power))

    def polynomial(part: Any) -> Any:
        return let(part, lambda f: (f + number(_EXP2[0])) * (f * f + number(_EXP2[1])) + number(_EXP2[2]))

    return numerator / (number(COARSE_UNIT) + power(t))


def silu(x: Any) -> Any:
    """x * sigmoid(x)."""
    return let(x, lambda x: x / (number(1.0) + _exp(-x, -88.0, 88.7, _scaled)))


def tanh(x: Any) -> Any:
    """At most 5 ulp."""
    return _odd_rational(x, *_TANH)


def erf(x: Any) -> Any:
    """At most 6 ulp."""
    return _odd_rational(x, *_ERF)


def gelu(x: Any) -> Any:
    """x times the normal distribution's share below x (Hendrycks and Gimpel, 2016, by the error function)."""
    return let(x, lambda x: number(0.5) * x * (number(1.0) + erf(x * number(1 / root(2)))))


def gelu_tanh(x: Any) -> Any:
    """GELU by the hyperbolic tangent, as the same paper approximates it."""
    scale = root(2 / 3.141592653589793)

    def inner(x: Any) -> Any:
        return number(scale) * x * (number(1.0) + number(0.044715) * x * x)

    return let(x, lambda x: number(0.5) * x * (number(1.0) + tanh(inner(x))))


def log(x: Any) -> Any:
    """The natural logarithm; at most 2 ulp, of subnormal numbers too."""
    return let(x, _log)


def softplus(x: Any) -> Any:
    """log(1 + e to the x) = max(x, 0) + log(1 + e to the -|x|): within 2e-7 of it, absolutely."""

    def rest(x: Any) -> Any:
        return log(number(1.0) + exp_of_negative(-tirx.max(x, -x)))

    return let(x, lambda x: tirx.max(x, number(0.0)) + rest(x))


def power(x: Any, exponent: float) -> Any | None:
    """x to a constant, by products, a square root and one division; None for other exponents. NaN for half powers of
    minus infinity."""
    if exponent == 0:
        return number(1.0)
    if exponent < 0:
        positive = power(x, -exponent)
        return None if positive is None else number(1.0) / positive
    whole, rest = divmod(exponent, 1)
    if whole > 8 or rest not in (0, 0.5):
        return None
    return let(x, lambda x: _product(x, int(whole), tirx.sqrt(x) if rest else None))


def number(value: float) -> Any:
    """A constant in FP32."""
    return tirx.const(value, "float32")


def let(value: Any, body: Callable[[Any], Any]) -> Any:
    """Compute a value once, whatever the expression over it: trees of polynomials of polynomials would explode."""
    if isinstance(value, tirx.Var):
        return body(value)
    name = tirx.Var("v", value.ty.dtype)
    return tirx.Let(name, value, body(name))


def horner(coefficients: Sequence[float], x: Any) -> Any:
    """A polynomial, the constant term first."""
    *rest, total = [number(value) for value in coefficients]
    for value in reversed(rest):
        total = total * x + value
    return total


def _exp(x: Any, low: float, high: float, scale: Callable[[Any, Any], Any]) -> Any:
    """The polynomial over [-ln 2 / 2, ln 2 / 2], times a power of two. The bound stands first: NaN passes through."""

    def parts(x: Any, rounded: Any) -> Any:
        polynomial = let(_fraction(x, rounded - number(_ROUND)), lambda r: horner(_EXP, r))
        return let(_bits(rounded) - _bits(number(_ROUND)), lambda n: scale(polynomial, n))

    bounded = tirx.min(number(high), tirx.max(number(low), x))
    return let(bounded, lambda x: let(x * number(LOG2E) + number(_ROUND), lambda rounded: parts(x, rounded)))


def _fraction(x: Any, n: Any) -> Any:
    return let(n, lambda n: x - n * number(_LN2[0]) - n * number(_LN2[1]))


def _scaled(value: Any, n: Any) -> Any:
    return value * _power_of_two(n)


def _power_of_two(n: Any) -> Any:
    """2**n for n from -127 (which gives zero) to 128 (which gives infinity)."""
    return tirx.reinterpret("float32", (n + 127) << 23)


def _bits(x: Any) -> Any:
    return tirx.reinterpret("int32", x)


def _log(x: Any) -> Any:
    """x = m * 2**e with m in [sqrt(1/2), sqrt(2)); subnormal numbers are scaled up first."""
    least, up = number(1.17549435e-38), number(8388608.0)
    normal = tirx.Select(x < least, x * up, x)
    shift = tirx.Select(x < least, tirx.const(-23, "int32"), tirx.const(0, "int32"))

    def parts(bits: Any) -> Any:
        # 0x3f3504f3 is sqrt(1/2): the exponent counts from there.
        offset = bits - 0x3F3504F3
        mantissa = tirx.reinterpret("float32", (offset & 0x007FFFFF) + 0x3F3504F3)
        exponent = tirx.Cast("float32", (offset >> 23) + shift)
        return let(mantissa - number(1.0), lambda m: let(exponent, lambda e: series(m, e)))

    def series(m: Any, e: Any) -> Any:
        return let(m * m, lambda z: m + (m * z * horner(_LOG, m) + e * number(_LN2[1]) - number(0.5) * z)) + e * number(
            _LN2[0]
        )

    infinity, nan = number(float("inf")), number(float("nan"))
    finite = let(_bits(normal), parts)
    positive = tirx.Select(x < number(0.0), nan, finite)
    return tirx.Select(x == number(0.0), -infinity, tirx.Select(x < infinity, positive, x))


def _odd_rational(x: Any, bound: float, above: Sequence[float], below: Sequence[float]) -> Any:
    """x P(x x) / Q(x x) of a function that is odd and ends at one."""

    def ratio(y: Any) -> Any:
        return let(y * y, lambda z: y * horner(above, z) / horner(below, z))

    clipped = let(tirx.min(number(bound), tirx.max(number(-bound), x)), ratio)
    return tirx.min(number(1.0), tirx.max(number(-1.0), clipped))


def _product(x: Any, count: int, first: Any | None) -> Any:
    """x to the ``count`` times ``first``, by squaring."""
    result = first
    square = x
    while count:
        if count & 1:
            result = square if result is None else result * square
        square = square * square
        count >>= 1
    return result
