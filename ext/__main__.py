"""Evaluate a classifier from files of any size: loss, cross entropy, accuracy and calibration error.

    python -m lace_loss.ext LOGITS TARGETS     files .npy, .npz or .csv, each of its own kind
    python -m lace_loss.ext BOTH.npz           with arrays `logits` and `target`

Logits are floats of shape (N, C) or (N, C, d1, ...), targets the classes of their rows, counted from 0. Loss and cross
entropy are in nats, the calibration error is that of `lace_loss.ext.Evaluation`. Where tqdm is installed, a terminal
shows the progress.

Exit status: 0, 2 if a file or an option cannot be used or the figures cannot be written, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np

from . import Evaluation, Tally, files
from .arrays import Array
from .evaluation import rows_in_a_block
from .files import FileError, Rows, opened

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None  # type: ignore[assignment, misc]

# What a row of probabilities may miss of 1, by rounding to two decimals or to half precision.
TOLERANCE = 0.01


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)  # what is --top today may be another option tomorrow

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. --help lists the options")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", flush=True)  # so that `main` sees what fails


def parsed(arguments: list[str]) -> argparse.Namespace:
    top = Parser(
        prog="python -m lace_loss.ext",
        description=f"{__doc__}\n{files.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("logits", type=Path, metavar="LOGITS")
    top.add_argument("targets", type=Path, metavar="TARGETS", nargs="?")
    for option, what in (
        ("--header", "a line of names"),
        ("--index-column", "a column of row numbers or names, which is left out"),
    ):
        top.add_argument(
            option,
            choices=("none", "logits", "target", "both"),
            metavar="WHICH",
            help=f"which .csv files begin with {what}: %(choices)s",
        )
    top.add_argument(
        "--probabilities",
        action=argparse.BooleanOptionalAction,
        help=f"LOGITS holds probabilities, each row with sum 1 within {TOLERANCE}, or holds logits that look so",
    )
    top.add_argument("--topk", type=int, nargs="+", metavar="K", help="default: 1, and 5 for more than 5 classes")
    top.add_argument("--weight", type=Path, metavar="FILE", help="one number for each class; a .csv has one a line")
    top.add_argument(
        "--ignore-index", type=int, default=-100, help="class of rows that are not counted; default %(default)s"
    )
    top.add_argument("--label-smoothing", type=float, default=0.0, help="of the loss; default %(default)s")
    top.add_argument("--strength", type=float, default=1.0, help="of the loss; default %(default)s")
    top.add_argument("--json", action="store_true", help="print one JSON object, with null for infinity and NaN")
    return top.parse_args(arguments)


def evaluate(logits: Rows, targets: Rows, args: argparse.Namespace, weight: Array | None) -> Evaluation:
    tally = Tally(
        args.topk or [k for k in (1, 5) if k == 1 or k < logits.shape[0]],
        weight=weight,
        ignore_index=args.ignore_index,
        label_smoothing=args.label_smoothing,
        strength=args.strength,
    )
    n = rows_in_a_block(logits.shape)
    bar = None
    if tqdm is not None and sys.stderr is not None:
        bar = tqdm(total=logits.count, unit=" rows", unit_scale=True, disable=None)
    with nullcontext() if bar is None else bar, np.errstate(all="ignore"):
        while True:
            z, y = logits.read(n), targets.read(n)
            if len(z) != len(y):
                counts = [tally.rows + len(z), tally.rows + len(y)]
                for i, rows in enumerate((logits, targets)):
                    while len(more := rows.read(n)):
                        counts[i] += len(more)
                refuse_counts(logits, targets, *counts)
            if len(z) == 0:
                return tally.figures()
            kept = y != args.ignore_index
            check_classes(targets, y, kept, logits.shape[0])
            if args.probabilities:
                z = log_of_probabilities(logits, z, kept)
            elif args.probabilities is None and tally.rows == 0:
                check_no_probabilities(logits, z, kept)
            try:
                tally.add(z, y)
            except ValueError:
                largest = z.max(axis=1)
                for place in np.argwhere(kept & ~np.isfinite(largest))[:1]:
                    raise FileError(
                        f"{logits.place(place[0])} has the largest logit {largest[tuple(place)]}, and no softmax"
                    ) from None
                raise
            if bar is not None:
                bar.update(len(z))


def check_shapes(logits: Rows, targets: Rows) -> None:
    if not logits.shape:
        raise FileError(f"{logits} must be of shape (N, C): each row holds one logit for each class. One row is (1, C)")
    if targets.shape != logits.shape[1:]:
        hint = ""
        if targets.shape == (*logits.shape[1:], 1):
            hint = ". Save target.reshape(target.shape[:-1])"
        elif targets.shape == logits.shape:
            hint = ". If they are one-hot, save target.argmax(1)"
        elif targets.shape == logits.shape[:-1]:
            hint = ". If the classes are its last axis, save numpy.moveaxis(logits, -1, 1)"
        raise FileError(f"{targets} does not fit {logits}: there must be one class for each row of logits{hint}")
    if None not in (logits.count, targets.count) and targets.count != logits.count:
        refuse_counts(logits, targets, logits.count or 0, targets.count or 0)


def refuse_counts(logits: Rows, targets: Rows, of_logits: int, of_targets: int) -> NoReturn:
    hint = ""
    if (of_targets,) == logits.shape:
        hint = ". If the logits are transposed, save logits.T"
    if read := [rows.first for rows in (logits, targets) if rows.first]:
        hint += f". {' and '.join(read)}: --header says which files begin with names"
    raise FileError(
        f"{targets.name} has {of_targets} rows and {logits.name} has {of_logits}: "
        f"there must be one class for each row of logits{hint}"
    )


def check_classes(targets: Rows, y: Array, kept: Array, classes: int) -> None:
    for place in np.argwhere(kept & ((y < 0) | (y >= classes)))[:1]:
        wrong, some = y[tuple(place)], y[kept]
        hint = f"--ignore-index {wrong} leaves such rows out"
        if some.min() == 1 and some.max() == classes:
            hint = "if they are counted from 1, save target - 1"
        raise FileError(
            f"{targets.place(place[0])} is {wrong}, not a class: 0 to {classes - 1}, as there are {classes} columns of "
            f"logits; {hint}"
        )


def sum_to(whole: int, z: Array) -> Array:
    return np.abs(z.sum(axis=1, dtype=np.float64) / whole - 1) <= TOLERANCE


def check_no_probabilities(logits: Rows, z: Array, kept: Array) -> None:
    if not (kept.any() and z.min(axis=1)[kept].min() >= 0):
        return
    for whole in (1, 100):
        if sum_to(whole, z)[kept].all() and ((z > 0) & (z < whole)).any():  # one-hot rows may be logits
            raise FileError(
                f"{logits.name} looks like probabilities, which are no logits: no value in its first {len(z)} rows is "
                f"below 0, and each row has the sum {whole} within {TOLERANCE * whole:g}. --probabilities takes their "
                "logarithms, for rows with the sum 1; --no-probabilities takes them for logits"
            )


def log_of_probabilities(logits: Rows, z: Array, kept: Array) -> Array:
    for place in np.argwhere(kept & ~((z.min(axis=1) >= 0) & sum_to(1, z)))[:1]:
        row = z[(place[0], slice(None), *place[1:])]
        raise FileError(
            f"{logits.place(place[0])} holds no probabilities: its sum is {row.sum(dtype=np.float64):.6g}, its least "
            f"value {row.min():.6g}. The sum must be 1 within {TOLERANCE}, and no value below 0"
        )
    return np.log(z, dtype=np.float64 if z.dtype.itemsize == 8 else np.float32)


def from_files(args: argparse.Namespace) -> dict[str, Any]:
    if args.targets is None and args.logits.suffix.lower() != ".npz":
        raise FileError(f"{args.logits} holds one array: TARGETS, a file with one class for each row, must follow it")
    with ExitStack() as stack:
        logits, targets = (
            opened(
                path,
                role,
                stack,
                header=None if args.header is None else args.header in (role, "both"),
                index_column=None if args.index_column is None else args.index_column in (role, "both"),
                both=args.targets is None,
            )
            for path, role in ((args.logits, "logits"), (args.targets or args.logits, "target"))
        )
        check_shapes(logits, targets)
        classes, weight = logits.shape[0], None
        if args.weight is not None:
            rows = opened(args.weight, "weight", stack, header=None, index_column=False)
            if rows.shape or len(weight := rows.read(classes + 1)) != classes:
                raise FileError(f"{rows} must be of shape ({classes}): it holds one weight for each class, one a row")
        return {**asdict(evaluate(logits, targets, args, weight)), "classes": classes}


def show(figures: dict[str, Any], as_json: bool) -> None:
    if sys.stdout is None:
        raise OSError("it is closed")
    if as_json:
        print(json.dumps(json.loads(json.dumps(figures), parse_constant=lambda _: None)))
    else:
        print(f"loss               {figures['loss']:.6g}")
        print(f"cross entropy      {figures['cross_entropy']:.6g}")
        for k, accuracy in figures["accuracy"].items():
            print(f"{f'top-{k} accuracy':18} {100 * accuracy:.2f} %")
        print(f"calibration error  {100 * figures['calibration_error']:.2f} %")
        print(f"count              {figures['count']}")
        print(f"classes            {figures['classes']}")
    sys.stdout.flush()


def printable(text: str) -> str:
    """Without what would give a terminal orders, as names of files may."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def main(arguments: list[str]) -> int:
    try:
        args = parsed(arguments)
        show(from_files(args), args.json)
        return 0
    except OSError as error:  # of standard output: those of files are FileErrors
        discard(sys.stdout)
        reason = "" if isinstance(error, BrokenPipeError) else f"standard output: {error.strerror or error}"
    except KeyboardInterrupt:
        return 130
    except (ValueError, OverflowError, MemoryError) as error:
        reason = str(error) or "there is not enough memory"
    if reason:  # else the reader, such as head, wants no more
        try:
            sys.stderr.write(f"error: {printable(reason)}\n")
        except (OSError, AttributeError):  # it is full, or closed
            discard(sys.stderr)
    return 2


def discard(stream: TextIO | None) -> None:
    """What could not be written would be tried again, and fail again, when Python ends."""
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
