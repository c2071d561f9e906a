"""The torch module: derivatives of every kind, the choice of path, and the manners of CrossEntropyLoss."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from tolerances import COMPOSITE

from lace_loss import ext, ref
from lace_loss.ext import torch as lace_torch
from lace_loss.ext.torch import LACELoss, lace_loss

torch.manual_seed(0)
INPUT = 3 * torch.randn(4, 5, dtype=torch.double)
CLASSES = torch.tensor([0, 4, -100, 2])
PROBABILITIES = torch.rand(4, 5, dtype=torch.double).softmax(1)

each_target = pytest.mark.parametrize("target", [CLASSES, PROBABILITIES], ids=["classes", "probabilities"])


@each_target
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_and_their_gradients_match_finite_differences(target, reduction):
    def loss(input):
        return lace_loss(input, target, reduction=reduction, label_smoothing=0.1, strength=0.7)

    input = INPUT.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, input)
    assert torch.autograd.gradgradcheck(loss, input)


def test_third_derivatives_exist():
    assert torch.autograd.gradgradcheck(
        lambda z: torch.autograd.grad(lace_loss(z, CLASSES), z, create_graph=True)[0], INPUT.clone().requires_grad_()
    )


@each_target
def test_functional_transforms_agree_with_the_reference(target):
    t = target.numpy()
    v = torch.randn_like(INPUT)
    bound = COMPOSITE["float64"]

    def loss(z):
        return lace_loss(z, target)

    gradient, product = ref.backward(INPUT, t), ref.hessian_vector_product(INPUT, t, v)
    assert np.allclose(torch.func.grad(loss)(INPUT), gradient, rtol=0, atol=bound)
    assert np.allclose(torch.func.jacrev(loss)(INPUT), gradient, rtol=0, atol=bound)
    assert np.isclose(torch.func.jvp(loss, (INPUT,), (v,))[1], (gradient * v.numpy()).sum(), rtol=0, atol=bound)
    assert np.allclose(torch.func.jvp(torch.func.grad(loss), (INPUT,), (v,))[1], product, rtol=0, atol=bound)
    hessian = torch.func.hessian(loss)(INPUT).reshape(20, 20)
    assert np.allclose(hessian @ v.reshape(20), product.reshape(20), rtol=0, atol=bound)
    rows = torch.func.vmap(torch.func.grad(lambda z, y: lace_loss(z, y, reduction="sum")))(INPUT, target)
    assert np.allclose(rows, ref.backward(INPUT, t, reduction="sum"), rtol=0, atol=bound)


def test_forward_mode_gives_a_tangent():
    v = torch.randn_like(INPUT)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(INPUT, v)
        tangent = torch.autograd.forward_ad.unpack_dual(lace_loss(dual, CLASSES)).tangent
    expected = (ref.backward(INPUT, CLASSES) * v.numpy()).sum()
    assert abs(tangent.item() - expected) <= COMPOSITE["float64"]


def test_backward_may_run_twice_on_a_retained_graph():
    input = INPUT.clone().requires_grad_()
    loss = lace_loss(input, CLASSES)
    loss.backward(retain_graph=True)
    once = input.grad.clone()
    loss.backward()
    assert torch.equal(input.grad, 2 * once)


def test_the_kernel_runs_where_only_the_input_needs_a_gradient_on_a_cpu(monkeypatch):
    calls = []
    monkeypatch.setattr(lace_torch, "_run", lambda *args, **options: calls.append(1) or ext._run(*args, **options))

    def uses_kernel(function):
        calls.clear()
        function()
        return bool(calls)

    assert uses_kernel(lambda: lace_loss(INPUT, CLASSES))
    assert uses_kernel(
        lambda: lace_loss(INPUT.float().requires_grad_(), CLASSES, INPUT[0].float(), label_smoothing=0.1)
    )
    assert uses_kernel(lambda: lace_loss(torch.nn.Parameter(INPUT), CLASSES))
    assert uses_kernel(lambda: lace_loss(INPUT, PROBABILITIES))
    assert not uses_kernel(lambda: lace_loss(INPUT, PROBABILITIES.clone().requires_grad_()))
    assert not uses_kernel(lambda: lace_loss(INPUT, PROBABILITIES.float()))
    assert not uses_kernel(lambda: lace_loss(INPUT.half(), CLASSES))
    assert not uses_kernel(lambda: lace_loss(INPUT, CLASSES, INPUT[0].clone().requires_grad_()))
    assert not uses_kernel(lambda: lace_loss(INPUT.to("meta"), CLASSES.to("meta")))
    assert not uses_kernel(lambda: torch.func.grad(lambda z: lace_loss(z, CLASSES))(INPUT))


def test_the_kernel_reads_tensors_without_a_copy(monkeypatch):
    seen = []
    monkeypatch.setattr(
        lace_torch,
        "_run",
        lambda z, y, g, *rest, **options: seen.extend((z, y, g)) or ext._run(z, y, g, *rest, **options),
    )
    input = INPUT.clone().requires_grad_()
    lace_loss(input, CLASSES).backward()
    assert seen[0].ctypes.data == input.data_ptr()
    assert seen[1].ctypes.data == CLASSES.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype):
    input = INPUT.to(dtype).requires_grad_()
    loss = lace_loss(input, CLASSES)
    loss.backward()
    wide = input.detach().float().requires_grad_()
    wide_loss = lace_torch._composite(
        wide, CLASSES, None, ignore_index=-100, reduction="mean", label_smoothing=0.0, strength=1.0
    )
    wide_loss.backward()
    assert loss.dtype == input.grad.dtype == dtype
    assert loss == wide_loss.to(dtype)
    assert torch.equal(input.grad, wide.grad.to(dtype))


def test_the_signature_begins_as_cross_entropy_and_adds_strength():
    for ours, theirs in ((lace_loss, torch.nn.functional.cross_entropy), (LACELoss, torch.nn.CrossEntropyLoss)):
        mine = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
        assert mine == [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()] + [
            ("strength", 1.0)
        ]


def test_the_module_is_the_function_and_travels():
    weight = torch.rand(5, dtype=torch.double)
    module = LACELoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1, strength=0.5)
    expected = lace_loss(INPUT, CLASSES.clamp(min=0), weight, None, 2, None, "sum", 0.1, strength=0.5)
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again(INPUT, CLASSES.clamp(min=0)) == expected
    assert list(module.state_dict()) == ["weight"]
    assert list(LACELoss().state_dict()) == []


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_the_deprecated_arguments_choose_the_reduction_as_in_torch():
    for size_average in (None, True, False):
        for reduce in (None, True, False):
            theirs = torch.nn.functional.cross_entropy(INPUT, CLASSES, None, size_average, -100, reduce)
            ours = lace_loss(INPUT, CLASSES, None, size_average, -100, reduce, strength=0)
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, rtol=1e-13)


def test_hooks_run_once_when_a_second_derivative_may_follow():
    for create_graph in (False, True):
        input = INPUT.clone().requires_grad_()
        input.register_hook(lambda gradient: 2 * gradient)
        (gradient,) = torch.autograd.grad(lace_loss(input, CLASSES), input, create_graph=create_graph)
        assert torch.allclose(gradient, 2 * torch.tensor(ref.backward(INPUT, CLASSES)), rtol=COMPOSITE["float64"])


def test_an_ignored_sample_has_gradient_0_even_below_an_infinite_one():
    input = INPUT.clone().requires_grad_()
    lace_loss(input, CLASSES, reduction="none").sqrt().sum().backward()
    assert (input.grad[CLASSES == -100] == 0).all()
    assert input.grad.isfinite().all()


def test_half_weights_add_up_in_float32():
    """70,000 weights of up to 4 sum to more than float16 holds."""
    input, target = torch.randn(70_000, 4).half(), torch.arange(70_000) % 4
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = ref.forward(input.numpy(), target.numpy(), weight=weight.numpy())
    assert abs(lace_loss(input, target, weight.half()).item() - expected) <= 2.0**-11 * expected
