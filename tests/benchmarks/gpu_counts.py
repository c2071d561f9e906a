"""What the GPU's kernels cost, counted in their machine code, without a GPU: a table for the results folder.

    python tests/benchmarks/gpu_counts.py > tests/benchmarks/results/gpu_counts.md

Each kernel is compiled as for an H100. Instructions a logit are those of all its threads: a loop's as often as it
runs, what a branch skips in a loop twice, for the first and the last block. Issue is the time in which the
multiprocessors can start so many instructions, 4 warps of them a clock each; memory is the time for the bytes that are
read and written once. A kernel takes the longer of both, or more: it may wait.
"""

import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from lace_loss.ext.torch import gpu, kernels

MULTIPROCESSORS, CLOCK, WARPS_A_CLOCK = 132, 1.755e9, 4
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
SHAPES = {
    "8192 x 128256": {},
    "8192 x 50257": {},
    "8192 x 50257 of 50304": {},
    "8192 x 128256, statistics": {"statistics": True},
    "8192 x 32000, smoothed": {"label_smoothing": 0.1},
    **{name: {} for name in ("65536 x 4160", "65536 x 513", "4096 x 1000", "1048576 x 256", "1048576 x 100")},
    **{name: {} for name in ("1048576 x 65", "1048576 x 10", "8192 x 65", "8192 x 100")},
    "100 x 100, statistics": {"statistics": True},
    **{name: {} for name in ("8 x 19 x 512 x 512", "8 x 150 x 512 x 512", "8 x 2 x 512 x 512")},
}


@dataclass
class Launch:
    """Of a kernel: what `gpu.launch` is told."""

    kernel: object
    programs: int
    warps: int
    arguments: tuple

    def __getitem__(self, name):
        return self.arguments[self.kernel.arg_names.index(name)]


@contextmanager
def replaced(object, name, value):
    before = getattr(object, name)
    setattr(object, name, value)
    try:
        yield
    finally:
        setattr(object, name, before)


def launches(z, **options):
    """What a forward and backward pass would launch for logits without memory."""
    found = []
    smoothing = options.get("label_smoothing", 0.0)
    weight = z.new_empty(z.shape[1], dtype=torch.float32) if smoothing else None
    target = z.new_empty(z.shape[:1] + z.shape[2:], dtype=torch.int64)
    given = (-100, "mean", smoothing, 1.0)
    with replaced(gpu, "launch", lambda kernel, n, warps, _, *rest: found.append(Launch(kernel, n, warps, rest))):
        outputs = gpu.forward(z, target, weight, True, *given, options.get("statistics", False))
        gpu.backward(z.new_empty((), dtype=torch.float32), z, target, weight, *outputs[1:3], *given)
    return found


def compiled(launch, target):
    """As Triton would on a launch, which specialises on multiples of 16 and 1."""
    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=True)):
        name, general = parameter.name, parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not general):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and not general):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def tool(name, *arguments):
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


class Code:
    """Machine code of a kernel: its instructions, registers, and the bytes it spills."""

    def __init__(self, binary):
        with tempfile.NamedTemporaryFile() as file:
            file.write(binary.asm["cubin"])
            file.flush()
            text = tool("nvdisasm", "-c", file.name)
            usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        self.registers, self.stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        self.instructions, self.labels = [], {}
        for line in text.split("\n"):
            if match := re.match(r"^(\.L\w+|\$\w+):", line):
                if "slowpath" in match[1]:
                    break  # of divisions: not on the usual way
                self.labels[match[1]] = len(self.instructions)
            elif match := re.match(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*);", line):
                self.instructions.append((bool(match[1]), match[2], match[3]))

    def branches(self):
        """(place, place of the target, whether it depends on something), but for the one that ends a text."""
        for i, (guarded, name, rest) in enumerate(self.instructions):
            target = re.search(r"`\((\.L\w+)\)", rest) if name == "BRA" else None
            if target and self.labels.get(target[1], i) != i:
                yield i, self.labels[target[1]], guarded

    def executed(self, trips):
        """How many instructions a thread runs, if the loops run so often."""
        weights = [1.0] * len(self.instructions)
        loops = sorted((target, i) for i, target, _ in self.branches() if target < i)
        if len(loops) != len(trips):
            raise ValueError(f"{len(loops)} loops, expected {len(trips)}")
        for (start, end), often in zip(loops, trips, strict=True):
            weights[start : end + 1] = [often] * (end + 1 - start)
            for i, target, guarded in self.branches():
                if guarded and start <= i < target <= end:
                    weights[i + 1 : target] = [min(2.0, often)] * (target - i - 1)
        return sum(weights)


def trips(launch):
    """How often the loops of a kernel run, of those that run more than once."""
    classes, block, v = launch["C"], launch["BC"], launch["V"]
    blocks = triton.cdiv(classes + v - 1, block)
    if launch.kernel is kernels.backward:
        return [n for n in [triton.cdiv(blocks, launch["splits"])] if n > 1]
    rest = [blocks] * bool(launch["SMOOTHED"]) if blocks > 1 else []
    first, whole = int(v > 1), classes // block
    if launch["BM"] == 1 and whole - first > 1:
        return [whole - first - 1, first + blocks - whole + 1, *rest]
    return [blocks, *rest] if blocks > 1 else rest


def counted(launch, logits):
    """Registers, spilled bytes, bytes of a load, and instructions a logit."""
    code = Code(compiled(launch, GPUTarget("cuda", 90, 32)))
    names = [name for _, name, _ in code.instructions]
    width = max(int(re.search(r"\.(?:U|S)?(\d+)", n + ".32")[1]) // 8 for n in names if n.startswith("LDG"))
    threads = launch.programs * launch.warps * 32
    return code.registers, code.stack, width, code.executed(trips(launch)) * threads / logits


def logits_of(text, dtype):
    """'8192 x 50257 of 50304': rows of so many in rows of more."""
    numbers, _, row = text.partition(",")[0].partition(" of ")
    shape = [int(n) for n in numbers.split(" x ")]
    z = torch.empty([*shape[:-1], int(row or shape[-1])], dtype=dtype, device="meta")
    return z[..., : shape[-1]]


def main(names):
    torch_version, triton_version = torch.__version__.split("+")[0], triton.__version__
    print(f"Counted in code for sm_90 by Triton {triton_version} (torch {torch_version}); no GPU was there.\n")
    print("| shape | dtype | pass | samples x classes, warps | registers | spilled | load | instr. a logit |", end="")
    print("".join(f" issue / memory, {name} |" for name in BANDWIDTH))
    print("|" + " --- |" * (8 + len(BANDWIDTH)))
    for text, options in SHAPES.items():
        if names and not any(name in text for name in names):
            continue
        for dtype in (torch.bfloat16, torch.float32):
            z = logits_of(text, dtype)
            samples = z.numel() // z.shape[1]
            for launch in launches(z, **options):
                registers, stack, width, instructions = counted(launch, z.numel())
                issue = instructions * z.numel() / 32 / (MULTIPROCESSORS * WARPS_A_CLOCK * CLOCK)
                touches = 1 + (launch.kernel is kernels.backward)
                # Beside the logits, a target of 8 bytes and about six floats a sample.
                moved = touches * prod(z.shape) * z.element_size() + samples * 32
                ratios = [f"{issue / (moved / rate):.2f}" for rate in BANDWIDTH.values()]
                block = f"{launch['BM']} x {launch['BC']}, {launch.warps}"
                cells = [text, str(dtype)[6:], launch.kernel.__name__, block, registers, stack, width]
                print("|", " | ".join(map(str, [*cells, f"{instructions:.1f}", *ratios])), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
