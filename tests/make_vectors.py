"""Write the golden vectors of `ref/vectors/README.md`: python tests/make_vectors.py [--digits 60] [OUT]

The witness for `lace_loss.ref` and every port: textbook formulas in mpmath that share no line with either. 60 and 200
digits give the same bytes (`test_vectors.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import accumulate
from pathlib import Path

import mpmath
from mpmath import mpf

INF, NAN = math.inf, math.nan

# ---- Binary formats


FORMATS = {"f64": (53, 11), "f32": (24, 8), "f16": (11, 5), "bf16": (8, 8)}  # bits of the significand, of the exponent


def lowest(dtype):
    """Exponent of the smallest subnormal."""
    p, width = FORMATS[dtype]
    return 3 - 2 ** (width - 1) - p


def encode(x, dtype):
    """Bit pattern of x rounded once: to nearest, ties to even, subnormals included. None for NaN."""
    p, width = FORMATS[dtype]
    infinity = (2**width - 1) << (p - 1)
    if mpmath.isnan(x):
        return None
    sign = (x < 0) << (p - 1 + width)
    if mpmath.isinf(x):
        return sign | infinity
    significand, exponent = x.man_exp
    top = significand.bit_length() + exponent
    if significand == 0 or top < lowest(dtype):
        return sign
    unit = max(top - p, lowest(dtype))
    n = round(Fraction(significand) * Fraction(2) ** (exponent - unit))
    return sign | min(((unit - lowest(dtype)) << (p - 1)) + n, infinity)  # a carry moves into the exponent by itself


def parts(pattern, dtype):
    """Integer and exponent of the unit of a finite pattern."""
    p, width = FORMATS[dtype]
    exponent, n = divmod(pattern & ~(1 << (p - 1 + width)), 1 << (p - 1))
    return n + ((exponent > 0) << (p - 1)), lowest(dtype) + max(exponent - 1, 0)


def decode(pattern, dtype):
    p, width = FORMATS[dtype]
    if pattern is None:
        return mpf("nan")
    n, unit = parts(pattern, dtype)
    size = mpf("inf") if (pattern >> (p - 1)) % 2**width == 2**width - 1 else mpmath.ldexp(n, unit)
    return -size if pattern >> (p - 1 + width) else size


def ulp(pattern, dtype):
    return mpmath.ldexp(1, parts(pattern, dtype)[1])


def rounded(x, dtype):
    return decode(encode(mpf(x), dtype), dtype)


def words(patterns, dtype):
    return ["nan" if b is None else f"{b:0{sum(FORMATS[dtype]) // 4}x}" for b in patterns]


# ---- Mathematics: exact values, each with the sum of the absolute values of its terms


@cache
def exp(x, precision):
    """Long rows share their logits over cases and dtypes."""
    return mpmath.exp(x)


def summed(terms):
    return mpmath.fsum(terms), mpmath.fsum(map(abs, terms))


def running_sums(terms):
    """Of the first 0, 1, ... terms."""
    return list(accumulate(terms, initial=mpf(0)))


def sample(z, a, s, at, v=None):
    """Loss, gradient (at the classes `at`) and product with v of one row; a has the coefficients that are not 0.

    With sum_k q_k = 1 a gradient entry q_j sum_k a_k K_k - a_j K_j is the sum over k other than j of
    q_j a_k K_k - q_k a_j K_j: only classes of both signs cancel, and tied ones exactly.
    """
    if any(mpmath.isnan(x) or x == INF for x in z) or all(x == -INF for x in z):
        return (mpf("nan"), 1), [(mpf("nan"), 1)] * len(at), [(mpf("nan"), 1)] * len(at)
    e = [exp(x, mpmath.mp.prec) for x in z]
    total = mpmath.fsum(e)
    q = [x / total for x in e]
    before, after = running_sums(e), running_sums(e[::-1])[::-1]
    f, ak, slope = {}, {}, {}
    for k in a:
        others = before[k] + after[k + 1]
        r = others / total
        n = mpmath.log1p(others / e[k]) if e[k] else mpf("inf")
        qn = q[k] * n if e[k] else mpf(0)
        f[k] = a[k] * ((1 - s) + s * r) * n
        ak[k] = a[k] * ((1 - s) + s * (r + qn))
        slope[k] = a[k] * s * qn, -2 * a[k] * s * q[k]

    def in_logits(x, j):
        return [q[j] * x[k] for k in x if k != j] + ([-p * x[j] for k, p in enumerate(q) if k != j] if j in x else [])

    loss, gradient = summed(f.values()), [summed(in_logits(ak, j)) for j in at]
    if v is None:
        return loss, gradient, []
    classes = range(len(z))
    step = {j: mpmath.fsum(q[k] * (v[j] - v[k]) for k in classes) for j in classes}
    mean_size = mpmath.fsum(q[k] * abs(v[k]) for k in classes)
    size = {j: abs(v[j]) + mean_size for j in classes}
    change = {k: step[k] * sum(slope[k]) for k in a}
    change_size = {k: size[k] * sum(map(abs, slope[k])) for k in a}
    product = []
    for j in at:
        value = mpmath.fsum([q[j] * step[j] * x for x in ak.values()] + in_logits(change, j))
        terms = mpmath.fsum(
            [q[j] * size[j] * abs(x) for x in ak.values()] + [abs(x) for x in in_logits(change_size, j)]
        )
        product.append((value, terms))
    return loss, gradient, product


# ---- A case and its text


@dataclass
class Case:
    """Fields as in the README. Values are rounded to the file's dtype when it is written."""

    category: str
    name: str
    shape: tuple[int, ...]
    logits: list[float] | None
    target: list[int] | None = None
    probabilities: list[float] | None = None
    lcg: tuple[int, int] | None = None
    put: tuple[int, float] | None = None
    weight: list[float] | None = None
    ignore_index: int | None = None
    reduction: str = "none"
    smoothing: float | None = None
    strength: float | None = None
    grad_output: list[float] | None = None
    vector: list[float] | None = None
    at: list[int] | None = None
    error: bool = False


def lcg(seed, exponent, count):
    values = []
    for _ in range(count):
        seed = (1664525 * seed + 1013904223) % 2**32
        values.append(mpmath.ldexp(seed // 256 - 2**23, exponent))
    return values


def evaluate(case, dtype):
    """Loss, gradient and product as lists of (value, sum of absolute terms); the widest gap between a row's logits."""

    def numbers(values):
        return None if values is None else [rounded(x, dtype) for x in values]

    batched = len(case.shape) > 1
    count, classes, inner = (case.shape[0] if batched else 1), case.shape[batched], math.prod(case.shape[2:])
    z = lcg(*case.lcg, math.prod(case.shape)) if case.lcg else numbers(case.logits)
    if case.put:
        z[case.put[0]] = rounded(case.put[1], dtype)
    y, v, w = numbers(case.probabilities), numbers(case.vector), numbers(case.weight) or [mpf(1)] * classes
    g = numbers(case.grad_output) or [mpf(1)]
    s, smoothing = mpf(1 if case.strength is None else case.strength), mpf(case.smoothing or 0)
    ignored = -100 if case.ignore_index is None else case.ignore_index
    kept = [i for i in range(count * inner) if y or case.target[i] != ignored]
    divisor = mpmath.fsum(1 if y else w[case.target[i]] for i in kept) if case.reduction == "mean" else mpf(1)

    nothing = mpf(0), mpf(0)
    losses, gradient, product, gap = [nothing] * (count * inner), [nothing] * len(z), [nothing] * len(z), mpf(0)
    for i in kept:
        places = [(i // inner * classes + k) * inner + i % inner for k in range(classes)]
        row, along = [z[j] for j in places], [v[j] for j in places] if v else None
        goal = {k: y[j] for k, j in enumerate(places)} if y else {case.target[i]: 1}
        among = range(classes) if smoothing else goal
        a = {k: w[k] * ((1 - smoothing) * goal.get(k, 0) + smoothing / classes) for k in among}
        at = [k for k, j in enumerate(places) if j in case.at] if case.at else range(classes)
        losses[i], *entries = sample(row, {k: x for k, x in a.items() if x}, s, at, along)
        scale = g[i % len(g)] / divisor
        for values, into in zip(entries, (gradient, product), strict=True):
            for k, (value, terms) in zip(at, values, strict=False):
                into[places[k]] = scale * value, abs(scale) * terms
        finite = [x for x in row if mpmath.isfinite(x)]
        gap = max(gap, max(finite, default=0) - min(finite, default=0))

    if case.reduction != "none":
        value, terms = (mpmath.fsum(column) for column in zip(nothing, *losses, strict=True))
        losses = [(value / divisor, terms / abs(divisor)) if divisor else (mpf("nan"), terms)]
    if case.at:
        gradient = [gradient[j] for j in case.at]
    return {"loss": losses, "gradient": gradient, "product": product}, gap


def tolerance(pattern, terms, dtype, ulps, units):
    """Bit pattern of so many ulp or, where that is None, of so many times u times the terms; rounded up.

    Half types are computed in float32 and rounded once: an ulp, and beside it so many times u of float32.

    The units count roundings along the longest path of the formulas, doubled and rounded up to a power of two. With
    compensated exponentials q is good to 4 u, n to 2, r to 5, f to 9, K to 10, a to 4: a f 14, a gradient entry
    q_j a_k K_k 4 + 14 + 2 = 20, hence 32. In a product v - q.v adds 8 and q n - 2 q another 8, three such
    terms are added: 38 at most, hence 64.
    """
    if terms == 0 or pattern is None or not mpmath.isfinite(decode(pattern, dtype)):
        return 0
    if ulps is not None:
        wanted = ulps * ulp(pattern, dtype)
        return encode(wanted, dtype) + (rounded(wanted, dtype) < wanted)
    if dtype in ("f16", "bf16"):
        wanted = ulp(pattern, dtype) + mpmath.ldexp(units * terms, -FORMATS["f32"][0])
        return encode(wanted, dtype) + (rounded(wanted, dtype) < wanted)
    # The next value up, always: the last digits of terms that add up to a power of two must not decide.
    return max(encode(mpmath.ldexp(units * terms, -FORMATS[dtype][0]), dtype) + 1, 4)


def question(case, dtype):
    """Lines of the inputs."""

    def values(xs, dtype=dtype):
        return words([encode(mpf(x), dtype) for x in xs], dtype)

    yield "category", [case.category]
    yield "shape", case.shape
    if case.logits is not None:
        yield "logits", values(case.logits)
    if case.lcg:
        yield "lcg", case.lcg
    if case.put:
        yield "put", [case.put[0], *values(case.put[1:])]
    if case.target is not None:
        yield "target", case.target
    if case.probabilities is not None:
        yield "probabilities", values(case.probabilities)
    if case.weight:
        yield "weight", values(case.weight)
    if case.ignore_index is not None:
        yield "ignore-index", [case.ignore_index]
    yield "reduction", [case.reduction]
    if case.smoothing is not None:
        yield "smoothing", values([case.smoothing], "f64")
    if case.strength is not None:
        yield "strength", values([case.strength], "f64")
    if case.grad_output is not None:
        yield "grad-output", values(case.grad_output)
    if case.vector is not None:
        yield "vector", values(case.vector)
    if case.at:
        yield "at", case.at


def answer(case, dtype, level):
    """Lines of the expected values."""
    if case.error:
        yield "expect", ["error"]
        return
    found, gap = evaluate(case, dtype)
    tolerances = set()
    for quantity in {"core": ["loss"], "second": ["product"]}.get(level, ["loss", "gradient"]):
        ulps = 1 if dtype in ("f16", "bf16") else 4
        if level in ("batch", "layout", "rows") and dtype in ("f64", "f32"):
            added = case.reduction == "mean" or (case.reduction == "sum" and quantity == "loss")
            ulps = 8 + mpf(len(case.target or [])) / 2 * added
        if case.probabilities is not None or case.smoothing or min(case.weight or [0]) < 0 or level == "second":
            ulps = None
        patterns = [encode(value, dtype) for value, _ in found[quantity]]
        allowed = [
            tolerance(pattern, terms, dtype, ulps, 64 if level == "second" else 32)
            for pattern, (_, terms) in zip(patterns, found[quantity], strict=True)
        ]
        tolerances.update(allowed)
        yield quantity, words(patterns, dtype)
        yield f"{quantity}-tolerance", words(allowed, dtype)
    if dtype in ("f64", "f32") and any(tolerances):
        # Exponentials below the smallest normal number have few digits: factors above 1 multiply what they have lost.
        factor = math.prod(max(1, *map(abs, values)) for values in (case.weight or [1], case.grad_output or [1]))
        subnormal = mpmath.exp(-gap) < mpmath.ldexp(1, lowest(dtype) + FORMATS[dtype][0] - 1)
        yield "plain", [math.ceil(4 + 4 * min(gap, 1000) + (factor if subnormal and factor > 1 else 0))]


def file_text(dtype, level, cases):
    lines = ["lace-vectors 1", f"dtype {dtype}", f"level {level}", f"count {len(cases)}"]
    lines.append("# Exact values by mpmath, each rounded once.")
    for number, case in enumerate(cases, 1):
        lines.append(f"case {number} {case.name}")
        for key, values in (*question(case, dtype), *answer(case, dtype, level)):
            lines.append(" ".join([key, *map(str, values)]))
        lines.append("end")
    return "\n".join(lines) + "\n"


# ---- The cases

# Sixteen ordinary logits; the largest is the sixth.
SPREAD = [0.3, -1.2, 0.7, 0.05, -0.4, 0.9, -2.1, 0.0, 0.55, -0.8, 0.15, -0.35, 0.6, -1.7, 0.45, -0.1]

# Margins between the target and the best other class. Loss and gradient are about e^(-2 margin): the first list keeps
# them normal, the second makes them subnormal, then 0.
CONFIDENT = {
    "f64": [4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 30, 36, 40, 60, 80, 100, 150, 200, 300, 340],
    "f32": [4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40, 42],
    "f16": [1, 2, 3, 3.5, 4],
    "bf16": [4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 42],
}
VANISHING = {
    "f64": [354, 358, 362, 366, 370, 372, 372.5, 373, 380, 500, 700, 746, 1000],
    "f32": [44, 45, 46, 47, 48, 50, 51, 51.5, 52, 54, 60, 88, 104, 200, 1000],
    "f16": [5, 6, 7, 7.5, 8, 8.5, 9, 12, 17, 100, 1000],
    "bf16": [44, 44.5, 45, 45.5, 46, 46.5, 48, 60, 88, 104, 1000],
}
# Depths of a class below the others at which its own gradient entry leaves the normal range.
DEPTHS = {
    "f64": [700, 710, 720, 735, 744, 746, 800, 2000],
    "f32": [80, 88, 95, 100, 103, 105, 110, 2000],
    "f16": [9, 11, 14, 16, 17, 18, 25, 2000],
    "bf16": [80, 88, 90, 91, 92, 93, 100, 2000],
}
# Found among 100,000 random rows of 2 to 4 classes, target first. f64, f32: loss by exp(z - max) in the working
# precision 43 to 63 ulp off; then the largest errors of `lace_loss.ext`. f16, bf16: the loss or a gradient entry lies
# within 1e-4 ulp of the middle of two neighbours.
WORST = {
    "f64": [
        [30.040727634279065, -4.630727747173271],
        [29.948856447698514, -4.776474321700554, -2.77271411301259],
        [33.9598131360435, 1.4555090758398026, -0.3027845512522634, -2.946836512939411],
        [17.367168569943647, -1.702308447003317],
        [-8.915332173101055, -0.554921332493199, 2.2169680860726495],
    ],
    "f32": [
        [31.086489, -2.1921158],
        [33.49747, 0.87099624, -2.5456228],
        [35.424118, -1.0730888, 2.0263653, -1.3585687],
        [5.7465463, 0.20199025],
        [21.70554, -3.7179844, 3.3251026],
    ],
    "f16": [
        [3.419921875, 0.1766357421875],
        [4.49609375, -0.72900390625],
        [-4.33984375, -0.344970703125, -0.399169921875],
        [2.017578125, -1.0283203125, -1.5986328125],
    ],
    "bf16": [
        [-8.375, 7.03125],
        [-3.703125, -0.2294921875],
        [-3.5, 3.515625, 0.85546875],
        [5.53125, 3.34375, 0.5390625],
    ],
}


def margin(m, classes, target):
    z = (SPREAD * 4)[:classes]
    z[target] = max(z[:target] + z[target + 1 :]) + m
    return z


def rows(dtype):
    """One row of logits and its target a case, for the levels core and gradient."""

    def row(category, name, logits, target):
        return Case(category, name, (len(logits),), logits, [target])

    large, tiny, least = (decode(b, dtype) for b in (encode(mpf(INF), dtype) - 1, 1 << (FORMATS[dtype][0] - 1), 1))
    yield row("nominal", "two-classes", [0.5, -0.25], 0)
    for target in range(3):
        yield row("nominal", f"one-two-three-target-{target}", [1, 2, 3], target)
    for target in (0, 5, 6):
        yield row("nominal", f"ten-classes-target-{target}", SPREAD[:10], target)
    yield row("nominal", "sixteen-classes", SPREAD, 8)
    yield row("nominal", "sixty-four-classes", [x + k / 16 for k, x in enumerate(SPREAD * 4)], 17)
    yield row("nominal", "all-negative", [x - 7 for x in SPREAD[:7]], 2)
    yield row("nominal", "wide", [10 * x for x in SPREAD], 0)
    yield row("nominal", "narrow", [x / 1000 for x in SPREAD[:8]], 5)

    yield row("ties", "two-zeros", [0, 0], 0)
    yield row("ties", "three-equal", [0.1] * 3, 2)
    yield row("ties", "four-equal", [-7.5] * 4, 0)
    yield row("ties", "sixty-four-equal", [0.1] * 64, 63)
    yield row("ties", "target-among-the-largest", [2.5, 2.5, -1, 0.3], 1)
    yield row("ties", "target-below-two-largest", [4.25, 4.25, -1, 0.3], 3)
    yield row("ties", "equal-but-the-target", [0, 0, 17.3, 0, 0], 2)

    for name, x in (("zero", 0), ("three", 3), ("largest", large)):
        yield row("one-class", f"logit-{name}", [x], 0)

    for i, m in enumerate(CONFIDENT[dtype]):
        classes, target = ((2, 0), (10, 3), (3, 2), (16, 5))[i % 4]
        yield row("q-to-1", f"margin-{m}", margin(m, classes, target), target)
    yield row("q-to-1", "margin-3-of-sixty-four", margin(3, 64, 63), 63)
    for i, m in enumerate((4, 6, 8, 12, 16, 24, 40, 64, 100, 300, 1000)):
        classes, target = ((2, 1), (10, 0), (3, 1), (16, 15))[i % 4]
        yield row("q-to-0", f"margin-minus-{m}", margin(-m, classes, target), target)

    for i, m in enumerate(VANISHING[dtype]):
        classes, target = ((2, 0), (10, 9), (3, 1), (5, 2))[i % 4]
        yield row("underflow", f"margin-{m}", margin(m, classes, target), target)
    for m in DEPTHS[dtype]:
        yield row("underflow", f"class-{m}-below", [0.3, -m, 0.7], 0)
        yield row("underflow", f"target-{m}-below-class-in-the-middle", [0, m, m / 2], 0)

    yield row("huge", "two-largest", [large, large], 0)
    yield row(
        "huge", "largest-and-its-neighbour", [large, rounded(large * (1 - mpf(2) ** -FORMATS[dtype][0]), dtype)], 1
    )
    yield row("huge", "three-most-negative", [-large] * 3, 1)
    yield row("huge", "loss-half-the-largest", [large, large / 2, large], 1)
    yield row("huge", "one-largest", [large, 0, 1], 0)
    yield row("huge", "one-most-negative", [-large, 0, 1], 2)
    yield row("huge", "loss-overflows", [-large, large, 0], 0)
    yield row("huge", "difference-overflows-elsewhere", [-large, large, large], 1)

    for offset in (1e4, -1e4) if dtype == "f16" else (1e4, -1e4, 1e15, -1e15):
        for name, row_margin in (("ordinary", -1), ("confident", 12)):
            z = [offset + x for x in margin(row_margin, 5, 2)]
            yield row("offset", f"{name}-{offset:+.0e}", z, 2)
        # Steps of one ulp of the offset.
        step = ulp(encode(mpf(offset), dtype), dtype)
        yield row("offset", f"neighbours-{offset:+.0e}", [offset, offset + step, offset - step, offset], 0)

    yield row("subnormal", "smallest-and-0", [least, 0], 0)
    yield row("subnormal", "around-0", [tiny - least, -least, 0, least, least - tiny], 2)
    yield row("subnormal", "confident", [4, least, -least], 0)
    yield row("subnormal", "wrong", [4, least, -tiny], 1)

    yield row("minus-infinity-target", "first", [-INF, 0, 1], 0)
    yield row("minus-infinity-target", "of-two", [0.5, -INF], 1)
    yield row("minus-infinity-target", "one-of-many", [-INF, 3, -INF, 2, -INF], 2)
    yield row("minus-infinity-target", "nothing-else", [-INF] * 3, 1)
    yield row("minus-infinity-target", "one-class", [-INF], 0)
    yield row("minus-infinity-other", "in-the-middle", [0.5, -INF, 1], 0)
    yield row("minus-infinity-other", "target-alone", [-INF, 2, -INF], 1)
    yield row("minus-infinity-other", "confident", [*margin(4, 4, 1), -INF, -INF], 1)
    yield row("minus-infinity-other", "wrong", [-INF, *margin(-12, 4, 1)], 2)
    yield row("plus-infinity", "target", [INF, 0, 1], 0)
    yield row("plus-infinity", "other", [0, INF, 1], 0)
    yield row("plus-infinity", "all", [INF, INF], 1)
    yield row("plus-infinity", "and-minus", [-INF, INF, 0], 2)
    yield row("nan", "target", [NAN, 0, 1], 0)
    yield row("nan", "last", [2, 0, NAN], 0)
    yield row("nan", "all", [NAN, NAN], 1)
    yield row("nan", "beside-infinities", [INF, NAN, -INF], 2)

    z = [tiny, 0.001, 5, -large / 4, 20]
    for target in (1, 2, 3, 4):
        yield row("mixed-magnitudes", f"target-{target}", z, target)
    yield row("mixed-magnitudes", "powers-of-ten", [0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000], 7)
    yield row("mixed-magnitudes", "powers-of-ten-wrong", [-0.001, -0.01, -0.1, -1, -10, -100, -1000, -10000], 6)
    yield row("mixed-magnitudes", "two-scales", [12, 12.001, 11.999, 0.001, -0.001], 0)

    for i, z in enumerate(WORST[dtype]):
        yield row("worst-rounding", f"number-{i + 1}", z, 0)


# Four samples of five classes: ordinary, confident, tied and wrong, badly wrong.
BATCH = [
    [2.0, -1.0, 0.5, 0.3, -0.7],
    [0.1, 13.5, -2.0, 1.5, 0.0],
    [-3.0, 2.5, 1.0, 0.25, 2.5],
    [30.0, 1.0, -4.0, 0.0, 2.0],
]
TARGET = [0, 1, 3, 2]
WEIGHT = [0.5, 2.0, 1.25, 0.1, 3.0]
SOFT = [[0.5, 0.2, 0.1, 0.1, 0.1], [0.0, 0.9, 0.05, 0.0, 0.05], [0.2] * 5, [0.25, 0.25, 0.0, 0.5, 0.0]]
REDUCTIONS = ("none", "mean", "sum")


def flat(matrix):
    return [x for row in matrix for x in row]


def table(category, name, logits=BATCH, target=TARGET, **options):
    """A case for a matrix of logits; a matrix as `target` has probabilities."""
    soft = isinstance(target[0], list)
    goal = {"probabilities": flat(target)} if soft else {"target": target}
    return Case(category, name, (len(logits), len(logits[0])), flat(logits), **goal, **options)


def with_row(i, row):
    return [*BATCH[:i], row, *BATCH[i + 1 :]]


def batch(dtype):
    for how in REDUCTIONS:
        yield from batch_reduced(how, 1e3 if dtype == "f16" else 1e6)
        yield from infinities_beside_options(how)
    yield from bad_classes()
    yield from scaled_subnormals(dtype)
    yield table("strength", "explicit-1-weights-smoothing", weight=WEIGHT, smoothing=0.1, strength=1.0)
    for name, g in (("per-sample", [1.0, -2.0, 0.5, 1024.0]), ("zeros", [0.0] * 4), ("one-kept", [0.0, 1.0, 0.0, 0.0])):
        yield table("grad-output", name, grad_output=g)
    yield table("grad-output", "ignored", target=[0, -100, 3, 2], grad_output=[3.0, 5.0, 0.1, -1.0])
    yield table("grad-output", "probabilities", target=SOFT, grad_output=[1.5, -2.0, 0.0, 7.0])
    for how in ("mean", "sum"):
        for name, g in (("loss-scale", 1024.0), ("negative", -0.3), ("zero", 0.0), ("small", 1e-30)):
            yield table("grad-output", f"{name}-{how}", grad_output=[g], reduction=how)
        yield table("grad-output", f"weights-{how}", grad_output=[0.7], weight=WEIGHT, reduction=how)
    yield from scaled_subnormals_of_several(dtype)


# Category, and a row that is not finite with its target.
NOT_FINITE = {
    "nan": ("nan", [0.5, 1.0, NAN, 2.0], 1),
    "nan-before-the-largest": ("nan", [NAN, 1.0, 3.0, 2.0], 1),
    "nan-after-the-largest": ("nan", [0.5, 3.0, 2.0, NAN], 1),
    "plus-infinity": ("plus-infinity", [0.5, 1.0, INF, 2.0], 1),
    "plus-infinity-target": ("plus-infinity", [0.5, 1.0, INF, 2.0], 2),
    "minus-infinity": ("minus-infinity-target", [0.5, -INF, 1.0, 2.0], 1),
    "minus-infinity-alone": ("minus-infinity-target", [-INF] * 4, 1),
    "minus-infinity-elsewhere": ("minus-infinity-other", [-INF, 1.0, 2.0, 0.5], 1),
    "minus-infinity-but-the-target": ("minus-infinity-other", [-INF, 1.0, -INF, -INF], 1),
}


def infinities_beside_options(how):
    weight = [0.5, 2.0, 1.25, 0.125]
    beside = {
        "weights": {"weight": weight},
        "zero-weight": {"weight": [0.0, 2.0, 1.25, 0.125]},
        "zero-weight-target": {"weight": [0.5, 0.0, 1.25, 0.125]},
        "negative-weight": {"weight": [0.5, -2.0, 1.25, 0.125]},
        "strength-0": {"strength": 0.0},
        "strength-half": {"strength": 0.5},
        "smoothing": {"smoothing": 0.1},
        "smoothing-zero-weight": {"smoothing": 0.1, "weight": [0.0, 2.0, 1.25, 0.125]},
        "smoothing-strength-0": {"smoothing": 0.1, "strength": 0.0},
        "probabilities": {"target": [[0.25, 0.5, 0.0, 0.25], [0.5, 0.5, 0.0, 0.0]]},
        "probabilities-weights": {"target": [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], "weight": weight},
        "ignored": {"target": [-100, 3]},
        "grad-output": {"grad_output": [-2.0, 0.5] if how == "none" else [-2.0]},
    }
    for name, (category, row, target) in NOT_FINITE.items():
        # A reduction adds what the rows have given: there a few options do.
        few = ("weights", "smoothing", "probabilities-weights", "ignored")
        for what, options in beside.items() if how == "none" else ((what, beside[what]) for what in few):
            kind = "ignored-nan" if what == "ignored" else category
            matrix = [row, [0.5, 1.5, -1.0, 0.0]]
            yield table(kind, f"{name}-{what}-{how}", matrix, **({"target": [target, 3], "reduction": how} | options))


def scaled_subnormals(dtype):
    """Entries that are subnormal, or 0, before a factor above 1 makes them ordinary numbers."""
    scale = 1024.0 if dtype == "f16" else 65536.0
    for depth in {"f64": (740, 745), "f32": (95, 104), "f16": (15, 18), "bf16": (95, 104)}[dtype]:

        def case(name, logits=(0.0, 0.0, -depth), depth=depth, **options):
            return Case("underflow", f"class-{depth}-below-{name}", (1, len(logits)), list(logits), [0], **options)

        yield case("grad-output", grad_output=[scale])
        yield case("weight", weight=[scale, 1.0, 1.0])
        yield case("grad-output-sum", grad_output=[scale], reduction="sum")
        yield case("weight-grad-output", weight=[2.0, 1.0, 1.0], grad_output=[scale / 2])
        yield case("strength-0", strength=0.0, grad_output=[scale])
        yield case("confident-strength-0", (0.0, -depth), strength=0.0, weight=[scale, 1.0])
        yield case("confident-strength-0-grad-output", (0.0, -depth), strength=0.0, grad_output=[scale])
        yield Case(
            "underflow",
            f"class-{depth}-below-grad-output-in-space",
            (1, 3, 2),
            [0.0, 1.0, 0.0, -1.0, -depth, 0.5],
            [0, 1],
            grad_output=[scale, 1.0],
        )


def scaled_subnormals_of_several(dtype):
    """The same with a target in several classes, of which the one far below has no part."""
    scale = 1024.0 if dtype == "f16" else 65536.0
    several = [[0.75, 0.25, 0.0]]
    for depth in {"f64": (740, 745), "f32": (95, 104), "f16": (15, 18), "bf16": (95, 104)}[dtype]:

        def case(name, logits, target, depth=depth, **options):
            return table("underflow", f"class-{depth}-below-{name}", [logits], target, **options)

        below = [0.0, 0.0, -depth]
        yield case("probabilities-grad-output", below, several, grad_output=[scale])
        yield case("probabilities-weight", below, several, weight=[scale, scale, 1.0])
        yield case("probabilities-weight-grad-output", below, several, weight=[2.0, 2.0, 1.0], grad_output=[scale / 2])
        yield case("probabilities-grad-output-sum", below, several, grad_output=[scale], reduction="sum")
        yield case("smoothing-grad-output", below, [0], smoothing=0.1, weight=[1.0, 1.0, 0.0], grad_output=[scale])
        yield Case(
            "underflow",
            f"class-{depth}-below-probabilities-in-space",
            (1, 3, 2),
            [0.0, 1.0, 0.0, -1.0, -depth, 0.5],
            probabilities=[0.75, 0.5, 0.25, 0.5, 0.0, 0.0],
            grad_output=[scale, 1.0],
        )


def batch_reduced(how, large_weight):
    def case(category, name, *matrices, **options):
        return table(category, f"{name}-{how}", *matrices, reduction=how, **options)

    yield case("reductions", "four-samples")
    yield case("reductions", "one-sample", BATCH[:1], [0])
    yield case("reductions", "eleven-samples", [margin(m, 3, 1) for m in range(-5, 6)], [1] * 11)
    yield case("reductions", "confident-samples", [margin(m, 4, 0) for m in (12, 16, 20, 24, 30)], [0] * 5)
    yield case("one-class", "three-samples", [[1.0], [-2.0], [3.0]], [0, 0, 0])
    yield case("ties", "in-every-sample", [[1.0] * 4, [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]], [0, 1, 1])
    yield case(
        "offset", "of-each-sample", [[x + c for x in row] for row, c in zip(BATCH, (0, 1e4, -300, 64), strict=True)]
    )
    yield case("strength", "0", strength=0.0)
    yield case("strength", "tenth", strength=0.1)
    yield case("strength", "half", strength=0.5)
    yield case("strength", "1", strength=1.0)
    yield case("strength", "half-confident", [margin(m, 4, 0) for m in (12, 16, 20, 40)], [0] * 4, strength=0.5)
    yield case("weights", "five", weight=WEIGHT)
    yield case("weights", "of-one-class-missing-in-the-targets", target=[0, 0, 3, 3], weight=WEIGHT)
    yield case("weights", "large-and-small", weight=[large_weight, 1 / large_weight, 1.0, 1e3, 1e-3])
    yield case("weights", "strength-half", weight=WEIGHT, strength=0.5)
    yield case("weights", "negative", weight=[0.5, -2.0, 1.25, 0.125, 3.0])
    yield case("weights", "all-negative", weight=[-0.5, -2.0, -1.25, -0.125, -3.0])
    yield case("weights", "negative-smoothing", weight=[0.5, -2.0, 1.25, 0.125, 3.0], smoothing=0.1)
    yield case("weights", "negative-probabilities", weight=[0.5, -2.0, 1.25, 0.125, 3.0], target=SOFT)
    yield case("zero-weight", "one-target", weight=[0.0, 2.0, 1.25, 0.1, 3.0])
    yield case("zero-weight", "two-targets", weight=[0.5, 0.0, 0.0, 0.1, 3.0])
    yield case("zero-weight", "not-a-target", weight=[0.5, 2.0, 1.25, 0.1, 0.0])
    yield case("zero-weight", "smoothing", weight=[0.0, 2.0, 1.25, 0.1, 0.0], smoothing=0.1)

    yield case("ignored", "default", target=[0, -100, 3, -100])
    for index in (255, -1, 0, 3):
        yield case("ignored", f"index-{index}", target=[index, 1, 3, 2], ignore_index=index)
    yield case("ignored", "index-not-among-the-targets", ignore_index=4)
    yield case("ignored", "weights", target=[0, -100, 3, 2], weight=WEIGHT)
    yield case("ignored", "strength-0", target=[-100, 1, 3, 2], strength=0.0)
    yield case("all-ignored", "four-samples", target=[-100] * 4)
    yield case("all-ignored", "one-sample", BATCH[:1], [255], ignore_index=255)
    yield case("all-ignored", "class-0", target=[0] * 4, ignore_index=0)
    yield case("all-ignored", "weights-smoothing", target=[-1] * 4, ignore_index=-1, weight=WEIGHT, smoothing=0.1)
    for name, x in (("nan", NAN), ("plus-infinity", INF), ("minus-infinity", -INF)):
        yield case("ignored-nan", f"one-{name}", with_row(1, [0.0, x, 1.0, 2.0, 3.0]), [0, 255, 3, 2], ignore_index=255)
        yield case("ignored-nan", f"row-of-{name}", with_row(2, [x] * 5), [0, 1, -100, 2], weight=WEIGHT)
    yield case("ignored-nan", "nothing-else", [[NAN, 1.0], [INF, -INF]], [-100, -100])
    yield Case("empty", f"no-samples-{how}", (0, 3), [], [], reduction=how)
    yield Case("empty", f"no-samples-weights-{how}", (0, 3), [], [], weight=[1.0, 0.5, 2.0], reduction=how)
    yield Case("empty", f"no-samples-probabilities-{how}", (0, 4), [], probabilities=[], reduction=how)

    yield case("nan", "one-sample", with_row(1, [0.0, 1.0, NAN, 2.0, 3.0]))
    yield case("plus-infinity", "one-sample", with_row(0, [0.0, INF, 1.0, 2.0, 3.0]))
    yield case("minus-infinity-target", "one-sample", with_row(2, [0.0, 1.0, 2.0, -INF, 3.0]))
    yield case("minus-infinity-target", "and-nan", [[-INF, 0.0, 1.0], [NAN, 0.0, 1.0], [0.0, 1.0, 2.0]], [0, 0, 0])
    yield case("minus-infinity-other", "one-sample", with_row(3, [-INF, 1.0, 2.0, -INF, 3.0]))

    for e in (0.1, 0.5, 1.0, 2**-20, 2**-40):
        yield case("smoothing", f"{e:.2g}", smoothing=e)
    yield case("smoothing", "weights", smoothing=0.1, weight=WEIGHT)
    yield case("smoothing", "ignored", smoothing=0.1, target=[0, -100, 3, 2])
    yield case(
        "smoothing",
        "ignored-weights-strength",
        smoothing=0.2,
        target=[0, 1, 0, 2],
        ignore_index=0,
        weight=WEIGHT,
        strength=0.5,
    )
    yield case("smoothing", "strength-0", smoothing=0.1, strength=0.0)
    yield case("smoothing", "confident", [margin(m, 4, 0) for m in (12, 20, 40, 90)], [0] * 4, smoothing=0.1)
    yield case("smoothing", "ties", [[0.5] * 3, [0.0, 0.0, 2.0]], [0, 1], smoothing=0.3)
    yield case("smoothing", "one-class", [[1.0], [2.0]], [0, 0], smoothing=0.1)
    yield case("smoothing", "minus-infinity-other", [[0.0, -INF, 1.0], [0.5, 1.0, 2.0]], [0, 1], smoothing=0.1)

    yield case("probabilities", "four-samples", target=SOFT)
    yield case("probabilities", "one-hot", target=[[float(k == t) for k in range(5)] for t in TARGET])
    yield case("probabilities", "weights", target=SOFT, weight=WEIGHT)
    yield case("probabilities", "smoothing", target=SOFT, smoothing=0.1)
    yield case("probabilities", "weights-smoothing-strength", target=SOFT, weight=WEIGHT, smoothing=0.1, strength=0.5)
    yield case("probabilities", "strength-0", target=SOFT, strength=0.0)
    yield case(
        "probabilities", "sums-other-than-1", target=[[2.0, 0.0, 0.0, 1.0, 0.0], [0.1] * 5, [0.0] * 5, [1.0] * 5]
    )
    yield case("probabilities", "uniform-and-tied", [[1.5] * 4, [0.0] * 4], [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    yield case("probabilities", "confident", [margin(m, 3, 0) for m in (8, 20, 40)], [[1.0, 0.0, 0.0]] * 3)
    yield case(
        "probabilities", "0-at-minus-infinity", [[0.5, -INF, 1.0], [0.0, 1.0, 2.0]], [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]
    )
    yield case(
        "probabilities", "1-at-minus-infinity", [[0.5, -INF, 1.0], [0.0, 1.0, 2.0]], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    )


def bad_classes():
    # 2^32 is class 0 to whoever keeps its low 32 bits.
    for index in (5, -1, -2, 254, 1000000, 2**32):
        yield table("bad-class", f"index-{index}", target=[0, 1, index, 2], error=True)
    yield table("bad-class", "default-not-the-ignored-index", target=[0, -100, 3, 2], ignore_index=255, error=True)
    yield table("bad-class", "index-5-mean", target=[5, 1, 3, 2], reduction="mean", error=True)
    yield table("bad-class", "index-minus-1-sum", target=[0, 1, 3, -1], reduction="sum", error=True)
    yield table("bad-class", "index-5-smoothing", target=[0, 1, 3, 5], smoothing=0.1, error=True)
    yield Case("bad-class", "one-row", (3,), [1, 2, 3], [3], error=True)
    yield Case("bad-class", "one-class", (2, 1), [1, 2], [0, 1], error=True)
    yield Case("bad-class", "five-classes-in-space", (1, 2, 5), SPREAD[:10], [0, 1, 1, 2, 0], error=True)


def spread(shape, gain=1.0):
    """Ordinary logits in an order without symmetry."""
    return [gain * SPREAD[(7 * i + i // 16) % 16] * (1 + i % 5) for i in range(math.prod(shape))]


def layout(dtype):
    for how in REDUCTIONS:

        def case(name, shape, how=how, category="layout", **options):
            samples = math.prod(shape[:1] * (len(shape) > 1) + shape[2:])
            classes = shape[min(1, len(shape) - 1)]
            if "probabilities" not in options:
                options = {"target": [(3 * i + i // classes) % classes for i in range(samples)]} | options
            return Case(category, f"{name}-{how}", shape, spread(shape), reduction=how, **options)

        yield case("one-row", (7,))
        yield case("one-row-weights", (5,), weight=WEIGHT)
        yield case("one-row-smoothing", (5,), smoothing=0.1)
        yield case("one-row-strength", (5,), strength=0.5)
        yield case("one-row-probabilities", (5,), probabilities=SOFT[0])
        yield case("one-row-ignored", (5,), category="all-ignored", target=[-100])
        yield case("one-row-grad-output", (5,), grad_output=[-2.5])
        yield case("one-row-one-class", (1,))
        yield case("one-column", (6, 3))
        yield case("length-1", (4, 3, 1))
        yield case("one-sample-in-space", (1, 3, 4))
        yield case("space", (2, 3, 4))
        yield case("two-axes", (2, 5, 2, 3))
        yield case("three-axes", (2, 3, 2, 1, 2))
        yield case("more-classes-than-places", (2, 16, 2))
        yield case("one-class-in-space", (2, 1, 3))
        yield case("space-weights", (2, 5, 3), weight=WEIGHT)
        yield case("space-ignored", (2, 3, 3), target=[0, 255, 2, 255, 1, 1], ignore_index=255)
        yield case("space-smoothing", (2, 3, 2), smoothing=0.1)
        yield case("space-probabilities", (2, 2, 3), probabilities=[0.1, 0.5, 1, 0.9, 0.5, 0, 0.3, 0.2, 0, 0.7, 0.8, 1])
        yield case("space-strength", (2, 3, 2), strength=0.25)
        yield case("no-places", (2, 3, 0), category="empty", target=[])
        yield case("no-samples-in-space", (0, 3, 2), category="empty", target=[])
    yield from bad_classes_in_every_layout()
    yield Case(
        "layout", "space-grad-output", (2, 3, 2), spread((2, 3, 2)), [0, 2, 1, 1], grad_output=[1.0, -2.0, 0.5, 0.0]
    )


def bad_classes_in_every_layout():
    # 2^32 and its like are classes to whoever keeps the low 32 bits, 254 and 255 to whoever keeps 8 with a sign.
    for shape in ((5,), (1, 5), (3, 5), (2, 5, 3), (2, 3, 2, 2), (2, 3, 2, 1, 2), (2, 1, 3)):
        places, classes = math.prod(shape[:1] * (len(shape) > 1) + shape[2:]), shape[len(shape) > 1]
        layout = "-".join(map(str, shape))
        for index in (classes, -1, 254, 2**32, -(2**32) + 1, 2**63 - 1, -(2**63)):
            target = [i % classes for i in range(places - 1)] + [index]
            yield Case("bad-class", f"{layout}-index-{index}", shape, spread(shape), target, error=True)
        wrong = [classes, *(i % classes for i in range(places - 1))]
        for how in ("mean", "sum"):
            yield Case("bad-class", f"{layout}-{how}", shape, spread(shape), wrong, reduction=how, error=True)
        for name, options in (
            ("smoothing", {"smoothing": 0.1}),
            ("weights", {"weight": WEIGHT[:classes]}),
            ("ignored-beside", {"ignore_index": 255, "target": [-100, *[255] * (places - 1)]}),
        ):
            given = {"target": wrong} | options
            yield Case("bad-class", f"{layout}-{name}", shape, spread(shape), error=True, **given)


# ---- Many rows: whatever is done in blocks, vectors, lanes, tiles or threads begins and ends inside them

EDGES = sorted({k for n in (8, 16, 32, 64, 128, 256, 512, 1000, 1024) for k in (n - 1, n, n + 1)})


def many(dtype):
    half = dtype in ("f16", "bf16")

    def case(name, shape, seed=1, exponent=-21, category="rows", corners=True, **options):
        batched, inner = len(shape) > 1, math.prod(shape[2:])
        samples, classes = shape[0] * inner, shape[batched]
        if "probabilities" not in options:
            options = {"target": [(3 * i + i // classes) % classes for i in range(samples)]} | options
        goal = options.get("target")
        at = None
        if corners:  # gradients of rows and of classes at edges; each row's own class is among them
            rows = [i for i in (0, 1, *EDGES, samples - 2, samples - 1) if i < samples]
            columns = [k for k in (0, 1, *EDGES, classes - 2, classes - 1) if k < classes]
            own = [goal[i] if goal and 0 <= goal[i] < classes else 0 for i in rows]
            pairs = {(i, k) for n, i in enumerate(rows) for k in (own[n], columns[-1 - n % len(columns)])}
            at = sorted((i // inner * classes + k) * inner + i % inner for i, k in pairs)
        logits = {"logits": spread(shape)} if half else {"logits": None, "lcg": (seed, exponent)}
        return Case(category, f"{'-'.join(map(str, shape))}-{name}", shape, **logits, at=at, **options)

    ignoring = [-100 if i % 3 == 1 or i > 60 else i % 17 for i in range(65)]
    soft = [0.5 if k == i % 17 else 0.25 if (k + 2 * i) % 8 == 0 else 0.0 for i in range(33) for k in range(17)]
    signs = [(-1) ** i * (1 + i % 7) for i in range(65)]
    weight = [(1 + (5 * k) % 9) / 4 for k in range(257)]
    negative = [w if k % 3 else -w for k, w in enumerate(weight)]

    def refused(shape, n, index):
        target = [i % shape[1] for i in range(shape[0] * math.prod(shape[2:]))]
        target[n] = index
        name = f"place-{n}-index-{index}"
        return case(name, shape, category="bad-class", corners=False, target=target, error=True)

    yield case("none", (33, 17), corners=False)
    yield case("sum", (64, 17), reduction="sum")
    yield case("none", (65, 17))
    yield case("ignored-weights-mean", (65, 17), target=ignoring, weight=weight[:17], reduction="mean")
    yield case("grad-output", (65, 17), grad_output=signs)
    yield case("smoothing", (33, 17), smoothing=0.1)
    yield case("probabilities-mean", (33, 17), probabilities=soft, reduction="mean")
    yield case("none", (1000, 2))
    yield case("none", (2, 256))
    yield case("mean", (2, 255), reduction="mean")
    yield case("smoothing-weights", (2, 257), smoothing=0.1, weight=weight)
    yield refused((65, 2), 17, 2)
    yield refused((65, 2), 64, -1)
    if half:
        return

    for rows in (33, 64, 65):
        yield case("mean", (rows, 17), reduction="mean")
    yield case("none", (1000, 17))
    yield case("mean", (1000, 17), reduction="mean")
    yield case("sum", (1000, 17), exponent=-19, reduction="sum")
    yield case("weights-mean", (1000, 17), weight=weight[:17], reduction="mean")
    few = [i % 5 if i % 5 == 3 else -100 for i in range(1000)]
    yield case("ignored-but-one-in-five-sum", (1000, 5), target=few, reduction="sum")
    yield case("none", (1025, 257))  # more logits than one thread is given
    for rows, classes in ((33, 255), (64, 256), (65, 257), (17, 65), (9, 1025)):
        yield case("none", (rows, classes), seed=2)
        yield case("mean", (rows, classes), seed=3, exponent=-19, reduction="mean")
        yield case("smoothing-sum", (rows, classes), seed=4, smoothing=0.1, reduction="sum")
    yield case("strength-half", (33, 17), strength=0.5)
    yield case("negative-weights", (33, 257), weight=negative)
    yield case("negative-weights-smoothing-mean", (33, 257), weight=negative, smoothing=0.1, reduction="mean")
    for name, x in (("nan", NAN), ("plus-infinity", INF), ("minus-infinity", -INF)):
        for n in (16, 32, 63):
            target = [(3 * i + i // 17) % 17 for i in range(65)]
            yield case(f"{name}-in-row-{n}", (65, 17), put=(17 * n + 5, x))
            target[n] = -100
            yield case(f"{name}-in-ignored-row-{n}", (65, 17), put=(17 * n + 5, x), target=target, reduction="mean")
        yield case(f"{name}-in-row-32-smoothing", (65, 17), put=(17 * 32 + 5, x), smoothing=0.1)
        yield case(f"{name}-far-right", (33, 257), put=(257 * 20 + 256, x), weight=weight)
    for n, index in ((16, 17), (31, -1), (32, 2**32), (63, 17)):
        yield refused((65, 17), n, index)
    yield refused((1000, 17), 999, 17)
    # The samples along the last axes, where they are neighbours.
    for shape in ((2, 17, 33), (1, 3, 65), (2, 3, 5, 13), (33, 17, 3), (2, 257, 17)):
        yield case("none", shape, seed=5)
        yield case("weights-mean", shape, seed=6, weight=weight[: shape[1]], reduction="mean")
        yield case("smoothing-sum", shape, seed=7, smoothing=0.1, reduction="sum")
    yield case("mean", (1, 10, 1000), reduction="mean")
    yield case("probabilities", (1, 17, 33), probabilities=soft)
    yield case("grad-output", (1, 17, 65), grad_output=signs)
    yield case("ignored-mean", (1, 17, 65), target=ignoring, reduction="mean")
    for name, x in (("nan", NAN), ("minus-infinity", -INF)):
        yield case(f"{name}-in-one-place", (1, 17, 65), put=(65 * 4 + 32, x))
    for n, index in ((0, -1), (31, 17), (64, 2**32)):
        yield refused((1, 17, 65), n, index)


# Directions in which the logits move.
FIRST = [1.0] + [0.0] * 15
ZIGZAG = [1.0, -1.0] * 8
SLOPE = [0.7, -0.2, 0.05, 1.3, -2.2, 0.4, 0.9, -0.6, 3.1, -1.5, 0.25, 0.0, -0.75, 1.1, -0.3, 2.0]


def second(dtype):
    def row(category, name, logits, target, vector, **options):
        return Case(category, name, (len(logits),), logits, [target], vector=vector[: len(logits)], **options)

    directions = {"first": FIRST, "zigzag": ZIGZAG, "slope": SLOPE}
    for name, v in directions.items():
        yield row("nominal", f"two-classes-{name}", [0.5, -0.25], 0, v)
        yield row("nominal", f"ten-classes-{name}", SPREAD[:10], 3, v)
        yield row("nominal", f"sixteen-classes-{name}", SPREAD, 5, v)
        yield row("ties", f"four-equal-{name}", [0.1] * 4, 1, v)
        yield row("ties", f"target-below-two-largest-{name}", [4.25, 4.25, -1, 0.3], 3, v)
        yield row("one-class", name, [3], 0, v)
        for s in (0.0, 0.5):
            yield row("strength", f"{s}-{name}", SPREAD[:5], 0, v, strength=s)
        yield row("minus-infinity-target", name, [-INF, 0, 1], 0, v)
        yield row("minus-infinity-other", name, [0.5, -INF, 1], 0, v)
        yield row("plus-infinity", name, [0, INF, 1], 0, v)
        yield row("nan", name, [NAN, 0, 1], 1, v)
    for m in dict.fromkeys((4, 8, 12, 16, 20, 40, *CONFIDENT[dtype][-2:])):
        yield row("q-to-1", f"margin-{m}", margin(m, 5, 2), 2, SLOPE)
    for m in (4, 8, 12, 16, 20, 40):
        yield row("q-to-0", f"margin-minus-{m}", margin(-m, 5, 2), 2, SLOPE)
    for m in VANISHING[dtype][::4]:
        yield row("underflow", f"margin-{m}", margin(m, 4, 1), 1, SLOPE)
    for m in DEPTHS[dtype][::3]:
        yield row("underflow", f"class-{m}-below", [0.3, -m, 0.7], 0, SLOPE)
    yield row("q-to-0", "margin-minus-1000", margin(-1000, 3, 1), 1, ZIGZAG)
    yield row("offset", "1e4", [1e4 + x for x in SPREAD[:5]], 1, SLOPE)
    yield row("mixed-magnitudes", "vector", SPREAD[:5], 1, [1e6, 1e-6, -1.0, 0.0, 1e3])
    yield row("nominal", "zero-vector", SPREAD[:5], 1, [0.0] * 5)
    yield row("grad-output", "one-row", SPREAD[:5], 1, SLOPE, grad_output=[-3.0])

    v = spread((4, 5), 0.5)
    for how in REDUCTIONS:

        def case(category, name, how=how, **options):
            return table(category, f"{name}-{how}", reduction=how, vector=v, **options)

        yield case("reductions", "four-samples")
        yield case("weights", "five", weight=WEIGHT)
        yield case("weights", "negative", weight=[0.5, -2.0, 1.25, 0.125, 3.0])
        yield case("zero-weight", "one-target", weight=[0.0, 2.0, 1.25, 0.1, 3.0])
        yield case("ignored", "index-255", target=[0, 255, 3, 2], ignore_index=255)
        yield case("all-ignored", "four-samples", target=[-100] * 4)
        yield case("ignored-nan", "row-of-nan", logits=with_row(2, [NAN] * 5), target=[0, 1, -100, 2])
        yield case("smoothing", "tenth", smoothing=0.1)
        yield case("smoothing", "weights-strength", smoothing=0.1, weight=WEIGHT, strength=0.5)
        yield case("probabilities", "four-samples", target=SOFT)
        yield case("probabilities", "weights-smoothing", target=SOFT, weight=WEIGHT, smoothing=0.2)
        yield Case(
            "layout", f"space-{how}", (2, 3, 2), spread((2, 3, 2)), [0, 2, 1, 1], vector=SLOPE[:12], reduction=how
        )
        yield Case("empty", f"no-samples-{how}", (0, 3), [], [], vector=[], reduction=how)
    yield table("grad-output", "per-sample", grad_output=[1.0, -2.0, 0.5, 0.0], vector=v)
    yield table("grad-output", "mean", grad_output=[1024.0], reduction="mean", vector=v)


def large(dtype):
    # Edges of blocks and of vectors, where a sum that is split goes wrong.
    edges = (0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025,
             2047, 2048, 4095, 4096, 8191, 8192, 16383, 16384, 32767, 32768, 49999, 50000)  # fmt: skip

    def row(name, classes, seed, exponent, target, put=None):
        places = {*edges, target, target - 1, target + 1, classes - 2, classes - 1, *([put[0]] if put else [])}
        at = sorted(j for j in places if 0 <= j < classes)
        return Case("large", name, (classes,), None, [target], lcg=(seed, exponent), put=put, at=at)

    for classes in (65, 100, 255, 257, 1000, 1025, 4097, 10000, 50257):
        yield row(f"{classes}-classes", classes, 1, -21, classes // 3)
        yield row(f"{classes}-classes-confident", classes, 1, -21, classes - 1, (classes - 1, 24))
    for classes in (1000, 10000):
        yield row(f"{classes}-classes-wide", classes, 2, -19, 7)
        yield row(f"{classes}-classes-badly-wrong", classes, 2, -19, 64, (64, -200))
        yield row(f"{classes}-classes-one-far-above", classes, 2, -19, 0, (classes // 2, 60))
    yield row("50257-classes-margin-12", 50257, 1, -21, 0, (0, 16))
    yield row("50257-classes-very-confident", 50257, 1, -21, 63, (63, 40))
    yield row("50257-classes-target-minus-infinity", 50257, 1, -21, 256, (256, -INF))
    yield row("50257-classes-nan", 50257, 1, -21, 5, (50000, NAN))


ALL: dict[str, tuple[tuple[str, ...], Callable[[str], Iterator[Case]]]] = {
    "core": (("f64", "f32", "f16", "bf16"), rows),
    "gradient": (("f64", "f32", "f16", "bf16"), rows),
    "batch": (("f64", "f32", "f16", "bf16"), batch),
    "layout": (("f64", "f32"), layout),
    "second": (("f64", "f32"), second),
    "large": (("f64", "f32"), large),
    "rows": (("f64", "f32", "f16", "bf16"), many),
}


def write(out: Path, digits: int) -> None:
    texts = {}
    with mpmath.workdps(digits + 20):
        for level, (dtypes, cases) in ALL.items():
            for dtype in dtypes:
                texts[f"{dtype}-{level}.txt"] = file_text(dtype, level, list(cases(dtype)))
    sums = [f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n" for name, text in sorted(texts.items())]
    for name, text in (texts | {"SHA256SUMS": "".join(sums)}).items():
        (out / name).write_text(text, "ascii", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, default=60, help="default: %(default)s")
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).parent.parent / "ref" / "vectors")
    args = parser.parse_args()
    write(args.out, args.digits)
