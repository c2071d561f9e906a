"""Answer cases on standard input by functions in Python: python -m lace_loss.ref.answer [--torch] MODULE:FN [MODULE:FN]

The checker starts it and asks it as it asks any program, so that nothing a port does to its process may look like a
pass. The second function gives the products. With --torch the function, or class, has PyTorch's signature.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .case import Answer, Case, Unsupported
from .check import Implementation, PortError, call, taken
from .installed import in_torch


def imported(name: str) -> Callable[..., Any]:
    """What MODULE:FN names, with a file FOLDER/MODULE.py as well; else the working folder is searched first."""
    module, _, attribute = name.rpartition(":")
    file = Path(module)
    is_file = file.suffix == ".py"
    problem = f"{name!r} is not a MODULE:FN that imports"
    if not module or not attribute:
        raise PortError(f"{problem}: it has no function after a colon, as in 'port.py:answer'")
    if is_file and not file.is_file():
        raise PortError(f"{problem}: there is no file {module!r}")
    if is_file and not file.stem.isidentifier():
        raise PortError(f"{problem}: Python cannot import {file.name!r}, rename it to letters, digits and '_'")
    sys.path.insert(0, str(file.parent) if is_file else "")
    try:
        function = getattr(importlib.import_module(file.stem if is_file else module), attribute)
    except (Exception, SystemExit) as error:
        raise PortError(f"{problem}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise PortError(f"{problem}: it is of type {type(function).__name__}, not a function")
    return function


def asked(lines: Iterable[str]) -> Iterator[Case]:
    """Cases of the files that follow one another, without the expected values."""
    words: dict[str, list[str]] = {}
    dtype = level = ""
    for line in lines:
        key, *rest = line.split()
        if key == "case":
            words = {}
        elif key == "dtype":
            dtype = rest[0]
        elif key == "level":
            level = rest[0]
        words[key] = rest
        if key == "end":
            yield Case("", dtype, level, int(words["case"][0]), words["case"][1], words, "")


def of_torch(loss: Any) -> Implementation:
    """A class that is constructed with the options, or a function that takes them, called on tensors.

    Many take (N, C) alone: the one row of a case is a batch of one, but at the level layout, which asks for (C,).
    """

    def answer(case: Case) -> Answer:
        alone = len(case.shape) == 1 and case.level != "layout"

        def losses(input: Any, target: Any, weight: Any, **options: Any) -> Any:
            options = taken(loss, options | ({} if weight is None else {"weight": weight}), case)
            if alone:
                input, target = input[None], target[None]
            found = loss(**options)(input, target) if isinstance(loss, type) else loss(input, target, **options)
            return found.reshape(case.shape_of("loss")) if alone else found

        found = in_torch(losses, case.dtype, "cpu")(case)
        assert not isinstance(found, Unsupported)
        return found

    return answer


def lines_for(case: Case, answer: Implementation) -> list[str]:
    try:
        found = answer(case)
        assert isinstance(found, dict)
        return [" ".join([key, *map(pattern, case.compared(key, found[key]))]) for key in case.asked]
    except (Unsupported, NotImplementedError) as error:
        return [" ".join(f"unsupported {error}".split())]
    except Exception as error:
        return [" ".join(f"error {type(error).__name__}: {error}".split())]


def pattern(value: np.float64) -> str:
    return "nan" if np.isnan(value) else f"{value.view(np.uint64):016x}"


def main(names: list[str]) -> None:
    # What the port reads and prints is no part of the conversation.
    questions = os.fdopen(os.dup(0), encoding="ascii")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    functions = [imported(name) for name in names if name != "--torch"]
    answer = of_torch(functions[0]) if names[0] == "--torch" else lambda case: call(case, *functions)
    print("imported", "end", sep="\n", file=answers, flush=True)
    for case in asked(questions):
        print(f"case {case.number}", *lines_for(case, answer), "end", sep="\n", file=answers, flush=True)


def end(status: int, sentence: str = "") -> NoReturn:
    """At once: threads and exit handlers of the port have no part in it."""
    with contextlib.suppress(OSError):  # the port may have closed it
        os.write(2, sentence.encode(errors="backslashreplace"))
    os._exit(status)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PortError as error:
        end(2, str(error))
    except BaseException as error:
        end(2, f"{type(error).__name__}: {error}")
    end(0)
