"""What the results of a check say together: a grade, the failing categories and the likely cause."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from textwrap import fill

import numpy as np

from .case import EXPECTED, Array, Case, Unsupported
from .check import Result, judge
from .mistakes import MISTAKES, explains
from .plain import Plain

# What is allowed, from the least: see `Result.within`.
GRADES = {
    "exact": (False, False),
    "plain": (True, False),
    "exact, flushed": (False, True),
    "plain, flushed": (True, True),
}
UNCHECKED = "the range of class indices is not checked"


def grade(results: list[Result]) -> str | None:
    """The first of GRADES that all results have."""
    for name, allowed in GRADES.items():
        if all(result.within(*allowed) for result in results):
            return name
    return None


def unsupported(results: list[Result]) -> list[Result]:
    return [result for result in results if isinstance(result.answer, Unsupported)]


def lines_of(name: str, results: list[Result]) -> list[str]:
    """The verdict on some cases, the categories that keep it from a better one, and what is not supported."""
    missing = unsupported(results)
    judged = [result for result in results if not isinstance(result.answer, Unsupported)]
    found = grade(judged)
    words = "wrong" if found is None else "not whole" if missing else found
    lines = [f"{name:<18} {len(results):>4} cases  {words:<15} worst ulp {worst(judged)}"]
    wrong = [result for result in judged if not result.within(True)]
    some = wrong or [result for result in judged if not result.within(False)]
    if some:
        counts = Counter(result.case.category for result in some).most_common()
        what = "wrong" if wrong else "not exact"
        lines.append(indented(f"{len(some)} {what}: {', '.join(f'{key} {n}' for key, n in counts)}"))
    if missing:
        counts = Counter(word for result in missing for word in str(result.answer).split(", ")).most_common()
        lines.append(indented(f"not supported: {', '.join(f'{key} ({n} cases)' for key, n in counts)}"))
    return lines


def indented(text: str) -> str:
    return fill(text, 80, initial_indent="    ", subsequent_indent="        ", break_on_hyphens=False)


def worst(results: list[Result]) -> str:
    """Largest error in ulp of loss, gradient and product."""
    errors = [max((r.errors[q] for r in results if q in r.errors), default=None) for q in EXPECTED]
    return " / ".join("-" if error is None else f"{error:.2g}" for error in errors)


@dataclass(frozen=True)
class Cause:
    """A mistake that explains so many of the wrong results, and the one that shows it best."""

    sentence: str
    votes: int
    wrong: int
    shown: Result


def causes(results: list[Result]) -> list[Cause]:
    """The likely causes of what is not exact: that of bad indices, and the one that explains the other values."""
    judged = [result for result in results if not isinstance(result.answer, Unsupported)]
    accepted = [result for result in judged if result.case.refused and not result.within(False)]
    found = [Cause(UNCHECKED, len(accepted), len(accepted), accepted[0])] if accepted else []
    values = [result for result in judged if not result.case.refused]
    wrong = [result for result in values if not result.within(True)]
    if wrong:
        right = [result for result in values if result.within(True)]
        # Where several mistakes meet, that in the formula is what one row shows, or one row of ordinary numbers.
        for of in (is_any, is_alone, is_ordinary):
            if named := by_vote([r for r in wrong if of(r.case)], [r for r in right if of(r.case)]):
                return found + named
        return found
    inexact = [result for result in values if not result.within(False)]
    if inexact:
        shown = max(inexact, key=lambda result: result.off)
        found.append(Cause(Plain.cause, len(inexact), len(inexact), shown))
    return found


def is_any(case: Case) -> bool:
    return True


def is_alone(case: Case) -> bool:
    return len(case.shape) == 1


def is_ordinary(case: Case) -> bool:
    return is_alone(case) and case.category == "nominal"


def by_vote(wrong: list[Result], right: list[Result]) -> list[Cause]:
    """The mistake that explains most of what is wrong, more than half of it, and hardly anything of it where it is
    right; none if there is none.
    """
    if not wrong:
        return []
    votes: dict[type[Plain], list[Result]] = {mistake: [] for mistake in MISTAKES if mistake is not Plain}
    for place, result in enumerate(wrong):
        for mistake in list(votes):
            assert isinstance(result.answer, dict)
            if explains(mistake, result.case, result.answer):
                votes[mistake].append(result)
            elif len(votes[mistake]) + len(wrong) - place - 1 <= len(wrong) / 2:
                del votes[mistake]
    best: tuple[float, type[Plain]] | None = None
    for mistake, explained in votes.items():
        others = [r for r in right if not judge(r.case, mistake(r.case).answer(), plain=True).holds]
        score = len(explained) - len(others)
        if len(others) <= len(explained) / 10 and (best is None or score > best[0]):
            best = score, mistake
    if best is None:
        return []
    explained = votes[best[1]]
    alone = Counter(id(result) for some in votes.values() for result in some)
    shown = min(explained, key=lambda result: (alone[id(result)], len(result.case.question)))
    return [Cause(best[1].cause, len(explained), len(wrong), shown)]


def explain(result: Result) -> str:
    """Inputs, expected and computed values of a case that is not right."""
    case, answer = result.case, result.answer
    lines = [f"FAILED {case}"]
    lines += [line if len(line) <= 80 else f"{line[:77]}..." for line in case.question.split("\n")[1:-1]]
    for quantity in () if case.refused else case.asked:
        assert isinstance(answer, dict)
        expected = case.values(quantity)
        lines += [f"{quantity} expected {brief(expected)}", f"{quantity} computed {brief(answer[quantity])}"]
        lines += [f"{quantity} is off by {result.errors[quantity]:.3g} ulp"]
    if case.refused:
        lines += ["expected an error, or NaN for the row whose index is out of range"]
    return "\n    ".join(lines)


def brief(values: Array) -> str:
    return np.array2string(np.ravel(values), precision=9, threshold=6, edgeitems=2, max_line_width=160)
