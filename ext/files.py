"""Arrays in .npy, .npz and .csv files of any size, read once, some rows at a time.

A .npy file, or an array in an .npz, must be exactly what its header announces: floats for logits, integers for classes,
row after row. In a .csv (UTF-8, commas, decimal points) a first line without any number is a line of names, and every
other line is a row. What can be meant in two ways is refused, and the sentence names the option that decides it.
"""

from __future__ import annotations

import csv
import io
import math
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from .arrays import Array

_HEADERS = {
    (1, 0): (2, npy.read_array_header_1_0),
    (2, 0): (4, npy.read_array_header_2_0),
    (3, 0): (4, npy.read_array_header_2_0),  # differs in the names of fields, which arrays of numbers do not have
}
_LONGEST_HEADER = 10_000  # NumPy's own limit, but it reads the whole header first
_LARGEST_ROW = 1 << 31  # bytes; a damaged shape must not take all memory
_LONGEST_LINE = 1 << 24  # characters: a row of 262,144 classes has 7 million
_SAMPLE = 8  # how many lines of a .csv are looked at before the first is understood

_KINDS = {"logits": "f", "target": "iu", "weight": "fiu"}
_NEEDS = {
    "logits": "logits must be float16, float32 or float64 (.astype(numpy.float32)), and come first, before the classes",
    "target": "classes must be integers (.astype(numpy.int64)), and come second, after the logits",
    "weight": "weights must be numbers of at most 64 bits",
}
_FILES = "(none, logits, target or both)"
_INDEX = f"say with --index-column which files begin with a column that is left out {_FILES}"
_SEPARATED = "Fields must be separated by commas, and decimals by points"


class FileError(ValueError):
    """Why a file cannot be used: its name, what it holds, what is needed, and what can be done."""


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # nobody lists what zipfile, zlib, lzma, ast and tokenize raise for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, OSError) and error.filename is not None:
            reason = str(error.strerror)
        elif not isinstance(error, MemoryError):
            reason += ". It is damaged, or not what its name says"
        raise FileError(f"{name} cannot be read: {reason}") from error


class Rows:
    """An array in a file. `read(n)` gives its next n rows, at its end those that are left."""

    first = ""  # in a .csv, how its first line was read

    def __init__(self, name: str, count: int | None, shape: tuple[int, ...]) -> None:
        self.name, self.count, self.shape = name, count, shape  # the shape is that of one row; a .csv has no count

    def read(self, n: int) -> Array:
        raise NotImplementedError

    def place(self, i: int) -> str:
        """Where the row i of those that were read last stands in the file."""
        raise NotImplementedError

    def __str__(self) -> str:
        shape = ", ".join(map(str, ["rows" if self.count is None else self.count, *self.shape]))
        return f"{self.name} of shape ({shape})"


def opened(
    path: Path, role: str, files: ExitStack, *, header: bool | None, index_column: bool | None, both: bool = False
) -> Rows:
    """The array in a file. In an .npz it is the one called like its role, or the only one unless it must hold both."""
    with _blaming(str(path)):
        status, form = path.stat(), path.suffix.lower()
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{path} is a folder, a pipe or a device, and must be a file: its size is checked first")
        if form == ".npy":
            return _Binary(files.enter_context(path.open("rb")), str(path), status.st_size, role)
        if form == ".npz":
            archive = files.enter_context(zipfile.ZipFile(path))
            names = [name.removesuffix(".npy") for name in archive.namelist()]  # NumPy reads both spellings, too
            name = names[0] if len(names) == 1 and not both else role
            if names.count(name) != 1:
                raise FileError(f"{path} must have one array {name!r}, and has {', '.join(names)[:200] or 'nothing'}")
            member = archive.infolist()[names.index(name)]
            return _Binary(files.enter_context(archive.open(member)), f"{path}[{name}]", member.file_size, role)
        if form == ".csv":
            # Bytes that are no UTF-8 become surrogates, so that the line that has them can be named.
            stream = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
            return _Text(files.enter_context(stream), str(path), role, header, index_column)
    raise FileError(f"{path} must be a .npy, .npz or .csv file")


class _Binary(Rows):
    def __init__(self, stream: IO[bytes], name: str, size: int, role: str) -> None:
        with _blaming(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            version = npy.read_magic(stream)
            if version not in _HEADERS:
                raise FileError(f"{name} has version {version} of the .npy format, and must have 1.0, 2.0 or 3.0")
            width, parse = _HEADERS[version]
            length = stream.read(width)
            header = stream.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER))
            shape, by_columns, self.dtype = parse(io.BytesIO(length + header))
        if self.dtype.kind not in _KINDS[role] or self.dtype.itemsize > 8:
            raise FileError(f"{name} holds {self.dtype} of shape {shape}: {_NEEDS[role]}")
        if not shape:
            raise FileError(f"{name} holds a lone number: save numpy.atleast_1d of it")
        if min(shape) < 1:
            raise FileError(f"{name} has shape {shape}: there must be at least one row, and no row may be empty")
        if by_columns and len(shape) > 1:
            raise FileError(f"{name} is stored column by column: save numpy.ascontiguousarray of it")
        row_size = math.prod(shape[1:]) * self.dtype.itemsize
        there = size - stream.tell()
        if there < row_size * shape[0]:
            raise FileError(f"{name} is cut short in row {there // row_size} of its {shape[0]}: copy or save it again")
        if there > row_size * shape[0]:
            raise FileError(
                f"{name} has {there - row_size * shape[0]} bytes behind its array of shape {shape}, "
                "as after a transfer as text: copy it again, as binary"
            )
        if row_size > _LARGEST_ROW:
            raise FileError(f"{name} has shape {shape}: one row may take {_LARGEST_ROW} bytes, and takes {row_size}")
        super().__init__(name, shape[0], shape[1:])
        self.stream, self.start, self.done = stream, 0, 0

    def read(self, n: int) -> Array:
        assert self.count is not None
        with _blaming(self.name):
            values = np.empty((min(n, self.count - self.done), *self.shape), self.dtype)
            got = self.stream.readinto(values.reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
        if got < values.nbytes:
            raise FileError(f"{self.name} ends in row {self.done + got // values[0].nbytes} of its {self.count}")
        self.start, self.done = self.done, self.done + len(values)
        return values.astype(self.dtype.newbyteorder("="), copy=False)

    def place(self, i: int) -> str:
        return f"{self.name}[{self.start + i}]"


class _Text(Rows):
    def __init__(self, stream: IO[str], name: str, role: str, header: bool | None, index_column: bool | None) -> None:
        self.name, self.parse = name, _whole_numbers if role == "target" else _numbers
        records = _records(stream, name)
        head = list(islice(records, _SAMPLE))
        if not head:
            raise FileError(f"{name} is empty")
        line, first = head[0]
        if index_column is None and len(first) > 1 and not first[0].strip():
            raise FileError(
                f"{name}, line {line} begins with an empty name, as above a column of row numbers: {_INDEX}"
            )
        if index_column:
            records = ((line, fields[1:]) for line, fields in chain(head, records))
            head = list(islice(records, _SAMPLE))
            first = head[0][1]
        self.columns = len(first)
        if not self.columns:
            raise FileError(f"{name}, line {line} has nothing beside its index column")
        if header is None:
            header = self._is_header(line, first, head[1][1] if len(head) > 1 else None, role)
        if header:
            head = head[1:]
            if not head:
                raise FileError(f"{name} has no rows below its names in line {line}")
        if index_column is None and _may_begin_with_an_index([fields for _, fields in head]):
            raise FileError(
                f"{name}, line {head[0][0]} begins with {head[0][1][0]!r}, which may be the first of a column of row "
                f"numbers or labels: {_INDEX}"
            )
        super().__init__(name, None, () if role != "logits" and self.columns == 1 else (self.columns,))
        self.records, self.lines = chain(head, records), [0]
        self.first = f"{name}, line {line} was read as {'names' if header else 'a row'}"

    def _is_header(self, line: int, first: list[str], second: list[str] | None, role: str) -> bool:
        numbers = sum(map(_is_number, first))
        separated = any(map(_holds_several, first))
        named = numbers == 0 and all(field.strip() for field in first)
        # Labels that begin with a number have no names above them: if they had, they would be one too many.
        listed = role == "logits" and (_counts_up(first) or (_are_whole(first) and not _are_whole(second or first)))
        if separated or not (named or (numbers == len(first) and not listed)):
            raise FileError(
                f"{self.name}, line {line} may be names or a row: {_shown(first)}. "
                + (_SEPARATED if separated else f"Say with --header which files begin with names {_FILES}")
            )
        return named

    def read(self, n: int) -> Array:
        rows: list[list[float]] = []
        self.lines = []
        with _blaming(self.name):
            for line, fields in islice(self.records, n):
                try:
                    values = self.parse(fields)
                except ValueError:
                    values = []
                if len(values) != self.columns:
                    self._refuse(line, fields)
                rows.append(values)
                self.lines.append(line)
        return np.array(rows, np.int64 if self.parse is _whole_numbers else np.float64).reshape(-1, *self.shape)

    def _refuse(self, line: int, fields: list[str]) -> None:
        rule = f"{self.columns} {'whole ' if self.parse is _whole_numbers else ''}number{'s'[: self.columns - 1]}"
        hint = f". {_SEPARATED}" if any(map(_holds_several, fields)) else ""
        raise FileError(f"{self.name}, line {line}: expected {rule}, got {_shown(fields)}{hint}")

    def place(self, i: int) -> str:
        return f"{self.name}, line {self.lines[i]}"


def _records(stream: IO[str], name: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record and the number of its last line; empty lines may only end the file."""
    reader, empty = csv.reader(_lines(stream, name), strict=True), 0
    try:
        for fields in reader:
            if fields and empty:
                raise FileError(f"{name}, line {empty} is empty, and rows follow it: a value may be missing")
            if fields:
                yield reader.line_num, fields
            else:
                empty = empty or reader.line_num
    except csv.Error as error:
        raise FileError(f"{name}, line {reader.line_num}: {error}") from error


def _lines(stream: IO[str], name: str) -> Iterator[str]:
    for number in count(1):
        line = stream.readline(_LONGEST_LINE)
        if not line:
            return
        if wrong := re.search("[\0\udc80-\udcff]", line):
            byte = ord(wrong[0]) % 256
            raise FileError(f"{name}, line {number} is not text in UTF-8, which the file must be: it holds {byte:#04x}")
        if len(line) == _LONGEST_LINE:
            raise FileError(f"{name}, line {number} is longer than {_LONGEST_LINE} characters")
        yield line


def _numbers(fields: list[str]) -> list[float]:
    if "_" in "".join(fields):  # Python reads 1_2 as 12, where it may be a name
        raise ValueError
    return [float(field) for field in fields]


def _whole_numbers(fields: list[str]) -> list[float]:
    values = _numbers(fields)  # also of 7.0 and 7.000e+00
    if not all(value.is_integer() and abs(value) <= 2**53 for value in values):
        raise ValueError
    return values


def _is_number(field: str) -> bool:
    try:
        _numbers([field])
    except ValueError:
        return False
    return True


def _holds_several(field: str) -> bool:
    """Numbers that another separator than the comma divides."""
    parts = re.split(r"[;|\s]+", field.strip())
    return len(parts) > 1 and all(map(_is_number, parts))


def _are_whole(fields: list[str]) -> bool:
    """Written without a point or an exponent, as few logits are."""
    return all(re.fullmatch(r"\s*-?\d+\s*", field) for field in fields)


def _counts_up(fields: list[str]) -> bool:
    return _are_whole(fields) and all(int(field) == i for i, field in enumerate(fields, int(fields[0])))


def _may_begin_with_an_index(rows: list[list[str]]) -> bool:
    """Two rows or more, whose first fields count up, or are the only ones that are whole numbers."""
    column, others = [row[0] for row in rows], [field for row in rows for field in row[1:]]
    if len(rows) < 2 or not others:
        return False
    return _counts_up(column) or (_are_whole(column) and not any(_are_whole([field]) for field in others))


def _shown(fields: list[str]) -> str:
    return repr(",".join(fields).strip()[:60])
