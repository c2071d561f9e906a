"""Every option, shape and target kind: the implementations agree with `ref`, and `ref` at strength 0 with torch."""

import functools
from itertools import product

import numpy as np
import pytest
import torch
from benchmarks.figure import curves, draw
from tolerances import COMPOSITE, DIFFERENCES, FLOAT32, FLOAT64

from lace_loss import ext, ref
from lace_loss.ext import torch as lace_torch

SHAPES = [(7,), (5, 7), (2, 7, 3, 2), (0, 7), (3, 1)]
OPTIONS = [
    {"reduction": reduction, "label_smoothing": e, "strength": s, "weight": weight, "ignore_index": ignored}
    for reduction, e, s, weight, ignored in product(
        ("none", "mean", "sum"), (0.0, 0.3), (0.0, 0.5, 1.0), (None, "uneven"), (-100, 0)
    )
]


def problem(shape, kind, options, dtype=np.float64):
    """Logits, target, the loss's gradient and the options with their arrays."""
    rng = np.random.default_rng(len(shape))
    axis = min(1, len(shape) - 1)
    samples = shape[:axis] + shape[axis + 1 :]
    logits = 4 * rng.normal(size=shape)
    if kind == "classes":
        target = rng.integers(0, shape[axis], samples)
    else:
        target = rng.uniform(size=shape)
        target /= target.sum(axis, keepdims=True)
    options = dict(options)
    if options["weight"]:
        options["weight"] = rng.uniform(size=shape[axis]).astype(dtype)
    grad_output = rng.normal(size=samples if options["reduction"] == "none" else ())
    as_target = target if kind == "classes" else target.astype(dtype)
    return logits.astype(dtype), as_target, np.asarray(grad_output, dtype), options


def each_problem(dtype=np.float64):
    for shape, kind, options in product(SHAPES, ("classes", "probabilities"), OPTIONS):
        if kind == "classes" or options["ignore_index"] < 0:
            yield (shape, kind, options), problem(shape, kind, options, dtype)


@functools.cache
def solved_by_ref(dtype):
    """Each problem with ref's loss and gradient."""
    return [
        (case, problem, ref.forward(*problem[:2], **problem[3]), ref.backward(*problem[:3], **problem[3]))
        for case, problem in each_problem(dtype)
    ]


def assert_close(got, wanted, tolerance, case):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted)
    assert got.shape == wanted.shape, case
    largest = np.nanmax(np.abs(wanted), initial=1.0) if np.isfinite(wanted).any() else 1.0
    assert np.array_equal(np.isnan(got), np.isnan(wanted)), case
    assert np.nanmax(np.abs(got - wanted), initial=0) <= tolerance * largest if np.isfinite(wanted).any() else True, (
        case
    )


def in_torch(function, logits, target, grad_output, weight=None, **options):
    """Loss and gradient of a torch loss function."""
    input = torch.tensor(logits, requires_grad=True)
    loss = function(input, torch.tensor(target), None if weight is None else torch.tensor(weight), **options)
    loss.backward(torch.tensor(grad_output))
    return loss.detach().numpy(), input.grad.numpy()


def test_the_kernel_agrees_with_the_reference():
    for dtype, tolerance in ((np.float64, FLOAT64), (np.float32, FLOAT32)):
        for case, (logits, target, grad_output, options), *wanted in solved_by_ref(dtype):
            loss, gradient = ext.forward_backward(logits, target, grad_output, **options)
            assert loss.dtype == gradient.dtype == dtype
            assert_close(loss, wanted[0], tolerance, case)
            assert_close(gradient, wanted[1], tolerance, case)
            assert_close(ext.forward(logits, target, **options), loss.astype(float), 0, case)
            assert_close(ext.backward(logits, target, grad_output, **options), gradient.astype(float), 0, case)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_torch_agrees_with_the_reference(path, dtype):
    for case, (logits, target, grad_output, options), *wanted in solved_by_ref(dtype):
        loss, gradient = in_torch(lace_torch.lace_loss, logits, target, grad_output, **options)
        assert loss.dtype == gradient.dtype == dtype
        tolerance = COMPOSITE[np.dtype(dtype).name]
        assert_close(loss, wanted[0], tolerance, case)
        assert_close(gradient, wanted[1], tolerance, case)


def test_strength_0_is_torch_cross_entropy():
    for case, (logits, target, grad_output, options), *wanted in solved_by_ref(np.float64):
        if options["strength"] == 0:
            others = {key: value for key, value in options.items() if key != "strength"}
            loss, gradient = in_torch(torch.nn.functional.cross_entropy, logits, target, grad_output, **others)
            assert_close(loss, wanted[0], FLOAT64, case)
            assert_close(gradient, wanted[1], FLOAT64, case)


def test_backward_is_the_slope_of_forward_and_the_hessian_product_that_of_backward():
    h = 1e-5
    for case, (logits, target, grad_output, options) in each_problem():
        v = np.random.default_rng(1).normal(size=logits.shape)
        slope = (ref.forward(logits + h * v, target, **options) - ref.forward(logits - h * v, target, **options)) / (
            2 * h
        )
        expected = np.sum(np.asarray(slope) * grad_output)
        gradient = ref.backward(logits, target, grad_output, **options)
        if np.isfinite(expected):
            assert abs(np.sum(gradient * v) - expected) <= DIFFERENCES, case
        bend = [ref.backward(logits + step * v, target, grad_output, **options) for step in (h, -h)]
        product_ = ref.hessian_vector_product(logits, target, v, grad_output, **options)
        assert_close(product_, (bend[0] - bend[1]) / (2 * h), DIFFERENCES, case)


def test_one_hot_probabilities_are_a_class():
    logits, target, _, _ = problem((5, 7), "classes", OPTIONS[0])
    one_hot = np.eye(7)[target]
    for function in (ref.forward, ref.backward, ext.forward, ext.backward):
        assert_close(function(logits, one_hot), function(logits, target), FLOAT64, function)


def test_mixtures_of_probability_targets_mix_the_loss():
    """Linear in the target, so mixup's pair of losses is the loss of the mixture."""
    logits, y, _, _ = problem((5, 7), "probabilities", OPTIONS[0])
    other = np.roll(y, 1, axis=0)
    mixed = ref.forward(logits, 0.3 * y + 0.7 * other)
    assert_close(mixed, 0.3 * ref.forward(logits, y) + 0.7 * ref.forward(logits, other), FLOAT64, "mixture")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape", [(2, 19, 40, 7), (1, 5, 3), (1, 100, 65), (3, 19, 1), (2, 64, 33), (0, 3, 4), (2, 1, 3)]
)
def test_images_worked_on_plane_by_plane_give_the_rows_results(dtype, shape):
    """Up to the order of a sum that keeps its rounding errors: 1 ulp of each."""
    rng = np.random.default_rng(0)
    images = (5 * rng.normal(size=shape)).astype(dtype)
    target = rng.integers(0, shape[1], shape[:1] + shape[2:])
    target.flat[1::5] = -100
    last = np.ascontiguousarray(np.moveaxis(images, 1, -1))
    for options in ({}, {"weight": rng.uniform(size=shape[1])}, {"strength": 0.5}, {"ignore_index": 0}):
        options = {"reduction": "none", **options}
        kept = np.where(target == -100, 0 if options.get("ignore_index") == 0 else -100, target)
        loss, gradient = ext.forward_backward(images, kept, **options)
        row_loss, row_gradient = ext.forward_backward(last.reshape(-1, shape[1]), kept.reshape(-1), **options)
        eps = np.finfo(dtype).eps
        assert np.allclose(loss.reshape(-1), row_loss, rtol=2 * eps, atol=0)
        assert np.allclose(np.moveaxis(gradient, 1, -1).reshape(-1, shape[1]), row_gradient, rtol=2 * eps, atol=0)


def test_the_gradient_factor_peaks_at_1_plus_exp_minus_2_where_q_is_exp_minus_2(tmp_path):
    """The README's figure, and the place where K's derivative -2 - log q vanishes."""
    q = np.append(np.linspace(0.001, 0.999, 999), np.exp(-2))
    loss, factor = curves(q, strength=1)
    assert factor.argmax() == len(q) - 1
    assert abs(factor.max() - (1 + np.exp(-2))) <= FLOAT64
    assert np.allclose(loss, -(1 - q) * np.log(q), rtol=FLOAT64 / 1e-3, atol=0)
    assert np.allclose(curves(q, strength=0)[1], 1, rtol=FLOAT64 / 1e-3, atol=0)
    draw(str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
