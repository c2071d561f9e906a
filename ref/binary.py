"""LACE for labels that are present or absent, each by itself: multi-label and two-class classification.

A label with logit z and target y, 1 where it is present, is a sample of two classes with the logits (0, z) and the
target probabilities (1 - y, y). With f of `loss`, q = sigmoid(z), weight w and pos_weight p:

    L = w (p y f(q) + (1 - y) f(1 - q))        f(q) = -(1 - s q) log q

With strength 0 it is binary cross entropy, with strength 1 the sigmoid focal loss with gamma = 1 and without alpha.

Equal steps of both logits change nothing. Of (0, z) and (-z, 0) the pair is taken whose larger logit is 0. So a logit
of +inf is a label that is present for certain, as -inf is one that is absent.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .double_double import DoubleDouble, dd, dd_sum
from .loss import RAISED, Array, _array, _exponent, _fraction, _numbers, _Samples
from .posterior import _normalised, _parts


class BinaryOptions(TypedDict, total=False):
    """weight : array that broadcasts to the logits' shape, multiplies the loss of a label. Default: all 1.
    pos_weight : the same, multiplies the part of y: labels that are present. Default: all 1.
        Where a factor w p y or w (1 - y) is 0 even an infinite f counts nothing.
    reduction : "none", one loss a label; "sum"; or "mean", the sum divided by the number of labels, whatever their
        weights. The mean of no labels is NaN. Default "mean".
    strength : s in [0, 1]. Default 1.
    """

    weight: ArrayLike | None
    pos_weight: ArrayLike | None
    reduction: str
    strength: float


@np.errstate(all="ignore")  # infinities and NaN are values here
def binary_forward(logits: ArrayLike, target: ArrayLike, **options: Unpack[BinaryOptions]) -> float | Array:
    """Loss of labels that are present or absent.

    Parameters
    ----------
    logits : array of any shape.
    target : array of the same shape: booleans or integers, 1 (True) where a label is present and 0 where it is absent;
        or floats, the probability that it is present. The loss is linear in it, outside [0, 1] too.
    options : see `BinaryOptions`.

    Returns
    -------
    A float, or for "none" an array of the logits' shape. A logit of -inf has loss +inf where the label is present, a
    logit of +inf where it is absent. A NaN has loss NaN.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape, an option or an integer that is no label.

    >>> round(binary_forward([2.0, -1.0], [1, 0]), 6)  # two labels, one present and one absent
    0.04969
    >>> binary_forward([2.0, -1.0], [1, 0], reduction="none", pos_weight=[3.0, 1.0]).round(6)
    array([0.045391, 0.084249])
    """
    labels = _labels(logits, target, **options)
    if not labels.reduced:
        losses = labels.loss().rounded.reshape(labels.shape)
        return losses if losses.ndim else float(losses)
    return float((dd_sum(labels.loss()) / labels.divisor).rounded)


@np.errstate(all="ignore")
def binary_backward(
    logits: ArrayLike, target: ArrayLike, grad_output: ArrayLike = 1.0, **options: Unpack[BinaryOptions]
) -> Array:
    """Gradient of `binary_forward` with respect to the logits, in their shape.

    logits, target, options : as for `binary_forward`.
    grad_output : factor of the gradient, a number; for "none" also an array of the logits' shape.

    >>> binary_backward([2.0, -1.0], [1, 0], reduction="sum").round(6)
    array([-0.027536,  0.13392 ])
    """
    labels = _labels(logits, target, **options)
    return _of_present(labels.times(grad_output, labels.gradient(), -RAISED))


@np.errstate(all="ignore")
def binary_hessian_vector_product(
    logits: ArrayLike,
    target: ArrayLike,
    vector: ArrayLike,
    grad_output: ArrayLike = 1.0,
    **options: Unpack[BinaryOptions],
) -> Array:
    """Change of `binary_backward` per unit step of the logits along a vector, in the logits' shape.

    logits, target, grad_output, options : as for `binary_backward`.
    vector : array of the logits' shape.

    Every label's loss depends on its own logit alone: along a vector of ones this is the second derivative.

    >>> binary_hessian_vector_product([2.0, -1.0], [1, 0], [1.0, 1.0], reduction="sum").round(6)
    array([0.047696, 0.187094])
    """
    labels = _labels(logits, target, **options)
    v = _numbers("vector", vector)
    if v.shape != labels.shape:
        raise ValueError(f"vector must have the logits' shape {labels.shape}, got {v.shape}")
    steps = np.stack([np.zeros(v.size), v.reshape(-1)], 1)
    exponent = _exponent(steps)
    change = labels.gradient_change(np.ldexp(steps, -exponent))
    return _of_present(labels.times(grad_output, change, exponent - RAISED))


@np.errstate(all="ignore")
def binary_posterior(logits: ArrayLike, *, pos_weight: ArrayLike | None = None, strength: float = 1.0) -> Array:
    """Probability that each label is present, where a model that answers `logits` has the smallest expected loss.

    Parameters
    ----------
    logits : array of any shape, in nats: as they were trained, before any temperature.
    pos_weight, strength : as in the training loss (see `BinaryOptions`), but every pos_weight positive and finite.
        `weight` counts the same for a present and an absent label, so it changes no probability.

    Returns
    -------
    float64 array of the logits' shape, each value within 1 ulp of the exact one. NaN for a logit of NaN.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option.

    >>> binary_posterior([2.0, -1.0]).round(6)  # sigmoid: 0.880797 0.268941
    array([0.973179, 0.144534])
    """
    x, s = _numbers("logits", logits), _fraction("strength", strength)
    p = _factor("pos_weight", pos_weight, x.shape)
    wrong = np.argwhere(~((p > 0) & np.isfinite(p)))
    if len(wrong):
        place = wrong[0].tolist()
        raise ValueError(
            f"pos_weight must be positive and finite for a posterior, it is {p[tuple(place)]} for logits{place or ''}"
        )
    y = _normalised(
        *_parts(_two_logits(np.where(np.isnan(x), 0.0, x)), np.stack([np.ones(x.size), p.reshape(-1)], 1), s)
    )
    return np.where(np.isnan(x), np.nan, y.rounded[:, 1].reshape(x.shape))


def _labels(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    reduction: str = "mean",
    strength: float = 1.0,
) -> _Samples:
    """The labels as samples of two classes, absent and present."""
    x, y = _numbers("logits", logits), _array("target", target)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    s = _fraction("strength", strength)
    if y.dtype.kind not in "fiub":
        raise TypeError(f"target must hold labels (booleans, integers) or probabilities (floats), got {y.dtype}")
    if y.shape != x.shape:
        raise ValueError(f"target must have the logits' shape {x.shape}, got {y.shape}")
    if y.dtype.kind in "iu" and len(no_label := np.argwhere((y != 0) & (y != 1))):
        place = no_label[0].tolist()
        raise ValueError(f"an integer target must be 0 or 1, target{place or ''} is {y[tuple(place)]}")
    w = dd(_factor("weight", weight, x.shape).reshape(-1))
    p = _factor("pos_weight", pos_weight, x.shape).reshape(-1)
    present = y.reshape(-1).astype(np.float64)
    a0, a1 = (1.0 - dd(present)) * w, w * present * p
    a = DoubleDouble(np.stack([a0.high, a1.high], 1), np.stack([a0.low, a1.low], 1))
    exponent, divisor = _exponent(a.high), x.size if reduction == "mean" else 1.0
    return _Samples(
        z=_two_logits(x),
        a=a.ldexp(-exponent),
        exponent=exponent,
        kept=np.ones(x.size, bool),
        shape=x.shape,
        reduced=reduction != "none",
        divisor=dd(divisor),
        strength=s,
    )


def _two_logits(x: Array) -> Array:
    """(M, 2): of classes absent and present, the larger one 0."""
    flat = x.reshape(-1)
    return np.stack([-np.maximum(flat, 0.0), np.minimum(flat, 0.0)], 1)


def _of_present(two: Array) -> Array:
    """The part of class 1, on axis 1 or, of one sample, axis 0."""
    return np.asarray(two.take(1, min(1, two.ndim - 1)))


def _factor(name: str, values: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[Any]:
    factors = np.ones(()) if values is None else _numbers(name, values)
    try:
        return np.broadcast_to(factors, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the logits' shape {shape}, got {factors.shape}") from None
