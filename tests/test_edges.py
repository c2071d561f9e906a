"""The documented values at the edges, inputs that stay untouched, and layouts."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tolerances import FLOAT32

from lace_loss import ext, ref
from lace_loss.ext.torch import lace_loss

INF, NAN = np.inf, np.nan


def by_ref(logits, target, **options):
    return ref.forward(logits, target, **options), ref.backward(logits, target, **options)


def by_torch(logits, target, weight=None, **options):
    input = torch.tensor(logits, requires_grad=True)
    loss = lace_loss(input, torch.tensor(target), None if weight is None else torch.tensor(weight), **options)
    loss.sum().backward()
    return loss.detach().numpy(), input.grad.numpy()


def by_torch_composite(logits, target, weight=None, **options):
    """vmap-free way to the composite: probabilities take it always, classes when the weight asks for a gradient."""
    weight = np.ones(np.shape(logits)[-1]) if weight is None else weight
    input = torch.tensor(logits, requires_grad=True)
    loss = lace_loss(input, torch.tensor(target), torch.tensor(weight, requires_grad=True), **options)
    loss.sum().backward()
    return loss.detach().numpy(), input.grad.numpy()


def in_float32(device):
    """The kernels of a GPU, which know no float64."""

    def implementation(logits, target, weight=None, **options):
        input = torch.tensor(logits, dtype=torch.float32, device=device, requires_grad=True)
        weight = None if weight is None else torch.tensor(weight, dtype=torch.float32, device=device)
        loss = lace_loss(input, torch.tensor(target, device=device), weight, **options)
        loss.sum().backward()
        return loss.detach().cpu().numpy(), input.grad.cpu().numpy()

    return implementation


IMPLEMENTATIONS = {"ref": by_ref, "ext": ext.forward_backward, "torch": by_torch, "composite": by_torch_composite}


@pytest.fixture(params=[*IMPLEMENTATIONS, "cuda"])
def implementation(request):
    return IMPLEMENTATIONS.get(request.param) or in_float32(request.getfixturevalue("a_gpu"))


@pytest.fixture
def near(request):
    """Of values that take a few roundings."""
    return FLOAT32 if "cuda" in request.node.callspec.id else 1e-14


def test_minus_infinity_at_the_target_is_infinite_loss_with_a_finite_gradient(implementation, near):
    loss, gradient = implementation(np.array([[-INF, 0.0, 1.0]]), np.array([0]))
    q = 1 / (1 + np.e)
    assert loss == INF
    assert np.allclose(gradient, [[-1, q, 1 - q]], rtol=near)


def test_minus_infinity_elsewhere_is_a_class_left_out(implementation, near):
    loss, gradient = implementation(np.array([[0.5, -INF, 1.0]]), np.array([0]))
    smaller_loss, smaller_gradient = by_ref(np.array([[0.5, 1.0]]), np.array([0]))
    assert np.isclose(loss, smaller_loss, rtol=near)
    assert np.allclose(gradient[:, [0, 2]], smaller_gradient, rtol=near)
    assert gradient[0, 1] == 0


@pytest.mark.parametrize("bad", [INF, NAN])
@pytest.mark.parametrize("column", [0, 1])
def test_nan_and_infinity_spoil_their_own_row_only(implementation, bad, column):
    logits = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [2.0, 2.0, 0.0]])
    clean_loss, clean_gradient = implementation(logits, np.array([1, 1, 1]), reduction="none")
    logits[1, column] = bad
    loss, gradient = implementation(logits, np.array([1, 1, 1]), reduction="none")
    assert np.isnan(loss).tolist() == [False, True, False]
    assert np.isnan(gradient).all(1).tolist() == [False, True, False]
    assert loss[[0, 2]].tobytes() == clean_loss[[0, 2]].tobytes()
    assert gradient[[0, 2]].tobytes() == clean_gradient[[0, 2]].tobytes()


def test_a_row_of_minus_infinities_is_nan(implementation):
    loss, gradient = implementation(np.full((1, 3), -INF), np.array([1]))
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_an_ignored_row_counts_nowhere_whatever_its_logits(implementation, junk):
    logits = np.array([[1.0, 2.0, 3.0], [junk, junk, junk], [2.0, 2.0, 0.0]])
    loss, gradient = implementation(logits, np.array([1, 255, 0]), ignore_index=255)
    kept_loss, kept_gradient = implementation(logits[[0, 2]], np.array([1, 0]))
    assert loss == kept_loss
    assert gradient[[0, 2]].tobytes() == kept_gradient.tobytes()
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize(("n", "target"), [(0, []), (2, [-100, -100])], ids=["empty", "all_ignored"])
def test_nothing_to_average_is_nan_with_a_zero_gradient_and_sums_to_0(implementation, n, target):
    logits, target = np.zeros((n, 3)), np.array(target, np.int64)
    loss, gradient = implementation(logits, target, reduction="mean")
    assert np.isnan(loss)
    assert (gradient == 0).all()
    loss, gradient = implementation(logits, target, reduction="sum")
    assert loss == 0
    assert (gradient == 0).all()
    assert implementation(logits, target, reduction="none")[0].shape == (n,)


def test_one_class_has_no_loss(implementation):
    loss, gradient = implementation(np.array([[3.0]]), np.array([0]))
    assert loss == 0
    assert gradient == 0


def test_nan_weights_spoil_the_samples_of_their_class_as_in_torch(implementation):
    logits, weight = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]), np.array([1.0, NAN, 1.0])
    loss, _ = implementation(logits, np.array([0, 1]), weight=weight, reduction="none")
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor([0, 1]), torch.tensor(weight), reduction="none"
    )
    assert np.isnan(loss).tolist() == expected.isnan().tolist() == [False, True]


def test_an_infinite_loss_without_weight_counts_nothing(implementation):
    logits, weight = np.array([[-INF, 0.0, 1.0], [1.0, 2.0, 3.0]]), np.array([0.0, 1.0, 1.0])
    loss, gradient = implementation(logits, np.array([0, 1]), weight=weight, reduction="sum")
    alone_loss, alone_gradient = implementation(logits[1:], np.array([1]), weight=weight, reduction="sum")
    assert loss == alone_loss
    assert (gradient[0] == 0).all()
    assert gradient[1:].tobytes() == alone_gradient.tobytes()


def test_a_probability_of_0_beside_a_logit_of_minus_infinity_counts_nothing():
    logits, y = np.array([[0.5, -INF, 1.0]]), np.array([[1.0, 0.0, 0.0]])
    for implementation in (by_ref, ext.forward_backward, by_torch):
        loss, gradient = implementation(logits, y)
        assert np.isclose(loss, ref.forward(logits[:, [0, 2]], [0]), rtol=1e-14)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strided_reversed_and_read_only_inputs_give_the_bits_of_a_plain_copy(dtype):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, 5, 4)).astype(dtype)
    views = [base.transpose(2, 1, 0), base[::-1, ::2, ::-1], np.asfortranarray(base), base[:, :, 0], base[0, :, 0]]
    views += [base[0, ::-2], base[::2, 1, 1:], np.broadcast_to(base[0, 0], (40, 4))]  # rows that lie apart
    for view in views:
        axis = min(1, view.ndim - 1)
        target = rng.integers(0, view.shape[axis], view.shape[:axis] + view.shape[axis + 1 :])
        view.flags.writeable = False
        target = np.repeat(target[..., None], 2, -1)[..., 0]  # strided
        target.flags.writeable = False
        loss, gradient = ext.forward_backward(view, target)
        plain_loss, plain_gradient = ext.forward_backward(view.copy(), target.copy())
        assert loss == plain_loss
        assert gradient.tobytes() == plain_gradient.tobytes()
        out = np.empty(view.shape[::-1], dtype).T
        assert ext.forward_backward(view, target, out=out)[1] is out
        assert np.array_equal(out, gradient)


PEAK = """
import re, numpy as np, torch
from pathlib import Path
from lace_loss import ext
from lace_loss.ext.torch import lace_loss
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
base = np.zeros((2**12, 2**13), np.float32)  # 128 MiB
base[:] = 1
target = np.zeros(2**12, np.int64)
rows = base[:, 1:-1]
warm = ext.forward(rows[:9], target[:9]), lace_loss(torch.tensor(rows[:9]), torch.tensor(target[:9]))
before = peak()
ext.forward(rows[::-1], target)
lace_loss(torch.from_numpy(base)[:, 1:-1], torch.from_numpy(target))
print(peak() - before)
"""


def test_rows_that_lie_apart_are_not_copied():
    """128 MiB of logits, in views without the first and the last class."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int16, np.int32, np.int64])
def test_integers_of_other_widths_are_class_indices(integer):
    logits = np.random.default_rng(0).normal(size=(4, 5))
    target = np.array([0, 4, 2, 2])
    expected = ref.backward(logits, target)
    assert np.array_equal(ref.backward(logits, target.astype(integer)), expected)
    assert np.array_equal(ext.backward(logits, target.astype(integer)), ext.backward(logits, target))
    assert np.array_equal(by_torch(logits, target.astype(integer))[1], ext.backward(logits, target))


def test_inputs_are_not_modified(implementation):
    rng = np.random.default_rng(0)
    logits, classes, y = rng.normal(size=(4, 5)), np.array([0, -100, 4, 2]), rng.uniform(size=(4, 5))
    weight = rng.uniform(size=5)
    before = [array.tobytes() for array in (logits, classes, y, weight)]
    for target in (classes, y):
        implementation(logits, target, weight=weight, label_smoothing=0.1)
    assert [array.tobytes() for array in (logits, classes, y, weight)] == before
