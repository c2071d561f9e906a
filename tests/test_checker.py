"""The checker: it passes what is right, names what is wrong and why, and tells wrong values from no answer."""

import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks.peers import focal as focal_peer
from benchmarks.peers import span

from lace_loss import ext, ref
from lace_loss.ref import mistakes
from lace_loss.ref.__main__ import main
from lace_loss.ref.case import FORMATS, VECTORS, read
from lace_loss.ref.check import judge
from lace_loss.ref.installed import in_torch, installed
from lace_loss.ref.verdict import causes, grade

# Each planted mistake and the categories that have to find it; the first is enough for a port without that option.
FOUND_BY = {
    mistakes.Plain: {"q-to-1"},
    mistakes.Subtracted: {"q-to-1"},
    mistakes.OfSoftmax: {"q-to-1"},
    mistakes.Expm1: {"q-to-1"},
    mistakes.NotShifted: {"huge", "q-to-0"},
    mistakes.MinusOne: {"q-to-1"},
    mistakes.HalfSums: {"nominal"},
    mistakes.Flushed: {"underflow"},
    mistakes.FiniteOnly: {"nan", "plus-infinity"},
    mistakes.Clipped: {"q-to-1", "q-to-0"},
    mistakes.ClippedFinely: {"q-to-1", "q-to-0"},
    mistakes.ClippedBelow: {"q-to-1", "q-to-0"},
    mistakes.WeightInside: {"weights"},
    mistakes.SmoothedInside: {"smoothing"},
    mistakes.SmoothedOthers: {"smoothing"},
    mistakes.SmoothedUnweighted: {"smoothing"},
    mistakes.SmoothedByTarget: {"smoothing"},
    mistakes.SmoothedIgnored: {"smoothing"},
    mistakes.NotSmoothed: {"smoothing"},
    mistakes.MeanOfCount: {"weights"},
    mistakes.MeanOfWeights: {"probabilities"},
    mistakes.IgnoredCounted: {"ignored"},
    mistakes.IgnoredMultiplied: {"ignored-nan"},
    mistakes.IgnoresDefaultOnly: {"ignored"},
    mistakes.GradientOfSum: {"reductions"},
    mistakes.SumForMean: {"reductions"},
    mistakes.MeanForSum: {"reductions"},
    mistakes.MeanOfMeans: {"weights", "ignored"},
    mistakes.NoWeight: {"weights"},
    mistakes.NoGradOutput: {"grad-output"},
    mistakes.Argmax: {"probabilities"},
    mistakes.NoStrength: {"strength"},
    mistakes.ClassesLast: {"layout"},
    mistakes.ConstantFactor: {"nominal"},
    mistakes.SlopeOfCrossEntropy: {"nominal"},
    mistakes.OtherSign: {"nominal"},
    mistakes.Squared: {"nominal"},
    mistakes.CrossEntropy: {"nominal"},
    mistakes.Quartered: {"nominal"},
    mistakes.Log2: {"nominal"},
    mistakes.Twice: {"nominal"},
    mistakes.NotMasked: {"minus-infinity-other"},
    mistakes.BytesSwapped: {"nominal"},
    mistakes.WrongBend: {"nominal"},
}


def cases(dtype):
    return [case for path in sorted(VECTORS.glob(f"{dtype}-*.txt")) for case in read(path) if not case.refused]


@pytest.fixture(scope="module")
def float32_cases():
    return [case for case in cases("f32") if case.level not in ("large", "rows")]


def test_every_known_mistake_has_a_category_that_must_find_it():
    assert list(FOUND_BY) == mistakes.MISTAKES
    assert len(mistakes.MISTAKES) >= 40
    assert len({mistake.cause for mistake in mistakes.MISTAKES}) == len(mistakes.MISTAKES)


@pytest.mark.parametrize("mistake", FOUND_BY, ids=lambda mistake: mistake.__name__)
def test_a_planted_mistake_is_found_by_its_category_and_named_by_the_verdict(mistake, float32_cases):
    results = [judge(case, mistake(case).answer()) for case in float32_cases]
    plain = mistake is not mistakes.Plain
    failed = [result for result in results if not result.within(plain)]
    assert {result.case.category for result in failed} >= FOUND_BY[mistake]
    assert [cause.sentence for cause in causes(results)] == [mistake.cause]
    assert causes(results)[0].shown in failed


def focal_loss(z, t, reduction="mean", gamma=1, base=math.e, alpha=1.0, constant=False):
    ce = F.cross_entropy(z, t, reduction="none")
    factor = (1 - torch.exp(-ce)) ** gamma
    losses = alpha * (factor.detach() if constant else factor) * ce / math.log(base)
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


def by_softmax(z, t, reduction="mean", clip=0.0):
    q = F.softmax(z, -1).clamp(clip, 1 - clip).gather(-1, t.unsqueeze(-1)).squeeze(-1)
    losses = -(1 - q) * q.log()
    return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[reduction]


# Implementations in PyTorch, that share no line with the mistakes; and their cause, or None where none is known.
IN_TORCH = {
    "focal": (focal_loss, mistakes.Subtracted),
    "focal-gamma-2": (partial(focal_loss, gamma=2), mistakes.Squared),
    "focal-gamma-0": (partial(focal_loss, gamma=0), mistakes.CrossEntropy),
    "focal-base-2": (partial(focal_loss, base=2), mistakes.Log2),
    "focal-alpha": (partial(focal_loss, alpha=0.25), mistakes.Quartered),
    "focal-constant": (partial(focal_loss, constant=True), mistakes.ConstantFactor),
    "softmax": (by_softmax, mistakes.OfSoftmax),
    "softmax-clipped": (partial(by_softmax, clip=1e-7), None),  # the gradient is 0 where it is clipped
    "nothing": (lambda z, t, reduction: 0 * focal_loss(z, t, reduction), None),
    "nan": (lambda z, t, reduction: math.nan * focal_loss(z, t, reduction), None),
    "tripled": (lambda z, t, reduction: 3 * focal_loss(z, t, reduction), None),
    "of-softmax": (lambda z, t, reduction: focal_loss(F.softmax(z, -1), t, reduction), mistakes.Twice),
}


@pytest.mark.parametrize("name", IN_TORCH)
def test_a_loss_in_torch_is_caught_and_named_rightly_or_not_at_all(name, float32_cases):
    loss, mistake = IN_TORCH[name]

    rows = [case for case in float32_cases if case.level in ("core", "gradient")]
    put = in_torch(lambda z, t, w, reduction: loss(z[None], t[None], reduction=reduction)[0], "f32", "cpu")
    results = [judge(case, put(case)) for case in rows]
    assert grade(results) is None
    named = [cause.sentence for cause in causes(results)]
    assert named == ([mistake.cause] if mistake else [])


def test_a_grade_is_what_all_results_have(float32_cases):
    def graded(mistake):
        return grade([judge(case, mistake(case).answer()) for case in float32_cases])

    right = [
        judge(case, {key: case.values(key).reshape(case.shape_of(key)) for key in case.asked})
        for case in float32_cases
        if "at" not in case.words
    ]
    assert grade(right) == "exact"
    assert graded(mistakes.Plain) == "plain"
    assert graded(mistakes.Flushed) == "plain, flushed"
    assert graded(mistakes.Subtracted) is None


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


def test_a_value_that_the_type_rounds_to_its_largest_number_is_not_infinite():
    case = next(case for case in cases("f32") if case.level == "core" and case.name == "loss-half-the-largest")
    words = case.words | {"loss": ["7f7fffff"]}
    case, largest = replace(case, words=words), float(np.finfo(np.float32).max)
    assert judge(case, {"loss": np.array(largest * (1 + 2.0**-26))}).holds
    assert not judge(case, {"loss": np.array(largest * (1 + 2.0**-24))}).holds


def test_everything_installed_holds_in_a_table_of_80_columns(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    for name in ("ref f64", "ext f64", "ext f32", "torch CPU f64", "torch CPU f32", "composite bf16", "torch CUDA"):
        assert name in printed
    assert " 0 failed" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_whole_table_has_a_row_for_every_category(capsys, monkeypatch):
    monkeypatch.setattr("lace_loss.ref.__main__.installed", lambda: islice(installed(), 1))
    assert main(["--full"]) == 0
    printed = capsys.readouterr().out
    assert {case.category for case in cases("f64")} <= {line.split(" ")[0] for line in printed.splitlines()}


@pytest.mark.parametrize("arguments", [["--ful"], ["check", "--comm", "true"], ["check", "--tim", "3", "a:b"]])
def test_an_abbreviated_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_who_reads_a_line_only_gets_no_traceback():
    command = f"{sys.executable} -m lace_loss.ref check lace_loss.ext:forward_backward --dtypes f32 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("f32-core.txt")
    assert done.stderr == ""


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


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("port.py", "it has no function after a colon, as in 'port.py:answer'"),
        ("port.py:", "it has no function after a colon, as in 'port.py:answer'"),
        (":answer", "it has no function after a colon, as in 'port.py:answer'"),
        ("", "it has no function after a colon, as in 'port.py:answer'"),
        ("other.py:answer", "there is no file 'other.py'"),
        ("my.port.py:answer", "Python cannot import 'my.port.py', rename it to letters, digits and '_'"),
        ("port.py:other", "AttributeError: "),
        ("port.py:number", "it is of type int, not a function"),
        ("ends.py:answer", "SystemExit: 0"),
        ("nowhere:answer", "ModuleNotFoundError: "),
    ],
)
def test_a_name_that_is_no_function_gets_a_sentence(name, sentence, tmp_path, capsys, monkeypatch):
    (tmp_path / "port.py").write_text("number = 1\n")
    (tmp_path / "my.port.py").write_text("number = 1\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    assert main(["check", name]) == 2
    assert f"{name!r} is not a MODULE:FN that imports: {sentence}" in capsys.readouterr().err


def test_an_import_that_ends_or_blocks_the_process_is_status_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lace_loss.ref.check.IMPORT_SECONDS", 1.5)
    port = tmp_path / "port.py"
    port.write_text("import os\nos._exit(0)\n")
    assert main(["check", f"{port}:answer"]) == 2
    assert f"{port}:answer: its import ended the process" in capsys.readouterr().err
    port.write_text("import time\ntime.sleep(60)\n")
    assert main(["check", f"{port}:answer"]) == 2
    assert f"{port}:answer: no end of its import after 1.5 s" in capsys.readouterr().err


# What a port may do to its process before it answers.
MANNERS = {
    "leaves-at-once": "os._exit(0)",
    "leaves": "sys.exit(0)",
    "leaves-without-a-status": "raise SystemExit",
    "is-interrupted": "raise KeyboardInterrupt",
    "kills-itself": "os.kill(os.getpid(), signal.SIGKILL)",
    "kills-its-group": "os.killpg(0, signal.SIGKILL)",
    "forks-and-the-child-goes-on": "if os.fork(): os._exit(0)",
    "forks-and-both-go-on": "os.fork()",
    "closes-everything": "os.closerange(0, 100)",
    "closes-its-outputs": "sys.stdout.close(); sys.stderr.close(); os.closerange(0, 3)",
    "prints-answers": "print('case 1\\nloss 3fbfc617c3efd1d2\\ngradient nan nan\\nend', flush=True)",
    "prints-without-end": "while True: print('x' * 1000)",
    "reads-the-questions": "sys.stdin.read()",
    "is-strict-with-numbers": "np.seterr(all='raise')",
    "exits-later": "atexit.register(os._exit, 0)",
    "leaves-a-thread": "threading.Thread(target=time.sleep, args=(60,)).start()",
    "patches-numpy": "np.all = np.any = lambda *_, **__: True; np.abs = lambda x: 0 * x; np.isnan = np.isinf",
    "patches-the-checker": "check.judge = check.decoded = case.read = lambda *_: None; case.VECTORS = None",
    "patches-the-answers": "case.Case.compared = lambda *_: np.zeros(1)",
    "patches-print": "builtins.print = lambda *_, **__: None",
}
HARMLESS = {
    "closes-its-outputs", "prints-answers", "reads-the-questions", "is-strict-with-numbers", "exits-later",
    "leaves-a-thread", "patches-the-checker",
}  # fmt: skip


@pytest.mark.parametrize("manner", MANNERS)
def test_no_manners_let_a_wrong_port_pass_and_harmless_ones_a_right_one(manner, tmp_path, capsys):
    port = tmp_path / "port.py"
    port.write_text(
        "import atexit, builtins, os, signal, sys, threading, time\nimport numpy as np\nfrom lace_loss import ext\n"
        "from lace_loss.ref import answer, case, check\n"
        f"def right(z, t, **options):\n    {MANNERS[manner]}\n    return ext.forward_backward(z, t, **options)\n"
        f"def wrong(z, t, **options):\n    {MANNERS[manner]}\n    return np.zeros(np.shape(t)), np.zeros(z.shape)\n"
    )
    of_one_file = ["--levels", "gradient", "--dtypes", "f64"]
    assert main(["check", f"{port}:wrong", *of_one_file]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err
    if manner in HARMLESS:
        assert main(["check", f"{port}:right", *of_one_file]) == 0


class Focal(torch.nn.Module):
    """Of rows (N, C), as people write it."""

    def __init__(self, reduction="mean", gamma=1):
        super().__init__()
        self.reduction, self.gamma = reduction, gamma

    def forward(self, input, target):
        n = -F.log_softmax(input, 1).gather(1, target[:, None])[:, 0]
        losses = (1 - torch.exp(-n)) ** self.gamma * n
        return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[self.reduction]


def mean_alone(z, t):
    return focal_loss(z, t)


def knows_no_probabilities(logits, target, **options):
    if np.issubdtype(target.dtype, np.floating):
        raise NotImplementedError("probabilities")
    return ext.forward_backward(logits, target, **options)


def without_weights(logits, target, ignore_index=-100, reduction="mean", label_smoothing=0, strength=1, grad_output=1):
    given = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return ext.forward_backward(logits, target, grad_output=grad_output, strength=strength, **given)


@pytest.mark.parametrize("name", ["Focal", "focal_loss", "mean_alone"])
def test_a_loss_in_pytorchs_signature_is_named_as_it_is_with_the_margins_of_the_peers_table(name, capsys):
    assert check("--torch", f"test_checker:{name}", "--levels", "core", "gradient", "--dtypes", "f32") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"f32: right up to margin {span(focal_peer(), 'f32', 10)[0]}, lost from" in printed
    assert "f32: right up to margin 10, lost from 16.5" in printed
    assert f"likely cause of 59 of 67 wrong cases: {mistakes.Subtracted.cause}" in printed
    assert "not supported" not in printed


def test_the_projects_own_loss_in_torch_is_exact(capsys):
    assert check("--torch", "lace_loss.ext.torch:LACELoss", "--levels", "batch", "--dtypes", "bf16") == 0
    assert re.search("^bf16-batch.txt .* exact ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "level", "words"),
    [
        (["test_checker:knows_no_probabilities"], "batch", "not supported: probabilities ("),
        (["test_checker:without_weights"], "batch", "not supported: weight ("),
        (["--torch", "test_checker:mean_alone"], "layout", "not supported: reduction ("),
    ],
)
def test_what_a_port_does_not_take_is_said_and_is_no_pass(arguments, level, words, capsys):
    assert check(*arguments, "--levels", level, "--dtypes", "f32") in (1, 2)
    printed = capsys.readouterr().out
    assert words in printed
    assert " exact " not in printed
    assert "were not checked: what they ask for is not supported" in printed


def test_a_port_that_is_right_where_it_is_supported_has_status_2(capsys):
    assert check("test_checker:without_weights", "--levels", "core", "batch", "--dtypes", "f64") == 2
    printed = capsys.readouterr().out
    assert re.search("^f64-core.txt .* exact ", printed)
    assert re.search("^f64-batch.txt .* not whole ", printed, re.MULTILINE)
    assert "FAILED" not in printed


def test_a_level_that_is_asked_for_is_not_left_out(capsys):
    assert check("test_checker:port", "--levels", "second") == 2
    assert "the level second needs --product" in capsys.readouterr().err


def test_the_help_says_what_a_port_receives(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    printed = capsys.readouterr().out
    for word in (
        "reduction",
        "weight",
        "ignore_index",
        "label_smoothing",
        "strength",
        "grad_output",
        "bfloat16",
        "NumPy",
    ):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_hessian_product_is_checked_when_named(capsys):
    assert check("test_checker:port", "--product", "lace_loss.ref:hessian_vector_product", "--levels", "second") == 0


def test_a_wrong_port_fails_with_inputs_values_ulp_and_cause(capsys):
    assert check("test_checker:focal", "--levels", "gradient", "--dtypes", "f64") == 1
    printed = capsys.readouterr().out
    for words in ("FAILED f64-gradient.txt case", "logits", "expected", "computed", "ulp", "likely cause of "):
        assert words in printed
    assert printed.count("FAILED") == printed.count("likely cause") == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "case 1 .*: ZeroDivisionError: on purpose"),
        ("wrong_shape", r"case 1 .*: gradient must have shape \(2,\), got \(1,\)"),
        ("integers", "case 1 .*: loss must be floating, got int64"),
        ("leaves", "case 1 .*: SystemExit: 0"),
        ("ragged", "case 1 .*: ValueError"),
        ("hangs", "case 1 .*: no answer after 0.5 s"),
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
    (wrong,) = re.findall("^ +[0-9]+ wrong: (.*)$", printed, re.MULTILINE)
    assert status == 1
    assert all("infinity" in category for category in wrong.split(", "))
    assert "FAILED f64-core.txt case" in printed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('hello')", "is cut short"),
        ("print('case 2\\nend')", "the answer begins with 'case 2'"),
        ("print('case 1\\nloss 12\\nend')", "'12' is not 16 hexadecimal digits"),
        ("print('case 1\\nend')", "no answer"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "case 1 two-classes (nominal): no answer after 0.5 s"),
        ("", "no answer"),
    ],
)
def test_a_program_that_prints_garbage_or_hangs_is_status_2(tmp_path, body, message, capsys):
    command = program(tmp_path, body)
    assert main(["check", "--command", command, "--levels", "core", "--dtypes", "f64", "--timeout", "0.5"]) == 2
    assert message in capsys.readouterr().err


def core_answers(dtype="f64"):
    """Right answers to the cases of a core file, as a program prints them."""
    return "".join(f"case {c.number}\nloss {c.words['loss'][0]}\nend\n" for c in read(VECTORS / f"{dtype}-core.txt"))


def printed_by_a_program(tmp_path, capsys, text, dtype="f64", then=""):
    """Exit status and error of the check of a program that prints a text, and reads nothing."""
    (tmp_path / "text").write_bytes(text.encode())
    command = f"cat {tmp_path / 'text'}{then}"
    status = main(["check", "--command", command, "--levels", "core", "--dtypes", dtype, "--timeout", "2"])
    return status, capsys.readouterr().err


def test_a_program_that_reads_nothing_and_ends_its_lines_as_windows_does_may_be_right(tmp_path, capsys):
    assert printed_by_a_program(tmp_path, capsys, core_answers()) == (0, "")
    assert printed_by_a_program(tmp_path, capsys, core_answers().replace("\n", "\r\n")) == (0, "")
    assert printed_by_a_program(tmp_path, capsys, core_answers(), then="; exec <&-") == (0, "")


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("wider", [np.float32, np.float64])
def test_an_answer_may_be_of_a_wider_type(dtype, wider, tmp_path, capsys):
    def widened(word):
        return wider(FORMATS[dtype].decode([word])[0]).tobytes()[::-1].hex()

    text = re.sub("(?<=loss )[0-9a-f]+$", lambda found: widened(found[0]), core_answers(dtype), flags=re.MULTILINE)
    assert printed_by_a_program(tmp_path, capsys, text, dtype) == (0, "")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text + "case 137\nloss 0\nend\n", "f64-core.txt: an answer beyond the last case: 'case 137"),
        (lambda text: text + text, "f64-core.txt: an answer beyond the last case: 'case 1 "),
        (lambda text: text + "thanks\n", "f64-core.txt: the answer is cut short"),
        (lambda text: text[:-5], "f64-core.txt case 136 "),
        (lambda text: text.replace("loss", "lose", 1), "(nominal): the key 'lose' is none of loss, gradient, product"),
        (lambda text: text.replace("loss", "loss 0\nloss", 1), "(nominal): loss: '0' is not 16 hexadecimal digits"),
        (lambda text: re.sub("(loss .*\n)", r"\1\1", text, count=1), "(nominal): the key 'loss' stands twice"),
        (lambda text: re.sub("loss .*\n", "", text, count=1), "(nominal): no answer for the key 'loss'"),
        (lambda text: re.sub("loss .*", "loss", text, count=1), "(nominal): 1 values expected for loss, got 0"),
        (lambda text: text.replace("loss ", "loss nan ", 1), "(nominal): 1 values expected for loss, got 2"),
        (lambda text: text.replace("loss 3fb", "loss 3FB", 1), "16 hexadecimal digits in lower case"),
        (lambda text: text.replace("loss 3fb", "loss 3\x1b", 1), "'3\\x1b"),
        (lambda text: re.sub("loss .*", "error no such class", text, count=1), "(nominal): no such class"),
        (lambda text: re.sub("loss .*", "error", text, count=1), "(nominal): refused, but every index is a class"),
        (lambda text: text.replace("loss", "error\nloss", 1), "(nominal): the key 'error' is none of"),
        (lambda text: text.replace("case 2\n", "case 3\n"), "the answer begins with 'case 3', not 'case 2'"),
        (lambda text: text.replace("loss", "loss \xe9\x00", 1), "(nominal): 1 values expected for loss, got 2"),
    ],
)
def test_an_answer_that_is_not_of_the_protocol_is_status_2_and_names_case_and_key(damage, sentence, tmp_path, capsys):
    status, error = printed_by_a_program(tmp_path, capsys, damage(core_answers()))
    assert status == 2
    assert sentence in error


@pytest.mark.parametrize(
    ("then", "sentence"),
    [
        ("; echo no >&2; exit 3", "f64-core.txt: exit status 3: no"),
        ("; kill -9 $$", "f64-core.txt: ended by signal 9"),
        ("; sleep 60", "f64-core.txt: no end after 2 s"),
    ],
)
def test_right_answers_with_a_bad_end_are_status_2(then, sentence, tmp_path, capsys):
    status, error = printed_by_a_program(tmp_path, capsys, core_answers(), then=then)
    assert status == 2
    assert sentence in error


def in_little_memory():
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("yes", "output"),
        ("yes | cat", "output"),
        ("cat /dev/zero", "output"),
        ("yes end", None),
        ("yes >&2", "error"),
        ("cat /dev/zero >&2", "error"),
    ],
)
def test_output_without_end_takes_neither_memory_nor_time(command, output):
    done = subprocess.run(
        [sys.executable, "-m", "lace_loss.ref", "check", "--command", command, "--dtypes", "f32"],
        capture_output=True,
        text=True,
        timeout=50,
        preexec_fn=in_little_memory,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    sentence = f"bytes of standard {output}, which no right answer needs" if output else "the answer begins with ''"
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


def ended(processes):
    """Whether all these processes have ended within a few seconds."""
    for _ in range(100):
        states = subprocess.run(["ps", "-o", "stat=", "-p", processes], capture_output=True, text=True).stdout.split()
        if all(state.startswith("Z") for state in states):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "command",
    [
        "sleep 600 & echo $! > {0}; (sleep 600 & echo $! >> {0}; wait); wait",
        "sleep 600 & echo $! > {0}; cat {1}",  # its end is a good one
        "sleep 600 & echo $! > {0}; exit 3",
        "sleep 600 & echo $! > {0}; yes",
    ],
)
def test_nothing_that_a_program_has_started_lives_on(command, tmp_path, capsys):
    processes, text = tmp_path / "processes", tmp_path / "text"
    text.write_text(core_answers())
    arguments = ["--levels", "core", "--dtypes", "f64", "--timeout", "2"]
    assert main(["check", "--command", command.format(processes, text), *arguments]) == (0 if "cat" in command else 2)
    assert ended(",".join(processes.read_text().split()))


def test_who_ends_the_checker_ends_its_port(tmp_path):
    file = tmp_path / "process"
    command = [sys.executable, "-m", "lace_loss.ref", "check", "--command", f"sleep 600 & echo $! > {file}; wait"]
    with subprocess.Popen(command) as checker:
        while not (file.exists() and file.read_text().endswith("\n")):
            time.sleep(0.05)
        checker.terminate()
    assert checker.returncode == 143
    assert ended(file.read_text().strip())


@pytest.mark.parametrize("word", ["-1", "0", "nan", "inf", "1e300", "a", "86401"])
def test_a_timeout_that_is_no_time_gets_a_sentence(word, capsys):
    with pytest.raises(SystemExit) as end:
        main(["check", "test_checker:port", "--timeout", word])
    assert end.value.code == 2
    assert f"{word!r} is not a number of seconds above 0 and up to 86400" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["test_checker:port", "--command", "true"]])
def test_a_check_of_none_or_two_ports_is_status_2(arguments, capsys):
    assert main(["check", *arguments]) == 2
    assert "give either MODULE:FN, --torch MODULE:NAME or --command" in capsys.readouterr().err


def test_a_program_is_checked_where_there_are_no_process_groups_and_alarms(tmp_path):
    (tmp_path / "text").write_text(core_answers())
    as_on_windows = (
        "import os, signal, sys, numpy; del os.killpg, signal.SIGALRM; sys.platform = 'win32'\n"
        "from lace_loss.ref.__main__ import main\n"
        "arguments = ['--levels', 'core', '--dtypes', 'f64', '--timeout', '1']\n"
        f"assert main(['check', '--command', 'cat {tmp_path / 'text'}', *arguments]) == 0\n"
        "assert main(['check', '--command', 'exec sleep 60', *arguments]) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", as_on_windows], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: f64-core.txt case 1 two-classes (nominal): no answer after 1 s\n"


def test_an_empty_command_is_a_program_without_an_answer(capsys):
    assert main(["check", "--command", ""]) == 2
    assert "f64-core.txt case 1 two-classes (nominal): no answer" in capsys.readouterr().err


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


# The first case of f32-gradient.txt, as a file; its line 5 is a comment.
WHOLE = re.sub("count [0-9]+", "count 1", (VECTORS / "f32-gradient.txt").read_text().split("\ncase 2")[0]) + "\n"
SECOND_CASE = WHOLE[WHOLE.index("case 1") :].replace("case 1 ", "case 2 ")


def damaged(tmp_path, capsys, text):
    """Error of a check with f32-gradient.txt of this text, after its name."""
    (tmp_path / "f32-gradient.txt").write_bytes(text.encode("latin-1"))
    arguments = ["test_checker:port", "--levels", "gradient", "--dtypes", "f32"]
    assert main(["--vectors", str(tmp_path), "check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: f32-gradient.txt, line ").strip()


def before_the_end(line):
    return WHOLE.replace("\nreduction", f"\n{line}\nreduction")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE.replace("dtype f32\n", "dtype f8\n"), "2: 'f8' is no dtype"),
        (WHOLE.replace("dtype f32\n", ""), "5: the header lacks dtype"),
        (WHOLE.replace("dtype f32\n", "dtype f32\ndtype f32\n"), "3: 'dtype' does not belong here"),
        (WHOLE.replace("count 1", "count -1"), "4: '-1' is no count"),
        (WHOLE.replace("\n", "\r\n"), "1: the byte 0x0d is not printable ASCII"),
        (WHOLE.replace("two", "tw\xf6"), "6: the byte 0xf6 is not printable ASCII"),
        (WHOLE.replace("two", "\x1b[31m"), "6: the byte 0x1b is not printable ASCII"),
        (WHOLE.replace("target 0", "target\t0"), "10: the byte 0x09 is not printable ASCII"),
        (WHOLE.replace("target 0", "target 0 "), "10: 1 values expected for target, got 2"),
        (WHOLE.replace("target 0\n", "target 0\n\n"), "11: '' does not belong here"),
        (WHOLE.replace("case 1", "case 2"), "6: 'case 2 two-classes' is not 'case 1 NAME'"),
        (WHOLE.replace("two-classes", "two classes"), "6: 'case 1 two classes' is not 'case 1 NAME'"),
        (before_the_end("target 0"), "11: 'target' stands twice in this case"),
        (before_the_end("probabilities 0 0"), "10: 'target' does not belong to such a case"),
        (before_the_end("vector 00000000 00000000"), "11: 'vector' does not belong to such a case"),
        (before_the_end("put 0 00000000"), "11: 'put' does not belong to such a case"),
        (WHOLE.replace("category nominal\n", ""), "16: 'category' is missing"),
        (re.sub("loss-tolerance .*\n", "", WHOLE), "16: 'loss-tolerance' is missing"),
        (re.sub("gradient .*\n", "", WHOLE), "16: 'gradient' is missing"),
        (WHOLE.replace("shape 2", "shape -2"), "8: '-2' is not an integer from 0 to 4194304"),
        (WHOLE.replace("shape 2", "shape 2.0"), "8: '2.0' is not an integer"),
        (WHOLE.replace("shape 2", "shape 1_0"), "8: '1_0' is not an integer"),
        (WHOLE.replace("shape 2", "shape " + "9" * 5000), "8: '9999999999999999999999999999999999999999' is not an"),
        (WHOLE.replace("shape 2", "shape 100000 100000"), "8: more than 4194304 logits"),
        (WHOLE.replace("shape 2", "shape 0 4194304 4194304"), "8: more than 4194304 logits"),
        (WHOLE.replace("shape 2", "shape 3 0"), "8: a shape has 1 to 8 axes, and at least one class"),
        (WHOLE.replace("shape 2", "shape" + " 1" * 9), "8: a shape has 1 to 8 axes, and at least one class"),
        (WHOLE.replace("shape 2", "shape 3"), "9: 3 values expected for logits, got 2"),
        (WHOLE.replace("shape 2", "shape 2 2"), "9: 4 values expected for logits, got 2"),
        (WHOLE.replace("logits 3f000000", "logits 7fc00000"), "9: a NaN is written 'nan'"),
        (WHOLE.replace("logits 3f000000", "logits 3F000000"), "9: '3F000000' is not 8 hexadecimal digits in lower"),
        (WHOLE.replace("logits 3f000000", "logits 3f00000000000000"), "9: '3f00000000000000' is not 8 hexadecimal"),
        (re.sub("logits .*", "lcg 4294967296 -21", WHOLE), "9: '4294967296' is not an integer from 0 to 4294967295"),
        (re.sub("logits .*", "lcg 1 105", WHOLE), "9: '105' is not an integer from -149 to 104"),
        (re.sub("logits .*", "lcg 1 -21\nput 2 00000000", WHOLE), "10: '2' is not an integer from 0 to 1"),
        (re.sub("logits .*", "lcg 1 -21\nput 1 0", WHOLE), "10: '0' is not 8 hexadecimal digits"),
        (WHOLE.replace("target 0", "target 2"), "10: class 2 is not from 0 to 1, and no error is expected"),
        (WHOLE.replace("target 0", "target -1"), "10: class -1 is not from 0 to 1, and no error is expected"),
        (WHOLE.replace("target 0", "target 9223372036854775808"), "10: '9223372036854775808' is not an integer"),
        (before_the_end("ignore-index 0.5"), "11: '0.5' is not an integer"),
        (before_the_end("weight 3f800000"), "11: 2 values expected for weight, got 1"),
        (before_the_end("weight 3f800000 nan"), "11: weight has to be finite"),
        (before_the_end("grad-output 7f800000"), "11: grad-output has to be finite"),
        (before_the_end("strength 3f800000"), "11: '3f800000' is not 16 hexadecimal digits"),
        (before_the_end("strength 4000000000000000"), "11: strength is from 0 to 1"),
        (before_the_end("smoothing nan"), "11: smoothing has to be finite"),
        (WHOLE.replace("plain 7", "plain 0.5"), "16: '0.5' is not an integer from 1 to"),
        (WHOLE.replace("plain 7", "plain 1e999"), "16: '1e999' is not an integer from 1 to"),
        (before_the_end("at 0"), "15: 1 values expected for gradient, got 2"),
        (before_the_end("at"), "11: 1 values expected for at, got 0"),
        (before_the_end("at 1 2"), "11: '2' is not an integer from 0 to 1"),
        (before_the_end("at 1 0"), "11: the indices of at have to increase"),
        (before_the_end("at 1 1"), "11: the indices of at have to increase"),
        (before_the_end("expect error"), "13: 'loss' does not belong to such a case"),
        (before_the_end("expect"), "13: 'loss' does not belong to such a case"),
        (re.sub("(?s)loss .*end", "expect nothing\nend", WHOLE), "12: 'nothing' is not 'error'"),
        (WHOLE.replace("reduction none", "reduction average"), "11: a reduction is none, mean or sum"),
        (re.sub("loss .*", "loss nan", WHOLE), "12: a NaN is expected, but every logit is finite and no mean is taken"),
        (re.sub("loss-tolerance .*", "loss-tolerance nan", WHOLE), "13: loss-tolerance has to be finite"),
        (re.sub("loss-tolerance .*", "loss-tolerance bf800000", WHOLE), "13: a tolerance is not negative"),
        (
            re.sub("(?s)loss .*end", "expect error\nend", WHOLE),
            "12: an error is expected, but every target is a class or ignored",
        ),
        (
            re.sub("logits .*", "lcg 1 -21", (WHOLE + SECOND_CASE).replace("shape 2", "shape 4000000")),
            "14: 4000000 values expected for gradient, got 2",
        ),
    ],
)
def test_a_rule_of_the_format_that_is_broken_is_named_with_its_line(text, message, tmp_path, capsys):
    assert damaged(tmp_path, capsys, text).startswith(message)


def test_the_cases_of_a_file_have_so_many_logits_together(tmp_path, capsys):
    enormous = re.sub("gradient .*\n.* .*", "at 0\ngradient 00000000\ngradient-tolerance 00000000", WHOLE)
    enormous = re.sub("logits .*", "lcg 1 -21", enormous).replace("shape 2", "shape 4194304")
    enormous += enormous[enormous.index("case 1") :].replace("case 1 ", "case 2 ")
    assert damaged(tmp_path, capsys, enormous).endswith("the cases have more than 4194304 logits together")


def test_a_name_says_dtype_and_level_and_only_a_file_is_read(tmp_path, capsys):
    (tmp_path / "f64-core.txt").write_text(WHOLE)
    core = ["check", "test_checker:port", "--levels", "core", "--dtypes", "f64"]
    assert main(["--vectors", str(tmp_path), *core]) == 2
    assert "f64-core.txt: its header is that of f32-gradient.txt" in capsys.readouterr().err
    (tmp_path / "f64-core.txt").unlink()
    os.mkfifo(tmp_path / "f64-core.txt")
    assert main(["--vectors", str(tmp_path), *core]) == 2
    assert f"{tmp_path / 'f64-core.txt'} is not a file" in capsys.readouterr().err


def test_shipped_vectors_are_read_only_as_they_were_shipped_and_those_of_another_folder_by_their_rules(
    tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "vectors"
    shutil.copytree(VECTORS, folder)
    core = ["--vectors", str(folder), "check", "test_checker:port", "--levels", "core", "--dtypes", "f64"]
    sys.path.insert(0, str(Path(__file__).parent))
    file, sums = folder / "f64-core.txt", folder / "SHA256SUMS"
    file.write_text(file.read_text().replace("# Exact", "# exact"))
    assert main(core) == 0
    monkeypatch.setattr("lace_loss.ref.case.VECTORS", folder)
    assert main(core) == 2
    assert (
        f"{file}: its SHA-256 is not that of SHA256SUMS: the file is not as it was shipped" in capsys.readouterr().err
    )
    shutil.copy(VECTORS / file.name, file)
    assert main(core) == 0
    sums.write_text(re.sub(f".*{file.name}\n", "", sums.read_text()))
    assert main(core) == 2
    sums.unlink()
    assert main(core) == 2
    assert "SHA256SUMS" in capsys.readouterr().err


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


def test_a_program_may_say_what_it_does_not_take(tmp_path, capsys):
    text = re.sub("loss .*", "unsupported weight, strength", core_answers(), count=3)
    status, error = printed_by_a_program(tmp_path, capsys, text)
    assert (status, error) == (2, "")
