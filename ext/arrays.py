"""NumPy arrays to the C kernel and back: what is refused, what is copied, and what the kernel is told."""

from __future__ import annotations

from operator import index
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _cpu
from .layout import row_stride
from .threads import WORTH_THREADS, in_threads

__all__ = ["Options", "backward", "forward", "forward_backward"]

Array = NDArray[Any]

_DTYPES = (np.dtype(np.float32), FLOAT64 := np.dtype(np.float64))
_INT64 = np.dtype(np.int64)


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
    logits : (C,), (N, C) or (N, C, d1, ...) array of float32 or float64. Copied only
        if the C values of a row, or of images the values of a plane, do not lie together, or rows overlap.
    target : class indices (integers) or probabilities (floats of the logits' shape).
    options : see `Options`.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option, IndexError for a class that does not exist.
    """
    return call_kernel(as_logits(logits), target, None, 1.0, None, **options)


def backward(logits: ArrayLike, target: ArrayLike, grad_output: ArrayLike = 1.0, **options: Unpack[Options]) -> Array:
    """Gradient of `forward` with respect to the logits, times `grad_output`: a number or, for "none", one a sample."""
    z = as_logits(logits)
    gradient = np.empty(z.shape, z.dtype)
    call_kernel(z, target, gradient, grad_output, None, **options)
    return gradient


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
    z = as_logits(logits)
    gradient = writable(out, z, (z, target, grad_output, options.get("weight")))
    threads = as_threads(threads)
    loss = call_kernel(z, target, gradient, grad_output, threads, **options)
    return loss, delivered(out, gradient)


def writable(out: Array | None, z: Array, inputs: tuple[ArrayLike | None, ...]) -> Array:
    """What a result of the shape of logits z is written to: `out`, or an array that `delivered` copies there."""
    if out is None:
        return np.empty(z.shape, z.dtype)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    flags = out.flags
    if out.shape != z.shape or out.dtype != z.dtype or not flags.writeable:
        kind = "writable" if flags.writeable else "read-only"
        raise ValueError(
            f"out must be a writable {z.dtype} array of shape {z.shape}, "
            f"got a {kind} {out.dtype} array of shape {out.shape}"
        )
    for values in inputs:
        if values is None or type(values) is float:
            continue
        if np.may_share_memory(out, values) and _share(out, np.asarray(values)):
            raise ValueError("out shares memory with an input")
    return out if flags.aligned else np.empty(z.shape, z.dtype)


def delivered(out: Array | None, written: Array) -> Array:
    """What the caller receives, of what was written to an array of `writable`."""
    if out is None or out is written:
        return written
    out[...] = written
    return out


def as_threads(value: int | None) -> int | None:
    if value is not None and (value := _integer("threads", value)) < 1:
        raise ValueError(f"threads must be at least 1, got {value}")
    return value


def call_kernel(
    logits: Array,
    target: ArrayLike,
    gradient: Array | None,
    grad_output: ArrayLike,
    threads: int | None,
    statistics: tuple[Array | None, ...] | None = None,
    row_offset: int = 0,
    /,  # what follows alone is the caller's to name
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    strength: float = 1.0,
) -> Any:
    y = target if type(target) is np.ndarray else as_array("target", target)
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = as_ignore_index(ignore_index)
    dtype = logits.dtype
    whole_shape = logits.shape
    ndim = len(whole_shape)
    axis = 1 if ndim > 1 else 0
    if ndim == 0 or whole_shape[axis] == 0:
        raise no_classes(whole_shape)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if type(label_smoothing) is not float or not 0.0 <= label_smoothing <= 1.0:
        label_smoothing = as_fraction("label_smoothing", label_smoothing)
    if type(strength) is not float or not 0.0 <= strength <= 1.0:
        strength = as_fraction("strength", strength)
    classes = whole_shape[axis]
    n = logits.size // classes
    shape = whole_shape[:1] if ndim == 2 else whole_shape[:axis] + whole_shape[axis + 1 :]
    w = None if weight is None else as_weight(weight, classes, dtype)

    indices, probability, kind = None, None, y.dtype.kind
    if kind == "f":
        if y.shape != logits.shape:
            raise ValueError(f"a floating target must have the logits' shape {logits.shape}, got {y.shape}")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative for a floating target, got {ignore_index}")
        probability = classes_last(as_numbers("target", y, dtype))
    elif kind in "iu":
        if y.shape != shape:
            raise ValueError(f"an integer target must have shape {shape} for logits of {logits.shape}, got {y.shape}")
        # Converted, a class beyond int64 would be a negative number, perhaps ignore_index.
        if kind == "u" and y.itemsize == 8 and len(beyond := np.argwhere(y > np.uint64(2**63 - 1))):
            raise _no_class(y, beyond[0].tolist(), row_offset, classes)
        flags = y.flags
        if y.dtype is _INT64 and flags.c_contiguous and flags.aligned:
            indices = y
        else:
            indices = np.asarray(y if flags.aligned else y.copy(), np.int64, order="C")
    else:
        raise TypeError(f"target must hold integers (classes) or floats (probabilities), got {y.dtype}")

    hard = indices is not None and label_smoothing == 0 and statistics is None
    z, apart, plane_size = laid_out(logits, hard)
    rows = row_grad_outputs = None
    factor = 1.0
    if gradient is not None:
        rows = rows_of(gradient, plane_size)
        if type(grad_output) is float:
            factor = grad_output
        else:
            factor, row_grad_outputs = as_grad_output(grad_output, shape, reduction, dtype)
    loss = np.empty(shape if reduction == "none" else (), dtype)
    losses = loss if reduction == "none" else None
    divisor = None if reduction == "mean" else 1.0
    call = _cpu.KernelCall(
        *(losses, rows, z, indices, probability, w, row_grad_outputs, statistics, n, classes, plane_size),
        *(apart, dtype.itemsize, ignore_index, label_smoothing, strength, divisor, factor),
    )
    bad_row = call.run(0, n) if logits.size < WORTH_THREADS else in_threads(call, threads)
    if bad_row >= 0:
        raise _no_class(y, [int(i) for i in np.unravel_index(bad_row, shape)], row_offset, classes)
    if gradient is not None and rows is not None and rows is not gradient:
        write_back(rows, gradient, plane_size)
    if reduction != "none":
        call.reduce(loss)
    return loss[()]


def laid_out(logits: Array, by_planes: bool) -> tuple[Array, int, int]:
    """The logits as the kernel reads them, a copy where needed; how many bytes apart their rows start; the plane size.

    Images whose classes do not come last are worked on plane by plane, if `by_planes`. Elsewhere the plane size is 0.
    """
    ndim = logits.ndim
    if ndim == 2 and logits.flags.c_contiguous:  # asked first: row_stride takes 4 % of a small call
        return logits, logits.shape[1] * logits.itemsize, 0
    apart = row_stride(logits.shape, logits.strides, logits.itemsize)
    if by_planes and ndim > 2 and apart is None:
        return np.asarray(logits, order="C"), 0, logits[:1, :1].size
    if apart is None or ndim != 2:
        return classes_last(logits), logits.shape[1 if ndim > 1 else 0] * logits.itemsize, 0
    return logits, apart, 0


def rows_of(result: Array, plane_size: int) -> Array:
    """Where the kernel writes rows or, with a plane size, planes that are to become `result`; see `write_back`."""
    if result.ndim == 2 or plane_size:
        return result if result.flags.c_contiguous else np.ascontiguousarray(result)
    return classes_last(result)


def write_back(rows: Array, result: Array, plane_size: int) -> None:
    """Copy to `result` what `rows_of` gave and the kernel has filled, where that is memory of its own."""
    if np.may_share_memory(rows, result):
        return
    if plane_size:
        result[...] = rows
    else:
        with_classes_last = np.moveaxis(result, 1 if result.ndim > 1 else 0, -1)
        with_classes_last[...] = rows.reshape(with_classes_last.shape)


def as_grad_output(
    grad_output: ArrayLike, shape: tuple[int, ...], reduction: str, dtype: np.dtype[Any]
) -> tuple[float, Array | None]:
    """One factor for the whole gradient, or 1 and a factor for each of the losses, whose shape this is."""
    g = as_numbers("grad_output", grad_output, dtype if reduction == "none" else FLOAT64)
    if g.ndim == 0:
        return float(g), None
    if g.shape == shape and reduction == "none":
        return 1.0, g
    rule = f"be a number or have the loss's shape {shape}" if reduction == "none" else "be a number"
    raise ValueError(f"grad_output must {rule}, got shape {g.shape}")


def as_weight(weight: ArrayLike, classes: int, dtype: np.dtype[Any]) -> Array:
    w = as_numbers("weight", weight, dtype)
    if w.shape != (classes,):
        raise ValueError(f"weight must have one value for each of the {classes} classes, got shape {w.shape}")
    return w


def no_classes(shape: tuple[int, ...]) -> ValueError:
    return ValueError(f"logits must be (C,), (N, C) or (N, C, d1, ...) with C >= 1, got shape {shape}")


def _no_class(y: Array, position: list[int], row_offset: int, classes: int) -> IndexError:
    """The error of the target at this position, where rows are counted from `row_offset`."""
    shown = [position[0] + row_offset, *position[1:]] if position else ""
    return IndexError(f"target{shown} is {y[tuple(position)]}, not a class: 0 to {classes - 1}")


def _share(a: Array, b: Array) -> bool:
    """Whether an element of one is in the other, too; also where that takes too long to find out."""
    try:
        return np.shares_memory(a, b, max_work=1_000_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def as_fraction(name: str, value: Any) -> float:
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


def as_ignore_index(value: Any) -> int:
    number = _integer("ignore_index", value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits with a sign, got {number}")
    return number


def as_numbers(name: str, values: ArrayLike, dtype: np.dtype[Any]) -> Array:
    array = as_array(name, values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    return np.asarray(array if array.flags.aligned else array.copy(), dtype, order="C")


def as_array(name: str, values: ArrayLike) -> Array:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} has a mask, which would not be looked at: fill it, or use ignore_index")
    return np.asarray(values)


def as_logits(values: ArrayLike) -> Array:
    """An array of float32 or float64 in this machine's byte order, aligned to its type."""
    logits = values if type(values) is np.ndarray else as_array("logits", values)
    if logits.dtype in _DTYPES and logits.flags.aligned:
        return logits
    dtype = logits.dtype.newbyteorder("=")
    if dtype not in _DTYPES:
        raise TypeError(f"logits must be float32 or float64, got {logits.dtype}")
    return logits.astype(dtype)


def classes_last(x: Array) -> Array:
    """(C,), (N, C) or (N, C, d1, ...) as contiguous (M, C), without a copy where possible."""
    if x.ndim == 2:
        return np.asarray(x, order="C")
    if x.ndim > 2:
        x = np.moveaxis(x, 1, -1)
    return np.asarray(x, order="C").reshape(-1, x.shape[-1])
