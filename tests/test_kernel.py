"""The C kernel by itself: where its coefficients come from, and that any C99 compiler takes it without a warning."""

import re
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest

EXT = Path(__file__).parent.parent / "ext"
mpmath.mp.dps = 40


def constants():
    """The numbers that lace_math.h defines, float's first: {name: [float32 values, float64 values]}."""
    text = (EXT / "lace_math.h").read_text().replace("\\\n", "")
    found = {}
    for name, value in re.findall(
        r"^#define (EXP|LOG|LN2_HIGH|LN2_LOW|LOG2E|LOWER|ROUNDER) +(\{.*?\}|\S+)", text, re.M
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


@pytest.mark.parametrize(("which", "dtype", "largest_exponent"), [(0, np.float32, 151), (1, np.float64, 1077)])
def test_log_2_comes_apart_so_that_its_multiples_are_exact(which, dtype, largest_exponent):
    (high,), (low,) = constants()["LN2_HIGH"][which], constants()["LN2_LOW"][which]
    assert dtype(high) == high
    for n in range(largest_exponent):
        assert float(dtype(n) * dtype(high)) == mpmath.mpf(high) * n
    assert dtype(low) == dtype(float(mpmath.log(2) - high))
    assert constants()["LOWER"][which] == [2.0 ** {0: -64, 1: -128}[which]]
    assert constants()["ROUNDER"][which] == [1.5 * 2.0 ** np.finfo(dtype).nmant]


# mpmath: losses 0.0265308425..., 4.9800551351...; -log q_t 0.169846..., q_t 0.843794...; of two zeros the first leads
PROGRAM = r"""
#include "lace.h"
int main(void)
{
    float logits[2][3] = {{1, 4, 2}, {0, 5, 0}}, loss[2] = {-1, -1}, gradient[2][3];
    int64_t target[2] = {1, 0}, wrong[2] = {1, 3};
    float cross_entropy[2], probability[2];
    int64_t rank[2];
    lace_statistics_f32 statistics = {cross_entropy, probability, rank};
    if (lace_rows_f32(loss, gradient[0], logits[0], wrong, NULL, NULL, 0, 2, 3, NULL, &statistics) != 1) return 1;
    if (loss[0] != -1) return 2;
    if (lace_rows_f32(loss, gradient[0], logits[0], target, NULL, NULL, 0, 2, 3, NULL, &statistics) != -1) return 3;
    if (!(loss[0] > 0.0265308f && loss[0] < 0.0265309f)) return 4;
    if (!(loss[1] > 4.98005f && loss[1] < 4.98006f)) return 5;
    if (!(cross_entropy[0] > 0.16984f && cross_entropy[0] < 0.16985f)) return 6;
    if (!(probability[0] > 0.84379f && probability[0] < 0.84380f)) return 7;
    if (rank[0] != 0 || rank[1] != 1) return 8;
    return 0;
}
"""


@pytest.mark.parametrize("compiler", ["gcc", "clang", "g++"])
def test_a_c_program_compiles_without_a_warning_and_runs(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} on this machine")
    source = tmp_path / ("main.cpp" if compiler == "g++" else "main.c")
    source.write_text(PROGRAM)
    strict = [
        "-Wall",
        "-Wextra",
        "-pedantic",
        "-Wconversion",
        "-Wdouble-promotion",
        "-Werror",
        "-O2",
        "-ffp-contract=off",
        f"-I{EXT}",
    ]
    language = [] if compiler == "g++" else ["-std=c99"]
    cc = "gcc" if compiler == "g++" else compiler
    subprocess.run([cc, "-std=c99", *strict, "-c", EXT / "lace.c", "-o", tmp_path / "lace.o"], check=True)
    subprocess.run([compiler, *language, *strict, source, tmp_path / "lace.o", "-o", tmp_path / "program"], check=True)
    assert subprocess.run([tmp_path / "program"]).returncode == 0


def test_fast_math_is_refused(tmp_path):
    made = subprocess.run(
        ["gcc", "-ffast-math", "-c", EXT / "lace.c", "-o", tmp_path / "lace.o"], capture_output=True, text=True
    )
    assert made.returncode != 0
    assert "-ffast-math breaks" in made.stderr
