"""Speed of labels on the CPU: BinaryLACELoss and the NumPy face against torch's loss, in one process, in turn.

    python tests/benchmarks/binary.py [--threads 1 2] [--labels 1000 ...] [--rounds N]

Prints, for each number of labels and type, the median over the rounds of the time of BCEWithLogitsLoss, forward and
backward, in that of BinaryLACELoss and of `ext.binary_forward_backward(out=...)` in the same round: above 1, ours is
faster. Then the time of the latter in copies of the logits on as many threads. LACE_BUILD=avx2 keeps to that width.
"""

import argparse
import sys

import numpy as np
import torch
from cpu import copies, ratios

from lace_loss import ext
from lace_loss.ext.torch import BinaryLACELoss

LABELS = [10**3, 10**4, 10**5, 10**6, 10**7]


def candidates(count, dtype, threads):
    """{name: (None, forward and backward)} as `ratios` wants them; labels as numbers and, "bool", as booleans."""
    rng = np.random.default_rng(0)
    z, present, out = (3 * rng.normal(size=count)).astype(dtype), rng.uniform(size=count) < 0.3, np.empty(count, dtype)
    leaf, target = torch.tensor(z, requires_grad=True), torch.tensor(present.astype(dtype))

    def in_torch(loss, y):
        def both():
            leaf.grad = None
            loss(leaf, y).backward()

        return None, both

    def in_numpy(y):
        return None, lambda: ext.binary_forward_backward(z, y, out=out, threads=threads)

    return {
        "BCEWithLogitsLoss": in_torch(torch.nn.BCEWithLogitsLoss(), target),
        "BinaryLACELoss": in_torch(BinaryLACELoss(), target),
        "ext": in_numpy(target.numpy()),
        "ext, bool": in_numpy(present),
        "copy": (None, copies(z, out, threads)),
    }


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--labels", type=int, nargs="+", default=LABELS)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    print("| threads | labels | type | BCE / BinaryLACELoss | BCE / ext | BCE / ext, bool | copies | copies, bool |")
    print("| --- " * 8 + "|")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for count in args.labels:
            for dtype in (np.float32, np.float64):
                found = candidates(count, dtype, threads)
                times = {over: ratios(found, 1, over, args.rounds) for over in ("BinaryLACELoss", "ext", "ext, bool")}
                cells = [f"{against['BCEWithLogitsLoss']:.2f}" for against in times.values()]
                against = ratios({n: found[n] for n in ("ext", "ext, bool", "copy")}, 1, "copy", args.rounds)
                cells += [f"{against[name]:.2f}" for name in ("ext", "ext, bool")]
                print(f"| {threads} | {count:,} | {np.dtype(dtype)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
