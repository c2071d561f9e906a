"""Where tests run: on the CPU and on a GPU or, where there is none, an emulator of one, with tensors of the CPU."""

from importlib import import_module

import pytest
import torch

from lace_loss.ext import torch as lace_torch


@pytest.fixture
def a_gpu():
    """The device for tensors that a GPU's kernels shall work on."""
    if torch.cuda.is_available():
        yield "cuda"
    else:
        pytest.importorskip("triton", reason="no Triton on this machine")
        emulated = import_module("machines.emulated")
        with emulated.active(emulated.Driver()):
            yield "cpu"


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return "cpu" if request.param == "cpu" else request.getfixturevalue("a_gpu")


@pytest.fixture(params=["kernel", "composite"])
def path(request, monkeypatch):
    """What serves `lace_loss`."""
    if request.param == "composite":
        monkeypatch.setattr(lace_torch, "_kernel", lambda *_: None)
    return request.param
