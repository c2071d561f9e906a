"""Put cases to an implementation, and measure its answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from .case import EXPECTED, FORMATS, Answer, Array
from .case import VECTORS as VECTORS
from .case import Case as Case
from .case import read as read
from .mistakes import likely_cause
from .program import Program, ProgramError

# A port in Python is imported in this time. Frameworks need some of it.
IMPORT_SECONDS = 300


class PortError(Exception):
    """An implementation that gave no usable answer; names the case."""


@dataclass(frozen=True)
class Result:
    """Of one case: error of each quantity in ulp (inf where an infinity or NaN is wrong), and whether it holds."""

    case: Case
    errors: dict[str, float]
    holds: bool
    answer: Answer


def judge(case: Case, answer: Answer, plain: float, flushed: bool = False) -> Result:
    """Compare an answer with the expected values. Raises PortError.

    `plain` allows what a plain implementation loses (True), or so many times the tolerance; `flushed` twice the
    smallest normal number, which is lost where subnormal numbers are taken for 0: once in the result and in a term.
    """
    if case.refused:
        return Result(case, {}, answer is None or refuses(case, answer), answer)
    if answer is None:
        raise PortError(f"{case}: refused, but every index is a class")
    factor = float(case.words.get("plain", ["1"])[0]) if plain is True else max(1.0, plain)
    lost = 2 * FORMATS[case.dtype].smallest_normal * case.largest_factor if flushed else 0.0
    errors, holds = {}, True
    for quantity in case.asked:
        try:
            flat = asked_values(case, quantity, answer[quantity])
        except ValueError as error:
            raise PortError(f"{case}: {error}") from error
        flat = np.where(np.abs(flat) > FORMATS[case.dtype].largest, np.copysign(np.inf, flat), flat)
        wanted = case.values(quantity).astype(np.float64)
        tolerance = case.values(f"{quantity}-tolerance").astype(np.float64)
        finite = np.isfinite(wanted)
        with np.errstate(all="ignore"):
            same = (flat == wanted) | (np.isnan(flat) & np.isnan(wanted))
            off = np.where(same, 0.0, np.where(finite & np.isfinite(flat), np.abs(flat - wanted), np.inf))
            # Where terms cancel, an ulp is that of their sum, which the tolerance is 32 or more of.
            unit = np.maximum(FORMATS[case.dtype].ulp(wanted), np.where(finite, tolerance, 0.0) / 32)
            errors[quantity] = float(np.max(off / unit, initial=0.0))
            holds = holds and bool(np.all(off <= np.where(tolerance > 0, np.maximum(factor * tolerance, lost), 0)))
    return Result(case, errors, holds, answer)


def asked_values(case: Case, quantity: str, values: Any) -> Array:
    """Those values of an answer that are compared, in float64 and in C order. Raises ValueError."""
    got = np.asarray(values)
    if got.dtype.kind != "f":
        raise ValueError(f"{quantity} must be floating, got {got.dtype}")
    at = case.integers("at") if quantity == "gradient" and "at" in case.words else None
    shape = case.shape_of(quantity)
    if got.shape != shape and not (at is not None and got.shape == at.shape):
        raise ValueError(f"{quantity} must have shape {shape}, got {got.shape}")
    flat = got.astype(np.float64).reshape(-1)
    return flat if at is None or got.shape == at.shape else flat[at]


def refuses(case: Case, answer: dict[str, Array]) -> bool:
    """Whether the loss is NaN for the samples whose index is no class, and for no other."""
    loss = np.asarray(answer["loss"])
    return bool(np.all(np.isnan(loss) == (case.is_bad if loss.shape == case.samples else True)))


def explain(result: Result) -> str:
    """Inputs, expected and computed values of a case that fails, and the likely cause."""
    case, answer = result.case, result.answer
    lines = [f"FAILED {case}"]
    lines += [f"    {line[:200]}" for line in case.question.split("\n")[1:-1]]
    for quantity in () if case.refused else case.asked:
        assert answer is not None
        expected = case.values(quantity)
        lines += [f"    {quantity} expected {brief(expected)}", f"    {quantity} computed {brief(answer[quantity])}"]
        lines += [f"    {quantity} is off by {result.errors[quantity]:.3g} ulp"]
    if case.refused:
        lines += ["    expected an error, or NaN for the row whose index is out of range"]
    if cause := likely_cause(case, answer):
        lines += [f"    likely cause: {cause}"]
    return "\n".join(lines)


def brief(values: Array) -> str:
    return np.array2string(np.ravel(values), precision=9, threshold=12, edgeitems=4, max_line_width=160)


Implementation = Callable[[Case], Answer]


def run(implementation: Implementation, cases: list[Case], plain: float = False, flushed: bool = False) -> list[Result]:
    return [judge(case, implementation(case), plain, flushed) for case in cases]


def call(case: Case, function: Callable[..., Any], product: Callable[..., Any] | None = None) -> dict[str, Array]:
    """What FN(logits, target, **options) -> (loss, gradient), or `product` with a vector before the options, gives."""
    logits, target, options = case.logits, case.target, case.options
    if case.dtype == "f16":
        logits = logits.astype(np.float16)
    if case.grad_output is not None:
        options["grad_output"] = case.grad_output
    if case.level == "second":
        assert product is not None
        return {"product": np.asarray(product(logits, target, case.vector, **options))}
    loss, gradient = function(logits, target, **options)
    return {"loss": np.asarray(loss), "gradient": np.asarray(gradient)}


def python_port(function: Callable[..., Any]) -> Implementation:
    """An implementation of ours. A stranger's has a process of its own: see `answers_of`."""

    def answer(case: Case) -> Answer:
        try:
            return call(case, function)
        except Exception as error:
            if case.refused:
                return None
            raise PortError(f"{case}: {type(error).__name__}: {error}") from error

    return answer


def answers_of(port: str | list[str], cases: list[Case], seconds: float) -> Iterator[Answer]:
    """Answers to the cases, in their order, of a command, or of the functions in Python that a list names.

    Each answer, and the end after the last, may take so many seconds. Raises PortError.
    """
    text = ""
    for _, group in groupby(cases, lambda case: case.file):
        first, *others = group
        text += f"lace-vectors 1\ndtype {first.dtype}\nlevel {first.level}\ncount {1 + len(others)}\n"
        text += "".join(case.question + "\n" for case in (first, *others))
    # Four times the longest right answer, and what a framework may say when it is imported.
    most = 2**18 + 4 * sum(200 + 17 * case.values_of_answer(key) for case in cases for key in EXPECTED)
    command = port if isinstance(port, str) else [sys.executable, "-m", "lace_loss.ref.answer", *port]
    # A port in Python is looked for where this process would look.
    environment = None if command is port else os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with Program(command, text, most, environment) as program:
        if isinstance(port, list) and not next_block(program, IMPORT_SECONDS, port[0], "end of its import"):
            raise PortError(f"{port[0]}: its import ended the process")
        for case in cases:
            block = next_block(program, seconds, str(case), "answer")
            if block is None:
                raise PortError(f"{case}: no answer, and the program has ended")
            try:
                yield decoded(case, block)
            except ValueError as error:
                raise PortError(f"{case}: {error}") from error
        block = next_block(program, seconds, cases[-1].file, "end")
        if block is not None:
            raise PortError(f"{cases[-1].file}: an answer beyond the last case: {' '.join(block)[:60]!r}")


def next_block(program: Program, seconds: float, place: str, awaited: str) -> list[str] | None:
    """Lines of the next answer, or None after a good end."""
    try:
        return program.block(seconds)
    except TimeoutError as error:
        raise PortError(f"{place}: no {awaited} after {seconds:g} s") from error
    except ProgramError as error:
        raise PortError(f"{place}: {error}") from error


def decoded(case: Case, block: list[str]) -> Answer:
    """The answer that a program's lines are. Raises ValueError."""
    lines = [line.split() for line in block]
    if lines[:1] != [["case", str(case.number)]]:
        raise ValueError(f"the answer begins with {' '.join(block[:1])[:60]!r}, not 'case {case.number}'")
    if len(lines) == 2 and lines[1][0] == "error":
        if case.refused:
            return None
        raise ValueError(" ".join(lines[1][1:]) or "refused, but every index is a class")
    answer: dict[str, Array] = {}
    for key, *words in lines[1:]:
        if key not in EXPECTED or key in answer:
            rule = "stands twice" if key in answer else f"is none of {', '.join(EXPECTED)}"
            raise ValueError(f"the key {key[:40]!r} {rule}")
        if len(words) != (n := case.values_of_answer(key)):
            raise ValueError(f"{n} values expected for {key}, got {len(words)}")
        try:
            values = FORMATS[case.dtype].decode_answer(words)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        answer[key] = values if key == "gradient" and "at" in case.words else values.reshape(case.shape_of(key))
    if missing := [key for key in case.asked if key not in answer]:
        raise ValueError(f"no answer for the key {missing[0]!r}")
    return answer
