"""Where tests run: on the CPU and, where there is one, on a GPU.

With TRITON_INTERPRET=1, which has to be set before Triton is imported, the GPU's kernels run on CPU tensors instead:
`test_gpu.py` starts pytest so, for the tests that take a device.
"""

import importlib
import os

import numpy as np
import pytest
import torch

from lace_loss.ext import torch as lace_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def as_a_gpu_does(monkeypatch, interpreter):
    """Triton's interpreter rounds the product of a multiply-add, too, and up to 3.6 the smaller of NaN and 1 is NaN."""
    builder = interpreter.InterpreterBuilder

    def fused(_, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(builder, "create_fma", fused)
    monkeypatch.setattr(builder, "create_minnumf", lambda self, x, y: self.binary_op(x, y, np.fmin))
    monkeypatch.setattr(builder, "create_maxnumf", lambda self, x, y: self.binary_op(x, y, np.fmax))


@pytest.fixture
def a_gpu(monkeypatch):
    """The device for tensors that a GPU's kernels shall work on."""
    if INTERPRETED:
        as_a_gpu_does(monkeypatch, importlib.import_module("triton.runtime.interpreter"))
        monkeypatch.setattr(lace_torch, "_on_gpu", lambda input: input.is_cpu)
        monkeypatch.setattr(lace_torch, "_are_usual", lambda *_: False)
        monkeypatch.setattr(lace_torch, "_triton_serves", lambda device: True)
        lace_torch._registered_backward.register_kernel("cpu")(lace_torch._backward)
        with np.errstate(all="ignore"):  # the interpreter is NumPy
            yield "cpu"
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    return "cpu" if request.param == "cpu" else request.getfixturevalue("a_gpu")


@pytest.fixture(params=["kernel", "composite"])
def path(request, monkeypatch):
    """What serves `lace_loss`."""
    if request.param == "composite":
        for question in ("_are_usual", "_kernel_applies"):
            monkeypatch.setattr(lace_torch, question, lambda *_: False)
    return request.param
