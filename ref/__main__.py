"""Certify implementations of LACE against the golden vectors.

    python -m lace_loss.ref                     every implementation installed here, in one table
    python -m lace_loss.ref check MODULE:FN     a port in Python; MODULE may be a file's path
    python -m lace_loss.ref check --torch MODULE:NAME
                                                a loss with PyTorch's signature, and its autograd gradient
    python -m lace_loss.ref check --command CMD a port in anything (the protocol is in ref/vectors/README.md)

Exit status: 0 if all hold, 1 if a value is wrong, 2 if an answer or the vectors could not be used.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from itertools import islice
from pathlib import Path
from textwrap import fill

from .case import FORMATS, HALF_LEVELS, LEVELS, VECTORS, Case, VectorError, read
from .check import PortError, Result, answers_of, judge, run
from .installed import installed
from .margins import MARGINS, margins_of
from .verdict import causes, explain, grade, lines_of, unsupported, worst

# What a port gets.
CALLED = """
MODULE:FN is called as FN(logits, target, **options) and returns (loss,
gradient). It gets NumPy arrays: logits of shape (C,), (N, C) or (N, C, d1, ...)
in float64, float32 or float16 (bfloat16 values come as float32); target, int64
class indices, or probabilities of the logits' shape and type. The options are
always reduction ("none", "mean" or "sum"), and where the case has them weight
(C values), ignore_index, label_smoothing, strength and grad_output: numbers
that multiply the gradient, one a sample for "none", else one. For an index that
is no class FN must raise an error, or give NaN. An FN without `reduction` is
asked for a mean and for one row. Where FN does not take another option, or
raises NotImplementedError, the verdict says "not supported", which is no pass.

--torch MODULE:NAME names a class, constructed with the options and called as
loss(input, target), or a function called as NAME(input, target, **options), on
tensors of the file's type; grad_output goes into autograd. One row is given as
a batch of one, but at the level layout.

A grade: "exact" is within the vectors' tolerances; "plain" within what an
implementation without compensation loses with the margin; "flushed" means that
subnormal numbers were taken for 0. Exit status 0 asks for exact, unless --plain
or --flushed allow more.
"""


def vectors(folder: Path, dtypes: list[str], levels: list[str]) -> dict[str, list[Case]]:
    """Cases by file name, of the files that exist for these dtypes and levels."""
    names = [f"{d}-{level}.txt" for d in dtypes for level in levels if d in ("f64", "f32") or level in HALF_LEVELS]
    if not names:
        raise VectorError(f"there are no vectors for {', '.join(dtypes)} at {', '.join(levels) or 'no level'}")
    return {name: read(folder / name) for name in names}


def cross_validate(folder: Path, full: bool = False) -> int:
    """Print a row for each implementation, or a table of the worst errors of each category."""
    columns: dict[str, list[Result]] = {}
    not_run: list[str] = []
    for name, dtype, levels, plain, implementation in installed():
        if isinstance(implementation, str):
            not_run.append(f"{name}: not run, {implementation}")
            continue
        files = vectors(folder, [dtype], levels).values()
        columns[f"{name} {dtype}"] = [result for cases in files for result in run(implementation, cases, plain)]
    if full:
        table({name: by_category(results) for name, results in columns.items()})
    else:
        rows(columns)
    for line in not_run:
        print(line)
    failed = [(name, result) for name, results in columns.items() for result in results if not result.holds]
    for name, results in columns.items():
        if wrong := [result for result in results if not result.holds]:
            print()
            say_why(f"{name}: ", results, wrong)
    print(f"\n{sum(map(len, columns.values()))} cases, {len(failed)} failed")
    return 1 if failed else 0


def rows(columns: dict[str, list[Result]]) -> None:
    print("Grade, cases, worst error in ulp of loss / gradient / product and its category.\n")
    for name, results in columns.items():
        most = max(results, key=lambda result: max(result.errors.values(), default=0.0))
        failed = sum(not result.holds for result in results)
        verdict = f"{failed} wrong" if failed else grade(results) or "in bounds"
        print(f"{name:<19} {verdict:<9} {len(results):>5}  {worst(results):<22} {most.case.category}")


def by_category(results: list[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.case.category, []).append(result)
    return found


def table(columns: dict[str, dict[str, list[Result]]]) -> None:
    categories = sorted({category for found in columns.values() for category in found})
    widths = {name: max(16, len(name)) for name in columns}
    first = max(map(len, categories))
    print("Worst error in ulp of loss / gradient / Hessian product. x: the category fails, -: it has no cases.\n")
    print(" " * first, *(f"{name:>{width}}" for name, width in widths.items()), sep="  ")
    for category in categories:
        cells = (f"{cell(columns[name].get(category, [])):>{width}}" for name, width in widths.items())
        print(f"{category:<{first}}", *cells, sep="  ")


def cell(results: list[Result]) -> str:
    if not results:
        return "-"
    return worst(results) if all(r.holds for r in results) else f"{worst(results)} x"


def say_why(name: str, results: list[Result], wrong: list[Result]) -> None:
    """Print the likely causes, each with the case that shows it best, or a case where no cause is found."""
    found = causes(results)
    for cause in found:
        sentence = f"{name}likely cause of {cause.votes} of {cause.wrong} wrong cases: {cause.sentence}"
        print(fill(sentence, 80, break_on_hyphens=False), explain(cause.shown), sep="\n")
    if not found:
        shown = min(wrong, key=lambda result: len(result.case.question))
        sentence = f"{name}no known mistake explains most of the wrong cases; the shortest of them:"
        print(fill(sentence, 80, break_on_hyphens=False), explain(shown), sep="\n")


def check(args: argparse.Namespace) -> int:
    """Certify one port: print each level's verdict, then the likely cause of what is wrong."""
    if [args.port, args.command, args.torch].count(None) != 2:
        raise PortError("give either MODULE:FN, --torch MODULE:NAME or --command")
    if args.product is not None and args.port is None:
        raise PortError("--product goes with MODULE:FN")
    levels = args.levels or [level for level in LEVELS if level != "second" or args.product or args.command]
    if "second" in levels and args.port is not None and args.product is None:
        raise PortError("the level second needs --product")
    in_words = [name for name in (args.port, args.product) if name is not None] or ["--torch", args.torch]
    port: str | list[str] = in_words if args.command is None else args.command
    files = vectors(args.vectors, args.dtypes, levels)
    # A program is started for each file, a port in Python is imported once for all.
    in_python = None
    if args.command is None:
        in_python = answers_of(port, [case for cases in files.values() for case in cases], args.timeout)
    results: dict[str, list[Result]] = {}
    problem = None  # what ended the answers
    try:
        for name, cases in files.items():
            answers = list(islice(in_python, len(cases)) if in_python else answers_of(port, cases, args.timeout))
            pairs = zip(cases, answers, strict=True)
            results[name] = [judge(case, answer, args.plain, args.flushed) for case, answer in pairs]
            print(*lines_of(name, results[name]), sep="\n", flush=True)
        if in_python:
            next(in_python, None)  # raises where it does not end well
    except PortError as error:
        problem = error
    every = [result for found in results.values() for result in found]
    missing = unsupported(every)
    failed = [result for result in every if not result.holds and result not in missing]
    confident = {result.case.dtype for result in failed if result.case.category == "q-to-1"}
    for level in [level for level in ("gradient", "core") if level in levels][:1]:
        for dtype in [dtype for dtype in MARGINS if dtype in confident]:
            print(margins_of(port, dtype, level, args.timeout))
    if failed:
        say_why("", every, failed)
        if grade([result for result in every if result not in missing]) and not (args.plain or args.flushed):
            print("Not exact: exit status 1. With --plain, or --flushed, such a grade is enough.")
    if missing:
        print(f"{len(missing)} cases were not checked: what they ask for is not supported.")
    if problem:
        raise problem
    return 1 if failed else 2 if missing else 0


def seconds(word: str) -> float:
    """Those of --timeout: a day at most, since threads cannot wait for any number of them."""
    try:
        found = float(word)
    except ValueError:
        found = 0.0
    if not 0 < found <= 86400:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of seconds above 0 and up to 86400")
    return found


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "python -m lace_loss.ref", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    top.add_argument(
        "--vectors", type=Path, default=VECTORS, help="folder of golden vectors; default: the shipped ones"
    )
    top.add_argument("--full", action="store_true", help="the worst errors of every category")
    commands = top.add_subparsers(dest="what")
    port = commands.add_parser(
        "check", help="certify a port", description=CALLED, formatter_class=raw, allow_abbrev=False
    )
    port.add_argument("port", nargs="?", metavar="MODULE:FN", help="FN(logits, target, **options) -> (loss, gradient)")
    port.add_argument("--torch", metavar="MODULE:NAME", help="a class or function with PyTorch's signature")
    port.add_argument("--command", help="a program that reads cases on standard input")
    port.add_argument("--product", metavar="MODULE:FN", help="FN(logits, target, vector, **options) -> Hessian product")
    port.add_argument(
        "--levels",
        nargs="+",
        choices=LEVELS,
        metavar="LEVEL",
        help=f"of {', '.join(LEVELS)}; default: all, but second where nothing gives it",
    )
    port.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(FORMATS),
        metavar="DTYPE",
        default=["f64", "f32"],
        help="of f64, f32, f16, bf16; default: f64 f32",
    )
    port.add_argument("--plain", action="store_true", help="allow what a plain implementation loses with the margin")
    port.add_argument(
        "--flushed", action="store_true", help="allow what is lost where subnormal numbers are taken for 0"
    )
    port.add_argument(
        "--timeout", type=seconds, default=60, help="seconds until the next answer, or the end; default %(default)s"
    )
    return top


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    try:
        return check(args) if args.what == "check" else cross_validate(args.vectors, args.full)
    except BrokenPipeError:
        raise
    except (VectorError, PortError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # Who ends the checker ends the port, too, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 2
    sys.exit(status)
