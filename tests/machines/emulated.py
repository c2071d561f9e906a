"""A driver for Triton that has no GPU: kernels are compiled as for one and run by `ptx.py`, on tensors of the CPU."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from lace_loss.ext.torch import gpu

from . import ptx

# Compilers and others that record what runs call them for tensors of the CPU, too.
gpu.registered_forward.register_kernel("cpu")(gpu.forward_without_none)
gpu.registered_backward.register_kernel("cpu")(gpu.backward)


def tensor(x):
    """What a kernel may use of memory."""
    if isinstance(x, torch.Tensor):
        last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        return ptx.Tensor(x.data_ptr(), (last + 1) * x.element_size() if x.numel() else 0, x.element_size())
    return x


class Driver(DriverBase):
    """Launches of Triton go here while it is active. It counts them, and with them what ran."""

    def __init__(self, arch=90, ex2_error=0.0):
        self.arch, self.ex2_error = arch, ex2_error
        self.utils = self

    def is_active(self):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448}

    def load_binary(self, name, kernel, shared, device):
        """Module, function, registers, spilled ones, and the most threads."""
        return self, (decoded(kernel), shared), 0, 0, 1024

    def unload_module(self, module):
        pass

    def launcher_cls(self, source, metadata):
        """A function that launches one compiled kernel."""
        passed = [kind != "constexpr" for kind in source.signature.values()]

        def launch(x, y, z, stream, function, packed, launch_metadata, before, after, *arguments):
            kernel, shared = function
            given = [a for a, as_argument in zip(arguments, passed, strict=True) if as_argument]
            # After its own arguments a kernel has two pointers to scratch memory, of which these use none.
            triton.runtime.driver.active.run(kernel, x, [*given, 0, 0], shared)

        return launch

    def run(self, kernel, programs, arguments, shared):
        kernel.run(programs, [tensor(x) for x in arguments], shared, self.ex2_error)


@cache
def decoded(text):
    return ptx.Kernel(text.decode())


def stop_at_ptx(self=None, stages=None, *_):
    """In the place of ptxas, which takes a third of the time of compiling and is of no use here."""
    if stages is not None:
        stages["cubin"] = lambda text, metadata: text.encode()
    return "ptx", "ptx"


@contextmanager
def active(driver):
    """Launches go to the driver, `lace_loss` launches for tensors of the CPU, and new tensors are filled with NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "on_gpu", lambda input: input.is_cpu)
        patch.setattr(gpu, "triton_supported", lambda device: True)
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", stop_at_ptx)
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield driver
        finally:
            torch.use_deterministic_algorithms(deterministic)
