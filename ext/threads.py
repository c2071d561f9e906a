"""A kernel's rows, shared between threads."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

from . import _cpu

# Waking a thread costs about as much as 131,072 logits; more while another library's threads are spinning.
LOGITS_WORTH_A_THREAD = 1 << 17
WORTH_THREADS = 2 * LOGITS_WORTH_A_THREAD  # asked before `in_threads` is called, which takes 0.3 us of a call's 5


def in_threads(job: _cpu.KernelCall | _cpu.BinaryCall | _cpu.PosteriorCall, threads: int | None) -> int:
    """Run the job; the first row whose class does not exist, or -1."""
    parts = job.n * job.k // LOGITS_WORTH_A_THREAD
    if parts < 2 or (parts := min(threads or os.cpu_count() or 1, parts)) < 2:
        return job.run(0, job.n)
    global _pool
    edges = [job.n * i // parts for i in range(parts + 1)]
    left, wrong = list(pairwise(edges)), list[int]()

    def work() -> None:
        while left:
            try:
                part = left.pop()
            except IndexError:  # another thread took the last one
                return
            wrong.append(job.run(*part))

    helpers = list[Future[None]]()
    try:
        _pool = _pool or ThreadPoolExecutor()
        # No thread may be had: the system has none to give, or the interpreter is ending. Then the others do its part.
        with suppress(RuntimeError):
            helpers += (_pool.submit(work) for _ in range(parts - 1))
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    finally:
        left.clear()  # after an error no part is begun any more
    return min((row for row in wrong if row >= 0), default=-1)


def _forget_threads() -> None:
    global _pool
    _pool = None


_pool: ThreadPoolExecutor | None = None
os.register_at_fork(after_in_child=_forget_threads)  # a child has none of its parent's threads
