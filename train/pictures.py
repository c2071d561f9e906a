"""The report's pictures: errors, training loss and gradient by epoch, and accuracy by confidence."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from .schema import Record
from .store import write


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int) -> None:
    """Write it as a PNG file, whole or not at all, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    pyplot().close(figure)
    write(path, buffer.getvalue())


def title_of(record: Record) -> str:
    return f"{record['data']}: width {record['width']}, {record['epochs']} epochs, {record['schedule']}"


def plot_curves(groups: list[dict[str, list[Record]]], path: Path) -> None:
    """A row of panels a group: test errors, training loss and gradient by epoch, seeds thin and their mean thick."""
    plt = pyplot()
    panels = {
        "top5_error": "top-5 test error, %",
        "top1_error": "top-1 test error, %",
        "train_loss": "train loss (each its own)",
        "grad_norm": "norm of the gradient",
    }
    figure, axes = plt.subplots(len(groups), 4, figsize=(16, 4 * len(groups)), squeeze=False, layout="constrained")
    for line, by_loss in zip(axes, groups, strict=True):
        for axis, (metric, label) in zip(line, panels.items(), strict=True):
            for color, (name, arm) in enumerate(by_loss.items()):
                curves = [{e["epoch"] + 1: e[metric] for e in record["epochs_log"] if metric in e} for record in arm]
                for curve in curves:
                    axis.plot(curve.keys(), curve.values(), color=f"C{color}", linewidth=0.7, alpha=0.5)
                shared = sorted(set.intersection(*(set(curve) for curve in curves)))
                mean = [np.mean([curve[epoch] for curve in curves]) for epoch in shared]
                axis.plot(shared, mean, color=f"C{color}", linewidth=2, label=f"{name}, n = {len(arm)}")
            first = next(iter(by_loss.values()))[0]
            axis.set(xlabel="epoch", ylabel=label)
            axis.set_title(title_of(first), fontsize="medium")
            axis.grid(alpha=0.3)
        # Each loss has its own training loss; decades show where all go.
        line[2].set_yscale("log")
        line[3].set_yscale("log")
        line[0].legend()
    save(figure, path, 110)


def plot_reliability(groups: list[dict[str, list[Record]]], path: Path) -> None:
    """Two panels a group: accuracy by confidence of the test images, and how many there are; the seeds together."""
    plt = pyplot()
    figure, axes = plt.subplots(len(groups), 2, figsize=(9, 4 * len(groups)), squeeze=False, layout="constrained")
    for (accuracy, share), by_loss in zip(axes, groups, strict=True):
        accuracy.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
        for name, arm in by_loss.items():
            tests = [record["sets"]["test"] for record in arm]
            count = np.sum([test["count"] for test in tests], axis=0)
            some = count > 0
            means = {
                key: np.sum([np.multiply(test["count"], test[key]) for test in tests], axis=0)[some] / count[some]
                for key in ("confidence", "accuracy")
            }
            accuracy.plot(means["confidence"], means["accuracy"], marker=".", label=f"{name}, n = {len(arm)}")
            share.plot(means["confidence"], 100 * count[some] / count.sum(), marker=".")
        first = next(iter(by_loss.values()))[0]
        accuracy.set(xlabel="confidence (softmax)", ylabel="accuracy")
        accuracy.set_title(title_of(first), fontsize="medium")
        share.set(xlabel="confidence (softmax)", ylabel="share of the test images, %")
        accuracy.legend()
        for axis in (accuracy, share):
            axis.grid(alpha=0.3)
    save(figure, path, 110)
