"""The mistakes that implementations of the loss make, as code: each errs in one place of `Plain`, which is right.

They name the likely cause of wrong answers, and the tests prove with them that the golden vectors find each one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .case import FORMATS, Answer, Array, Case
from .plain import Plain


class Subtracted(Plain):
    cause = "1 - q formed by subtraction from a log-softmax: (1 - exp(-ce)) * ce"

    def softmax(self) -> None:
        e = self.exponentials()
        self.n = self.rounded_once(np.log, self.total(e)) - self.d
        self.q = self.rounded_once(np.exp, -self.n)
        self.r = 1 - self.q

    def exponentials(self) -> Array:
        self.d = self.z - self.z.max(1, keepdims=True)
        return self.rounded_once(np.exp, self.d)

    def rounded_once(self, function: Any, values: Array) -> Array:
        """As most libraries have it: what is left of 1 - q is their last digit."""
        found: Array = function(values.astype(np.longdouble)).astype(self.dtype)
        return found


class OfSoftmax(Subtracted):
    cause = "1 - q and log q of a plain softmax: (1 - q) * -log(q)"

    def softmax(self) -> None:
        e = self.exponentials()
        self.q = e / self.total(e)
        self.n = -self.rounded_once(np.log, self.q)
        self.r = 1 - self.q


class Expm1(Subtracted):
    cause = "-expm1(log q) of a plain log-softmax, which has rounded log q already"

    def softmax(self) -> None:
        super().softmax()
        self.r = -self.rounded_once(np.expm1, -self.n)


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

    def slope(self) -> Array:
        return (1 - self.s) + self.s * self.r * (self.r + 2 * np.where(self.q == 0, 0, self.q * self.n))


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

    def curvature(self) -> Array:
        return -super().curvature()


class NoStrength(Plain):
    cause = "strength ignored"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.s = self.dtype(1)


class CrossEntropy(Plain):
    cause = "the factor 1 - q is missing: this is cross entropy, or strength 0"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.s = self.dtype(0)


class SlopeOfCrossEntropy(Plain):
    cause = "the gradient is that of cross entropy, K = 1"

    def slope(self) -> Array:
        return np.ones_like(self.k)


class OtherSign(Plain):
    cause = "the gradient has the other sign"

    def gradient(self, ak: Array) -> Array:
        return -super().gradient(ak)


class GradientOfSum(Plain):
    cause = "the gradient of a mean is not divided as the loss is"

    def gradient(self, ak: Array) -> Array:
        return super().gradient(ak) * (self.divisor() if self.mean else 1)


class ClassesLast(Plain):
    cause = "logits (N, C, d1, ...) reshaped to rows of C without moving the classes' axis last"

    def rows(self, values: Array) -> Array:
        return values.reshape(-1, self.case.classes)

    def like_logits(self, rows: Array) -> Array:
        return rows.reshape(self.case.shape)


class SmoothedOthers(Plain):
    cause = "label smoothing over the C - 1 other classes"

    def coefficients(self) -> Array:
        others = self.e / max(1, self.z.shape[1] - 1)
        return ((1 - self.e) * self.y + others * (1 - self.y)) * self.w


class SmoothedUnweighted(Plain):
    cause = "label smoothing without the class weights"

    def coefficients(self) -> Array:
        return (1 - self.e) * self.y * self.w + self.e / self.z.shape[1]


class SmoothedByTarget(Plain):
    cause = "label smoothing weighted by the target's weight instead of each class's"

    def coefficients(self) -> Array:
        return ((1 - self.e) * self.y + self.e / self.z.shape[1]) * (self.y * self.w).sum(1, keepdims=True)


class SmoothedIgnored(Plain):
    cause = "ignored samples keep the part of label smoothing"

    def coefficients(self) -> Array:
        return np.where(self.kept[:, None], super().coefficients(), self.e / self.z.shape[1] * self.w)

    def keeps(self) -> Array:
        return self.kept | (self.e > 0)


class NotSmoothed(Plain):
    cause = "label_smoothing ignored"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.e = self.dtype(0)


class Log2(Plain):
    cause = "the logarithm to base 2"

    def coefficients(self) -> Array:
        return super().coefficients() / self.dtype(np.log(2))


class ClippedFinely(Plain):
    cause = "probabilities clipped to 1e-15 .. 1 - 1e-15"

    def softmax(self) -> None:
        super().softmax()
        self.q = np.clip(self.q.astype(np.float64), 1e-15, 1 - 1e-15)
        self.r, self.n = 1 - self.q, -np.log(self.q)


class ClippedBelow(Plain):
    cause = "1e-8 added to q before its logarithm"

    def softmax(self) -> None:
        super().softmax()
        self.n = -np.log(self.q + self.dtype(1e-8))


class BytesSwapped(Plain):
    cause = "the bytes of the values swapped"

    def answer(self) -> Answer:
        return {key: value.byteswap() for key, value in (super().answer() or {}).items()}


class NoGradOutput(Plain):
    cause = "grad_output ignored"

    def factors(self) -> Array:
        return np.ones(len(self.z))


class SumForMean(Plain):
    cause = "the sum in place of the mean"

    def divisor(self) -> Any:
        return self.dtype(1)


class MeanForSum(Plain):
    cause = "the mean in place of the sum"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.mean = case.options["reduction"] != "none"


class MeanOfMeans(Plain):
    cause = "the mean of the means of the batch's halves"

    @np.errstate(all="ignore")
    def answer(self) -> Answer:
        found, half = super().answer() or {}, len(self.z) // 2
        if self.mean and half:
            size = self.w[self.t] * self.kept if self.hard else np.ones(len(self.z))
            parts = slice(None, half), slice(half, None)
            sums = [self.summands[part].sum() / size[part].sum() for part in parts]
            found["loss"] = np.asarray(np.mean(sums), self.dtype)
            scale = np.concatenate([np.full(len(size[part]), size.sum() / size[part].sum() / 2) for part in parts])
            for key in found.keys() - {"loss"}:
                rows = self.rows(found[key]) * scale[:, None]
                found[key] = self.like_logits(np.where(self.keeps()[:, None], rows, 0)).astype(self.dtype)
        return found


class Argmax(Plain):
    cause = "the largest of the probability targets taken for a class"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if not self.hard:
            self.y = (np.arange(self.y.shape[1]) == self.y.argmax(1)[:, None]).astype(self.dtype)


class NoWeight(Plain):
    cause = "weight ignored"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.w = np.ones_like(self.w)


class IgnoresDefaultOnly(Plain):
    cause = "ignore_index other than -100 not looked at"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if self.hard:
            index = case.target.reshape(-1)
            self.kept, self.t = index != -100, np.where((index >= 0) & (index < case.classes), index, 0)
            self.y = (np.arange(case.classes) == self.t[:, None]).astype(self.dtype)


class Quartered(Plain):
    cause = "alpha = 0.25, as focal losses for detection have it"

    def coefficients(self) -> Array:
        return super().coefficients() / 4


class Twice(Plain):
    cause = "softmax taken twice: what should be logits went through it already"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        with np.errstate(all="ignore"):
            q = np.exp(self.z - self.z.max(1, keepdims=True))
            self.first = self.z = q / q.sum(1, keepdims=True)

    def gradient(self, ak: Array) -> Array:
        found = super().gradient(ak)
        return self.first * (found - (self.first * found).sum(1, keepdims=True))


# First those that know one option only: a general one would explain their cases, too.
MISTAKES = [
    Plain, Subtracted, OfSoftmax, Expm1, NotShifted, MinusOne, HalfSums, Flushed, FiniteOnly, Clipped, ClippedFinely,
    ClippedBelow, WeightInside, SmoothedInside, SmoothedOthers, SmoothedUnweighted, SmoothedByTarget, SmoothedIgnored,
    NotSmoothed, MeanOfCount, MeanOfWeights, IgnoredCounted, IgnoredMultiplied, IgnoresDefaultOnly, GradientOfSum,
    SumForMean, MeanForSum, MeanOfMeans, NoWeight, NoGradOutput, Argmax, NoStrength, ClassesLast, ConstantFactor,
    SlopeOfCrossEntropy, OtherSign, Squared, CrossEntropy, Quartered, Log2, Twice, NotMasked, BytesSwapped, WrongBend,
]  # fmt: skip


def explains(mistake: type[Plain], case: Case, answer: dict[str, Array]) -> bool:
    """Whether the mistake gives this wrong answer, to a hundredth of how wrong it is."""
    made = mistake(case).answer()
    assert made is not None
    mantissa = FORMATS[case.dtype].mantissa
    rounding = max(2.0**-mantissa, 2.0**-17 if mantissa < 52 else 2.0**-46)  # those of 64 ulp, or of a half type
    return all(
        resembles(case.compared(key, answer[key]), case.compared(key, made[key]), case.values(key), rounding)
        for key in case.asked
    )


def resembles(got: Array, made: Array, wanted: Array, rounding: float) -> bool:
    """Whether `got` and `made` are wrong alike; where nothing is wrong in `got`, `made` has to be right too.

    A NaN is explained by a NaN alone.
    """
    wanted = wanted.astype(np.float64)
    with np.errstate(all="ignore"):
        same = (got == made) | (np.isnan(got) & np.isnan(made))
        slack = 0.01 * np.abs(got - wanted) + rounding * np.abs(wanted)
        return bool(np.all(same | (np.abs(got - made) <= slack)))
