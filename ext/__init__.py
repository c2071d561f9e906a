"""LACE for NumPy arrays in float32 and float64, by the C kernel of `lace.h`; `lace_loss.ref` is the definition."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from operator import index
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _cpu

__all__ = ["Options", "backward", "forward", "forward_backward"]

Array = NDArray[Any]

# Starting two threads takes about as long as the kernel needs for so many logits.
_LOGITS_WORTH_A_THREAD = 1 << 17


class Options(TypedDict, total=False):
    """Meaning, rules and defaults as in `lace_loss.ref.Options`."""

    weight: ArrayLike | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    strength: float


def forward(logits: ArrayLike, target: ArrayLike, **options: Unpack[Options]) -> Any:
    """Loss in the logits' dtype: a scalar, or for reduction "none" an array of one loss a sample.

    Parameters
    ----------
    logits : (C,), (N, C) or (N, C, d1, ...) array of float32 or float64; copied if the rows of C are not contiguous.
    target : class indices (integers) or probabilities (floats of the logits' shape).
    options : see `Options`.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option, IndexError for a class that does not exist.
    """
    return _run(np.asarray(logits), target, None, None, None, **options)


def backward(logits: ArrayLike, target: ArrayLike, grad_output: ArrayLike = 1.0, **options: Unpack[Options]) -> Array:
    """Gradient of `forward` with respect to the logits, times `grad_output`: a number or, for "none", one a sample."""
    return forward_backward(logits, target, grad_output, **options)[1]


def forward_backward(
    logits: ArrayLike,
    target: ArrayLike,
    grad_output: ArrayLike = 1.0,
    *,
    out: Array | None = None,
    threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Any, Array]:
    """Loss and gradient in one pass; the loss is not multiplied by `grad_output`.

    Parameters
    ----------
    out : array of the logits' shape and dtype that receives the gradient, apart from every input in memory. After an
        error its contents are undefined.
    threads : at most so many, by default the number of processors. The result does not depend on it.
    """
    z = np.asarray(logits)
    gradient = np.empty(z.shape, z.dtype) if out is None else out
    if gradient.shape != z.shape or gradient.dtype != z.dtype or not gradient.flags.writeable:
        kind = "writable" if gradient.flags.writeable else "read-only"
        raise ValueError(
            f"out must be a writable {z.dtype} array of shape {z.shape}, "
            f"got a {kind} {gradient.dtype} array of shape {gradient.shape}"
        )
    inputs = (z, target, grad_output, options.get("weight"))
    if any(np.may_share_memory(gradient, np.asarray(values)) for values in inputs if values is not None):
        raise ValueError("out shares memory with an input")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return _run(z, target, gradient, grad_output, threads, **options), gradient


def _run(
    logits: Array,
    target: ArrayLike,
    gradient: Array | None,
    grad_output: ArrayLike | None,
    threads: int | None,
    statistics: tuple[Array, ...] | None = None,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    strength: float = 1.0,
) -> Any:
    dtype, y, ignore_index = logits.dtype, np.asarray(target), index(ignore_index)
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"logits must be float32 or float64, got {dtype}")
    if logits.ndim == 0 or logits.shape[_class_axis(logits)] == 0:
        raise ValueError(f"logits must be (C,), (N, C) or (N, C, d1, ...) with C >= 1, got shape {logits.shape}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    for name, value in (("label_smoothing", label_smoothing), ("strength", strength)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    z = _classes_last(logits)
    shape, classes = logits.shape[:1] * (logits.ndim > 1) + logits.shape[2:], z.shape[1]
    w = None if weight is None else _numbers("weight", weight, dtype)
    if w is not None and w.shape != (classes,):
        raise ValueError(f"weight must have one value for each of the {classes} classes, got shape {w.shape}")

    indices = probability = None
    if y.dtype.kind == "f":
        if y.shape != logits.shape:
            raise ValueError(f"a floating target must have the logits' shape {logits.shape}, got {y.shape}")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative for a floating target, got {ignore_index}")
        probability = _classes_last(_numbers("target", y, dtype))
    elif y.dtype.kind in "iu":
        if y.shape != shape:
            raise ValueError(f"an integer target must have shape {shape} for logits of {logits.shape}, got {y.shape}")
        # A uint64 beyond int64 is no class; wrapped it might be ignore_index.
        indices = np.minimum(y, np.uint64(2**63 - 1)) if y.dtype == np.uint64 else y
        indices = np.ascontiguousarray(indices, np.int64).reshape(-1)
    else:
        raise TypeError(f"target must hold integers (classes) or floats (probabilities), got {y.dtype}")

    with np.errstate(all="ignore"):  # nothing divided by 0 is NaN, by definition
        divisor = _mean_divisor(indices, w, ignore_index, len(z)) if reduction == "mean" else np.float64(1)
        rows = scale = None
        if gradient is not None:
            rows = _classes_last(gradient)
            g = _numbers("grad_output", grad_output, np.dtype(np.float64))
            if g.shape not in {(), shape if reduction == "none" else ()}:
                rule = f"be a number or have the loss's shape {shape}" if reduction == "none" else "be a number"
                raise ValueError(f"grad_output must {rule}, got shape {g.shape}")
            scale = np.ascontiguousarray(np.broadcast_to(g / divisor, shape), dtype).reshape(-1)
        losses = np.empty(len(z), dtype)
        arrays = (losses, z, rows, indices, probability, scale)
        wrong = _in_threads(arrays, (w, ignore_index, label_smoothing, strength), statistics, threads)
        if wrong >= 0:
            place = [int(i) for i in np.unravel_index(wrong, shape)]
            raise IndexError(f"target{place or ''} is {y[tuple(place)]}, not a class: 0 to {classes - 1}")
        if gradient is not None and rows is not None and not np.may_share_memory(rows, gradient):
            np.moveaxis(gradient, _class_axis(gradient), -1)[...] = rows.reshape(*shape, classes)
        if reduction == "none":
            return losses.reshape(shape)[()]
        return dtype.type(losses.sum(dtype=np.float64) / divisor)


def _mean_divisor(indices: Array | None, weight: Array | None, ignore_index: int, n: int) -> np.float64:
    """What `mean` divides the sum of n losses by; `indices` is None for probabilities."""
    if indices is None:
        return np.float64(n)
    kept = indices[indices != ignore_index]
    return np.float64(len(kept)) if weight is None else weight.take(kept, mode="clip").sum(dtype=np.float64)


def _in_threads(arrays: Any, options: Any, statistics: tuple[Array, ...] | None, threads: int | None) -> int:
    """The kernel on slices of all arrays (loss, logits, ...); the first row whose class does not exist, or -1."""
    z = arrays[1]

    def part(some: slice) -> int:
        arguments: list[Any] = [None if array is None else array[some] for array in arrays]
        arguments += [*options, None if statistics is None else tuple(array[some] for array in statistics)]
        wrong = _cpu.rows(*arguments)
        return wrong if wrong < 0 else wrong + int(some.start)

    count = min(threads or os.cpu_count() or 1, max(1, z.size // _LOGITS_WORTH_A_THREAD))
    if count == 1:
        return part(slice(0, len(z)))
    edges = np.linspace(0, len(z), count + 1).astype(int)
    with ThreadPoolExecutor(count) as pool:
        rows = pool.map(part, (slice(a, b) for a, b in pairwise(edges)))
        return min((row for row in rows if row >= 0), default=-1)


def _numbers(name: str, values: ArrayLike | None, dtype: np.dtype[Any]) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    return np.ascontiguousarray(array, dtype).reshape(array.shape)


def _class_axis(x: Array) -> int:
    return min(1, x.ndim - 1)


def _classes_last(x: Array) -> Array:
    """(C,), (N, C) or (N, C, d1, ...) as contiguous (M, C), without a copy where possible."""
    return np.ascontiguousarray(np.moveaxis(x, _class_axis(x), -1)).reshape(-1, x.shape[_class_axis(x)])
