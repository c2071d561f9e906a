"""Certify implementations of LACE against the golden vectors.

    python -m lace_loss.ref                     every implementation installed here, in one table
    python -m lace_loss.ref check MODULE:FN     a port in Python: FN(logits, target, **options) -> (loss, gradient);
                                                MODULE may be a file's path
    python -m lace_loss.ref check --command CMD a port in anything (the protocol is in ref/vectors/README.md)
    python -m lace_loss.ref peers               what people use today, where installed, in a Markdown table

Exit status: 0 if all hold, 1 if a value is wrong, 2 if an answer or the vectors could not be used.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from . import loss as definition
from .case import FORMATS, HALF_LEVELS, LEVELS, VECTORS, Answer, Case, VectorError, read
from .check import Implementation, PortError, Result, answers_of, explain, judge, python_port, run
from .peers import compare

FAILURES_SHOWN = 5


def vectors(folder: Path, dtypes: list[str], levels: list[str]) -> dict[str, list[Case]]:
    """Cases by file name, of the files that exist for these dtypes and levels."""
    names = [f"{d}-{level}.txt" for d in dtypes for level in levels if d in ("f64", "f32") or level in HALF_LEVELS]
    if not names:
        raise VectorError(f"there are no vectors for {', '.join(dtypes)} at {', '.join(levels) or 'no level'}")
    return {name: read(folder / name) for name in names}


def by_reference(case: Case) -> Answer:
    options = case.options
    g = 1.0 if case.grad_output is None else case.grad_output
    try:
        if case.level == "second":
            return {"product": definition.hessian_vector_product(case.logits, case.target, case.vector, g, **options)}
        return {
            "loss": np.asarray(definition.forward(case.logits, case.target, **options)),
            "gradient": definition.backward(case.logits, case.target, g, **options),
        }
    except IndexError:
        return None


def in_torch(function: Any, dtype: str, device: str) -> Implementation:
    """`function(input, target, weight, **options)` of torch, with autograd's gradient and its gradient."""
    import torch

    kind = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]

    def tensor(values: Any) -> Any:
        values = torch.from_numpy(np.ascontiguousarray(values)).to(device)
        return values.to(kind) if values.is_floating_point() else values

    def answer(case: Case) -> Answer:
        options = case.options
        weight = options.pop("weight", None)
        weight = None if weight is None else tensor(weight)
        input = tensor(case.logits).reshape(case.shape).requires_grad_()
        try:
            loss = function(input, tensor(case.target).reshape(case.target.shape), weight, **options)
        except IndexError:
            return None
        g = torch.ones_like(loss) if case.grad_output is None else tensor(case.grad_output).reshape(loss.shape)
        (gradient,) = torch.autograd.grad(loss, input, g, create_graph=case.level == "second")
        found = {"loss": loss, "gradient": gradient}
        if case.level == "second":
            (found["product"],) = torch.autograd.grad(gradient, input, tensor(case.vector).reshape(case.shape))
        return {key: value.detach().double().cpu().numpy() for key, value in found.items()}

    return answer


def installed() -> Iterator[tuple[str, str, list[str], float, Implementation | str]]:
    """Name, dtype, levels, whether plain tolerances apply or how many times the others, and the implementation or why
    it cannot run.
    """
    first = [level for level in LEVELS if level != "second"]
    yield "ref", "f64", list(LEVELS), False, by_reference
    try:
        from lace_loss import ext
    except ImportError as error:
        yield "ext", "", [], False, str(error)
    else:
        yield "ext", "f64", first, False, python_port(ext.forward_backward)
        yield "ext", "f32", first, False, python_port(ext.forward_backward)
    try:
        import torch

        from lace_loss.ext import torch as lace
    except ImportError as error:
        yield "torch", "", [], False, str(error)
        return

    def composite(input: Any, target: Any, weight: Any, **options: Any) -> Any:
        given: dict[str, Any] = {
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "strength": 1.0,
        } | options
        if target.shape != input.shape:
            lace.check_target(target, input.shape[lace._class_axis(input)], given["ignore_index"])
        return lace._composite(input, target, weight, **given).to(input.dtype)

    for dtype in ("f64", "f32", "f16", "bf16"):
        yield "torch CPU", dtype, first, False, in_torch(lace.lace_loss, dtype, "cpu")
    for dtype in ("f64", "f32", "f16", "bf16"):
        yield "composite", dtype, list(LEVELS), True, in_torch(composite, dtype, "cpu")
    if torch.cuda.is_available():
        # 16 ulp of float32; halves are rounded once, and float64 takes the composite form.
        for dtype, plain in (("f64", True), ("f32", 4), ("f16", False), ("bf16", False)):
            yield "torch CUDA", dtype, first, plain, in_torch(lace.lace_loss, dtype, "cuda")
        for dtype in ("f64", "f32", "f16", "bf16"):
            yield "composite CUDA", dtype, list(LEVELS), True, in_torch(composite, dtype, "cuda")
    else:
        yield "torch CUDA", "", [], True, "torch sees no CUDA device"


def cross_validate(folder: Path) -> int:
    """Print category x implementation: the worst error of loss, gradient and product in ulp."""
    columns: dict[str, dict[str, list[Result]]] = {}
    not_run: list[str] = []
    for name, dtype, levels, plain, implementation in installed():
        if isinstance(implementation, str):
            not_run.append(f"{name}: not run, {implementation}")
            continue
        results = [
            result
            for cases in vectors(folder, [dtype], levels).values()
            for result in run(implementation, cases, plain)
        ]
        columns[f"{name} {dtype}"] = by_category(results)
    table(columns)
    for line in not_run:
        print(line)
    failed = [(name, r) for name, found in columns.items() for rs in found.values() for r in rs if not r.holds]
    for name, result in failed[:FAILURES_SHOWN]:
        print(f"\n{name}: {explain(result)}")
    cases = sum(len(results) for found in columns.values() for results in found.values())
    print(f"\n{cases} cases, {len(failed)} failed")
    return 1 if failed else 0


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
    worst = [
        max((r.errors[q] for r in results if q in r.errors), default=None) for q in ("loss", "gradient", "product")
    ]
    numbers = " / ".join("-" if error is None else f"{error:.2g}" for error in worst)
    return numbers if all(r.holds for r in results) else f"{numbers} x"


def check(args: argparse.Namespace) -> int:
    """Certify one port: print each level's result and the first failures."""
    if (args.port is None) == (args.command is None):
        raise PortError("give either MODULE:FN or --command")
    levels = [level for level in args.levels if level != "second" or args.product or args.port is None]
    if len(levels) < len(args.levels):
        print("second: not checked, it needs --product")
    failed = 0
    files = vectors(args.vectors, args.dtypes, levels)
    # A program is started for each file, a port in Python is imported once for all.
    in_python = None
    if args.command is None:
        functions = [args.port] if args.product is None else [args.port, args.product]
        in_python = answers_of(functions, [case for cases in files.values() for case in cases], args.timeout)
    for name, cases in files.items():
        answers = list(islice(in_python, len(cases)) if in_python else answers_of(args.command, cases, args.timeout))
        results = [judge(case, answer, args.plain, args.flushed) for case, answer in zip(cases, answers, strict=True)]
        wrong = [result for result in results if not result.holds]
        for result in wrong[: max(0, FAILURES_SHOWN - failed)]:
            print(explain(result))
        failed += len(wrong)
        print(f"{name:<18} {len(cases):>4} cases, {len(wrong)} failed; worst ulp {cell(results)}")
    if in_python:
        next(in_python, None)  # raises where it does not end well
    return 1 if failed else 0


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
    top = argparse.ArgumentParser(
        "python -m lace_loss.ref", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument(
        "--vectors", type=Path, default=VECTORS, help="folder of golden vectors; default: the shipped ones"
    )
    commands = top.add_subparsers(dest="what")
    port = commands.add_parser("check", help="certify a port")
    port.add_argument("port", nargs="?", metavar="MODULE:FN", help="FN(logits, target, **options) -> (loss, gradient)")
    port.add_argument("--command", help="a program that reads cases on standard input")
    port.add_argument("--product", metavar="MODULE:FN", help="FN(logits, target, vector, **options) -> Hessian product")
    port.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), help="default: all")
    port.add_argument("--dtypes", nargs="+", choices=list(FORMATS), default=["f64", "f32"], help="default: f64 f32")
    port.add_argument("--plain", action="store_true", help="allow what a plain implementation loses with the margin")
    port.add_argument(
        "--flushed", action="store_true", help="allow what is lost where subnormal numbers are taken for 0"
    )
    port.add_argument(
        "--timeout", type=seconds, default=60, help="seconds until the next answer, or the end; default %(default)s"
    )
    commands.add_parser("peers", help="compare with what people use today")
    return top


def main(arguments: list[str]) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.what == "peers":
            return compare(args.vectors)
        return check(args) if args.what == "check" else cross_validate(args.vectors)
    except (VectorError, PortError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    # Who ends the checker ends the port, too, which is in a session of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
