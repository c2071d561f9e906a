"""Read golden vectors (`vectors/README.md`), put their cases to an implementation, and measure its answers."""

from __future__ import annotations

import math
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .mistakes import likely_cause

Array = NDArray[Any]
# The values that a case asks for, or None where an index is refused.
Answer = dict[str, Array] | None

VECTORS = Path(__file__).parent / "vectors"
LEVELS = ("core", "gradient", "batch", "layout", "second", "large")
ASKED = {"core": ("loss",), "second": ("product",)}  # elsewhere loss and gradient
EXPECTED = ("loss", "gradient", "product", "loss-tolerance", "gradient-tolerance", "product-tolerance", "plain")
KEYS = {
    "case", "category", "shape", "logits", "lcg", "put", "target", "probabilities", "weight", "ignore-index",
    "reduction", "smoothing", "strength", "grad-output", "vector", "expect", "at", "end", *EXPECTED,
}  # fmt: skip


class VectorError(Exception):
    """A file of vectors that cannot be used; names the file and the line."""


class PortError(Exception):
    """An implementation that gave no usable answer; names the case."""


@dataclass(frozen=True)
class Format:
    """A binary format: hexadecimal digits, stored mantissa bits, exponent of the smallest number, largest number."""

    digits: int
    mantissa: int
    smallest: int
    largest: float

    def decode(self, words: list[str]) -> Array:
        """Values of bit patterns, in float32 or, for f64, float64; exact."""
        patterns = []
        for word in words:
            if word != "nan" and (len(word) != self.digits or not set(word) <= set("0123456789abcdef")):
                raise ValueError(f"{word!r} is not {self.digits} hexadecimal digits")
            patterns.append(0 if word == "nan" else int(word, 16))
        if self.digits == 16:
            values: Array = np.array(patterns, np.uint64).view(np.float64)
        elif self == FORMATS["f16"]:
            values = np.array(patterns, np.uint16).view(np.float16).astype(np.float32)
        else:
            values = (np.array(patterns, np.uint32) << np.uint32(32 - 4 * self.digits)).view(np.float32)
        values[[word == "nan" for word in words]] = np.nan
        return values

    @property
    def smallest_normal(self) -> float:
        return math.ldexp(1.0, self.smallest + self.mantissa)

    def ulp(self, values: Array) -> Array:
        """Distance of neighbours at each finite value."""
        size = np.where(np.isfinite(values), np.abs(values), 0)
        exponent = np.where(size == 0, self.smallest, np.frexp(size)[1] - 1 - self.mantissa)
        return np.ldexp(1.0, np.maximum(exponent, self.smallest))


FORMATS = {
    "f64": Format(16, 52, -1074, float(np.finfo(np.float64).max)),
    "f32": Format(8, 23, -149, float(np.finfo(np.float32).max)),
    "f16": Format(4, 10, -24, 65504.0),
    "bf16": Format(4, 7, -133, (2 - 2.0**-7) * 2.0**127),
}


@dataclass(frozen=True)
class Case:
    """One case; all arrays shaped and in float64 or float32."""

    file: str
    dtype: str
    level: str
    number: int
    name: str
    words: dict[str, list[str]]
    question: str  # its lines without the expected values

    def __str__(self) -> str:
        return f"{self.file} case {self.number} {self.name} ({self.category})"

    @property
    def category(self) -> str:
        return self.words["category"][0]

    @property
    def asked(self) -> tuple[str, ...]:
        return ASKED.get(self.level, ("loss", "gradient"))

    @property
    def refused(self) -> bool:
        return "expect" in self.words

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.words["shape"]))

    @property
    def samples(self) -> tuple[int, ...]:
        axis = min(1, len(self.shape) - 1)
        return self.shape[:axis] + self.shape[axis + 1 :]

    def shape_of(self, quantity: str) -> tuple[int, ...]:
        if quantity == "loss":
            return self.samples if self.words["reduction"] == ["none"] else ()
        return self.shape

    def values(self, key: str) -> Array:
        return FORMATS[self.dtype].decode(self.words[key])

    def integers(self, key: str) -> Array:
        return np.array([int(word) for word in self.words[key]], np.int64)

    @property
    def logits(self) -> Array:
        if "logits" in self.words:
            return self.values("logits").reshape(self.shape)
        x, exponent = map(int, self.words["lcg"])
        z = np.empty(math.prod(self.shape), np.float64 if self.dtype == "f64" else np.float32)
        for j in range(len(z)):
            x = (1664525 * x + 1013904223) % 2**32
            z[j] = (x // 256 - 2**23) * 2.0**exponent
        if "put" in self.words:
            z[int(self.words["put"][0])] = FORMATS[self.dtype].decode(self.words["put"][1:])[0]
        return z.reshape(self.shape)

    @property
    def target(self) -> Array:
        if "probabilities" in self.words:
            return self.values("probabilities").reshape(self.shape)
        return self.integers("target").reshape(self.samples)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the loss that the case states."""
        found: dict[str, Any] = {"reduction": self.words["reduction"][0]}
        if "weight" in self.words:
            found["weight"] = self.values("weight")
        if "ignore-index" in self.words:
            found["ignore_index"] = int(self.words["ignore-index"][0])
        for key, option in (("smoothing", "label_smoothing"), ("strength", "strength")):
            if key in self.words:
                found[option] = float(FORMATS["f64"].decode(self.words[key])[0])
        return found

    @property
    def grad_output(self) -> Array | None:
        return self.values("grad-output").reshape(self.shape_of("loss")) if "grad-output" in self.words else None

    @property
    def vector(self) -> Array:
        return self.values("vector").reshape(self.shape)


def read(path: Path) -> list[Case]:
    """Cases of one file. Raises VectorError."""
    try:
        lines = path.read_text("ascii").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise VectorError(f"{path.name}: {error}") from error
    if lines[0] != "lace-vectors 1":
        raise VectorError(f"{path.name}, line 1: {lines[0][:40]!r} is not the format 'lace-vectors 1'")
    if lines.pop() != "":
        raise VectorError(f"{path.name}, line {len(lines) + 1}: cut short")
    header: dict[str, str] = {}
    cases: list[Case] = []
    words: dict[str, list[str]] | None = None
    question: list[str] = []
    for number, line in enumerate(lines[1:], 2):
        key, *rest = line.split(" ")
        try:
            if line.startswith("#"):
                continue
            if words is None and not cases and key in ("dtype", "level", "count"):
                (header[key],) = rest
                continue
            if key not in KEYS or (words is None) != (key == "case") or key in (words or {}):
                raise ValueError(f"{key!r} does not belong here")
            if words is None:
                words, question = {}, []
            words[key] = rest
            question += [] if key in EXPECTED or key == "expect" else [line]
            if key == "end":
                case_number, name = words["case"]
                case = Case(
                    path.name, header["dtype"], header["level"], int(case_number), name, words, "\n".join(question)
                )
                cases.append(check_sizes(case))
                words = None
        except (ValueError, KeyError, IndexError) as error:
            raise VectorError(f"{path.name}, line {number}: {error}") from error
    if path.name != f"{header.get('dtype')}-{header.get('level')}.txt":
        raise VectorError(f"{path.name}: its header is that of {header.get('dtype')}-{header.get('level')}.txt")
    if words is not None or not cases or header.get("count") != str(len(cases)):
        raise VectorError(f"{path.name}: {len(cases)} whole cases, its header promises {header.get('count')}")
    return cases


def check_sizes(case: Case) -> Case:
    """The case, if every list of values decodes and has its length."""
    _ = case.logits, case.target, case.options, case.grad_output, FORMATS[case.dtype], LEVELS.index(case.level)
    _ = float(case.words.get("plain", ["1"])[0]), case.level == "second" and case.vector
    if "at" in case.words and not set(case.integers("at")) <= set(range(math.prod(case.shape))):
        raise ValueError("at must name logits")
    for quantity in () if case.refused else case.asked:
        n = (
            len(case.words["at"])
            if quantity == "gradient" and "at" in case.words
            else math.prod(case.shape_of(quantity))
        )
        for key in (quantity, f"{quantity}-tolerance"):
            if len(case.values(key)) != n:
                raise ValueError(f"{n} values expected for {key}, got {len(case.words[key])}")
    return case


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
    lost = 2 * FORMATS[case.dtype].smallest_normal if flushed else 0.0
    errors, holds = {}, True
    for quantity in case.asked:
        if quantity not in answer:
            raise PortError(f"{case}: no {quantity} in the answer")
        got = np.asarray(answer[quantity])
        if got.dtype.kind != "f":
            raise PortError(f"{case}: {quantity} must be floating, got {got.dtype}")
        at = case.integers("at") if quantity == "gradient" and "at" in case.words else None
        shape = case.shape_of(quantity)
        if got.shape != shape and not (at is not None and got.shape == at.shape):
            raise PortError(f"{case}: {quantity} must have shape {shape}, got {got.shape}")
        flat = got.astype(np.float64).reshape(-1)
        flat = flat[at] if at is not None and got.shape == shape else flat
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


def refuses(case: Case, answer: dict[str, Array]) -> bool:
    """Whether the loss is NaN for the samples whose index is no class, and for no other."""
    ignored = case.options.get("ignore_index", -100)
    wrong = (case.target != ignored) & ((case.target < 0) | (case.target >= case.shape[min(1, len(case.shape) - 1)]))
    loss = np.asarray(answer["loss"])
    return bool(np.all(np.isnan(loss) == (wrong if loss.shape == wrong.shape else True)))


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


def python_port(
    function: Callable[..., Any], product: Callable[..., Any] | None = None, seconds: float = 0
) -> Implementation:
    """FN(logits, target, **options) -> (loss, gradient), and `product` likewise with a vector before the options.

    A case may take so many seconds, if not 0 (main thread of a Unix process only: the alarm is a signal).
    """

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer after {seconds:g} s")

    def answer(case: Case) -> Answer:
        logits, target, options = case.logits, case.target, case.options
        if case.dtype == "f16":
            logits = logits.astype(np.float16)
        if case.grad_output is not None:
            options["grad_output"] = case.grad_output
        try:
            if seconds:
                signal.signal(signal.SIGALRM, late)
                signal.setitimer(signal.ITIMER_REAL, seconds)
            if case.level == "second":
                assert product is not None
                return {"product": np.asarray(product(logits, target, case.vector, **options))}
            loss, gradient = function(logits, target, **options)
            return {"loss": np.asarray(loss), "gradient": np.asarray(gradient)}
        except (Exception, SystemExit) as error:
            if case.refused and not isinstance(error, TimeoutError):
                return None
            raise PortError(f"{case}: {type(error).__name__}: {error}") from error
        finally:
            if seconds:
                signal.setitimer(signal.ITIMER_REAL, 0)

    return answer


def command_port(command: str, cases: list[Case], seconds: float) -> dict[int, Answer]:
    """Answers of a program to the cases of one file, by number. Raises PortError."""
    first = cases[0]
    head = f"lace-vectors 1\ndtype {first.dtype}\nlevel {first.level}\ncount {len(cases)}\n"
    text = head + "".join(case.question + "\n" for case in cases)
    try:
        done = subprocess.run(
            command, shell=True, input=text, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        answered = (error.stdout or b"").decode(errors="replace").count("\nend")
        raise PortError(
            f"{first.file}: no end after {seconds:g} s; {answered} of {len(cases)} cases answered"
        ) from error
    if done.returncode:
        raise PortError(f"{first.file}: exit status {done.returncode}: {done.stderr.strip()[-500:]}")
    blocks = done.stdout.split("\nend\n")
    if blocks.pop().strip():
        raise PortError(f"{first.file}: the answer to case {len(blocks) + 1} is cut short")
    answers: dict[int, Answer] = {}
    for case, block in zip(cases, blocks, strict=False):
        lines = [line.split(" ") for line in block.strip("\n").split("\n")]
        if lines[0] != ["case", str(case.number)]:
            raise PortError(f"{case}: the answer begins with {' '.join(lines[0])[:60]!r}")
        try:
            values = {key: FORMATS[case.dtype].decode(words) for key, *words in lines[1:] if key != "error"}
            answers[case.number] = None if ["error"] in lines else {k: reshaped(case, k, v) for k, v in values.items()}
        except (ValueError, KeyError) as error:
            raise PortError(f"{case}: {error}") from error
    if len(answers) < len(cases):
        raise PortError(f"{cases[len(answers)]}: no answer")
    return answers


def reshaped(case: Case, quantity: str, values: Array) -> Array:
    if quantity == "gradient" and "at" in case.words:
        return values
    return values.reshape(case.shape_of(quantity))
