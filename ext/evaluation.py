"""Figures of a classifier, of logits that come at once, block by block, or in several processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .arrays import Array, Options, as_array, as_fraction, as_ignore_index, as_logits, call_kernel

# What is evaluated at a time: in float32 4 MiB, which stay in a cache between being read or converted and being used.
_LOGITS_IN_A_BLOCK = 1 << 20

_BINS = 15  # of the calibration error

# Places of the sums of a Tally, before those of the bins' confidences.
_LOSS, _CROSS_ENTROPY, _WEIGHT, _CONFIDENCE = range(4)

_ONE = 1 << 1126  # 1 in the units of a Tally's sums, the last digit of the smallest float64 with all 53


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
    z, y = as_array("logits", logits), as_array("target", target)
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
    """`evaluate`, of logits and targets that come block by block: its arguments, errors and result.

    Tallies with the same options add up, in whatever processes they were made, as they can be pickled:

        def of_part(path):                                   # in a worker: what is sent back is small
            tally = Tally()
            tally.add(np.load(path / "logits.npy"), np.load(path / "target.npy"))
            return tally

        functools.reduce(operator.add, map(of_part, paths)).figures()

    Counts are integers and sums are exact: neither the order nor the size of the blocks changes a bit of the figures.
    """

    def __init__(
        self,
        topk: Iterable[int] = (1, 5),
        *,
        weight: ArrayLike | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        strength: float = 1.0,
    ) -> None:
        try:
            self.hits = {index(k): 0 for k in topk}
        except TypeError:
            raise TypeError(f"topk must hold whole numbers, as (1, 5) does, got {topk!r}") from None
        if min(self.hits, default=1) < 1:
            raise ValueError(f"topk must hold numbers from 1, got {min(self.hits)}")
        self.options: Options = {
            "weight": None if weight is None else np.array(as_array("weight", weight)),
            "ignore_index": as_ignore_index(ignore_index),
            "reduction": "none",
            "label_smoothing": as_fraction("label_smoothing", label_smoothing),
            "strength": as_fraction("strength", strength),
        }
        self.rows = self.count = 0
        self.bins = np.zeros((2, _BINS), np.int64)  # in each, the samples and how many of them are right
        self.sums = np.zeros(_CONFIDENCE + _BINS, object)  # integers, in units of 1 / _ONE
        self.infinite = np.zeros(len(self.sums))  # the sums of what is infinite or NaN

    def add(self, logits: Array, target: Array) -> None:
        """The next (N, C) or (N, C, d1, ...) logits and their classes."""
        if logits.dtype.kind != "f" or logits.dtype.itemsize > 8:
            raise TypeError(f"logits must be float16, float32 or float64, got {logits.dtype}")
        if target.dtype.kind not in "iu":
            raise TypeError(f"target must hold integers (classes), got {target.dtype}")
        if logits.ndim < 2 or logits.shape[1] == 0:
            raise ValueError(f"logits must be (N, C) or (N, C, d1, ...) with C >= 1, got shape {logits.shape}")
        # Its bytes in this machine's order, whatever a file has.
        z = as_logits(np.asarray(logits, np.float64 if logits.dtype.itemsize == 8 else np.float32))
        losses, ce, confidence, rank = _loss_and_statistics(z, target, self.rows, self.options)
        if np.isnan(ce).any():
            n, *place = np.argwhere(np.isnan(ce).reshape(target.shape))[0].tolist()
            values = z[(n, slice(None), *place)]
            what = "NaN" if np.isnan(values).any() else "+inf" if np.inf in values else "-inf only"
            place = ", ".join(map(str, [self.rows + n, *([":", *place] if place else [])]))
            raise ValueError(f"logits[{place}] holds {what}")
        classes = target.reshape(-1)
        kept = classes != self.options["ignore_index"]
        losses, ce, confidence = (values[kept].astype(np.float64) for values in (losses, ce, confidence))
        rank = rank[kept]
        # Bounded as an integer, whatever it is: bincount writes outside of its memory for a large one.
        bins = np.clip(np.ceil(confidence * _BINS).astype(np.intp) - 1, 0, _BINS - 1)
        terms = [(losses, _LOSS), (ce, _CROSS_ENTROPY), (confidence, _CONFIDENCE + bins)]
        if self.options["weight"] is not None:
            weights = np.asarray(self.options["weight"], z.dtype)[classes[kept]]
            terms.append((weights.astype(np.float64), _WEIGHT))
        for values, place in terms:
            _add_exactly(self.sums, self.infinite, values, place)
        self.rows += len(target)
        self.count += len(ce)
        for k in self.hits:
            self.hits[k] += int(np.count_nonzero(rank < k))
        self.bins += [np.bincount(bins[some], minlength=_BINS) for some in (slice(None), rank == 0)]

    def __add__(self, other: Tally) -> Tally:
        """The tally of both's samples. Raises ValueError for other options."""
        if not isinstance(other, Tally):
            return NotImplemented
        ours, theirs = (dict[str, Any](topk=sorted(tally.hits), **tally.options) for tally in (self, other))
        for name, value in ours.items():
            if not np.array_equal(value, theirs[name], equal_nan=isinstance(value, np.ndarray)):
                raise ValueError(f"tallies of different options cannot be added: {name} {value} and {theirs[name]}")
        both = copy(self)
        both.rows, both.count = self.rows + other.rows, self.count + other.count
        both.hits = {k: hits + other.hits[k] for k, hits in self.hits.items()}
        both.bins, both.sums = self.bins + other.bins, self.sums + other.sums
        both.infinite = self.infinite + other.infinite
        return both

    def figures(self) -> Evaluation:
        n, (count, right), confidence = self.count, self.bins.tolist(), self.sums[_CONFIDENCE:]
        weights = n * _ONE if self.options["weight"] is None else self.sums[_WEIGHT]
        return Evaluation(
            _quotient(self.sums[_LOSS], weights, self.infinite[_LOSS], self.infinite[_WEIGHT]),
            _quotient(self.sums[_CROSS_ENTROPY], n * _ONE, self.infinite[_CROSS_ENTROPY]),
            {k: _quotient(hits, n) for k, hits in self.hits.items()},
            _quotient(sum(abs(r * _ONE - c) for r, c in zip(right, confidence, strict=True)), n * _ONE),
            {
                "count": [float(m) for m in count],
                "confidence": [c / (max(1, m) * _ONE) for c, m in zip(confidence, count, strict=True)],
                "accuracy": [r / max(1, m) for r, m in zip(right, count, strict=True)],
            },
            n,
        )


def _loss_and_statistics(
    z: Array, target: Array, row_offset: int, options: Options
) -> tuple[Array, Array, Array, Array]:
    """Loss, cross entropy, confidence and rank of each sample."""
    n = target.size
    ce, confidence, rank = np.empty(n, z.dtype), np.empty(n, z.dtype), np.empty(n, np.int64)
    losses = call_kernel(z, target, None, 1.0, None, (ce, None, rank, confidence), row_offset, **options)
    return losses.reshape(-1), ce, confidence, rank


def _add_exactly(sums: Array, infinite: Array, values: Array, place: Array | int) -> None:
    """Add float64 values to the sums at their places, in units of 1 / _ONE; to `infinite` what is no finite number.

    A value is an integer of 53 bits times a power of two. Those with the same power are added as integers of 64 bits,
    in two halves: the sums stay exact for up to 2^36 values.
    """
    if not (finite := np.isfinite(values)).all():
        place = np.broadcast_to(place, values.shape)
        infinite += np.bincount(place[~finite], values[~finite], len(sums))
        values, place = values[finite], place[finite]
    mantissa, exponent = np.frexp(values)
    digits, least = (mantissa * 2.0**53).astype(np.int64), exponent.min(initial=0)
    power = (exponent - least) * len(sums) + place
    for half, shift in ((digits >> 26, 26), (digits & (1 << 26) - 1, 0)):
        of_powers = np.zeros((power.max(initial=0) // len(sums) + 1) * len(sums), np.int64)
        np.add.at(of_powers, power, half)
        for i in np.flatnonzero(of_powers).tolist():
            sums[i % len(sums)] += int(of_powers[i]) << 1073 + int(least) + i // len(sums) + shift


def _quotient(a: int, b: int, infinite_a: float = 0.0, infinite_b: float = 0.0) -> float:
    """a / b, rounded once; where something is infinite, NaN or divided by 0, as floats do it."""
    if infinite_a or infinite_b or b == 0:
        with np.errstate(all="ignore"):
            return float(np.float64(infinite_a or np.sign(a)) / (infinite_b or np.sign(b)))
    try:
        return a / b
    except OverflowError:
        return math.inf * (1 if a > 0 < b or a < 0 > b else -1)
