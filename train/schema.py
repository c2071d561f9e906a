"""What the lines of a record hold, key by key: a file of another meaning is refused before anything uses it."""

import json
import reprlib
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .config import Config, TrainError
from .probabilities import BINS

Record = dict[str, Any]
Kind = tuple[str, Callable[[Any], bool]]  # the rule in words, and whether a value follows it


def is_between(value: Any, low: float, high: float) -> bool:
    """Whether it is a number from low to high, which NaN is not."""
    return type(value) in (int, float) and low <= value <= high


WHOLE: Kind = ("a whole number from 0 to 2147483647", lambda x: type(x) is int and is_between(x, 0, 2**31 - 1))
# The square of 1e100 is a number, too. float32, in which the figures were made, ends at 3.4e38.
NUMBER: Kind = ("a number from 0 to 1e100", lambda x: is_between(x, 0, 1e100))
PERCENT: Kind = ("a number from 0 to 100", lambda x: is_between(x, 0, 100))
TEXT: Kind = ("a string", lambda x: isinstance(x, str))
FLAG: Kind = ("true or false", lambda x: isinstance(x, bool))
LIST: Kind = ("a list", lambda x: isinstance(x, list))
NAMES: Kind = ("a list of strings", lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x))
COUNTS: Kind = (
    f"a list of {BINS} whole numbers from 0",
    lambda x: is_list_of_bins(x, 2**53) and all(n == int(n) for n in x),
)
SHARES: Kind = (f"a list of {BINS} numbers from 0 to 1", lambda x: is_list_of_bins(x, 1))


def is_list_of_bins(value: Any, high: float) -> bool:
    return isinstance(value, list) and len(value) == BINS and all(is_between(x, 0, high) for x in value)


TRAINED = {"train_loss": NUMBER, "train_top1_error": PERCENT, "grad_norm": NUMBER}  # of every epoch
# Of those with a test.
TESTED = {"top1_error": PERCENT, "top5_error": PERCENT, "nll": NUMBER, "calibration_error": PERCENT}
FIGURES = TRAINED | TESTED  # of a finished run
SIZES = dict.fromkeys(("train_images", "test_images", "unused_images", "classes"), WHOLE)
# What must not change within a run. The commit may: one that edits the README must not strand a long run.
BY_TYPE: dict[Any, Kind] = {int: WHOLE, float: NUMBER, str: TEXT, bool: FLAG}
IDENTITY = {f.name: BY_TYPE[f.type] for f in fields(Config)} | {
    "data_sha256": TEXT,
    "device": TEXT,
    "threads": ("null or a whole number", lambda x: x is None or WHOLE[1](x)),
}
EPOCH = {"epoch": WHOLE, **TRAINED, "seconds": NUMBER}
SETS: Kind = (
    "an object with an object for every set, test among them",
    lambda x: isinstance(x, dict) and "test" in x and all(isinstance(figures, dict) for figures in x.values()),
)
FINAL = {**FIGURES, "sets": SETS, "final": ("true", lambda x: x is True)}
SET = {**TESTED, "count": COUNTS, "confidence": SHARES, "accuracy": SHARES}
# What `probabilities.qualities` adds to a set, each with these figures; older records lack it.
QUALITIES: dict[str, Kind] = dict.fromkeys(
    ("softmax", "softmax_scaled", "posterior", "posterior_scaled"), ("an object", lambda x: isinstance(x, dict))
)
BRIER: Kind = ("a number from 0 to 2", lambda x: is_between(x, 0, 2))
QUALITY = {"nll": NUMBER, "calibration_error": PERCENT, "brier": BRIER}


def require(place: str, line: Any, kinds: dict[str, Kind], optional: dict[str, Kind] | None = None) -> None:
    """Raise TrainError, which names the place and the key, unless every key is there and of its kind."""
    if not isinstance(line, dict):
        raise TrainError(f"{place}: not a line of a record")
    if missing := [key for key in kinds if key not in line]:
        raise TrainError(f"{place}: it lacks {', '.join(missing)}")
    for key, (rule, follows) in (kinds | (optional or {})).items():
        if key in line and not follows(line[key]):
            raise TrainError(f"{place}: {key} must be {rule}, got {reprlib.repr(line[key])}")


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> Record:
    """Make the object that json.loads has read of these pairs. Raises ValueError for a key that comes twice."""
    line = dict(pairs)
    if len(line) < len(pairs):
        ((key, times),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {reprlib.repr(key)} {times} times")
    return line


def parse_record(path: object, content: bytes) -> tuple[Record, list[Record], Record]:
    """Read header, the epochs' lines, and the final line, which is empty while the run is unfinished.

    Raises TrainError, which names the file and the line, for what is not a record.
    """
    lines: list[Record] = []
    for number, text in enumerate(content.splitlines() or [b""], 1):
        place = f"{path}, line {number}"
        try:
            line = json.loads(text.decode(), object_pairs_hook=reject_duplicate_keys)
        except json.JSONDecodeError as error:
            raise TrainError(f"{place}: not JSON, perhaps cut short") from error
        except (ValueError, RecursionError) as error:
            raise TrainError(f"{place}: cannot be read: {error}") from error
        if number == 1:
            require(place, line, IDENTITY | SIZES, {"resumed": LIST, "class_names": NAMES})
            require_disjoint(place, line, FINAL)
            try:
                Config(**{f.name: line[f.name] for f in fields(Config)})
            except TrainError as error:
                raise TrainError(f"{place}: {error}") from error
        elif "final" in lines[-1]:
            raise TrainError(f"{place}: a record ends with the line that has the key final")
        else:
            require_figures(place, line, number - 2, lines[0])
        try:
            json.dumps(line, allow_nan=False)  # `report --attack` writes also what is not looked at here
        except (ValueError, RecursionError) as error:
            raise TrainError(f"{place}: cannot be written again: {error}") from error
        lines.append(line)
    header, *log = lines
    return header, log, log.pop() if log and "final" in log[-1] else {}


def require_disjoint(place: str, line: Record, other: Record) -> None:
    """Raise TrainError for a key of both the header and the final line, of which `read_record` makes one object."""
    if shared := sorted(line.keys() & other.keys()):
        raise TrainError(f"{place}: {shared[0]} is a key of the first line or of the last one, not of both")


def require_figures(place: str, line: Any, epoch: int, header: Record) -> None:
    """Raise TrainError unless it is the line of this epoch, or the one after the last of the header's epochs."""
    epochs = header["epochs"]
    if isinstance(line, dict) and "final" in line:
        require(place, line, FINAL)
        require_disjoint(place, line, header)
        for name, figures in line["sets"].items():
            require(f"{place}: the set {reprlib.repr(name)}", figures, SET, QUALITIES)
            for key in QUALITIES.keys() & figures.keys():
                require(f"{place}: {key} of the set {reprlib.repr(name)}", figures[key], QUALITY)
        if epoch != epochs:
            raise TrainError(f"{place}: a finished run's record after {epoch} of its {epochs} epochs")
        return
    require(place, line, EPOCH, TESTED)
    if epoch >= epochs:
        raise TrainError(f"{place}: the run has more epochs than --epochs, which is {epochs}")
    if line["epoch"] != epoch:
        raise TrainError(f"{place}: epoch must be {epoch}, which is next, got {line['epoch']}")
