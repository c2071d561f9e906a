"""LACE for NumPy arrays in float32 and float64, by the C kernel of `lace.h`; `lace_loss.ref` is the definition."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _cpu

__all__ = ["Evaluation", "Options", "backward", "evaluate", "forward", "forward_backward"]

Array = NDArray[Any]

_DTYPES = (np.dtype(np.float32), _FLOAT64 := np.dtype(np.float64))

# A second thread must be worth waking, the more where other threads still spin for work: for 256,000 logits it is not.
_LOGITS_WORTH_A_THREAD = 1 << 17
_WORTH_THREADS = 2 * _LOGITS_WORTH_A_THREAD  # asked before `_in_threads` is called, which takes 0.3 us of a call's 5

# What is evaluated at a time: in float32 4 MiB, which stay in a cache between being read or converted and being used.
_LOGITS_IN_A_BLOCK = 1 << 20

_BINS = 15  # of the calibration error


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
        if the C values of a row, or of images the values of a plane, do not lie together.
    target : class indices (integers) or probabilities (floats of the logits' shape).
    options : see `Options`.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option, IndexError for a class that does not exist.
    """
    return _run(_logits(logits), target, None, 1.0, None, **options)


def backward(logits: ArrayLike, target: ArrayLike, grad_output: ArrayLike = 1.0, **options: Unpack[Options]) -> Array:
    """Gradient of `forward` with respect to the logits, times `grad_output`: a number or, for "none", one a sample."""
    z = _logits(logits)
    gradient = np.empty(z.shape, z.dtype)
    _run(z, target, gradient, grad_output, None, **options)
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
    z = _logits(logits)
    if out is None:
        gradient = np.empty(z.shape, z.dtype)
    else:
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
        flags = out.flags
        gradient = out if flags.aligned else np.empty(z.shape, z.dtype)
        if out.shape != z.shape or out.dtype != z.dtype or not flags.writeable:
            kind = "writable" if flags.writeable else "read-only"
            raise ValueError(
                f"out must be a writable {z.dtype} array of shape {z.shape}, "
                f"got a {kind} {out.dtype} array of shape {out.shape}"
            )
        for values in (z, target, grad_output, options.get("weight")):
            if values is not None and type(values) is not float and np.may_share_memory(out, np.asarray(values)):
                raise ValueError("out shares memory with an input")
    if threads is not None and (threads := index(threads)) < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    loss = _run(z, target, gradient, grad_output, threads, **options)
    if out is None or out is gradient:
        return loss, gradient
    out[...] = gradient
    return loss, out


@dataclass(frozen=True)
class Evaluation:
    """Figures of a classifier, over the samples that are not ignored; NaN if there are none.

    loss : the mean that `forward` gives with the same options.
    cross_entropy : mean of -log q_t in nats, whatever the options: the negative log-likelihood.
    accuracy : for each k of `topk` the fraction of samples whose true class is among the k largest logits; of equal
        logits the first comes first.
    calibration_error : sum over 15 bins of (samples in the bin / samples) |accuracy - mean confidence in the bin|, a
        fraction. A sample's confidence is its largest probability, its bin (0, 1/15], ... or (14/15, 1].
    bins : what it is made of, and a reliability diagram is drawn from: `count`, and the means `confidence` and
        `accuracy`, 0 where there is no sample.
    count : samples.
    """

    loss: float
    cross_entropy: float
    accuracy: dict[int, float]
    calibration_error: float
    bins: dict[str, list[float]]
    count: int


def evaluate(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    topk: Iterable[int] = (1, 5),
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    strength: float = 1.0,
) -> Evaluation:
    """Loss, cross entropy, top-k accuracy and calibration error, block by block: the logits are not copied as a whole.

    Parameters
    ----------
    logits : (C,), (N, C) or (N, C, d1, ...) array of float32, float64 or float16, which is worked on in float32.
    target : class indices, of the logits' shape without its class axis.
    topk : numbers of classes.
    weight, label_smoothing, strength : of the loss, see `Options`.

    Raises
    ------
    As `forward`; ValueError also for logits without a softmax: with a NaN or +inf, or all -inf.
    """
    z, y = _array("logits", logits), _array("target", target)
    if z.ndim < 2:
        z, y = z[None], y[None]
    if y.shape[:1] != z.shape[:1]:
        raise ValueError(f"target must have one class for each of {len(z)} samples, got shape {y.shape}")
    tally = Tally(topk, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, strength=strength)
    rows = rows_in_a_block(z.shape[1:])
    for start in range(0, max(1, len(z)), rows):
        tally.add(z[start : start + rows], y[start : start + rows])
    return tally.figures()


def rows_in_a_block(row: tuple[int, ...]) -> int:
    """How many rows of this shape are evaluated at a time."""
    return max(1, _LOGITS_IN_A_BLOCK // max(1, math.prod(row)))


class Tally:
    """`evaluate`, of logits and targets that come block by block: its arguments, errors and result."""

    def __init__(
        self,
        topk: Iterable[int] = (1, 5),
        *,
        weight: ArrayLike | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        strength: float = 1.0,
    ) -> None:
        self.hits = {index(k): 0 for k in topk}
        if min(self.hits, default=1) < 1:
            raise ValueError(f"topk must hold numbers from 1, got {min(self.hits)}")
        self.weight, self.ignore_index = weight, index(ignore_index)
        self.options: Options = {
            "weight": weight,
            "ignore_index": ignore_index,
            "reduction": "none",
            "label_smoothing": label_smoothing,
            "strength": strength,
        }
        self.rows = self.count = 0
        self.loss = self.cross_entropy = self.divisor = 0.0
        self.bins = np.zeros((3, _BINS))  # in each, the samples, the sum of their confidences, how many are right

    def add(self, logits: Array, target: Array) -> None:
        """The next (N, C) or (N, C, d1, ...) logits and their classes."""
        if logits.dtype.kind != "f" or logits.dtype.itemsize > 8:
            raise TypeError(f"logits must be float16, float32 or float64, got {logits.dtype}")
        if target.dtype.kind not in "iu":
            raise TypeError(f"target must hold integers (classes), got {target.dtype}")
        if logits.ndim < 2 or logits.shape[1] == 0:
            raise ValueError(f"logits must be (N, C) or (N, C, d1, ...) with C >= 1, got shape {logits.shape}")
        # Its bytes in this machine's order, whatever a file has.
        z = _logits(np.asarray(logits, np.float64 if logits.dtype.itemsize == 8 else np.float32))
        losses, ce, q, rank = _described(z, target, self.rows, self.options)
        classes = target.reshape(-1)
        kept = classes != self.ignore_index
        behind = np.flatnonzero(kept & (rank > 0))
        if len(behind):  # the confidence is the probability of the class in front: ask for that one's
            leading = _classes_last(z)[behind]
            q[behind] = _described(leading, leading.argmax(1), 0, {"reduction": "none"})[2]
        cross_entropy = ce.sum(dtype=np.float64)
        if np.isnan(cross_entropy):
            n, *place = np.argwhere(np.isnan(ce).reshape(target.shape))[0].tolist()
            values = z[(n, slice(None), *place)]
            what = "NaN" if np.isnan(values).any() else "+inf" if np.inf in values else "-inf only"
            place = ", ".join(map(str, [self.rows + n, *([":", *place] if place else [])]))
            raise ValueError(f"logits[{place}] holds {what}")
        right, q, rank = rank[kept] == 0, q[kept].astype(np.float64), rank[kept]
        self.rows += len(target)
        self.count += len(q)
        self.loss += losses.sum(dtype=np.float64)
        self.cross_entropy += cross_entropy
        self.divisor += (
            len(q) if self.weight is None else np.asarray(self.weight, z.dtype)[classes[kept]].sum(dtype=np.float64)
        )
        for k in self.hits:
            self.hits[k] += int(np.count_nonzero(rank < k))
        # Bounded as an integer, whatever q is: bincount writes outside of its memory for a large one.
        place = np.clip(np.ceil(q * _BINS).astype(np.intp) - 1, 0, _BINS - 1)
        self.bins += [np.bincount(place, values, _BINS) for values in (np.ones_like(q), q, right)]

    def figures(self) -> Evaluation:
        n = self.count or math.nan
        count, confidence, right = self.bins
        some = np.maximum(count, 1)
        means = {"count": count, "confidence": confidence / some, "accuracy": right / some}
        return Evaluation(
            float(self.loss / (self.divisor or math.nan)),
            float(self.cross_entropy / n),
            {k: hits / n for k, hits in self.hits.items()},
            float(np.abs(right - confidence).sum() / n),
            {name: values.tolist() for name, values in means.items()},
            self.count,
        )


def _described(z: Array, target: Array, first: int, options: Options) -> tuple[Array, Array, Array, Array]:
    """Loss, cross entropy, probability and rank of each sample."""
    n = target.size
    statistics = np.empty(n, z.dtype), np.empty(n, z.dtype), np.empty(n, np.int64)
    losses = _run(z, target, None, 1.0, None, statistics, first, **options)
    return losses.reshape(-1), *statistics


def _run(
    logits: Array,
    target: ArrayLike,
    gradient: Array | None,
    grad_output: ArrayLike,
    threads: int | None,
    statistics: tuple[Array, Array, Array] | None = None,
    first: int = 0,
    /,  # what follows alone is the caller's to name
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    strength: float = 1.0,
) -> Any:
    y = target if type(target) is np.ndarray else _array("target", target)
    ignore_index = index(ignore_index)
    dtype = logits.dtype
    axis = _class_axis(logits)
    if logits.ndim == 0 or logits.shape[axis] == 0:
        raise ValueError(f"logits must be (C,), (N, C) or (N, C, d1, ...) with C >= 1, got shape {logits.shape}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    classes = logits.shape[axis]
    n = logits.size // classes
    shape = logits.shape[:axis] + logits.shape[axis + 1 :]
    w = None if weight is None else _numbers("weight", weight, dtype)
    if w is not None and w.shape != (classes,):
        raise ValueError(f"weight must have one value for each of the {classes} classes, got shape {w.shape}")

    indices, probability, kind = None, None, y.dtype.kind
    if kind == "f":
        if y.shape != logits.shape:
            raise ValueError(f"a floating target must have the logits' shape {logits.shape}, got {y.shape}")
        if ignore_index >= 0:
            raise ValueError(f"ignore_index must be negative for a floating target, got {ignore_index}")
        probability = _classes_last(_numbers("target", y, dtype))
    elif kind in "iu":
        if y.shape != shape:
            raise ValueError(f"an integer target must have shape {shape} for logits of {logits.shape}, got {y.shape}")
        # Converted, a class beyond int64 would be a negative number, perhaps ignore_index.
        if kind == "u" and y.itemsize == 8 and len(beyond := np.argwhere(y > np.uint64(2**63 - 1))):
            raise _no_class(y, beyond[0].tolist(), first, classes)
        indices = np.asarray(y if y.flags.aligned else y.copy(), np.int64, order="C")
    else:
        raise TypeError(f"target must hold integers (classes) or floats (probabilities), got {y.dtype}")

    # Images whose classes do not come last are worked on plane by plane where the kernel can.
    hard = indices is not None and label_smoothing == 0 and statistics is None
    planes = logits.ndim > 2 and hard and not _ends_with_classes(logits)
    inner = n // max(1, len(logits)) if planes else 0
    if logits.ndim == 2 and logits.strides[1] == dtype.itemsize:
        z, apart = logits, logits.strides[0]
    else:
        z, apart = np.asarray(logits, order="C") if planes else _classes_last(logits), classes * dtype.itemsize
    rows = each = None
    above = 1.0
    if gradient is not None:
        rows = np.asarray(gradient, order="C") if planes else _classes_last(gradient)
        if type(grad_output) is float:
            above = grad_output
        else:
            g = _numbers("grad_output", grad_output, dtype if reduction == "none" else _FLOAT64)
            if g.ndim == 0:
                above = float(g)
            elif g.shape == shape and reduction == "none":
                each = g
            else:
                rule = f"be a number or have the loss's shape {shape}" if reduction == "none" else "be a number"
                raise ValueError(f"grad_output must {rule}, got shape {g.shape}")
    loss = np.empty(shape if reduction == "none" else (), dtype)
    losses = loss if reduction == "none" else None
    divisor = None if reduction == "mean" else 1.0
    try:
        job = _cpu.Job(
            *(losses, rows, z, indices, probability, w, each, statistics, n, classes, inner, apart, dtype.itemsize),
            *(ignore_index, label_smoothing, strength, divisor, above),
        )
    except OverflowError as error:
        raise ValueError(f"ignore_index must fit in 64 bits with a sign, got {ignore_index}") from error
    wrong = job.run(0, n) if logits.size < _WORTH_THREADS else _in_threads(job, threads)
    if wrong >= 0:
        raise _no_class(y, [int(i) for i in np.unravel_index(wrong, shape)], first, classes)
    if gradient is not None and rows is not None and rows is not gradient and not np.may_share_memory(rows, gradient):
        if planes:
            gradient[...] = rows
        else:
            np.moveaxis(gradient, axis, -1)[...] = rows.reshape(*shape, classes)
    if reduction != "none":
        job.reduce(loss)
    return loss[()]


def _no_class(y: Array, place: list[int], first: int, classes: int) -> IndexError:
    """The error of the target at this place, where rows are counted from `first`."""
    shown = [place[0] + first, *place[1:]] if place else ""
    return IndexError(f"target{shown} is {y[tuple(place)]}, not a class: 0 to {classes - 1}")


def _in_threads(job: _cpu.Job, threads: int | None) -> int:
    """Run the job; the first row whose class does not exist, or -1."""
    parts = job.n * job.k // _LOGITS_WORTH_A_THREAD
    if parts < 2 or (parts := min(threads or os.cpu_count() or 1, parts)) < 2:
        return job.run(0, job.n)
    global _pool
    edges = [job.n * i // parts for i in range(parts + 1)]
    left, wrong = list(pairwise(edges)), list[int]()

    def work() -> None:
        while left:
            try:
                part = left.pop()
            except IndexError:  # another thread took the last one
                return
            wrong.append(job.run(*part))

    helpers = list[Future[None]]()
    try:
        _pool = _pool or ThreadPoolExecutor()
        # No thread may be had: the system has none to give, or the interpreter is ending. Then the others do its part.
        with suppress(RuntimeError):
            helpers += (_pool.submit(work) for _ in range(parts - 1))
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    finally:
        left.clear()  # after an error no part is begun any more
    return min((row for row in wrong if row >= 0), default=-1)


def _forget_threads() -> None:
    global _pool
    _pool = None


_pool: ThreadPoolExecutor | None = None
os.register_at_fork(after_in_child=_forget_threads)  # a child has none of its parent's threads


def _numbers(name: str, values: ArrayLike, dtype: np.dtype[Any]) -> Array:
    array = _array(name, values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    return np.asarray(array if array.flags.aligned else array.copy(), dtype, order="C")


def _array(name: str, values: ArrayLike) -> Array:
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} has a mask, which would not be looked at: fill it, or use ignore_index")
    return np.asarray(values)


def _logits(values: ArrayLike) -> Array:
    """An array of float32 or float64 in this machine's byte order, aligned to its type."""
    logits = values if type(values) is np.ndarray else _array("logits", values)
    if logits.dtype in _DTYPES and logits.flags.aligned:
        return logits
    dtype = logits.dtype.newbyteorder("=")
    if dtype not in _DTYPES:
        raise TypeError(f"logits must be float32 or float64, got {logits.dtype}")
    return logits.astype(dtype)


def _class_axis(x: Array) -> int:
    return 1 if x.ndim > 1 else 0


def _ends_with_classes(x: Array) -> bool:
    return bool(np.moveaxis(x, 1, -1).flags.c_contiguous)


def _classes_last(x: Array) -> Array:
    """(C,), (N, C) or (N, C, d1, ...) as contiguous (M, C), without a copy where possible."""
    if x.ndim == 2:
        return np.asarray(x, order="C")
    if x.ndim > 2:
        x = np.moveaxis(x, 1, -1)
    return np.asarray(x, order="C").reshape(-1, x.shape[-1])
