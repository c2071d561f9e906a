"""The mistakes that implementations of the loss make, as code.

They name the likely cause of a wrong answer, and the tests prove with them that the golden vectors find each one.

`Plain` is right, and as exact as a working precision without compensation allows. Each subclass errs in one place.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .case import Answer, Array, Case


class Plain:
    """Loss, gradient and product of a case in the precision of its logits, by the formulas of `loss.py`."""

    cause: ClassVar[str] = "the rounding of z - max is not put back into exp (a plain implementation: see --plain)"

    def __init__(self, case: Case) -> None:
        logits, target, options = case.logits, case.target, case.options
        self.case, self.dtype = case, logits.dtype.type
        axis = min(1, logits.ndim - 1)
        self.z = np.moveaxis(logits, axis, -1).reshape(-1, logits.shape[axis])
        self.s = self.dtype(options.get("strength", 1.0))
        self.e = self.dtype(options.get("label_smoothing", 0.0))
        self.mean = options["reduction"] == "mean"
        c = self.z.shape[1]
        self.w = np.asarray(options.get("weight", np.ones(c, self.dtype)))
        self.hard = target.shape != logits.shape
        if self.hard:
            ignored = target.reshape(-1) == options.get("ignore_index", -100)
            self.kept, self.t = ~ignored, np.where(ignored, 0, target.reshape(-1))
            self.y = (np.arange(c) == self.t[:, None]).astype(self.dtype)
        else:
            self.kept = np.ones(len(self.z), bool)
            self.y = np.moveaxis(target, axis, -1).reshape(-1, c)

    def answer(self) -> Answer:
        with np.errstate(all="ignore"):
            self.softmax()
            self.k = (1 - self.s) + self.s * (self.r + np.where(self.q == 0, 0, self.q * self.n))
            a, case = self.coefficients(), self.case
            scale = (
                np.ones(len(self.z)) if case.grad_output is None else np.broadcast_to(case.grad_output, case.samples)
            )
            scale = (scale.reshape(-1) / (self.divisor() if self.mean else 1))[:, None]
            losses = np.where(self.keeps(), self.losses(a), 0).astype(self.dtype)
            found = {"loss": losses.reshape(case.samples)}
            if case.shape_of("loss") == () and case.options["reduction"] != "none":
                found["loss"] = np.asarray(losses.sum() / (self.divisor() if self.mean else self.dtype(1)))
            rows = {"gradient": self.gradient(a * self.slope())}
            if case.level == "second":
                rows["product"] = self.product(a)
            found |= {k: self.like_logits(np.where(self.keeps()[:, None], v * scale, 0)) for k, v in rows.items()}
        return {key: np.asarray(value, self.dtype) for key, value in found.items()}

    def like_logits(self, rows: Array) -> Array:
        shape = (*self.case.samples, self.z.shape[1])
        return np.moveaxis(rows.reshape(shape), -1, min(1, len(shape) - 1))

    def exponentials(self) -> Array:
        self.d = self.z - self.z.max(1, keepdims=True)
        return np.exp(self.d)

    def softmax(self) -> None:
        e, top = self.exponentials(), self.z.argmax(1)[:, None]
        is_top = np.arange(e.shape[1]) == top
        others = self.total(np.where(is_top, 0, e))
        self.q = e / (1 + others)
        self.r = np.where(is_top, others / (1 + others), 1 - self.q)
        self.n = np.log1p(others) - self.d

    def total(self, terms: Array) -> Array:
        found: Array = terms.sum(1, keepdims=True)
        return found

    def coefficients(self) -> Array:
        one_hot = np.where(self.y > 0, self.w, 0) if self.hard else self.y * self.w
        return (1 - self.e) * one_hot + (self.e / self.z.shape[1] * self.w if self.e else 0)

    def losses(self, a: Array) -> Array:
        f = self.f()
        found: Array = np.where((a == 0) & np.isinf(f), 0, a * f).sum(1)
        return found

    def f(self) -> Array:
        return ((1 - self.s) + self.s * self.r) * self.n

    def slope(self) -> Array:
        return self.k

    def gradient(self, ak: Array) -> Array:
        most = np.abs(ak).argmax(1)[:, None] == np.arange(ak.shape[1])
        others = np.where(most, np.where(most, 0, ak).sum(1, keepdims=True), ak.sum(1, keepdims=True) - ak)
        return self.q * others - self.r * ak

    def product(self, a: Array) -> Array:
        v = np.moveaxis(self.case.vector, min(1, self.case.vector.ndim - 1), -1).reshape(self.z.shape)
        w = v - (self.q * v).sum(1, keepdims=True)
        dk = self.bend() * w
        return self.q * w * (a * self.k).sum(1, keepdims=True) + self.gradient(a * dk)

    def bend(self) -> Array:
        return self.s * np.where(self.q == 0, 0, self.q * (self.n - 2))

    def keeps(self) -> Array:
        return self.kept

    def divisor(self) -> Any:
        if not self.hard:
            return self.dtype(len(self.z))
        return np.where(self.kept, self.w[self.t], 0).sum()


class Subtracted(Plain):
    cause = "1 - q formed by subtraction from a log-softmax: (1 - exp(-ce)) * ce"

    def softmax(self) -> None:
        e = self.exponentials()
        self.n = np.log(self.total(e)) - self.d
        self.q = np.exp(-self.n)
        self.r = 1 - self.q


class Expm1(Subtracted):
    cause = "-expm1(log q) of a plain log-softmax, which has rounded log q already"

    def softmax(self) -> None:
        super().softmax()
        self.r = -np.expm1(-self.n)


class NotShifted(Plain):
    cause = "the largest logit is not subtracted before exp"

    def softmax(self) -> None:
        e = np.exp(self.z)
        others = e.sum(1, keepdims=True) - e
        self.q, self.r = e / self.total(e), others / self.total(e)
        self.n = np.log1p(others / e)


class MinusOne(Plain):
    cause = "the gradient at the target formed as q - 1"

    def gradient(self, ak: Array) -> Array:
        return self.q * ak.sum(1, keepdims=True) - ak


class HalfSums(Plain):
    cause = "sums of exponentials kept in float16"

    def total(self, terms: Array) -> Array:
        return terms.astype(np.float16).sum(1, keepdims=True, dtype=np.float16).astype(self.dtype)


class Flushed(Plain):
    cause = "subnormal numbers flushed to 0, as fast-math does"

    def answer(self) -> Answer:
        found, tiny = super().answer(), np.finfo(self.dtype).tiny
        return {
            key: np.where(np.abs(value) < tiny, 0, value).astype(self.dtype) for key, value in (found or {}).items()
        }


class FiniteOnly(Plain):
    cause = "infinities and NaN taken for large numbers, as fast-math may do"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        largest = np.finfo(self.dtype).max / 8
        self.z = np.nan_to_num(self.z, nan=0.0, posinf=largest, neginf=-largest)


class Clipped(Plain):
    cause = "probabilities clipped to 1e-7 .. 1 - 1e-7"

    def softmax(self) -> None:
        super().softmax()
        self.q = np.clip(self.q, self.dtype(1e-7), self.dtype(1 - 1e-7))
        self.r, self.n = 1 - self.q, -np.log(self.q)


class WeightInside(Plain):
    cause = "the class weight inside the focal factor: (1 - exp(-w ce)) w ce"

    def f(self) -> Array:
        return -np.expm1(-self.w * self.n) * self.n


class SmoothedInside(Plain):
    cause = "label smoothing inside the focal factor: ce smoothed first, then (1 - exp(-ce)) ce"

    def losses(self, a: Array) -> Array:
        ce = (a * self.n).sum(1)
        return ((1 - self.s) - self.s * np.expm1(-ce)) * ce


class MeanOfCount(Plain):
    cause = "the mean divided by the number of samples instead of their weights"

    def divisor(self) -> Any:
        return self.dtype(self.kept.sum())


class MeanOfWeights(Plain):
    cause = "the mean over probability targets divided by their weights instead of the number of samples"

    def divisor(self) -> Any:
        return super().divisor() if self.hard else (self.y * self.w).sum()


class IgnoredCounted(Plain):
    cause = "ignored samples counted in the mean's divisor"

    def divisor(self) -> Any:
        return self.w[self.t].sum() if self.hard else super().divisor()


class IgnoredMultiplied(Plain):
    cause = "ignored samples multiplied by 0 instead of replaced, which keeps NaN"

    def keeps(self) -> Array:
        return np.ones(len(self.z), bool)

    def coefficients(self) -> Array:
        return super().coefficients() * self.kept[:, None]


class ConstantFactor(Plain):
    cause = "the factor 1 - q treated as a constant in the gradient"

    def slope(self) -> Array:
        return (1 - self.s) + self.s * self.r


class Squared(Plain):
    cause = "gamma = 2 instead of 1: (1 - q)^2"

    def f(self) -> Array:
        return ((1 - self.s) + self.s * self.r**2) * self.n


class NotMasked(Plain):
    cause = "0 times infinity for a logit of -inf"

    def answer(self) -> Answer:
        found = super().answer() or {}
        with np.errstate(all="ignore"):
            rows = np.isnan(self.q * self.n).any(1)[:, None] | np.zeros(self.z.shape, bool)
        found["gradient"] = np.where(self.like_logits(rows), np.nan, found["gradient"]).astype(self.dtype)
        return found


class WrongBend(Plain):
    cause = "the sign of the second term of the Hessian"

    def bend(self) -> Array:
        return -super().bend()


class NoStrength(Plain):
    cause = "strength ignored"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.s = self.dtype(1)


MISTAKES = [
    Plain, Subtracted, Expm1, NotShifted, MinusOne, HalfSums, Flushed, FiniteOnly, Clipped, WeightInside,
    SmoothedInside, MeanOfCount, MeanOfWeights, IgnoredCounted, IgnoredMultiplied, ConstantFactor, Squared, NotMasked,
    WrongBend, NoStrength,
]  # fmt: skip


def likely_cause(case: Case, answer: Answer) -> str | None:
    """Of the first mistake that gives this wrong answer, to a hundredth of how wrong it is."""
    if case.refused or answer is None:
        return "the range of class indices is not checked" if case.refused else None
    if "at" in case.words:
        return None
    for mistake in MISTAKES:
        made = mistake(case).answer()
        assert made is not None
        if all(resembles(answer[key], made[key], case.values(key)) for key in case.asked):
            return mistake.cause
    return None


def resembles(got: Array, made: Array, wanted: Array) -> bool:
    """Whether `got` and `made` are wrong alike; where nothing is wrong in `got`, `made` has to be right too."""
    got, made, wanted = (np.asarray(x, np.float64).reshape(-1) for x in (got, made, wanted))
    with np.errstate(all="ignore"):
        same = (got == made) | (np.isnan(got) & np.isnan(made))
        slack = 0.01 * np.abs(got - wanted) + 1e-6 * np.abs(wanted)
        return bool(np.all(same | (np.abs(got - made) <= slack)))
