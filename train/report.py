"""Records to Markdown tables, the differences between the losses with their intervals, verdicts in words, pictures.

Seeds are the sample: mean and standard deviation (n - 1) over them, and Welch's interval for the difference of means,
because runs that share a seed are no more alike than others. Figures are the last epoch's, never the best.
"""

import json
from collections import defaultdict
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_ind

from .config import Config, TrainError
from .schema import Record
from .store import read_record

PAPER = {"ce": 6.7, "lace": 6.2}  # top-5 test error in percent, CIFAR-100
# Runs on the same data and with the same RECIPE compare; these tell them apart.
ARM = ("loss", "strength", "seed")
RECIPE = tuple(f.name for f in fields(Config) if f.name not in ("data", "test_every", *ARM))
PRIMARY, PAIR, SEEDS = "test.top5_error", "CE - LACE", 5  # declared in the README before the runs
# Set and figure of a record's last line; shown where all records of a group have them. Percent, but for the NLL.
METRICS = {
    PRIMARY: "top-5 error",
    "test.top1_error": "top-1 error",
    "test.nll": "NLL",
    "test.calibration_error": "calibration error",
    "train.top1_error": "training top-1 error",
    "unused.top5_error": "top-5 error on unused images",
    "unused.top1_error": "top-1 error on unused images",
    "fgsm.top1_error": "top-1 error under FGSM",
    "pgd.top1_error": "top-1 error under PGD-10",
}


def report(paths: list[Path], as_json: bool = False) -> None:
    """Print the tables (or the same figures as JSON) of records and of folders' records; draw pictures beside them.

    Raises TrainError for a missing or damaged record and for two records of one run.
    """
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    files = record_files(paths)
    for file in files:
        record = read_record(file) | {"path": str(file)}
        groups[tuple(record[key] for key in ("data", "data_sha256", *RECIPE))].append(record)
    summaries = [summarise(records) for records in groups.values()]
    pictures = [files[0].parent / name for name in ("curves.png", "reliability.png")]
    finished = [arms(records) for records in groups.values() if arms(records)]
    if finished:
        plot_curves(finished, pictures[0])
        plot_reliability(finished, pictures[1])
    if as_json:
        print(json.dumps({"groups": summaries, "pictures": [str(p) for p in pictures if finished]}, indent=2))
    else:
        texts = [markdown(summary) for summary in summaries]
        print("\n\n".join(texts + [f"Pictures: {pictures[0]}, {pictures[1]}"] * bool(finished)))


def record_files(paths: list[Path]) -> list[Path]:
    """The records that these files and folders are and hold; TrainError where there is none."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].exists():
            raise TrainError(f"{path} is neither a record (.jsonl) nor a folder with records")
        files += found
    return list(dict.fromkeys(file.resolve() for file in files))


def arms(records: list[Record]) -> dict[str, list[Record]]:
    """Finished records by loss, in order of strength and seed, the focal form last."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["loss"] == "focal", r["strength"], r["seed"])):
        if "final" in record:
            strength = f" {record['strength']:g}" if record["loss"] == "lace" and record["strength"] < 1 else ""
            found.setdefault(record["loss"].upper().replace("FOCAL", "focal") + strength, []).append(record)
    return found


def summarise(records: list[Record]) -> dict[str, Any]:
    """The figures of records that share data and recipe."""
    seen: dict[tuple[Any, ...], str] = {}
    for record in records:
        other = seen.setdefault(tuple(record[key] for key in ARM), record["path"])
        if other != record["path"]:
            raise TrainError(f"{other} and {record['path']} are of the same run: report on one of them")
    by_loss = arms(records)
    all_finished = [record for arm in by_loss.values() for record in arm]
    shown = [m for m in METRICS if all_finished and all(m.split(".")[0] in record["sets"] for record in all_finished)]
    by_arm: dict[str, Any] = {
        name: {
            "n": len(arm),
            "seeds": [record["seed"] for record in arm],
            **{metric: statistics([figure(record, metric) for record in arm]) for metric in shown},
        }
        for name, arm in by_loss.items()
    }
    first = records[0]
    paper = {key: getattr(Config, key) for key in RECIPE}
    scaled = [f"{key} {first[key]} (paper {paper[key]})" for key in RECIPE if first[key] != paper[key]]
    return {
        "data": first["data"],
        "classes": first["classes"],
        "recipe": {key: first[key] for key in RECIPE},
        "metrics": shown,
        "arms": by_arm,
        "differences": {
            f"{a} - {b}": {metric: difference(by_arm[a][metric], by_arm[b][metric]) for metric in shown}
            for a, b in sorted(combinations(by_arm, 2), key=lambda pair: " - ".join(pair) != PAIR)
        },
        "is_cifar100": first["data"].lower().startswith("cifar")
        and (first["classes"], first["train_images"] + first["unused_images"], first["test_images"])
        == (100, 50_000, 10_000),
        "scaled_down": [text for text in scaled if not text.startswith("precision")],
        "paper_top5_error": PAPER,
        "unfinished": [r["path"] for r in records if "final" not in r],
    }


def figure(record: Record, metric: str) -> float:
    name, key = metric.split(".")
    value: float = record["sets"][name][key]
    return value


def statistics(values: list[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "values": values,
    }


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """a's mean minus b's, Welch's 95 % interval and two-sided p; these None where the seeds have no spread."""
    seeds = min(len(a["values"]), len(b["values"]))
    found: dict[str, Any] = {"mean": a["mean"] - b["mean"], "interval": None, "p": None, "seeds": seeds}
    if seeds == 1 or a["sd"] == b["sd"] == 0:
        return found
    test = ttest_ind(a["values"], b["values"], equal_var=False)
    interval = test.confidence_interval()
    return found | {"interval": [float(interval.low), float(interval.high)], "p": float(test.pvalue)}


def markdown(summary: dict[str, Any]) -> str:
    """What finished runs gave, what keeps it from being the paper's experiment, and what is unfinished."""
    recipe = summary["recipe"]
    lines = [f"### {summary['data']}: width {recipe['width']}, {recipe['epochs']} epochs, {recipe['precision']}", ""]
    lines += tables(summary) if summary["arms"] else []
    if summary["is_cifar100"] and summary["scaled_down"]:
        lines.append(
            f"- Scaled down: {', '.join(summary['scaled_down'])}. Not to be compared with the paper's top-5 error,"
            f" {PAPER['ce']} % (CE) and {PAPER['lace']} % (LACE)."
        )
    lines += [f"- Unfinished, not counted: {path}" for path in summary["unfinished"]]
    return "\n".join(lines).rstrip()


def tables(summary: dict[str, Any]) -> list[str]:
    """By loss, by seed and of the differences; verdicts."""
    shown = summary["metrics"]
    titles = [METRICS[metric] for metric in shown]
    lines = [
        "Figures of the last epoch, errors in percent: mean ± standard deviation over the seeds.",
        "",
        *header("loss", "n", *titles),
    ]
    is_papers = summary["is_cifar100"] and not summary["scaled_down"]
    for name, arm in summary["arms"].items():
        cells = [spread(arm[metric], metric) for metric in shown]
        lines.append(row(name, arm["n"], *cells))
    if is_papers:
        lines += [row(f"paper, {loss.upper()}", "", error, *[""] * (len(shown) - 1)) for loss, error in PAPER.items()]
    lines += ["", *header("loss", "seed", *titles)]
    for name, arm in summary["arms"].items():
        for i, seed in enumerate(arm["seeds"]):
            lines.append(row(name, seed, *(f"{arm[m]['values'][i]:{form(m)}}" for m in shown)))
    if summary["differences"]:
        lines += ["", "Differences of the means, with Welch's 95 % interval.", "", *header("", *titles)]
        for pair, found in summary["differences"].items():
            lines.append(row(pair, *(signed(found[m], m) for m in shown)))
        lines += ["", *(f"- {verdict(pair, found[PRIMARY])}" for pair, found in summary["differences"].items())]
    return lines + (papers_questions(summary) if is_papers else [])


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(*titles: str) -> list[str]:
    return [row(*titles), row(*["---"] * len(titles))]


def form(metric: str) -> str:
    return ".4f" if metric.endswith("nll") else ".2f"


def spread(found: dict[str, Any], metric: str) -> str:
    mean = f"{found['mean']:{form(metric)}}"
    return mean if found["sd"] is None else f"{mean} ± {found['sd']:{form(metric)}}"


def signed(found: dict[str, Any], metric: str) -> str:
    numbers = [f"{value:+{form(metric)}}" for value in (found["mean"], *(found["interval"] or ()))]
    return numbers[0] if found["interval"] is None else f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def verdict(pair: str, found: dict[str, Any]) -> str:
    """On the primary figure, in words."""
    said = f"Top-5 error, {pair}: {signed(found, PRIMARY)} points"
    if found["seeds"] < SEEDS:
        return f"{said}: no verdict, which was declared for at least {SEEDS} seeds a loss."
    if found["interval"] is None:
        return f"{said}: undecided, the seeds have no spread."
    low, high = found["interval"]
    a, b = pair.split(" - ")
    word = f"{b} has the smaller error" if low > 0 else f"{a} has the smaller error" if high < 0 else "undecided"
    undeclared = word != "undecided" and pair != PAIR
    beside = f" (beside the declared {PAIR}, not corrected for several pairs)" if undeclared else ""
    return f"{said}, p = {found['p']:.2g}: {word}{beside}."


def papers_questions(summary: dict[str, Any]) -> list[str]:
    """Whether the baseline is the paper's, within 0.3 points, and whether its difference lies in our interval."""
    lines = []
    if (ce := summary["arms"].get("CE")) and ce["n"] >= SEEDS:
        near = abs(ce[PRIMARY]["mean"] - PAPER["ce"]) <= 0.3
        lines.append(f"- CE's mean is {'within' if near else 'not within'} 0.3 points of the paper's {PAPER['ce']} %.")
    found = summary["differences"].get(PAIR, {}).get(PRIMARY, {})
    if found.get("interval") and found["seeds"] >= SEEDS:
        gap = PAPER["ce"] - PAPER["lace"]
        holds = found["interval"][0] <= gap <= found["interval"][1]
        lines.append(f"- The interval of {PAIR} {'holds' if holds else 'does not hold'} the paper's {gap:.1f} points.")
    return lines


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
            axis.set(xlabel="epoch", ylabel=label, title=f"{first['data']}, width {first['width']}")
            axis.grid(alpha=0.3)
        # Each loss has its own training loss; decades show where all go.
        line[2].set_yscale("log")
        line[3].set_yscale("log")
        line[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
        accuracy.set(xlabel="confidence", ylabel="accuracy", title=f"{first['data']}, width {first['width']}")
        share.set(xlabel="confidence", ylabel="share of the test images, %")
        accuracy.legend()
        for axis in (accuracy, share):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
