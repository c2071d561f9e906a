"""Labels by themselves, against mpmath, torch, scipy and the two-class loss: definition, options, edges, refusals."""

import doctest
import sys

import mpmath
import numpy as np
import pytest
import torch
from oracle import ulps
from scipy.special import expit, log_expit
from tolerances import FLOAT64, HVP, ULP

from lace_loss import ref

MARGINS = np.array(
    [0.0, 2.0**-60, 0.01, 0.5, 1, 2, 4, 8, 12, 16, 17, 20, 30, 37, 40, 80, 300, 372, 700, 744, 1000, 1e300]
)
LOGITS = np.concatenate([MARGINS, -MARGINS, 10 * np.random.default_rng(0).normal(size=30)])


def side(u, s):
    """f and df/du at logit u of the side that is present, at digits enough for any subtraction."""
    with mpmath.workdps(60 + int(2 * min(abs(u), 5000) / mpmath.log(10))):
        if abs(u) > 5000:  # e^-5000 is nothing beside 1
            return (mpmath.mpf(0), mpmath.mpf(0)) if u > 0 else ((mpmath.mpf(1) * -u), mpmath.mpf(-1))
        q = 1 / (1 + mpmath.exp(-u))
        loss = -(1 - s * q) * mpmath.log(q)
        return loss, q * (1 - q) * (s * mpmath.log(q) - (1 - s * q) / q)


def exact(z, y, strength=1, weight=1, pos_weight=1):
    """Loss and derivative of one label, by the sum over both sides."""
    z, y, s, w, p = (mpmath.mpf(float(value)) for value in (z, y, strength, weight, pos_weight))
    (f1, d1), (f0, d0) = side(z, s), side(-z, s)
    a1, a0 = w * p * y, w * (1 - y)
    return (a1 * f1 if a1 else 0) + (a0 * f0 if a0 else 0), a1 * d1 - a0 * d0


def assert_exact(z, y, allowed=0.0, **options):
    """`allowed`, in units of the coefficients' sum: what is left where the two sides cancel."""
    loss = ref.binary_forward(z, y, reduction="none", **options)
    slope = ref.binary_backward(z, y, reduction="none", **options)
    for i in np.ndindex(np.shape(z)):
        wanted = exact(z[i], y[i], **{name: np.broadcast_to(value, z.shape)[i] for name, value in options.items()})
        for got, true in ((loss[i], wanted[0]), (slope[i], wanted[1])):
            unit = float(np.spacing(abs(float(true))))
            assert ulps(got, true, np.float64) <= ULP["ref"] + allowed / unit, (z[i], y[i], got, float(true))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("y", [0, 1])
def test_loss_and_gradient_are_exact_to_the_contract(y, strength):
    assert_exact(LOGITS, np.full(LOGITS.shape, y), strength=strength)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_probabilities_and_weights_are_exact_to_the_contract(strength):
    rng = np.random.default_rng(1)
    y = rng.uniform(-0.5, 1.5, LOGITS.shape)  # outside [0, 1] too, as torch allows
    w, p = 10.0 ** rng.uniform(-3, 3, LOGITS.shape), 10.0 ** rng.uniform(-3, 3, LOGITS.shape)
    size = 2.0**-90 * 1e6
    assert_exact(LOGITS, y, allowed=size, strength=strength, weight=w, pos_weight=p)
    assert_exact(LOGITS, (y > 0.5).astype(float), strength=strength, weight=w, pos_weight=p)


def test_it_is_the_two_class_loss_of_0_and_z():
    rng = np.random.default_rng(2)
    z, y = 5 * rng.normal(size=50), rng.uniform(size=50)
    two, targets = np.stack([np.zeros(50), z], 1), np.stack([1 - y, y], 1)
    for strength in (0.0, 0.3, 1.0):
        for weight in (None, [0.5, 4.0]):
            w = (1.0, 1.0) if weight is None else (0.5, 8.0)
            options = {"weight": w[0], "pos_weight": w[1], "strength": strength}
            for reduction in ("none", "mean", "sum"):
                pair = {"weight": weight, "strength": strength, "reduction": reduction}
                loss = ref.binary_forward(z, y, reduction=reduction, **options)
                assert np.allclose(loss, ref.forward(two, targets, **pair), rtol=FLOAT64, atol=0)
                slope = ref.binary_backward(z, y, reduction=reduction, **options)
                assert np.allclose(slope, ref.backward(two, targets, **pair)[:, 1], rtol=FLOAT64, atol=FLOAT64)


def test_strength_1_is_the_sigmoid_focal_loss_with_gamma_1():
    """As published, float64: T.-Y. Lin et al., arXiv:1708.02002, without alpha. Away from its tails it has digits."""
    u = np.linspace(-30, 8, 200)
    focal = (1 - expit(u)) * -log_expit(u)
    for y, z in ((1, u), (0, -u)):
        assert np.allclose(ref.binary_forward(z, np.full(z.shape, y), reduction="none"), focal, rtol=1e-11, atol=0)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_strength_0_is_binary_cross_entropy_of_torch(reduction):
    rng = np.random.default_rng(3)
    z, y = 8 * rng.normal(size=(6, 5, 4)), rng.uniform(-0.2, 1.2, (6, 5, 4))
    for weight, pos_weight in (
        (None, None),
        (rng.uniform(size=4), rng.uniform(size=(5, 1))),
        (-2.0, rng.normal(size=(6, 1, 4))),
    ):
        x = torch.tensor(z, requires_grad=True)
        given = [None if value is None else torch.tensor(value) for value in (weight, pos_weight)]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            x, torch.tensor(y), given[0], reduction=reduction, pos_weight=given[1]
        )
        loss.sum().backward()
        options = {"weight": weight, "pos_weight": pos_weight, "reduction": reduction, "strength": 0.0}
        assert np.allclose(ref.binary_forward(z, y, **options), loss.detach(), rtol=FLOAT64, atol=FLOAT64)
        assert np.allclose(ref.binary_backward(z, y, **options), x.grad, rtol=FLOAT64, atol=FLOAT64)


def test_the_second_derivative_is_the_gradients_difference():
    rng = np.random.default_rng(4)
    z, y, v = 4 * rng.normal(size=(9, 5)), rng.uniform(size=(9, 5)), rng.uniform(-1, 1, (9, 5))
    h = 2.0**-12
    for strength in (0.0, 0.5, 1.0):
        options = {"strength": strength, "reduction": "none", "pos_weight": rng.uniform(0.1, 1, 5)}

        def slope(step, options=options):
            return ref.binary_backward(z + step * v, y, **options)

        wanted = (8 * (slope(h) - slope(-h)) - (slope(2 * h) - slope(-2 * h))) / (12 * h)
        got = ref.binary_hessian_vector_product(z, y, v, **options)
        assert (abs(got - wanted) <= HVP).all()


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 3, 5), (0,), (2, 0, 3)])
def test_any_shape_is_kept(shape):
    rng = np.random.default_rng(5)
    z, v = rng.normal(size=shape), rng.normal(size=shape)
    y = rng.integers(0, 2, shape)
    g = rng.normal(size=shape)
    assert np.shape(ref.binary_forward(z, y, reduction="none")) == shape
    slope = ref.binary_backward(z, y, g, reduction="none")
    change = ref.binary_hessian_vector_product(z, y, v, g, reduction="none")
    p = ref.binary_posterior(z)
    assert slope.shape == change.shape == p.shape == shape
    for i in np.ndindex(shape):
        assert ref.binary_forward(z, y, reduction="none")[i] == ref.binary_forward(z[i], y[i]) if shape else True
        assert slope[i] == ref.binary_backward(z[i], y[i], g[i])
        assert change[i] == ref.binary_hessian_vector_product(z[i], y[i], v[i], g[i])
        assert p[i] == ref.binary_posterior(z[i])


def test_a_mean_divides_by_the_number_of_labels_and_of_none_is_nan():
    z, y = np.zeros((2, 3)), np.ones((2, 3))
    losses = ref.binary_forward(z, y, weight=[1.0, 2.0, 0.0], reduction="none")
    assert ref.binary_forward(z, y, weight=[1.0, 2.0, 0.0]) == pytest.approx(losses.sum() / 6, rel=FLOAT64)
    assert np.isnan(ref.binary_forward(np.zeros((0, 3)), np.zeros((0, 3))))
    assert ref.binary_forward(np.zeros((0, 3)), np.zeros((0, 3)), reduction="sum") == 0
    assert ref.binary_backward(np.zeros((0, 3)), np.zeros((0, 3))).shape == (0, 3)


def test_labels_of_every_type_are_the_same():
    z = np.random.default_rng(6).normal(size=40)
    y = z > 0.3
    wanted = ref.binary_backward(z, y)
    for dtype in (np.int8, np.uint8, np.int64, np.uint64, np.float16, np.float32, np.float64, np.longdouble):
        assert np.array_equal(ref.binary_backward(z, y.astype(dtype)), wanted)
    assert np.array_equal(ref.binary_backward(z.tolist(), y.tolist()), wanted)


def test_infinities_are_certain_labels_and_nan_stays_with_its_own():
    z = np.array([np.inf, -np.inf, np.nan, 0.0])
    assert ref.binary_forward(z, np.ones(4), reduction="none")[:2].tolist() == [0, np.inf]
    assert ref.binary_forward(z, np.zeros(4), reduction="none")[:2].tolist() == [np.inf, 0]
    assert ref.binary_backward(z, np.ones(4), reduction="none")[:2].tolist() == [0, -1]
    assert ref.binary_backward(z, np.zeros(4), reduction="none")[:2].tolist() == [1, 0]
    assert ref.binary_forward(z, np.full(4, 0.5), reduction="none")[:2].tolist() == [np.inf, np.inf]
    for found in (ref.binary_forward(z, np.ones(4), reduction="none"), ref.binary_posterior(z)):
        assert np.isnan(found).tolist() == [False, False, True, False]
    assert ref.binary_posterior(z)[:2].tolist() == [1, 0]
    y = np.array([0.0, 1.0, np.nan, np.inf])
    assert np.isnan(ref.binary_forward(np.zeros(4), y, reduction="none")).tolist() == [False, False, True, True]


def test_a_weight_of_0_beside_an_infinite_loss_counts_nothing():
    z, y = np.array([-np.inf, np.inf, 1.0]), np.array([1, 0, 1])
    for options in ({"weight": [0.0, 0.0, 1.0]}, {"pos_weight": [0.0, 1.0, 1.0], "weight": [1.0, 0.0, 1.0]}):
        assert ref.binary_forward(z, y, reduction="sum", **options) == ref.binary_forward(1.0, 1)
        assert ref.binary_backward(z, y, reduction="sum", **options)[:2].tolist() == [0, 0]


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_the_posterior_is_where_the_expected_loss_is_smallest(strength):
    """At p the slope p f'(z) of a present label and that of an absent one are opposite; found by mpmath's division."""
    rng = np.random.default_rng(7)
    weights = np.where(np.arange(LOGITS.size) % 2, 1.0, 10.0 ** rng.uniform(-5, 5, LOGITS.size))
    got = ref.binary_posterior(LOGITS, pos_weight=weights, strength=strength)
    for z, w, p in zip(LOGITS, weights, got, strict=True):
        s = mpmath.mpf(strength)
        with mpmath.workdps(2000):
            down, up = w * side(mpmath.mpf(z), s)[1], side(mpmath.mpf(-z), s)[1]
            true = (up / (up + down)) if abs(z) < 5000 else mpmath.mpf(int(z > 0))
        assert ulps(p, true, np.float64) <= ULP["ref"]


def test_the_posterior_is_that_of_two_classes():
    z = np.linspace(-50, 50, 101)
    two = ref.posterior(np.stack([np.zeros(101), z], 1), weight=[1.0, 3.0], strength=0.7)
    assert np.array_equal(ref.binary_posterior(z, pos_weight=3.0, strength=0.7), two[:, 1])


Z = np.zeros((4, 3))
REFUSED = {
    "another shape": (
        Z,
        np.zeros((4, 1)),
        {},
        ValueError,
        r"target must have the logits' shape \(4, 3\), got \(4, 1\)",
    ),
    "class indices": (Z, np.full((4, 3), 2), {}, ValueError, r"an integer target must be 0 or 1, target\[0, 0\] is 2"),
    "a negative label": (1.0, -1, {}, ValueError, "an integer target must be 0 or 1, target is -1"),
    "text as labels": (Z, np.full((4, 3), "1"), {}, TypeError, "target must hold labels"),
    "complex logits": (Z + 0j, Z, {}, TypeError, "logits must hold real numbers, got complex128"),
    "boolean logits": (Z > 0, Z, {}, TypeError, "logits must hold real numbers, got bool"),
    "masked logits": (np.ma.masked_less(Z, -1), Z, {}, TypeError, "logits has a mask"),
    "masked labels": (Z, np.ma.masked_less(Z, -1), {}, TypeError, "target has a mask"),
    "weights of another shape": (
        Z,
        Z,
        {"weight": np.ones(4)},
        ValueError,
        r"weight must broadcast .* \(4, 3\), got \(4,\)",
    ),
    "larger weights": (Z, Z, {"weight": np.ones((2, 4, 3))}, ValueError, r"weight must broadcast"),
    "pos_weight of another shape": (
        Z,
        Z,
        {"pos_weight": np.ones(2)},
        ValueError,
        r"pos_weight must broadcast .*, got \(2,\)",
    ),
    "text as weights": (Z, Z, {"weight": ["a", "b", "c"]}, TypeError, "weight must hold real numbers"),
    "another reduction": (Z, Z, {"reduction": "batchmean"}, ValueError, "reduction must be 'none', 'mean' or 'sum'"),
    "a strength above 1": (Z, Z, {"strength": 2}, ValueError, r"strength must be in \[0, 1\], got 2"),
    "label_smoothing": (Z, Z, {"label_smoothing": 0.1}, TypeError, "label_smoothing"),
}


@pytest.mark.parametrize(("logits", "target", "options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused(logits, target, options, error, message):
    for call in (ref.binary_forward, ref.binary_backward):
        with pytest.raises(error, match=message):
            call(logits, target, **options)


def test_bad_factors_and_vectors_are_refused():
    with pytest.raises(ValueError, match=r"vector must have the logits' shape \(4, 3\), got \(3,\)"):
        ref.binary_hessian_vector_product(Z, Z, np.zeros(3))
    with pytest.raises(ValueError, match=r"grad_output must be a number, got shape \(4, 3\)"):
        ref.binary_backward(Z, Z, Z)
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"pos_weight must be positive and finite .* for logits\[0, 1\]"):
            ref.binary_posterior(Z, pos_weight=[1.0, bad, 1.0])


def test_the_examples_of_the_docstrings_are_right():
    found = doctest.testmod(sys.modules["lace_loss.ref.binary"])
    assert found.attempted == 5
    assert found.failed == 0
