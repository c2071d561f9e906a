"""Class probabilities by the C kernel and by torch's operations, against ref's and against closed values."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from tolerances import COMPOSITE, ULP

from lace_loss import ext, ref
from lace_loss.ext.torch import LACELoss, posterior

SHAPES = [(1,), (5,), (7, 1), (7, 3), (300, 1000), (3, 5, 4, 6), (2, 19, 60, 70), (0, 3), (2, 3, 0)]
OPTIONS = [
    {},
    {"strength": 0.5},
    {"strength": 0.0},
    {"label_smoothing": 0.1},
    {"weight": True, "label_smoothing": 0.01},
]


def problem(shape, options, dtype):
    rng = np.random.default_rng(0)
    classes = shape[min(1, len(shape) - 1)]
    weight = {"weight": rng.uniform(0.3, 3, classes).astype(dtype)} if "weight" in options else {}
    return (4 * rng.normal(size=shape)).astype(dtype), options | weight


def layouts(z):
    yield z
    if z.size > 100_000:  # large enough for threads; ref takes seconds
        return
    yield np.asfortranarray(z)
    yield z[::-1]
    yield np.repeat(z, 2, 0)[::2]
    yield np.moveaxis(np.moveaxis(z, min(1, z.ndim - 1), -1).copy(), -1, min(1, z.ndim - 1))


def assert_within(got, z, options, dtype):
    """Of the smoothed part (1-e) p + e/C, of which p is the rest: see ext.posterior."""
    wanted, e = ref.posterior(z.astype(float), **options), options.get("label_smoothing", 0)
    part = (1 - e) * wanted + e / z.shape[min(1, z.ndim - 1)]
    assert got.dtype == dtype
    assert np.all(np.abs(got - wanted) * (1 - e) <= (ULP["kernel"] + 1) * np.spacing(part.astype(dtype)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numpy_s_probabilities_are_those_of_the_reference_in_every_layout(shape, options, dtype):
    z, options = problem(shape, options, dtype)
    for logits in layouts(z):
        before = logits.copy()
        got = ext.posterior(logits, **options)
        assert_within(got, logits, options, dtype)
        out = np.empty(got.shape, dtype).T.copy().T
        assert ext.posterior(logits, out=out, threads=3, **options) is out
        assert out.tobytes() == got.tobytes()
        assert logits.tobytes() == before.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_s_probabilities_are_those_of_the_reference(shape, options, dtype):
    z, options = problem(shape, options, np.float64 if dtype is torch.float64 else np.float32)
    wanted = ref.posterior(z.astype(float), **options)
    torch_options = {name: torch.tensor(value) if name == "weight" else value for name, value in options.items()}
    input = torch.tensor(z)
    assert_within(posterior(input, **torch_options).numpy(), z, options, z.dtype)
    name = str(dtype).removeprefix("torch.")
    differentiable = posterior(input.clone().requires_grad_(), **torch_options)
    np.testing.assert_allclose(differentiable.detach(), wanted, rtol=COMPOSITE[name], atol=COMPOSITE[name] * 1e-3)
    module = LACELoss(**torch_options, reduction="none").to(dtype)
    assert module.posterior(input).numpy().tobytes() == posterior(input, **torch_options).numpy().tobytes()


@pytest.mark.parametrize("margin", [0, 5, 16, 20, 30, 40])
def test_two_sure_classes_have_the_probability_of_a_closed_form(margin):
    """With u = softplus: q/K of both sides, by expit and log1p, which lose nothing for two classes."""
    q, r = expit(margin), expit(-margin)
    n = [math.log1p(math.exp(-margin)), margin + math.log1p(math.exp(-margin))]
    h = [q / (r + q * n[0]), r / (q + r * n[1])]
    wanted = h[1] / (h[0] + h[1])
    assert ext.posterior(np.array([margin, 0.0]))[1] == pytest.approx(wanted, rel=1e-14)
    for compute in (posterior, torch.compile(posterior, fullgraph=True)):
        rows = torch.tensor([[margin, 0.0]] * 64, requires_grad=True)
        np.testing.assert_allclose(compute(rows).detach()[:, 1], wanted, rtol=COMPOSITE["float32"])


@pytest.mark.parametrize(
    "options", [{}, {"strength": 0.3}, {"label_smoothing": 0.1}, {"weight": [1.0, 2.0, 0.5]}], ids=str
)
def test_torch_s_derivative_is_that_of_differences(options):
    weight = torch.tensor(options["weight"], dtype=torch.double) if "weight" in options else None
    rest = {name: value for name, value in options.items() if name != "weight"}
    z = torch.tensor([[0.3, -1.0, 2.0], [5.0, 0.0, 0.1]], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: posterior(x, weight, **rest), z)
    assert torch.func.vmap(lambda x: posterior(x, weight, **rest))(z.detach()).shape == z.shape


NOTHING = [[math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, -math.inf]]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_row_that_says_nothing_is_nan_and_an_absent_class_has_probability_0(strength):
    for dtype in (np.float32, np.float64):
        z = np.array([*NOTHING, [-math.inf, 0.0], [1000.0, 0.0]], dtype)
        by_torch = posterior(torch.tensor(z, requires_grad=True), strength=strength).detach().numpy()
        for got in (ext.posterior(z, strength=strength), by_torch):
            assert np.isnan(got[:4]).all()
            assert got[4:].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_a_half_type_is_computed_in_float32():
    z = torch.tensor([[0.0, 2.0, -3.0]], dtype=torch.bfloat16)
    assert posterior(z).dtype == torch.bfloat16
    assert torch.equal(posterior(z), posterior(z.float().requires_grad_()).bfloat16())


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"weight": [0.0, 1.0]}, r"weight must be positive and finite for a posterior"),
        ({"weight": [math.nan, 1.0]}, r"weight must be positive and finite for a posterior"),
        ({"weight": [-1.0, 1.0]}, r"weight must be positive and finite for a posterior"),
        ({"weight": [1.0]}, r"weight must have one value for each of the 2 classes, got shape \(1,\)"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1"),
        ({"strength": 1.5}, r"strength must be in \[0, 1\], got 1.5"),
    ],
    ids=str,
)
def test_what_has_no_probabilities_is_refused_with_the_rule(bad, message):
    with pytest.raises(ValueError, match=message):
        ext.posterior(np.zeros((3, 2), np.float32), **bad)
    tensors = {name: torch.tensor(value) if name == "weight" else value for name, value in bad.items()}
    for input in (torch.zeros(3, 2), torch.zeros(3, 2, requires_grad=True)):
        with pytest.raises(ValueError, match=message):
            posterior(input, **tensors)


def test_weights_too_far_apart_for_the_kernel_are_refused():
    with pytest.raises(ValueError, match=r"no more than a factor of 2\^60 apart"):
        ext.posterior(np.zeros(2, np.float32), weight=[1e-30, 1e30])


@pytest.mark.parametrize("values", [[[1, 2]], 3.0, np.zeros((3, 0)), [[True, False]]], ids=str)
def test_what_are_no_logits_is_refused(values):
    with pytest.raises((TypeError, ValueError), match="logits must be"):
        ext.posterior(values)
    with pytest.raises((TypeError, ValueError), match="logits must be"):
        posterior(torch.tensor(values))
