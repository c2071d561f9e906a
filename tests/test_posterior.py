"""Class probabilities against mpmath, which forms the derivative of the loss plainly and with digits enough for it."""

import doctest
import sys
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from oracle import rows, ulps
from scipy.special import log_softmax, softmax
from tolerances import FLOAT64, POSTERIOR_CANCELLED, SOFTMAX, ULP

from lace_loss import ref
from lace_loss.train.probabilities import log_probabilities

FAR = 5000  # e^-5000 is nothing beside 1, for any weight
ALMOST_1 = 1 - 2.0**-53
EDGES = {
    "a tie": [1.0, 1.0],
    "a tie of the largest": [3.0, 3.0, -40.0],
    "a tie but for one ulp": [1.0, 1.0 + 2.0**-52],
    "all absent but two": [-np.inf, 2.0, -np.inf, 2.5],
    "one far below another": [0.0, 0.0, -740.0],
    "two far below": [0.0, -300.0, -400.0],
    "where exp is subnormal": [0.0, -372.3, -10.0],
    "where a product of two is subnormal": [0.0, -372.0],
    "margin 1000": [0.0, 1000.0],
    "integers": [3, 1, 2],
    "near the largest number": [1.7e308, 1.7e308, -1.7e308],
}


def exact(logits, weight=None, label_smoothing=0.0, strength=1.0):
    """-1 / (w df/dq) over its sum, f(q) = -(1 - s q) log q: subtractions and all, at as many digits as they lose."""
    z = [mpmath.mpf(float(value)) for value in np.asarray(logits, np.float64)]
    gaps = [max(z) - value for value in z]
    digits = 60 + int(2 * max((gap for gap in gaps if gap < FAR), default=0) / mpmath.log(10))
    with mpmath.workdps(digits + 320 * bool(max(map(abs, z)) > 1e9)):
        s, w = (
            mpmath.mpf(strength),
            [mpmath.mpf(float(value)) for value in (np.ones(len(z)) if weight is None else weight)],
        )
        e = [mpmath.exp(value - max(z)) if gap < FAR else mpmath.mpf(0) for value, gap in zip(z, gaps, strict=True)]
        if sum(value > 0 for value in e) == 1:
            y = e  # the limit: one class is certain
        else:
            q = [value / mpmath.fsum(e) for value in e]
            h = [-1 / (v * (s * mpmath.log(x) - (1 - s * x) / x)) if x else x for x, v in zip(q, w, strict=True)]
            # df/dq = s log q - (1 - s q) / q, by the product rule
            y = [value / mpmath.fsum(h) for value in h]
        smoothing = mpmath.mpf(label_smoothing)
        if smoothing:
            y = [max(value - smoothing / len(z), mpmath.mpf(0)) for value in y]
        return [+value / mpmath.fsum(y) for value in y]


def assert_exact(logits, **options):
    got, wanted, e = ref.posterior(logits, **options), exact(logits, **options), options.get("label_smoothing", 0.0)
    cancelled = POSTERIOR_CANCELLED / (1 - e) if e else 0.0
    for value, true in zip(got, wanted, strict=True):
        unit = float(np.spacing(float(true)))
        assert ulps(value, true, np.float64) <= ULP["ref"] + cancelled / unit
    return got


CASES = [
    pytest.param(logits, id=f"C{classes}-{name.replace(' ', '_')}")
    for classes in (1, 2, 3, 10, 65)
    for name, logits, _ in rows(classes, np.dtype("float64"))
] + [pytest.param(np.array(logits), id=name.replace(" ", "_")) for name, logits in EDGES.items()]


@pytest.mark.parametrize("strength", [1.0, ALMOST_1, 0.5, 0.0])
@pytest.mark.parametrize("logits", CASES)
def test_probabilities_are_exact_to_the_contract(logits, strength):
    assert_exact(logits, strength=strength)


@pytest.mark.parametrize(
    ("label_smoothing", "largest_power"), [(0.0, 1), (0.0, 20), (0.0, 300), (1e-300, 20), (0.1, 1), (ALMOST_1, 1)]
)
def test_weights_of_any_size_and_smoothing_are_exact_to_the_contract(label_smoothing, largest_power):
    rng = np.random.default_rng([largest_power, int(100 * label_smoothing)])
    between = 0
    for scale in (0.1, 3, 30, 700, 1500):
        for _ in range(8):
            classes = int(rng.integers(2, 7))
            weight = 10.0 ** rng.uniform(-largest_power, largest_power, classes)
            strength = float(rng.choice([0.0, 0.25, 1.0, 1.0]))
            options = {"weight": weight, "label_smoothing": label_smoothing, "strength": strength}
            p = assert_exact(scale * rng.normal(size=classes), **options)
            between += int(((p > 0) & (p < 1)).sum())
    assert between > 10  # not only zeros and ones


def test_a_weight_brings_back_what_no_float64_holds():
    """At margin m, p is about 2 e^-2m times the weights' ratio: an ordinary number here, though e^-1000 is not one."""
    p = assert_exact([0.0, -1000.0], weight=[1e300, 1e-300])
    assert 1e-270 < p[1] < 1e-265
    p = assert_exact([0.0, -690.0], weight=[1e300, 1e-300])
    assert 0.01 < p[1] < 0.99


def test_long_rows_are_as_exact_as_short_ones():
    """Equal logits but one, by the formula for two values: 100,000 classes."""
    z = np.zeros(100_000)
    z[7] = 20.0
    with mpmath.workdps(60):
        others = 99_999 * mpmath.exp(-20)
        q, n = mpmath.exp(-20) / (1 + others), 20 + mpmath.log1p(others)
        k_top, k = (others + mpmath.log1p(others)) / (1 + others), 1 - q + q * n
        p = [k_top / mpmath.exp(20) / (k + k_top * others), k / (k + k_top * others)]
    got = ref.posterior(z)
    assert ulps(got[[0, 7]], p, np.float64) <= ULP["ref"]
    assert len(set(np.delete(got, 7))) == 1


def test_without_weights_strength_0_is_the_softmax():
    rng = np.random.default_rng(0)
    for classes in (1, 2, 10, 1000):
        for scale in (0.1, 1, 10, 100):
            z = scale * rng.normal(size=(20, classes))
            got = ref.posterior(z, strength=0.0)
            bound = SOFTMAX * 2.0**-53 * (classes - log_softmax(z, 1)) * got
            assert (abs(got - softmax(z, 1)) <= bound + np.finfo(float).smallest_subnormal).all()


@pytest.mark.parametrize("options", [{}, {"strength": 0.3}, {"label_smoothing": 0.2, "weight": np.arange(1, 51)}])
def test_the_probabilities_of_a_sample_sum_to_1(options):
    for scale in (0.01, 1, 10, 100):
        for p in ref.posterior(scale * np.random.default_rng(1).normal(size=(20, 50)), **options):
            rounding = sum(map(Fraction, np.spacing(p))) * Fraction(ULP["ref"])
            assert abs(sum(map(Fraction, p)) - 1) <= rounding
            assert (p >= 0).all()


def test_every_layout_gives_the_same_bits():
    z = np.random.default_rng(2).normal(scale=9, size=(4, 3, 5, 2))
    options = {"weight": [1.0, 2.0, 0.5], "label_smoothing": 0.1, "strength": 0.7}
    image = ref.posterior(z, **options)
    assert image.shape == z.shape
    assert image.flags.c_contiguous
    for i, j, k in np.ndindex(4, 5, 2):
        assert np.array_equal(ref.posterior(z[i, :, j, k], **options), image[i, :, j, k])
    assert np.array_equal(ref.posterior(z[:, :, 1, 0], **options), image[:, :, 1, 0])
    assert ref.posterior(np.zeros((0, 3))).shape == (0, 3)
    assert ref.posterior(np.zeros((2, 3, 0))).shape == (2, 3, 0)


def test_a_shift_of_all_logits_changes_no_bit():
    z = np.random.default_rng(3).integers(-(2**20), 2**20, (50, 7)) * 2.0**-14
    assert np.array_equal(ref.posterior(z + 2.0**20), ref.posterior(z))


def test_numbers_of_any_type_are_taken_as_float64_and_none_is_changed():
    z = np.array([[3, -1, 2], [0, 0, 7]])
    wanted = ref.posterior(z.astype(float))
    for dtype in (np.int8, np.uint64, np.float16, np.float32, np.longdouble):
        logits = np.abs(z).astype(dtype) if dtype is np.uint64 else z.astype(dtype)
        before = logits.copy()
        logits.flags.writeable = False
        got = ref.posterior(logits)
        assert got.dtype == np.float64
        assert np.array_equal(got, ref.posterior(np.abs(z).astype(float)) if dtype is np.uint64 else wanted)
        assert np.array_equal(logits, before)
    assert np.array_equal(ref.posterior(z.tolist()), wanted)


def test_what_is_not_a_number_makes_its_own_row_nan():
    z = np.array(
        [[1.0, np.nan, 0], [np.inf, 0, 0], [np.inf, -np.inf, np.nan], [-np.inf] * 3, [0, -np.inf, 1], [4, 5, 6]]
    )
    for options in ({}, {"strength": 0.0}, {"label_smoothing": 0.1}, {"weight": [1, 2, 3]}):
        p = ref.posterior(z, **options)
        assert np.isnan(p[:4]).all()
        assert np.array_equal(p[4, [0, 2]], ref.posterior(z[4, [0, 2]])) or options
        assert p[4, 1] == 0
        assert np.array_equal(p[5], ref.posterior(z[5], **options))


def test_one_class_is_certain():
    for options in ({}, {"strength": 0.0}, {"label_smoothing": 0.5}, {"weight": [1e-300]}):
        assert np.array_equal(ref.posterior([-7.0], **options), [1.0])
        assert np.array_equal(ref.posterior(np.zeros((3, 1, 2)), **options), np.ones((3, 1, 2)))
    assert np.isnan(ref.posterior([np.nan])).all()


def test_what_smoothing_cannot_have_made_is_0_and_the_rest_is_normalised():
    assert np.array_equal(ref.posterior([0.0, -50.0], label_smoothing=0.1), [1.0, 0.0])
    p = ref.posterior([2.0, 1.5, -50.0, -np.inf], label_smoothing=0.1)
    assert p[2] == p[3] == 0 < p[1] < p[0]
    assert p[0] + p[1] == 1


def test_the_records_of_training_hold_the_same_probabilities():
    rng = np.random.default_rng(4)
    for classes in (2, 10, 100):
        for strength in (0.0, 0.5, 1.0):
            for scale in (0.1, 3, 30):
                z = scale * rng.normal(size=(50, classes))
                p, log_p = ref.posterior(z, strength=strength), log_probabilities(z, strength)
                assert (abs(np.log(p) - log_p) <= FLOAT64 * (1 - log_p)).all()


LOGITS = np.zeros((4, 3))
REFUSED = {
    "a weight of 0": (LOGITS, {"weight": [1, 0, 2]}, ValueError, r"positive and finite .*, weight\[1\] is 0.0"),
    "a negative weight": (LOGITS, {"weight": [1, 1, -2.5]}, ValueError, r"weight\[2\] is -2.5"),
    "a weight of NaN": (LOGITS, {"weight": [np.nan, 1, 1]}, ValueError, r"weight\[0\] is nan"),
    "an infinite weight": (LOGITS, {"weight": [1, np.inf, 1]}, ValueError, r"weight\[1\] is inf"),
    "too many weights": (LOGITS, {"weight": np.ones(4)}, ValueError, r"each of the 3 classes, got shape \(4,\)"),
    "one weight": (LOGITS, {"weight": 1.0}, ValueError, r"each of the 3 classes, got shape \(\)"),
    "text as weights": (LOGITS, {"weight": list("abc")}, TypeError, "weight must hold real numbers, got <U1"),
    "nothing but smoothing": (LOGITS, {"label_smoothing": 1.0}, ValueError, "label_smoothing must be less than 1"),
    "smoothing above 1": (
        LOGITS,
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    "NaN smoothing": (LOGITS, {"label_smoothing": np.nan}, ValueError, r"label_smoothing must be in \[0, 1\], got nan"),
    "negative strength": (LOGITS, {"strength": -0.1}, ValueError, r"strength must be in \[0, 1\], got -0.1"),
    "text as strength": (LOGITS, {"strength": "1"}, TypeError, "strength must be a number, got '1'"),
    "a number as logits": (1.0, {}, ValueError, r"C >= 1, got shape \(\)"),
    "no classes": (np.zeros((4, 0)), {}, ValueError, r"C >= 1, got shape \(4, 0\)"),
    "complex logits": (LOGITS + 0j, {}, TypeError, "logits must hold real numbers, got complex128"),
    "boolean logits": (LOGITS > 0, {}, TypeError, "logits must hold real numbers, got bool"),
    "masked logits": (np.ma.masked_less(LOGITS, -1), {}, TypeError, "logits has a mask"),
    "an unknown option": (LOGITS, {"reduction": "mean"}, TypeError, "reduction"),
}


@pytest.mark.parametrize(("logits", "options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused(logits, options, error, message):
    with pytest.raises(error, match=message):
        ref.posterior(logits, **options)


def test_the_examples_of_the_docstring_are_right():
    found = doctest.testmod(sys.modules[ref.posterior.__module__])
    assert found.attempted == 2
    assert found.failed == 0
