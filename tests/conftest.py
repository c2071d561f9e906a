"""Where tests run: on the CPU and, where there is one, on a GPU.

With TRITON_INTERPRET=1, which has to be set before Triton is imported, the GPU's kernels run on CPU tensors instead:
`test_gpu.py` starts pytest so, for the tests that take a device.
"""

import os

import numpy as np
import pytest
import torch

from lace_loss.ext import torch as lace_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    if request.param == "cuda" and not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if request.param == "cpu" or not INTERPRETED:
        yield request.param
        return
    monkeypatch.setattr(lace_torch, "_on_gpu", lambda input: True)
    monkeypatch.setattr(lace_torch, "_triton_serves", lambda device: True)
    lace_torch._registered_backward.register_kernel("cpu")(lace_torch._backward)
    with np.errstate(all="ignore"):  # the interpreter is NumPy
        yield "cpu"
