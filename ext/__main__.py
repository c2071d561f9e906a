"""Evaluate a classifier from files of any size: loss, cross entropy, accuracy and calibration error.

    python -m lace_loss.ext LOGITS TARGETS     files .npy, .npz or .csv, each of its own kind
    python -m lace_loss.ext BOTH.npz           with arrays `logits` and `target`

Logits are floats of shape (N, C) or (N, C, d1, ...), targets the classes of their rows. Files are read once, a few
megabytes at a time. A .csv has a row a line, and may begin with a line of names. Where tqdm is installed, a terminal
shows the progress. Loss and cross entropy are in nats, the calibration error is that of `lace_loss.ext.Evaluation`.

Exit status: 0, or 2 if a file cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from . import Array, Evaluation, Tally, rows_in_a_block

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None  # type: ignore[assignment, misc]

# Also what zipfile raises for a damaged archive or one that it cannot decompress.
UNUSABLE = (
    OSError, ValueError, TypeError, IndexError, OverflowError, EOFError, NotImplementedError, RuntimeError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass
class Rows:
    """An array in a file. `read(n)` gives its next n rows, at its end those that are left."""

    name: str
    count: int | None  # a .csv does not say
    shape: tuple[int, ...]  # of one row
    read: Callable[[int], Array]

    def __str__(self) -> str:
        return f"{self.name} of shape ({', '.join(map(str, [self.count or 'rows', *self.shape]))})"


def opened(path: Path, role: str, files: ExitStack) -> Rows:
    """The array in a file; in an .npz the one called like its role, or the only one."""
    if path.suffix == ".npy":
        return binary(files.enter_context(path.open("rb")), str(path))
    if path.suffix == ".npz":
        archive = files.enter_context(zipfile.ZipFile(path))
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if role not in names and len(names) != 1:
            raise ValueError(f"{path} has no array {role!r}, but {', '.join(names) or 'nothing'}")
        name = role if role in names else names[0]
        return binary(files.enter_context(archive.open(f"{name}.npy")), f"{path}[{name}]")
    if path.suffix == ".csv":
        lines = files.enter_context(path.open(encoding="utf-8-sig"))
        return text(lines, str(path), int if role == "target" else float)
    raise ValueError(f"{path} must be a .npy, .npz or .csv file")


def binary(stream: IO[bytes], name: str) -> Rows:
    try:
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        (count, *row), by_columns, dtype = header(stream)
    except ValueError as error:
        raise ValueError(f"{name} is not an array of rows in the .npy format: {error}") from error
    if dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold numbers, got {dtype}")
    if by_columns and row:
        raise ValueError(f"{name} is stored column by column: save numpy.ascontiguousarray of it")
    done = 0

    def read(n: int) -> Array:
        nonlocal done
        values = np.empty((min(n, count - done), *row), dtype)
        got = stream.readinto(values.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
        if got < values.nbytes:
            raise ValueError(f"{name} is cut short in row {done + got // values[0].nbytes} of its {count}")
        done += len(values)
        return values

    return Rows(name, count, tuple(row), read)


def text(stream: IO[str], name: str, kind: type[int] | type[float]) -> Rows:
    lines: Iterable[tuple[int, list[str]]]
    lines = ((number, line.split(",")) for number, line in enumerate(stream, 1) if line.strip())
    number, first = next(iter(lines), (1, [""]))
    if any(parsed(word, float) is not None for word in first):  # else they are names
        lines = chain([(number, first)], lines)
    columns = len(first)
    row = () if kind is int and columns == 1 else (columns,)
    rule = f"{columns} {'whole ' if kind is int else ''}number{'s'[: columns - 1]}"

    def read(n: int) -> Array:
        rows = []
        for number, words in islice(lines, n):
            values = [parsed(word, kind) for word in words]
            if len(values) != columns or None in values:
                raise ValueError(f"{name}, line {number}: expected {rule}, got {','.join(words).strip()[:60]!r}")
            rows.append(values)
        return np.array(rows, kind).reshape(-1, *row)

    return Rows(name, None, row, read)


def parsed(word: str, kind: type[int] | type[float]) -> float | None:
    try:
        return kind(word)
    except ValueError:
        return None


def evaluate(logits: Rows, targets: Rows, ignore_index: int) -> Evaluation:
    known = None not in (logits.count, targets.count)
    if targets.shape != logits.shape[1:] or (known and targets.count != logits.count):
        raise ValueError(f"{targets} does not fit {logits}: there must be one class for each row of logits")
    tally, n = Tally(ignore_index=ignore_index), rows_in_a_block(logits.shape)
    bar = None if tqdm is None else tqdm(total=logits.count, unit=" rows", unit_scale=True, disable=None)
    with nullcontext() if bar is None else bar:
        while True:
            z = logits.read(n)
            y = targets.read(max(1, len(z)))
            if len(y) != len(z):
                longer, shorter = (logits, targets) if len(y) < len(z) else (targets, logits)
                ends = tally.rows + min(len(y), len(z))
                raise ValueError(f"{shorter.name} ends after {ends} rows, {longer.name} does not")
            if len(z) == 0:
                return tally.figures()
            tally.add(z, y)
            if bar is not None:
                bar.update(len(z))


def main(arguments: list[str]) -> int:
    top = argparse.ArgumentParser(
        "python -m lace_loss.ext", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("logits", type=Path, metavar="LOGITS")
    top.add_argument("targets", type=Path, metavar="TARGETS", nargs="?")
    top.add_argument(
        "--ignore-index", type=int, default=-100, help="class of rows that are not counted; default %(default)s"
    )
    top.add_argument("--json", action="store_true", help="print one JSON object, with null for infinity and NaN")
    args = top.parse_args(arguments)
    try:
        with ExitStack() as files:
            targets = opened(args.targets or args.logits, "target", files)
            figures = evaluate(opened(args.logits, "logits", files), targets, args.ignore_index)
    except UNUSABLE as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(json.loads(json.dumps(asdict(figures)), parse_constant=lambda _: None)))
        return 0
    print(f"loss               {figures.loss:.6g}")
    print(f"cross entropy      {figures.cross_entropy:.6g}")
    for k, accuracy in figures.accuracy.items():
        print(f"top-{k} accuracy     {100 * accuracy:.2f} %")
    print(f"calibration error  {100 * figures.calibration_error:.2f} %")
    print(f"count              {figures.count}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
