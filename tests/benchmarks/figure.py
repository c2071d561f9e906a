"""Draw the loss and its gradient factor against q_t: `python tests/benchmarks/figure.py [PNG]`.

The logit of the true class has the gradient -K (1 - q_t), so K is what LACE makes of cross entropy's gradient.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lace_loss import ext
from lace_loss.train.pictures import pyplot, save

Array = NDArray[np.float64]


def curves(q: Array, strength: float) -> tuple[Array, Array]:
    """Loss and gradient factor K of samples whose true class has probability `q`."""
    logits = np.stack([np.log(q), np.log1p(-q)], axis=1)
    loss, gradient = ext.forward_backward(logits, np.zeros(len(q), int), reduction="none", strength=strength)
    return loss, -gradient[:, 0] / (1 - q)


def draw(path: str) -> None:
    q = np.linspace(0.001, 0.999, 999)
    figure, (losses, factors) = pyplot().subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for strength, name in ((0, "cross entropy"), (1, "LACE")):
        loss, factor = curves(q, strength)
        losses.plot(q, loss, label=name)
        factors.plot(q, factor, label=name)
    losses.set(xlabel="$q_t$, probability of the true class", ylabel="loss $L$", ylim=(0, 5), xlim=(0, 1))
    losses.legend()
    peak = np.exp(-2)
    factors.plot([peak], [1 + peak], "k.")
    factors.annotate(f"$1 + e^{{-2}}$ = {1 + peak:.3f}\nat $q_t = e^{{-2}}$", (peak, 1 + peak), (0.3, 1.08))
    factors.set(xlabel="$q_t$", ylabel="gradient factor $K$", ylim=(0, 1.25), xlim=(0, 1))
    save(figure, Path(path), 120)
    print(path)


if __name__ == "__main__":
    draw(*sys.argv[1:] or ["loss.png"])
