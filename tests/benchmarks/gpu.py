"""Speed on a GPU: LACELoss against what else there is, all in one process and in turn. Then every kernel against `ref`.

    python tests/benchmarks/gpu.py [--shapes 8192x32000:bfloat16 ...] [--out FILE] [--skip-compiled]

Prints, and writes to results/<device>.md beside this file, for each shape and forward, backward and both: the median
time on a cold cache, GB/s, its share of the copy bandwidth measured here, the others' times over LACELoss's in the same
round, and peak memory. The bytes are the same for everybody: the logits once forward, twice backward (read, written),
three times both. Times are the device's own. (100, 100) is measured as calls by the wall clock and as a CUDA graph. To
end within 5 minutes, shapes after the first 150 s go without what torch.compile would have to compile for them. Exit
status: 2 without a GPU, 1 if a kernel is wrong.
"""

import argparse
import contextlib
import functools
import gc
import io
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from lace_loss.ext.torch import LACELoss
from lace_loss.ref.__main__ import cross_validate
from lace_loss.ref.case import VECTORS

SHAPES = [
    *(f"{shape}:{dtype}" for shape in ("10000x100", "4096x1000") for dtype in ("bfloat16", "float32")),
    "256x1000:float32",
    "8x19x512x512:bfloat16",
    *(f"{shape}:bfloat16" for shape in ("2048x32000", "8192x32000", "8192x50304", "8192x50257", "8192x128256")),
    "8192x128256:float32",
    "8192x256000:bfloat16",
]
PASSES = {"forward": 1, "backward": 2, "both": 3}  # and how often the logits' bytes are moved at least
SMALL = "100x100:float32"
ROUNDS = 7
COMPILING = 150  # seconds; the kernels that the check takes are compiled for a hundred more


def focal(input, target):
    ce = F.cross_entropy(input, target, reduction="none")
    return ((1 - torch.exp(-ce)) * ce).mean()


def losses(compiled):
    """{name: loss}; Liger where it is installed."""
    found = {
        "LACELoss": LACELoss(),
        "cross_entropy": F.cross_entropy,
        "focal": focal,
    }
    if compiled:
        torch.compiler.reset()
        torch._functorch.config.donated_buffer = False  # or a graph that is retained is refused
        found["cross_entropy compiled"] = torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)
        found["focal compiled"] = torch.compile(focal, fullgraph=True, dynamic=False)
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        found["Liger"] = LigerCrossEntropyLoss()
    return found


def problem(shape, device):
    """Logits of a model that knows something, and targets."""
    sizes, dtype = shape.split(":")
    sizes, dtype = tuple(map(int, sizes.split("x"))), getattr(torch, dtype)
    logits = torch.randn(sizes, dtype=dtype, device=device).mul_(3)
    target = torch.randint(sizes[1], sizes[:1] + sizes[2:], device=device)
    logits.scatter_add_(1, target.unsqueeze(1), torch.full_like(logits[:, :1], 6.0))
    return logits.requires_grad_(), target


def steps(loss, input, target):
    """{pass: function}."""

    def forward():
        with torch.no_grad():
            return loss(input, target)

    def both():
        input.grad = None
        loss(input, target).backward()

    kept = []

    def backward():
        if not kept:
            kept.append(loss(input, target))
        input.grad = None
        kept[0].backward(retain_graph=True)

    return {"forward": forward, "backward": backward, "both": both}


class Timer:
    """Seconds of a function on a device, by its own events; with a cold cache if asked."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.flush = torch.empty(2**28 if self.on_gpu else 2**20, dtype=torch.int8, device=device)

    def __call__(self, function):
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # about 1 ms, longer than Python takes to queue a call: that is not measured here
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def in_turn(functions, timer, rounds):
    """{name: median seconds}, {name: median of its seconds over the first one's in the same round}."""
    for function in functions.values():
        function()
        function()
    times = [{name: timer(function) for name, function in functions.items()} for _ in range(rounds)]
    first = next(iter(functions))
    middle = {name: statistics.median(t[name] for t in times) for name in functions}
    return middle, {name: statistics.median(t[name] / t[first] for t in times) for name in functions}


def copy_bandwidth(device, timer, size=2**31):
    """Bytes a second, read and written."""
    source = torch.zeros(size // 2 if timer.on_gpu else 2**20, dtype=torch.int8, device=device)
    to = torch.empty_like(source)
    return 2 * len(source) / statistics.median(timer(lambda: to.copy_(source)) for _ in range(ROUNDS))


def peak(step, input, device):
    """Bytes beyond the logits that a step allocates at most."""
    input.grad = None
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measured(shapes, device, until, rounds, timer, out):
    """Write the rows of the table; `until` that time with what torch.compile makes of the others."""
    bandwidth = copy_bandwidth(device, timer)
    names = list(losses(time.monotonic() < until))
    print(f"Copy: {bandwidth / 1e9:.4g} GB/s, read and written.\n", file=out)
    header = ["shape", "pass", "us", "GB/s", "of copy", *names[1:]]
    print(line(header), line(["---"] * len(header)), sep="\n", file=out)
    memory = []
    for shape in shapes:
        try:
            of_shape = measured_shape(shape, names, device, time.monotonic() < until, rounds, timer, bandwidth, out)
        except torch.OutOfMemoryError:
            print(line([shape, "out of memory", *["-"] * (len(header) - 2)]), file=out, flush=True)
        else:
            memory.append([shape, *(f"{of_shape[n] / 2**20:.0f}" if n in of_shape else "-" for n in names)])
    if timer.on_gpu:
        print("\nPeak memory of both passes beyond the logits, MiB:\n", file=out)
        header = ["shape", *names]
        print(line(header), line(["---"] * len(header)), *map(line, memory), sep="\n", file=out)


def measured_shape(shape, names, device, compiled, rounds, timer, bandwidth, out):
    """Write the rows of one shape; {loss: bytes it needs at most} on a GPU."""
    input, target = problem(shape, device)
    size = input.numel() * input.element_size()
    found = {}
    for name, loss in losses(compiled).items():
        if name == "Liger":
            if input.dim() != 2:
                continue
            # It writes the gradient over its logits: on a copy, both passes only, on values that then change.
            own = input.detach().clone().requires_grad_()
            found[name] = {"both": functools.partial(forward_backward, loss, own, target)}
        else:
            found[name] = steps(loss, input, target)
    for name, touches in PASSES.items():
        functions = {loss: passes[name] for loss, passes in found.items() if name in passes}
        seconds, ratios = in_turn(functions, timer, rounds)
        rate = touches * size / seconds["LACELoss"]
        cells = [
            shape,
            name,
            f"{1e6 * seconds['LACELoss']:.1f}",
            f"{rate / 1e9:.3g}",
            f"{100 * rate / bandwidth:.0f} %",
        ]
        cells += [f"{ratios[n]:.2f}" if n in ratios else "-" for n in names[1:]]
        print(line(cells), file=out, flush=True)
    if not timer.on_gpu:
        return {}
    steps_ = {loss: passes["both"] for loss, passes in found.items()}
    found.clear()  # and the graphs that were retained
    return {loss: peak(step, input, device) for loss, step in steps_.items()}


def forward_backward(loss, input, target):
    input.grad = None
    loss(input, target).backward()


def small(device, compiled, rounds, out):
    """Calls by the wall clock, and steps in a CUDA graph: where launches are what counts."""
    input, target = problem(SMALL, device)
    print(f"\n{SMALL}, both passes, a call by the wall clock and a replay of its CUDA graph:\n", file=out)
    print(line(["loss", "call, us", "graph, us"]), line(3 * ["---"]), sep="\n", file=out)
    for name, loss in losses(compiled).items():
        if name == "Liger":
            continue
        step = steps(loss, input, target)["both"]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        cells = [f"{1e6 * statistics.median(wall(f, 200) for _ in range(rounds)):.1f}" for f in (step, graph.replay)]
        print(line([name, *cells]), file=out, flush=True)


def wall(function, calls):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def line(words):
    return f"| {' | '.join(words)} |"


class Both(io.StringIO):
    """What is printed, kept for the file."""

    def write(self, text):
        sys.stdout.write(text)
        return super().write(text)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--skip-compiled", action="store_true", help="without torch.compile")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device, and there is nothing to measure without one", file=sys.stderr)
        return 2
    import triton

    device, out = "cuda", Both()
    name = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    print(f"# {name}\n\n`python tests/benchmarks/gpu.py`, {versions}. Times of others over LACELoss's.", file=out)
    until = 0 if args.skip_compiled else time.monotonic() + COMPILING
    measured(args.shapes, device, until, args.rounds, Timer(device), out)
    small(device, not args.skip_compiled, args.rounds, out)
    checked = io.StringIO()
    with contextlib.redirect_stdout(checked):
        status = cross_validate(VECTORS)
    print(f"\n`python -m lace_loss.ref` on this machine:\n\n```\n{checked.getvalue().strip()}\n```", file=out)
    path = args.out or Path(__file__).parent / "results" / f"{name.replace(' ', '-').lower()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(out.getvalue())
    print(path)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
