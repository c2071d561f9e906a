"""The kernel of labels from NumPy: within its contract of mpmath and ref, in any layout, refused where ref refuses."""

import doctest
import sys

import numpy as np
import pytest
from oracle import ulps
from test_binary import LOGITS, REFUSED, exact
from tolerances import ROUNDINGS, ULP, UNDERFLOW

from lace_loss import ext, ref

DTYPES = (np.float32, np.float64)


def assert_near(got, wanted, dtype, ulp=ULP["kernel"]):
    """Within the contract of values of float64 that are exact to it."""
    limit = np.finfo(dtype).max
    wanted = np.clip(wanted, -limit, limit)
    unit = np.spacing(np.maximum(abs(wanted), np.finfo(dtype).smallest_subnormal).astype(dtype)).astype(np.float64)
    off = abs(np.clip(got.astype(np.float64), -limit, limit) - wanted)
    assert (off <= ulp * unit + UNDERFLOW * float(np.finfo(dtype).smallest_subnormal)).all()


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradient_are_within_the_contract_of_mpmath(dtype, strength):
    largest = float(np.finfo(dtype).max) / 2
    z = np.clip(LOGITS, -largest, largest).astype(dtype)
    for y in (0, 1):
        loss, slope = ext.binary_forward_backward(z, np.full(z.shape, y), reduction="none", strength=strength)
        assert loss.dtype == slope.dtype == dtype
        for i, logit in enumerate(z):
            wanted = exact(logit, y, strength)
            more = UNDERFLOW * float(np.finfo(dtype).smallest_subnormal)
            for got, true in ((loss[i], wanted[0]), (slope[i], wanted[1])):
                unit = float(np.spacing(dtype(abs(float(true)))))
                assert ulps(got, true, dtype) <= ULP["kernel"] + more / unit, (logit, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_probabilities_are_within_the_contract_of_ref(dtype):
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(300, 7)) * rng.choice([0.1, 3, 30, 90, 400], (300, 1))).astype(dtype)
    present, y = rng.uniform(size=z.shape) < 0.3, rng.uniform(-0.5, 1.5, z.shape).astype(dtype)
    w, p = (rng.uniform(0.01, 100, 7).astype(dtype) for _ in range(2))
    each = rng.normal(size=z.shape).astype(dtype)
    for strength in (0.0, 0.7, 1.0):
        options = {"weight": w, "pos_weight": p, "strength": float(dtype(strength)), "reduction": "none"}
        loss = ref.binary_forward(z, present, **options)
        assert_near(ext.binary_forward(z, present, **options), loss, dtype, ULP["kernel, weighted"])
        slope = ref.binary_backward(z, present, each, **options)
        assert_near(ext.binary_backward(z, present, each, **options), slope, dtype, ULP["kernel, weighted"])
        half_ulp = np.finfo(dtype).eps / 2
        mass = w * (p * abs(y) + abs(1 - y))
        apart = abs(ext.binary_forward(z, y, **options) - ref.binary_forward(z, y, **options))
        f1, f0 = (
            ref.binary_forward(z, np.full(z.shape, side), reduction="none", strength=options["strength"])
            for side in (1, 0)
        )
        size = w * (p * abs(y) * f1 + abs(1 - y) * f0)
        assert (apart <= ROUNDINGS["loss"] * half_ulp * size).all()
        apart = abs(ext.binary_backward(z, y, **options) - ref.binary_backward(z, y, **options))
        assert (apart <= ROUNDINGS["gradient"] * half_ulp * mass).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (5000,), (9, 4097), (3, 5, 7), (0,), (2, 0, 3)])
def test_a_mean_and_a_sum_are_those_of_the_losses(shape, dtype):
    rng = np.random.default_rng(1)
    z, y = (4 * rng.normal(size=shape)).astype(dtype), rng.integers(0, 2, shape)
    losses = ext.binary_forward(z, y, reduction="none")
    assert np.shape(losses) == shape
    total, count = losses.sum(dtype=np.longdouble), max(1, losses.size)
    assert ext.binary_forward(z, y, reduction="sum") == pytest.approx(float(total), rel=float(np.finfo(dtype).eps))
    mean, gradient = ext.binary_forward_backward(z, y)
    assert gradient.shape == shape
    if losses.size:
        assert mean == pytest.approx(float(total / count), rel=float(np.finfo(dtype).eps))
        assert_near(gradient, ref.binary_backward(z, y), dtype, ULP["kernel, weighted"])
    else:
        assert np.isnan(mean)


def layouts(array):
    yield "Fortran order", np.asfortranarray(array)
    yield "backwards", np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    wide = np.zeros((2 * array.shape[0], 3 * array.shape[1], *array.shape[2:]), array.dtype)
    wide[::2, ::3] = array
    yield "apart", wide[::2, ::3]
    room = np.zeros(array.nbytes + 1, np.uint8)
    odd = room[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    yield "not aligned", odd
    yield "the other byte order", array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_and_every_type_of_label_gives_the_same_bits_and_changes_no_input(dtype):
    rng = np.random.default_rng(2)
    z, y = rng.normal(size=(6, 5, 4)).astype(dtype), rng.integers(0, 2, (6, 5, 4))
    w, p = rng.uniform(size=(5, 1)), rng.uniform(size=(6, 1, 4))
    options = {"weight": w, "pos_weight": p, "reduction": "none"}
    loss, slope = ext.binary_forward_backward(z, y, **options)
    for name, logits in layouts(z):
        for labels in (y, *(found for _, found in layouts(y.astype(np.float32)))):
            before = logits.tobytes(), labels.tobytes()
            got = ext.binary_forward_backward(logits, labels, **options)
            assert np.array_equal(got[0], loss) and np.array_equal(got[1], slope), name
            assert before == (logits.tobytes(), labels.tobytes())
    for kind in (bool, np.int8, np.uint8, np.int64, np.uint64, np.float16, np.float64):
        assert np.array_equal(ext.binary_forward(z, y.astype(kind), **options), loss)
    assert np.array_equal(ext.binary_forward(z, y.tolist(), **options), loss)


def test_weights_of_any_shape_that_broadcasts_count_as_in_ref():
    rng = np.random.default_rng(3)
    z, y = rng.normal(size=(70, 3, 50)), rng.uniform(size=(70, 3, 50))
    shapes = [(), (1,), (50,), (1, 50), (3, 1), (3, 50), (70, 1, 1), (70, 1, 50), (70, 3, 50), (1, 1, 1)]
    for first in shapes:
        for second in shapes:
            options = {"weight": rng.uniform(size=first), "pos_weight": rng.uniform(size=second)}
            got = ext.binary_forward(z, y, reduction="none", **options)
            assert np.allclose(got, ref.binary_forward(z, y, reduction="none", **options), rtol=1e-14)
    for none in ((0, 3), (3, 0)):
        for shape in ((), (1,), none, none[1:], (none[0], 1)):
            options = {"weight": np.ones(shape), "reduction": "sum"}
            assert ext.binary_forward(np.zeros(none), np.zeros(none), **options) == 0


def test_the_gradient_goes_where_it_is_told():
    rng = np.random.default_rng(4)
    z, y = rng.normal(size=(30, 7)).astype(np.float32), rng.integers(0, 2, (30, 7))
    wanted = ext.binary_backward(z, y)
    for name, out in layouts(np.zeros_like(z)):
        if name == "the other byte order":
            continue
        assert ext.binary_forward_backward(z, y, out=out)[1] is out
        assert np.array_equal(out, wanted), name
    for bad, message in (
        (np.zeros((7, 30), np.float32), "got a writable float32 array of shape"),
        (np.zeros((30, 7)), "must be a writable float32 array"),
        (z, "out shares memory with an input"),
    ):
        with pytest.raises(ValueError, match=message):
            ext.binary_forward_backward(z, y, out=bad)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        ext.binary_forward_backward(z, y, threads=0)
    with pytest.raises(ValueError, match=r"grad_output must be a number, got shape \(30, 7\)"):
        ext.binary_backward(z, y, z)
    with pytest.raises(ValueError, match=r"grad_output must be a number or have the loss's shape \(30, 7\)"):
        ext.binary_backward(z, y, z[0], reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_nan_and_weights_of_0_are_as_in_ref(dtype):
    z = np.array([np.inf, -np.inf, np.nan, 0.0, np.finfo(dtype).max, -np.finfo(dtype).max], dtype)
    for y in (np.ones(6), np.zeros(6), np.full(6, 0.25), np.array([np.nan] * 6)):
        for options in ({}, {"weight": 0.0}, {"pos_weight": 0.0}, {"weight": -2.0}, {"strength": 0.5}):
            got = ext.binary_forward(z, y, reduction="none", **options)
            with np.errstate(over="ignore"):
                wanted = ref.binary_forward(z, y, reduction="none", **options).astype(dtype)
            assert np.allclose(got, wanted, rtol=1e-6, equal_nan=True), (y, options)
            got = ext.binary_backward(z, y, reduction="none", **options)
            assert np.allclose(got, ref.binary_backward(z, y, reduction="none", **options), rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("logits", "target", "options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_ref_refuses_is_refused(logits, target, options, error, message):
    if np.asarray(logits).dtype.kind in "bc":
        message = "logits must be float32 or float64, got"
    for call in (ext.binary_forward, ext.binary_backward, ext.binary_forward_backward):
        with pytest.raises(error, match=message):
            call(logits, target, **options)


def test_the_examples_of_the_docstrings_are_right():
    found = doctest.testmod(sys.modules["lace_loss.ext.binary"])
    assert found.attempted == 3
    assert found.failed == 0
