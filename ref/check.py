"""Put cases to an implementation, and measure its answers."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from .case import EXPECTED, FORMATS, Answer, Array, Case, Unsupported
from .program import Program, ProgramError

# A port in Python is imported in this time. Frameworks need some of it.
IMPORT_SECONDS = 300


class PortError(Exception):
    """An implementation that gave no usable answer; names the case."""


@dataclass(frozen=True)
class Result:
    """Of one case: error of each quantity in ulp (inf where an infinity or NaN is wrong), and whether it passes."""

    case: Case
    errors: dict[str, float]
    off: float  # in tolerances, the worst value
    off_if_flushed: float  # without those that are lost where subnormal numbers are taken for 0
    passes: bool
    answer: Answer | Unsupported

    def within(self, plain: float, flushed: bool = False) -> bool:
        """Whether it passes if `plain` allows what a plain implementation loses (True), or so many times the tolerance;
        and `flushed` twice the smallest normal number: once in the result and in a term.
        """
        factor = float(self.case.words.get("plain", ["1"])[0]) if plain is True else max(1.0, plain)
        return (self.off_if_flushed if flushed else self.off) <= factor


def judge(case: Case, answer: Answer | Unsupported, plain: float = False, flushed: bool = False) -> Result:
    """Compare an answer with the expected values. Raises PortError."""
    errors, off, off_if_flushed = {}, 0.0, 0.0
    if isinstance(answer, Unsupported):
        off = off_if_flushed = np.inf
    elif case.refused:
        off = off_if_flushed = 0.0 if answer is None or refuses(case, answer) else np.inf
    elif answer is None:
        raise PortError(f"{case}: refused, but every index is a class")
    else:
        for quantity in case.asked:
            try:
                errors[quantity], *offs = measured(case, quantity, answer[quantity])
            except ValueError as error:
                raise PortError(f"{case}: {error}") from error
            off, off_if_flushed = max(off, offs[0]), max(off_if_flushed, offs[1])
    result = Result(case, errors, off, off_if_flushed, False, answer)
    return replace(result, passes=result.within(plain, flushed))


def measured(case: Case, quantity: str, values: Any) -> tuple[float, float, float]:
    """Largest error in ulp and in tolerances; the latter also without what is lost where subnormal numbers are 0."""
    format = FORMATS[case.dtype]
    flat = case.compared(quantity, values)
    wanted, tolerance = (case.values(key).astype(np.float64) for key in (quantity, f"{quantity}-tolerance"))
    with np.errstate(all="ignore"):
        # What is rounded to infinity in the file's type is infinite in a wider type, too.
        flat = np.where(
            np.abs(flat) >= format.largest + format.ulp(np.array(format.largest)) / 2, np.copysign(np.inf, flat), flat
        )
        finite = np.isfinite(wanted)
        same = (flat == wanted) | (np.isnan(flat) & np.isnan(wanted))
        off = np.where(same, 0.0, np.where(finite & np.isfinite(flat), np.abs(flat - wanted), np.inf))
        # Where terms cancel, an ulp is that of their sum, which the tolerance is 32 or more of.
        unit = np.maximum(format.ulp(wanted), np.where(finite, tolerance, 0.0) / 32)
        in_tolerances = np.where(off == 0, 0.0, off / tolerance)
        lost = (off <= 2 * format.smallest_normal * case.largest_factor) & (tolerance > 0)
    off_if_flushed = np.where(lost, 0.0, in_tolerances)
    return largest(off / unit), largest(in_tolerances), largest(off_if_flushed)


def largest(values: Array) -> float:
    return float(np.max(values, initial=0.0))


def refuses(case: Case, answer: dict[str, Array]) -> bool:
    """Whether the loss is NaN for the samples whose index is no class, and for no other."""
    loss = np.asarray(answer["loss"])
    return bool(np.all(np.isnan(loss) == (case.is_bad if loss.shape == case.samples else True)))


Implementation = Callable[[Case], Answer | Unsupported]


def run(implementation: Implementation, cases: list[Case], plain: float = False, flushed: bool = False) -> list[Result]:
    return [judge(case, implementation(case), plain, flushed) for case in cases]


def call(case: Case, function: Callable[..., Any], product: Callable[..., Any] | None = None) -> dict[str, Array]:
    """What FN(logits, target, **options) -> (loss, gradient), or `product` with a vector before the options, gives."""
    logits, target, options = case.logits, case.target, case.options
    if case.dtype == "f16":
        logits = logits.astype(np.float16)
    if case.grad_output is not None:
        options["grad_output"] = case.grad_output
    options = taken(product if case.level == "second" else function, options, case)
    if case.level == "second":
        assert product is not None
        return {"product": np.asarray(product(logits, target, case.vector, **options))}
    loss, gradient = function(logits, target, **options)
    return {"loss": np.asarray(loss), "gradient": np.asarray(gradient)}


def taken(function: Callable[..., Any] | None, given: dict[str, Any], case: Case) -> dict[str, Any]:
    """Those options that a function has to be given. Raises Unsupported for one that it does not take.

    Without `reduction` it is given what its mean is right for: a mean, and one row without weights.
    """
    assert function is not None
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function in C may not say
        return given
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    missing = given.keys() - {parameter.name for parameter in parameters}
    if given["reduction"] == "mean" or (case.samples == () and "weight" not in given):
        missing = missing - {"reduction"}
    if missing:
        raise Unsupported(", ".join(sorted(missing)))
    return {key: value for key, value in given.items() if key in {parameter.name for parameter in parameters}}


def python_port(function: Callable[..., Any]) -> Implementation:
    """An implementation of ours. A stranger's has a process of its own: see `answers_of`."""

    def answer(case: Case) -> Answer | Unsupported:
        try:
            return call(case, function)
        except Unsupported as error:
            return error
        except Exception as error:
            if case.refused:
                return None
            raise PortError(f"{case}: {type(error).__name__}: {error}") from error

    return answer


def answers_of(port: str | list[str], cases: list[Case], seconds: float) -> Iterator[Answer | Unsupported]:
    """Answers to the cases, in their order, of a command, or of the functions in Python that a list names: the
    arguments of `answer.py`.

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
        if isinstance(port, list) and not next_block(program, IMPORT_SECONDS, port[-1], "end of its import"):
            raise PortError(f"{port[-1]}: its import ended the process")
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


def decoded(case: Case, block: list[str]) -> Answer | Unsupported:
    """The answer that a program's lines are. Raises ValueError."""
    lines = [line.split() for line in block]
    if lines[:1] != [["case", str(case.number)]]:
        raise ValueError(f"the answer begins with {' '.join(block[:1])[:60]!r}, not 'case {case.number}'")
    if len(lines) == 2 and lines[1][0] == "error":
        if case.refused:
            return None
        raise ValueError(" ".join(lines[1][1:]) or "refused, but every index is a class")
    if len(lines) == 2 and lines[1][0] == "unsupported":
        return Unsupported(" ".join(lines[1][1:]) or "what the case asks for")
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
