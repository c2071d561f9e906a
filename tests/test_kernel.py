"""The C kernel by itself: where its coefficients come from, and that any C99 compiler takes it without a warning."""

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest
import tolerances
from oracle import rows as hostile_rows
from oracle import ulps
from test_machines import BITS, PORT, SOURCES
from test_posterior import exact as exact_posterior

from lace_loss import ref
from lace_loss.ref.__main__ import main as check

EXT = Path(__file__).parent.parent / "ext"
mpmath.mp.dps = 40


def constants():
    """The numbers that lace_math.h defines, float's first: {name: [float32 values, float64 values]}."""
    text = (EXT / "lace_math.h").read_text().replace("\\\n", "")
    found = {}
    for name, value in re.findall(
        r"^#define (EXP|LOG|LN2_HIGH|LN2_LOW|LOG2E|EXP_SCALE|ROUND_SHIFT) +(\{.*?\}|\S+)", text, re.M
    ):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", value)]
        found.setdefault(name, []).append(numbers)
    return found


def fitted(function, a, b, terms, dtype):
    """Near-minimax coefficients, constant term first, and the largest error before their rounding to `dtype`."""
    coefficients, error = mpmath.chebyfit(function, [a, b], terms, error=True)
    return [dtype(float(c)) for c in reversed(coefficients)], error


@pytest.mark.parametrize(
    ("which", "dtype", "terms", "error"), [(0, np.float32, 6, 2.0**-29), (1, np.float64, 11, 2.0**-59)]
)
def test_the_exponential_is_the_fit_it_claims_to_be(which, dtype, terms, error):
    half = mpmath.log(2) / 2 * mpmath.mpf("1.01")
    expected, off = fitted(lambda x: sum(x**k / mpmath.factorial(k + 2) for k in range(30)), -half, half, terms, dtype)
    assert [dtype(c) for c in constants()["EXP"][which]] == expected
    assert off < error


@pytest.mark.parametrize(
    ("which", "dtype", "terms", "error"), [(0, np.float32, 4, 2.0**-29), (1, np.float64, 8, 2.0**-58)]
)
def test_the_logarithm_is_the_fit_it_claims_to_be(which, dtype, terms, error):
    largest = ((mpmath.sqrt(2) - 1) / (mpmath.sqrt(2) + 1)) ** 2 * mpmath.mpf("1.01")
    expected, off = fitted(
        lambda x: sum(2 * x**k / (2 * k + 3) for k in range(40)), mpmath.mpf(0), largest, terms, dtype
    )
    assert [dtype(c) for c in constants()["LOG"][which]] == expected
    assert off < error


@pytest.mark.parametrize(("which", "terms", "error"), [(0, 5, 2.0**-31), (1, 10, 2.0**-57)])
def test_the_logarithm_of_labels_is_the_fit_it_claims_to_be(which, terms, error):
    text = (EXT / "lace_binary.h").read_text().replace("\\\n", "")
    found = re.findall(r"^#define LOG_TO_2 +\{(.*?)\}", text, re.M)[which]
    largest = mpmath.mpf("1.01") / 9
    expected, off = fitted(
        lambda x: sum(2 * x**k / (2 * k + 3) for k in range(90)), mpmath.mpf(0), largest, terms, np.float64
    )
    assert [float(number) for number in found.split(",")] == expected
    assert off * largest / 2 < error  # it is multiplied by s^2 and added to 2


@pytest.mark.parametrize(("which", "dtype", "largest_exponent"), [(0, np.float32, 169), (1, np.float64, 1094)])
def test_log_2_comes_apart_so_that_its_multiples_are_exact(which, dtype, largest_exponent):
    (high,), (low,) = constants()["LN2_HIGH"][which], constants()["LN2_LOW"][which]
    assert dtype(high) == high
    for n in range(largest_exponent):
        assert float(dtype(n) * dtype(high)) == mpmath.mpf(high) * n
    assert dtype(low) == dtype(float(mpmath.log(2) - high))
    assert constants()["EXP_SCALE"][which] == [2.0 ** {0: 64, 1: 128}[which]]
    shift = 1.5 * 2.0 ** np.finfo(dtype).nmant + {0: 127 + 64, 1: 1023 + 128}[which]
    assert constants()["ROUND_SHIFT"][which] == [shift]


# mpmath: losses 0.0265308425..., 4.9800551351...; -log q_t 0.169846..., q_t 0.843794...; of two zeros the first leads;
# 1 / (1 + 2 e^-5) = 0.986703...
PROGRAM = r"""
#include "lace.h"
int main(void)
{
    float logits[2][3] = {{1, 4, 2}, {0, 5, 0}}, loss[2] = {-1, -1}, gradient[2][3];
    int64_t target[2] = {1, 0}, wrong[2] = {1, 3};
    float cross_entropy[2], probability[2], confidence[2];
    int64_t rank[2];
    static lace_args_f32 args;
    args.loss = loss;
    args.gradient = gradient[0];
    args.logits = logits[0];
    args.target = wrong;
    args.n = 2;
    args.k = 3;
    args.cross_entropy = cross_entropy;
    args.probability = probability;
    args.rank = rank;
    args.confidence = confidence;
    if (lace_rows_f32(&args) != 2) return 1;
    if (loss[0] != -1) return 2;
    args.target = target;
    if (lace_rows_f32(&args)) return 3;
    if (!(loss[0] > 0.0265308f && loss[0] < 0.0265309f)) return 4;
    if (!(loss[1] > 4.98005f && loss[1] < 4.98006f)) return 5;
    if (!(cross_entropy[0] > 0.16984f && cross_entropy[0] < 0.16985f)) return 6;
    if (!(probability[0] > 0.84379f && probability[0] < 0.84380f)) return 7;
    if (rank[0] != 0 || rank[1] != 1) return 8;
    if (confidence[0] != probability[0] || !(confidence[1] > 0.98670f && confidence[1] < 0.98671f)) return 11;
    static lace_totals_f32 totals;
    float alone[2];
    for (int i = 0; i < 2; i++)
        if (lace_row_f32(&alone[i], NULL, &totals, logits[i], (size_t)target[i], 3)) return 9;
    if (alone[0] != loss[0] || alone[1] != loss[1] || totals.count != 2 || totals.top[0] != 1) return 10;
    return 0;
}
"""


STRICT = ["-Wall", "-Wextra", "-pedantic", "-Wconversion", "-Wdouble-promotion", "-Werror", "-ffp-contract=off"]


@pytest.mark.parametrize("language", ["-std=c99", "-xc++"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_a_program_in_c_or_c_plus_plus_compiles_without_a_warning_and_runs(compiler, language, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} on this machine")
    (tmp_path / "main.c").write_text(PROGRAM)
    sources = [tmp_path / "main.c", *SOURCES, EXT / "lace_row.c"]
    command = [compiler, language, *STRICT, "-O2", f"-I{EXT}", *sources, "-o", tmp_path / "program"]
    subprocess.run(command, check=True)
    assert subprocess.run([tmp_path / "program"]).returncode == 0


def example(language):
    """Lines of the program that lace.h shows for many rows."""
    text = (EXT / "lace.h").read_text()
    return "\n".join(re.findall(r"^ \*     (.*)", text[text.index(f"In {language}") :].split("\n *\n")[0], re.M))


# What users may have set for their own code, which lace.h and its examples become a part of.
USERS = [*STRICT, "-Wmissing-field-initializers", "-Wsign-conversion", "-Wshadow", "-Wcast-qual", "-Wundef"]
ALL_OF_CLANG = {"-std=c99": ["-Weverything", "-Wno-declaration-after-statement"], "-xc++": ["-Wc++11-compat"]}


@pytest.mark.parametrize("language", ["-std=c99", "-xc++"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_header_s_examples_compile_without_a_warning_and_are_right(compiler, language, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} on this machine")
    lines, smoothing = example("C:"), 0.0
    if language == "-xc++":
        lines, smoothing = "\n".join([*lines.splitlines()[:2], example("C++")]), 0.1
    show = r'printf("%.9g %.9g %lld\n", (double)loss[0], (double)loss[1], (long long)status);'
    program = f'#include "lace.h"\n#include <stdio.h>\nint main(void)\n{{\n{lines}\n{show}\nreturn 0;\n}}\n'
    (tmp_path / "main.c").write_text(program)
    objects = [tmp_path / f"{source.stem}.o" for source in SOURCES]
    for source, made in zip(SOURCES, objects, strict=True):
        subprocess.run(["gcc", "-O2", "-ffp-contract=off", "-c", source, "-o", made], check=True)
    users = [*USERS, *(ALL_OF_CLANG[language] if compiler == "clang" else [])]
    subprocess.run([compiler, language, *users, f"-I{EXT}", "-c", "main.c", "-o", "main.o"], cwd=tmp_path, check=True)
    subprocess.run(["gcc", "main.o", *objects, "-o", "program"], cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True).stdout
    loss = ref.forward([[1, 4, 2], [0, 5, 0]], [1, 0], reduction="none", label_smoothing=smoothing)
    assert [float(word) for word in said.split()] == pytest.approx([*loss, DONE], rel=2**-20)


UNSAFE = [
    "-ffast-math",
    "-funsafe-math-optimizations",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",  # without the others GCC takes the first back
    "-fassociative-math",
    "-freciprocal-math",
    "-fno-signed-zeros",
    "-ffinite-math-only",
    "-Ofast",
]
OF_CLANG = ["-fapprox-func", "-fno-honor-nans", "-fno-honor-infinities", "-ffp-model=fast"]
SAME_BITS = {"gcc": {"-fassociative-math"}, "clang": {*UNSAFE, *OF_CLANG} - {"-ffast-math", "-ffinite-math-only"}}
SAME_BITS["clang"] -= {"-Ofast", "-ffp-model=fast"}


def kernel(compiler, folder, *flags, target=()):
    """Object files of all sources, that of one row last, or what the compiler says against one."""
    objects = []
    for source in (*SOURCES, EXT / "lace_row.c"):
        objects.append(folder / f"{source.name}.o")
        command = [compiler, *target, "-O2", *flags, f"-I{EXT}", "-c", source, "-o", objects[-1]]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            return made.stderr
    return objects


def bits(objects, folder, gcc="gcc", run=()):
    """A hash of the bits of all results."""
    (folder / "bits.c").write_text(BITS)
    program = [folder / "bits.c", *objects[:2], "-o", folder / "bits"]
    subprocess.run([gcc, "-static", "-ffp-contract=off", f"-I{EXT}", *program], check=True)
    return subprocess.run([*run, folder / "bits"], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def plain_bits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return bits(kernel("gcc", folder, "-ffp-contract=off"), folder)


@pytest.mark.parametrize(
    ("compiler", "flags"), [*(("gcc", f) for f in UNSAFE), *(("clang", f) for f in [*UNSAFE, *OF_CLANG])]
)
def test_no_part_of_fast_math_makes_a_wrong_kernel(compiler, flags, plain_bits, tmp_path):
    """It is refused, or gives the bits of a build without it, and the golden vectors hold, NaN and infinities too."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} on this machine")
    made = kernel(compiler, tmp_path, "-ffp-contract=off", *flags.split())
    if flags not in SAME_BITS[compiler]:
        assert "-ffast-math breaks" in made
        return
    assert isinstance(made, list), made
    assert bits(made, tmp_path) == plain_bits
    for made_of, dtype, row in zip(made, ("f32", "f64", "f32"), ([], ["-DF64"], ["-DROW"]), strict=True):
        program = [*row, PORT, made_of, "-o", tmp_path / "port"]
        subprocess.run(["gcc", "-std=c99", "-O2", "-ffp-contract=off", f"-I{EXT}", *program], check=True)
        levels = ["core", "gradient", *([] if row == ["-DROW"] else ["batch", "layout"])]
        assert check(["check", "--command", str(tmp_path / "port"), "--dtypes", dtype, "--levels", *levels]) == 0


@pytest.mark.parametrize("flags", ["-funsafe-math-optimizations", "-fassociative-math", "-freciprocal-math"])
def test_no_part_of_fast_math_changes_a_bit_where_clang_cannot_take_it_back(flags, plain_bits, tmp_path):
    """`#pragma float_control` is not for every processor: on an AArch64 the kernel has to stand without it."""
    for name in ("clang", "aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if not shutil.which(name):
            pytest.skip(f"no {name} on this machine")
    objects = kernel("clang", tmp_path, "-ffp-contract=off", flags, target=["--target=aarch64-linux-gnu"])
    assert bits(objects, tmp_path, "aarch64-linux-gnu-gcc", ["qemu-aarch64"]) == plain_bits


def test_constants_that_are_not_double_are_refused(tmp_path):
    assert "lace_constants_are_double" in kernel("gcc", tmp_path, "-fsingle-precision-constant")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            ["-m32", "-mfpmath=387"],
            "float is worked on in a wider type here; on x86 add",
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="no x87 here"),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["lace_f32.c", "lace_f64.c", "lace_row.c"])
def test_arithmetic_that_is_not_ieee_is_refused(source, flags, message):
    command = ["gcc", *flags, "-ffreestanding", "-fsyntax-only", EXT / source]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode != 0
    assert message in made.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """lace_row.c and the files for many rows, for ctypes."""
    path = tmp_path_factory.mktemp("library") / "lace.so"
    sources = [EXT / "lace_row.c", *SOURCES]
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-ffp-contract=off", *sources, "-o", path], check=True)
    library = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.lace_row_f32.argtypes = [pointer] * 4 + [size] * 2
    library.lace_row_posterior_f32.argtypes = [pointer] * 2 + [size]
    for dtype in ("f32", "f64"):
        rows, columns = getattr(library, f"lace_rows_{dtype}"), getattr(library, f"lace_columns_{dtype}")
        rows.restype = columns.restype = ctypes.c_int64
        rows.argtypes = columns.argtypes = [pointer]
        for kind in ("rows", "columns"):
            posterior = getattr(library, f"lace_posterior_{kind}_{dtype}")
            posterior.restype, posterior.argtypes = ctypes.c_int64, [pointer]
    return library


class Args(ctypes.Structure):
    """lace_args_f32 or lace_args_f64, which differ in what they point at."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("loss", "gradient", "logits", "target", "soft_target", "scale")),
        *((name, ctypes.c_size_t) for name in ("scale_step", "n", "k")),
        ("logits_stride", ctypes.c_ssize_t),
        ("gradient_stride", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("options", "cross_entropy", "probability", "rank", "confidence")),
        ("soft_target_stride", ctypes.c_size_t),
    )


def called(function, **fields):
    """Result of a function of lace.h, given arrays, numbers and None for the fields of its arguments."""
    given = {name: value.ctypes.data if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    return function(ctypes.byref(Args(**given)))


def options(dtype, weight=None, label_smoothing=0.0, strength=1.0):
    """Address of lace_options_f32 or lace_options_f64, and what has to be kept alive meanwhile."""
    real = {"f32": ctypes.c_float, "f64": ctypes.c_double}[dtype]
    fields = [("weight", ctypes.c_void_p), ("smoothing", real), ("strength", real), ("ignore_index", ctypes.c_int64)]
    of_dtype = type("Options", (ctypes.Structure,), {"_fields_": fields})
    made = of_dtype(None if weight is None else weight.ctypes.data, label_smoothing, strength, -100)
    return ctypes.addressof(made), (made, weight)


class Totals(ctypes.Structure):
    _fields_ = (
        ("loss", ctypes.c_float * 2),
        ("cross_entropy", ctypes.c_float * 2),
        ("count", ctypes.c_size_t),
        ("top", ctypes.c_size_t * 5),
    )


DONE, NULL, SIZE, OPTION = 0, -1, -2, -3
STATISTICS = ("cross_entropy", "probability", "rank", "confidence")


def test_one_row_has_the_bits_of_a_column(library):
    """Every kind of margin, up to where losses underflow; ties, infinities and NaN."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        k = rng.integers(1, 200)
        z = np.float32(rng.normal(size=k) * rng.choice([0, 0.01, 1, 10, 60]))
        z[rng.random(k) < 0.01] = rng.choice([np.inf, -np.inf, np.nan, 3e38, -3e38])
        target = np.array([rng.integers(k)])
        if rng.random() < 0.5:
            z[target] += np.float32(rng.uniform(-110, 110))
        one, column = np.empty((2, 1 + k), np.float32)
        alone = np.empty(1, np.float32)
        arguments = {"loss": column, "gradient": column[1:], "logits": z, "target": target}
        assert called(library.lace_columns_f32, **arguments, n=1, k=k) == DONE
        at = one.ctypes.data
        assert library.lace_row_f32(at, at + 4, None, z.ctypes.data, target[0], k) == DONE
        assert library.lace_row_f32(alone.ctypes.data, None, None, z.ctypes.data, target[0], k) == DONE
        assert np.array_equal(np.isnan(one), np.isnan(column))
        assert one[one == one].tobytes() == column[column == column].tobytes()
        assert alone.tobytes() == one[:1].tobytes() or np.isnan(one[0])


def test_totals_are_those_of_the_reference(library):
    rng = np.random.default_rng(0)
    z = (3 * rng.normal(size=(4000, 10))).astype(np.float32).round(1)  # with ties
    target = np.where(rng.random(len(z)) < 0.7, z.argmax(1), rng.integers(0, 10, len(z)))
    totals = Totals()
    for row, t in zip(z, target, strict=True):
        assert library.lace_row_f32(None, None, ctypes.byref(totals), row.ctypes.data, t, 10) == DONE
    z_t = z[np.arange(len(z)), target, None]
    rank = (z > z_t).sum(1) + ((z == z_t) & (np.arange(10) < target[:, None])).sum(1)
    assert totals.count == len(z)
    assert list(totals.top) == [(rank <= i).sum() for i in range(5)]
    for found, strength in ((totals.loss, 1), (totals.cross_entropy, 0)):
        mean = ref.forward(z, target, strength=strength)
        assert abs(found[0] / len(z) - mean) <= tolerances.ULP["kernel"] * 2**-24 * mean


def test_an_infinite_loss_makes_the_mean_infinite_and_nan_ranks_as_larger(library):
    totals = Totals()
    z = np.float32([[1, -np.inf, 0], [0, 1, 2]])
    for row, t in zip(z, (1, 2), strict=True):
        library.lace_row_f32(None, None, ctypes.byref(totals), row.ctypes.data, t, 3)
    assert totals.loss[0] == totals.cross_entropy[0] == np.inf
    assert list(totals.top) == [1, 1, 2, 2, 2]
    totals, nan = Totals(), np.float32([0, np.nan, 1])
    library.lace_row_f32(None, None, ctypes.byref(totals), nan.ctypes.data, 2, 3)
    assert np.isnan(totals.loss[0])
    assert list(totals.top) == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("k_target", [(0, 0, SIZE), (3, 3, 1), (3, 2**32, 1), (3, 2**64 - 1, 1)], ids=str)
def test_one_row_that_cannot_be_worked_on_is_refused_and_nothing_is_written(library, k_target):
    k, target, code = k_target
    z, out, totals = np.zeros(3, np.float32), np.full(4, 7, np.float32), Totals()
    at = out.ctypes.data
    assert library.lace_row_f32(at, at + 4, ctypes.byref(totals), z.ctypes.data, target, k) == code
    assert library.lace_row_f32(at, at + 4, ctypes.byref(totals), None, 0, 3) == NULL
    assert set(out) == {7}
    assert bytes(totals) == bytes(ctypes.sizeof(totals))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_each_of_the_statistics_is_written_where_it_is_asked_for(dtype, library):
    kind = {"f32": np.float32, "f64": np.float64}[dtype]
    z, t = np.random.default_rng(0).normal(size=(50, 7)).astype(kind), np.arange(50) % 8 - 1
    t[t < 0] = -100

    def found(*asked):
        arrays = [np.full(50, 9, np.int64 if name == "rank" else kind) for name in STATISTICS]
        given = {name: a for name, a in zip(STATISTICS, arrays, strict=True) if name in asked}
        arguments = {"loss": np.empty(50, kind), "logits": z, "target": t, "n": 50, "k": 7}
        assert called(getattr(library, f"lace_rows_{dtype}"), **arguments, **given) == DONE
        return {name: array.tolist() for name, array in zip(STATISTICS, arrays, strict=True)}

    q, kept = np.exp(z.astype(float)) / np.exp(z.astype(float)).sum(1, keepdims=True), t >= 0
    every = found(*STATISTICS)
    near = {"rtol": tolerances.ULP["kernel"] * np.finfo(kind).eps + 1e-14}
    assert np.allclose(every["confidence"], np.where(kept, q.max(1), 0), **near)
    assert np.allclose(every["probability"], np.where(kept, q[np.arange(50), t.clip(0)], 0), **near)
    for name in STATISTICS:
        assert found(name) == {other: every[name] if other == name else [9] * 50 for other in STATISTICS}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_rows_that_cannot_be_worked_on_are_refused_and_nothing_is_written(library, dtype):
    rows, columns = getattr(library, f"lace_rows_{dtype}"), getattr(library, f"lace_columns_{dtype}")
    kind = {"f32": np.float32, "f64": np.float64}[dtype]
    z, loss, gradient, t = np.zeros(6, kind), np.full(2, 7, kind), np.full(6, 7, kind), np.array([0, 1])
    most = 2**64 // z.itemsize

    def tried(n=2, k=3, loss=loss, z=z, target=t):
        """Result of both, which must be the same."""
        arguments = {"loss": loss, "gradient": gradient, "logits": z, "target": target, "n": n, "k": k}
        by_rows = called(rows, **arguments)
        assert called(columns, **arguments) == by_rows
        return by_rows

    assert tried(k=0) == tried(n=0, k=0) == SIZE
    assert tried(n=most, k=2) == tried(n=2, k=most) == tried(n=2**32, k=2**32) == tried(n=2**63, k=2) == SIZE
    for name in ("loss", "z", "target"):
        assert tried(**{name: None}) == NULL
    for wrong in (3, -1, -99, 2**32, -(2**63)):
        assert tried(target=np.array([0, wrong])) == 2
    assert rows(None) == columns(None) == NULL
    arguments = {"loss": loss, "gradient": gradient, "logits": z, "target": t, "n": 2, "k": 3}
    for function, length in ((rows, 3), (columns, 2)):
        for name, stride in (("logits_stride", length - 1), ("logits_stride", 1 - length), ("gradient_stride", 1)):
            assert called(function, **arguments, **{name: stride}) == SIZE  # they overlap
        for name in ("logits_stride", "gradient_stride"):
            assert called(function, **arguments, **{name: 2**63 - 1}) == SIZE
        assert called(function, **arguments, logits_stride=-(2**63)) == SIZE
    assert set(loss) | set(gradient) == {7}
    assert called(rows, n=0, k=3) == called(columns, n=0, k=3) == DONE
    assert tried() == DONE
    assert 7 not in set(loss) | set(gradient)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_lines_with_room_between_them_or_backwards_have_the_bits_of_lines_side_by_side(kind, dtype, library):
    function, real = getattr(library, f"lace_{kind}_{dtype}"), {"f32": np.float32, "f64": np.float64}[dtype]
    n, k, room = 70, 13, 3
    rng = np.random.default_rng(0)
    lines = (3 * rng.normal(size=(n, k) if kind == "rows" else (k, n))).astype(real)
    target = rng.integers(0, k, n)
    target[5] = -100
    loss, gradient = np.empty(n, real), np.empty_like(lines)
    side_by_side = {"logits": lines, "target": target, "n": n, "k": k}
    assert called(function, loss=loss, gradient=gradient, **side_by_side) == DONE
    height, length = lines.shape
    wide, out = np.full((2, height, length + room), np.nan, real)
    for backwards in (False, True):
        view = wide[::-1] if backwards else wide
        view[:, :length] = lines
        apart = {"logits_stride": view.strides[0] // view.itemsize, "gradient_stride": length + room}
        found, out[:] = np.empty(n, real), 7
        assert called(function, **side_by_side | {"logits": view}, loss=found, gradient=out, **apart) == DONE
        assert found.tobytes() == loss.tobytes()
        assert out[:, :length].tobytes() == gradient.tobytes()
        assert (out[:, length:] == 7).all()


REALS = {"f32": np.float32, "f64": np.float64}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
@pytest.mark.parametrize("k", [1, 2, 13, 700])
def test_targets_in_several_classes_are_those_of_the_reference_in_every_layout(k, kind, dtype, library):
    """Without a gradient, too, and with the same bits; with room between lines; where the largest logit ties."""
    rng = np.random.default_rng(k)
    n, real, function = 70, REALS[dtype], getattr(library, f"lace_{kind}_{dtype}")
    z = (4 * rng.normal(size=(n, k))).astype(real)
    z[::3, 0] = z[::3].max(1)
    z[1::5, -1] += real(20)
    y = rng.dirichlet(np.full(k, 0.3), n).astype(real)
    w = rng.uniform(0, 2, k).astype(real)
    target = rng.integers(0, k, n)
    target[5] = -100
    unit = np.finfo(real).eps / 2
    cases = [(y, None, 0, 1), (y, w, 0.25, 0.5), (None, None, 0.125, 1), (None, w, 1, 0.25)]
    for soft, weight, smoothing, strength in cases:
        at, kept = options(dtype, weight, smoothing, strength)
        lines = [None if a is None else np.ascontiguousarray(a.T if kind == "columns" else a) for a in (z, soft)]
        given = {"logits": lines[0], "soft_target": lines[1], "target": target, "n": n, "k": k, "options": at}
        loss, alone, gradient = np.empty(n, real), np.empty(n, real), np.empty_like(lines[0])
        assert called(function, loss=loss, gradient=gradient, **given) == DONE
        assert called(function, loss=alone, **given) == DONE
        assert alone.tobytes() == loss.tobytes()
        wide = np.full((2, *np.add(lines[0].shape, (0, 3))), 7, real)
        if soft is not None:
            wide[0, :, :-3] = lines[1]
            given |= {"soft_target": wide[0], "soft_target_stride": wide.shape[2]}
        given["gradient_stride"] = wide.shape[2]
        assert called(function, loss=alone, gradient=wide[1], **given) == DONE
        assert alone.tobytes() == loss.tobytes()
        assert wide[1, :, :-3].tobytes() == gradient.tobytes()
        assert (wide[1, :, -3:] == 7).all()

        goal = target if soft is None else y.astype(float)
        same = {"weight": weight, "label_smoothing": smoothing, "strength": strength}
        mass = 1 if weight is None else weight.max()  # coefficients sum up to less
        bounds = [count * unit for count in tolerances.ROUNDINGS.values()]
        exact = ref.forward(z, goal, reduction="none", **same)
        assert (np.abs(loss - exact) <= bounds[0] * exact + np.spacing(exact.astype(real))).all()
        slopes = gradient.T if kind == "columns" else gradient
        exact = ref.backward(z, goal, reduction="none", **same)
        assert (np.abs(slopes - exact) <= bounds[1] * mass).all()
        assert kept


class PosteriorArgs(ctypes.Structure):
    """lace_posterior_f32 or lace_posterior_f64."""

    _fields_ = (
        ("posterior", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("n", ctypes.c_size_t),
        ("k", ctypes.c_size_t),
        ("logits_stride", ctypes.c_ssize_t),
        ("posterior_stride", ctypes.c_size_t),
        ("options", ctypes.c_void_p),
    )


def posteriors(library, z, **given):
    """Posterior of each row of z by each of the functions that have the options, by their names."""
    dtype = {4: "f32", 8: "f64"}[z.itemsize]
    at, kept = options(dtype, **given)
    n, k = z.shape
    found = {}
    for kind, lines in (("rows", np.ascontiguousarray(z)), ("columns", np.ascontiguousarray(z.T))):
        p = np.full_like(lines, 7)
        args = PosteriorArgs(p.ctypes.data, lines.ctypes.data, n, k, 0, 0, at)
        assert getattr(library, f"lace_posterior_{kind}_{dtype}")(ctypes.byref(args)) == DONE
        found[kind] = p if kind == "rows" else p.T
    if dtype == "f32" and not given:
        z, p = np.ascontiguousarray(z), np.full_like(z, 7)
        for i in range(n):
            assert library.lace_row_posterior_f32(p[i:].ctypes.data, z[i:].ctypes.data, k) == DONE
        found["one"] = p
    assert kept
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 65])
def test_posteriors_of_hostile_rows_are_exact_to_the_contract(classes, dtype, library):
    worst = 0.0
    for name, z, _ in hostile_rows(classes, np.dtype(dtype)):
        for given in ({}, {"strength": 0.5}, {"strength": 0.0}, {"weight": np.linspace(1, 9, classes).astype(dtype)}):
            wanted = exact_posterior(z, **given)
            for kind, p in posteriors(library, z[None], **given).items():
                worst = max(worst, off := ulps(p[0], wanted, dtype))
                assert off <= tolerances.ULP["kernel"], (name, kind, given)
    print(f"{classes} classes, {dtype.__name__}: {worst:.2f} ulp")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("classes", [2, 10, 100, 700])
def test_posteriors_of_random_rows_are_those_of_the_reference(classes, dtype, library):
    rng = np.random.default_rng(classes)
    z = (
        rng.normal(size=(20_000 // classes, classes)) * rng.choice([0.1, 1, 3, 10, 30, 100], (20_000 // classes, 1))
    ).astype(dtype)
    weight = rng.uniform(0.1, 3, classes).astype(dtype)
    for given in (
        {},
        {"strength": 0.25},
        {"weight": weight},
        {"label_smoothing": 0.25},
        {"weight": weight, "label_smoothing": 0.5},
    ):
        wanted, e = ref.posterior(z, **given), given.get("label_smoothing", 0)
        part = (1 - e) * wanted + e / classes  # with label smoothing that is what has the digits
        for kind, p in posteriors(library, z, **given).items():
            assert (abs(p - wanted) <= tolerances.ULP["kernel"] * np.spacing(part.astype(dtype)) / (1 - e)).all(), (
                kind,
                given,
            )
            assert (p >= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_not_a_number_makes_its_own_posterior_nan(dtype, library):
    z = np.array([[1, np.nan, 0], [np.inf, 0, 0], [-np.inf] * 3, [np.nan, 2, 1], [0, -np.inf, 1], [4, 5, 6]], dtype)
    for given in ({}, {"label_smoothing": 0.25}):
        for p in posteriors(library, np.tile(z, (9, 1)), **given).values():
            bad = np.isnan(p).reshape(9, 6, 3)
            assert bad[:, :4].all()
            assert not bad[:, 4:].any()
            assert (p.reshape(9, 6, 3)[:, 4, 1] == 0).all()
    long = np.zeros((2, 256), dtype)
    long[0, 255] = np.nan
    for p in posteriors(library, long).values():
        assert np.isnan(p[0]).all()
        assert (p[1] == 1 / 256).all()


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_posteriors_that_logits_do_not_tell_are_refused_and_nothing_is_written(kind, dtype, library):
    function, real = getattr(library, f"lace_posterior_{kind}_{dtype}"), REALS[dtype]
    z, p = np.zeros(6, real), np.full(6, 7, real)

    def tried(n=2, k=3, posterior=p.ctypes.data, logits=z.ctypes.data, strides=(0, 0), **given):
        at, kept = options(dtype, **given)
        status = function(ctypes.byref(PosteriorArgs(posterior, logits, n, k, *strides, at)))
        assert kept
        return status

    for w in (0, -1, np.nan, np.inf, real(2) ** {"f32": 61, "f64": 801}[dtype]):
        assert tried(weight=np.array([1, 1, w], real)) == OPTION
    for e in (1, 1.5, -0.5, np.nan):
        assert tried(label_smoothing=e) == OPTION
    assert tried(posterior=None) == tried(logits=None) == function(None) == NULL
    assert tried(k=0) == tried(strides=(1, 0)) == tried(strides=(0, 1)) == tried(n=2**62) == SIZE
    assert set(p) == {7}
    assert tried(n=0) == DONE
    assert set(p) == {7}
    assert tried(weight=np.array([1, 1, real(2) ** 60], real)) == DONE
    assert library.lace_row_posterior_f32(None, z.ctypes.data, 3) == NULL
    assert library.lace_row_posterior_f32(p.ctypes.data, None, 3) == NULL
    assert library.lace_row_posterior_f32(p.ctypes.data, z.ctypes.data, 0) == SIZE


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_posteriors_with_room_between_lines_have_the_bits_of_lines_side_by_side(kind, dtype, library):
    function, real, room = getattr(library, f"lace_posterior_{kind}_{dtype}"), REALS[dtype], 3
    n, k = 70, 13
    z = (3 * np.random.default_rng(0).normal(size=(n, k) if kind == "rows" else (k, n))).astype(real)
    p, wide, out = np.empty_like(z), np.full((2, *np.add(z.shape, (0, room))), np.nan, real), None
    assert function(ctypes.byref(PosteriorArgs(p.ctypes.data, z.ctypes.data, n, k, 0, 0, None))) == DONE
    for view in (wide[0], wide[0, ::-1]):
        view[:, :-room], out = z, wide[1]
        out[:] = 7
        strides = view.strides[0] // z.itemsize, out.shape[1]
        assert function(ctypes.byref(PosteriorArgs(out.ctypes.data, view.ctypes.data, n, k, *strides, None))) == DONE
        assert out[:, :-room].tobytes() == p.tobytes()
        assert (out[:, -room:] == 7).all()
