"""Torch's own cases for cross_entropy: every sample that the installed torch tests itself with, through this loss.

At strength 0 the witness is cross_entropy itself, at strength 1 it is `ref`.
"""

import numpy as np
import pytest
import torch
from tolerances import COMPOSITE, FLOAT64
from torch.autograd import forward_ad
from torch_samples import DOUBLE, cases_of

from lace_loss import ref
from lace_loss.ext.torch import LACELoss, lace_loss

cross_entropy = torch.nn.functional.cross_entropy
OP, MODULE = cases_of("cross_entropy", torch.nn.CrossEntropyLoss)


def samples():
    """(name, input, target, options) of the function's and the module's cases."""
    torch.manual_seed(0)
    for i, sample in enumerate(OP.sample_inputs(**DOUBLE)):
        (target,) = sample.args
        yield f"function {i}", sample.input, target, sample.kwargs
    for case in MODULE.module_inputs_func(MODULE, **DOUBLE, training=True):
        input, target = case.forward_input.args
        yield f"module {case.desc}", input, target, case.constructor_input.kwargs


SAMPLES = list(samples())
each_sample = pytest.mark.parametrize(
    ("input", "target", "options"), [rest for _, *rest in SAMPLES], ids=[name for name, *_ in SAMPLES]
)


def derivatives(loss_of, input, seed, vector):
    """Loss, gradient, change of the gradient along the vector (exact zeros if it has none), tangent of the loss."""
    z = input.detach().clone().requires_grad_()
    loss = loss_of(z)
    (gradient,) = torch.autograd.grad(loss, z, seed, create_graph=True)
    product = torch.zeros_like(z)
    if gradient.requires_grad:
        (product,) = torch.autograd.grad(gradient, z, vector)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss_of(forward_ad.make_dual(input.detach(), vector))).tangent
    return [x.detach().numpy() for x in (loss, gradient, product, tangent)]


@each_sample
def test_at_strength_0_a_case_gives_what_cross_entropy_gives(input, target, options):
    target, options = detached(target, options)
    seed, vector = torch.randn_like(cross_entropy(input, target, **options)), torch.randn_like(input)
    ours = derivatives(lambda z: lace_loss(z, target, strength=0, **options), input, seed, vector)
    theirs = derivatives(lambda z: cross_entropy(z, target, **options), input, seed, vector)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert np.allclose(mine, wanted, rtol=COMPOSITE["float64"], atol=FLOAT64, equal_nan=True)


@each_sample
def test_at_strength_1_a_case_gives_what_ref_gives(input, target, options):
    target, options = detached(target, options)
    seed, vector = torch.randn_like(lace_loss(input, target, **options)), torch.randn_like(input)
    loss, gradient, product, tangent = derivatives(lambda z: lace_loss(z, target, **options), input, seed, vector)
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    arguments = (input.detach().numpy(), target.numpy())
    bound = COMPOSITE["float64"]
    expected = ref.backward(*arguments, seed.numpy(), **arrays)
    assert np.allclose(loss, ref.forward(*arguments, **arrays), rtol=bound, atol=0, equal_nan=True)
    assert np.allclose(gradient, expected, rtol=bound, atol=bound)
    wanted = ref.hessian_vector_product(*arguments, vector.numpy(), seed.numpy(), **arrays)
    assert np.allclose(product, wanted, rtol=bound, atol=bound)
    if not np.isnan(loss).any():
        assert np.isclose((tangent * seed.numpy()).sum(), (expected * vector.numpy()).sum(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_function_s_cases_in_other_dtypes_give_its_dtype_and_value(dtype, device):
    """Half types hold 2^-8 or 2^-11, and torch's own gradients a few units of that."""
    for sample in OP.sample_inputs(device, dtype, requires_grad=True):
        (target,) = sample.args
        target, options = detached(target, sample.kwargs)
        results = []
        for loss_of in (lambda z, t, **o: lace_loss(z, t, strength=0, **o), cross_entropy):
            z = sample.input.detach().clone().requires_grad_()
            loss = loss_of(z, target, **options)
            loss.sum().backward()
            results.append((loss.detach(), z.grad))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps, equal_nan=True
            )


def test_the_module_s_error_inputs_are_refused_by_the_same_type_and_words():
    if MODULE.module_error_inputs_func is None:
        pytest.skip(f"torch {torch.__version__} has none for CrossEntropyLoss")
    cases = MODULE.module_error_inputs_func(MODULE, **DOUBLE, training=True)
    assert cases
    for case in cases:
        build, call = case.module_error_input.constructor_input, case.module_error_input.forward_input
        with pytest.raises(case.error_type, match=case.error_regex):
            LACELoss(*build.args, **build.kwargs)(*call.args, **call.kwargs)


def detached(target, options):
    options = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return target.detach(), options
