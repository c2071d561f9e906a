"""The exact values, by mpmath at 60 digits, and the hostile rows of logits that the accuracy tests share."""

import mpmath
import numpy as np

mpmath.mp.dps = 60


def exact(logits, target, strength=1):
    """Loss and gradient of one row by the textbook formulas; the sum leaves the target out instead of subtracting."""
    z = [mpmath.mpf(float(value)) for value in logits]
    largest = max((abs(value) for value in z if mpmath.isfinite(value)), default=0)
    with mpmath.workdps(60 + max(0, int(mpmath.log10(largest + 1)))):  # a difference of 1e58 and 1 needs them
        top = max(z)
        # Below e^-10000 a term is 0 in every dtype; mpmath would raise e to an integer of 1e38.
        e = [mpmath.exp(value - top) if value - top > -10_000 else mpmath.mpf(0) for value in z]
        own, others = e[target], mpmath.fsum(value for j, value in enumerate(e) if j != target)
        q = [value / (own + others) for value in e]
        r = others / (own + others)
        n = mpmath.log1p(others / own) if own else top - z[target] + mpmath.log(others)
        factor = (1 - strength) + strength * (r + q[target] * n)
        loss = ((1 - strength) + strength * r) * n
        return loss, [-factor * r if j == target else factor * value for j, value in enumerate(q)]


def ulps(got, wanted, dtype):
    """Largest distance of `got` from the exact values, in ulp of the exact value in `dtype`."""
    worst = 0.0
    for value, true in zip(np.ravel(got), np.atleast_1d(np.asarray(wanted, object)), strict=True):
        ulp = mpmath.mpf(float(np.spacing(dtype(abs(float(true))))))
        worst = max(worst, float(abs(mpmath.mpf(float(value)) - true) / ulp))
    return worst


def rows(classes, dtype, seed=0):
    """Named rows of logits with a target: (name, logits, target)."""
    rng = np.random.default_rng([seed, classes])
    wide, narrow = 10 * rng.normal(size=classes), rng.normal(size=classes)
    target = int(rng.integers(classes))

    def at(margin, logits=narrow):
        z = logits.copy()
        z[target] = np.delete(z, target).max(initial=-1e9) + margin if classes > 1 else z[target]
        return z.astype(dtype)

    named = {
        f"margin {margin}": at(margin) for margin in (-1000, -100, -8, 0, 1, 4, 8, 12, 16, 20, 30, 40, 80, 300, 1000)
    }
    named |= {
        "wide": wide.astype(dtype),
        "tiny": (narrow * 1e-3).astype(dtype),
        "equal": np.full(classes, 0.1, dtype),
        "offset 1e4": (at(12).astype(float) + 1e4).astype(dtype),
        "offset -1e15": (wide * 1e14 - 1e15).astype(dtype),
        "huge": (narrow / 8 * float(np.finfo(dtype).max)).astype(dtype),
        "equal but the target": np.where(np.arange(classes) == target, 17.3, 0).astype(dtype),
    }
    return [(name, logits, target) for name, logits in named.items()]
