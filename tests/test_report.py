"""The report: its figures against closed forms, what it says while a plan is under way, and the records it refuses."""

import copy
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for needed in ("torch", "sklearn", "scipy", "matplotlib", "torchvision", "tqdm"):
    pytest.importorskip(needed)

import mpmath  # noqa: E402
import scipy.stats  # noqa: E402
from benchmarks import figure  # noqa: E402
from PIL import Image  # noqa: E402
from test_train import assert_error  # noqa: E402

from lace_loss.train import plan, store  # noqa: E402
from lace_loss.train.__main__ import main, parser  # noqa: E402
from lace_loss.train.config import Config  # noqa: E402
from lace_loss.train.intervals import paired, power, ratio, welch  # noqa: E402
from lace_loss.train.pictures import pyplot, save  # noqa: E402
from lace_loss.train.report import markdown, report, what_was_seen  # noqa: E402
from lace_loss.train.schema import FIGURES, TESTED, Record  # noqa: E402
from lace_loss.train.summary import RECIPE, summarise  # noqa: E402

ROOT = Path(__file__).parents[1]
E = {"schedule": "triangle", "precision": "bfloat16", "shrink": 2, "pad": 2, "subset": 10_000, "width": 16}
E |= {"epochs": 40, "lr_step": 18, "train_images": 10_000, "unused_images": 40_000}
NOISE = (-0.1, 0.0, 0.1, 0.05, -0.05)


def record(
    folder: Path,
    loss: str,
    seed: int,
    top5: float,
    unfinished: bool = False,
    more: Record | None = None,
    test: Record | None = None,
    **settings: object,
) -> None:
    """A record as a run on CIFAR-100 at the paper's recipe would write it, but for `settings`, with `more` sets of
    images and more figures of the `test` images.
    """
    config = {name: field.default for name, field in Config.__dataclass_fields__.items()}
    header = config | {"loss": loss, "seed": seed, "strength": float(loss != "ce"), "classes": 100}
    header |= {"data_sha256": "0", "device": "d", "threads": 1}
    header |= {"train_images": 50_000, "unused_images": 0, "test_images": 10_000} | settings
    row = dict.fromkeys(FIGURES, 1.0) | {"top5_error": top5, "seconds": 1.0}
    log = [row | {"epoch": epoch} for epoch in range(1 if unfinished else header["epochs"])]
    zeros = [0.0] * 12
    bins = {"count": [0, 4, 6, *zeros], "confidence": [0.0, 0.5, 0.9, *zeros], "accuracy": [0.0, 0.25, 1.0, *zeros]}
    sets = {name: {key: row[key] for key in TESTED} | bins for name in ("test", "train", *(more or {}))}
    for name, values in {"test": test or {}, **(more or {})}.items():
        sets[name] |= values
    lines = [header, *log] if unfinished else [header, *log, row | {"final": True, "sets": sets}]
    (folder / f"{loss}{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    """The report with single spaces: neither the width of a column nor the end of a line matters."""
    capsys.readouterr()
    report(list(paths))
    return re.sub(r"\s+", " ", capsys.readouterr().out)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_welch_interval_against_closed_form() -> None:
    from scipy.special import stdtr, stdtrit

    a, b = np.array([6.9, 6.6, 6.7, 6.85]), np.array([6.2, 6.3, 6.0])
    va, vb = np.var(a, ddof=1) / 4, np.var(b, ddof=1) / 3
    degrees = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    half = stdtrit(degrees, 0.975) * math.sqrt(va + vb)
    found = welch(a, b)
    middle = np.mean(a) - np.mean(b)
    assert found["mean"] == pytest.approx(middle)
    assert found["interval"] == pytest.approx([middle - half, middle + half])
    assert found["p"] == pytest.approx(2 * stdtr(degrees, -abs(middle) / math.sqrt(va + vb)))


def test_the_paired_interval_is_that_of_the_mean_of_the_differences_of_the_shared_seeds() -> None:
    from scipy.special import stdtrit

    a, b = {0: 6.9, 1: 6.6, 2: 6.7, 7: 99.0}, {2: 6.2, 1: 6.3, 0: 6.0, 8: 1.0}
    d = np.array([6.9 - 6.0, 6.6 - 6.3, 6.7 - 6.2])
    half = stdtrit(2, 0.975) * d.std(ddof=1) / math.sqrt(3)
    found = paired(a, b)
    assert found["seeds"] == 3
    assert [found["mean"], *found["interval"]] == pytest.approx([d.mean(), d.mean() - half, d.mean() + half])
    assert paired({0: 1.0}, {1: 2.0})["mean"] is None
    assert paired({0: 0.1, 1: 0.3}, {0: 0.2, 1: 0.4})["interval"] is None, "no spread but that of rounding"


def test_the_ratio_is_that_of_the_geometric_means_and_does_not_depend_on_the_unit() -> None:
    a, b = np.array([6.9, 6.6, 6.7]), np.array([6.2, 6.3, 6.0])
    found = ratio(a, b)
    assert found is not None
    assert found["mean"] == pytest.approx(100 * (scipy.stats.gmean(a) / scipy.stats.gmean(b) - 1))
    logs = welch(np.log(a), np.log(b))["interval"]
    assert found["interval"] == pytest.approx([100 * (math.exp(x) - 1) for x in logs])
    again = ratio(10 * a, 10 * b)
    assert again is not None and again["interval"] == pytest.approx(found["interval"])
    assert ratio(np.array([0.0, 1.0]), b) is None


def test_power_is_the_integral_of_the_noncentral_t_and_the_share_of_simulated_tests() -> None:
    """The integral over the distribution of the standard deviation, in mpmath; the plan's figures are among them."""
    for effect, sd, n in ((0.5, 0.64, 20), (0.5, 0.25, 5), (0.1, 1.0, 3), (3.0, 0.7, 5)):
        degrees, shift = 2 * n - 2, effect / sd * math.sqrt(n / 2)
        limit = scipy.stats.t.isf(0.025, degrees)

        def density(s: Any, degrees: int = degrees, shift: float = shift, limit: float = limit) -> Any:
            chi = 2 ** (1 - degrees / 2) / mpmath.gamma(degrees / 2) * s ** (degrees - 1) * mpmath.exp(-s * s / 2)
            edge = limit * s / math.sqrt(degrees)
            return chi * (mpmath.ncdf(shift - edge) + mpmath.ncdf(-shift - edge))

        exact = mpmath.quad(density, [0, 2, 4, 6, 10, 20])
        assert power(effect, sd, n) == pytest.approx(float(exact), rel=1e-8)
    random = np.random.default_rng(0)
    a, b = random.normal(0.5, 0.64, (20_000, 20)), random.normal(0, 0.64, (20_000, 20))
    share = (scipy.stats.ttest_ind(a, b, axis=1).pvalue < 0.05).mean()
    assert power(0.5, 0.64, 20) == pytest.approx(share, abs=4 * 0.5 / math.sqrt(20_000))
    shifts = [power(x, 1.0, n) for n in (2, 5, 20) for x in np.geomspace(1e-3, 1e6, 200)]
    assert np.isfinite(shifts).all()


def test_the_plans_powers_are_those_of_the_report() -> None:
    text = (ROOT / "train" / "README.md").read_text()
    rows = re.findall(r"^\| [EB], n = (\d+) \| ([\d.]+).*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == 4
    for row in rows:
        n, sd, half_point, point, half_width = map(float, row)
        assert [power(0.5, sd, int(n)), power(1, sd, int(n))] == pytest.approx([half_point, point], abs=0.005)
        assert scipy.stats.t.isf(0.025, 2 * n - 2) * sd * math.sqrt(2 / n) == pytest.approx(half_width, abs=0.005)


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["E", "B"])
def test_the_plans_commands_are_the_designs_that_the_report_knows(name: str) -> None:
    """As the README has them, through the parser: recipe, losses and seeds."""
    text = (ROOT / "train" / "README.md").read_text()
    flags = [re.search(f'^    {letter}="(.*)"$', text, re.M) for letter in ("S", name)]
    args = parser().parse_args(shlex.split(" ".join(found[1] for found in flags if found)))
    (design,) = (design for design in plan.DESIGNS if design.name == f"design {name}")
    assert args.loss == "both" and args.seeds == list(range(design.n))
    given = {key: getattr(args, key) for key in RECIPE if key in args}
    lr_step = math.ceil(0.45 * args.epochs)
    assert design.fits({key: getattr(Config, key) for key in RECIPE} | given | {"lr_step": lr_step})
    assert not design.fits({key: getattr(Config, key) for key in RECIPE} | given | {"lr_step": lr_step, "width": 8})
    table = re.search(r"^\| seeds, for each of CE and LACE \(n\) \| (\d+): .* \| (\d+): .* \|$", text, re.M)
    assert table and int(table["EB".index(name) + 1]) == design.n


def test_the_committed_records_of_design_e_are_of_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (ROOT / "train" / "results" / "E").glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    assert main(["report", str(tmp_path), "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert group["design"] == "design E"
    assert set(group["arms"]) == {"CE", "LACE"}
    assert group["mixed"] == group["other_devices"] == {}


def study(folder: Path, n: int, shift: float = 0.3, **settings: Any) -> None:
    for seed in range(n):
        spread = 0.3 * NOISE[seed % 5] + 0.01 * seed
        record(folder, "ce", seed, 36.0 + spread, **settings)
        record(folder, "lace", seed, 36.0 - shift - spread, **settings)


def test_a_study_under_way_says_so_and_has_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path, 19, **E)
    record(tmp_path, "ce", 19, 36.0, **E)
    text = said(capsys, tmp_path)
    assert "### design E, cifar100: width 16, 40 epochs, bfloat16" in text
    assert "39 of 40 runs finished: interim, no conclusion. n is 20 (CE) and 19 (LACE), in the plan 20." in text
    for word in ("smaller error", "undecided", "Excluded"):
        assert word not in text
    assert "Power of the declared test (5 %, two-sided) with n = 20" in text


def test_a_complete_study_has_a_verdict_and_says_what_it_excludes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path, 20, **E)
    text = said(capsys, tmp_path)
    assert "40 of 40 runs finished." in text and "interim" not in text
    errors = [
        np.array(
            [json.loads((tmp_path / f"{arm}{s}.jsonl").read_text().splitlines()[-1])["top5_error"] for s in range(20)]
        )
        for arm in ("ce", "lace")
    ]
    declared, by_seed = scipy.stats.ttest_ind(*errors, equal_var=False), scipy.stats.ttest_rel(*errors)
    (low, high), (low2, high2) = declared.confidence_interval(), by_seed.confidence_interval()
    middle = errors[0].mean() - errors[1].mean()
    assert f"| Welch, points (declared) | {middle:+.2f} ({low:+.2f} to {high:+.2f}) |" in text
    assert f"| paired by seed, points, 20 seeds | {middle:+.2f} ({low2:+.2f} to {high2:+.2f}) |" in text
    assert f"points, p = {declared.pvalue:.2g}: LACE has the smaller error." in text
    assert f"Excluded: differences above {high:+.2f} and below {low:+.2f} points. The paper's 0.5 points are" in text
    relative = scipy.stats.ttest_ind(*map(np.log, errors), equal_var=False).confidence_interval()
    low, high = (100 * math.expm1(x) for x in relative)
    assert f"to LACE's above {high:+.1f} % and below {low:+.1f} %. The paper's +8.1 % is excluded." in text
    sd = math.sqrt(np.mean([error.var(ddof=1) for error in errors]))
    assert f"the spread seen, {sd:.2f} points: {power(0.5, sd, 20):.2f} for 0.5 points" in text


def test_seeds_beyond_the_plan_take_the_verdict_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path, 21, **E)
    text = said(capsys, tmp_path)
    assert "n is 21 (CE) and 21 (LACE), in the plan 20. The plan has no seeds beyond 19: take out CE 20 and" in text
    assert "no conclusion" in text and "smaller error" not in text


def test_without_a_plan_there_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study(tmp_path, 20, **(E | {"epochs": 39}))
    text = said(capsys, tmp_path)
    assert "No plan declares n for this recipe: figures without a conclusion." in text
    assert "smaller error" not in text and "Power" not in text


@pytest.mark.parametrize(
    ("shift", "words", "gap"),
    [
        (0.5, "LACE has the smaller error", "The paper's 0.5 points are not excluded"),
        (-0.9, "CE has the smaller error", "The paper's 0.5 points are excluded"),
        (0.02, "undecided", "The paper's 0.5 points are excluded"),
    ],
)
def test_the_verdict_is_said_whichever_way_it_falls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: float, words: str, gap: str
) -> None:
    for seed, noise in enumerate(NOISE):
        record(tmp_path, "ce", seed, 6.9 + noise)
        record(tmp_path, "lace", seed, 6.9 - shift + noise)
        record(tmp_path, "focal", seed, 3.0 + noise)
    text = said(capsys, tmp_path)
    assert "### the paper's recipe, cifar100" in text and "10 of 10 runs finished." in text
    assert f"Top-5 error, CE - LACE: {shift:+.2f} (" in text
    assert f": {words}." in text and gap in text
    assert text.count("smaller error") == (words != "undecided"), "no other pair has a verdict"
    assert "CE's mean is within 0.3 points of the paper's 6.7 %" in text
    assert "LACE - focal is an A/A check" in text
    assert "Beside the plan, top-5 test error, not corrected for several pairs: | | Welch, 95 %" in text


@pytest.mark.parametrize(
    ("settings", "seeds", "shift", "words"),
    [
        ({}, 1, 0.5, "; these seeds give no interval for the difference."),
        ({}, 5, 0.0, " holds 0: undecided."),
        ({}, 5, 0.5, " excludes 0."),
        ({}, 4, 0.5, " excludes 0, but there is no finished plan: no conclusion."),
        ({"classes": 10, "data": "digits"}, 5, 0.5, " excludes 0, but there is no finished plan: no conclusion."),
    ],
)
def test_one_sentence_says_what_was_seen(tmp_path: Path, settings: Any, seeds: int, shift: float, words: str) -> None:
    errors: dict[str, list[float]] = {"ce": [], "lace": []}
    for seed in range(seeds):
        for loss, error in (("ce", 6.9 + NOISE[seed]), ("lace", 6.9 - shift - 2 * NOISE[seed])):
            record(tmp_path, loss, seed, error, test={"top1_error": error}, **settings)
            errors[loss].append(error)
    files = sorted(tmp_path.glob("*.jsonl"))
    found = what_was_seen(summarise([store.read_record(file) | {"path": str(file)} for file in files]))
    assert max(map(len, found.splitlines())) <= 80
    name = "top-1" if settings else "top-5"
    expected = f"Seen: a mean {name} test error of {np.mean(errors['ce']):.2f} % with CE (n = {seeds}) and"
    expected += f" {np.mean(errors['lace']):.2f} % with LACE (n = {seeds})"
    if seeds > 1:
        low, high = scipy.stats.ttest_ind(*errors.values(), equal_var=False).confidence_interval()
        expected += f"; the 95 % interval of the difference, {low:+.2f} to {high:+.2f} points,"
    assert found.replace("\n", " ") == expected + words


# --- the tables -------------------------------------------------------------------------------------------------------


def test_report_gives_mean_deviation_and_n_beside_the_papers_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (ce, lace) in enumerate([(6.0, 5.0), (7.0, 5.5), (8.0, 6.0)]):
        record(tmp_path, "ce", seed, ce)
        record(tmp_path, "lace", seed, lace)
    text = said(capsys, tmp_path)
    assert "| top-5 test error, % | 7.00 ± 1.00 | 5.50 ± 0.50 |" in text
    assert all(f"| {seed} | {ce:.2f} | {lace:.2f} |" in text for seed, ce, lace in ((0, 6, 5), (1, 7, 5.5), (2, 8, 6)))
    assert "The paper's top-5 test error: 6.7 % (CE) and 6.2 % (LACE)." in text
    assert "A/A" not in text
    for picture in ("curves.png", "reliability.png"):
        with Image.open(tmp_path / picture) as image:
            image.verify()
    assert not list(tmp_path.glob("*tmp"))


def test_every_line_fits_80_columns_whatever_the_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quality = {"nll": 100.0, "calibration_error": 99.0, "brier": 1.9}
    test = dict.fromkeys(("softmax", "softmax_scaled", "posterior", "posterior_scaled"), quality)
    for seed in range(3):
        for strength in (0.125, 0.25, 0.375, 0.5, 0.75, 1.0):
            (tmp_path / f"{strength}").mkdir(exist_ok=True)
            record(tmp_path / f"{strength}", "lace", seed, 50.0 + seed, test=test, strength=strength)
        record(tmp_path, "ce", seed, 49.0 - seed, test=test)
        record(tmp_path, "focal", seed, 51.0 - 2 * seed, test=test, device=f"machine {seed}")
    record(tmp_path, "focal", 5, 51.0, unfinished=True)
    report([tmp_path, *(folder for folder in tmp_path.iterdir() if folder.is_dir())])
    text = capsys.readouterr().out
    arms = ["CE", "LACE 0.125", "LACE 0.25", "LACE 0.375", "LACE 0.5", "LACE 0.75", "LACE", "focal"]
    for arm in arms:
        columns = [
            line for line in text.splitlines() if line.startswith("| ") and f" {arm} " in line.replace("|", "  ")
        ]
        assert len(columns) >= 3, f"{arm} is a column of means and of seeds, and has a row of calibration"
    paths = [line for line in text.splitlines() if str(tmp_path) in line]
    assert max(len(line) for line in text.splitlines() if line not in paths) <= 80


def test_calibration_is_shown_before_and_after_one_temperature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("softmax", "softmax_scaled", "posterior", "posterior_scaled")
    for seed in range(2):
        for loss in ("ce", "lace"):
            test: Record = {
                name: {"nll": 2.0 + i + seed, "calibration_error": 10.0 + i + seed, "brier": 0.1 * (i + seed)}
                for i, name in enumerate(names)
            }
            test |= {"nll": 2.0 + seed, "calibration_error": 10.0 + seed}
            record(tmp_path, loss, seed, 6.7, test=test)
    text = said(capsys, tmp_path)
    for name, i in (("softmax", 0), ("softmax, scaled", 1), ("probabilities", 2), ("probabilities, scaled", 3)):
        row = f"LACE {name} | {2.5 + i:.3f} ± 0.707 | {10.5 + i:.2f} ± 0.71 | {0.05 + 0.1 * i:.3f} ± 0.071 |"
        assert row in text
    assert "CE softmax, scaled |" in text and "| CE probabilities" not in text, "they are its softmax"


def test_training_errors_and_attacks_are_shown_in_the_order_of_their_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: Record = {
        name: {"top1_error": 10.0 + i} for i, name in enumerate(("FGSM 10/255", "FGSM 2/255", "PGD-10 0.5/255"))
    }
    record(tmp_path, "ce", 0, 6.7, more=more | {"FGSM ../255": {}, "\x1b[31m": {}})
    text = said(capsys, tmp_path)
    assert "| top-1 training error, % | 1.00 |" in text
    rows = ["FGSM 2/255, % | 11.00 |", "FGSM 10/255, % | 10.00 |", "PGD-10 0.5/255, % | 12.00 |"]
    places = [text.index(f"| top-1 error, {row}") for row in rows]
    assert places == sorted(places)
    assert "../255" not in text and "\x1b" not in text


def test_report_keeps_recipes_apart_and_says_what_is_scaled_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, "ce", 0, 30.0, width=16, epochs=40)
    record(tmp_path, "lace", 0, 31.0)
    assert main(["report", str(tmp_path), "--json"]) == 0
    groups = {group["recipe"]["width"]: group for group in json.loads(capsys.readouterr().out)["groups"]}
    assert (list(groups[16]["arms"]), list(groups[64]["arms"])) == (["CE"], ["LACE"])
    assert groups[16]["scaled_down"] == ["width 16 (paper 64)", "epochs 40 (paper 200)"]
    assert "Scaled down: width 16 (paper 64), epochs 40 (paper 200)" in said(capsys, tmp_path / "ce0.jsonl")


@pytest.mark.parametrize("settings", [{"data": "digits"}, {"test_images": 5_000}], ids=str)
def test_report_of_other_data_leaves_the_paper_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object]
) -> None:
    record(tmp_path, "ce", 0, 6.7, **settings)  # type: ignore[arg-type]
    assert "paper" not in said(capsys, tmp_path)


def test_report_says_no_interval_with_one_seed_and_lists_unfinished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, "ce", 0, 6.7)
    record(tmp_path, "lace", 0, 6.2)
    record(tmp_path, "lace", 1, 60.0, unfinished=True)
    text = said(capsys, tmp_path)
    assert "| Welch, points (declared) | +0.50 | |" in text
    assert "2 of 10 runs finished: interim, no conclusion" in text
    assert f"Unfinished, not counted, after 1 of 200 epochs: {tmp_path / 'lace1.jsonl'}" in text


def test_report_of_an_unfinished_run_alone_has_no_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "ce", 0, 6.7, unfinished=True)
    text = said(capsys, tmp_path)
    assert f"- Unfinished, not counted, after 1 of 200 epochs: {tmp_path / 'ce0.jsonl'}" in text
    assert "|" not in text and not list(tmp_path.glob("*.png"))


# --- machines, damage -------------------------------------------------------------------------------------------------


def test_runs_of_several_devices_versions_or_commits_are_named_as_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = {"torch": "2.14.1", "numpy": "2.4.6"}
    record(tmp_path, "ce", 0, 6.7, commit="a", versions=torch)
    record(tmp_path, "lace", 0, 6.2, commit="a", versions=torch)
    assert "mix" not in said(capsys, tmp_path)
    record(tmp_path, "ce", 1, 6.7, commit="b", versions=torch | {"torch": "2.15.0"}, device="x\x1b[31m")
    record(tmp_path, "lace", 1, 6.3, commit="a", versions=torch, resumed=[{"after_epoch": 3}])
    text = said(capsys, tmp_path)
    for what, values in (
        ("commit", '"a" (3 runs), "b" (1 runs)'),
        ("version of torch", '"2.14.1" (3 runs), "2.15.0" (1 runs)'),
        ("device", '"d" (3 runs), "x\\u001b[31m" (1 runs)'),
        ("resumed elsewhere", "false (3 runs), true (1 runs)"),
    ):
        assert f"These figures mix runs of several values of {what}: {values}." in text
    assert "numpy" not in text and "\x1b" not in text
    assert "Seeds 1: CE and LACE ran on different kinds of machines; one kind was planned." in text


def test_pairs_on_one_machine_each_are_not_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        for loss in ("ce", "lace"):
            record(tmp_path, loss, seed, 6.7, device=f"machine {seed}")
    text = said(capsys, tmp_path)
    assert "several values of device" in text and "different kinds" not in text


def test_report_refuses_to_count_one_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where only a setting differs that is not cross entropy's."""
    for folder, strength in (("a", 0.0), ("b", 0.0), ("c", 0.5)):
        (tmp_path / folder).mkdir()
        record(tmp_path / folder, "ce", 0, 6.7, strength=strength, device=folder)
    for other in "bc":
        both = [tmp_path / "a", tmp_path / other]
        assert_error(capsys, ["report", *map(str, both)], *(str(f / "ce0.jsonl") for f in both), "same run")


def test_figures_of_any_size_that_a_record_may_hold_are_reported_as_json_numbers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    percents, numbers = [0.0, 5e-324, 1e-300, 1e-9, 36.0, 36.000001, 100.0], [0.0, 5e-324, 1.0, 1e50, 1e100]
    for _ in range(100):
        records = []
        for seed in range(3):
            for loss in ("ce", "lace"):
                test = {"nll": float(random.choice(numbers)), "top5_error": float(random.choice(percents))}
                record(tmp_path, loss, seed, test["top5_error"], test=test, epochs=1)
                file = tmp_path / f"{loss}{seed}.jsonl"
                records.append(store.read_record(file) | {"path": str(file)})
        found = summarise(records)
        json.dumps(found, allow_nan=False)
        assert "| Welch, points (declared) " in markdown(found)


def test_a_quality_of_another_kind_is_refused_with_file_line_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = {"nll": 1.0, "calibration_error": 1.0, "brier": 1.0}
    for name in ("softmax", "softmax_scaled", "posterior", "posterior_scaled"):
        for value, words in (
            ([], [f"{name} must be an object"]),
            (right | {"nll": "text"}, ["nll must be a number", "'text'"]),
            (right | {"brier": 2.5}, ["brier must be a number from 0 to 2", "2.5"]),
            (right | {"calibration_error": True}, ["calibration_error must be a number from 0 to 100"]),
            ({"nll": 1.0, "brier": 1.0}, ["it lacks calibration_error"]),
        ):
            record(tmp_path, "ce", 0, 6.7, test={name: value}, epochs=1)
            file = tmp_path / "ce0.jsonl"
            assert_error(capsys, ["report", str(file)], f"{file}, line 3", "'test'", *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"loss": "ce"', ["line 1", "JSON"]),
        ('{"loss": "ce"}\n', ["line 1", "lacks", "seed"]),
        ("[1]\n", ["line 1", "not a line of a record"]),
        ("", ["line 1"]),
        (None, ["line 202", "cut short"]),
    ],
)
def test_a_damaged_record_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, words: list[str]
) -> None:
    record(tmp_path, "ce", 0, 6.7)
    file = tmp_path / "ce0.jsonl"
    file.write_text(file.read_text()[:-20] if text is None else text)
    assert_error(capsys, ["report", str(file)], str(file), *words)


def test_a_missing_record_and_an_empty_folder_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_error(capsys, ["report", str(tmp_path / "none.jsonl")], "none.jsonl", "neither a record")
    assert_error(capsys, ["report", str(tmp_path)], str(tmp_path), "neither a record")


WRONG = ['"text"', "null", "[]", "{}", "true", "-1", "0.5", "1" + "0" * 400, "1" + "0" * 5000, "NaN", "-Infinity"]
WRONG += ["1e999", "[" * 10_000 + "]" * 10_000, '"\\ud800"', '"\\u001b[31m"']
# The indices in WRONG of what is right for a key, other than of a whole number.
RIGHT = {"data": [0], "data_sha256": [0, 13, 14], "device": [0, 13, 14], "threads": [1], "flip": [4], "final": [4]}
RIGHT |= {key: [6] for key in ("strength", "lr", "lr_drop", "momentum", "weight_decay", "seconds", *FIGURES)}


def test_a_value_of_another_kind_is_refused_with_file_line_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every key of a record that is ever read, with every kind of value."""
    record(tmp_path, "ce", 0, 6.7, epochs=2)
    file = tmp_path / "ce0.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    places = [(0, [key]) for key in lines[0]] + [(1, [key]) for key in lines[1]]
    places += [(3, [key]) for key in lines[3] if key != "seconds"] + [(3, ["sets", "test"])]
    places += [(3, ["sets", "train", key]) for key in lines[3]["sets"]["train"]]
    tried = 0
    for number, keys in places:
        for i, text in enumerate(WRONG):
            if i in RIGHT.get(keys[-1], []):
                continue
            changed = copy.deepcopy(lines)
            inner = changed[number]
            for key in keys[:-1]:
                inner = inner[key]
            inner[keys[-1]] = "HERE"
            file.write_text("\n".join(json.dumps(line) for line in changed).replace('"HERE"', text))
            named = [] if len(text) > 1000 or keys[-1] == "test" else [keys[-1].replace("_", "-")]
            capsys.readouterr()
            assert main(["report", str(file)]) == 2, (number, keys, text[:50])
            said = capsys.readouterr().err
            assert said.startswith(f"error: {file}, line {number + 1}: "), said
            assert all(key in said.replace("_", "-") for key in named), said
            assert len(said) < 500
            tried += 1
    assert tried > 600


def test_lines_of_a_record_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, "ce", 0, 6.7, epochs=3)
    file = tmp_path / "ce0.jsonl"
    header, *log, final = file.read_text().splitlines()
    bins = json.dumps(json.loads(final)["sets"]["test"]["count"])
    for lines, words in [
        ([header, log[1], log[0], log[2], final], ["line 2", "epoch must be 0"]),
        ([header, log[0], log[0], log[2], final], ["line 3", "epoch must be 1"]),
        ([header, *log, log[2]], ["line 5", "more epochs than --epochs", "3"]),
        ([header, *log[:2], final], ["line 4", "after 2 of its 3 epochs"]),
        ([header, *log, final, final], ["line 6", "final"]),
        ([header, *log, final, log[2]], ["line 6", "final"]),
        ([header.replace("{", '{"final": true, ', 1)], ["line 1", "final"]),
        ([header, *log, final.replace("{", '{"data": [1], ', 1)], ["line 5", "data"]),
        ([header.replace("{", '{"seed": 1, ', 1)], ["line 1", "seed", "2 times"]),
        ([header.replace("{", '{"versions": {"torch": NaN}, ', 1), *log, final], ["line 1"]),
        ([header, *log, final.replace(bins, "[0, 4]", 1)], ["line 5", "'test'", "count", "15"]),
        ([header, *log, final.replace("[0, 4, 6", "[0, -4, 6", 1)], ["line 5", "'test'", "count"]),
        ([header, *log, final.replace("[0, 4, 6", "[0, 4.5, 6", 1)], ["line 5", "'test'", "count"]),
        ([header, *log, final.replace('"top1_error": 1.0', '"top1_error": 100.5')], ["line 5", "top1_error", "100.5"]),
        ([header, *log, final.replace('"sets": {"test": ', '"sets": {"other": ')], ["line 5", "test"]),
        ([header, *log, final.replace('"nll": 1.0, "calib', '"calib')], ["line 5", "nll"]),
        ([header + "\xff", *log, final], ["line 1", "utf-8"]),
    ]:
        file.write_bytes("\n".join(lines).encode("latin-1"))
        assert_error(capsys, ["report", str(file)], str(file), *words)


def test_a_record_that_has_no_end_is_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert_error(capsys, ["report", "/dev/zero"], "/dev/zero is not a file")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_written_whole_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, "ce", 0, 6.7, epochs=2)
    report([tmp_path])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    record(tmp_path, "ce", 0, 50.0, epochs=2)
    assert_error(capsys, ["report", str(tmp_path)], str(tmp_path / "curves.png"), "No space")
    after = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("curves.png", "reliability.png"))


def test_the_picture_of_the_loss_is_written_and_no_figure_stays_open(tmp_path: Path) -> None:
    figure.draw(str(tmp_path / "loss.png"))
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (1080, 408)
    plot, _ = pyplot().subplots()
    save(plot, tmp_path / "empty.png", 50)
    assert pyplot().get_fignums() == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty.png", "loss.png"]
