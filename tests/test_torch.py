"""The torch module: derivatives of every kind, the choice of path, and the manners of CrossEntropyLoss."""

import copy
import inspect
import pickle
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from tolerances import COMPOSITE, FLOAT32, FLOAT64

from lace_loss import ref
from lace_loss.ext import _cpu
from lace_loss.ext.torch import LACELoss, check_target, gpu, lace_loss

torch.manual_seed(0)
INPUT = 3 * torch.randn(4, 5, dtype=torch.double)
CLASSES = torch.tensor([0, 4, -100, 2])
PROBABILITIES = torch.rand(4, 5, dtype=torch.double).softmax(1)


def leaf(dtype=torch.double, device="cpu"):
    return INPUT.to(device, dtype, copy=True).requires_grad_()


each_precision = pytest.mark.parametrize("dtype", [torch.double, torch.float])
each_target = pytest.mark.parametrize("target", [CLASSES, PROBABILITIES], ids=["classes", "probabilities"])


@each_target
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradients_and_their_gradients_match_finite_differences(target, reduction, label_smoothing):
    def loss(input):
        return lace_loss(input, target, reduction=reduction, label_smoothing=label_smoothing, strength=0.7)

    input = leaf()
    assert torch.autograd.gradcheck(loss, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, input, check_fwd_over_rev=True, check_batched_grad=True)


@each_precision
@pytest.mark.parametrize("above", [1, 3])
@pytest.mark.parametrize("create_graph", [False, True])
def test_weights_of_1_change_no_bit(dtype, above, create_graph):
    results = []
    for weight in (None, torch.ones(5, dtype=dtype)):
        input = leaf(dtype)
        loss = lace_loss(input, CLASSES, weight, strength=0.7)
        (gradient,) = torch.autograd.grad(above * loss, input, create_graph=create_graph)
        second = torch.autograd.grad(gradient.square().sum(), input) if create_graph else ()
        results.append((loss, lace_loss(input.detach(), CLASSES, weight, strength=0.7), gradient, *second))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_a_batch_of_upstream_gradients_goes_through_either_vmap(dtype, device):
    input, seeds = leaf(dtype, device), torch.eye(4, dtype=dtype, device=device)
    loss = lace_loss(input, CLASSES.to(device), reduction="none")
    one_by_one = torch.stack([torch.autograd.grad(loss, input, seed, retain_graph=True)[0] for seed in seeds])
    (batched,) = torch.autograd.grad(loss, input, seeds, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda seed: torch.autograd.grad(loss, input, seed, retain_graph=True)[0])(seeds)
    for got in (batched, mapped):
        torch.testing.assert_close(got, one_by_one, rtol=2 * torch.finfo(dtype).eps + COMPOSITE["float64"], atol=1e-15)


def test_third_derivatives_exist():
    assert torch.autograd.gradgradcheck(
        lambda z: torch.autograd.grad(lace_loss(z, CLASSES), z, create_graph=True)[0], leaf()
    )


@pytest.mark.parametrize("above", [1, 3])
def test_backward_may_run_twice_on_a_retained_graph(above, device):
    for dtype in (torch.double, torch.float):
        input = leaf(dtype, device)
        loss = above * lace_loss(input, CLASSES.to(device))
        loss.backward(retain_graph=True)
        once = input.grad.clone()
        loss.backward()
        assert torch.equal(input.grad, 2 * once)


CHANGES = {
    "in place": lambda g: g.mul_(2),
    "its data": lambda g: g.data.fill_(7),
    "a view": lambda g: g[:1].zero_(),
    "as NumPy": lambda g: g.cpu().view(getattr(torch, f"int{8 * g.itemsize}")).numpy().fill(7),
}
CALLS = {
    "usual": {},
    "weighted": {"weight": torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])},
    "smoothed": {"label_smoothing": 0.1, "strength": 0.5},
    "statistics": {"statistics": True},
}


@each_target
@pytest.mark.parametrize("shape", [(4, 5), (5,), (1, 5, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float, torch.bfloat16])
@pytest.mark.parametrize("call", CALLS)
def test_a_gradient_is_the_caller_s_own_whose_changes_reach_no_later_backward(call, dtype, shape, target, device):
    if call == "statistics" and target is PROBABILITIES:
        pytest.skip("statistics are of class indices")
    options = {key: x.to(device, dtype) if key == "weight" else x for key, x in CALLS[call].items()}
    samples, axis = shape[: len(shape) > 1] + shape[2:], min(1, len(shape) - 1)
    n = int(np.prod(samples))
    if target is CLASSES:
        y = target[:n].reshape(samples).to(device)
    else:
        y = target[:n].reshape(*samples, 5).movedim(-1, axis).to(device, dtype)
    for reduction in ("none", "mean", "sum"):
        input = INPUT[:n].to(device, dtype).reshape(*samples, 5).movedim(-1, axis).clone().requires_grad_()
        loss = lace_loss(input, y, reduction=reduction, **options)
        loss = loss[0] if call == "statistics" else loss
        above = torch.ones_like(loss)
        wanted = torch.autograd.grad(loss, input, above, retain_graph=True)[0].clone()
        for change in CHANGES.values():
            (gradient,) = torch.autograd.grad(loss, input, above, retain_graph=True)
            assert torch.equal(gradient, wanted)
            change(gradient)
        hook = input.register_hook(lambda gradient: gradient.fill_(7))
        loss.backward(above, retain_graph=True)
        hook.remove()
        input.grad = None
        loss.backward(above, retain_graph=True)
        assert torch.equal(input.grad, wanted)
        input.grad.zero_()
        loss.backward(above)
        assert torch.equal(input.grad, wanted)


def test_a_gradient_changed_between_two_backward_passes_counts_as_for_cross_entropy(device):
    """With a graph of its own, and with the graph gone."""
    for loss_of in (torch.nn.functional.cross_entropy, lambda z, t: lace_loss(z, t, strength=0)):
        results = []
        for create_graph in (False, True):
            input = leaf(torch.float, device)
            loss = loss_of(input, CLASSES.to(device))
            (gradient,) = torch.autograd.grad(loss, input, create_graph=create_graph, retain_graph=True)
            gradient.mul_(2)
            loss.backward()
            results.append((gradient.detach(), input.grad))
        input = leaf(torch.float, device)
        (gradient,) = torch.autograd.grad(
            loss_of(input, CLASSES.to(device)), input, create_graph=True, retain_graph=False
        )
        results.append((2 * gradient.detach(), gradient.detach()))
        for doubled, once in results:
            torch.testing.assert_close(doubled, 2 * once, rtol=FLOAT32, atol=0)


@each_precision
@pytest.mark.parametrize("weight", [None, torch.ones(5)], ids=["usual", "weighted"])
def test_the_usual_backward_hands_out_the_very_gradient_that_the_forward_pass_formed(weight, dtype):
    places = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: places.append(x.data_ptr()) or x, lambda x: x):
        loss = lace_loss(input := leaf(dtype), CLASSES, None if weight is None else weight.to(dtype))
    loss.backward()
    assert input.grad.data_ptr() in places


def test_the_kernel_reads_tensors_without_a_copy(monkeypatch):
    seen = []
    job = _cpu.KernelCall
    monkeypatch.setattr(_cpu, "KernelCall", lambda *tensors: seen.extend(tensors[2:4]) or job(*tensors))
    input = leaf()
    lace_loss(input, CLASSES).backward()
    assert [x.data_ptr() for x in seen] == [input.data_ptr(), CLASSES.data_ptr()]


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (60, 700), (2, 5, 3, 2)])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype, shape, target, device):
    """On a GPU exponentials of half logits are a few ulp of float32 apart from those of float32 logits."""
    samples = shape[: len(shape) > 1] + shape[2:]
    input = 3 * torch.randn(shape, device=device)
    target = (torch.randint(5, samples) if target is CLASSES else torch.rand(shape)).to(device)
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
        eps = torch.finfo(dtype).eps if gpu.on_gpu(input) else 0
        torch.testing.assert_close(loss, wide_loss.to(dtype), rtol=eps, atol=0)
        assert torch.allclose(half.grad, wide.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_signature_begins_as_cross_entropy_and_adds_strength():
    for ours, theirs in ((lace_loss, torch.nn.functional.cross_entropy), (LACELoss, torch.nn.CrossEntropyLoss)):
        mine = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
        torchs = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        assert mine[: len(torchs) + 1] == [*torchs, ("strength", 1.0)]


@each_precision
def test_the_module_is_the_function_and_travels(dtype, device):
    input, target, weight = leaf(dtype, device), CLASSES.clamp(min=0).to(device), torch.rand(5).to(device, dtype)
    module = LACELoss(weight, ignore_index=2, reduction="sum", label_smoothing=0.1, strength=0.5)
    expected = lace_loss(input, target, weight, None, 2, None, "sum", 0.1, strength=0.5)
    for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again(input, target) == expected
    assert list(module.state_dict()) == ["weight"]
    assert list(LACELoss().state_dict()) == []


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@each_precision
def test_the_deprecated_arguments_choose_the_reduction_as_in_torch(dtype, device):
    input, target = leaf(dtype, device), CLASSES.to(device)
    for size_average in (None, True, False):
        for reduce in (None, True, False):
            theirs = torch.nn.functional.cross_entropy(input, target, None, size_average, -100, reduce)
            ours = lace_loss(input, target, None, size_average, -100, reduce, strength=0)
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, rtol=FLOAT64 if dtype == torch.double else FLOAT32)


@each_precision
def test_hooks_run_once_when_a_second_derivative_may_follow(dtype, device):
    for create_graph in (False, True):
        input = leaf(dtype, device)
        input.register_hook(lambda gradient: 2 * gradient)
        (gradient,) = torch.autograd.grad(lace_loss(input, CLASSES.to(device)), input, create_graph=create_graph)
        expected = 2 * torch.tensor(ref.backward(input.detach().cpu(), CLASSES))
        bound = COMPOSITE["float64" if dtype == torch.double else "float32"]
        assert torch.allclose(gradient.detach().double().cpu(), expected, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.bfloat16])
def test_an_ignored_sample_has_gradient_0_whatever_it_holds_and_whatever_comes_from_above(dtype, path, device):
    ignored, classes = CLASSES == -100, CLASSES.to(device)
    for above, reduction in product((torch.inf, torch.nan, 1.0), ("none", "mean", "sum")):
        input = INPUT.to(device, dtype, copy=True)
        input[ignored] = torch.nan
        input.requires_grad_()
        (lace_loss(input, classes, reduction=reduction) * above).sum().backward()
        assert (input.grad[ignored] == 0).all()
        assert input.grad[~ignored].isfinite().all() or above != 1
    input = leaf(dtype, device)
    lace_loss(input, torch.full((4,), -100, device=device), normalizer=0).backward()
    assert (input.grad == 0).all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@each_precision
def test_anomaly_mode_finds_no_nan_on_either_path(smoothing, dtype, device):
    weight = torch.rand(5).to(device, dtype)
    with torch.autograd.detect_anomaly():
        for w in (weight, weight.clone().requires_grad_()):
            input = leaf(dtype, device)
            loss = lace_loss(input, CLASSES.to(device), w, label_smoothing=smoothing)
            (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
            gradient.square().sum().backward()
            assert input.grad.isfinite().all()


def test_half_weights_add_up_in_float32(device):
    """70,000 weights of up to 4 sum to more than float16 holds."""
    input, target = torch.randn(70_000, 4).half().to(device), (torch.arange(70_000) % 4).to(device)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    expected = ref.forward(input.cpu().numpy(), target.cpu().numpy(), weight=weight.cpu().numpy())
    assert abs(lace_loss(input, target, weight.half()).item() - expected) <= 2.0**-11 * expected


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_statistics_are_what_log_softmax_and_a_stable_sort_give(shape, smoothing, path, device):
    axis = min(1, len(shape) - 1)
    for dtype in (torch.double, torch.float, torch.bfloat16):
        input = torch.randint(-3, 4, shape).to(device, dtype)  # with ties
        target = torch.randint(5, shape[:axis] + shape[axis + 1 :])
        target = (target if axis == 0 else target.index_fill(0, torch.tensor([1]), -100)).to(device)
        kept = target != -100
        loss, found = LACELoss(label_smoothing=smoothing)(input.requires_grad_(), target, statistics=True)
        loss.backward()
        assert loss == lace_loss(input, target, label_smoothing=smoothing)
        assert input.grad.isfinite().all()
        t = target.clamp(min=0).unsqueeze(axis)
        log_q = input.detach().double().log_softmax(axis).gather(axis, t).squeeze(axis)
        order = input.detach().double().argsort(stable=True, dim=axis, descending=True)
        rank = (order == t).long().argmax(axis)
        tolerance = COMPOSITE["float32" if path == "composite" and dtype != torch.double else "float64"]
        tolerance = max(tolerance, 1e-6) if dtype != torch.double else tolerance
        torch.testing.assert_close(found["cross_entropy"].double(), -log_q * kept, rtol=tolerance, atol=0)
        torch.testing.assert_close(found["probability"].double(), log_q.exp() * kept, rtol=tolerance, atol=0)
        assert torch.equal(found["rank"], rank.where(kept, 5))
        assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_is_never_a_right_answer_in_the_statistics(path, smoothing, device):
    nan, inf = torch.nan, torch.inf
    input = torch.tensor([[nan, 1.0, 2.0], [9.0, nan, 2.0], [inf, 0.0, 0.0], [0.0, inf, 0.0], [-inf, 0.0, 1.0]])
    target = torch.zeros(5, dtype=torch.long, device=device)
    _, found = lace_loss(input.to(device), target, statistics=True, label_smoothing=smoothing)
    assert found["rank"].tolist() == [2, 1, 0, 1, 2]
    assert found["cross_entropy"].isnan().tolist() == [True, True, True, True, False]
    assert found["probability"].isnan().tolist() == [True, True, True, True, False]
    assert found["cross_entropy"][4] == inf
    assert found["probability"][4] == 0


@each_target
@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.float16])
def test_a_normalizer_takes_the_place_of_the_mean_s_denominator(target, dtype, device):
    input = leaf(dtype, device)
    target = (target if target is CLASSES else target.to(dtype)).to(device)
    total = lace_loss(input.double(), target.double() if target.is_floating_point() else target, reduction="sum")
    for normalizer in (3, 2.5, torch.tensor(3), torch.tensor(2.5, dtype=torch.double)):
        input.grad = None
        loss = LACELoss()(input, target, normalizer=normalizer)
        loss.backward()
        (expected,) = torch.autograd.grad(total / normalizer, input, retain_graph=True)
        assert loss.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), (total / normalizer).double(), rtol=2 * eps, atol=0)
        torch.testing.assert_close(input.grad, expected, rtol=4 * eps, atol=4 * eps)


def test_a_normalizer_keeps_float16_sums_in_range_and_has_a_derivative():
    input, target = torch.zeros(70_000, 2, dtype=torch.float16), torch.zeros(70_000, dtype=torch.long)
    for loss in (lace_loss(input, target), lace_loss(input, target, normalizer=70_000)):
        assert loss == torch.tensor(np.log(2) / 2).half()
    normalizer = torch.tensor(3.0, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, n: lace_loss(z, CLASSES, normalizer=n), (leaf(), normalizer))


def test_seventy_thousand_float16_samples_have_the_right_gradient(device):
    """1/140,000 is below what float16 holds exactly: torch's own loss and gradient here are 0 on a CPU."""
    input = torch.zeros(70_000, 2, dtype=torch.float16, device=device, requires_grad=True)
    target = torch.zeros(70_000, dtype=torch.long, device=device)
    lace_loss(input, target).backward()
    expected = ref.backward(np.zeros((1, 2)), np.zeros(1, int))[0] / 70_000
    assert torch.equal(input.grad[123].cpu(), torch.tensor(expected).half())
    assert (input.grad == input.grad[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_float32_and_takes_float32_weights_as_for_cross_entropy(dtype, path, device):
    cross_entropy = torch.nn.functional.cross_entropy
    weight = torch.rand(5, device=device)
    for target in (CLASSES.to(device), PROBABILITIES.to(device, dtype), PROBABILITIES.float().to(device)):
        for w in (None, weight, weight.to(dtype)):
            results = []
            for loss_of in (lambda *a: lace_loss(*a, strength=0), cross_entropy):
                input = leaf(dtype, device)
                with torch.autocast(device, dtype=dtype):
                    loss = loss_of(input, target, w)
                loss.backward()
                results.append((loss, input.grad))
            (ours, our_gradient), (theirs, their_gradient) = results
            assert ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(our_gradient, their_gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    with torch.autocast(device, dtype=dtype):
        assert lace_loss(INPUT.to(device), CLASSES.to(device)).dtype == torch.double
        with pytest.raises(RuntimeError, match="expected scalar type Double but found Float"):
            lace_loss(INPUT.to(device), CLASSES.to(device), weight)


PEAK = """
import re, torch
from pathlib import Path
from lace_loss.ext.torch import lace_loss
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
def step(rows):
    input = torch.ones(rows, 2**11, dtype=torch.bfloat16, requires_grad=True)  # zeros may be no memory yet
    target = torch.zeros(rows, dtype=torch.long)
    before = peak()
    with torch.autocast("cpu"):
        loss = lace_loss(input, target)
    loss.backward()
    return peak() - before
step(512)  # torch loads what a first step needs: 10 to 45 MiB
print(step(2**14))
"""


def test_autocast_needs_no_memory_but_the_gradient():
    """64 MiB; a widened copy of the logits would take 128 more."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 60 < float(done.stdout) < 64 + 32


def test_on_a_gpu_a_class_that_does_not_exist_makes_its_own_sample_nan(device):
    input, target = leaf(torch.float, device), torch.tensor([0, 5, -100, 2**32], device=device)
    if not gpu.on_gpu(input):
        pytest.skip("refused on a CPU")
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(5, device=device)}):
        input.grad = None
        losses, found = lace_loss(input, target, reduction="none", statistics=True, **options)
        losses.sum().backward()
        for values in (losses, found["cross_entropy"], found["probability"], input.grad[:, 3]):
            assert values.isnan().tolist() == [False, True, False, True]
        assert input.grad.isnan().all(1).tolist() == [False, True, False, True]
        assert found["rank"][1:].tolist() == [5, 5, 5]
    with pytest.raises(IndexError, match=r"target\[1\] is 5, not a class: 0 to 4"):
        check_target(target, 5)


def test_a_class_that_does_not_exist_makes_its_own_sample_nan_where_it_cannot_be_refused():
    target = torch.tensor([0, 5, -100, -1])
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(5).double()}):
        for reduction in ("none", "sum"):

            def loss(z, options=options, reduction=reduction):
                return lace_loss(z, target, reduction=reduction, **options).sum()

            gradient = torch.func.grad(loss)(INPUT)
            assert gradient.isnan().all(1).tolist() == [False, True, False, True]
            assert gradient[0].isfinite().all()
            assert (gradient[2] == 0).all()
    with pytest.raises(IndexError, match=r"target\[1\] is 5, not a class: 0 to 4"):
        check_target(target, 5)
    check_target(torch.tensor([0, 4, -1]), 5, ignore_index=-1)


def test_the_gradient_is_the_same_to_the_bit_whether_or_not_a_second_may_follow(device):
    input = leaf(torch.float, device)
    loss = lace_loss(input, CLASSES.to(device))
    once, again = (
        torch.autograd.grad(loss, input, create_graph=create, retain_graph=True)[0] for create in (False, True)
    )
    assert torch.equal(once, again.detach())


def test_logits_changed_before_backward_are_refused_and_not_used(device):
    input = leaf(torch.float, device)
    logits = 1 * input
    loss = lace_loss(logits, CLASSES.to(device))
    logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_channels_last_logits_have_a_channels_last_gradient(device):
    images, target = torch.randn(2, 5, 3, 4, device=device), torch.randint(5, (2, 3, 4)).to(device)
    input = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    lace_loss(input, target).backward()
    plain = images.clone().requires_grad_()
    lace_loss(plain, target).backward()
    torch.testing.assert_close(input.grad, plain.grad)
    assert input.grad.is_contiguous(memory_format=torch.channels_last)


@each_precision
def test_views_with_the_negative_bit_are_read_right(dtype, device):
    input, target = leaf(dtype, device).detach(), CLASSES.to(device)
    view = torch.complex(input, input).conj().imag
    assert view.is_neg()
    results = []
    for z in (view, torch._neg_view(input), -input):
        loss = lace_loss(z := z.detach().requires_grad_(), target)
        results.append((loss.detach(), *torch.autograd.grad(loss, z)))
    assert all(torch.equal(a, c) and torch.equal(b, c) for a, b, c in zip(*results, strict=True))


@each_precision
def test_attributes_may_change_after_construction_as_torch_s_may(dtype, device):
    module = LACELoss()
    module.reduction, module.label_smoothing, module.ignore_index, module.strength = "sum", 0.1, 4, 0.5
    input, target = leaf(dtype, device), CLASSES.clamp(min=0).to(device)
    assert module(input, target) == lace_loss(input, target, None, None, 4, None, "sum", 0.1, strength=0.5)


OPTIONS_REFUSED = {
    "strength above 1": ({"strength": 2}, ValueError, r"strength must be in \[0, 1\], got 2"),
    "NaN as strength": ({"strength": np.nan}, ValueError, r"strength must be in \[0, 1\], got nan"),
    "text as strength": ({"strength": "1"}, TypeError, "strength must be a number, got '1'"),
    "a tensor as strength": ({"strength": torch.tensor(1.0)}, TypeError, "strength must be a number, not a Tensor"),
    "smoothing above 1": ({"label_smoothing": 2}, RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 2"),
    "text as smoothing": ({"label_smoothing": "0"}, TypeError, "label_smoothing must be a number, got '0'"),
    "no smoothing": ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got None"),
    "another reduction": ({"reduction": "avg"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
    "no reduction": ({"reduction": None}, ValueError, "reduction must be 'none', 'mean' or 'sum', got None"),
    "half an index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    "an index of 65 bits": ({"ignore_index": 2**63}, ValueError, f"64 bits with a sign, got {2**63}"),
    "an index below 64 bits": ({"ignore_index": -(2**63) - 1}, ValueError, f"64 bits with a sign, got {-(2**63) - 1}"),
    "an unknown option": ({"gamma": 2}, TypeError, "unexpected keyword argument 'gamma'"),
}


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS_REFUSED.values(), ids=OPTIONS_REFUSED.keys())
def test_options_are_refused_at_construction_as_at_a_call_and_as_by_cross_entropy(options, error, message):
    with pytest.raises(error, match=message):
        LACELoss(**options)
    with pytest.raises(error, match=message):
        lace_loss(INPUT, CLASSES, **options)
    if not options.keys() & {"strength", "label_smoothing"}:  # its own range is asked for negative numbers only
        with pytest.raises(error):
            torch.nn.functional.cross_entropy(INPUT, CLASSES, **options)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_options_of_every_kind_that_cross_entropy_takes_are_taken_at_construction():
    for options in (
        {"label_smoothing": 1},
        {"label_smoothing": np.float32(0.5)},
        {"label_smoothing": torch.tensor(0.5)},
        {"ignore_index": np.int8(-1)},
        {"ignore_index": torch.tensor(2**63 - 1)},
        {"size_average": False},
        {"reduce": False},
        {"reduction": "sum"},
    ):
        theirs, target = torch.nn.CrossEntropyLoss(**options)(INPUT, CLASSES.abs() % 5), CLASSES.abs() % 5
        torch.testing.assert_close(LACELoss(**options, strength=0)(INPUT, target), theirs, rtol=FLOAT64, atol=0)


def test_without_torch_the_import_names_the_extra_that_installs_it():
    hidden = "import sys; sys.modules['torch'] = None; import lace_loss.ext.torch"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: lace_loss.ext.torch needs PyTorch, which the extra torch installs: "
        "pip install 'lace-loss[torch]'"
    )


@pytest.mark.parametrize("ignored", [2**63 - 1, -(2**63)])
def test_the_ignored_index_may_be_either_end_of_64_bits(ignored, path, device):
    """The other end is no class: not wrapped around, not rounded, in either kind of target that holds it."""
    input, other = INPUT.float().to(device), -1 - ignored
    for target in (torch.tensor([0, ignored, 4, ignored]), torch.tensor([ignored] * 4)):
        for weight in (None, torch.rand(5)):
            options = {"weight": None if weight is None else weight.to(device), "ignore_index": ignored}
            theirs = torch.nn.functional.cross_entropy(input, target.to(device), **options)
            ours = lace_loss(input, target.to(device), strength=0, **options)
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=FLOAT32, atol=0)
    for last in (other, 2**62, -100):
        target = torch.tensor([0, 1, 2, last], device=device)
        if input.is_cuda or (gpu.on_gpu(input) and path == "kernel"):
            losses = lace_loss(input, target, ignore_index=ignored, reduction="none")
            assert losses.isnan().tolist() == [False, False, False, True]
        else:
            with pytest.raises(IndexError, match=rf"target\[3\] is {last}, not a class: 0 to 4"):
                lace_loss(input, target, ignore_index=ignored)


def test_unsigned_targets_are_refused_as_by_cross_entropy_before_they_are_converted():
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        for ignored in (-100, -1, 2**63 - 1):
            target = torch.tensor([0, 1, 2, 2**64 - 1 if dtype == torch.uint64 else 3], dtype=dtype)
            for loss_of in (torch.nn.functional.cross_entropy, lace_loss):
                with pytest.raises(RuntimeError, match="expected target dtype to be Long or Byte, but got UInt"):
                    loss_of(INPUT, target, ignore_index=ignored)


WEIGHTS_OF_NO_SUM = [torch.zeros(5), torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0]), torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])]


@pytest.mark.parametrize("weight", WEIGHTS_OF_NO_SUM, ids=["all 0", "that cancel", "of other classes"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.bfloat16])
def test_weights_that_sum_to_0_give_what_cross_entropy_gives(weight, smoothing, dtype, path, device):
    """A mean has no value then. cross_entropy gives 0/0 or x/0, and NaN with smoothing, where it adds two means."""
    input, weight = INPUT.to(device, dtype), weight.to(device, dtype)
    for target in (torch.tensor([0, 4, 0, 4]), torch.tensor([0, 4, 2, 2]), torch.full((4,), -100)):
        target = target.to(device)
        for reduction in ("mean", "sum"):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            theirs = torch.nn.functional.cross_entropy(input, target, weight, **options)
            ours = lace_loss(input, target, weight, strength=0, **options)
            tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
            if smoothing and theirs.isnan().any():
                assert not ours.isfinite()
                assert reduction == "mean"
            else:
                torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
            leaves = input.clone().requires_grad_()
            lace_loss(leaves, target, weight, strength=0, **options).sum().backward()
            wanted = input.clone().requires_grad_()
            torch.nn.functional.cross_entropy(wanted, target, weight, **options).sum().backward()
            finite = wanted.grad.isfinite()
            assert torch.equal(leaves.grad.isfinite().any(1), finite.any(1))
            torch.testing.assert_close(leaves.grad[finite], wanted.grad[finite], **tolerance)
            if dtype == torch.double:
                by_ref = ref.forward(input.cpu(), target.cpu(), weight=weight.cpu().numpy(), strength=0.0, **options)
                np.testing.assert_allclose(ours.cpu().numpy(), by_ref, rtol=FLOAT64)


def test_statistics_and_normalizer_of_nothing_that_counts_are_those_of_cross_entropy(path, device):
    nothing = torch.full((4,), -100, device=device)
    for target in (nothing, nothing.index_fill(0, torch.tensor([1], device=device), 3)):
        for weight in (None, *WEIGHTS_OF_NO_SUM):
            weight, input = None if weight is None else weight.to(device), INPUT.float().to(device)
            options = {"weight": weight, "reduction": "sum"}
            total = torch.nn.functional.cross_entropy(input, target, **options)
            each = torch.nn.functional.cross_entropy(input, target, reduction="none")
            for normalizer in (0, 3, torch.tensor(0.0), torch.tensor(-0.5)):
                loss, found = lace_loss(input, target, weight, strength=0, normalizer=normalizer, statistics=True)
                torch.testing.assert_close(loss, total / normalizer, equal_nan=True, rtol=FLOAT32, atol=0)
                torch.testing.assert_close(found["cross_entropy"], each, rtol=FLOAT32, atol=0)
                torch.testing.assert_close(found["probability"], torch.exp(-each) * (target >= 0), rtol=FLOAT32, atol=0)
                assert (found["rank"][target < 0] == 5).all()


def test_weights_move_load_and_print_with_the_module():
    theirs = torch.nn.CrossEntropyLoss(torch.rand(5))
    module = LACELoss(torch.ones(5))
    module.load_state_dict(theirs.state_dict())
    assert torch.equal(module.weight, theirs.weight)
    assert module.double().weight.dtype == torch.double
    assert repr(LACELoss()) == repr(torch.nn.CrossEntropyLoss()).replace("CrossEntropy", "LACE")
    assert repr(LACELoss(strength=0.5)) == "LACELoss(strength=0.5)"


def test_the_deprecated_reduction_is_the_mean_and_warns():
    with pytest.warns(UserWarning, match="elementwise_mean' is deprecated"):
        assert lace_loss(INPUT, CLASSES, reduction="elementwise_mean") == lace_loss(INPUT, CLASSES)
