"""Loss and every gradient entry against mpmath, in ulp, where other implementations lose all their digits."""

import mpmath
import numpy as np
import pytest
from oracle import exact, rows, ulps
from tolerances import ULP

from lace_loss import ext, ref

CASES = [
    pytest.param(logits.dtype.type, logits, target, id=f"{dtype}-C{classes}-{name.replace(' ', '_')}")
    for dtype in ("float32", "float64")
    for classes in (1, 2, 3, 10, 65, 100, 1000)
    for name, logits, target in rows(classes, np.dtype(dtype))
]


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("dtype", "logits", "target"), CASES)
def test_loss_and_gradient_are_exact_to_the_contract(dtype, logits, target, strength):
    loss, gradient = exact(logits, target, strength)
    if dtype == np.float64:
        assert ulps(ref.forward(logits, target, strength=strength), loss, dtype) <= ULP["ref"]
        assert ulps(ref.backward(logits, target, strength=strength), gradient, dtype) <= ULP["ref"]
    got_loss, got_gradient = ext.forward_backward(logits, target, strength=strength)
    assert got_loss.dtype == got_gradient.dtype == dtype
    assert ulps(got_loss, loss, dtype) <= ULP["kernel"]
    assert ulps(got_gradient, gradient, dtype) <= ULP["kernel"]
    image, targets = np.repeat(logits[None, :, None], 3, axis=2), np.full((1, 3), target)
    got_losses, got_gradients = ext.forward_backward(image, targets, reduction="none", strength=strength)
    assert ulps(got_losses[0, 1], loss, dtype) <= ULP["kernel"]
    assert ulps(got_gradients[0, :, 1], gradient, dtype) <= ULP["kernel"]


def test_more_than_2_31_logits_are_counted_right(tmp_path):
    """Zeros that no disk holds: L = (1 - 1/C) log C, and the rows begin where 32 bits would wrap."""
    classes = 2**30 + 8
    logits = np.memmap(tmp_path / "zeros", np.float32, "w+", shape=(2, classes))
    losses = ext.forward(logits, np.array([5, classes - 1]), reduction="none")
    assert ulps(losses[1], (1 - mpmath.mpf(1) / classes) * mpmath.log(classes), np.float32) <= ULP["kernel"]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("classes", "margin"), [(100_000, 14.0), (262_144, 0.0)])
def test_long_rows_are_as_exact_as_short_ones(dtype, classes, margin):
    logits = np.random.default_rng(classes).normal(size=classes)
    logits[7] = logits.max() + margin
    logits = logits.astype(dtype)
    loss, gradient = exact(logits, 7)
    if dtype == np.float64:
        assert ulps(ref.forward(logits, 7), loss, dtype) <= ULP["ref"]
        assert ulps(ref.backward(logits, 7), gradient, dtype) <= ULP["ref"]
    got_loss, got_gradient = ext.forward_backward(logits, 7)
    assert ulps(got_loss, loss, dtype) <= ULP["kernel"]
    assert ulps(got_gradient, gradient, dtype) <= ULP["kernel"]


@pytest.mark.parametrize("classes", [2, 3, 10, 64, 100, 1000])
def test_no_random_float32_row_exceeds_the_contract(classes):
    """400,000 logits a size; float64 arithmetic on float32 rows is exact enough to be the witness."""
    rng = np.random.default_rng(classes)
    n = 400_000 // classes
    z = rng.normal(size=(n, classes)) * 10 ** rng.uniform(-2, 1.5, (n, 1))
    target = rng.integers(0, classes, n)
    z[np.arange(n), target] += rng.choice([0, 3, 8, 12, 20, 30, -10, -50], n)
    z = (z + rng.choice([0, 100, -1000], (n, 1))).astype(np.float32)
    got_loss, got_gradient = ext.forward_backward(z, target, reduction="none")
    loss, gradient = ref.forward(z, target, reduction="none"), ref.backward(z, target, reduction="none")
    for got, wanted in ((got_loss, loss), (got_gradient, gradient)):
        assert np.max(np.abs(got - wanted) / np.spacing(np.abs(wanted).astype(np.float32))) <= ULP["kernel"]


def test_the_hostile_rows_are_hostile():
    for dtype in (np.float32, np.float64):
        named = {name: exact(logits, target)[0] for name, logits, target in rows(10, dtype)}
        assert named["margin 40"] < 1e-30
        assert named["margin -1000"] > 999
        assert 0 < named["margin 80"] < np.finfo(np.float32).tiny
