"""The loss as a plain implementation has it: right, and as exact as a working precision allows without compensation."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .case import Answer, Array, Case


class Plain:
    """Loss, gradient and product of a case in the precision of its logits, by the formulas of `loss.py`."""

    cause: ClassVar[str] = "the rounding of z - max is not put back into exp (a plain implementation)"

    def __init__(self, case: Case) -> None:
        logits, target, options = case.logits, case.target, case.options
        self.case, self.dtype = case, logits.dtype.type
        self.z = self.rows(logits)
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
            self.y = self.rows(target)

    def answer(self) -> Answer:
        with np.errstate(all="ignore"):
            self.softmax()
            self.k = (1 - self.s) + self.s * (self.r + np.where(self.q == 0, 0, self.q * self.n))
            a, case = self.coefficients(), self.case
            scale = (self.factors() / (self.divisor() if self.mean else 1))[:, None]
            self.summands = np.where(self.keeps(), self.losses(a), 0).astype(self.dtype)
            found = {"loss": self.summands.reshape(case.samples)}
            if case.shape_of("loss") == () and case.options["reduction"] != "none":
                found["loss"] = np.asarray(self.summands.sum() / (self.divisor() if self.mean else self.dtype(1)))
            rows = {"gradient": self.gradient(a * self.slope())}
            if case.level == "second":
                rows["product"] = self.product(a)
            found |= {k: self.like_logits(np.where(self.keeps()[:, None], v * scale, 0)) for k, v in rows.items()}
        return {key: np.asarray(value, self.dtype) for key, value in found.items()}

    def factors(self) -> Array:
        g = self.case.grad_output
        return np.ones(len(self.z)) if g is None else np.broadcast_to(g, self.case.samples).reshape(-1)

    def rows(self, values: Array) -> Array:
        """Values like the logits, as rows of classes."""
        axis = min(1, values.ndim - 1)
        return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])

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
        v = self.rows(self.case.vector)
        w = v - (self.q * v).sum(1, keepdims=True)
        dk = self.curvature() * w
        return self.q * w * (a * self.k).sum(1, keepdims=True) + self.gradient(a * dk)

    def curvature(self) -> Array:
        return self.s * np.where(self.q == 0, 0, self.q * (self.n - 2))

    def keeps(self) -> Array:
        return self.kept

    def divisor(self) -> Any:
        if not self.hard:
            return self.dtype(len(self.z))
        return np.where(self.kept, self.w[self.t], 0).sum()
