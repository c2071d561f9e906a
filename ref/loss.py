"""Linearly Adaptive Cross Entropy, the definition.

For one sample with logits z (C), q = softmax(z), true class t and strength s in [0, 1]:

    n_k = -log q_k        r_k = 1 - q_k
    f_k = ((1-s) + s r_k) n_k                         loss L = f_t;  s = 1 is LACE, s = 0 cross entropy
    K_k = (1-s) + s (r_k + q_k n_k)                   df_k/dz_j = K_k (q_j - [j = k])

Weights, label smoothing and probability targets make L a sum over the classes, with coefficients a:

    L       = sum_k a_k f_k
    dL/dz_j = q_j sum_k a_k K_k - a_j K_j

Nothing is formed as 1 - q, log q or q - 1. With `top` the class of the largest logit and S the sum of
exp(z_j - z_top) over the other classes, n_top = log1p(S) and r_top = S / (1 + S); elsewhere q_k <= 1/2 and
n_k = (z_top - z_k) + log1p(S).

Source: J. W. Shim, Sci. Rep. 2024, arXiv:2507.10574. With s = 1, L is also the softmax focal loss with gamma = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .double_double import DoubleDouble, dd, dd_sum, exp, log1p, where

Array = NDArray[np.float64]

# Exponentials are formed 2^RAISED too large: those that underflow one by one may add up, or be multiplied by much.
RAISED = 128


class Options(TypedDict, total=False):
    """weight : (C,) array, multiplies a. Default: all 1. Where a is 0 even an infinite f counts nothing.
    ignore_index : a sample of this class has loss and gradient 0 and does not count in the mean. Default -100.
        Probability targets know no ignored samples: there it must be negative.
    reduction : "none", one loss a sample; "sum"; or "mean", the sum divided by the samples' total weight[target], with
        probability targets by the number of samples. Nothing divided by 0 is NaN. Default "mean".
    label_smoothing : e in [0, 1]: a target's probabilities y become (1-e) y + e/C. Default 0.
    strength : s in [0, 1]. Default 1.
    """

    weight: ArrayLike | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    strength: float


@np.errstate(all="ignore")  # infinities and NaN are values here
def forward(logits: ArrayLike, target: ArrayLike, **options: Unpack[Options]) -> float | Array:
    """Loss of rows of logits.

    Parameters
    ----------
    logits : (C,), (N, C) or (N, C, d1, ...) array of numbers, unnormalised.
    target : integers of the logits' shape without its class axis: class indices, 0 to C-1 or `ignore_index`;
        or floats of the logits' shape: probabilities (neither their range nor their sum is checked).
    options : see `Options`.

    Returns
    -------
    A float, or for "none" an array of the logits' shape without its class axis. A sample with a logit of NaN or +inf
    has loss NaN; with -inf at its class, +inf.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option, IndexError for a class that does not exist.

    >>> logits, target = [[1.0, 4.0, 2.0], [0.0, 5.0, 0.0]], [1, 0]
    >>> forward(logits, target, reduction="none").round(6)
    array([0.026531, 4.980055])
    >>> round(forward(logits, target), 6)
    2.503293
    >>> round(forward(logits, [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]], label_smoothing=0.1), 6)  # probabilities
    1.381584
    """
    samples = _samples(logits, target, **options)
    if not samples.reduced:
        losses = samples.loss().rounded.reshape(samples.shape)
        return losses if losses.ndim else float(losses)
    return float((dd_sum(samples.loss()) / samples.divisor).rounded)


@np.errstate(all="ignore")
def backward(logits: ArrayLike, target: ArrayLike, grad_output: ArrayLike = 1.0, **options: Unpack[Options]) -> Array:
    """Gradient of `forward` with respect to the logits.

    Parameters
    ----------
    logits, target, options : as for `forward`.
    grad_output : factor of the gradient, a number; for "none" also an array of the loss's shape.

    Returns
    -------
    float64 array of the logits' shape. It is 0 for ignored samples, and NaN for samples with a logit of NaN or +inf.

    Raises
    ------
    As `forward`; ValueError for grad_output of another shape.

    >>> backward([[1.0, 4.0, 2.0], [0.0, 5.0, 0.0]], [1, 0]).round(6)
    array([[ 0.006291, -0.023393,  0.017102],
           [-0.509928,  0.506515,  0.003413]])
    """
    samples = _samples(logits, target, **options)
    return samples.times(grad_output, samples.gradient(), -RAISED)


@np.errstate(all="ignore")
def hessian_vector_product(
    logits: ArrayLike,
    target: ArrayLike,
    vector: ArrayLike,
    grad_output: ArrayLike = 1.0,
    **options: Unpack[Options],
) -> Array:
    """Change of `backward` per unit step of the logits along a vector: the loss's second derivative times it.

    Parameters
    ----------
    logits, target, grad_output, options : as for `backward`.
    vector : array of the logits' shape.

    Returns
    -------
    float64 array of the logits' shape.

    Raises
    ------
    As `backward`; ValueError for a vector of another shape.

    >>> z, v, step = np.array([1.0, 4.0, 2.0]), np.array([1.0, 0.0, -1.0]), 1e-6
    >>> hessian_vector_product(z, 1, v).round(6)
    array([ 0.008808,  0.035656, -0.044465])
    >>> ((backward(z + step * v, 1) - backward(z - step * v, 1)) / (2 * step)).round(6)
    array([ 0.008808,  0.035656, -0.044465])
    """
    samples = _samples(logits, target, **options)
    v = _numbers("vector", vector)
    if v.shape != np.shape(logits):
        raise ValueError(f"vector must have the logits' shape {np.shape(logits)}, got {v.shape}")
    by_class = classes_last(v)
    exponent = _exponent(by_class)
    return samples.times(grad_output, samples.gradient_change(np.ldexp(by_class, -exponent)), exponent - RAISED)


@dataclass
class _Samples:
    """M samples side by side, logits z and coefficients 2^exponent a both (M, C), with q, r, n and q n of every class.

    q, r and q n are kept 2^RAISED too large, and so is n where it is `tiny`: as subnormal numbers they would have few
    digits, and a weight, a vector or `grad_output` may make them a part of an ordinary number.
    """

    z: Array
    a: DoubleDouble
    exponent: NDArray[np.int_]  # (M, 1)
    kept: NDArray[np.bool_]  # (M,): not ignored
    shape: tuple[int, ...]  # of the samples, M in all
    reduced: bool
    divisor: DoubleDouble
    strength: float

    def __post_init__(self) -> None:
        top = self.z.argmax(1)[:, None]
        largest = np.take_along_axis(self.z, top, 1)
        self.is_top = np.arange(self.z.shape[1]) == top
        gap = where(np.isfinite(largest), dd(largest) - self.z, np.nan)
        e = where(self.is_top, 0.0, exp(-gap, exponent=RAISED))
        others = dd_sum(e, 1)[:, None]
        one, all_terms = 2.0**RAISED, others.ldexp(-RAISED) + 1.0
        self.q = where(self.is_top, one, e) / all_terms
        self.r = where(self.is_top, others, others - e + one) / all_terms
        n = gap + log1p(others.ldexp(-RAISED))
        self.qn = where(self.q.high == 0, 0.0, self.q * n)  # its limit where n is infinite
        self.tiny = self.is_top & (gap.high == 0) & (others.high < 2.0 ** (RAISED - 60))
        series = others - others * others.ldexp(-RAISED) * 0.5  # two terms of the logarithm's
        self.n = where(self.tiny, series, n)

    def loss(self) -> DoubleDouble:
        rest = (1.0 - dd(self.strength)) + self.r.ldexp(-RAISED) * self.strength
        f, half = rest * self.n, (self.exponent - RAISED) // 2
        tiny_af = self.a * rest.ldexp(half) * self.n.ldexp(self.exponent - RAISED - half)
        af = where(self.tiny, tiny_af, (self.a * f).ldexp(self.exponent))
        return dd_sum(where((self.a.high == 0) & np.isinf(f.high), 0.0, af), 1)

    def gradient(self) -> DoubleDouble:
        """2^(RAISED - exponent) times the gradient."""
        return self._in_logits(self._ak())

    def gradient_change(self, v: Array) -> DoubleDouble:
        """2^(RAISED - exponent) times the gradient's change along v: dq = q w and dn = -w, with w = v - q.v.

        Equal steps of all logits change nothing: take v_top off.
        """
        v_less_top: DoubleDouble = dd(v) - v[self.is_top][:, None]
        w = v_less_top - dd_sum(self.q * v_less_top, 1)[:, None].ldexp(-RAISED)
        dk = w * (self.qn - self.q * 2.0) * self.strength
        return self.q * w * dd_sum(self._ak(), 1)[:, None] + self._in_logits(self.a * dk).ldexp(-RAISED)

    def times(self, grad_output: ArrayLike, gradient: DoubleDouble, exponent: int | NDArray[np.int_]) -> Array:
        """2^(exponent + self.exponent) times `gradient` and grad_output, in the logits' shape."""
        g = _numbers("grad_output", grad_output)
        if g.shape not in {(), () if self.reduced else self.shape}:
            rule = "be a number" if self.reduced else f"be a number or have the loss's shape {self.shape}"
            raise ValueError(f"grad_output must {rule}, got shape {g.shape}")
        factor = dd(np.broadcast_to(g, self.shape).reshape(-1, 1)) / self.divisor
        e = _exponent(factor.high)
        product = (gradient * factor.ldexp(-e)).ldexp(self.exponent + exponent + e)  # here alone numbers may underflow
        return in_logits_shape(where(self.kept[:, None], product, 0.0).rounded, self.shape)

    def _ak(self) -> DoubleDouble:
        return self.a * ((1.0 - dd(self.strength)) + (self.r + self.qn).ldexp(-RAISED) * self.strength)

    def _in_logits(self, ak: DoubleDouble) -> DoubleDouble:
        """q_j sum_k ak_k - ak_j. Without the own term in the sum nothing cancels when only one class has a target."""
        return self.q * (dd_sum(ak, 1)[:, None] - ak) - self.r * ak


def _samples(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    strength: float = 1.0,
) -> _Samples:
    y, ignore_index = _array("target", target), _integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits with a sign, got {ignore_index}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    x, w, label_smoothing, strength = checked(logits, weight, label_smoothing, strength)
    z, shape, classes = classes_last(x), shape_of_samples(x), len(w)

    if y.dtype.kind == "f":
        if y.shape != x.shape:
            raise ValueError(f"a floating target must have the logits' shape {x.shape}, got {y.shape}")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative for a floating target, got {ignore_index}")
        kept = np.ones(len(z), bool)
        a = ((1.0 - dd(label_smoothing)) * classes_last(y) + dd(label_smoothing) / classes) * w
        divisor = dd(len(z))
    elif y.dtype.kind in "iu":
        if y.shape != shape:
            raise ValueError(f"an integer target must have shape {shape} for logits of {x.shape}, got {y.shape}")
        kept = (y != ignore_index).reshape(-1)
        wrong = np.argwhere(((y < 0) | (y >= classes)) & (y != ignore_index))
        if len(wrong):
            place = [int(i) for i in wrong[0]]
            raise IndexError(f"target{place or ''} is {y[tuple(place)]}, not a class: 0 to {classes - 1}")
        t = np.where(kept, y.reshape(-1), 0).astype(np.intp)
        z = np.where(kept[:, None], z, 0.0)
        a = where(kept[:, None] & (np.arange(classes) == t[:, None]), (1.0 - dd(label_smoothing)) * w, 0.0)
        if label_smoothing:
            a = a + where(kept[:, None], dd(label_smoothing) / classes * w, 0.0)
        divisor = dd_sum(dd(np.where(kept, w[t], 0.0)))
    else:
        raise TypeError(f"target must hold integers (classes) or floats (probabilities), got {y.dtype}")
    exponent = _exponent(a.high)
    if reduction != "mean":
        divisor = dd(1.0)
    return _Samples(z, a.ldexp(-exponent), exponent, kept, shape, reduction != "none", divisor, strength)


def checked(
    logits: ArrayLike, weight: ArrayLike | None, label_smoothing: float, strength: float
) -> tuple[Array, Array, float, float]:
    """The same in float64, with one weight for each class."""
    x = _numbers("logits", logits)
    if x.ndim == 0 or x.shape[min(1, x.ndim - 1)] == 0:
        raise ValueError(f"logits must be (C,), (N, C) or (N, C, d1, ...) with C >= 1, got shape {x.shape}")
    e, s = _fraction("label_smoothing", label_smoothing), _fraction("strength", strength)
    classes = x.shape[min(1, x.ndim - 1)]
    w = np.ones(classes) if weight is None else _numbers("weight", weight)
    if w.shape != (classes,):
        raise ValueError(f"weight must have one value for each of the {classes} classes, got shape {w.shape}")
    return x, w, e, s


def _fraction(name: str, value: Any) -> float:
    number = np.asarray(value)
    if number.ndim or number.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(number)


def _integer(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _exponent(x: Array) -> NDArray[np.int_]:
    """(M, 1): the power of two just above the largest finite amount in each row of x (M, ...)."""
    largest = np.abs(np.where(np.isfinite(x), x, 0.0)).max(1, keepdims=True)
    return np.frexp(largest)[1].astype(np.int_)


def _numbers(name: str, values: ArrayLike) -> Array:
    array = _array(name, values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    return array.astype(np.float64)


def _array(name: str, values: ArrayLike) -> NDArray[Any]:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} has a mask, which would not be looked at: fill it, or use ignore_index")
    return np.asarray(values)


def shape_of_samples(x: Array) -> tuple[int, ...]:
    """The shape of logits without its class axis."""
    return x.shape[:1] * (x.ndim > 1) + x.shape[2:]


def classes_last(x: Array) -> Array:
    """(C,), (N, C) or (N, C, d1, ...) as (M, C)."""
    return np.moveaxis(x, min(1, x.ndim - 1), -1).reshape(-1, x.shape[min(1, x.ndim - 1)])


def in_logits_shape(rows: Array, samples: tuple[int, ...]) -> Array:
    """(M, C) as (C,), (N, C) or (N, C, d1, ...), for this shape of the M samples."""
    values = rows.reshape(*samples, rows.shape[1])
    return np.ascontiguousarray(np.moveaxis(values, -1, min(1, values.ndim - 1)))
