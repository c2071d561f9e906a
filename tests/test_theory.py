"""What ref/THEORY.md states of the loss, each statement by itself; the witnesses are mpmath, scipy's minimiser, SVC."""

import mpmath
import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from sklearn.svm import SVC
from tolerances import MINIMUM, ROUNDED_4, ROUNDED_6

from lace_loss import ref

STRENGTHS = [0.25, 0.5, 0.75, 1.0]
# Lowest and highest eigenvalue of the Hessian, by strength, as THEORY.md gives them.
CURVATURE = {
    0.25: (-0.000451, 0.566139),
    0.5: (-0.006400, 0.636192),
    0.75: (-0.018141, 0.707879),
    1.0: (-0.033094, 0.780382),
}
CONVEX_FROM = {0.5: 0.0168, 1.0: 0.0432}


def softmax(z):
    e = np.exp(z - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def f(q, s=1):
    return -(1 - s * q) * mpmath.log(q)


def two_classes(q):
    """Logits of two classes whose first has probability q."""
    return np.array([0.0, np.log1p(-q) - np.log(q)])


def hessian(z, target, strength):
    """By columns: the gradient's change along each logit."""
    columns = [ref.hessian_vector_product(z, target, unit, strength=strength) for unit in np.eye(len(z))]
    return np.array(columns)


def best_logits(p, start, **options):
    """Where scipy finds the smallest expected loss for class probabilities p."""
    found = minimize(
        lambda z: ref.forward(z, p, **options),
        start,
        jac=lambda z: ref.backward(z, p, **options),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    return found.x


# --- What the outputs mean --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS)
def test_f_is_strictly_convex_in_q(strength):
    for q in np.linspace(0.01, 0.999, 25):
        curvature = mpmath.diff(lambda x: f(x, strength), q, 2)
        assert curvature > 0
        assert abs(curvature - (strength / q + 1 / q**2)) < mpmath.mpf(10) ** -8 * curvature


@pytest.mark.parametrize("strength", [0.0, *STRENGTHS])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_smallest_expected_loss_gives_the_class_probabilities_back(classes, strength):
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.ones(classes))
    options = {"strength": strength, "weight": rng.uniform(0.3, 3, classes), "label_smoothing": 0.1}
    for chosen in ({"strength": strength}, options):
        ends = [best_logits(p, rng.normal(size=classes), **chosen) for _ in range(2)]
        for z in ends:
            np.testing.assert_allclose(ref.posterior(z, **chosen), p, atol=MINIMUM)
            np.testing.assert_allclose(softmax(z), softmax(ends[0]), atol=MINIMUM)  # from every start the same


def test_the_order_of_the_classes_is_that_of_the_logits():
    rng = np.random.default_rng(0)
    for strength in STRENGTHS:
        z = 4 * rng.normal(size=(200, 10))
        assert np.array_equal(np.argsort(ref.posterior(z, strength=strength), 1), np.argsort(z, 1))


@pytest.mark.parametrize(
    "q, p", [(0.6, 0.672), (0.7, 0.818), (0.8, 0.922), (0.9, 0.9812), (0.95, 0.9953), (0.99, 0.99981)]
)
def test_the_class_probability_that_a_softmax_of_two_classes_stands_for(q, p):
    assert f"{ref.posterior(two_classes(q))[0]:.{len(str(p)) - 2}f}" == str(p)


@pytest.mark.parametrize("p, q", [(0.6, 0.557), (0.8, 0.686), (0.9, 0.774), (0.95, 0.838), (0.99, 0.927)])
def test_what_a_perfect_fit_answers_where_the_truth_is_p(p, q):
    assert f"{softmax(best_logits([p, 1 - p], np.zeros(2)))[0]:.3f}" == str(q)


def test_the_leading_softmax_is_too_low_by_at_most_0_130_and_too_high_by_at_most_0_018():
    rng = np.random.default_rng(1)
    logits = [rng.uniform(0.1, 6) * rng.normal(size=(4000, classes)) for classes in (2, 3, 4, 10, 30)]
    too_low = [(ref.posterior(z).max(1) - softmax(z).max(1)) for z in logits]
    assert max(map(np.max, too_low)) < 0.1305
    assert min(map(np.min, too_low)) > -0.0185
    worst = np.log([0.735, 0.1325, 0.1325])
    assert ref.posterior(worst)[0] - 0.735 == pytest.approx(0.130, abs=5e-4)
    lead = np.log(np.r_[0.2, np.full(10_000, 0.8 / 10_000)])
    assert 0.2 - ref.posterior(lead)[0] == pytest.approx(0.018, abs=5e-4)
    certain = [z[softmax(z).max(1) > np.exp(-1)] for z in logits]
    assert all(np.all(ref.posterior(z).max(1) > softmax(z).max(1)) for z in certain)  # above 1/e always too low


def test_label_smoothing_counts_about_double():
    p = np.eye(10)[0]
    lace, cross_entropy = (
        softmax(best_logits(p, np.zeros(10), label_smoothing=0.1, strength=s))[0] for s in (1.0, 0.0)
    )
    assert (round(lace, 3), round(cross_entropy, 3)) == (0.790, 0.910)
    same = brentq(lambda e: softmax(best_logits(p, np.zeros(10), label_smoothing=e, strength=0.0))[0] - lace, 0.1, 0.5)
    assert round(same, 2) == 0.23


def test_the_loss_is_the_finite_term_of_the_jeffreys_divergence():
    z, t = np.array([0.3, -1.0, 2.0]), 1
    q = softmax(z)
    for far in (1e-6, 1e-12, 1e-100):
        p = np.where(np.arange(3) == t, 1 - 2 * far, far)
        terms = (p - q) * (np.log(p) - np.log(q))
        assert terms[t] == pytest.approx(ref.forward(z, t), rel=10 * far + ROUNDED_6)
        assert np.delete(terms, t).min() > -np.log(far) * q.min() / 2  # without bound as `far` goes to 0


# --- Curvature --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_hessian_s_eigenvalues_stay_within_their_bounds(strength):
    lowest, highest = CURVATURE[strength]
    rng = np.random.default_rng(2)
    for classes in (2, 3, 5):
        for z in rng.uniform(0.3, 4) * rng.normal(size=(30, classes)):
            values = np.linalg.eigvalsh(hessian(z, 0, strength))
            assert lowest - ROUNDED_6 <= values[0]
            assert values[-1] <= highest + ROUNDED_6


def of_two_classes(q, s):
    """A of THEORY.md: the Hessian of two classes is A (1, -1; -1, 1)."""
    n, r = -np.log(q), 1 - q
    k = (1 - s) + s * (r + q * n)
    return q * r * (k + s * (2 - n) * r)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_two_classes_attain_both_bounds(strength):
    grid = np.concatenate([np.geomspace(1e-6, 0.1, 4000), np.linspace(0.1, 1 - 1e-6, 20_000)])
    a = of_two_classes(grid, strength)
    for q in grid[[a.argmin(), a.argmax()]]:
        values = np.linalg.eigvalsh(hessian(two_classes(q), 0, strength))
        np.testing.assert_allclose(values[np.abs(values).argmax()], 2 * of_two_classes(q, strength), atol=1e-12)
    np.testing.assert_allclose(2 * np.array([a.min(), a.max()]), CURVATURE[strength], atol=ROUNDED_6)


@pytest.mark.parametrize("strength", CONVEX_FROM)
def test_the_loss_is_convex_exactly_from_a_probability_on(strength):
    edge = brentq(lambda q: of_two_classes(q, strength), 1e-4, 0.1)
    assert edge == pytest.approx(CONVEX_FROM[strength], abs=ROUNDED_4)
    assert np.linalg.eigvalsh(hessian(two_classes(0.99 * edge), 0, strength))[0] < -1e-6
    rng = np.random.default_rng(3)
    for classes in (2, 4, 8):
        rows = 3 * rng.normal(size=(400, classes))
        for z in rows[softmax(rows)[:, 0] >= edge][:20]:
            assert np.linalg.eigvalsh(hessian(z, 0, strength))[0] >= -1e-12


def test_a_quadratic_of_0_0166_makes_the_loss_convex():
    assert CURVATURE[1.0][0] + 2 * 0.0166 > 0 > CURVATURE[1.0][0] + 2 * 0.0165


def test_the_gradient_is_at_most_1_4783_long():
    rng = np.random.default_rng(4)
    for classes in (2, 3, 10):
        z = rng.uniform(0.5, 6) * rng.normal(size=(2000, classes))
        length = np.linalg.norm(ref.backward(z, np.zeros(len(z), int), reduction="none"), axis=1)
        assert length.max() <= 1.4783 + ROUNDED_4
    most = max(np.sqrt(2) * (1 - q) * (1 - q - q * np.log(q)) for q in np.linspace(1e-6, 1, 100_000))
    assert most == pytest.approx(1.4783, abs=ROUNDED_4)


def test_one_weight_may_have_two_minima_where_cross_entropy_has_one():
    """2,410 samples with y x = 0.1 and one with -100: the slope's changes from - to + are counted."""
    yx, count = np.array([0.1, -100.0]), np.array([2410, 1])

    def slope(w, strength):
        z = np.stack([np.zeros(2), w * yx], 1)
        return count @ (ref.backward(z, [1, 1], reduction="none", strength=strength)[:, 1] * yx)

    grid = np.concatenate([np.linspace(-0.05, 0.4, 91), np.linspace(0.5, 60, 60)])
    minima = {}
    for strength in (0.0, 1.0):
        slopes = [slope(w, strength) for w in grid]
        signs = [(a, b) for a, b, x, y in zip(grid, grid[1:], slopes, slopes[1:], strict=False) if x < 0 < y]
        minima[strength] = [brentq(lambda w, s=strength: slope(w, s), a, b) for a, b in signs]
    assert len(minima[0.0]) == 1
    assert [round(w, 4) for w in minima[1.0]] == [0.0221, 0.2233]


# --- Separable data ---------------------------------------------------------------------------------------------------


def descent(strength, steps, step=0.5):
    """The margin after so many steps on one sample of two classes with logits (0, z), from z = 0."""
    z, at = 0.0, []
    for i in range(steps):
        e = np.exp(-z)
        q = 1 / (1 + e)
        r, n = e * q, np.log1p(e)
        slope = -((1 - strength) + strength * (r + q * n)) * r
        if i % (steps // 4) == 0:
            at.append((z, slope))
        z -= step * slope
    for margin, slope in at:
        expected = ref.backward([0.0, margin], 1, strength=strength)[1]
        assert slope == pytest.approx(expected, rel=1e-9)
    return z


def test_on_separable_data_the_margin_grows_half_as_fast():
    steps, step = 200_000, 0.5
    margin = descent(1.0, steps)
    assert margin == pytest.approx(np.log(4 * step * steps) / 2, abs=0.01)
    assert ref.forward([0.0, margin], 1) == pytest.approx(1 / (4 * step * steps), rel=0.01)
    assert descent(0.0, steps) == pytest.approx(np.log(step * steps), abs=0.01)


def test_every_strength_below_1_ends_with_the_rate_of_cross_entropy():
    steps, step = 200_000, 0.5
    assert descent(0.5, steps) == pytest.approx(np.log(0.5 * step * steps), abs=0.02)


@pytest.mark.parametrize("classes", [2, 3])
def test_on_separable_data_the_direction_is_the_largest_margin_s(classes):
    """Along the path of smaller and smaller weight decay; two classes against SVC, three against a linear program's."""
    rng = np.random.default_rng(5)
    centres = np.array([[2.0, 1.0], [-2.0, -0.5], [1.0, -3.0]])[:classes]
    y = np.repeat(np.arange(classes), 8)
    x = centres[y] + 0.5 * rng.normal(size=(len(y), 2))

    def smallest(decay, start):
        def objective(w):
            z = x @ w.reshape(2, classes)
            slope = x.T @ ref.backward(z, y, reduction="sum")
            # Divided by the decay, as the minimiser stops at an absolute size of the gradient.
            return ref.forward(z, y, reduction="sum") / decay + w @ w, slope.ravel() / decay + 2 * w

        return minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-8, "maxiter": 2000}).x

    w = np.zeros(2 * classes)
    for decay in 10.0 ** -np.arange(0, 13):
        w = smallest(decay, w)
    direction = w / np.linalg.norm(w)
    if classes == 2:
        # Without an intercept the largest margin is that of the points and their reflections.
        svc = SVC(kernel="linear", C=1e8).fit(np.r_[x, -x], np.r_[y, 1 - y])
        normal = svc.coef_[0] * (1 if svc.classes_[1] == 1 else -1)
        best = np.stack([-normal, normal], 1).ravel()
    else:
        rows = [(x[i], y[i], j) for i in range(len(y)) for j in range(classes) if j != y[i]]

        def gaps(v):
            v = v.reshape(2, classes)
            return np.array([a @ (v[:, t] - v[:, j]) - 1 for a, t, j in rows])

        best = minimize(
            lambda v: v @ v, w, jac=lambda v: 2 * v, constraints={"type": "ineq", "fun": gaps}, method="SLSQP"
        ).x
    cosine = direction @ best / np.linalg.norm(best)
    assert cosine > 0.999, cosine
