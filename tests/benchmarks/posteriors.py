"""Softmax and class probabilities of small networks against the true class probabilities of their data.

    python tests/benchmarks/posteriors.py    150 s of one core; writes results/posteriors.md beside this file

Points x in 8 dimensions, normal. A fixed random network gives their class probabilities p(x), and every step draws new
points and classes, so that nothing can be overfitted. A larger network learns from the classes alone. Then, on new
points, the two readings of its logits are compared with p(x): their softmax, and `ref.posterior`.
"""

from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import nn

from lace_loss import ref
from lace_loss.ext.torch import lace_loss

RESULTS = Path(__file__).parent / "results" / "posteriors.md"
DIMENSIONS, STEPS, BATCH, TEST = 8, 6000, 512, 20_000


def true_logits(classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(DIMENSIONS, 32), nn.Tanh(), nn.Linear(32, classes))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.6)
    return net.requires_grad_(False)


def trained(truth: nn.Module, classes: int, strength: float, seed: int) -> nn.Module:
    torch.manual_seed(1000 + seed)
    net = nn.Sequential(nn.Linear(DIMENSIONS, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, classes))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        x = torch.randn(BATCH, DIMENSIONS)
        target = torch.multinomial(truth(x).softmax(1), 1)[:, 0]
        optimizer.zero_grad()
        lace_loss(net(x), target, strength=strength).backward()
        optimizer.step()
        schedule.step()
    return net


def figures(q: np.ndarray, p: np.ndarray, target: np.ndarray) -> tuple[float, float, float]:
    """Negative log-likelihood, calibration error (15 bins) and mean distance of the leading class's probability."""
    lead, rows = q.argmax(1), np.arange(len(q))
    confidence = q[rows, lead]
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs((confidence - (lead == target))[bins == b].sum()) for b in range(15)]
    return -np.log(q[rows, target]).mean(), sum(gaps) / len(q), np.abs(confidence - p[rows, lead]).mean()


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "| classes | trained with | read as | negative log-likelihood | calibration error | distance to p(x) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for classes, (name, strength) in product((2, 10), (("cross entropy", 0.0), ("LACE", 1.0))):
        readings: dict[str, list[tuple[float, float, float]]] = {}
        for seed in (0, 1):
            truth = true_logits(classes, seed)
            net = trained(truth, classes, strength, seed)
            x = torch.randn(TEST, DIMENSIONS)
            p = truth(x).softmax(1)
            target = torch.multinomial(p, 1)[:, 0].numpy()
            logits = net(x).detach().double()
            read = {"softmax": logits.softmax(1).numpy(), "posterior": ref.posterior(logits.numpy(), strength=strength)}
            for how, q in read.items():
                readings.setdefault(how, []).append(figures(q, p.double().numpy(), target))
        for how, runs in readings.items():
            if how == "posterior" and strength == 0:
                continue  # the same numbers
            cells = [", ".join(f"{run[0]:.3f}" for run in runs)]
            cells += [", ".join(f"{100 * run[i]:.2f} %" for run in runs) for i in (1, 2)]
            lines.append(f"| {classes} | {name} | {how} | {' | '.join(cells)} |")
            print(lines[-1], f"{mean(run[2] for run in runs):.4f}", flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
