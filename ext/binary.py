"""LACE of labels that are present or absent, each by itself, by the C kernel; `lace_loss.ref` is the definition."""

from __future__ import annotations

import math
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from . import _cpu
from .arrays import Array, as_array, as_fraction, as_grad_output, as_logits, as_numbers, as_threads, delivered, writable
from .threads import in_threads


class BinaryOptions(TypedDict, total=False):
    """Meaning, rules and defaults as in `lace_loss.ref.binary.BinaryOptions`."""

    weight: ArrayLike | None
    pos_weight: ArrayLike | None
    reduction: str
    strength: float


def binary_forward(logits: ArrayLike, target: ArrayLike, **options: Unpack[BinaryOptions]) -> Any:
    """Loss in the logits' dtype: a scalar, or for reduction "none" an array of one loss a label.

    Parameters
    ----------
    logits : array of float32 or float64 of any shape.
    target : array of the same shape: labels 0 and 1 (booleans, the fastest, or integers), or floats, the probability
        that a label is present, outside [0, 1] too.
    options : see `BinaryOptions`.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape, an option or an integer that is no label.

    >>> float(binary_forward(np.array([2.0, -1.0]), [True, False]).round(6))
    0.04969
    """
    return _run(as_logits(logits), target, None, 1.0, None, **options)


def binary_backward(
    logits: ArrayLike, target: ArrayLike, grad_output: ArrayLike = 1.0, **options: Unpack[BinaryOptions]
) -> Array:
    """Gradient of `binary_forward`, times `grad_output`: a number or, for "none", one a label."""
    z = as_logits(logits)
    gradient = np.empty(z.shape, z.dtype)
    _run(z, target, gradient, grad_output, None, **options)
    return gradient


def binary_forward_backward(
    logits: ArrayLike,
    target: ArrayLike,
    grad_output: ArrayLike = 1.0,
    *,
    out: Array | None = None,
    threads: int | None = None,
    **options: Unpack[BinaryOptions],
) -> tuple[Any, Array]:
    """Loss and gradient in one pass; the loss is not multiplied by `grad_output`.

    Parameters
    ----------
    out, threads : as in `forward_backward`.

    >>> loss, gradient = binary_forward_backward(np.array([2.0, -1.0]), [1, 0], reduction="sum")
    >>> gradient.round(6)
    array([-0.027536,  0.13392 ])
    """
    z = as_logits(logits)
    inputs = (z, target, grad_output, options.get("weight"), options.get("pos_weight"))
    gradient = writable(out, z, inputs)
    loss = _run(z, target, gradient, grad_output, as_threads(threads), **options)
    return loss, delivered(out, gradient)


def _run(
    z: Array,
    target: ArrayLike,
    gradient: Array | None,
    grad_output: ArrayLike,
    threads: int | None,
    /,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    reduction: str = "mean",
    strength: float = 1.0,
) -> Any:
    y = target if type(target) is np.ndarray else as_array("target", target)
    dtype, shape, size, kind = z.dtype, z.shape, z.size, y.dtype.kind
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if type(strength) is not float or not 0.0 <= strength <= 1.0:
        strength = as_fraction("strength", strength)
    if kind not in "fiub":
        raise TypeError(f"target must hold labels (booleans, integers) or probabilities (floats), got {y.dtype}")
    if y.shape != shape:
        raise ValueError(f"target must have the logits' shape {shape}, got {y.shape}")

    probability = label = None
    if kind == "f":
        probability = as_numbers("target", y, dtype)
    else:
        if kind != "b" and len(wrong := np.argwhere((y != 0) & (y != 1))):
            place = wrong[0].tolist()
            raise ValueError(f"an integer target must be 0 or 1, target{place or ''} is {y[tuple(place)]}")
        label = np.asarray(y.view(np.uint8) if y.itemsize == 1 else y, np.uint8, order="C")
    w, p, row = _factors(weight, pos_weight, shape, dtype)
    rows = grad_outputs = None
    factor = 1.0
    if gradient is not None:
        rows = gradient if gradient.flags.c_contiguous else np.empty(shape, dtype)
        if type(grad_output) is float:
            factor = grad_output
        else:
            factor, grad_outputs = as_grad_output(grad_output, shape, reduction, dtype)
    loss = np.empty(shape if reduction == "none" else (), dtype)
    losses, divisor = loss if reduction == "none" else None, float(size) if reduction == "mean" else 1.0
    logits = np.asarray(z, order="C")
    call = _cpu.BinaryCall(
        *(losses, rows, logits, probability, label, w, p, grad_outputs, size, row),
        *(dtype.itemsize, strength, divisor, factor),
    )
    in_threads(call, threads)
    if gradient is not None and rows is not gradient:
        gradient[...] = rows
    if reduction != "none":
        call.reduce(loss)
    return loss[()]


def _factors(
    weight: ArrayLike | None, pos_weight: ArrayLike | None, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[Array | None, Array | None, int]:
    """Both for the labels of a row, and how many a row has: those of the last axes, which all other axes repeat."""
    given = list[Array | None]()
    for name, values in (("weight", weight), ("pos_weight", pos_weight)):
        factors = None if values is None else as_numbers(name, values, dtype)
        given.append(factors)
        if factors is None:
            continue
        try:
            np.broadcast_to(factors, shape)
        except ValueError:
            raise ValueError(f"{name} must broadcast to the logits' shape {shape}, got {factors.shape}") from None
    row = row_of([factors.shape for factors in given if factors is not None], shape)
    w, p = (None if factors is None else _of_last_axes(factors, row) for factors in given)
    return w, p, math.prod(row)


def row_of(shapes: list[tuple[int, ...]], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes of `shape`: as many as factors of these shapes differ along."""
    axes = [len(factors) - axis for factors in shapes for axis, length in enumerate(factors) if length != 1]
    return shape[len(shape) - max(axes, default=0) :]


def _of_last_axes(values: Array, row: tuple[int, ...]) -> Array:
    last = values.reshape(values.shape[max(0, values.ndim - len(row)) :])  # the axes before them have length 1
    return np.ascontiguousarray(np.broadcast_to(last, row))
