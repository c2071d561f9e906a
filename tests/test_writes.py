"""Whichever write, sync or rename of a run fails, it stops with a sentence, and then goes on to the same bytes."""

import errno
import os
from pathlib import Path

import pytest
import torch
from kills import RECORD, figures, weights

from lace_loss.train.__main__ import main

RUN = ["--device", "cpu", "--threads", "1", "--loss", "lace", "--width", "1", "--epochs", "1"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """`--threads` is the process's, and the next tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Failing:
    """`fsync` and `replace` of os, of which the n-th call fails; n counts both."""

    def __init__(self, monkeypatch, n):
        self.calls, self.n = 0, n
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, right):
        def call(*arguments):
            self.calls += 1
            if self.calls == self.n:
                raise OSError(errno.ENOSPC, "No space left on device")
            return right(*arguments)

        return call


def test_a_run_survives_the_failure_of_each_of_its_writes(tmp_path: Path, monkeypatch, capsys):
    whole = tmp_path / "whole" / RECORD
    with monkeypatch.context() as patch:
        counter = Failing(patch, 0)
        assert main([*RUN, "--out", str(whole.parent)]) == 0
    assert counter.calls > 6
    for n in range(1, counter.calls + 1):
        record = tmp_path / str(n) / RECORD
        with monkeypatch.context() as patch:
            Failing(patch, n)
            capsys.readouterr()
            status = main([*RUN, "--out", str(record.parent)])
        said = capsys.readouterr().err
        assert status == 2 and "No space left on device" in said and str(record.parent) in said, (n, said)
        assert not list(record.parent.glob("*.tmp")), n
        assert main([*RUN, "--out", str(record.parent)]) == 0
        assert figures(record) == figures(whole), n
        assert weights(record) == weights(whole), n
