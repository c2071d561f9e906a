"""`python -m lace_loss.ext`: right, or refused with a sentence and status 2, whatever the files hold."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from lace_loss import ext, ref
from lace_loss.ext.__main__ import main

COMMAND = [sys.executable, "-m", "lace_loss.ext"]


def classifier(n=60, classes=7):
    """Logits of every confidence, whose class leads in about half of the samples; the last five are ignored."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(n, classes)) * rng.uniform(0.1, 4, (n, 1))
    target = np.where(rng.random(n) < 0.4, logits.argmax(1), rng.integers(0, classes, n))
    target[-5:] = -100
    return logits, target


def figures(logits, target, ignore_index=-100):
    """By NumPy, and the definition of the calibration error; not by what is tested."""
    kept = target != ignore_index
    z, y = np.asarray(logits, np.float64)[kept], target[kept]
    log_q = log_softmax(z, 1)
    ce = -log_q[np.arange(len(y)), y]
    confidence, right = np.exp(log_q.max(1)), z.argmax(1) == y
    bins = [(confidence > b / 15) & (confidence <= (b + 1) / 15) for b in range(15)]
    return {
        "loss": np.mean(ref.forward(z, y, reduction="none")),
        "cross_entropy": ce.mean(),
        "accuracy": {
            k: np.mean([t in row for t, row in zip(y, np.argsort(-z, 1, "stable")[:, :k], strict=True)]) for k in (1, 5)
        },
        "calibration_error": sum(abs((right - 1.0 * confidence)[b].sum()) for b in bins) / len(y),
        "count": len(y),
        "classes": z.shape[1],
    }


def check(found, logits, target, **options):
    expected = figures(logits, target, **options)
    assert (found["count"], found["classes"]) == (expected["count"], expected["classes"])
    for k, accuracy in found["accuracy"].items():
        assert accuracy == pytest.approx(expected["accuracy"][int(k)], rel=1e-14)
    for key in ("loss", "cross_entropy", "calibration_error"):
        value = expected[key] if np.isfinite(expected[key]) else None
        assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Exit status, what is printed as JSON or text, and what is said on standard error, with files in a folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main([*map(str, arguments)])
        printed = capsys.readouterr()
        assert status == (2 if printed.err else 0)
        assert "Traceback" not in printed.err
        return status, json.loads(printed.out) if "--json" in arguments and not status else printed.out, printed.err

    return run


def refused(result, *sentences):
    status, printed, said = result
    assert (status, printed) == (2, "")
    for sentence in sentences:
        assert re.search(sentence, said), said
    assert said.count("\n") == 1


def csv_of(path, values, header=None):
    lines = [] if header is None else [header]
    lines += [",".join(map(repr, row)) for row in np.asarray(values).reshape(len(values), -1).tolist()]
    Path(path).write_text("".join(f"{line}\n" for line in lines))


# ---- what can be used ----


@pytest.mark.parametrize("form", ["npy", "npz", "compressed", "bzip2", "plain members", "csv", "names", "upper case"])
@pytest.mark.parametrize("block", [100, 1 << 20])
def test_files_give_the_figures_of_their_arrays(form, block, run, monkeypatch):
    monkeypatch.setattr(ext.evaluation, "_LOGITS_IN_A_BLOCK", block)
    logits, target = classifier()
    both = {"logits": logits, "target": target}
    files = ["both.npz"]
    if form == "npy":
        np.save("z.npy", logits)
        np.save("t.npy", target.astype(np.int16))
        files = ["z.npy", "t.npy"]
    elif form == "npz":
        np.savez("both.npz", **both, other=np.array("not read"))
    elif form == "compressed":
        np.savez_compressed("z.npz", logits)
        np.savez_compressed("both.npz", **both)
        files = ["z.npz", "both.npz"]
    elif form in ("bzip2", "plain members"):
        with zipfile.ZipFile("both.npz", "w", zipfile.ZIP_BZIP2 if form == "bzip2" else zipfile.ZIP_STORED) as archive:
            for name, values in both.items():
                file = io.BytesIO()
                np.save(file, values)
                archive.writestr(name if form == "plain members" else f"{name}.npy", file.getvalue())
    else:
        files = ["z.CSV", "t.CSV"] if form == "upper case" else ["z.csv", "t.csv"]
        csv_of(files[0], logits, ",".join(map('"class, {}"'.format, range(7))) if form == "names" else None)
        csv_of(files[1], target, "label" if form == "names" else None)
    status, found, _ = run(*files, "--json")
    assert status == 0
    check(found, logits, target)


@pytest.mark.parametrize("dtype", ["<f2", ">f4", ">f8"])
@pytest.mark.parametrize("labels", ["u1", ">u8", ">i2"])
def test_every_byte_order_and_width_gives_the_same_figures(dtype, labels, run):
    logits, target = (values[:-5] for values in classifier())
    np.save("z.npy", logits.astype(dtype))
    np.save("t.npy", target.astype(labels))
    check(run("z.npy", "t.npy", "--json")[1], logits.astype(dtype), target)


def test_images_give_the_figures_of_their_pixels(run):
    logits, target = classifier()
    np.save("z.npy", np.moveaxis(logits.reshape(5, 3, 4, 7), -1, 1))
    np.save("t.npy", target.reshape(5, 3, 4))
    check(run("z.npy", "t.npy", "--json")[1], logits, target)


def test_an_npy_of_python_2_is_read_without_a_word(run):
    logits, target = classifier()
    np.save("z.npy", logits)
    Path("z.npy").write_bytes(Path("z.npy").read_bytes().replace(b"(60, 7)  ", b"(60L, 7L)"))
    np.save("t.npy", target)
    check(run("z.npy", "t.npy", "--json")[1], logits, target)


def test_a_table_is_printed_for_people_without_top_5_of_three_classes(run):
    csv_of("z.csv", [[1.0, 4.0, 2.0], [0.0, 5.0, 0.0]])
    csv_of("t.csv", [1, 0])
    assert run("z.csv", "t.csv")[1] == (
        "loss               2.50329\ncross entropy      2.59162\ntop-1 accuracy     50.00 %\n"
        "calibration error  57.15 %\ncount              2\nclasses            3\n"
    )
    assert run("z.csv", "t.csv", "--ignore-index", "0")[1].endswith("count              1\nclasses            3\n")


@pytest.mark.parametrize(("classes", "expected"), [(1, {"1"}), (2, {"1"}), (5, {"1"}), (6, {"1", "5"})])
def test_top_5_is_a_figure_from_six_classes_on(classes, expected, run):
    np.save("z.npy", -np.ones((3, classes)))
    np.save("t.npy", np.zeros(3, int))
    assert set(run("z.npy", "t.npy", "--json")[1]["accuracy"]) == expected


def test_infinity_is_null_for_programs(run):
    np.save("z.npy", [[-np.inf, 0.0]])
    np.save("t.npy", [0])
    assert run("z.npy", "t.npy", "--json")[1]["loss"] is None


@pytest.mark.parametrize("weights", ["w.npy", "w.csv"])
def test_the_options_of_the_loss_have_its_meaning(weights, run):
    logits, target = classifier()
    np.save("z.npy", logits)
    np.save("t.npy", target)
    w = np.arange(1, 8) / 4
    np.save("w.npy", w)
    csv_of("w.csv", w, "weight")
    options = {"strength": 0.25, "label_smoothing": 0.125, "ignore_index": 3}
    target[-5:] = 2
    np.save("t.npy", target)
    given = ["--strength", "0.25", "--label-smoothing", "0.125", "--ignore-index", "3", "--weight", weights]
    found = run("z.npy", "t.npy", *given, "--topk", "2", "3", "--json")[1]
    assert found["loss"] == pytest.approx(ref.forward(logits, target, weight=w, **options), rel=1e-13)
    assert found["cross_entropy"] == pytest.approx(figures(logits, target, 3)["cross_entropy"], rel=1e-13)
    assert set(found["accuracy"]) == {"2", "3"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--strength", "2"], "strength must be in"),
        (["--strength", "nan"], "strength must be in"),
        (["--label-smoothing", "-1"], "label_smoothing must be in"),
        (["--topk", "0"], "topk must hold numbers from 1, got 0"),
        (["--ignore-index", str(2**70)], "."),
        (["--weight", "w.csv"], r"w.csv of shape \(rows\) must be of shape \(7\)"),
        (["--weight", "w.npy"], r"w.npy of shape \(7, 7\) must be of shape \(7\)"),
        (["--weight", "none.npy"], "none.npy cannot be read: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_used_are_status_2(options, sentence, run):
    logits, target = classifier()
    np.save("z.npy", logits)
    np.save("t.npy", target)
    csv_of("w.csv", [1.0] * 8)
    np.save("w.npy", np.ones((7, 7)))
    refused(run("z.npy", "t.npy", *options), sentence)


# ---- .csv: names, row numbers, separators, text ----

ROWS = "1.5,4,2\n0,5,-1\n"
Z = np.array([[1.5, 4, 2], [0, 5, -1]])
Y = np.array([1, 0])

USED = {
    "no names": (ROWS, "1\n0\n", []),
    "names": ("cat,dog,cow\n" + ROWS, "label\n1\n0\n", []),
    "names in quotes, with commas and line ends": ('"a, b","a\nb","c"\n' + ROWS, '"label"\n"1"\n"0"\n', []),
    "names with a low line, which Python reads as numbers": ("1_1,1_2,2_1\n" + ROWS, "1\n0\n", []),
    "a byte order mark": ("\ufeff" + ROWS, "\ufefflabel\n1\n0\n", []),
    "CRLF": (ROWS.replace("\n", "\r\n"), "1\r\n0\r\n", []),
    "CR": (ROWS.replace("\n", "\r"), "1\r0\r", []),
    "no last line end": (ROWS[:-1], "1\n0", []),
    "empty lines at the end": (ROWS + "\n\n", "1\n0\n\n", []),
    "spaces": (ROWS.replace(",", " , "), " 1\n0 \n", []),
    "labels as floats": (ROWS, "1.0\n0.000e+00\n", []),
    "pandas' names": ("0,1,2\n" + ROWS, "0\n1\n0\n", ["--header", "both"]),
    "pandas' names of logits": ("0,1,2\n" + ROWS, "1\n0\n", ["--header", "logits"]),
    "pandas' names of labels": (ROWS, "0\n1\n0\n", ["--header", "target"]),
    "names of which some are numbers": ("cat,2,3\n" + ROWS, "1\n0\n", ["--header", "logits"]),
    "a first row that counts up": ("0,1,2\n" + ROWS, "2\n1\n0\n", ["--header", "none"]),
    "pandas' index": (
        ",0,1,2\n0,1.5,4,2\n1,0,5,-1\n",
        ",0\n0,1\n1,0\n",
        ["--header", "both", "--index-column", "both"],
    ),
    "row numbers": ("0,1.5,4,2\n1,0,5,-1\n", "1\n0\n", ["--index-column", "logits"]),
    "file names": ("1.5,4,2\n0,5,-1\n", "name,label\na.png,1\nb.png,0\n", ["--index-column", "target"]),
    "first logits that count up": ("1,4,2\n2,5,-1\n", "1\n0\n", ["--index-column", "none"]),
}


def write(z, t):
    for name, content in (("z.csv", z), ("t.csv", t)):
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("case", USED)
def test_a_csv_that_can_be_meant_in_one_way_only_is_read(case, run):
    z, t, options = USED[case]
    write(z, t)
    expected = {
        "a first row that counts up": (np.vstack([[0, 1, 2], Z]), np.array([2, 1, 0])),
        "first logits that count up": (np.array([[1.0, 4, 2], [2, 5, -1]]), Y),
    }
    status, found, said = run("z.csv", "t.csv", "--json", *options)
    assert status == 0, said
    check(found, *expected.get(case, (Z, Y)))


WAY_OUT = r"Say with --header which files begin with names \(none, logits, target or both\)"
INDEX = "say with --index-column which files begin with a column that is left out"
COMMAS = "Fields must be separated by commas, and decimals by points"
REFUSED = {
    "pandas' names": ("0,1,2\n" + ROWS, "0\n1\n0\n", ["z.csv, line 1 may be names or a row: '0,1,2'", WAY_OUT]),
    "names from 1": ("1,2,3\n" + ROWS, "1\n0\n", ["z.csv, line 1 may be names", WAY_OUT]),
    "names of years": ("2001,2002,2003\n1,4,2\n", "1\n", ["z.csv, line 1 may be names", WAY_OUT]),
    "names above rows with points": ("7,3,5\n" + ROWS, "1\n0\n", ["z.csv, line 1 may be names", WAY_OUT]),
    "names and numbers": ("cat,2,3\n" + ROWS, "1\n0\n", ["z.csv, line 1 may be names or a row: 'cat,2,3'", WAY_OUT]),
    "a name that is NaN": ("cat,nan\n1.5,2\n", "1\n", ["z.csv, line 1 may be names", WAY_OUT]),
    "an empty name": ("cat,,cow\n" + ROWS, "1\n0\n", ["z.csv, line 1 may be names", WAY_OUT]),
    "a missing first label": (ROWS, '""\n0\n', ["t.csv, line 1 may be names", WAY_OUT]),
    "a number above labels": (
        ROWS,
        "0\n1\n0\n",
        ["t.csv has 3 rows and z.csv has 2", "t.csv, line 1 was read as a row: --header says which files begin with"],
    ),
    "pandas' index": (",cat,dog\n0,1.5,4\n", ",label\n0,1\n", ["z.csv, line 1 begins with an empty name", INDEX]),
    "row numbers": ("0,1.5,4\n1,0,5\n", "1\n0\n", ["z.csv, line 1 begins with '0'", INDEX]),
    "row numbers from 1000": ("1000,3,4\n1001,0,5\n", "1\n0\n", ["z.csv, line 1 begins with '1000'", INDEX]),
    "row numbers below names": ("id,a,b\n0,1.5,4\n1,0,5\n", "1\n0\n", ["z.csv, line 2 begins with '0'", INDEX]),
    "row numbers of labels": (ROWS, "0,1\n1,0\n", ["t.csv, line 1 begins with '0'", INDEX]),
    "labels in the first column": ("1,1.5,4.0\n0,2.5,-1.0\n", "1\n0\n", ["z.csv, line 1 begins with '1'", INDEX]),
    "semicolons": (ROWS.replace(",", ";"), "1\n0\n", ["z.csv, line 1 .* '1.5;4;2'", COMMAS]),
    "semicolons below names": ("a;b;c\n" + ROWS.replace(",", ";"), "1\n0\n", ["z.csv, line 2: .* '1.5;4;2'", COMMAS]),
    "decimal commas": ("1,5;4,5\n0,5;5,5\n", "1\n0\n", ["z.csv, line 1 .* '1,5;4,5'", COMMAS]),
    "tabs": (ROWS.replace(",", "\t"), "1\n0\n", [r"z.csv, line 1 .* '1.5\\t4\\t2'", COMMAS]),
    "spaces, as numpy.savetxt": (ROWS.replace(",", " "), "1\n0\n", ["z.csv, line 1 .* '1.5 4 2'", COMMAS]),
    "Latin-1": ("café,b\n1.5,2\n".encode("latin-1"), "1\n", ["z.csv, line 1 is not text in UTF-8", "0xe9"]),
    "Latin-1 further down": (b"1.5,2\n" * 9000 + b"\xb5\n", "1\n", ["z.csv, line 9001 is not text in UTF-8"]),
    "UTF-16": (ROWS.encode("utf-16"), "1\n0\n", ["z.csv, line 1 is not text in UTF-8", "0xff"]),
    "UTF-16 without its mark": (ROWS.encode("utf-16-le"), "1\n0\n", ["z.csv, line 1 is not text in UTF-8", "0x00"]),
    "a word": ("1.5,2\n3,x\n", "0\n1\n", ["z.csv, line 2: expected 2 numbers, got '3,x'"]),
    "a low line in a number": ("1.5,2\n3,1_0\n", "0\n1\n", ["z.csv, line 2: expected 2 numbers, got '3,1_0'"]),
    "a short line": ("1.5,2\n3\n", "0\n1\n", ["z.csv, line 2: expected 2 numbers, got '3'"]),
    "fewer names than fields": ("a,b\n" + ROWS, "1\n0\n", ["z.csv, line 2: expected 2 numbers, got '1.5,4,2'"]),
    "an empty line": ("1.5,2\n\n3,4\n", "0\n1\n", ["z.csv, line 2 is empty, and rows follow it"]),
    "a last field that is empty": ("1.5,2,\n3,4,\n", "0\n1\n", ["z.csv, line 1 may be names"]),
    "quotes that do not end": ('1.5,2\n"3,4\n', "0\n1\n", ["z.csv, line 2: unexpected end of data"]),
    "a field of 200 kB": ("a,b\n1.5," + "2" * 200_000, "0\n", ["z.csv, line 2: field larger than field limit"]),
    "nothing": ("", "", ["z.csv is empty"]),
    "names only": ("a,b\n", "label\n", ["z.csv has no rows below its names in line 1"]),
    "no labels": (ROWS, "", ["t.csv is empty"]),
    "a NaN": ("names,b\n1.5,2\n3,nan\n", "0\n1\n", ["z.csv, line 3 has the largest logit nan"]),
    "an infinity": ("1.5,2\n3,1e999\n", "0\n1\n", ["z.csv, line 2 has the largest logit inf"]),
    "7.5 as a label": (ROWS, "label\n1\n7.5\n", ["t.csv, line 3: expected 1 whole number, got '7.5'"]),
    "1e300 as a label": (ROWS, "1\n1e300\n", ["t.csv, line 2: expected 1 whole number, got '1e300'"]),
    "a word as a label": (ROWS, "1\ncat\n", ["t.csv, line 2: expected 1 whole number, got 'cat'"]),
    "labels from 1": (
        ROWS,
        "label\n1\n3\n",
        ["t.csv, line 3 is 3, not a class: 0 to 2, as there are 3 columns of logits; if they are counted from 1, save"],
    ),
    "a label of -1": (ROWS, "1\n-1\n", ["t.csv, line 2 is -1, not a class: 0 to 2.*; --ignore-index -1 leaves such"]),
    "fewer labels": (ROWS, "1\n", ["t.csv has 1 rows and z.csv has 2: there must be one class for each row"]),
    "more labels": (ROWS, "1\n1\n1\n1\n", ["t.csv has 4 rows and z.csv has 2"]),
    "transposed logits": ("1.5,2,1,4\n3,4,2.5,1\n", "0\n1\n1\n0\n", ["If the logits are transposed, save logits.T"]),
    "one-hot labels": (ROWS, "0,0,1\n0,1,0\n", [r"t.csv of shape \(rows, 3\) does not fit", "save target.argmax"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_csv_that_cannot_be_used_is_refused_by_line_and_way_out(case, run):
    z, t, sentences = REFUSED[case]
    write(z, t)
    refused(run("z.csv", "t.csv"), *sentences)


def test_an_index_column_alone_is_refused(run):
    write("0\n1\n", "1\n0\n")
    refused(run("z.csv", "t.csv", "--index-column", "logits"), "z.csv, line 1 has nothing beside its index column")


def test_names_that_an_option_promises_and_a_file_lacks_are_noticed(run):
    write("0,1,2\n" + ROWS, "1\n0\n")
    refused(
        run("z.csv", "t.csv", "--header", "both"), "t.csv has 1 rows and z.csv has 2", "t.csv, line 1 was read as names"
    )


def test_a_line_without_end_is_refused_before_it_takes_memory(run):
    with open("z.csv", "wb") as file:
        file.write(b"1,2\n1")
        file.seek(1 << 24)
        file.write(b"1" * (1 << 25))
    with open("long.csv", "wb") as file:
        file.write(b"1," * (1 << 24))
    Path("t.csv").write_text("1\n")
    refused(run("z.csv", "t.csv"), "z.csv, line 2 is not text in UTF-8, which the file must be: it holds 0x00")
    refused(run("long.csv", "t.csv"), "long.csv, line 1 is longer than 16777216 characters")


# ---- probabilities ----


def probabilities(dtype=np.float64):
    logits, target = classifier()
    return np.exp(log_softmax(logits, 1)).astype(dtype), target


@pytest.mark.parametrize("form", ["float16", "float32", "float64", "two decimals", "percent", "one row", "images"])
def test_probabilities_are_not_taken_for_logits(form, run):
    p, target = probabilities(form if form.startswith("float") else np.float64)
    if form == "two decimals":
        p = p[(p * 100).round().sum(1) == 100].round(2)
        target = target[: len(p)]
    p, target = (p[:1], target[:1]) if form == "one row" else (p * 100, target) if form == "percent" else (p, target)
    if form == "images":
        p, target = np.moveaxis(p.reshape(5, 12, 7), -1, 1), target.reshape(5, 12)
    np.save("z.npy", p)
    np.save("t.npy", target)
    refused(run("z.npy", "t.npy"), "z.npy looks like probabilities.*--probabilities takes.*--no-probabilities takes")
    assert run("z.npy", "t.npy", "--no-probabilities")[0] == 0
    if form == "percent":
        refused(
            run("z.npy", "t.npy", "--probabilities"), r"z.npy\[0\] holds no probabilities: its sum is 100, its least"
        )


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_logarithms_of_probabilities_are_logits(dtype, run):
    p, target = probabilities(dtype)
    p[-2:] = np.nan  # ignored rows may hold anything
    np.save("z.npy", p)
    np.save("t.npy", target)
    found = run("z.npy", "t.npy", "--probabilities", "--json")[1]
    check(found, np.log(np.where(np.isnan(p), 1, p).astype(np.float64)), target)


def test_a_class_of_probability_0_costs_infinity(run):
    np.save("z.npy", [[0.0, 0.25, 0.75], [0.5, 0.25, 0.25]])
    np.save("t.npy", [0, 1])
    assert run("z.npy", "t.npy", "--probabilities", "--json")[1]["loss"] is None
    np.save("t.npy", [1, 1])
    assert run("z.npy", "t.npy", "--probabilities", "--json")[1]["cross_entropy"] == pytest.approx(np.log(4), rel=1e-14)


@pytest.mark.parametrize(
    ("row", "what"), [([0.5, 0.3], "0.8, its least value 0.3"), ([-0.5, 1.5], "1, its least value -0.5")]
)
def test_a_row_that_is_no_probabilities_is_named(row, what, run):
    write("0.5,0.5\n" * 3 + ",".join(map(str, row)), "1\n" * 4)
    refused(run("z.csv", "t.csv", "--probabilities"), f"z.csv, line 4 holds no probabilities: its sum is {what}")


def test_rows_of_one_1_and_zeros_may_be_logits(run):
    np.save("z.npy", np.eye(3))
    np.save("t.npy", np.arange(3))
    check(run("z.npy", "t.npy", "--json")[1], np.eye(3), np.arange(3))


# ---- .npy and .npz ----

LOGITS, LABELS = np.zeros((9, 4)) - 1, np.zeros(9, int)


def bytes_of(values, **changes):
    """A .npy file, or one whose header says something else."""
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    data = file.getvalue()
    end = 10 + int.from_bytes(data[8:10], "little")
    if "header" in changes:
        header = changes["header"].encode("latin-1")
        return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + data[end:]
    return data


def header(shape, descr="'<f8'"):
    return bytes_of(LOGITS, header=f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n")


NPY = {
    "cut short": (bytes_of(LOGITS)[:-100], None, "z.npy is cut short in row 5 of its 9"),
    "labels cut short": (None, bytes_of(LABELS)[:-20], "t.npy is cut short in row 6 of its 9"),
    "bytes behind it": (bytes_of(LOGITS) + b"\n", None, r"z.npy has 1 bytes behind its array of shape \(9, 4\)"),
    "sent as text": (
        bytes_of(LOGITS).replace(b"\n", b"\r\n"),
        None,
        "bytes behind its array.*transfer as text: copy it",
    ),
    "labels sent as text": (None, bytes_of(LABELS + 10).replace(b"\n", b"\r\n"), "t.npy has 10 bytes behind its array"),
    "two arrays": (bytes_of(LOGITS) * 2, None, "z.npy has 416 bytes behind its array"),
    "empty": (b"", None, "z.npy cannot be read: EOF"),
    "cut in its header": (b"\x93NUMPY\x01\0v", None, "z.npy cannot be read: EOF"),
    "no .npy at all": (b"1,2,3\n", None, "z.npy cannot be read: "),
    "a version of the future": (b"\x93NUMPY\x09\0" + bytes_of(LOGITS)[8:], None, r"z.npy has version \(9, 0\)"),
    "no literal": (bytes_of(LOGITS, header="{"), None, "z.npy cannot be read: "),
    "indented": (bytes_of(LOGITS, header="\n\n  x\n y"), None, "z.npy cannot be read: "),
    "minus signs": (bytes_of(LOGITS, header="-" * 9000), None, "z.npy cannot be read: "),
    "nested": (bytes_of(LOGITS, header="[" * 9000), None, "z.npy cannot be read: "),
    "a header of 60 kB": (bytes_of(LOGITS, header=" " * 60_000), None, "z.npy cannot be read: "),
    "a header of 4 GB": (b"\x93NUMPY\x02\0" + b"\xff" * 9000, None, "z.npy cannot be read: "),
    "a function": (bytes_of(LOGITS, header="__import__('os').mkdir('executed')"), None, "z.npy cannot be read: "),
    "a type with a leading 0": (header((9, 4), "'<04'"), None, "z.npy cannot be read: "),
    "a type of an array": (header((9, 4), "('<f8', (2,))"), None, "z.npy holds .*: logits must be float16, float32"),
    "fields": (header((9, 4), "[('\x1b[31m', '<f8')]"), None, "z.npy holds .*: logits must be float16"),
    "a shape beyond memory": (header((20, 10**12)), None, "z.npy is cut short in row 0 of its 20"),
    "a shape beyond 64 bits": (header((2**40, 2**40)), None, "z.npy is cut short in row 0"),
    "a negative shape": (header((-9, 4)), None, r"z.npy has shape \(-9, 4\): there must be at least one row"),
    "two negative dimensions": (header((-9, -4)), None, r"z.npy has shape \(-9, -4\)"),
    "a shape of a float": (header("(9.0, 4)"), None, "z.npy cannot be read: shape is not valid"),
    "no rows": (
        bytes_of(LOGITS[:0]),
        bytes_of(LABELS[:0]),
        r"z.npy has shape \(0, 4\): there must be at least one row",
    ),
    "no labels": (None, bytes_of(LABELS[:0]), r"t.npy has shape \(0,\): there must be at least one row"),
    "no classes": (bytes_of(LOGITS[:, :0]), None, r"z.npy has shape \(9, 0\).*no row may be empty"),
    "objects": (bytes_of(np.array([{}])), None, "z.npy holds object of shape"),
    "words": (bytes_of(np.array([["a"]])), None, "z.npy holds <U1 of shape"),
    "complex numbers": (bytes_of(LOGITS + 1j), None, "z.npy holds complex128 of shape"),
    "80 bits": (bytes_of(LOGITS.astype(np.longdouble)), None, "z.npy holds float128 of shape"),
    "integer logits": (
        bytes_of(LOGITS.astype(int)),
        None,
        r"z.npy holds int64 of shape \(9, 4\): logits must be float16, float32 or float64 \(.astype\(numpy.float32\)\)",
    ),
    "floating labels": (
        None,
        bytes_of(LABELS + 0.5),
        r"t.npy holds float64 of shape \(9,\): classes must be integers \(.astype\(numpy.int64\)\)",
    ),
    "true and false as labels": (None, bytes_of(LABELS == 1), "t.npy holds bool of shape .*: classes must be integers"),
    "the two exchanged": (bytes_of(LABELS), bytes_of(LOGITS), "z.npy holds int64.* come first, before the classes"),
    "one number": (bytes_of(3.0), None, "z.npy holds a lone number: save numpy.atleast_1d of it"),
    "one row and one label": (
        bytes_of(LOGITS[0]),
        bytes_of(LABELS[0]),
        "t.npy holds a lone number: save numpy.atleast_1d of it",
    ),
    "one row without its axis": (
        bytes_of(LOGITS[0]),
        bytes_of(LABELS[:1]),
        r"z.npy of shape \(4\) must be of shape \(N, C\).*One row is \(1, C\)",
    ),
    "by columns": (bytes_of(np.asfortranarray(LOGITS)), None, "z.npy is stored column by column: save numpy.ascontig"),
    "fewer labels": (None, bytes_of(LABELS[1:]), "t.npy has 8 rows and z.npy has 9: there must be one class for each"),
    "transposed": (bytes_of(LOGITS.T.copy()), None, "z.npy has 4: .*If the logits are transposed, save logits.T"),
    "labels as a column": (None, bytes_of(LABELS[:, None]), r"t.npy of shape \(9, 1\).*target.reshape\(target.shape"),
    "one-hot labels": (None, bytes_of(LOGITS.astype(int)), r"one-hot, save target.argmax\(1\)"),
    "classes last": (
        bytes_of(np.zeros((9, 5, 6, 4))),
        bytes_of(np.zeros((9, 5, 6), int)),
        r"save numpy.moveaxis\(logits, -1, 1\)",
    ),
    "a NaN": (
        bytes_of(np.where(np.arange(36).reshape(9, 4) == 30, np.nan, 0)),
        None,
        r"z.npy\[7\] has the largest logit nan, and no softmax",
    ),
    "impossible classes only": (bytes_of(LOGITS * np.inf), None, r"z.npy\[0\] has the largest logit -inf"),
    "no class": (None, bytes_of(LABELS + 4 * (LABELS.cumsum() == 0)), r"t.npy\[0\] is 4, not a class: 0 to 3"),
    "labels from 1": (None, bytes_of(np.arange(9) % 4 + 1), r"t.npy\[3\] is 4.*counted from 1, save target - 1"),
    "a label beyond 63 bits": (
        None,
        bytes_of(np.full(9, 2**64 - 100, ">u8")),
        rf"t.npy\[0\] is {2**64 - 100}, not a class",
    ),
}


@pytest.mark.parametrize("case", NPY)
def test_an_npy_that_cannot_be_used_is_refused_in_a_sentence(case, run):
    z, t, sentence = NPY[case]
    Path("z.npy").write_bytes(bytes_of(LOGITS) if z is None else z)
    Path("t.npy").write_bytes(bytes_of(LABELS) if t is None else t)
    refused(run("z.npy", "t.npy"), sentence)
    assert not Path("executed").exists()


def npz(*members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def with_flag(data, offset, value):
    """An archive with one more bit in a field of each of its entries, in both places where it stands."""
    data = bytearray(data)
    for magic, place in ((b"PK\3\4", offset), (b"PK\1\2", offset + 2)):
        start = -1
        while (start := data.find(magic, start + 1)) >= 0:
            data[start + place] |= value
    return bytes(data)


MEMBERS = [("logits.npy", bytes_of(LOGITS)), ("target.npy", bytes_of(LABELS))]
NPZ = {
    "cut short": (npz(*MEMBERS)[:-100], "both.npz cannot be read: File is not a zip file"),
    "empty": (b"", "both.npz cannot be read: File is not a zip file"),
    "another byte": (
        npz(*MEMBERS).replace(b"\xf0\xbf", b"\xf0\xbe", 1),
        r"both.npz\[logits\] cannot be read: Bad CRC-32",
    ),
    "another byte, deflated": (
        npz(*MEMBERS, compression=zipfile.ZIP_DEFLATED).replace(npz(*MEMBERS, compression=8)[60:70], b"\xff" * 10),
        r"both.npz\[logits\] cannot be read: Error -3 while decompressing",
    ),
    "another byte, LZMA": (
        npz(*MEMBERS, compression=14).replace(npz(*MEMBERS, compression=14)[60:70], b"\xff" * 10),
        r"both.npz\[logits\] cannot be read: ",
    ),
    "encrypted": (with_flag(npz(*MEMBERS), 6, 1), "both.npz cannot be read: .*encrypted"),
    "an unknown compression": (with_flag(npz(*MEMBERS), 8, 77), "both.npz cannot be read: .*compression"),
    "there twice": (npz(*MEMBERS, MEMBERS[0]), "both.npz must have one array 'logits', and has logits, target, logits"),
    "there with and without .npy": (
        npz(*MEMBERS, ("target", b"")),
        "must have one array 'target', and has logits, target",
    ),
    "another name": (npz(("scores.npy", b""), MEMBERS[1]), "must have one array 'logits', and has scores, target"),
    "no labels": (npz(MEMBERS[0]), "both.npz must have one array 'target', and has logits"),
    "nothing": (npz(), "both.npz must have one array 'logits', and has nothing"),
    "no array": (npz(("logits.npy", b"x" * 99), MEMBERS[1]), r"both.npz\[logits\] cannot be read: the magic string"),
    "sent as text": (
        npz(("logits.npy", bytes_of(LOGITS).replace(b"\n", b"\r\n")), MEMBERS[1]),
        r"both.npz\[logits\] has 1 bytes behind its array",
    ),
    "a member cut short": (
        npz(MEMBERS[0], ("target.npy", bytes_of(LABELS)[:-20])),
        r"both.npz\[target\] is cut short in row 6",
    ),
    "a header of 4 GB": (
        npz(("logits", b"\x93NUMPY\x02\0" + b"\xff" * 9000), MEMBERS[1]),
        r"both.npz\[logits\] cannot be read",
    ),
    "a pickle": (npz(("logits.npy", bytes_of(np.array([{}]))), MEMBERS[1]), r"both.npz\[logits\] holds object"),
    "a name that paints the terminal": (npz(("\x1b[31m", b"")), r"and has \\x1b\[31m\n"),
}


@pytest.mark.parametrize("case", NPZ)
def test_an_npz_that_cannot_be_used_is_refused_in_a_sentence(case, run):
    data, sentence = NPZ[case]
    Path("both.npz").write_bytes(data)
    refused(run("both.npz"), sentence)


class Planted:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_file_is_executed(run):
    Path("t.npy").write_bytes(bytes_of(LABELS))
    payload = bytes_of(np.array([Planted()]))
    pickled = payload[payload.index(b"\n") + 1 :]
    for name, data in (
        ("z.npy", payload),
        ("z.npy", pickled),
        ("z.npz", npz(("logits.npy", payload))),
        ("z.npz", pickled),
    ):
        Path(name).write_bytes(data)
        refused(run(name, "t.npy"), name)
    assert not Path("executed").exists()


def test_a_file_that_shrinks_while_it_is_read_is_refused(run, monkeypatch):
    logits, target = classifier(6000)
    np.save("z.npy", logits)
    np.save("t.npy", target)
    add = ext.Tally.add

    def add_and_cut(tally, z, y):
        os.truncate("z.npy", 128 + 3000 * 56)
        add(tally, z, y)

    monkeypatch.setattr(ext.Tally, "add", add_and_cut)
    monkeypatch.setattr(ext.evaluation, "_LOGITS_IN_A_BLOCK", 700)
    refused(run("z.npy", "t.npy"), "z.npy ends in row 3000 of its 6000")


def test_the_rule_of_the_files_is_in_the_help():
    printed = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
    assert "What can be meant in two ways is refused, and the sentence names the option that decides it" in printed


# ---- paths ----


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_what_is_no_file_is_refused_and_never_waited_for(suffix, run):
    Path("t.npy").write_bytes(bytes_of(LABELS))
    z = Path(f"z{suffix}")
    refused(run(z, "t.npy"), f"z{suffix} cannot be read: No such file or directory")
    z.symlink_to("nowhere")
    refused(run(z, "t.npy"), "No such file or directory")
    z.unlink()
    z.symlink_to(z.name)
    refused(run(z, "t.npy"), f"z{suffix} cannot be read: Too many levels of symbolic links")
    z.unlink()
    z.symlink_to("/dev/zero")
    refused(run(z, "t.npy"), f"z{suffix} is a folder, a pipe or a device, and must be a file")
    z.unlink()
    os.mkfifo(z)
    refused(run(z, "t.npy"), "a pipe or a device")
    z.unlink()
    z.mkdir()
    refused(run(z, "t.npy"), "is a folder")


def test_files_of_other_kinds_and_one_file_alone_are_refused(run):
    Path("t.npy").write_bytes(bytes_of(LABELS))
    Path("z.pt").write_bytes(b"")
    refused(run("z.pt", "t.npy"), "z.pt must be a .npy, .npz or .csv file")
    refused(run("/dev/zero", "t.npy"), "/dev/zero is a folder, a pipe or a device, and must be a file: its size is")
    write("0,1.5,2\n1,2.5,3\n", "")
    refused(run("z.csv"), "z.csv holds one array: TARGETS, a file with one class for each row, must follow it")


def test_names_reach_the_terminal_without_its_orders(run):
    for name in ("\x1b[31mred.npy", "two\nlines.npy", "turned\u202e.npy", "\udcff.npy"):
        said = run(name, "t.npy")[2]
        assert said.rstrip("\n").isprintable()
        assert ascii(name)[1:-1] in said
    refused(run("z.npy", "t.npy", "--\x1b[31m"), r"unrecognized arguments: --\\x1b\[31m. --help lists the options")


@pytest.mark.parametrize("option", ["--top", "--stren", "--head", "--ign", "--js"])
def test_options_are_not_abbreviated(option, run):
    Path("z.npy").write_bytes(bytes_of(LOGITS))
    Path("t.npy").write_bytes(bytes_of(LABELS))
    refused(run("z.npy", "t.npy", option, "1"), f"unrecognized arguments: {option}")


def test_ctrl_c_is_status_130_without_a_word(tmp_path, monkeypatch, capsys):
    (tmp_path / "z.npy").write_bytes(bytes_of(LOGITS))
    (tmp_path / "t.npy").write_bytes(bytes_of(LABELS))
    monkeypatch.setattr(ext.Tally, "add", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main([str(tmp_path / "z.npy"), str(tmp_path / "t.npy")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "")


def test_names_may_begin_with_a_dash(run):
    Path("-z.npy").write_bytes(bytes_of(LOGITS))
    Path("--json").mkdir()
    Path("--json/t.npy").write_bytes(bytes_of(LABELS))
    check(run("--json", "--", "-z.npy", "--json/t.npy")[1], LOGITS, LABELS)


# ---- standard output ----


def shell(command, folder):
    return subprocess.run(["bash", "-c", command, *COMMAND], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("buffered", ["", "PYTHONUNBUFFERED=1"])
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ('"$0" "$@" z.npy t.npy >/dev/full', "error: standard output: No space left on device\n"),
        ('"$0" "$@" z.npy t.npy >&-', "error: standard output: it is closed\n"),
        ('"$0" "$@" --help >/dev/full', "error: standard output: No space left on device\n"),
        ('"$0" "$@" z.npy t.npy --json | true; exit "${PIPESTATUS[0]}"', ""),
        ('"$0" "$@" none.npy t.npy 2>/dev/full', ""),
        ('"$0" "$@" none.npy t.npy 2>&-', ""),
        ('"$0" "$@" --nothing 2>/dev/full', ""),
    ],
)
def test_output_that_cannot_be_written_is_status_2_and_no_traceback(command, said, buffered, tmp_path):
    (tmp_path / "z.npy").write_bytes(bytes_of(LOGITS))
    (tmp_path / "t.npy").write_bytes(bytes_of(LABELS))
    done = shell(
        f"export {buffered or 'LANG=C'}; {'unset PYTHONUNBUFFERED;' if not buffered else ''} {command}", tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_a_pipe_to_head_ends_quietly_and_standard_error_may_be_closed(tmp_path):
    (tmp_path / "z.npy").write_bytes(bytes_of(LOGITS))
    (tmp_path / "t.npy").write_bytes(bytes_of(LABELS))
    assert shell('"$0" "$@" z.npy t.npy | head -n 1', tmp_path).stderr == ""
    done = shell('"$0" "$@" z.npy t.npy 2>&-', tmp_path)
    assert done.returncode == 0
    assert done.stdout.endswith("classes            4\n")


# ---- hostile files ----


def independent(path, role):
    """The array by np.load or float, each told what the original was."""
    if path.suffix == ".csv":
        lines = [line for line in re.split("\r\n|\r|\n", path.read_bytes().decode("utf-8-sig")) if line]
        rows = [[float(field.strip().strip('"')) for field in line.split(",")] for line in lines]
        return np.array(rows) if role == "logits" else np.array(rows).astype(int)[:, 0]
    with np.load(path) if path.suffix == ".npz" else open(path, "rb") as file:
        return file[role] if path.suffix == ".npz" else np.load(file)


def mutations(data, rng):
    """Cut at every length up to 200 and some beyond, doubled, sent as text, with bytes flipped, lost or added."""
    yield from (data[:n] for n in [*range(min(200, len(data))), *rng.integers(0, len(data), 50)])
    yield from (data * 2, data.replace(b"\n", b"\r\n"), data.replace(b"\r\n", b"\n"), data.replace(b"\n", b"\r"))
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(0, rng.choice([128, len(data)]), rng.integers(1, 4)):
            kind = rng.integers(4)
            if kind == 0:
                changed[place % len(changed)] ^= 1 << rng.integers(8)
            elif kind == 1:
                changed[place % len(changed)] = rng.integers(256)
            elif kind == 2:
                del changed[place % len(changed)]
            else:
                changed.insert(place, rng.choice(list(b"0123456789-.,;'()[]{}eE\n \0\xff")))
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore:Reading .* required additional header parsing")  # by np.load, as of Python 2
@pytest.mark.parametrize("form", ["z.npy", "t.npy", "both.npz", "deflated.npz", "z.csv", "t.csv"])
def test_damaged_files_are_refused_or_read_as_others_read_them(form, run):
    logits, target = classifier(12, 6)
    logits, target = logits.round(3), np.maximum(target, 0)
    files = {"z.npy": "t.npy", "t.npy": "z.npy", "z.csv": "t.npy", "t.csv": "z.npy"}
    np.save("z.npy", logits)
    np.save("t.npy", target)
    np.savez("both.npz", logits=logits, target=target)
    np.savez_compressed("deflated.npz", logits=logits, target=target)
    csv_of("z.csv", logits)
    csv_of("t.csv", target)
    path = Path(form)
    arguments = [form] if form not in files else [form, files[form]] if form[0] == "z" else [files[form], form]
    statuses = {0: 0, 2: 0}
    for data in mutations(path.read_bytes(), np.random.default_rng(8)):
        path.write_bytes(data)
        status, found, _ = run(*arguments, "--json")
        statuses[status] += 1
        if status == 0:
            z = independent(path, "logits") if form[0] != "t" else logits
            y = independent(path, "target") if form[0] != "z" else target
            with np.errstate(all="ignore"):
                check(found, z, y)
    assert statuses[2] > 300
    assert sum(statuses.values()) > 350


# ---- large files, and progress ----


def sparse(path, dtype, shape):
    """A .npy file of zeros that takes no room."""
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))


def test_a_row_beyond_2_gib_is_refused_before_it_takes_memory(run, tmp_path):
    sparse(tmp_path / "z.npy", np.float32, (1, 1 << 30))
    Path("t.npy").write_bytes(bytes_of(LABELS[:1]))
    refused(run("z.npy", "t.npy"), "one row may take 2147483648 bytes, and takes 4294967296")


# Says on standard error how large the process has ever been; ru_maxrss would be pytest's own size at the fork.
MEASURED = """
import re, sys
from lace_loss.ext.__main__ import main
status = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory in Linux's /proc")
def test_10_gb_of_logits_take_less_than_200_mb_of_memory(tmp_path):
    n, classes = 2_500_000, 1000
    z, t = tmp_path / "z.npy", tmp_path / "t.npy"
    sparse(z, np.float32, (n, classes))
    sparse(t, np.int64, (n,))
    if z.stat().st_blocks * 512 > 1e9:
        z.unlink()
        pytest.skip("the file system has no sparse files")
    assert z.stat().st_size > 10e9
    done = subprocess.run([sys.executable, "-c", MEASURED, z, t, "--json"], capture_output=True, text=True, check=True)
    z.unlink()
    found = json.loads(done.stdout)
    assert found["count"] == n
    assert found["cross_entropy"] == pytest.approx(np.log(classes), rel=1e-6)
    assert found["loss"] == pytest.approx(np.log(classes) * (1 - 1 / classes), rel=1e-6)
    assert found["accuracy"] == {"1": 1, "5": 1}
    assert found["calibration_error"] == pytest.approx(1 - 1 / classes, rel=1e-6)
    assert int(done.stderr) < 200_000


def run_on_a_terminal(code, *files):
    """Output and what a terminal shows of standard error."""
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (25, 80))
    done = subprocess.run([sys.executable, "-c", code, *files], stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # all has been read
            os.close(ours)
            return done.stdout, shown.decode()


def test_a_terminal_shows_the_progress_if_tqdm_is_there(tmp_path):
    csv_of(tmp_path / "z.csv", -np.ones((600, 3)))
    csv_of(tmp_path / "t.csv", np.zeros(600, int))
    files = [tmp_path / "z.csv", tmp_path / "t.csv"]
    run = "import sys; from lace_loss.ext.__main__ import main; main(sys.argv[1:])"
    printed, shown = run_on_a_terminal(run, *files)
    assert "600 rows" in shown
    assert run_on_a_terminal(f"import sys; sys.modules['tqdm'] = None; {run}", *files) == (printed, "")
