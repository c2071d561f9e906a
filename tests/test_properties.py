"""What the formulas promise for every row, on drawn rows of all magnitudes: exact where it can be exact, to the bit."""

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import hypothesis.strategies as st
import mpmath
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from oracle import exact, ulps
from scipy.special import log_softmax
from tolerances import CANCELLED, HVP, LOG_SOFTMAX, ROUNDINGS, ULP, UNDERFLOW

from lace_loss import ext, ref

STEP = 2.0**-12  # of the finite differences; HVP is derived for it
EXPONENTS = st.integers(-24, -14) | st.integers(-149, 100)  # all of float32, and where steps of 2^20 are ordinary
SIZES = st.integers(1, 6) | st.sampled_from([17, 66])  # classes: a few, and past the kernel's 16 lanes and its blocks


def by_ref(logits, target, **options):
    return ref.forward(logits, target, **options), ref.backward(logits, target, **options)


each_implementation = pytest.mark.parametrize(
    ("both", "dtype"),
    [
        pytest.param(by_ref, np.float64, id="ref"),
        pytest.param(ext.forward_backward, np.float32, id="ext-float32"),
        pytest.param(ext.forward_backward, np.float64, id="ext-float64"),
    ],
)


def claim(test, examples=60):
    """For every drawn `data`, the same draws each time."""
    slow = [HealthCheck.too_slow]
    repeatable = settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=slow)
    return repeatable(given(data=st.data())(test))


@dataclass(frozen=True)
class Problem:
    """Logits (N, C), target and options; the numbers in target and options are exact in float32."""

    logits: np.ndarray
    target: np.ndarray
    options: dict

    def solved(self, both, **changes):
        """One loss a row and its gradient."""
        return both(self.logits, self.target, **{"reduction": "none", **self.options, **changes})

    @property
    def is_hard(self):
        return self.target.ndim == 1 and not self.options["label_smoothing"]

    @property
    def coefficients(self):
        """a of ref/loss.py, (N, C), exact."""
        classes = self.logits.shape[1]
        y = self.target if self.target.ndim == 2 else np.eye(classes)[self.target]
        weight = np.ones(classes) if self.options["weight"] is None else self.options["weight"]
        e = Fraction(self.options["label_smoothing"])
        return rationals(weight) * ((1 - e) * rationals(y) + e / classes)

    def errors(self, both, loss, gradient):
        """How far, at most, these are from the exact values: (N,) and (N, C), exact numbers."""
        info, classes, mass = np.finfo(loss.dtype), gradient.shape[1], self.coefficients.sum(1)
        unit, smallest = Fraction(float(info.eps)) / 2, Fraction(float(info.smallest_subnormal))
        lost = Fraction(UNDERFLOW) * (1 + mass) * smallest
        if both is by_ref:
            cancelled = 0 if self.is_hard else CANCELLED * mass[:, None]
            return ulps_of(loss, ULP["ref"]) + lost, ulps_of(gradient, ULP["ref"]) + cancelled + lost[:, None]
        if self.is_hard:
            bound = ULP["kernel"] if self.options["weight"] is None else ULP["kernel, weighted"]
            return ulps_of(loss, bound) + lost, ulps_of(gradient, bound) + lost[:, None]
        many = classes * ROUNDINGS["gradient"] * (1 + mass) * smallest
        of_gradient = ROUNDINGS["gradient"] * unit * mass + many
        return ROUNDINGS["loss"] * unit * rationals(loss) + many, np.repeat(of_gradient[:, None], classes, 1)


def rationals(values):
    """The same numbers as fractions: sums and differences of them are exact."""
    values = np.asarray(values)
    return np.array([Fraction(float(x)) for x in values.ravel()], object).reshape(values.shape)


def ulps_of(values, count):
    return Fraction(count) * rationals(np.spacing(np.abs(values)))


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def assert_within(bound, got, wanted):
    """`bound` ulp, or where the ulp is the smallest subnormal number or little more, what underflow takes."""
    dtype, lost = got.dtype.type, UNDERFLOW * float(np.finfo(got.dtype).smallest_subnormal)
    for value, true in zip(np.ravel(got), np.atleast_1d(np.array(wanted, object)), strict=True):
        assert ulps(value, true, dtype) <= bound + lost / float(np.spacing(dtype(abs(float(true)))))


def assert_cancels(parts):
    """The sum of (factor, function, problem) is 0, in loss and gradient; a factor is one number, or one a row."""
    left, allowed = [0, 0], [0, 0]
    for factor, both, problem in parts:
        values = problem.solved(both)
        for i, (value, error) in enumerate(zip(values, problem.errors(both, *values), strict=True)):
            factors = np.reshape(np.asarray(factor, object), (-1,) + (1,) * (value.ndim - 1))
            left[i], allowed[i] = left[i] + factors * rationals(value), allowed[i] + abs(factors) * error
    for rest, error in zip(left, allowed, strict=True):
        assert (abs(rest) <= error).all()


@st.composite
def rows(draw, dtype, classes, largest=100):
    """Logits up to 2^largest, from subnormal ones on, often with ties or with one far above or below the others."""
    info = np.finfo(dtype)
    scales = [float(info.tiny)] + [2.0**e for e in (-10, 0, 3, 5, 7, 14, 50) if e < largest] + [2.0**largest]
    scale = draw(st.sampled_from(scales))
    values = draw(st.lists(st.floats(-scale, scale, width=info.bits), min_size=1, max_size=6))
    which = np.frombuffer(draw(st.binary(min_size=classes, max_size=classes)), np.uint8) % len(values)
    z = np.array(values, dtype)[which]
    if largest > 3 and draw(st.booleans()):
        last = float(np.round(-np.log(info.smallest_subnormal)))
        margin = draw(
            st.floats(-last, last) | st.floats(last - 40, last)
        )  # to where exp underflows, and often just there
        z[draw(st.integers(0, classes - 1))] += dtype(margin)
    return z


@st.composite
def grid_rows(draw, dtype, classes, bits=20, exponents=EXPONENTS):
    """Multiples of one power of two, of `bits` bits; some may be -inf, though not all."""
    steps = draw(st.lists(st.integers(-(2**bits), 2**bits), min_size=classes, max_size=classes))
    z = np.array(steps).astype(dtype) * dtype(2.0 ** draw(exponents))
    absent = np.frombuffer(draw(st.binary(min_size=classes, max_size=classes)), np.uint8) > 200
    absent[draw(st.integers(0, classes - 1))] = False
    return np.where(absent, dtype(-np.inf), z)


@st.composite
def problems(draw, dtype, row=rows, kinds=("classes", "probabilities"), sizes=SIZES, **about_rows):
    n, classes = draw(st.integers(1, 4)), draw(sizes)
    logits = np.stack([draw(row(dtype, classes, **about_rows)) for _ in range(n)])

    def fractions_of(denominator, *shape):
        size = int(np.prod(shape))
        return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(shape) / denominator

    if draw(st.sampled_from(kinds)) == "classes":
        target = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    else:
        target = fractions_of(256, n, classes)
    options = {
        "weight": np.maximum(fractions_of(64, classes) - 1, 0) if draw(st.booleans()) else None,
        "label_smoothing": draw(st.just(0.0) | st.floats(2.0**-10, 1, width=32)),
        "strength": draw(st.sampled_from([0.0, 1.0]) | st.floats(2.0**-20, 1, width=32)),
    }
    return Problem(logits, target, options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@partial(claim, examples=300)
def test_loss_and_gradient_of_any_finite_row_are_exact_to_the_contract(dtype, data):
    largest = int(np.log2(np.finfo(dtype).max)) - 2
    z = data.draw(rows(dtype, data.draw(SIZES), largest))
    target = data.draw(st.just(int(z.argmax())) | st.integers(0, len(z) - 1))
    strength = data.draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32))
    with mpmath.workdps(60 + int(largest * np.log10(2))):  # a difference of 1e308 and 1 needs them all
        loss, gradient = exact(z, target, mpmath.mpf(strength))
    got_loss, got_gradient = ext.forward_backward(z, target, strength=strength)
    assert_within(ULP["kernel"], got_loss, loss)
    assert_within(ULP["kernel"], got_gradient, gradient)
    if dtype == np.float64:
        assert_within(ULP["ref"], np.float64(ref.forward(z, target, strength=strength)), loss)
        assert_within(ULP["ref"], ref.backward(z, target, strength=strength), gradient)


@each_implementation
@claim
def test_a_shift_of_all_logits_changes_no_bit(both, dtype, data):
    exponent = data.draw(EXPONENTS)
    problem = data.draw(problems(dtype, grid_rows, exponents=st.just(exponent)))
    shift = data.draw(st.integers(-(2**20), 2**20)) * 2.0**exponent
    shifted = replace(problem, logits=problem.logits + dtype(shift))
    for got, wanted in zip(shifted.solved(both), problem.solved(both), strict=True):
        assert same_bits(got, wanted)


@each_implementation
@claim
def test_a_permutation_of_the_classes_permutes_the_gradient_and_keeps_the_loss(both, dtype, data):
    problem = data.draw(problems(dtype))
    order = np.array(data.draw(st.permutations(range(problem.logits.shape[1]))))
    target = problem.target[:, order] if problem.target.ndim == 2 else np.argsort(order)[problem.target]
    weight = problem.options["weight"]
    options = problem.options | {"weight": None if weight is None else weight[order]}
    loss, gradient = problem.solved(both)
    permuted = Problem(problem.logits[:, order], target, options)
    values, wanted = permuted.solved(both), (loss, gradient[:, order])
    errors = zip(permuted.errors(both, *values), permuted.errors(both, *wanted), strict=True)
    for got, expected, (error, other) in zip(values, wanted, errors, strict=True):
        assert (abs(rationals(got) - rationals(expected)) <= error + other).all()


@each_implementation
@claim
def test_the_gradient_of_a_row_sums_to_0(both, dtype, data):
    problem = data.draw(problems(dtype))
    loss, gradient = problem.solved(both)
    assert (abs(rationals(gradient).sum(1)) <= problem.errors(both, loss, gradient)[1].sum(1)).all()


@each_implementation
@partial(claim, examples=400)
def test_the_loss_is_never_negative_nor_nan_even_at_the_ends_of_the_range(both, dtype, data):
    problem = data.draw(problems(dtype, sizes=st.integers(1, 4) | st.just(17), largest=np.finfo(dtype).maxexp - 1))
    end = float(np.finfo(dtype).max)
    ends = data.draw(st.lists(st.sampled_from([-np.inf, end, -end]), max_size=problem.logits.shape[1] - 1))
    logits = problem.logits.copy()
    logits[:, : len(ends)] = ends
    weight = np.ones(logits.shape[1])
    weight[: len(ends)] = data.draw(st.sampled_from([0.0, 1.0]))  # an infinite loss without weight counts nothing
    loss, gradient = replace(problem, logits=logits).solved(both, weight=weight)
    assert (loss >= 0).all()
    assert np.isfinite(gradient).all()


@each_implementation
@claim
def test_strength_0_is_cross_entropy(both, dtype, data):
    problem = data.draw(problems(dtype, kinds=("classes",)))
    problem = replace(problem, options={"weight": None, "label_smoothing": 0.0, "strength": 0.0})
    loss, gradient = problem.solved(both)
    own = np.eye(problem.logits.shape[1])[problem.target]
    log_q = log_softmax(problem.logits.astype(np.float64), axis=1)
    n = rationals(-np.take_along_axis(log_q, problem.target[:, None], 1)[:, 0])
    unit, classes = Fraction(1, 2**53), problem.logits.shape[1]
    of_loss, of_gradient = problem.errors(both, loss, gradient)
    assert (abs(rationals(loss) - n) <= of_loss + unit * LOG_SOFTMAX * (classes + n)).all()
    # e^log_q carries the absolute error of log_q as a relative one: q log q is at most 1/e.
    difference = abs(rationals(gradient) - rationals(np.exp(log_q)) + rationals(own))
    assert (difference <= of_gradient + unit * LOG_SOFTMAX * (classes + 1)).all()


@each_implementation
@claim
def test_loss_and_gradient_are_affine_in_the_strength(both, dtype, data):
    problem = data.draw(problems(dtype))
    s = Fraction(problem.options["strength"])
    parts = [(1 - s, {"strength": 0.0}), (s, {"strength": 1.0}), (-1, {})]
    assert_cancels((factor, both, replace(problem, options=problem.options | change)) for factor, change in parts)


@each_implementation
@claim
def test_weights_scale_the_loss_and_leave_its_mean(both, dtype, data):
    """By a power of two: nothing is rounded then, so to the bit. Small logits keep clear of subnormal results."""
    problem = data.draw(problems(dtype, largest=3))
    weight = np.ones(problem.logits.shape[1]) if problem.options["weight"] is None else problem.options["weight"]
    power = 2.0 ** data.draw(st.integers(-8, 8))
    for reduction, factor in (("none", power), ("sum", power), ("mean", 1 if problem.target.ndim == 1 else power)):
        plain = problem.solved(both, reduction=reduction, weight=weight)
        scaled = problem.solved(both, reduction=reduction, weight=weight * power)
        for got, wanted in zip(scaled, plain, strict=True):
            assert np.array_equal(got, wanted * dtype(factor), equal_nan=True)


@each_implementation
@claim
def test_a_mixture_of_probability_targets_has_the_mixture_of_their_losses(both, dtype, data):
    problem = data.draw(problems(dtype, kinds=("probabilities",)))
    part, other = Fraction(data.draw(st.integers(0, 64)), 64), replace(problem, target=1 - problem.target)
    mixed = float(part) * problem.target + float(1 - part) * other.target  # exact: 6 bits by 9
    parts = [(part, problem), (1 - part, other), (-1, replace(problem, target=mixed))]
    assert_cancels((factor, both, one) for factor, one in parts)


@each_implementation
@partial(claim, examples=25)
def test_probabilities_smoothing_and_weights_mix_the_losses_of_the_classes(both, dtype, data):
    problem = data.draw(problems(dtype, sizes=st.integers(1, 6) | st.just(17)))
    n, classes = problem.logits.shape
    plain = problem.options | {"weight": None, "label_smoothing": 0.0}
    in_classes = [Problem(problem.logits.astype(np.float64), np.full(n, k), plain) for k in range(classes)]
    parts = zip(problem.coefficients.T, [by_ref] * classes, in_classes, strict=True)
    assert_cancels([(-1, both, problem), *parts])


@each_implementation
@claim
def test_a_row_has_the_same_bits_alone_and_among_others(both, dtype, data):
    problem = data.draw(problems(dtype) | problems(dtype, grid_rows))
    spoilt = np.full((1, problem.logits.shape[1]), data.draw(st.sampled_from([np.nan, np.inf, -np.inf])), dtype)
    logits = np.concatenate([problem.logits, spoilt, problem.logits[::-1]])
    target = np.concatenate([problem.target, problem.target[:1], problem.target[::-1]])
    loss, gradient = Problem(logits, target, problem.options).solved(both)
    for i in range(len(problem.logits)):
        alone = Problem(problem.logits[i : i + 1], problem.target[i : i + 1], problem.options).solved(both)
        for place in (i, -1 - i):
            assert same_bits(loss[place], alone[0][0])
            assert same_bits(gradient[place], alone[1][0])


@each_implementation
@claim
def test_ignored_rows_change_nothing(both, dtype, data):
    """No bit of a row or of a gradient, whose divisor is a sum of few bits; a sum of losses only by its order."""
    problem = data.draw(problems(dtype, kinds=("classes",)))
    n, ignored = len(problem.logits), data.draw(st.sampled_from([-100, -1, 255]))
    kept = np.array(data.draw(st.permutations([True] * n + [False] * data.draw(st.integers(1, 4)))))
    junk = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, float(np.finfo(dtype).max)]))
    logits = np.full((len(kept), problem.logits.shape[1]), junk, dtype)
    target = np.full(len(kept), ignored)
    logits[kept], target[kept] = problem.logits, problem.target
    longer = Problem(logits, target, problem.options | {"ignore_index": ignored})
    for reduction in ("none", "sum", "mean"):
        loss, gradient = problem.solved(both, reduction=reduction)
        longer_loss, longer_gradient = longer.solved(both, reduction=reduction)
        assert same_bits(longer_gradient[kept], gradient)
        assert not longer_gradient[~kept].any()
        if reduction == "none":
            assert same_bits(longer_loss[kept], loss)
            assert not longer_loss[~kept].any()
        elif not np.isfinite(loss):  # no weight to divide by
            assert np.array_equal(longer_loss, loss, equal_nan=True)
        else:
            in_float64 = 2 * (n + 1) * Fraction(1, 2**53) * Fraction(float(loss))
            one_ulp = Fraction(float(np.spacing(dtype(loss))))
            assert abs(Fraction(float(longer_loss)) - Fraction(float(loss))) <= one_ulp + in_float64


@claim
def test_finite_differences_of_the_gradient_give_the_hessian_vector_product(data):
    """Steps exact in float64, fourth order."""
    problem = data.draw(problems(np.float64, grid_rows, bits=15, exponents=st.integers(-10, -10)))
    size = problem.logits.size
    steps = data.draw(st.lists(st.integers(-16, 16), min_size=size, max_size=size))
    v = np.reshape(steps, problem.logits.shape) / 16

    def gradient(count):
        moved = replace(problem, logits=problem.logits + count * STEP * v)
        return rationals(moved.solved(by_ref)[1])

    slope = (8 * (gradient(1) - gradient(-1)) - (gradient(2) - gradient(-2))) / (12 * Fraction(STEP))
    product = ref.hessian_vector_product(problem.logits, problem.target, v, reduction="none", **problem.options)
    assert (abs(slope - rationals(product)) <= Fraction(HVP) * problem.coefficients.sum(1)[:, None]).all()
