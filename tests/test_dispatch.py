"""The C kernel runs wherever its result is right, the composite form elsewhere; derivatives are right on both.

The witness is `ref`: its gradient for what is a first derivative, its Hessian-vector product for a second one.
"""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from tolerances import COMPOSITE
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from lace_loss import ext, ref
from lace_loss.ext import torch as lace_torch
from lace_loss.ext.torch import LACELoss, lace_loss

torch.manual_seed(0)
INPUT, VECTOR = 3 * torch.randn(4, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
CLASSES, PROBABILITIES = torch.tensor([0, 4, 1, 2]), torch.rand(4, 5, dtype=torch.double).softmax(1)
WEIGHT = torch.rand(5, dtype=torch.double)
GRADIENT = torch.tensor(ref.backward(INPUT, CLASSES))
PRODUCT = torch.tensor(ref.hessian_vector_product(INPUT, CLASSES, VECTOR))
LOSS, SLOPE = torch.tensor(ref.forward(INPUT, CLASSES), dtype=torch.double), (GRADIENT * VECTOR).sum()

compile_options = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@pytest.fixture
def kernel_calls(monkeypatch):
    """Grows by one whenever the C kernel runs."""
    calls = []
    monkeypatch.setattr(lace_torch, "_in_threads", lambda *args: calls.append(1) or ext._in_threads(*args))
    torch.compiler.reset()
    return calls


def loss(z):
    return lace_loss(z, CLASSES)


def leaf(input=INPUT):
    return input.detach().clone().requires_grad_()


def gradient(loss_of, z=None):
    z = leaf() if z is None else z
    return torch.autograd.grad(loss_of(z), z)[0]


def second(loss_of):
    z = leaf()
    (first,) = torch.autograd.grad(loss_of(z), z, create_graph=True)
    return torch.autograd.grad(first, z, VECTOR)[0]


def checkpointed(use_reentrant):
    z = leaf()
    checkpoint(loss, z, use_reentrant=use_reentrant).backward()
    return z.grad


def no_grad(z):
    with torch.no_grad():
        return loss(z)


BY_KERNEL = {
    "the loss": (lambda: loss(INPUT), LOSS),
    "a parameter": (lambda: loss(torch.nn.Parameter(INPUT)), LOSS),
    "no_grad": (lambda: no_grad(leaf()), LOSS),
    "backward": (lambda: gradient(loss), GRADIENT),
    "a second derivative": (lambda: second(loss), PRODUCT),
    "checkpointing": (lambda: checkpointed(False), GRADIENT),
    "reentrant checkpointing": (lambda: checkpointed(True), GRADIENT),
    "jacobian": (lambda: torch.autograd.functional.jacobian(loss, INPUT), GRADIENT),
    "hvp": (lambda: torch.autograd.functional.hvp(loss, INPUT, VECTOR)[1], PRODUCT),
    "make_fx": (lambda: make_fx(loss)(INPUT)(INPUT), LOSS),
}
BY_COMPOSITE = {
    "func.grad": (lambda: torch.func.grad(loss)(INPUT), GRADIENT),
    "jacrev": (lambda: torch.func.jacrev(loss)(INPUT), GRADIENT),
    "jacfwd": (lambda: torch.func.jacfwd(loss)(INPUT), GRADIENT),
    "vmap": (lambda: torch.func.vmap(lace_loss)(INPUT, CLASSES).mean(), LOSS),
    "vmap of grad": (lambda: torch.func.vmap(torch.func.grad(lace_loss))(INPUT, CLASSES) / 4, GRADIENT),
    "hessian": (
        lambda: torch.einsum("ijkl,kl->ij", torch.func.hessian(loss)(INPUT), VECTOR),
        PRODUCT,
    ),
    "jvp": (lambda: torch.func.jvp(loss, (INPUT,), (VECTOR,))[1], SLOPE),
    "jvp of grad": (lambda: torch.func.jvp(torch.func.grad(loss), (INPUT,), (VECTOR,))[1], PRODUCT),
    "export": (lambda: exported(strict=False)(INPUT, CLASSES), LOSS),
    "strict export": (lambda: exported(strict=True)(INPUT, CLASSES), LOSS),
    "jit.trace": (lambda: traced()(INPUT), LOSS),
}


def exported(strict):
    return torch.export.export(LACELoss(), (INPUT, CLASSES), strict=strict).module()


def traced():
    return torch.jit.trace(loss, INPUT, check_trace=False)


@pytest.mark.parametrize(("compute", "expected"), BY_KERNEL.values(), ids=BY_KERNEL.keys())
def test_the_kernel_serves(compute, expected, kernel_calls):
    got = compute()
    assert kernel_calls
    assert torch.allclose(got, expected, rtol=COMPOSITE["float64"], atol=COMPOSITE["float64"])


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace` is deprecated",
    "ignore::torch.jit.TracerWarning",
)
@pytest.mark.parametrize(("compute", "expected"), BY_COMPOSITE.values(), ids=BY_COMPOSITE.keys())
def test_the_composite_form_serves(compute, expected, kernel_calls):
    got = compute()
    assert not kernel_calls
    assert torch.allclose(got, expected, rtol=COMPOSITE["float64"], atol=COMPOSITE["float64"])


def test_forward_mode_gives_a_tangent(kernel_calls):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(INPUT, VECTOR)
        tangent = forward_ad.unpack_dual(loss(dual)).tangent
    assert not kernel_calls
    assert torch.allclose(tangent, SLOPE, rtol=COMPOSITE["float64"])
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(WEIGHT, VECTOR[0])
        tangent = forward_ad.unpack_dual(lace_loss(INPUT, CLASSES, weight, reduction="sum")).tangent
    by_class = torch.tensor(ref.forward(INPUT, CLASSES, reduction="none"))
    assert torch.allclose(tangent, (VECTOR[0][CLASSES] * by_class).sum(), rtol=COMPOSITE["float64"])


def test_a_kernel_that_met_a_tangent_would_refuse_and_not_drop_it():
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        options = (-100, "mean", 0.0, 1.0)
        lace_torch._Kernel.apply(forward_ad.make_dual(leaf(), VECTOR), CLASSES, None, options, False, False)


def test_derivatives_with_respect_to_targets_and_weights_are_there(kernel_calls):
    y, w = leaf(PROBABILITIES), leaf(WEIGHT)
    assert torch.autograd.gradcheck(lambda y, w: lace_loss(INPUT, y, w, label_smoothing=0.1), (y, w))
    assert torch.autograd.gradcheck(lambda w: lace_loss(INPUT, CLASSES, w), w)
    assert not kernel_calls


def test_the_kernel_serves_half_types_and_mixed_probabilities(kernel_calls):
    for dtype in (torch.float16, torch.bfloat16):
        for target in (CLASSES, PROBABILITIES.to(dtype), PROBABILITIES.float()):
            lace_loss(leaf(INPUT.to(dtype)), target).backward()
            assert kernel_calls
            kernel_calls.clear()
    mixed = lace_loss(INPUT.float(), PROBABILITIES)
    assert not kernel_calls
    assert mixed.dtype == torch.double


@compile_options
def test_compiled_backward_calls_the_kernel_in_one_graph(dynamic, kernel_calls):
    z = leaf()
    compiled = torch.compile(LACELoss(), fullgraph=True, dynamic=dynamic)
    for n in (4, 3, 2):  # dynamic: the sizes are symbols
        z = leaf(INPUT[:n])
        compiled(z, CLASSES[:n]).backward()
        expected = torch.tensor(ref.backward(INPUT[:n], CLASSES[:n]))
        assert torch.allclose(z.grad, expected, rtol=COMPOSITE["float64"])
    assert kernel_calls


@compile_options
@pytest.mark.parametrize("options", [{"normalizer": 3}, {"normalizer": torch.tensor(3.0)}, {"statistics": True}])
def test_a_compiled_loss_takes_what_goes_beyond_torch(options, dynamic, kernel_calls):
    def gradient_of(call, n):
        z = leaf(INPUT[:n])
        loss = call(z, CLASSES[:n], **options)
        loss, found = loss if "statistics" in options else (loss, {})
        return [*torch.autograd.grad(loss, z), loss.detach(), *found.values()]

    module = LACELoss(WEIGHT, label_smoothing=0.1)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 3, 2):
        for got, expected in zip(gradient_of(compiled, n), gradient_of(module, n), strict=True):
            assert torch.allclose(got, expected, rtol=COMPOSITE["float64"])
    assert kernel_calls


@compile_options
@pytest.mark.parametrize("what", ["func.grad", "vmap of grad", "hessian", "jvp"])
def test_compiled_transforms_agree_with_eager_ones(what, dynamic, kernel_calls):
    function, arguments = {
        "func.grad": (torch.func.grad(lace_loss), (INPUT, CLASSES)),
        "vmap of grad": (torch.func.vmap(torch.func.grad(lace_loss)), (INPUT, CLASSES)),
        "hessian": (torch.func.hessian(lace_loss), (INPUT, CLASSES)),
        "jvp": (lambda z, v: torch.func.jvp(loss, (z,), (v,))[1], (INPUT, VECTOR)),
    }[what]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.allclose(compiled(*arguments), function(*arguments), rtol=COMPOSITE["float64"])
    assert not kernel_calls


def test_a_compiled_composite_takes_a_bad_class_for_nan_and_a_compiled_kernel_refuses_it():
    bad = torch.tensor([0, 5, 1, 2])
    with pytest.raises(IndexError, match=r"target\[1\] is 5, not a class: 0 to 4"):
        torch.compile(lace_loss, fullgraph=True, backend="aot_eager")(leaf(), bad)
    per_sample = torch.compile(torch.func.vmap(torch.func.grad(lace_loss)), fullgraph=True, backend="aot_eager")
    assert per_sample(INPUT, bad).isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_registered_operation_passes_opcheck(dtype):
    images = INPUT.reshape(1, 5, 2, 2)
    for input in (INPUT[0], INPUT, images, images.contiguous(memory_format=torch.channels_last)):
        z, samples = input.to(dtype), input.shape[: input.dim() > 1] + input.shape[2:]
        for target in (torch.zeros(samples, dtype=torch.long), z.softmax(min(1, input.dim() - 1))):
            for reduction, shape in (("none", samples), ("mean", ())):
                for seed in (None, torch.ones(shape, dtype=dtype)):
                    options = (seed is not None, -100, reduction, 0.1, 1.0, target.dim() < input.dim())
                    torch.library.opcheck(lace_torch._registered, (z, target, WEIGHT.to(dtype), seed, *options))


def test_the_registered_operation_by_itself_refuses_derivatives():
    bare, *_ = lace_torch._registered(leaf(), CLASSES, None, None, False, -100, "mean", 0.0, 1.0, False)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        bare.backward()


@pytest.mark.parametrize("target", [CLASSES, PROBABILITIES], ids=["classes", "probabilities"])
def test_meta_and_fake_tensors_have_the_shape_and_dtype_of_the_real_result(target):
    fake_mode = torch._subclasses.FakeTensorMode()
    for dtype, reduction in product((torch.float64, torch.float32, torch.bfloat16), ("none", "mean")):
        real = (INPUT.to(dtype), target if target is CLASSES else target.to(dtype))
        loss = lace_loss(*real, reduction=reduction)
        for convert, mode in ((lambda x: x.to("meta"), nullcontext()), (fake_mode.from_tensor, fake_mode)):
            z, y = map(convert, real)
            with mode:
                other = lace_loss(z.requires_grad_(), y, reduction=reduction)
                (gradient,) = torch.autograd.grad(other.sum(), z)
            assert (other.shape, other.dtype) == (loss.shape, dtype)
            assert (gradient.shape, gradient.dtype) == (z.shape, dtype)


def test_a_subclass_of_tensor_keeps_its_class_and_may_take_the_call_over():
    class Named(torch.Tensor):
        pass

    class Greedy(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return (
                function.__name__
                if function is lace_loss
                else super().__torch_function__(function, types, args, kwargs)
            )

    assert type(lace_loss(INPUT.as_subclass(Named), CLASSES)) is Named
    assert lace_loss(INPUT.as_subclass(Greedy), CLASSES) == "lace_loss"
    value, statistics = lace_loss(INPUT.as_subclass(Named), CLASSES, statistics=True)
    assert torch.allclose(value, LOSS)
    assert statistics["rank"].shape == (4,)
