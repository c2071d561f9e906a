"""Numbers of about 106 bits as unevaluated sums of two float64, elementwise on NumPy arrays.

The error-free sum and product are Knuth's and Dekker's (Numer. Math. 18, 1971). Plain float64 is not enough for a
reference: seven correctly rounded operations in a row leave L and its gradient up to 7 ulp off (in float32, over 4e7
rows). Here only the last rounding, to float64, is left to see, and the platform's exp and log1p do not matter.
"""

from __future__ import annotations

from math import factorial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _pair(high: Array, low: Array) -> DoubleDouble:
    """high + low; beside an infinity or NaN a low part has no meaning."""
    return DoubleDouble(high, np.where(np.isfinite(high), low, 0.0))


def _two_sum(a: Array, b: Array) -> DoubleDouble:
    s = a + b
    b_in_s = s - a
    return _pair(s, (a - (s - b_in_s)) + (b - b_in_s))


def _halves(a: Array) -> tuple[Array, Array]:
    """`a` as a sum of 26 and 27 bits, by masking: multiplying by 2^27 + 1 would overflow from 2^996 on."""
    high = (a.view(np.int64) & ~0x7FFFFFF).view(np.float64)
    return high, a - high


def _two_product(a: Array, b: Array) -> DoubleDouble:
    p = a * b
    (a1, a0), (b1, b0) = _halves(a), _halves(b)
    return _pair(p, ((a1 * b1 - p) + a1 * b0 + a0 * b1) + a0 * b0)


class DoubleDouble:
    """high + low, |low| at most half an ulp of high. Operators take DoubleDouble, arrays or numbers."""

    __array_ufunc__ = None  # an array on the left of an operator leaves the operation to this class

    def __init__(self, high: ArrayLike, low: ArrayLike = 0.0) -> None:
        self.high: Array = np.asarray(high, np.float64)
        self.low: Array = np.asarray(low, np.float64)

    @property
    def rounded(self) -> Array:
        return self.high + self.low

    def __getitem__(self, index: Any) -> DoubleDouble:
        return DoubleDouble(self.high[index], np.broadcast_to(self.low, self.high.shape)[index])

    def __neg__(self) -> DoubleDouble:
        return DoubleDouble(-self.high, -self.low)

    def __add__(self, other: Operand) -> DoubleDouble:
        other = dd(other)
        s, t = _two_sum(self.high, other.high), _two_sum(self.low, other.low)
        s = _two_sum(s.high, s.low + t.high)
        return _two_sum(s.high, s.low + t.low)

    def __sub__(self, other: Operand) -> DoubleDouble:
        return self + -dd(other)

    def __rsub__(self, other: ArrayLike) -> DoubleDouble:
        return -self + other

    def __mul__(self, other: Operand) -> DoubleDouble:
        other = dd(other)
        p = _two_product(self.high, other.high)
        return _two_sum(
            p.high, p.low + np.where(np.isfinite(p.high), self.high * other.low + self.low * other.high, 0.0)
        )

    def __truediv__(self, other: Operand) -> DoubleDouble:
        other = dd(other)
        first = self.high / other.high
        rest = self - other * first
        return _two_sum(first, np.where(np.isfinite(first), rest.high / other.high, 0.0))

    __radd__, __rmul__ = __add__, __mul__

    def ldexp(self, exponent: ArrayLike) -> DoubleDouble:
        """self * 2^exponent, exact but for underflow."""
        n = np.asarray(exponent).astype(np.int64)
        return DoubleDouble(np.ldexp(self.high, n), np.ldexp(self.low, n))


Operand = DoubleDouble | ArrayLike
LN2 = DoubleDouble(float.fromhex("0x1.62e42fefa39efp-1"), float.fromhex("0x1.abc9e3b39803fp-56"))


def dd(x: Operand) -> DoubleDouble:
    """Numbers as DoubleDouble, with low parts of 0."""
    return x if isinstance(x, DoubleDouble) else DoubleDouble(x)


def where(condition: NDArray[np.bool_], x: Operand, y: Operand) -> DoubleDouble:
    x, y = dd(x), dd(y)
    return DoubleDouble(np.where(condition, x.high, y.high), np.where(condition, x.low, y.low))


def dd_sum(x: DoubleDouble, axis: int | None = None) -> DoubleDouble:
    """Sum over one axis, or over all elements, by folding halves onto each other."""
    high, low = np.broadcast_arrays(x.high, x.low)
    if axis is None:
        high, low, axis = high.ravel(), low.ravel(), 0
    x = DoubleDouble(np.moveaxis(high, axis, 0), np.moveaxis(low, axis, 0))
    while (n := len(x.high)) > 1:
        folded, middle = x[: n // 2] + x[n // 2 : n // 2 * 2], x[n // 2 * 2 :]
        x = DoubleDouble(*(np.concatenate(pair) for pair in ((folded.high, middle.high), (folded.low, middle.low))))
    return x[0] if n else DoubleDouble(np.zeros(x.high.shape[1:]))


def _expm1_in_parts(x: DoubleDouble) -> tuple[Array, DoubleDouble]:
    """n and p with e^x = 2^n (1 + p), |p| < 0.42, p good to 2^-100 of itself."""
    n = np.rint(x.high / LN2.high)
    r = (x - LN2 * n).ldexp(-9)  # |r| < 7e-4: the ninth term of the series is below 2^-106
    p = dd(1 / factorial(8)) * r
    for k in range(7, 0, -1):
        p = (p + dd(1.0) / factorial(k)) * r
    for _ in range(9):  # e^(2r) - 1 from p = e^r - 1
        p = p * 2 + p * p
    return n, p


def exp_in_parts(x: DoubleDouble) -> tuple[NDArray[np.int64], DoubleDouble]:
    """n and y with e^x = 2^n y, y between 0.58 and 1.42: no x is too small."""
    n, p = _expm1_in_parts(x)
    return n.astype(np.int64), p + 1.0


def exp(x: DoubleDouble, exponent: int) -> DoubleDouble:
    """2^exponent e^x for x <= 0; exactly 0 below -800."""
    vanishes = x.high < -800
    n, y = exp_in_parts(where(vanishes, 0.0, x))
    return where(vanishes, 0.0, y.ldexp(n + exponent))


def log1p(x: DoubleDouble) -> DoubleDouble:
    """log(1 + x) for x >= 0: one Newton step from NumPy's value squares its error.

    Up to 2^-60 two terms of the series do, and need no smaller numbers than x: it may be as small as there are.
    """
    y = dd(np.log1p(x.high))
    n, p = _expm1_in_parts(y)
    step = (p.ldexp(n) + (np.ldexp(1.0, n.astype(np.int64)) - 1.0) - x) / (x + 1.0)
    return where(x.high < 2.0**-60, x - x * x * 0.5, y - step)
