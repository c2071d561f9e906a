"""The GPU's kernels of labels as machine code, compiled for processors not here. Their values: test_binary_torch.py."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this machine")
from benchmarks import gpu_counts
from triton.backends.compiler import GPUTarget

from lace_loss.ext.torch import binary_gpu

# Instructions a label, forward and backward. An H100 issues 68 and 102 while it moves 8 and 12 bytes of float32, and
# half as many for those of a half type: but for float32's backward pass these kernels wait for instructions.
MOST = {torch.float32: (83, 100), torch.bfloat16: (84, 100)}


def launches(dtype, weighted):
    """Of a step with the mean of 2^20 rows of 80 labels."""
    z = torch.empty(1 << 20, 80, dtype=dtype, device="meta")
    w = torch.empty(80, dtype=torch.float32, device="meta") if weighted else None
    found = []

    def launch(kernel, programs, warps, _, *arguments):
        found.append(gpu_counts.Launch(kernel, programs, warps, arguments))

    with gpu_counts.replaced(binary_gpu, "launch", launch):
        row = 80 if weighted else 1
        binary_gpu.forward(z, z, None, w, row, "mean", 1.0)
        binary_gpu.backward(z.new_empty((), dtype=torch.float32), z, z, None, w, row, "mean", 1.0)
    return found


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_kernels_keep_to_registers_and_know_no_float64(dtype, weighted, arch):
    target = GPUTarget(*(("hip", arch, 64) if arch == "gfx942" else ("cuda", arch, 32)))
    for launch in launches(dtype, weighted):
        binary = gpu_counts.compiled(launch, target)
        if arch == "gfx942":
            text = binary.asm["amdgcn"]
            assert "_f64" not in text
            assert re.search(r"\.vgpr_spill_count: +0\n", text)
        else:
            assert ".f64" not in binary.asm["ptx"]
            code = gpu_counts.Code(binary)
            assert code.stack == 0
            assert weighted or any(name.startswith("LDG.E.128") for _, name, _ in code.instructions)


@pytest.mark.parametrize(("dtype", "most"), MOST.items(), ids=str)
def test_a_label_costs_so_many_instructions(dtype, most):
    for launch, instructions in zip(launches(dtype, False), most, strict=True):
        code = gpu_counts.Code(gpu_counts.compiled(launch, GPUTarget("cuda", 90, 32)))
        counted = code.executed([]) * launch.programs * launch.warps * 32 / (80 << 20)  # no loop
        print(f"{launch.kernel.__name__} {dtype}: {counted:.1f} instructions a label, {code.registers} registers")
        assert instructions / 2 < counted <= instructions
