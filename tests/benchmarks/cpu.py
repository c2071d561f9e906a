"""Speed on the CPU: LACELoss and the NumPy face against what else there is, in one process, in turn, in random order.

    python tests/benchmarks/cpu.py [--threads 1 2] [--shapes 100x100 ...] [--rounds N] [--png FILE] [--skip-compiled]

Prints, for each shape, the median over the rounds of their time / LACELoss's time in the same round: above 1, LACELoss
is faster. The last column is the time of `ext.forward_backward(out=...)` in copies of the logits, on as many threads.
Times themselves mean little on a shared machine and are not shown.
"""

import argparse
import random
import statistics
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from sklearn._loss import HalfMultinomialLoss
from torch.nn import functional as F

from lace_loss import ext
from lace_loss.ext.arrays import call_kernel
from lace_loss.ext.torch import LACELoss

SHAPES = ["100x100", "256x1000", "4096x1000", "1024x32000", "4096x32000", "8x19x512x512"]
LONG_ENOUGH = 2e-3  # seconds that one timing of a candidate takes at least, by calling it repeatedly


def focal(input, target):
    ce = F.cross_entropy(input, target, reduction="none")
    return ((1 - torch.exp(-ce)) * ce).mean()


def candidates(shape, threads, compiled):
    """{name: (forward, forward and backward)} as functions without arguments; None where there is no such thing."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(shape, generator=generator)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    leaf = logits.clone().requires_grad_()

    def in_torch(loss):
        def forward():
            with torch.no_grad():
                loss(logits, target)

        def both():
            leaf.grad = None
            loss(leaf, target).backward()

        return forward, both

    z, y, out = logits.numpy(), target.numpy(), np.empty(shape, np.float32)
    found = {
        "LACELoss": in_torch(LACELoss()),
        "cross_entropy": in_torch(F.cross_entropy),
        "focal": in_torch(focal),
        "ext": (
            lambda: call_kernel(z, y, None, 1.0, threads),
            lambda: ext.forward_backward(z, y, out=out, threads=threads),
        ),
    }
    if compiled:
        torch.compiler.reset()
        found["focal compiled"] = in_torch(torch.compile(focal, fullgraph=True, dynamic=False))
    if len(shape) == 2:
        halves = HalfMultinomialLoss(n_classes=shape[1])
        arguments = {"y_true": y.astype(np.float32), "raw_prediction": z, "n_threads": threads}
        losses = np.empty(len(z), np.float32)
        found["scikit-learn"] = (
            lambda: halves.loss(**arguments, loss_out=losses),
            lambda: halves.loss_gradient(**arguments, loss_out=losses, gradient_out=out),
        )
    found["copy"] = (None, copies(z, out, threads))
    return found


def copies(z, out, threads):
    """A function that copies z to out on so many threads."""
    if threads == 1:
        return lambda: np.copyto(out, z)
    parts = [slice(len(z) * i // threads, len(z) * (i + 1) // threads) for i in range(threads)]
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(lambda part: np.copyto(out[part], z[part]), parts))


def seconds(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def ratios(found, which, over, rounds):
    """{name: median over the rounds of its time / the time of `over`}."""
    functions = {name: pair[which] for name, pair in found.items() if pair[which]}
    calls = {}
    for name, function in functions.items():
        function()  # warm: compiles, starts threads, touches memory
        calls[name] = 1
        while calls[name] * seconds(function, calls[name]) < LONG_ENOUGH:
            calls[name] *= 2
    # In an order of its own each round: a scheduler's rhythm would hit the same candidate every time.
    orders = [random.sample(sorted(functions), len(functions)) for _ in range(rounds)]
    times = [{name: seconds(functions[name], calls[name]) for name in order} for order in orders]
    return {name: statistics.median(t[name] / t[over] for t in times) for name in functions}


def measure(args):
    """{(threads, shape, passes): {name: ratio}}, printed as it comes."""
    names = ["cross_entropy", "focal", "focal compiled", "scikit-learn"]
    print(f"| threads | shape | passes | {' | '.join(names)} | copies |")
    print("| --- " * (4 + len(names)) + "|")
    results = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.shapes:
            found = candidates(tuple(map(int, name.split("x"))), threads, not args.skip_compiled)
            for which, passes in enumerate(("forward", "both")):
                against = ratios(found, which, "LACELoss", args.rounds)
                copies = ratios({n: found[n] for n in ("ext", "copy")}, which, "copy", args.rounds) if which else {}
                results[threads, name, passes] = against
                cells = [f"{against[n]:.2f}" if n in against else "-" for n in names]
                last = f"{copies['ext']:.2f}" if copies else "-"
                print(f"| {threads} | {name} | {passes} | {' | '.join(cells)} | {last} |", flush=True)
        both = [r["cross_entropy"] for (t, _, passes), r in results.items() if t == threads and passes == "both"]
        print(f"| {threads} | geometric mean | both | {statistics.geometric_mean(both):.2f} | | | | |", flush=True)
    return results


def overhead(rounds):
    """Calls with (1, 10) logits, where the arithmetic is nothing: as ratios, and the NumPy face in microseconds."""
    torch.set_num_threads(1)
    found = candidates((1, 10), 1, compiled=False)
    against = ratios(found, 1, "LACELoss", rounds)
    z, y, copied = np.zeros((1, 10), np.float32), np.zeros(1, np.int64), np.zeros(10)
    faces = [found["ext"][1], lambda: ext.forward_backward(z, y), copied.copy]
    out, plain, copy = (1e6 * statistics.median(seconds(face, 2000) for _ in range(rounds)) for face in faces)
    print(
        f"\n(1, 10): LACELoss takes {1 / against['cross_entropy']:.2f} of cross_entropy's time, forward and backward;"
    )
    print(f"ext.forward_backward {plain:.1f} us, with out= {out:.1f} us, one ndarray.copy {copy:.1f} us")


def draw(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(shape for _, shape, _ in results))
    threads = sorted({t for t, _, _ in results})
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for i, t in enumerate(threads):
        heights = [results[t, shape, "both"]["cross_entropy"] for shape in shapes]
        places = [x + 0.8 * (i - (len(threads) - 1) / 2) / len(threads) for x in range(len(shapes))]
        bars = axes.bar(places, heights, 0.8 / len(threads), label=f"{t} thread{'s' * (t > 1)}")
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set(ylabel="times as fast as cross_entropy", title="LACELoss, forward and backward, float32 on a CPU")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(path)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--png")
    parser.add_argument("--skip-compiled", action="store_true", help="without torch.compile, which takes minutes")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    results = measure(args)
    overhead(args.rounds)
    if args.png:
        draw(results, args.png)


if __name__ == "__main__":
    main(sys.argv[1:])
