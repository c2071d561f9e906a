"""The golden vectors as cases: the binary formats, and a reader that checks every rule of `vectors/README.md`."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# The values that a case asks for, or None where an index is refused.
Answer = dict[str, Array] | None


class Unsupported(Exception):
    """The option, or whatever else a case asks for, that an implementation does not know."""


VECTORS = Path(__file__).parent / "vectors"
LEVELS = ("core", "gradient", "batch", "layout", "second", "large", "rows")
HALF_LEVELS = ("core", "gradient", "batch", "rows")  # those of f16 and bf16
ASKED = {"core": ("loss",), "second": ("product",)}  # elsewhere loss and gradient
# Limits, so that no file takes the memory: bytes of a file, logits of all its cases together, axes.
MOST_BYTES, MOST_LOGITS, MOST_AXES = 2**26, 2**22, 8


class VectorError(Exception):
    """A file of vectors that cannot be used; names the file and the line."""


@dataclass(frozen=True)
class Format:
    """A binary format: hexadecimal digits, stored mantissa bits, exponent of the smallest number, largest number."""

    digits: int
    mantissa: int
    smallest: int
    largest: float

    def decode(self, words: list[str]) -> Array:
        """Values of bit patterns, in float32 or, for f64, float64; exact."""
        rule = re.compile(f"[0-9a-f]{{{self.digits}}}|nan")
        for word in words:
            if not rule.fullmatch(word):
                raise ValueError(f"{word[:40]!r} is not {self.digits} hexadecimal digits in lower case")
        text = "".join("0" * self.digits if word == "nan" else word for word in words)
        bits: Array = np.frombuffer(bytes.fromhex(text), f">u{self.digits // 2}")
        if self.digits == 16:
            values: Array = bits.astype(np.uint64).view(np.float64)
        elif self == FORMATS["f16"]:
            values = bits.astype(np.uint16).view(np.float16).astype(np.float32)
        else:
            values = (bits.astype(np.uint32) << np.uint32(32 - 4 * self.digits)).view(np.float32)
        if "nan" in words:
            values[[word == "nan" for word in words]] = np.nan
        return values

    def decode_answer(self, words: list[str]) -> Array:
        """Values of bit patterns that may be of a wider format, which the number of their digits tells."""
        digits = max((len(word) for word in words if word != "nan"), default=self.digits)
        wider = [format for format in FORMATS.values() if format.digits == digits > self.digits]
        return (wider or [self])[0].decode(words)

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


# The lines of a file before its cases, and what may stand there.
HEADER = {"dtype": "|".join(FORMATS), "level": "|".join(LEVELS), "count": "[0-9]{1,9}"}
EXPECTED = ("loss", "gradient", "product")
# A program that is checked does not see these lines.
WITHHELD = {"expect", "plain", *EXPECTED, *(f"{quantity}-tolerance" for quantity in EXPECTED)}
KEYS = WITHHELD | {
    "case", "category", "shape", "logits", "lcg", "put", "target", "probabilities", "weight", "ignore-index",
    "reduction", "smoothing", "strength", "grad-output", "vector", "at", "end",
}  # fmt: skip


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

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(int, self.words["shape"]))

    @property
    def classes(self) -> int:
        return self.shape[min(1, len(self.shape) - 1)]

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

    def values_of_answer(self, quantity: str) -> int:
        """How many values of a quantity are asked for."""
        at = "at" in self.words and quantity == "gradient"
        return len(self.words["at"]) if at else math.prod(self.shape_of(quantity))

    def compared(self, quantity: str, values: Any) -> Array:
        """Those values of an answer that are compared, in float64 and in C order. Raises ValueError."""
        got = np.asarray(values)
        if got.dtype.kind != "f":
            raise ValueError(f"{quantity} must be floating, got {got.dtype}")
        at = self.integers("at") if quantity == "gradient" and "at" in self.words else None
        shape = self.shape_of(quantity)
        if got.shape != shape and not (at is not None and got.shape == at.shape):
            raise ValueError(f"{quantity} must have shape {shape}, got {got.shape}")
        with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
            flat = got.astype(np.float64).reshape(-1)
        return flat if at is None or got.shape == at.shape else flat[at]

    def integers(self, key: str) -> Array:
        return np.array([int(word) for word in self.words[key]], np.int64)

    @cached_property
    def logits(self) -> Array:
        if "logits" in self.words:
            return self.values("logits").reshape(self.shape)
        seed, exponent = map(int, self.words["lcg"])
        x = np.array([(1664525 * seed + 1013904223) % 2**32], np.uint32)
        step, shift = 1664525, 1013904223
        while len(x) < math.prod(self.shape):  # as many steps further on, twice as many each time
            x = np.append(x, x * np.uint32(step) + np.uint32(shift))
            step, shift = step**2 % 2**32, (step + 1) * shift % 2**32
        z = (x[: math.prod(self.shape)] // 256).astype(np.float64) - 2.0**23
        z = np.ldexp(z, exponent).astype(np.float64 if self.dtype == "f64" else np.float32)
        if "put" in self.words:
            z[int(self.words["put"][0])] = FORMATS[self.dtype].decode(self.words["put"][1:])[0]
        return z.reshape(self.shape)

    @cached_property
    def target(self) -> Array:
        if "probabilities" in self.words:
            return self.values("probabilities").reshape(self.shape)
        return self.integers("target").reshape(self.samples)

    @property
    def is_bad(self) -> Array:
        """Which of the class indices is no class, and not ignored."""
        target = self.target
        return (target != self.options.get("ignore_index", -100)) & ((target < 0) | (target >= self.classes))

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
    def largest_factor(self) -> float:
        """How many times grad_output and weights may enlarge an entry; at least 1."""
        factors = [self.values(key) for key in ("weight", "grad-output") if key in self.words]
        return math.prod(max(1.0, float(np.abs(values).max(initial=0))) for values in factors)

    @property
    def vector(self) -> Array:
        return self.values("vector").reshape(self.shape)


def read(path: Path) -> list[Case]:
    """Cases of one file. Raises VectorError."""
    lines = text_of(path).split("\n")
    if lines[0] != "lace-vectors 1":
        raise VectorError(f"{path.name}, line 1: {lines[0][:40]!r} is not the format 'lace-vectors 1'")
    if lines.pop() != "":
        raise VectorError(f"{path.name}, line {len(lines) + 1}: cut short")
    header: dict[str, str] = {}
    cases: list[Case] = []
    words: dict[str, list[str]] = {}  # of the case that has not ended
    places: dict[str, int] = {}
    logits = 0
    for number, line in enumerate(lines[1:], 2):
        key, *rest = line.split(" ")
        if line.startswith("#"):
            continue
        try:
            if not cases and not words and key in HEADER and key not in header:
                if len(rest) != 1 or not re.fullmatch(HEADER[key], rest[0]):
                    raise ValueError(f"{' '.join(rest)[:40]!r} is no {key}")
                header[key] = rest[0]
                continue
            if key not in KEYS or (not words) != (key == "case"):
                raise ValueError(f"{key[:40]!r} does not belong here")
            if key in words:
                raise ValueError(f"{key!r} stands twice in this case")
            if key == "case":
                if len(header) < len(HEADER):
                    raise ValueError(f"the header lacks {', '.join(sorted(HEADER.keys() - header))}")
                if len(rest) != 2 or rest[0] != str(len(cases) + 1):
                    raise ValueError(f"{line[:40]!r} is not 'case {len(cases) + 1} NAME'")
                places = {}
            words[key], places[key] = rest, number
            if key == "end":
                question = "\n".join(lines[place - 1] for key, place in places.items() if key not in WITHHELD)
                case = Case(
                    path.name, header["dtype"], header["level"], len(cases) + 1, words["case"][1], words, question
                )
                if problem := next(problems(case), None):
                    number = places.get(problem[0], number)
                    raise ValueError(problem[1])
                logits += math.prod(case.shape)
                if logits > MOST_LOGITS:
                    raise ValueError(f"the cases have more than {MOST_LOGITS} logits together")
                cases.append(case)
                words = {}
        except ValueError as error:
            raise VectorError(f"{path.name}, line {number}: {error}") from error
    if path.name != f"{header.get('dtype')}-{header.get('level')}.txt":
        raise VectorError(f"{path.name}: its header is that of {header.get('dtype')}-{header.get('level')}.txt")
    if words or not cases or header["count"] != str(len(cases)):
        raise VectorError(f"{path.name}: {len(cases)} whole cases, its header promises {header.get('count')}")
    return cases


def text_of(path: Path) -> str:
    """What a file of vectors holds. A shipped one has to be as it was shipped."""
    try:
        if not path.is_file():  # nor is a pipe, which would not end
            raise VectorError(f"{path} is not a file")
        with path.open("rb") as file:
            found = file.read(MOST_BYTES + 1)
        line = f"{hashlib.sha256(found).hexdigest()}  {path.name}".encode()
        if path.parent == VECTORS and line not in (VECTORS / "SHA256SUMS").read_bytes().split(b"\n"):
            raise VectorError(f"{path}: its SHA-256 is not that of SHA256SUMS: the file is not as it was shipped")
    except OSError as error:
        raise VectorError(f"{path.name}: {error}") from error
    if len(found) > MOST_BYTES:
        raise VectorError(f"{path.name}: it has more than {MOST_BYTES} bytes")
    if wrong := re.search(rb"[^\n -~]", found):
        number = found.count(b"\n", 0, wrong.start()) + 1
        raise VectorError(
            f"{path.name}, line {number}: the byte {wrong[0][0]:#04x} is not printable ASCII, "
            "and a line ends with a line feed alone"
        )
    return found.decode("ascii")


def problems(case: Case) -> Iterator[tuple[str, str]]:
    """Each key that breaks a rule of the format, and the rule. Nothing holds of what comes after the first."""
    words = case.words
    expected = () if case.refused else case.asked
    tolerances = [f"{quantity}-tolerance" for quantity in expected]
    logits = "lcg" if "lcg" in words else "logits"
    target = "probabilities" if "probabilities" in words else "target"
    needed = ["category", "shape", logits, target, "reduction", *expected, *tolerances]
    needed += ["vector"] if case.level == "second" else []
    optional = ["case", "weight", "ignore-index", "smoothing", "strength", "grad-output", "end"]
    optional += ["put"] if logits == "lcg" else []
    optional += ["expect"] if target == "target" and "loss" in case.asked else []
    optional += ["plain"] if expected else []
    optional += ["at"] if "gradient" in case.asked else []
    yield from ((key, f"{key!r} is missing") for key in needed if key not in words)
    yield from ((key, f"{key!r} does not belong to such a case") for key in words if key not in needed + optional)

    def whole(key: str, low: int, high: int, of: slice = slice(None)) -> Iterator[tuple[str, str]]:
        for word in words.get(key, [])[of]:
            if not re.fullmatch("-?[0-9]{1,19}", word) or not low <= int(word) <= high:
                yield key, f"{word[:40]!r} is not an integer from {low} to {high}"

    yield from whole("shape", 0, MOST_LOGITS)
    if not 1 <= len(words["shape"]) <= MOST_AXES or case.classes == 0:
        yield "shape", f"a shape has 1 to {MOST_AXES} axes, and at least one class"
    if math.prod(max(1, length) for length in case.shape) > MOST_LOGITS:
        yield "shape", f"more than {MOST_LOGITS} logits"
    if words["reduction"] not in (["none"], ["mean"], ["sum"]):
        yield "reduction", "a reduction is none, mean or sum"
    size, samples = math.prod(case.shape), math.prod(case.samples)
    counts = {"case": 2, "shape": len(case.shape), "logits": size, "lcg": 2, "put": 2, "target": samples, "end": 0}
    counts |= {"probabilities": size, "weight": case.classes, "vector": size, "at": len(words.get("at", ())) or 1}
    counts |= {"grad-output": math.prod(case.shape_of("loss"))}
    for quantity in case.asked:
        counts[quantity] = counts[f"{quantity}-tolerance"] = case.values_of_answer(quantity)
    for key, found in words.items():
        if len(found) != (n := counts.get(key, 1)):
            yield key, f"{n} values expected for {key}, got {len(found)}"
    if words.get("expect", ["error"]) != ["error"]:
        yield "expect", f"{words['expect'][0][:40]!r} is not 'error'"

    yield from whole("target", -(2**63), 2**63 - 1)
    yield from whole("ignore-index", -(2**63), 2**63 - 1)
    yield from whole("at", 0, size - 1)
    if np.any(np.diff([int(word) for word in words.get("at", ())]) <= 0):
        yield "at", "the indices of at have to increase"
    yield from whole("plain", 1, 10**9)
    # So that each logit is a finite number of the format, exactly.
    format = FORMATS[case.dtype]
    yield from whole("lcg", 0, 2**32 - 1, slice(0, 1))
    yield from whole("lcg", format.smallest, math.frexp(format.largest)[1] - 24, slice(1, 2))
    yield from whole("put", 0, size - 1, slice(0, 1))
    if logits == "lcg" and format.mantissa < 23:
        yield "lcg", f"lcg gives numbers of 24 bits, which {case.dtype} does not hold"
    floats = ("logits", "probabilities", "weight", "grad-output", "vector", *expected, *tolerances)
    scalars = ("smoothing", "strength")
    for key in [key for key in words if key in (*floats, *scalars, "put")]:
        try:
            values = (FORMATS["f64"] if key in scalars else format).decode(words[key][1 if key == "put" else 0 :])
        except ValueError as error:
            yield key, str(error)
            continue
        if np.isnan(values).sum() != words[key].count("nan"):
            yield key, "a NaN is written 'nan'"
        if key not in ("logits", "put", *expected) and not np.all(np.isfinite(values)):
            yield key, f"{key} has to be finite"
        if key in tolerances and not np.all(values >= 0):
            yield key, "a tolerance is not negative"
        if key in scalars and not 0 <= values[0] <= 1:
            yield key, f"{key} is from 0 to 1"
    if target == "target":
        wrong = case.target[case.is_bad]
        if case.refused and not wrong.size:
            yield "expect", "an error is expected, but every target is a class or ignored"
        if not case.refused and wrong.size:
            yield "target", f"class {wrong[0]} is not from 0 to {case.classes - 1}, and no error is expected"
    for quantity in expected:
        if "nan" in words[quantity] and words["reduction"] != ["mean"] and np.all(np.isfinite(case.logits)):
            yield quantity, "a NaN is expected, but every logit is finite and no mean is taken"
