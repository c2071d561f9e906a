"""The torch module: derivatives of every kind, the choice of path, and the manners of CrossEntropyLoss."""

import copy
import inspect
import pickle

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


def test_backward_may_run_twice_on_a_retained_graph():
    input = INPUT.clone().requires_grad_()
    loss = lace_loss(input, CLASSES)
    loss.backward(retain_graph=True)
    once = input.grad.clone()
    loss.backward()
    assert torch.equal(input.grad, 2 * once)


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


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (600, 700), (2, 5, 3, 2)])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype, shape, target):
    samples = shape[: len(shape) > 1] + shape[2:]
    input = 3 * torch.randn(shape)
    target = torch.randint(5, samples) if target is CLASSES else torch.rand(shape)
    for reduction in ("none", "mean"):
        half = input.to(dtype).requires_grad_()
        loss = lace_loss(half, target.to(dtype) if target.dim() == len(shape) else target, reduction=reduction)
        grad_output = torch.randn_like(loss)
        loss.backward(grad_output)
        wide = half.detach().float().requires_grad_()
        wide_target = target.to(dtype).float() if target.dim() == len(shape) else target
        wide_loss = lace_loss(wide, wide_target, reduction=reduction)
        wide_loss.backward(grad_output.float())
        assert loss.dtype == half.grad.dtype == dtype
        assert torch.equal(loss, wide_loss.to(dtype))
        assert torch.allclose(half.grad, wide.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_signature_begins_as_cross_entropy_and_adds_strength():
    for ours, theirs in ((lace_loss, torch.nn.functional.cross_entropy), (LACELoss, torch.nn.CrossEntropyLoss)):
        mine = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
        torchs = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        assert mine[: len(torchs) + 1] == [*torchs, ("strength", 1.0)]


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
