"""The checker: it passes what is right, names what is wrong and why, and tells wrong values from no answer."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from lace_loss import ext, ref
from lace_loss.ref import mistakes
from lace_loss.ref.__main__ import main
from lace_loss.ref.check import FORMATS, VECTORS, judge, read

# Each planted mistake and the categories that have to find it; the first is enough for a port without that option.
FOUND_BY = {
    mistakes.Plain: {"q-to-1"},
    mistakes.Subtracted: {"q-to-1"},
    mistakes.Expm1: {"q-to-1"},
    mistakes.NotShifted: {"huge", "q-to-0"},
    mistakes.MinusOne: {"q-to-1"},
    mistakes.HalfSums: {"nominal"},
    mistakes.Flushed: {"underflow"},
    mistakes.FiniteOnly: {"nan", "plus-infinity"},
    mistakes.Clipped: {"q-to-1", "q-to-0"},
    mistakes.WeightInside: {"weights"},
    mistakes.SmoothedInside: {"smoothing"},
    mistakes.MeanOfCount: {"weights"},
    mistakes.MeanOfWeights: {"probabilities"},
    mistakes.IgnoredCounted: {"ignored"},
    mistakes.IgnoredMultiplied: {"ignored-nan"},
    mistakes.ConstantFactor: {"nominal"},
    mistakes.Squared: {"nominal"},
    mistakes.NotMasked: {"minus-infinity-other"},
    mistakes.WrongBend: {"nominal"},
    mistakes.NoStrength: {"strength"},
}


def cases(dtype):
    return [case for path in sorted(VECTORS.glob(f"{dtype}-*.txt")) for case in read(path) if not case.refused]


@pytest.fixture(scope="module")
def float32_cases():
    return [case for case in cases("f32") if case.level != "large"]


def test_every_known_mistake_has_a_category_that_must_find_it():
    assert list(FOUND_BY) == mistakes.MISTAKES


@pytest.mark.parametrize("mistake", FOUND_BY, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_is_found_by_its_category_and_named(mistake, float32_cases):
    plain = mistake is not mistakes.Plain
    failed = [r for case in float32_cases if not (r := judge(case, mistake(case).answer(), plain)).holds]
    assert {r.case.category for r in failed} >= FOUND_BY[mistake]
    named = [mistakes.likely_cause(r.case, r.answer) for r in failed if r.case.category in FOUND_BY[mistake]]
    assert mistake.cause in named


def test_the_plain_implementation_holds_within_the_plain_tolerances(float32_cases):
    wrong = [str(case) for case in float32_cases if not judge(case, mistakes.Plain(case).answer(), True).holds]
    assert wrong == []


def test_flushed_subnormal_numbers_are_allowed_on_request_and_nothing_else_with_them(float32_cases):
    def failing(mistake):
        return {case.category for case in float32_cases if not judge(case, mistake(case).answer(), True, True).holds}

    assert failing(mistakes.Flushed) == set()
    for mistake, categories in FOUND_BY.items():
        if mistake not in (mistakes.Plain, mistakes.Flushed):
            assert failing(mistake) >= categories


def test_everything_installed_holds(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name in ("ref f64", "ext f64", "ext f32", "torch CPU f64", "torch CPU f32", "composite bf16", "torch CUDA"):
        assert name in printed
    assert " 0 failed" in printed


def port(logits, target, **options):
    return ext.forward_backward(logits.astype(np.float64), target, **options)


@np.errstate(all="ignore")
def focal(logits, target, reduction):
    """What people write."""
    z = np.atleast_2d(logits)
    e = np.exp(z - z.max(1, keepdims=True))
    q = e / e.sum(1, keepdims=True)
    q_t = np.take_along_axis(q, np.reshape(target, (-1, 1)), 1)
    gradient = (1 - q_t - q_t * np.log(q_t)) * (q - (np.arange(z.shape[1]) == np.reshape(target, (-1, 1))))
    return (-(1 - q_t) * np.log(q_t))[:, 0].reshape(np.shape(target)), gradient.reshape(logits.shape)


def raises(logits, target, **options):
    raise ZeroDivisionError("on purpose")


def wrong_shape(logits, target, **options):
    loss, gradient = port(logits, target, **options)
    return loss, gradient[..., :-1]


def integers(logits, target, **options):
    return np.zeros(1, int), np.zeros(logits.shape)


def leaves(logits, target, **options):
    sys.exit(0)


def ragged(logits, target, **options):
    return [0.0], [[1.0], [1.0, 2.0]]


def hangs(logits, target, **options):
    while True:
        pass


def check(*arguments):
    sys.path.insert(0, str(Path(__file__).parent))
    return main(["check", *arguments])


def test_a_right_port_passes(capsys):
    assert check("test_checker:port") == 0
    assert "f32-batch.txt" in capsys.readouterr().out


def test_a_port_may_be_named_by_its_file(capsys, monkeypatch):
    monkeypatch.chdir("/")
    assert main(["check", f"{__file__}:port", "--levels", "core", "--dtypes", "f64"]) == 0
    assert main(["check", "/nowhere/port.py:answer"]) == 2
    assert "'/nowhere/port.py:answer' is not a MODULE:FN that imports" in capsys.readouterr().err


def test_a_hessian_product_is_checked_when_named(capsys):
    assert check("test_checker:port", "--product", "lace_loss.ref:hessian_vector_product", "--levels", "second") == 0


def test_a_wrong_port_fails_with_inputs_values_ulp_and_cause(capsys):
    assert check("test_checker:focal", "--levels", "gradient", "--dtypes", "f64") == 1
    printed = capsys.readouterr().out
    for words in ("FAILED f64-gradient.txt case", "logits", "expected", "computed", "ulp", "likely cause: "):
        assert words in printed


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "case 1 .*: ZeroDivisionError: on purpose"),
        ("wrong_shape", r"case 1 .*: gradient must have shape \(2,\), got \(1,\)"),
        ("integers", "case 1 .*: loss must be floating, got int64"),
        ("leaves", "case 1 .*: SystemExit: 0"),
        ("ragged", "case 1 .*: ValueError"),
        ("hangs", "case 1 .*: TimeoutError: no answer after 0.5 s"),
        ("missing", "'test_checker:missing' is not a MODULE:FN that imports"),
    ],
)
def test_a_port_without_a_usable_answer_is_status_2_and_names_the_case(function, message, capsys):
    assert check(f"test_checker:{function}", "--levels", "gradient", "--timeout", "0.5") == 2
    assert re.search(message, capsys.readouterr().err)


def program(tmp_path, body):
    """A command that runs `body`, a program without this project's code."""
    file = tmp_path / "port.py"
    file.write_text(body)
    return f"{sys.executable} {file}"


# A whole port in a page: it reads the protocol itself and knows core cases of float64 only.
PORT = """
import math, struct, sys
def number(word): return struct.unpack(">d", bytes.fromhex(word))[0] if word != "nan" else math.nan
case = {}
for line in sys.stdin:
    key, *words = line.split()
    case[key] = words
    if key == "end":
        z, t = [number(word) for word in case["logits"]], int(case["target"][0])
        m = max(z)
        loss = math.nan
        if all(map(math.isfinite, z)):
            others = math.fsum(math.exp(x - m) for j, x in enumerate(z) if j != t)
            own = math.exp(z[t] - m)
            n = math.log1p(others) if z[t] == m else (m - z[t]) + math.log(others + own)
            loss = others / (others + own) * n
        print("case", case["case"][0])
        print("loss", struct.pack(">d", loss).hex() if loss == loss else "nan")
        print("end")
        case = {}
"""


def test_a_program_in_another_language_is_certified_through_a_pipe(tmp_path, capsys):
    """This one is plain and does not treat -inf: it fails there, and nowhere else."""
    status = main(["check", "--command", program(tmp_path, PORT), "--levels", "core", "--dtypes", "f64", "--plain"])
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert status == 1
    assert failed
    assert all("infinity" in line for line in failed)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('hello')", "is cut short"),
        ("print('case 2\\nend')", "the answer begins with 'case 2'"),
        ("print('case 1\\nloss 12\\nend')", "'12' is not 16 hexadecimal digits"),
        ("print('case 1\\nend')", "no answer"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "no end after 0.5 s"),
        ("", "no answer"),
    ],
)
def test_a_program_that_prints_garbage_or_hangs_is_status_2(tmp_path, body, message, capsys):
    command = program(tmp_path, body)
    assert main(["check", "--command", command, "--levels", "core", "--dtypes", "f64", "--timeout", "0.5"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: text.replace("lace-vectors 1", "lace-vectors 2", 1),
            "line 1: 'lace-vectors 2' is not the format",
        ),
        (lambda text: text[:-5], "cut short"),
        (lambda text: text.replace("count ", "count 1", 1), "its header promises 1"),
        (lambda text: text.replace("category", "flavour", 1), "'flavour' does not belong here"),
        (lambda text: text.replace("\nend", "", 1), "'case' does not belong here"),
        (lambda text: text.replace("\nloss ", "\nloss 0", 1), "hexadecimal digits"),
        (lambda text: text.replace("\nloss ", "\nloss 0000000000000000 ", 1), "1 values expected for loss, got 2"),
        (lambda text: "", "is not the format"),
        (lambda text: text.replace("level core", "level gradient", 1), "line 15: 'gradient'"),
        (lambda text: "lace-vectors 1\ndtype f64\nlevel core\ncount 0\n", "0 whole cases"),
    ],
)
def test_damaged_vectors_are_status_2_and_name_the_line(tmp_path, damage, message, capsys):
    text = (VECTORS / "f64-core.txt").read_text()
    (tmp_path / "f64-core.txt").write_text(damage(text))
    assert main(["--vectors", str(tmp_path), "check", "test_checker:port", "--levels", "core", "--dtypes", "f64"]) == 2
    error = capsys.readouterr().err
    assert "f64-core.txt" in error
    assert message in error


def test_an_ulp_is_that_of_the_dtype():
    values = np.array([1.0, 1.5, -3.0, 1e-40, 0.0, 1e30])
    assert np.array_equal(FORMATS["f64"].ulp(values), np.abs(np.spacing(values)))
    f32 = values.astype(np.float32)
    assert np.array_equal(FORMATS["f32"].ulp(f32.astype(float)), np.abs(np.spacing(f32)))
    f16 = np.array([1.0, 6e-8, 60000.0], np.float16)
    assert np.array_equal(FORMATS["f16"].ulp(f16.astype(float)), np.spacing(f16))


def test_the_reference_gives_its_own_vectors():
    for case in cases("f64"):
        if case.level == "gradient":
            loss = ref.forward(case.logits, case.target, **case.options)
            assert judge(
                case, {"loss": loss, "gradient": ref.backward(case.logits, case.target, **case.options)}, False
            ).holds
