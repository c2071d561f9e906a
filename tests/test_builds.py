"""The same bits from every build of the kernel, every number of threads, and after a fork."""

import hashlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from lace_loss import ext
from lace_loss.ext import _cpu


def results(threads=None):
    """Digest of losses and gradients of every kind of row and target, in both dtypes."""
    digest = hashlib.sha256()
    for dtype in (np.float32, np.float64):
        rng = np.random.default_rng(0)
        for n, k in ((1, 1), (1, 10), (37, 5), (33, 64), (70, 100), (3, 1000), (2, 40_000), (9200, 100)):
            logits = (rng.normal(size=(n, k)) * rng.choice([0.1, 3, 60], (n, 1))).astype(dtype)
            logits[0, 0] = -np.inf
            classes, y = rng.integers(0, k, n), rng.uniform(size=(n, k)).astype(dtype)
            classes[n // 2] = -100
            for target, options in (
                (classes, {}),
                (classes, {"weight": rng.uniform(size=k), "strength": 0.3, "reduction": "none"}),
                (classes, {"label_smoothing": 0.1}),
                (y, {}),
            ):
                loss, gradient = ext.forward_backward(logits, target, threads=threads, **options)
                digest.update(np.asarray(loss).tobytes() + gradient.tobytes())
        for shape in ((2, 19, 40, 7), (1, 5, 3), (1, 100, 65), (3, 19, 1), (2, 19, 160, 160)):
            images = (5 * rng.normal(size=shape)).astype(dtype)
            classes = rng.integers(0, shape[1], shape[:1] + shape[2:])
            classes.flat[1::5] = -100
            loss, gradient = ext.forward_backward(images, classes, threads=threads, weight=rng.uniform(size=shape[1]))
            digest.update(np.asarray(loss).tobytes() + gradient.tobytes())
        z = (rng.normal(size=(997, 301)) * rng.choice([0.1, 3, 60], (997, 1))).astype(dtype)
        z[0, :2] = np.inf, -np.inf
        for labels in (z > rng.normal(size=z.shape), rng.uniform(size=z.shape).astype(dtype)):
            for options in ({}, {"pos_weight": rng.uniform(size=301), "strength": 0.3, "reduction": "none"}):
                loss, gradient = ext.binary_forward_backward(z, labels, threads=threads, **options)
                digest.update(np.asarray(loss).tobytes() + gradient.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("build", _cpu.builds())
def test_every_build_gives_the_same_bits(build):
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_builds; print(test_builds.results())"
    command = [sys.executable, "-c", program, os.path.dirname(__file__)]
    done = subprocess.run(command, env={**os.environ, "LACE_BUILD": build}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == results()


def test_a_build_that_does_not_run_here_is_refused_by_name():
    command = [sys.executable, "-c", "import lace_loss.ext"]
    done = subprocess.run(command, env={**os.environ, "LACE_BUILD": "avx9000"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "LACE_BUILD must be one that this processor runs, baseline" in done.stderr
    assert "got 'avx9000'" in done.stderr


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_no_bit(threads):
    assert results(threads) == results(1)


def test_small_inputs_start_no_thread_and_large_ones_leave_none_busy():
    program = """
import threading, time, numpy as np
from lace_loss import ext
ext.forward(np.zeros((100, 100)), np.zeros(100, int))
assert threading.active_count() == 1, threading.enumerate()
z, y = np.zeros((4096, 1000), np.float32), np.zeros(4096, int)
ext.forward_backward(z, y, threads=2)
assert threading.active_count() > 1
before = time.process_time()
time.sleep(0.5)
assert time.process_time() - before < 0.05
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_child_of_a_process_with_threads_has_its_own():
    z, y = np.ones((4096, 100), np.float32), np.zeros(4096, int)
    expected = ext.forward(z, y)
    child = os.fork()
    if child == 0:
        watch = threading.Timer(30, os._exit, (1,))
        watch.start()
        os._exit(0 if ext.forward(z, y) == expected else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_callers_in_several_threads_do_not_disturb_one_another():
    rng = np.random.default_rng(0)
    cases = [(rng.normal(size=(3000, 200)).astype(np.float32), rng.integers(0, 200, 3000)) for _ in range(4)]
    expected = [ext.forward_backward(z, y)[1].tobytes() for z, y in cases]
    got = {}

    def call(i):
        for _ in range(5):
            got[i] = ext.forward_backward(*cases[i])[1].tobytes()

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [got[i] for i in range(4)] == expected
