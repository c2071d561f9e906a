"""BinaryLACELoss: torch's own cases at strength 0, ref at strength 1, derivatives of every kind, and every way it runs.

The device "cuda" is a GPU's kernels, on an emulator where there is none.
"""

import doctest
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch
from oracle import ulps
from test_binary import LOGITS, exact
from tolerances import COMPOSITE, FLOAT32, FLOAT64, ULP, UNDERFLOW
from torch.autograd import forward_ad
from torch_samples import DOUBLE, cases_of

from lace_loss import ref
from lace_loss.ext.torch import BinaryLACELoss, binary_lace_loss, gpu

binary = sys.modules[binary_lace_loss.__module__]

by_torch = torch.nn.functional.binary_cross_entropy_with_logits
OP, MODULE = cases_of("binary_cross_entropy_with_logits", torch.nn.BCEWithLogitsLoss)


def detached(target, options):
    return target.detach(), {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def samples():
    torch.manual_seed(0)
    for i, sample in enumerate(OP.sample_inputs(**DOUBLE)):
        yield f"function {i}", sample.input, *detached(sample.args[0], sample.kwargs)
    for case in MODULE.module_inputs_func(MODULE, **DOUBLE, training=True):
        input, target = case.forward_input.args
        yield f"module {case.desc}", input, *detached(target, case.constructor_input.kwargs)


SAMPLES = list(samples())
each_sample = pytest.mark.parametrize(
    ("input", "target", "options"), [rest for _, *rest in SAMPLES], ids=[name for name, *_ in SAMPLES]
)


@pytest.fixture(params=["kernel", "composite"])
def path(request, monkeypatch):
    if request.param == "composite":
        monkeypatch.setattr(binary, "_kernel_applies", lambda *_: False)
    return request.param


def derivatives(loss_of, input, seed, vector):
    """Loss, gradient, change of the gradient along the vector, tangent of the loss."""
    z = input.detach().clone().requires_grad_()
    loss = loss_of(z)
    (gradient,) = torch.autograd.grad(loss, z, seed, create_graph=True)
    (product,) = torch.autograd.grad(gradient, z, vector)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss_of(forward_ad.make_dual(input.detach(), vector))).tangent
    return [x.detach().numpy() for x in (loss, gradient, product, tangent)]


@each_sample
def test_at_strength_0_a_case_gives_what_binary_cross_entropy_gives(input, target, options, path):
    seed, vector = torch.randn_like(by_torch(input, target, **options)), torch.randn_like(input)
    ours = derivatives(lambda z: binary_lace_loss(z, target, strength=0, **options), input, seed, vector)
    theirs = derivatives(lambda z: by_torch(z, target, **options), input, seed, vector)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert np.allclose(mine, wanted, rtol=COMPOSITE["float64"], atol=FLOAT64, equal_nan=True)


@each_sample
def test_at_strength_1_a_case_gives_what_ref_gives(input, target, options, path):
    seed, vector = torch.randn_like(binary_lace_loss(input, target, **options)), torch.randn_like(input)
    loss, gradient, product, tangent = derivatives(
        lambda z: binary_lace_loss(z, target, **options), input, seed, vector
    )
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    given, bound = (input.detach().numpy(), target.numpy()), COMPOSITE["float64"]
    expected = ref.binary_backward(*given, seed.numpy(), **arrays)
    assert np.allclose(loss, ref.binary_forward(*given, **arrays), rtol=bound, atol=0, equal_nan=True)
    assert np.allclose(gradient, expected, rtol=bound, atol=bound)
    wanted = ref.binary_hessian_vector_product(*given, vector.numpy(), seed.numpy(), **arrays)
    assert np.allclose(product, wanted, rtol=bound, atol=bound)
    assert np.isclose((tangent * seed.numpy()).sum(), (expected * vector.numpy()).sum(), rtol=bound, atol=bound)


def test_error_inputs_are_refused_by_the_same_type_and_words():
    cases = list(OP.error_inputs("cpu")) if OP.error_inputs_func else []
    for case in cases:
        given = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            binary_lace_loss(given.input, *given.args, **given.kwargs)
    z = torch.zeros(4, 3)
    for arguments, options in (
        ((z, torch.ones(4, 1)), {}),
        ((z, torch.ones(4)), {}),
        ((z, torch.ones(4, 3).long()), {}),
        ((z.long(), torch.ones(4, 3)), {}),
        ((z, torch.ones(4, 3)), {"weight": torch.ones(4)}),
        ((z, torch.ones(4, 3)), {"pos_weight": torch.ones(2, 4, 3)}),
        ((z, torch.ones(4, 3)), {"weight": torch.ones(3, dtype=torch.complex64)}),
        ((z, torch.ones(4, 3)), {"reduction": "batchmean"}),
        ((z, [1.0]), {}),
        ((z, None), {}),
    ):
        with pytest.raises(Exception) as theirs:
            by_torch(*arguments, **options)
        with pytest.raises(type(theirs.value)):
            binary_lace_loss(*arguments, **options)


def test_strengths_that_are_none_are_refused():
    z = torch.zeros(3)
    for bad, error in ((1.5, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="strength must be"):
            binary_lace_loss(z, z, strength=bad)
        with pytest.raises(error, match="strength must be"):
            BinaryLACELoss(strength=bad)
    with pytest.raises(TypeError, match="no derivative with respect to it"):
        binary_lace_loss(z, z, strength=torch.tensor(1.0))


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("hard", ["numbers", "booleans"])
def test_labels_are_within_the_contract(strength, hard, device):
    """4 ulp on a CPU, 16 on a GPU, of mpmath."""
    largest = float(np.finfo(np.float32).max) / 2
    z = np.clip(LOGITS, -largest, largest).astype(np.float32)
    bound, least = ULP["kernel" if device == "cpu" and not gpu.on_gpu(torch.zeros(1)) else "gpu"], 2.0**-149
    for present in (False, True):
        input = torch.tensor(z, device=device, requires_grad=True)
        target = torch.full(z.shape, present, device=device)
        target = target if hard == "booleans" else target.float()
        loss = binary_lace_loss(input, target, reduction="none", strength=strength)
        loss.sum().backward()
        for i, logit in enumerate(z):
            for got, true in zip((loss[i], input.grad[i]), exact(logit, present, strength), strict=True):
                unit = float(np.spacing(np.float32(abs(float(true)))))
                assert ulps(got.item(), true, np.float32) <= bound + UNDERFLOW * least / unit, (logit, present)


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (3, 5, 40), (2, 1500), (3, 4, 300), (0, 3)])
def test_weights_of_any_shape_and_every_reduction_are_as_in_ref(shape, device):
    rng = np.random.default_rng(0)
    z, y = 3 * rng.normal(size=shape), rng.uniform(size=shape)
    last = [shape[len(shape) - n :] for n in range(len(shape) + 1)]
    for w_shape in (*last, (1,) * len(shape)):
        w, p = (
            rng.uniform(0.1, 2, w_shape),
            rng.uniform(0.1, 2, last[-1] if len(shape) < 2 else (*shape[:1], *[1] * (len(shape) - 1))),
        )
        for reduction in ("none", "mean", "sum"):
            input = torch.tensor(z, dtype=torch.float32, device=device, requires_grad=True)
            given = [torch.tensor(x, dtype=torch.float32, device=device) for x in (y, w, p)]
            loss = binary_lace_loss(input, given[0], given[1], pos_weight=given[2], reduction=reduction)
            seed = torch.tensor(rng.normal(size=loss.shape), dtype=torch.float32, device=device)
            loss.backward(seed)
            options = {"weight": given[1].cpu().numpy(), "pos_weight": given[2].cpu().numpy(), "reduction": reduction}
            arrays = input.detach().cpu().numpy(), given[0].cpu().numpy()
            wanted = ref.binary_forward(*arrays, **options)
            assert np.allclose(loss.detach().cpu().numpy(), wanted, rtol=4 * FLOAT32, equal_nan=True)
            wanted = ref.binary_backward(*arrays, seed.cpu().numpy(), **options)
            assert np.allclose(input.grad.cpu().numpy(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(dtype, device):
    z = torch.linspace(-20, 20, 161).to(dtype)
    y = (torch.arange(161) % 2).to(dtype)
    input = z.to(device, copy=True).requires_grad_()
    loss = binary_lace_loss(input, y.to(device), reduction="none")
    loss.backward(torch.full_like(loss, 1024.0))
    assert loss.dtype == input.grad.dtype == dtype
    wanted = torch.tensor(ref.binary_forward(z.float().numpy(), y.float().numpy(), reduction="none"))
    torch.testing.assert_close(loss.double().cpu(), wanted, rtol=torch.finfo(dtype).eps, atol=2.0**-25)
    wanted = 1024 * torch.tensor(ref.binary_backward(z.float().numpy(), y.float().numpy(), reduction="sum"))
    torch.testing.assert_close(input.grad.double().cpu(), wanted, rtol=torch.finfo(dtype).eps, atol=2.0**-25)


def test_autocast_gives_float32_as_it_does_for_torch():
    z, y = torch.randn(6, dtype=torch.bfloat16), torch.rand(6, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = binary_lace_loss(z, y, strength=0), by_torch(z, y)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_infinities_nan_and_weights_of_0_are_as_in_ref(path, device):
    z = np.array([np.inf, -np.inf, np.nan, 0, 3e38, -3e38], np.float32)
    for y in (1.0, 0.0, 0.25, np.nan):
        for options in ({}, {"weight": 0.0}, {"pos_weight": 0.0}, {"weight": -2.0}):
            input = torch.tensor(z, device=device, requires_grad=True)
            target = torch.full(z.shape, y, device=device)
            given = {k: torch.tensor(v, device=device) for k, v in options.items()}
            loss = binary_lace_loss(input, target, reduction="none", **given)
            loss.sum().backward()
            with np.errstate(over="ignore"):
                wanted = ref.binary_forward(z, np.full(6, y), reduction="none", **options).astype(np.float32)
            assert np.allclose(loss.detach().cpu(), wanted, rtol=1e-6, equal_nan=True), (y, options)
            wanted = ref.binary_backward(z, np.full(6, y), reduction="sum", **options)
            assert np.allclose(input.grad.cpu(), wanted, rtol=1e-6, equal_nan=True), (y, options)


def test_gradients_and_their_gradients_match_finite_differences(path):
    torch.manual_seed(1)
    input, target = (3 * torch.randn(4, 5, dtype=torch.double)).requires_grad_(), torch.rand(4, 5, dtype=torch.double)
    for reduction in ("none", "mean"):

        def loss(input, reduction=reduction):
            return binary_lace_loss(input, target, reduction=reduction, pos_weight=target[0], strength=0.7)

        assert torch.autograd.gradcheck(loss, input, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, input, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("above", [1.0, 0.25, 65536.0, float("nan")])
def test_a_gradient_is_its_caller_s_and_right_for_every_loss_scale(above, device):
    z, y = torch.linspace(-60, 60, 121, device=device).requires_grad_(), torch.ones(121, device=device)
    loss = above * binary_lace_loss(z, y)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    wanted = ref.binary_backward(z.detach().cpu(), y.cpu(), above)
    assert np.allclose(first.cpu(), wanted, rtol=2e-6, atol=2.0**-148, equal_nan=True)
    first.zero_()
    (second,) = torch.autograd.grad(loss, z)
    assert np.allclose(second.cpu(), wanted, rtol=2e-6, atol=2.0**-148, equal_nan=True)


def test_without_a_graph_no_gradient_is_formed(monkeypatch):
    monkeypatch.setattr(binary, "_loss_and_gradient", None)
    z, y = torch.randn(5, requires_grad=True), torch.ones(5)
    with torch.no_grad():
        assert not binary_lace_loss(z, y).requires_grad
    binary_lace_loss(z.detach(), y)


def test_target_and_weights_have_derivatives_too():
    torch.manual_seed(2)
    given = [torch.rand(3, 4, dtype=torch.double, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda z, y, w, p: binary_lace_loss(z, y, w, pos_weight=p), given)


def test_torch_func_gives_the_same_derivatives():
    torch.manual_seed(3)
    z, y = 3 * torch.randn(5, 4, dtype=torch.double), torch.rand(5, 4, dtype=torch.double)
    one = torch.func.vmap(torch.func.grad_and_value(binary_lace_loss))(z, y)
    for i in range(5):
        assert np.allclose(one[0][i], ref.binary_backward(z[i], y[i]), rtol=COMPOSITE["float64"])
        assert np.isclose(one[1][i], ref.binary_forward(z[i], y[i]), rtol=COMPOSITE["float64"])
    hessian = torch.func.hessian(binary_lace_loss)(z[0], y[0])
    assert np.allclose(hessian.diagonal(), ref.binary_hessian_vector_product(z[0], y[0], np.ones(4)), rtol=1e-11)
    assert torch.equal(hessian, hessian.diagonal().diag())


@pytest.mark.filterwarnings("ignore")  # the compilers' own
def test_compiled_and_exported_it_gives_the_same():
    torch.manual_seed(4)
    module = BinaryLACELoss(pos_weight=torch.tensor([3.0, 1.0, 0.5]), strength=0.7)
    z, y = 4 * torch.randn(6, 3), torch.rand(6, 3)
    wanted, expected = module(z, y), None
    for run in (
        module,
        torch.compile(module, fullgraph=True, backend="aot_eager"),
        torch.export.export(module, (z, y)).module(),
    ):
        input = z.clone().requires_grad_()
        loss = run(input, y)
        loss.backward()
        expected = input.grad if expected is None else expected
        torch.testing.assert_close(loss, wanted, rtol=FLOAT32, atol=0)
        torch.testing.assert_close(input.grad, expected, rtol=COMPOSITE["float32"], atol=1e-7)
    exported = torch.export.export(module, (z, y))
    assert not any("lace_loss" in str(node.target) for node in exported.graph.nodes)  # it runs elsewhere, too
    torch.library.opcheck(binary._registered_loss, (z, y, None, module.pos_weight, "mean", 0.7))
    torch.library.opcheck(binary._registered_gradient, (torch.ones(()), z, y, None, module.pos_weight, "mean", 0.7))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_confident_labels_keep_their_digits_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    z, y = torch.linspace(-40, 40, 81), torch.ones(81)
    program = torch.onnx.export(BinaryLACELoss(reduction="none"), (z, y), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (z.numpy(), y.numpy()), strict=True)))
    assert np.allclose(got, ref.binary_forward(z, y, reduction="none"), rtol=2 * 40 * 2.0**-24, atol=0)


def test_the_signatures_are_those_of_torch_with_strength():
    for ours, theirs in ((binary_lace_loss, by_torch), (BinaryLACELoss, torch.nn.BCEWithLogitsLoss)):
        mine, wanted = (list(inspect.signature(x).parameters.values()) for x in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in mine[:-1]] == [(p.name, p.default, p.kind) for p in wanted]
        assert (mine[-1].name, mine[-1].kind) == ("strength", inspect.Parameter.KEYWORD_ONLY)


def test_the_module_is_kept_moved_and_shown_as_torch_s_is():
    module = BinaryLACELoss(pos_weight=torch.ones(3), reduction="sum", strength=0.5)
    assert module.state_dict().keys() == torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)).state_dict().keys()
    again = pickle.loads(pickle.dumps(module))
    z, y = torch.randn(2, 3), torch.rand(2, 3)
    assert torch.equal(again(z, y), module(z, y))
    assert module.double().pos_weight.dtype == torch.double
    assert repr(module) == "BinaryLACELoss(strength=0.5)"


def test_the_posterior_is_that_of_ref():
    z = torch.linspace(-40, 40, 161, dtype=torch.double)
    for strength in (0.0, 0.5, 1.0):
        for p in (None, torch.tensor(3.0, dtype=torch.double)):
            got = BinaryLACELoss(pos_weight=p, strength=strength).posterior(z)
            wanted = ref.binary_posterior(z, pos_weight=p, strength=strength)
            assert np.allclose(got, wanted, rtol=COMPOSITE["float64"], atol=0)
            assert np.allclose(
                BinaryLACELoss(pos_weight=p, strength=strength).posterior(z.float()), wanted, rtol=2e-6, atol=0
            )
    edges = BinaryLACELoss().posterior(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]))
    assert np.allclose(edges, [1, 0, np.nan, 0.5], equal_nan=True)
    with pytest.raises(ValueError, match="pos_weight must be positive and finite"):
        BinaryLACELoss(pos_weight=torch.tensor([1.0, 0.0])).posterior(torch.zeros(2))


def test_layouts_and_subclasses_are_served():
    torch.manual_seed(5)
    z, y = torch.randn(4, 6, dtype=torch.double), torch.rand(4, 6, dtype=torch.double)
    wanted = ref.binary_backward(z, y)
    for input in (
        z.t().contiguous().t(),
        torch.stack([z, z], 2)[:, :, 1],
        z.unsqueeze(0).expand(1, 4, 6)[0],
        torch.nn.Parameter(z),
    ):
        leaf = input.detach().requires_grad_()
        binary_lace_loss(leaf, y).backward()
        assert np.allclose(leaf.grad, wanted, rtol=FLOAT64)
    batch = torch.zeros(2, 4, 6, dtype=torch.double)[:, :, ::2].conj()
    assert binary_lace_loss(batch, batch).shape == ()


def test_the_examples_of_the_docstrings_are_right():
    found = doctest.testmod(binary)
    assert found.attempted == 4
    assert found.failed == 0
