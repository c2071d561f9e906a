"""A device's kernel runs wherever its result is right, the composite form elsewhere; derivatives are right on both.

The witness is `ref`: its gradient for what is a first derivative, its Hessian-vector product for a second one.
"""

import shutil
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from tolerances import COMPOSITE
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from lace_loss import ref
from lace_loss.ext import _cpu
from lace_loss.ext.torch import LACELoss, cpu, gpu, lace_loss

torch.manual_seed(0)
INPUT, VECTOR = 3 * torch.randn(4, 5, dtype=torch.double), torch.randn(4, 5, dtype=torch.double)
CLASSES, PROBABILITIES = torch.tensor([0, 4, 1, 2]), torch.rand(4, 5, dtype=torch.double).softmax(1)
WEIGHT = torch.rand(5, dtype=torch.double)

compile_options = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


class Problem:
    """Four samples on a device, in float64 or, for the kernels of a GPU, in float32; and what `ref` makes of them."""

    def __init__(self, device, dtype):
        self.device = device
        self.bound = COMPOSITE["float64" if dtype == torch.double else "float32"]
        given = (INPUT, VECTOR, WEIGHT, PROBABILITIES)
        self.input, self.vector, self.weight, self.probabilities = (x.to(device, dtype, copy=True) for x in given)
        self.classes = CLASSES.to(device)
        z, v = self.input.double().cpu().numpy(), self.vector.double().cpu().numpy()
        self.value, self.gradient = ref.forward(z, CLASSES), ref.backward(z, CLASSES)
        self.product, self.slope = ref.hessian_vector_product(z, CLASSES, v), (self.gradient * v).sum()

    def loss(self, z):
        return lace_loss(z, self.classes)

    def leaf(self):
        return self.input.clone().requires_grad_()

    def is_near(self, got, wanted):
        wanted = torch.as_tensor(wanted, dtype=torch.double).detach().cpu()
        return torch.allclose(got.detach().double().cpu(), wanted, rtol=self.bound, atol=self.bound)


@pytest.fixture
def at(device):
    return Problem(device, torch.float if gpu.on_gpu(torch.empty(0, device=device)) else torch.double)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Grows by one whenever a kernel runs."""
    calls, job = [], _cpu.KernelCall
    monkeypatch.setattr(_cpu, "KernelCall", lambda *args: calls.append(1) or job(*args))
    launch = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda *args: calls.append(1) or launch(*args))
    torch.compiler.reset()
    return calls


def first(at):
    z = at.leaf()
    return torch.autograd.grad(at.loss(z), z)[0]


def second(at):
    z = at.leaf()
    (gradient,) = torch.autograd.grad(at.loss(z), z, create_graph=True)
    return torch.autograd.grad(gradient, z, at.vector)[0]


def checkpointed(at, use_reentrant):
    z = at.leaf()
    checkpoint(at.loss, z, use_reentrant=use_reentrant).backward()
    return z.grad


def no_grad(at):
    with torch.no_grad():
        return at.loss(at.leaf())


def exported(at, strict):
    return torch.export.export(LACELoss(), (at.input, at.classes), strict=strict).module()(at.input, at.classes)


def hessian(at):
    return torch.einsum("ijkl,kl->ij", torch.func.hessian(at.loss)(at.input), at.vector)


def jvp(function, at):
    return torch.func.jvp(function, (at.input,), (at.vector,))[1]


# What is computed, and which of the problem's results it is.
BY_KERNEL = {
    "the loss": (lambda at: at.loss(at.input), "value"),
    "a parameter": (lambda at: at.loss(torch.nn.Parameter(at.input)), "value"),
    "no_grad": (no_grad, "value"),
    "backward": (first, "gradient"),
    "a second derivative": (second, "product"),
    "checkpointing": (lambda at: checkpointed(at, False), "gradient"),
    "reentrant checkpointing": (lambda at: checkpointed(at, True), "gradient"),
    "jacobian": (lambda at: torch.autograd.functional.jacobian(at.loss, at.input), "gradient"),
    "hvp": (lambda at: torch.autograd.functional.hvp(at.loss, at.input, at.vector)[1], "product"),
    "make_fx": (lambda at: make_fx(lambda z: at.loss(z))(at.input)(at.input), "value"),
}
BY_COMPOSITE = {
    "func.grad": (lambda at: torch.func.grad(at.loss)(at.input), "gradient"),
    "jacrev": (lambda at: torch.func.jacrev(at.loss)(at.input), "gradient"),
    "jacfwd": (lambda at: torch.func.jacfwd(at.loss)(at.input), "gradient"),
    "vmap": (lambda at: torch.func.vmap(lace_loss)(at.input, at.classes).mean(), "value"),
    "vmap of grad": (lambda at: torch.func.vmap(torch.func.grad(lace_loss))(at.input, at.classes) / 4, "gradient"),
    "hessian": (hessian, "product"),
    "jvp": (lambda at: jvp(at.loss, at), "slope"),
    "jvp of grad": (lambda at: jvp(torch.func.grad(at.loss), at), "product"),
    "export": (lambda at: exported(at, strict=False), "value"),
    "strict export": (lambda at: exported(at, strict=True), "value"),
    "jit.trace": (lambda at: torch.jit.trace(at.loss, at.input, check_trace=False)(at.input), "value"),
}


@pytest.mark.parametrize(("compute", "result"), BY_KERNEL.values(), ids=BY_KERNEL.keys())
def test_the_kernel_serves(compute, result, at, kernel_calls):
    got = compute(at)
    assert kernel_calls
    assert at.is_near(got, getattr(at, result))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace` is deprecated",
    "ignore::torch.jit.TracerWarning",
)
@pytest.mark.parametrize(("compute", "result"), BY_COMPOSITE.values(), ids=BY_COMPOSITE.keys())
def test_the_composite_form_serves(compute, result, at, kernel_calls):
    got = compute(at)
    assert not kernel_calls
    assert at.is_near(got, getattr(at, result))


def test_forward_mode_gives_a_tangent(at, kernel_calls):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(at.input, at.vector)
        tangent = forward_ad.unpack_dual(at.loss(dual)).tangent
    assert not kernel_calls
    assert at.is_near(tangent, at.slope)
    with forward_ad.dual_level():
        weight = forward_ad.make_dual(at.weight, at.vector[0])
        tangent = forward_ad.unpack_dual(lace_loss(at.input, at.classes, weight, reduction="sum")).tangent
    by_class = torch.tensor(ref.forward(at.input.cpu(), CLASSES, reduction="none"))
    assert at.is_near(tangent, (at.vector[0].cpu()[CLASSES] * by_class).sum())


def test_a_kernel_that_met_a_tangent_would_refuse_and_not_drop_it(at):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        options = (-100, "mean", 0.0, 1.0)
        loss = gpu.OnGPU if gpu.on_gpu(at.input) else cpu.OnCPU
        loss.apply(forward_ad.make_dual(at.leaf(), at.vector), at.classes, None, options, False)


def test_derivatives_with_respect_to_targets_and_weights_are_there(device, kernel_calls):
    at = Problem(device, torch.double)
    y, w = at.probabilities.requires_grad_(), at.weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w: lace_loss(at.input, y, w, label_smoothing=0.1), (y, w))
    assert torch.autograd.gradcheck(lambda w: lace_loss(at.input, at.classes, w), w)
    assert not kernel_calls


def test_the_kernel_serves_half_types_and_on_a_cpu_mixed_probabilities(at, kernel_calls):
    on_gpu = gpu.on_gpu(at.input)
    for dtype in (torch.float16, torch.bfloat16):
        for target in (at.classes, at.probabilities.to(dtype), at.probabilities.float()):
            lace_loss(at.input.to(dtype).requires_grad_(), target).backward()
            assert bool(kernel_calls) == (target is at.classes or not on_gpu)
            kernel_calls.clear()
    mixed = lace_loss(at.input.float(), at.probabilities.double())
    assert not kernel_calls
    assert mixed.dtype == torch.double


@compile_options
def test_compiled_backward_calls_the_kernel_in_one_graph(dynamic, at, kernel_calls):
    compiled = torch.compile(LACELoss(), fullgraph=True, dynamic=dynamic)
    for n in (4, 3, 2):  # dynamic: the sizes are symbols
        z = at.input[:n].clone().requires_grad_()
        compiled(z, at.classes[:n]).backward()
        assert at.is_near(z.grad, ref.backward(at.input[:n].cpu(), CLASSES[:n]))
    assert kernel_calls


@compile_options
@pytest.mark.parametrize("options", [{"normalizer": 3}, {"normalizer": torch.tensor(3.0)}, {"statistics": True}])
def test_a_compiled_loss_takes_what_goes_beyond_torch(options, dynamic, at, kernel_calls):
    def gradient_of(call, n):
        z = at.input[:n].clone().requires_grad_()
        loss = call(z, at.classes[:n], **options)
        loss, found = loss if "statistics" in options else (loss, {})
        return [*torch.autograd.grad(loss, z), loss.detach(), *found.values()]

    module = LACELoss(at.weight, label_smoothing=0.1)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 3, 2):
        for got, expected in zip(gradient_of(compiled, n), gradient_of(module, n), strict=True):
            assert at.is_near(got, expected)
    assert kernel_calls


def test_a_gradient_of_a_compiled_loss_is_the_caller_s_own(at, kernel_calls):
    compiled = torch.compile(lace_loss, fullgraph=True, backend="aot_eager")
    for options in ({}, {"reduction": "none"}, {"weight": at.weight, "label_smoothing": 0.1}):
        z = at.leaf()
        loss = compiled(z, at.classes, **options).sum()
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        once = gradient.clone()
        gradient.mul_(2)
        loss.backward()
        assert torch.equal(z.grad, once)
    assert kernel_calls


@pytest.mark.parametrize("ignored", [2**63 - 1, -(2**63)])
def test_either_end_of_64_bits_may_be_ignored_in_compiled_and_exported_graphs(ignored, at):
    target = torch.tensor([0, ignored, 1, -1 - ignored], device=at.device)

    class PerSample(torch.nn.Module):
        def forward(self, z, t):
            return torch.func.vmap(lambda z, t: lace_loss(z, t, ignore_index=ignored, reduction="sum"))(z, t)

    backends = ["aot_eager", "inductor"] if any(map(shutil.which, ("c++", "g++", "clang++"))) else ["aot_eager"]
    calls = [torch.compile(PerSample(), backend=backend) for backend in backends]
    for call in (PerSample(), *calls, torch.export.export(PerSample(), (at.input, target)).module()):
        losses = call(at.input, target)
        assert losses.isnan().tolist() == [False, False, False, True]
        assert losses[1] == 0
        wanted = torch.tensor(ref.forward(at.input[::2].cpu(), [0, 1], reduction="none"))
        assert at.is_near(losses[::2], wanted)


@compile_options
@pytest.mark.parametrize("what", ["func.grad", "vmap of grad", "hessian", "jvp"])
def test_compiled_transforms_agree_with_eager_ones(what, dynamic, at, kernel_calls):
    function, arguments = {
        "func.grad": (torch.func.grad(lace_loss), (at.input, at.classes)),
        "vmap of grad": (torch.func.vmap(torch.func.grad(lace_loss)), (at.input, at.classes)),
        "hessian": (torch.func.hessian(lace_loss), (at.input, at.classes)),
        "jvp": (lambda z, v: torch.func.jvp(at.loss, (z,), (v,))[1], (at.input, at.vector)),
    }[what]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert at.is_near(compiled(*arguments), function(*arguments))
    assert not kernel_calls


def test_a_bad_class_is_nan_where_a_composite_or_on_a_gpu_is_compiled_and_refused_by_the_kernel_of_a_cpu(at):
    bad = torch.tensor([0, 5, 1, 2], device=at.device)
    compiled = torch.compile(lace_loss, fullgraph=True, backend="aot_eager")
    z, spoilt = at.leaf(), [False, True, False, False]
    if gpu.on_gpu(z):
        assert torch.autograd.grad(compiled(z, bad), z)[0].isnan().any(1).tolist() == spoilt
    else:
        with pytest.raises(IndexError, match=r"target\[1\] is 5, not a class: 0 to 4"):
            compiled(z, bad)
    per_sample = torch.compile(torch.func.vmap(torch.func.grad(lace_loss)), fullgraph=True, backend="aot_eager")
    assert per_sample(at.input, bad).isnan().any(1).tolist() == spoilt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_registered_operation_passes_opcheck(dtype):
    """On a CPU; those of a GPU are in test_gpu.py."""
    images = INPUT.reshape(1, 5, 2, 2)
    for input in (INPUT[0], INPUT, images, images.contiguous(memory_format=torch.channels_last)):
        z, samples = input.to(dtype), input.shape[: input.dim() > 1] + input.shape[2:]
        for target in (torch.zeros(samples, dtype=torch.long), z.softmax(min(1, input.dim() - 1))):
            for reduction, shape in (("none", samples), ("mean", ())):
                for seed in (None, torch.ones(shape, dtype=dtype)):
                    options = (seed is not None, -100, reduction, 0.1, 1.0, target.dim() < input.dim())
                    torch.library.opcheck(cpu.registered, (z, target, WEIGHT.to(dtype), seed, *options))


def test_the_registered_operation_by_itself_refuses_derivatives(at):
    compute, *more = (gpu.registered_forward,) if gpu.on_gpu(at.input) else (cpu.registered, None)
    bare, *_ = compute(at.leaf(), at.classes, None, *more, False, -100, "mean", 0.0, 1.0, False)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        bare.backward()


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_meta_and_fake_tensors_have_the_shape_and_dtype_of_the_real_result(kind, at):
    fake_mode = torch._subclasses.FakeTensorMode()
    for dtype, reduction in product((torch.float64, torch.float32, torch.bfloat16), ("none", "mean")):
        real = (at.input.to(dtype), at.classes if kind == "classes" else at.probabilities.to(dtype))
        loss = lace_loss(*real, reduction=reduction)
        for convert, mode in ((lambda x: x.to("meta"), nullcontext()), (fake_mode.from_tensor, fake_mode)):
            z, y = map(convert, real)
            with mode:
                other = lace_loss(z.requires_grad_(), y, reduction=reduction)
                (gradient,) = torch.autograd.grad(other.sum(), z)
            assert (other.shape, other.dtype) == (loss.shape, dtype)
            assert (gradient.shape, gradient.dtype) == (z.shape, dtype)


def test_a_subclass_of_tensor_keeps_its_class_and_may_take_the_call_over(at):
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

    assert type(at.loss(at.input.as_subclass(Named))) is Named
    assert at.loss(at.input.as_subclass(Greedy)) == "lace_loss"
    value, statistics = lace_loss(at.input.as_subclass(Named), at.classes, statistics=True)
    assert at.is_near(value.as_subclass(torch.Tensor), at.value)
    assert statistics["rank"].shape == (4,)
