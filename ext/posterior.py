"""Class probabilities that the logits of a LACE model stand for, by the C kernel; `ref.posterior` defines them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from . import _cpu
from .arrays import (
    Array,
    as_fraction,
    as_logits,
    as_threads,
    as_weight,
    delivered,
    laid_out,
    no_classes,
    rows_of,
    writable,
    write_back,
)
from .threads import in_threads


def posterior(
    logits: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    strength: float = 1.0,
    out: Array | None = None,
    threads: int | None = None,
) -> Array:
    """Class probabilities where a model that answers `logits` has the smallest expected loss. They are not the softmax.

    Parameters
    ----------
    logits : (C,), (N, C) or (N, C, d1, ...) array of float32 or float64, in nats, before any temperature.
    weight, label_smoothing, strength : those of the training loss. Every weight is positive and finite, the largest at
        most 2^60 (float64: 2^800) times the smallest; label_smoothing is less than 1.
    out : array of the logits' shape and dtype that receives the probabilities, apart from every input in memory.
    threads : at most so many, by default the number of processors. The result does not depend on it.

    Returns
    -------
    Array of the logits' shape and dtype, each value within 4 ulp of `lace_loss.ref.posterior`. With label smoothing
    that bound is for (1 - e) p + e/C. A logit of -inf has probability 0; a sample with a logit of NaN or +inf, or
    with -inf only, is NaN.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option.

    Examples
    --------
    >>> posterior(np.array([0.0, 2.0])).round(6)  # softmax: 0.119203 0.880797
    array([0.026821, 0.973179])
    """
    z = as_logits(logits)
    axis = 1 if z.ndim > 1 else 0
    if z.ndim == 0 or z.shape[axis] == 0:
        raise no_classes(z.shape)
    classes = z.shape[axis]
    label_smoothing, strength = as_fraction("label_smoothing", label_smoothing), as_fraction("strength", strength)
    if label_smoothing == 1:
        raise ValueError("label_smoothing must be less than 1 for a posterior: with 1.0 no loss depends on the class")
    w = None if weight is None else as_weight(weight, classes, z.dtype)
    if w is not None and len(refused := np.flatnonzero(~((w > 0) & np.isfinite(w)))):
        k = refused[0]
        raise ValueError(f"weight must be positive and finite for a posterior, weight[{k}] is {w[k]}")
    threads = as_threads(threads)
    result = writable(out, z, (z, weight))
    source, apart, plane_size = laid_out(z, by_planes=True)
    rows = rows_of(result, plane_size)
    sizes = (z.size // classes, classes, plane_size, apart, z.dtype.itemsize)
    in_threads(_cpu.PosteriorCall(rows, source, w, *sizes, label_smoothing, strength), threads)
    write_back(rows, result, plane_size)
    return delivered(out, result)
