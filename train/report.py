"""Records to a Markdown table, the difference between the losses with its interval, and a picture of the curves.

Seeds are the sample: mean and standard deviation (n - 1) over them, and Welch's interval for the difference of means,
because runs that share a seed are no more alike than others. Figures are the last epoch's, never the best.
"""

import json
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from .config import Config, TrainError
from .store import Record, read_record

PAPER = {"ce": 6.7, "lace": 6.2}  # top-5 test error in percent, CIFAR-100
# Runs compare when they differ in nothing but these.
ARM = ("loss", "strength", "seed")
RECIPE = tuple(f.name for f in fields(Config) if f.name not in ("data", *ARM))
METRICS = {"top5_error": "top-5 error", "top1_error": "top-1 error", "train_loss": "train loss"}


def report(paths: list[Path], as_json: bool = False) -> None:
    """Print the table (or the same figures as JSON) of records and of folders' records; write `curves.png` beside them.

    Raises TrainError for a missing or damaged record and for two records of one run.
    """
    files = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].exists():
            raise TrainError(f"{path} is neither a record (.jsonl) nor a folder with records")
        files += found
    files = list(dict.fromkeys(file.resolve() for file in files))
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for file in files:
        record = read_record(file) | {"path": str(file)}
        groups[tuple(record[key] for key in ("data", "data_sha256", *RECIPE))].append(record)
    summaries = [summarise(records) for records in groups.values()]
    picture = files[0].parent / "curves.png"
    plot(list(groups.values()), picture)
    if as_json:
        print(json.dumps({"groups": summaries, "curves": str(picture)}, indent=2))
    else:
        print("\n\n".join([*map(markdown, summaries), f"Curves: {picture}"]))


def arms(records: list[Record]) -> dict[str, list[Record]]:
    """Finished records by loss, in order of strength and seed."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["strength"], r["seed"])):
        if "final" in record:
            strength = "" if record["loss"] == "ce" or record["strength"] == 1 else f" {record['strength']:g}"
            found.setdefault(record["loss"].upper() + strength, []).append(record)
    return found


def summarise(records: list[Record]) -> dict[str, Any]:
    """The figures of records that share data and recipe."""
    seen: dict[tuple[Any, ...], str] = {}
    for record in records:
        other = seen.setdefault(tuple(record[key] for key in ARM), record["path"])
        if other != record["path"]:
            raise TrainError(f"{other} and {record['path']} are of the same run: report on one of them")
    by_arm: dict[str, Any] = {
        name: {
            "n": len(arm),
            "seeds": [record["seed"] for record in arm],
            **{metric: statistics([record[metric] for record in arm]) for metric in METRICS},
        }
        for name, arm in arms(records).items()
    }
    first = records[0]
    paper = {key: getattr(Config, key) for key in RECIPE}
    scaled = [f"{key} {first[key]} (paper {paper[key]})" for key in RECIPE if first[key] != paper[key]]
    return {
        "data": first["data"],
        "classes": first["classes"],
        "recipe": {key: first[key] for key in RECIPE},
        "arms": by_arm,
        "ce_minus": {
            name: {metric: difference(by_arm["CE"][metric], arm[metric]) for metric in ("top5_error", "top1_error")}
            for name, arm in by_arm.items()
            if name != "CE" and "CE" in by_arm
        },
        "is_cifar100": first["data"].lower().startswith("cifar") and first["classes"] == 100,
        "scaled_down": scaled,
        "paper_top5_error": PAPER,
        "unfinished": [r["path"] for r in records if "final" not in r],
    }


def statistics(values: list[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "values": values,
    }


def difference(ce: dict[str, Any], lace: dict[str, Any]) -> dict[str, Any]:
    """CE's mean minus LACE's and Welch's 95 % interval; `interval` None, with a `note`, where there is none."""
    found: dict[str, Any] = {"mean": ce["mean"] - lace["mean"], "interval": None, "note": None}
    if ce["sd"] is None or lace["sd"] is None:
        return found | {"note": "no interval with one seed"}
    if ce["sd"] == lace["sd"] == 0:
        return found | {"note": "no interval: no spread over the seeds"}
    interval = ttest_ind(ce["values"], lace["values"], equal_var=False).confidence_interval()
    return found | {"interval": [float(interval.low), float(interval.high)]}


def markdown(summary: dict[str, Any]) -> str:
    """A heading, the table, the differences, and what keeps it from being the paper's experiment."""
    recipe = summary["recipe"]
    lines = [
        f"### {summary['data']}: width {recipe['width']}, {recipe['epochs']} epochs",
        "",
        "Test error of the last epoch in percent, mean ± standard deviation over the seeds.",
        "",
        "| loss | n | top-5 error | top-1 error | train loss | seeds | top-5 by seed | top-1 by seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in summary["arms"].items():
        cells = [name, str(arm["n"])]
        for metric in METRICS:
            mean, sd = arm[metric]["mean"], arm[metric]["sd"]
            form = ".4f" if metric == "train_loss" else ".2f"
            cells.append(f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:{form}}")
        cells.append(", ".join(map(str, arm["seeds"])))
        cells += [", ".join(f"{value:.2f}" for value in arm[m]["values"]) for m in ("top5_error", "top1_error")]
        lines.append(f"| {' | '.join(cells)} |")
    if summary["is_cifar100"] and not summary["scaled_down"]:
        lines += [f"| paper, {loss.upper()} | | {error} | | | | | |" for loss, error in PAPER.items()]
    lines.append("")
    for name, metrics in summary["ce_minus"].items():
        for metric, found in metrics.items():
            interval = found["note"] or "95 % Welch interval {:+.2f} to {:+.2f}".format(*found["interval"])
            lines.append(f"- CE - {name}, {METRICS[metric]}: {found['mean']:+.2f} points, {interval}")
    if summary["ce_minus"]:
        lines.append("- Above zero {} has the smaller error.".format(" or ".join(summary["ce_minus"])))
    if summary["is_cifar100"] and summary["scaled_down"]:
        lines.append(
            f"- Scaled down: {', '.join(summary['scaled_down'])}. Not to be compared with the paper's top-5 error,"
            f" {PAPER['ce']} % (CE) and {PAPER['lace']} % (LACE)."
        )
    lines += [f"- Unfinished, not counted: {path}" for path in summary["unfinished"]]
    return "\n".join(lines).rstrip()


def plot(groups: list[list[Record]], path: Path) -> None:
    """A row of panels a group: test errors and training loss by epoch, seeds thin and their mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    units = {"top5_error": "top-5 test error, %", "top1_error": "top-1 test error, %", "train_loss": "train loss"}
    figure, axes = plt.subplots(len(groups), 3, figsize=(13, 4 * len(groups)), squeeze=False, layout="constrained")
    for row, records in zip(axes, groups, strict=True):
        for axis, (metric, label) in zip(row, units.items(), strict=True):
            for color, (name, arm) in enumerate(arms(records).items()):
                curves = np.array([[epoch[metric] for epoch in record["epochs_log"]] for record in arm])
                epochs = np.arange(1, curves.shape[1] + 1)
                axis.plot(epochs, curves.T, color=f"C{color}", linewidth=0.7, alpha=0.5)
                axis.plot(epochs, curves.mean(0), color=f"C{color}", linewidth=2, label=f"{name}, n = {len(arm)}")
            axis.set(xlabel="epoch", ylabel=label, title=f"{records[0]['data']}, width {records[0]['width']}")
            axis.grid(alpha=0.3)
        # Each loss has its own training loss; decades show where both go.
        row[2].set_yscale("log")
        if arms(records):
            row[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
