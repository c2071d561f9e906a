"""Arithmetic of one logit and of one sample in Triton, for the kernels of both losses."""

import triton
import triton.language as tl

__all__ = ["exp", "exp_of_row", "exp_to_add", "log1p", "loss_and_slope", "origin_near", "plus", "weighted"]

# Triton compares each global of a kernel before each launch, which took a quarter of it: numbers are written out here.
# 1.4426950408889634 is log2 e, and 177 / 256 + 0.0017409305599452862 is ln 2: of eight bits, so that its multiples are
# exact, and the rest. 12582912 = 1.5 x 2^23, added, leaves the nearest integer in the low bits.
#
# Exponentials are formed 2^40 or 2^64 times as large, and what is left for the backward pass 2^24 times: numbers that
# end up in the subnormal range, or leave it by a weight or a loss scale, keep all their bits.


@triton.jit
def _split_exp(z, m, RAISED: tl.constexpr, WIDE: tl.constexpr):
    """exp(z - m) 2^RAISED is exp(rest) scale, |rest| <= 0.36, and 0 where it is `far`. If not WIDE, z is of a half
    type and m, too, and 0 or at least 2^-6: m + n ln 2 is near z, and exact but for the last bits of ln 2.
    """
    d = z - m
    shifted = tl.fma(d, 1.4426950408889634, 12582912.0 + 127 + RAISED)
    scale = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    n = shifted - (12582912.0 + 127 + RAISED)
    if WIDE:
        back = d - z
        rest = tl.fma(n, -0.0017409305599452862, tl.fma(n, -177 / 256, d)) + ((z - (d - back)) - (m + back))
    else:
        rest = tl.fma(n, -0.0017409305599452862, z - tl.fma(n, 177 / 256, m))
    return rest, scale, d < -87.0 - 0.69 * RAISED  # not true of NaN


@triton.jit
def exp(z, m, RAISED: tl.constexpr, WIDE: tl.constexpr):
    """Of every logit, by the device's exp2, which is good to 2 ulp."""
    rest, scale, far = _split_exp(z, m, RAISED, WIDE)
    return tl.where(far, 0.0, tl.exp2(rest * 1.4426950408889634) * scale)


@triton.jit
def origin_near(m):
    """A multiple of 32 near m. What is near m itself lies at an exact distance from it, for a half type as good as
    always, and for float32 but for one rounding that a subtraction finds again.
    """
    return tl.floor(m * (1 / 32) + 0.5) * 32


@triton.jit
def exp_to_add(z, origin, WIDE: tl.constexpr):
    """exp(z - origin); 0 from -87 on, where z is far below the largest."""
    d = z - origin
    product = d * 1.4426950408889634
    lost = tl.fma(product, -0.6931471805599453, d)
    if WIDE:
        lost += z - (d + origin)
    p = tl.exp2(product)
    return tl.fma(p, tl.minimum(lost, 1.0), p)  # NaN, of a logit of -inf, becomes 1


@triton.jit
def plus(total, lost, x):
    """The sum and what its roundings took, with x. Four side by side are added in pairs: up to Triton 3.6 a thread adds
    its 32 in sequence, of which, all alike, up to 8 x 2^-24 is lost. They are a thread's own: it costs nothing.
    """
    if x.shape[1] >= 256:
        for _ in tl.static_range(2):
            a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
            x = a + b
    x = tl.sum(x, 1)
    both = total + x
    back = both - total
    return both, lost + tl.where(both == float("inf"), 0.0, (total - (both - back)) + (x - back))


@triton.jit
def exp_of_row(z, m):
    """2^64 times it; once a sample, in two parts, since L is about its square."""
    rest, scale, far = _split_exp(z, m, 64, True)
    p = tl.fma(rest, 1.3927684616575004e-3, 8.36438069329107e-3)
    p = tl.fma(rest, p, 4.166654542109553e-2)
    p = tl.fma(rest, p, 1.6666569628115477e-1)
    p = tl.fma(rest, p, 0.5)
    high = rest + 1.0
    low = tl.fma(rest * rest, p, rest - (high - 1.0))
    return tl.where(far, 0.0, high * scale), tl.where(far, 0.0, low * scale)


@triton.jit
def log1p(x):
    y = tl.div_rn(x, 2.0 + x)
    square = y * y
    p = tl.fma(square, 0.11111111, 0.14285715)
    p = tl.fma(square, p, 0.2)
    p = tl.fma(square, p, 0.33333334)
    return tl.where(x < 0.5, tl.fma(2.0 * y * square, p, 2.0 * y), tl.log(1.0 + x))


@triton.jit
def loss_and_slope(r, q, n, strength, rest):
    """Loss and K of a class."""
    return (rest + strength * r) * n, rest + strength * (r + tl.where(q == 0, 0.0, q * n))


@triton.jit
def weighted(w, loss):
    return tl.where((w == 0) & (loss == float("inf")), 0.0, w * loss)
