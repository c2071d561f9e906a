"""Finished records that share data and recipe, summarised: means, differences, power, and how far the plan is.

Seeds are the sample: mean and standard deviation (n - 1) over them. Figures are the last epoch's, never the best.
"""

import json
import re
from collections import Counter
from dataclasses import fields
from itertools import chain, combinations
from typing import Any

import numpy as np

from .config import Config, TrainError
from .intervals import common_sd, has_spread, paired, power, ratio, statistics, welch
from .plan import DESIGNS, PAIR, PAPER, PRIMARY, Design
from .schema import Record

# Runs on the same data and with the same RECIPE compare.
RECIPE = tuple(f.name for f in fields(Config) if f.name not in ("data", "test_every", "loss", "strength", "seed"))
# Figures of a record's last line by set of images and name; shown where all finished records of a group have them.
METRICS = {
    PRIMARY: "top-5 test error, %",
    "test.top1_error": "top-1 test error, %",
    "unused.top5_error": "top-5 error, unused images, %",
    "unused.top1_error": "top-1 error, unused images, %",
    "train.top5_error": "top-5 training error, %",
    "train.top1_error": "top-1 training error, %",
    "train.nll": "training NLL",
    "train.calibration_error": "training calibration error, %",
}
ATTACK = re.compile(r"(FGSM|PGD-10) ([0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]+)?)/255")  # a set's name by `attack.py`
# NLL, calibration error and Brier score of the test images, by what is taken for probabilities; scaled: after one
# temperature. LACE's probabilities are those of `probabilities.py`.
CALIBRATION = {
    "softmax": ("test.nll", "test.calibration_error", "test.softmax.brier"),
    **{
        title: (f"test.{name}.nll", f"test.{name}.calibration_error", f"test.{name}.brier")
        for title, name in (
            ("softmax, scaled", "softmax_scaled"),
            ("probabilities", "posterior"),
            ("probabilities, scaled", "posterior_scaled"),
        )
    },
}
MACHINE = ("device", "threads", "commit", "mode")


def arm_name(record: Record) -> str:
    strength = f" {record['strength']}" if record["loss"] == "lace" and record["strength"] < 1 else ""
    return {"ce": "CE", "lace": "LACE", "focal": "focal"}[record["loss"]] + strength


def arms(records: list[Record]) -> dict[str, list[Record]]:
    """Finished records by loss, in order of strength and seed, the focal form last."""
    by_loss: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["loss"] == "focal", r["strength"], r["seed"])):
        if "final" in record:
            by_loss.setdefault(arm_name(record), []).append(record)
    return by_loss


def figures(record: Record, sets: list[str]) -> dict[str, Any]:
    """Figures of these sets of images by their dotted names, as far as the record has them."""
    by_name = {f"{name}.{key}": value for name in sets for key, value in record["sets"].get(name, {}).items()}
    inner = [(name, value) for name, value in by_name.items() if isinstance(value, dict)]
    return by_name | {f"{name}.{key}": value for name, values in inner for key, value in values.items()}


def summarise(records: list[Record]) -> dict[str, Any]:
    """Figures of records that share data and recipe. Raises TrainError for two of one run."""
    seen: dict[tuple[Any, ...], str] = {}
    for record in records:
        other = seen.setdefault((arm_name(record), record["seed"]), record["path"])
        if other != record["path"]:
            raise TrainError(f"{other} and {record['path']} belong to the same run: report on one of them")
    by_loss, first = arms(records), records[0]
    finished = [record for arm in by_loss.values() for record in arm]
    names = dict.fromkeys(name for record in finished for name in record["sets"])
    attacks = [name for *_, name in sorted((m[1], float(m[2]), m[0]) for m in map(ATTACK.fullmatch, names) if m)]
    metrics = [*METRICS, *(f"{name}.top1_error" for name in attacks), *chain(*CALIBRATION.values())]
    sets = ["test", "train", "unused", *attacks]
    by_record = {name: [figures(record, sets) for record in arm] for name, arm in by_loss.items()}
    shown = [m for m in metrics if finished and all(m in record for arm in by_record.values() for record in arm)]
    by_arm: dict[str, Any] = {
        name: {
            "n": len(arm),
            "seeds": [record["seed"] for record in by_loss[name]],
            **{metric: statistics([record[metric] for record in arm]) for metric in shown},
        }
        for name, arm in by_record.items()
    }
    pairs = sorted(combinations(by_arm, 2), key=lambda pair: pair != PAIR)
    paper = {name: getattr(Config, name) for name in RECIPE}
    recipe = {name: first[name] for name in RECIPE}
    is_cifar100 = first["data"].lower().startswith("cifar") and (
        (first["classes"], first["train_images"] + first["unused_images"], first["test_images"])
        == (100, 50_000, 10_000)
    )
    design = next((design for design in DESIGNS if is_cifar100 and design.fits(recipe)), None)
    return {
        "data": first["data"],
        "classes": first["classes"],
        "recipe": recipe,
        "design": design.name if design else None,
        **plan_progress(design, by_arm),
        "metrics": shown,
        "arms": by_arm,
        "differences": {f"{a} - {b}": {m: difference(by_arm[a], by_arm[b], m) for m in shown} for a, b in pairs},
        "power": declared_power(by_arm, design.n) if design else None,
        "is_cifar100": is_cifar100,
        "scaled_down": [
            f"{name} {recipe[name]} (paper {paper[name]})"
            for name in RECIPE
            if recipe[name] != paper[name] and name != "precision"
        ],
        "paper_top5_error": PAPER,
        "unfinished": {r["path"]: f"{len(r['epochs_log'])} of {r['epochs']}" for r in records if "final" not in r},
        "mixed": mixed_origins(finished),
        "other_devices": {f"{a} and {b}": seeds for a, b in pairs if (seeds := split_seeds(by_loss[a], by_loss[b]))},
    }


def plan_progress(design: Design | None, by_arm: dict[str, Any]) -> dict[str, Any]:
    """How far the planned runs are, in words, and whether all of them and no others are finished."""
    if design is None:
        return {"complete": False, "standing": "No plan declares n for this recipe: figures without a conclusion."}
    planned, present = set(range(design.n)), {name: set(by_arm.get(name, {"seeds": []})["seeds"]) for name in PAIR}
    done = sum(len(seeds & planned) for seeds in present.values())
    more = {name: sorted(seeds - planned) for name, seeds in present.items() if seeds - planned}
    text = f"{done} of {2 * design.n} runs finished"
    if done < 2 * design.n:
        text += ": interim, no conclusion"
    if any(len(seeds) != design.n for seeds in present.values()):
        text += f". n is {' and '.join(f'{len(present[name])} ({name})' for name in PAIR)}, in the plan {design.n}"
    if more:
        extra = " and ".join(f"{name} {', '.join(map(str, seeds))}" for name, seeds in more.items())
        text += f". The plan has no seeds beyond {design.n - 1}: take out {extra}; no conclusion"
    return {"complete": done == 2 * design.n and not more, "standing": f"{text}."}


def difference(a: dict[str, Any], b: dict[str, Any], metric: str) -> dict[str, Any]:
    """Difference a - b of one figure of two arms: by Welch, paired by seed, and as a ratio."""
    x, y = np.array(a[metric]["values"]), np.array(b[metric]["values"])
    by_seed = dict(zip(a["seeds"], x, strict=True)), dict(zip(b["seeds"], y, strict=True))
    return {"welch": welch(x, y), "paired": paired(*by_seed), "ratio": ratio(x, y)}


def declared_power(by_arm: dict[str, Any], n: int) -> dict[str, Any] | None:
    """Power for the paper's difference and for its ratio, with the spread that is seen; None where there is none."""
    errors = [np.array(by_arm[name][PRIMARY]["values"]) for name in PAIR if name in by_arm]
    if len(errors) < 2 or not all(map(has_spread, errors)) or min(x.min() for x in errors) <= 0:
        return None
    effects = PAPER["CE"] - PAPER["LACE"], np.log(PAPER["CE"] / PAPER["LACE"])
    spreads = common_sd(*errors), common_sd(*map(np.log, errors))
    points, relative = (power(*pair, n) for pair in zip(effects, spreads, strict=True))
    return {"n": n, "sd": spreads[0], "points": points, "ratio": relative}


def mixed_origins(records: list[Record]) -> dict[str, dict[str, int]]:
    """What differs between the machines and programs that made these records, and how many records have which."""
    origins = []
    for record in records:
        versions = record.get("versions")
        origin = {name: record.get(name) for name in MACHINE} | {"resumed elsewhere": bool(record.get("resumed"))}
        if isinstance(versions, dict):
            origin |= {f"version of {name}": version for name, version in versions.items()}
        origins.append(origin)
    counts = {
        # As JSON, which has no characters that a terminal obeys; a file may hold any.
        json.dumps(name)[1:-1][:60]: dict(Counter(json.dumps(origin.get(name))[:60] for origin in origins))
        for name in dict.fromkeys(name for origin in origins for name in origin)
    }
    return {name: values for name, values in counts.items() if len(values) > 1}


def split_seeds(a: list[Record], b: list[Record]) -> list[int]:
    """Seeds whose two runs come from different kinds of machines."""
    devices = {record["seed"]: record["device"] for record in b}
    return [r["seed"] for r in a if r["seed"] in devices and r["device"] != devices[r["seed"]]]
