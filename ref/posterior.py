"""Class probabilities that the logits of a model trained with LACE stand for.

With class probabilities p, class weights w and label smoothing e the expected loss of one sample is
sum_k w_k y_k f_k with y_k = (1-e) p_k + e/C (f, q, r, n and K as in `loss`). It is smallest where

    h_k = q_k / (w_k K_k)        y_k = h_k / sum_j h_j        p_k = (y_k - e/C) / (1 - e)

With strength 0 all K are 1: without weights and smoothing p is the softmax q. With a strength s > 0 it is not.
THEORY.md, next to this file, has the proof.

Only the K of the class `top` with the largest logit may be small. With S as in `loss`, and
r_top + q_top n_top = (S + log1p(S)) / (1 + S), nothing in it is a difference. Every h is kept as 2^exponent times a
number of ordinary size, because p_k may be an ordinary number where h_k itself is too small or too large for float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .double_double import DoubleDouble, dd, dd_sum, exp_in_parts, log1p, where
from .loss import Array, checked, classes_last, in_logits_shape, shape_of_samples

# Logits this far below the largest change no probability: e^-2500 = 2^-3606, and K and two weights make up for at most
# 2^(1024 + 1074) of it before float64 ends at 2^-1075.
FARTHEST = 2500
NOTHING = -(2**40)  # exponent of a 0


@np.errstate(all="ignore")  # infinities and NaN are values here
def posterior(
    logits: ArrayLike, *, weight: ArrayLike | None = None, label_smoothing: float = 0.0, strength: float = 1.0
) -> Array:
    """Class probabilities where a model that answers `logits` has the smallest expected loss.

    Parameters
    ----------
    logits : (C,), (N, C) or (N, C, d1, ...) array of numbers, unnormalised, in nats: as they were trained, before
        any temperature.
    weight, label_smoothing, strength : as in the training loss (see `Options`), but every weight must be positive and
        finite, and label_smoothing less than 1: where the loss does not depend on a probability, logits do not tell it.

    Returns
    -------
    float64 array of the logits' shape. The probabilities of a sample sum to 1 but for their roundings. With label
    smoothing no model in its optimum has y_k < e/C; where logits say so nevertheless, p_k is 0 and the others are
    normalised. A logit of -inf has probability 0. A sample with a logit of NaN or +inf, or with -inf only, is NaN.

    Each value is within 1 ulp of the exact one. With label smoothing e, y_k - e/C may cancel: then it is
    within 1 ulp plus 2^-90 / (1 - e).

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option.

    Source: N. Charoenphakdee et al., CVPR 2021, arXiv:2011.09172, for the focal loss; LACE is the case gamma = 1.
    Weights, smoothing and strength are derived in THEORY.md.

    >>> posterior([0.0, 2.0]).round(6)  # softmax: 0.119203 0.880797
    array([0.026821, 0.973179])
    >>> posterior([0.0, 2.0], weight=[4.0, 1.0], strength=0.0).round(6)  # cross entropy that counted class 0 four times
    array([0.032727, 0.967273])
    """
    x, w, e, s = checked(logits, weight, label_smoothing, strength)
    refused = np.flatnonzero(~((w > 0) & np.isfinite(w)))
    if len(refused):
        k = refused[0]
        raise ValueError(f"weight must be positive and finite for a posterior, weight[{k}] is {w[k]}")
    if e == 1:
        raise ValueError("label_smoothing must be less than 1 for a posterior: with 1.0 no loss depends on the class")
    z = classes_last(x)
    known = np.isfinite(z.max(1))[:, None]
    y = _normalised(*_parts(np.where(known, z, 0.0), w, s))
    if e:
        less = y - dd(e) / len(w)
        kept = where(less.high > 0, less, 0.0)
        y = kept / dd_sum(kept, 1)[:, None]
    return in_logits_shape(np.where(known, y.rounded, np.nan), shape_of_samples(x))


def _parts(z: Array, w: Array, s: float) -> tuple[DoubleDouble, NDArray[np.int64]]:
    """m and n with 2^n m proportional to h: for (M, C) logits without NaN and +inf, a finite one in each row."""
    top = z.argmax(1)[:, None]
    is_top = np.arange(z.shape[1]) == top
    gap = dd(np.take_along_axis(z, top, 1)) - z
    near = gap.high <= FARTHEST
    n, e = exp_in_parts(where(near, -gap, 0.0))
    n, e = np.where(near, n, NOTHING), where(near, e, 0.0)  # 2^n e = q_k / q_top

    # S = 2^scale others. With strength 1, K_top is about 2 S, however small: it is kept in units of 2^unit.
    scale = np.where(is_top, NOTHING, n).max(1, keepdims=True, initial=NOTHING)
    others = dd_sum(where(is_top, 0.0, e.ldexp(n - scale)), 1)[:, None]
    small = others.ldexp(scale)
    unit = scale if s == 1 else np.zeros_like(scale)
    log = where(small.high < 2.0**-60, others - others * small * 0.5, log1p(small).ldexp(-scale))
    everything = small + 1.0
    k_top = (others + log).ldexp(scale - unit) / everything * s + (1.0 - dd(s))
    k_top = where(others.high == 0, 1.0, k_top)  # all the others are 0, and p_top is 1 whatever its K

    q = e.ldexp(n) / everything
    qn = where(q.high == 0, 0.0, q * (gap + log1p(small)))  # its limit where n is infinite
    k = where(is_top, k_top, (1.0 - q + qn) * s + (1.0 - dd(s)))  # q <= 1/2 below the top
    mantissa, exponent = np.frexp(w)
    return e / (k * mantissa), n - np.where(is_top, unit, 0) - exponent


def _normalised(m: DoubleDouble, n: NDArray[np.int64]) -> DoubleDouble:
    """2^n m over its sum, row by row. Numbers underflow here only."""
    n = n - np.where(m.high > 0, n, NOTHING).max(1, keepdims=True)
    return (m / dd_sum(m.ldexp(n), 1)[:, None]).ldexp(n)
