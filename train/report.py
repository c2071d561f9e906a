"""Records to Markdown tables of at most 80 columns, with intervals, power and verdicts in words, and to pictures.

The declared interval is Welch's; that of the paired differences stands beside it. A conclusion is drawn only where a
plan declares n (see `plan.py`) and all its runs are finished.
"""

import json
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .config import TrainError
from .pictures import plot_curves, plot_reliability
from .plan import PAIR, PAPER, PRIMARY
from .schema import Record
from .store import read_record
from .summary import CALIBRATION, METRICS, RECIPE, arms, summarise

COLUMNS = 80
DECLARED = " - ".join(PAIR)
SCALED = (
    "Calibration error in 15 bins. Probabilities: the class probabilities that LACE stands for, by its softmax."
    " Scaled: after one temperature."
)


def report(paths: list[Path], as_json: bool = False) -> list[dict[str, Any]]:
    """Print the tables (or the same figures as JSON) of records and of folders' records; draw pictures beside them.

    Returns the figures of every group of records that share data and recipe.
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
        print("\n\n".join(texts + [wrap(f"Pictures: {pictures[0]}, {pictures[1]}")] * bool(finished)))
    return summaries


def record_files(paths: list[Path]) -> list[Path]:
    """Records that these files and folders are and hold. Raises TrainError where there is none."""
    files: list[Path] = []
    for path in paths:
        records = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not records or not records[0].exists():
            raise TrainError(f"{path} is neither a record (.jsonl) nor a folder with records")
        files += records
    return list(dict.fromkeys(file.resolve() for file in files))


def markdown(summary: dict[str, Any]) -> str:
    """What finished runs gave, how far the plan is, what keeps it from being the paper's experiment."""
    recipe, named = summary["recipe"], f"{summary['design']}, " if summary["design"] else ""
    lines = [f"### {named}{summary['data']}: width {recipe['width']}, {recipe['epochs']} epochs, {recipe['precision']}"]
    lines += ["", wrap(summary["standing"])]
    if summary["arms"]:
        lines += ["", "Figures of the last epoch: mean ± standard deviation over the seeds.", ""]
        lines += means(summary)
    if summary["differences"]:
        lines += differences(summary)
    lines += ["", *map(item, remarks(summary))]
    return "\n".join(lines).rstrip()


def what_was_seen(summary: dict[str, Any]) -> str:
    """One sentence on the runs of a command: mean test errors, and whether the interval of the difference holds 0."""
    # Of ten classes nearly every image has its own among the first five.
    metric, name = (PRIMARY, "top-5") if summary["classes"] > 10 else ("test.top1_error", "top-1")
    by_arm = [f"{arm[metric]['mean']:.2f} % with {loss} (n = {arm['n']})" for loss, arm in summary["arms"].items()]
    if not by_arm:
        return "Seen: nothing yet, no run is finished."
    text = f"Seen: a mean {name} test error of {' and '.join(by_arm)}"
    if declared := summary["differences"].get(DECLARED):
        if (interval := declared[metric]["welch"]["interval"]) is None:
            return wrap(f"{text}; these seeds give no interval for the difference.")
        low, high = interval
        text += f"; the 95 % interval of the difference, {low:+.2f} to {high:+.2f} points,"
        if low <= 0 <= high:
            text += " holds 0: undecided"
        else:
            text += " excludes 0" + ("" if summary["complete"] else ", but there is no finished plan: no conclusion")
    return wrap(f"{text}.")


def wrap(text: str, **more: Any) -> str:
    bound = text.replace(" %", "\xa0%")
    filled = textwrap.fill(bound, COLUMNS, break_long_words=False, break_on_hyphens=False, **more)
    return filled.replace("\xa0", " ")


def item(text: str) -> str:
    return wrap(f"- {text}", subsequent_indent="  ")


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns of equal width; where they do not fit side by side, the first one again with the rest below."""
    columns = [[str(cell) for cell in column] for column in zip(header, *rows, strict=True)]
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    lines: list[str] = []
    first, *rest = columns
    while rest:
        part, width = [first], len(first[0]) + 4
        while rest and (len(part) == 1 or width + len(rest[0][0]) + 3 <= COLUMNS):
            width += len(rest[0][0]) + 3
            part.append(rest.pop(0))
        head, *body = (f"| {' | '.join(cells)} |" for cells in zip(*part, strict=True))
        rule = "|".join("-" * (len(column[0]) + 2) for column in part)
        lines += [*([""] if lines else []), head, f"|{rule}|", *body]
    return lines


def number_format(metric: str) -> str:
    return ".2f" if metric.endswith("error") else ".3f"


def mean_and_sd(arm: dict[str, Any], metric: str) -> str:
    if (statistics := arm.get(metric)) is None:
        return ""
    mean, sd = statistics["mean"], statistics["sd"]
    form = number_format(metric)
    return f"{mean:{form}}" if sd is None else f"{mean:{form}} ± {sd:{form}}"


def with_interval(difference: dict[str, Any], metric: str = PRIMARY) -> str:
    """A difference with its sign, and its interval where it has one."""
    if difference["mean"] is None:
        return "-"
    mean, *limits = (f"{x:+{number_format(metric)}}" for x in (difference["mean"], *(difference["interval"] or ())))
    return f"{mean} ({' to '.join(limits)})" if limits else mean


def title(metric: str) -> str:
    """Words for a figure that is no part of the calibration's table."""
    return METRICS.get(metric) or f"top-1 error, {metric.rpartition('.')[0]}, %"


def means(summary: dict[str, Any]) -> list[str]:
    """Tables of every arm: errors, calibration, and the primary figure seed by seed."""
    by_arm, columns = summary["arms"], [*chain(*CALIBRATION.values())]
    lines = table(
        ["", *by_arm],
        [
            ["n", *(arm["n"] for arm in by_arm.values())],
            *(
                [title(m), *(mean_and_sd(arm, m) for arm in by_arm.values())]
                for m in summary["metrics"]
                if m not in columns
            ),
        ],
    )
    rows = []
    for name, arm in by_arm.items():
        for said, row in CALIBRATION.items():
            # Without LACE's strength the class probabilities are the softmax.
            if row[0] in arm and not (name == "CE" and said.startswith("prob")):
                rows.append([f"{name} {said}", *(mean_and_sd(arm, metric) for metric in row)])
    lines += ["", wrap(SCALED), "", *table(["test images", "NLL", "calibration, %", "Brier score"], rows)]
    seeds = sorted({seed for arm in by_arm.values() for seed in arm["seeds"]})
    by_seed = [dict(zip(arm["seeds"], arm[PRIMARY]["values"], strict=True)) for arm in by_arm.values()]
    rows = [[seed, *(f"{errors[seed]:.2f}" if seed in errors else "" for errors in by_seed)] for seed in seeds]
    return [*lines, "", *table(["seed: top-5 test error, %", *by_arm], rows)]


def differences(summary: dict[str, Any]) -> list[str]:
    """Tables of the declared pair by each analysis, of its other figures, and of the other pairs."""
    pairs: dict[str, Any] = dict(summary["differences"])
    lines: list[str] = []
    if declared := pairs.pop(DECLARED, None):
        primary = declared[PRIMARY]
        analyses = [("Welch, points (declared)", primary["welch"])]
        analyses += [(f"paired by seed, points, {primary['paired']['seeds']} seeds", primary["paired"])]
        analyses += [("Welch, ratio of the errors - 1, %", primary["ratio"])] if primary["ratio"] else []
        rows = [[name, with_interval(f), "" if f["p"] is None else f"{f['p']:.2g}"] for name, f in analyses]
        lines += ["", *table([f"{DECLARED}, top-5 test error", "95 % interval", "p"], rows)]
        errors = [m for m in summary["metrics"] if m.endswith("_error") and m != PRIMARY and m.count(".") == 1]
        errors = [m for m in errors if m != "test.calibration_error"]
        rows = [[title(m), with_interval(declared[m]["welch"], m)] for m in errors]
        rows += [
            [f"{what}, {said}", with_interval(declared[metric]["welch"], metric)]
            for said, row in CALIBRATION.items()
            for what, metric in zip(("NLL", "calibration, %", "Brier score"), row, strict=True)
            if metric in declared
        ]
        lines += ["", *table([f"{DECLARED}, without a claim", "Welch, 95 %"], rows)]
    if pairs:
        rows = [[p, *(with_interval(f[PRIMARY][how]) for how in ("welch", "paired"))] for p, f in pairs.items()]
        lines += ["", "Beside the plan, top-5 test error, not corrected for several pairs:", ""]
        lines += table(["", "Welch, 95 %", "paired, 95 %"], rows)
    return lines


def remarks(summary: dict[str, Any]) -> list[str]:
    """Verdict, power, and whatever a reader of the tables has to know."""
    lines = conclusions(summary) if summary["complete"] else []
    if power := summary["power"]:
        lines.append(
            f"Power of the declared test (5 %, two-sided) with n = {power['n']} and the spread seen, {power['sd']:.2f}"
            f" points: {power['points']:.2f} for {PAPER['CE'] - PAPER['LACE']:.1f} points, {power['ratio']:.2f} for the"
            f" paper's ratio, {PAPER['CE']} / {PAPER['LACE']} = +{100 * (PAPER['CE'] / PAPER['LACE'] - 1):.1f} %."
        )
    if "LACE - focal" in summary["differences"]:
        lines.append(
            "LACE - focal is an A/A check: one loss, computed in two ways. An interval without 0 is a false alarm,"
            " which 1 check in 20 gives, or a fault of the arithmetic."
        )
    if summary["is_cifar100"] and summary["scaled_down"]:
        lines.append(
            f"Scaled down: {', '.join(summary['scaled_down'])}. Not to be compared with the paper's top-5 error,"
            f" {PAPER['CE']} % (CE) and {PAPER['LACE']} % (LACE)."
        )
    elif summary["is_cifar100"]:
        lines.append(f"The paper's top-5 test error: {PAPER['CE']} % (CE) and {PAPER['LACE']} % (LACE).")
    lines += [f"Unfinished, not counted, after {done} epochs: {path}" for path, done in summary["unfinished"].items()]
    for what, counts in summary["mixed"].items():
        values = ", ".join(f"{value} ({count} runs)" for value, count in counts.items())
        lines.append(f"These figures mix runs of several values of {what}: {values}.")
    for pair, seeds in summary["other_devices"].items():
        lines.append(
            f"Seeds {', '.join(map(str, seeds))}: {pair} ran on different kinds of machines; one kind was planned."
        )
    return lines


def conclusions(summary: dict[str, Any]) -> list[str]:
    """Verdict of a complete study, what it excludes, and the effects that were declared."""
    primary, gap = summary["differences"][DECLARED][PRIMARY], PAPER["CE"] - PAPER["LACE"]
    text = f"Top-5 error, {DECLARED}: {with_interval(primary['welch'])} points"
    if primary["welch"]["interval"] is None:
        return [f"{text}: undecided, the seeds have no spread."]
    (low, high), (a, b) = primary["welch"]["interval"], PAIR
    word = f"{b} has the smaller error" if low > 0 else f"{a} has the smaller error" if high < 0 else "undecided"
    lines = [
        f"{text}, p = {primary['welch']['p']:.2g}: {word}.",
        f"Excluded: differences above {high:+.2f} and below {low:+.2f} points. The paper's {gap:.1f} points are"
        f" {'not ' if low <= gap <= high else ''}excluded.",
    ]
    if primary["ratio"]:
        paper, (low, high) = 100 * (PAPER["CE"] / PAPER["LACE"] - 1), primary["ratio"]["interval"]
        lines.append(
            f"Excluded: ratios of {a}'s error to {b}'s above {high:+.1f} % and below {low:+.1f} %. The paper's"
            f" {paper:+.1f} % is {'not ' if low <= paper <= high else ''}excluded."
        )
    if summary["is_cifar100"] and not summary["scaled_down"]:
        near = abs(summary["arms"]["CE"][PRIMARY]["mean"] - PAPER["CE"]) <= 0.3
        lines.append(f"CE's mean is {'' if near else 'not '}within 0.3 points of the paper's {PAPER['CE']} %.")
    return lines
