"""Up to which margin an implementation is right, and from which it has lost everything.

The margin is how far the target's logit lies above equal other logits. L is about exp(-2 margin).
"""

from __future__ import annotations

import numpy as np

from . import loss as definition
from .case import FORMATS, Array, Case
from .check import PortError, answers_of

# Beyond these L nears the smallest normal number.
MARGINS: dict[str, Array] = {"f32": np.arange(0.0, 42, 0.25).astype(np.float32), "f64": np.arange(0.0, 345, 0.25)}
RIGHT, LOST = 1e-3, 0.99  # relative errors: at most for right, at least for lost


def relative_error(got: Array, wanted: Array) -> float:
    """Largest difference relative to the largest finite value expected, absolute where that is 0; inf where only one
    of the two is infinite.

    >>> relative_error(np.array([1.0, 3.0]), np.array([1.5, 4.0]))
    0.25
    """
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    with np.errstate(all="ignore"):
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
        scale = np.max(np.abs(wanted), where=np.isfinite(wanted), initial=0.0)
        return float(np.max(np.where(same, 0.0, np.abs(got - wanted))) / (scale or 1.0))


def logits_at_margins(dtype: str, classes: int) -> Array:
    """Rows of logits, one for each of MARGINS, whose target is class 0."""
    logits = np.zeros((len(MARGINS[dtype]), classes), MARGINS[dtype].dtype)
    logits[:, 0] = MARGINS[dtype]
    return logits


def right_and_lost(dtype: str, logits: Array, answers: list[dict[str, Array]]) -> tuple[str, str]:
    """The margin up to which every value is right, or all or none; and that from which one is lost, or never.

    `answers` has loss, gradient or both, of each row of `logits_at_margins`.
    """
    margins, target = MARGINS[dtype], np.zeros(len(logits), np.int64)
    loss = np.atleast_1d(definition.forward(logits, target, reduction="none"))
    gradient = definition.backward(logits, target, reduction="sum")
    expected = [{"loss": x, "gradient": y} for x, y in zip(loss, gradient, strict=True)]
    pairs = zip(answers, expected, strict=True)
    errors = np.array([np.max([relative_error(got[key], wanted[key]) for key in got]) for got, wanted in pairs])
    wrong = np.flatnonzero(np.append(~(errors < RIGHT), True))[0]
    lost = np.flatnonzero(np.append(True, errors < LOST))[-1]
    right = "none" if wrong == 0 else "all" if wrong == len(errors) else f"{margins[wrong - 1]:g}"
    return right, "never" if lost == len(errors) else f"{margins[lost]:g}"


def margins_of(port: str | list[str], dtype: str, level: str, seconds: float) -> str:
    """The sentence on a port's margins; `port` and `seconds` are `answers_of`'s, `level` is core or gradient."""
    logits = logits_at_margins(dtype, 10)
    zeros = ["0" * FORMATS[dtype].digits] * 9
    cases = []
    for number, margin in enumerate(logits[:, 0], 1):
        pattern = margin.tobytes()[::-1].hex() if np.little_endian else margin.tobytes().hex()
        words = {
            "case": [str(number), f"margin-{margin:g}"],
            "category": ["q-to-1"],
            "shape": ["10"],
            "logits": [pattern, *zeros],
            "target": ["0"],
            "reduction": ["none"],
            "end": [],
        }
        question = "\n".join(" ".join([key, *values]) for key, values in words.items())
        cases.append(Case(f"{dtype}-margins", dtype, level, number, words["case"][1], words, question))
    answers = []
    try:
        for answer in answers_of(port, cases, seconds):
            if not isinstance(answer, dict):
                return f"{dtype}: margins not measured, they are refused"
            answers.append(answer)
    except PortError as error:
        return f"{dtype}: margins not measured: {error}"
    right, lost = right_and_lost(dtype, logits, [{key: answer[key] for key in cases[0].asked} for answer in answers])
    up_to = {"all": "right at every margin", "none": "right at no margin"}.get(right, f"right up to margin {right}")
    return f"{dtype}: {up_to}, {'never lost' if lost == 'never' else f'lost from {lost}'}"
