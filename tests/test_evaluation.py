"""`ext.evaluate` and `python -m lace_loss.ext`: torch's and scikit-learn's figures, in constant memory."""

import json
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import top_k_accuracy_score

from lace_loss import ext
from lace_loss.ext.__main__ import main

torch = pytest.importorskip("torch")


def classifier(dtype=np.float64, shape=(600,), classes=20):
    """Logits of every confidence, whose class leads in about half of the samples; the last five are ignored."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(*shape, classes)) * rng.uniform(0.1, 4, (*shape, 1))
    target = np.where(rng.random(shape) < 0.4, logits.argmax(-1), rng.integers(0, classes, shape))
    target[-5:] = -100
    return np.moveaxis(logits, -1, 1).astype(dtype), target


def by_definition(logits, target):
    """Expected calibration error of (N, C) logits: 15 bins of equal width, each open below and closed above."""
    probability = softmax(logits.astype(np.float64), 1)
    confidence, right = probability.max(1), probability.argmax(1) == target
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


# Of the figures of 595 samples: float64 rounds both sides, float32 the kernel's losses and probabilities.
CLOSE = {"float64": 1e-13, "float32": 1e-6, "float16": 1e-6}


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_figures_are_those_of_torch_sklearn_and_the_definition(dtype):
    logits, target = classifier(dtype)
    found = ext.evaluate(logits, target, topk=(1, 3, 5))
    kept = target >= 0
    z, y = logits[kept].astype(np.float64), target[kept]
    ce = torch.nn.functional.cross_entropy(torch.tensor(z), torch.tensor(y)).item()
    assert found.count == kept.sum()
    assert found.cross_entropy == pytest.approx(ce, rel=CLOSE[dtype])
    assert found.calibration_error == pytest.approx(by_definition(z, y), rel=CLOSE[dtype])
    for k, accuracy in found.accuracy.items():
        assert accuracy == pytest.approx(top_k_accuracy_score(y, z, k=k, labels=range(20)), rel=1e-15)
    assert 0.3 < found.accuracy[1] < found.accuracy[3] < found.accuracy[5] < 1
    assert found.calibration_error > 0.1


def test_the_calibration_error_is_that_of_torchmetrics():
    calibration_error = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    logits, target = (values[:-5] for values in classifier())
    expected = calibration_error(torch.tensor(logits), torch.tensor(target), 20, n_bins=15).item()
    assert ext.evaluate(logits, target).calibration_error == pytest.approx(expected, rel=1e-6)  # it works in float32


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.5}, {"weight": np.arange(20) / 8}, {"label_smoothing": 0.1}, {"ignore_index": 3}],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_the_loss_is_the_mean_of_forward(dtype, options):
    logits, target = (values[:-5] for values in classifier(dtype))
    found = ext.evaluate(logits, target, **options)
    assert found.loss == pytest.approx(ext.forward(logits, target, **options), rel=CLOSE[dtype])


def test_blocks_layouts_and_memory_maps_change_nothing(monkeypatch, tmp_path):
    logits, target = classifier(shape=(40, 3, 5))
    expected = ext.evaluate(np.moveaxis(logits, 1, -1).reshape(-1, 20), target.reshape(-1))
    np.save(tmp_path / "z.npy", logits.astype(">f8"))  # as a big-endian machine writes it
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    for block in (1, 999, 1 << 20):
        monkeypatch.setattr(ext, "_LOGITS_IN_A_BLOCK", block)
        for z in (logits, mapped, np.asfortranarray(logits)):
            found = ext.evaluate(z, target)
            assert found.accuracy == expected.accuracy
            assert (found.loss, found.cross_entropy, found.calibration_error) == pytest.approx(
                (expected.loss, expected.cross_entropy, expected.calibration_error), rel=CLOSE["float64"]
            )


def test_one_sample_without_its_axis_counts_as_one():
    assert ext.evaluate([0.0, 2.0, 1.0], 2) == ext.evaluate([[0.0, 2.0, 1.0]], [2])


def test_of_equal_logits_the_first_comes_first():
    assert ext.evaluate([[1.0, 1.0, 1.0]] * 3, [0, 1, 2], topk=(1, 2)).accuracy == {1: 1 / 3, 2: 2 / 3}


def test_an_impossible_class_costs_infinity_and_its_confidence_is_that_of_the_class_in_front():
    found = ext.evaluate([[0.0, -np.inf, np.log(3)]], [1])
    assert found.loss == found.cross_entropy == np.inf
    assert found.calibration_error == pytest.approx(0.75, rel=1e-15)


def test_ignored_rows_do_not_count_whatever_they_hold():
    logits, target = classifier()
    expected = ext.evaluate(logits, target)
    logits[-5:] = np.nan
    assert ext.evaluate(logits, target) == expected


@pytest.mark.parametrize(("logits", "target"), [(np.zeros((0, 3)), np.zeros(0, int)), (np.zeros((2, 3)), [-100, -100])])
def test_nothing_to_count_is_nan(logits, target):
    found = ext.evaluate(logits, target)
    assert found.count == 0
    assert np.isnan([found.loss, found.cross_entropy, found.calibration_error, *found.accuracy.values()]).all()


def changed(place, value, shape=(50,)):
    logits, target = classifier(shape=shape)
    logits[place] = value
    return logits, np.maximum(target, 0)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (*changed((44, 3), np.nan), {}, ValueError, r"logits\[44\] holds NaN"),
        (*changed((44, 3), np.inf), {}, ValueError, r"logits\[44\] holds \+inf"),
        (*changed(44, -np.inf), {}, ValueError, r"logits\[44\] holds -inf only"),
        (*changed((6, 3, 2, 1), np.nan, (9, 3, 2)), {}, ValueError, r"logits\[6, :, 2, 1\] holds NaN"),
        (np.zeros((50, 2)), np.arange(50) // 44 * 7, {}, IndexError, r"target\[44\] is 7, not a class: 0 to 1"),
        (np.zeros((5, 2)), np.zeros(4, int), {}, ValueError, "each of 5 samples"),
        (np.zeros((5, 2)), np.zeros((5, 2), int), {}, ValueError, r"target must have shape \(5,\)"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {}, TypeError, r"must hold integers \(classes\), got float64"),
        (np.zeros((5, 2), int), np.zeros(5, int), {}, TypeError, "float16, float32 or float64, got int64"),
        (np.zeros((5, 0)), np.zeros(5, int), {}, ValueError, "C >= 1"),
        (1.0, 0, {}, ValueError, "C >= 1"),
        (np.zeros((5, 2)), np.zeros(5, int), {"topk": (1, 0)}, ValueError, "topk must hold numbers from 1, got 0"),
        (np.zeros((5, 2)), np.zeros(5, int), {"strength": 2}, ValueError, "strength"),
    ],
)
def test_errors_name_the_sample_and_the_rule(logits, target, options, error, message, monkeypatch):
    monkeypatch.setattr(ext, "_LOGITS_IN_A_BLOCK", 100)
    with pytest.raises(error, match=message):
        ext.evaluate(logits, target, **options)


def write(path, values, header=None):
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        np.savetxt(path, values, "%.17g" if values.dtype.kind == "f" else "%d", ",", header=header or "", comments="")
    return str(path)


def as_files(form, tmp_path, logits, target):
    both = {"logits": logits, "target": target}
    if form == "npz":
        np.savez(tmp_path / "both.npz", **both)
        return [str(tmp_path / "both.npz")]
    if form == "compressed":
        np.savez_compressed(tmp_path / "z.npz", logits)
        np.savez_compressed(tmp_path / "both.npz", **both)
        return [str(tmp_path / "z.npz"), str(tmp_path / "both.npz")]
    names = {"logits": ",".join(map("class {}".format, range(20))), "target": "label"} if form == "names" else {}
    suffix = "npy" if form == "npy" else "csv"
    return [write(tmp_path / f"{key}.{suffix}", values, names.get(key)) for key, values in both.items()]


@pytest.mark.parametrize("form", ["npy", "npz", "compressed", "csv", "names"])
def test_files_give_the_figures_of_their_arrays(form, tmp_path, capsys, monkeypatch):
    logits, target = classifier()
    expected = ext.evaluate(logits, target)
    for block in (1000, 1 << 20):
        monkeypatch.setattr(ext, "_LOGITS_IN_A_BLOCK", block)
        assert main([*as_files(form, tmp_path, logits, target), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["count"] == expected.count
        assert found["accuracy"] == {str(k): accuracy for k, accuracy in expected.accuracy.items()}
        for key in ("loss", "cross_entropy", "calibration_error"):
            assert found[key] == pytest.approx(getattr(expected, key), rel=CLOSE["float64"])


def test_a_table_is_printed_for_people_and_infinity_is_null_for_programs(tmp_path, capsys):
    files = as_files("csv", tmp_path, np.array([[1.0, 4.0, 2.0], [0.0, 5.0, 0.0]]), np.array([1, 0]))
    assert main(files) == 0
    assert capsys.readouterr().out == (
        "loss               2.50329\ncross entropy      2.59162\ntop-1 accuracy     50.00 %\n"
        "top-5 accuracy     100.00 %\ncalibration error  57.15 %\ncount              2\n"
    )
    assert main([*files, "--ignore-index", "0"]) == 0
    assert capsys.readouterr().out.endswith("count              1\n")
    files = as_files("npy", tmp_path, np.array([[-np.inf, 0.0]]), np.array([0]))
    assert main([*files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] is None


def npy(path, values, cut=0):
    write(path, values)
    path.write_bytes(path.read_bytes()[: -cut or None])


Z, T = np.zeros((9, 4)), np.zeros(9, int)
DAMAGE = {
    "truncated": (lambda z, t: npy(z, Z, cut=100), r"z.npy is cut short in row 5 of its 9"),
    "truncated targets": (lambda z, t: npy(t, T, cut=20), r"t.npy is cut short in row 6 of its 9"),
    "cut in its header": (
        lambda z, t: z.write_bytes(b"\x93NUMPY\x01\x00v"),
        "z.npy is not an array of rows in the .npy format",
    ),
    "no .npy at all": (lambda z, t: z.write_text("1,2,3\n"), "z.npy is not an array of rows in the .npy format"),
    "objects": (lambda z, t: np.save(z, np.array([{}])), "z.npy must hold numbers, got object"),
    "one number": (lambda z, t: np.save(z, 3.0), "z.npy is not an array of rows in"),
    "integer logits": (lambda z, t: npy(z, Z.astype(int)), "logits must be float16, float32 or float64, got int64"),
    "floating targets": (lambda z, t: npy(t, T / 2), r"target must hold integers \(classes\), got float64"),
    "by columns": (lambda z, t: npy(z, np.asfortranarray(Z + 1)), "stored column by column"),
    "fewer targets": (lambda z, t: npy(t, T[1:]), r"t.npy of shape \(8\) does not fit .*z.npy of shape \(9, 4\)"),
    "targets in two columns": (lambda z, t: npy(t, Z.astype(int)), r"t.npy of shape \(9, 4\) does not fit"),
    "a NaN": (lambda z, t: npy(z, np.where(np.arange(36).reshape(9, 4) == 30, np.nan, 0)), r"logits\[7\] holds NaN"),
    "no class": (lambda z, t: npy(t, T + 4 * (np.arange(9) == 8)), r"target\[8\] is 4, not a class: 0 to 3"),
    "missing": (lambda z, t: None, "No such file .*z.npy"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_used_is_status_2_and_says_where(damage, tmp_path, capsys):
    z, t = tmp_path / "z.npy", tmp_path / "t.npy"
    if damage != "missing":
        npy(z, Z)
    npy(t, T)
    change, message = DAMAGE[damage]
    change(z, t)
    assert main([str(z), str(t)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err), printed.err


@pytest.mark.parametrize(
    ("arrays", "change", "message"),
    [
        ({"logits": Z, "target": T}, lambda data: data[:-100], "not a zip file"),
        ({"logits": Z + 1, "target": T}, lambda data: data[:200] + b"\xff" * 8 + data[208:], "Bad CRC-32"),
        ({"scores": Z, "target": T}, lambda data: data, "has no array 'logits', but scores, target"),
        ({"logits": Z}, lambda data: data, r"\[logits\] of shape \(9, 4\) does not fit"),
    ],
    ids=["truncated", "a flipped byte", "another name", "no targets"],
)
def test_an_npz_that_cannot_be_used_is_status_2(arrays, change, message, tmp_path, capsys):
    file = tmp_path / "both.npz"
    np.savez(file, **arrays)
    file.write_bytes(change(file.read_bytes()))
    assert main([str(file)]) == 2
    assert re.search(message, capsys.readouterr().err)


TEXT = {
    "a word": (["1,2", "3,x"], ["0", "1"], r"z.csv, line 2: expected 2 numbers, got '3,x'"),
    "a short line": (["1,2", "", "3"], ["0", "1"], r"z.csv, line 3: expected 2 numbers, got '3'"),
    "no integer": (["1,2", "3,4"], ["label", "0", "1.5"], r"t.csv, line 3: expected 1 whole number, got '1.5'"),
    "fewer targets": (["1,2", "3,4"], ["0"], r"t.csv ends after 1 rows, .*z.csv does not"),
    "more targets": (["1,2", "3,4"], ["0", "1", "1"], r"z.csv ends after 2 rows, .*t.csv does not"),
    "no text": ([b"\xff\xfe"], ["0"], "codec can't decode"),
    "two labels a line": (["1,2", "3,4"], ["0,1", "1,1"], "t.csv of shape .* does not fit"),
}


@pytest.mark.parametrize("damage", TEXT)
def test_a_csv_that_cannot_be_used_is_status_2_and_names_the_line(damage, tmp_path, capsys):
    logits, target, message = TEXT[damage]
    for name, lines in (("z.csv", logits), ("t.csv", target)):
        (tmp_path / name).write_bytes(
            b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        )
    assert main([str(tmp_path / "z.csv"), str(tmp_path / "t.csv")]) == 2
    assert re.search(message, capsys.readouterr().err)


def sparse(path, dtype, shape):
    """A .npy file of zeros that takes no room."""
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))


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
    files = as_files("csv", tmp_path, *classifier())
    run = "import sys; from lace_loss.ext.__main__ import main; main(sys.argv[1:])"
    printed, shown = run_on_a_terminal(run, *files)
    assert "600 rows" in shown
    assert run_on_a_terminal(f"import sys; sys.modules['tqdm'] = None; {run}", *files) == (printed, "")
