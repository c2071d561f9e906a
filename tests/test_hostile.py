"""Nothing that a caller, another thread or the system does makes the kernel crash, or answer wrongly without a word."""

import itertools
import subprocess
import sys
import threading

import mpmath
import numpy as np
import pytest
import torch
from oracle import ulps
from tolerances import ULP

from lace_loss import ext, ref
from lace_loss.ext import _cpu
from lace_loss.ext import torch as lace_torch
from lace_loss.ext.torch import LACELoss, lace_loss

SPECIAL = [np.nan, np.inf, -np.inf, 1e-45, 3e38, -3e38]
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"weight": np.array([0.5, 2, 1, 3, 0.25])},
    {"label_smoothing": 0.1, "weight": np.array([0.5, 2, 0, 3, 0.25]), "strength": 0.5},
]


def in_a_process(program, **environment):
    """Its output; fails with what it wrote where it crashes."""
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# --- values -----------------------------------------------------------------------------------------------------------


def hostile_rows(k=5):
    """Rows with one or two special logits at every position."""
    plain = np.array([0.1, 0.7, 0.5, -1.0, 0.8])
    for value, place in itertools.product(SPECIAL, range(k)):
        row = plain.copy()
        row[place] = value
        yield row
    for first, second in itertools.permutations(range(k), 2):
        for pair in itertools.product([np.nan, np.inf, -np.inf], repeat=2):
            row = plain.copy()
            row[[first, second]] = pair
            yield row


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("probabilities", [False, True])
def test_kernel_reference_and_composite_agree_on_which_rows_are_nan(options, dtype, probabilities, monkeypatch):
    rows = np.array(list(hostile_rows())).astype(dtype)
    target = np.tile([0.1, 0.2, 0.3, 0.0, 0.4], (len(rows), 1)) if probabilities else np.arange(len(rows)) % 5
    options = {**options, "reduction": "none"}
    expected, slope = ref.forward(rows, target, **options), ref.backward(rows, target, **options)
    loss, gradient = ext.forward_backward(rows, target, **options)
    assert (np.isnan(loss) == np.isnan(expected)).all()
    assert (np.isnan(gradient).any(1) == np.isnan(slope).any(1)).all()
    in_torch = {**options, "weight": torch.tensor(options["weight"].astype(dtype))} if "weight" in options else options
    given = torch.tensor(rows), torch.tensor(target.astype(dtype) if probabilities else target)
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(lace_torch, "_kernel", lambda *_: None)
        z = given[0].clone().requires_grad_()
        found = lace_loss(z, given[1], **in_torch)
        found.sum().backward()
        assert (np.isnan(found.detach().numpy()) == np.isnan(expected)).all()
        assert (np.isnan(z.grad.numpy()).any(1) == np.isnan(slope).any(1)).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_of_a_row_are_nan_where_its_loss_is_by_both_forms(options, dtype, monkeypatch):
    rows = torch.tensor(np.array(list(hostile_rows())).astype(dtype))
    target = torch.arange(len(rows)) % 5
    given = {k: torch.tensor(v.astype(dtype)) if k == "weight" else v for k, v in options.items()}
    found = [lace_loss(rows, target, statistics=True, reduction="none", **given)]
    monkeypatch.setattr(lace_torch, "_kernel", lambda *_: None)
    found.append(lace_loss(rows, target, statistics=True, reduction="none", **given))
    nan = np.isnan(ref.forward(rows.numpy(), target.numpy(), reduction="none"))  # whatever the options
    for _, statistics in found:
        assert (statistics["cross_entropy"].isnan().numpy() == nan).all()
        assert (statistics["probability"].isnan().numpy() == nan).all()
    assert torch.equal(found[0][1]["rank"], found[1][1]["rank"])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_evaluation_refuses_rows_without_a_softmax_and_counts_the_others(options, dtype):
    for row in hostile_rows():
        row = row.astype(dtype)
        for target in range(5):
            if np.isnan(row).any() or np.isposinf(row).any():
                with pytest.raises(ValueError, match=r"logits\[0\] holds (NaN|\+inf)"):
                    ext.evaluate(row[None], [target], **options)
            else:
                found = ext.evaluate(row[None], [target], **options)
                assert found.count == 1 and sum(found.bins["count"]) == 1


def test_a_confidence_that_is_no_number_of_a_bin_is_bounded(monkeypatch):
    """Whatever the kernel may say: bincount adds outside of its memory for an index of 2^63 - 1."""

    def described(z, target, first, options):
        n = target.size
        return np.zeros(n, z.dtype), np.zeros(n, z.dtype), np.array([np.nan, 2.0, -1.0, 0.0], z.dtype), np.zeros(n, int)

    monkeypatch.setattr(ext.evaluation, "_loss_and_statistics", described)
    with np.errstate(invalid="ignore"):
        found = ext.evaluate(np.zeros((4, 3)), [0, 1, 2, 0])
    assert sum(found.bins["count"]) == 4


# --- digits -----------------------------------------------------------------------------------------------------------


def exactly(z, t, factor, strength):
    """factor times the gradient of class t's loss, in 60 digits."""
    with mpmath.workdps(60):
        e = [mpmath.exp(mpmath.mpf(float(x))) for x in z]
        others = mpmath.fsum(x for j, x in enumerate(e) if j != t)
        q, r, n = e[t] / (e[t] + others), others / (e[t] + others), mpmath.log1p(others / e[t])
        k = (1 - mpmath.mpf(strength)) + strength * (r + q * n)
        gradient = [factor * k * (x / (e[t] + others) if j != t else -r) for j, x in enumerate(e)]
        return factor * ((1 - mpmath.mpf(strength)) + strength * r) * n, gradient


BROUGHT_BACK = [
    (np.float32, -95, 65536.0),
    (np.float32, -104, 65536.0),
    (np.float32, -104, 1e30),
    (np.float64, -740, 65536.0),
    (np.float64, -745, 65536.0),
    (np.float64, -745, 1e300),
]


@pytest.mark.parametrize(("dtype", "low", "factor"), BROUGHT_BACK, ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("by", ["grad_output", "weight"])
@pytest.mark.parametrize("row", ["two at the top", "one at the top"])
def test_a_factor_brings_subnormal_entries_back_with_their_digits(dtype, low, factor, strength, by, row):
    z = np.array([0, 0, low] if row == "two at the top" else [0, low], dtype)
    factor = float(dtype(factor))
    loss, gradient = exactly(z, 0, factor, strength)
    tiny = float(np.finfo(dtype).smallest_subnormal)
    implementations = [("ref", lambda *a, **o: (ref.forward(*a[:2], **o), ref.backward(*a, **o)), np.float64)]
    implementations.append(("kernel", ext.forward_backward, dtype))
    for name, both, kind in implementations:
        if by == "weight":
            found, slope = both(z, np.array(0), 1.0, weight=np.full(len(z), factor), reduction="sum", strength=strength)
            assert ulps(kind(found), [loss], kind) <= ULP["kernel, weighted" if name == "kernel" else name] or (
                abs(found - loss) <= 2 * tiny
            )
        else:
            _, slope = both(z, np.array(0), factor, strength=strength)
        for got, wanted in zip(slope, gradient, strict=True):
            bound = ULP["kernel, weighted" if name == "kernel" else name]
            assert ulps(kind(got), [wanted], kind) <= bound or abs(float(got) - wanted) <= 2 * tiny, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_scale_above_1_keeps_the_digits_of_torchs_gradient(reduction):
    z = torch.tensor([[0.0, 0.0, -95.0], [0.0, -104.0, 0.0]], requires_grad=True)
    loss = lace_loss(z, torch.tensor([0, 0]), reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, z, torch.full_like(loss, 65536.0))
    for row, place in ((0, 2), (1, 1)):
        wanted = exactly(z[row].tolist(), 0, 65536.0 / (2 if reduction == "mean" else 1), 1.0)[1][place]
        assert (
            abs(gradient[row, place].item() / wanted - 1) < 8.5 * 2.0**-24
            or abs(gradient[row, place].item() - wanted) < 2 * 2.0**-149
        )


# --- another thread writes to an input --------------------------------------------------------------------------------

WRITER = """
import threading, time, numpy as np, torch
from lace_loss import ext
from lace_loss.ext.torch import lace_loss
t, stop = {array}, time.monotonic() + 4
def write():
    while time.monotonic() < stop:
        t[:] = 10**9
        t[:] = 3
        t[:] = -(10**12)
        t[:] = 3
writer = threading.Thread(target=write)
writer.start()
z, w, ends = {logits}, {weight}, 0
while time.monotonic() < stop:
    for options in ({{}}, {{"weight": w}}, {{"label_smoothing": 0.1}}, {statistics}):
        try:
            {call}
        except (IndexError, RuntimeError):
            pass
        ends += 1
writer.join()
print(ends)
"""


@pytest.mark.parametrize("face", ["numpy rows", "numpy images", "torch"])
def test_a_target_that_another_thread_writes_to_never_leads_outside_of_memory(face):
    shape = (64, 7, 40) if face == "numpy images" else (2000, 7)
    place = (64, 40) if face == "numpy images" else (2000,)
    in_torch = face == "torch"
    program = WRITER.format(
        array=f"torch.full({place}, 3)" if in_torch else f"np.full({place}, 3)",
        logits=f"torch.zeros({shape}, requires_grad=True)" if in_torch else f"np.zeros({shape}, np.float32)",
        weight="torch.ones(7)" if in_torch else "np.ones(7)",
        statistics='{"statistics": True}' if in_torch else '{"reduction": "none"}',
        call="lace_loss(z, t, **options)" if in_torch else "ext.forward_backward(z, t, **options)",
    )
    assert int(in_a_process(program)) > 10


# --- memory that is not there -----------------------------------------------------------------------------------------


def without_storage(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("which", ["input", "target", "weight", "probabilities", "grad_output"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_storage_are_refused(which, reduction, more, dtype):
    z, t, w = torch.randn(4, 5, dtype=dtype), torch.tensor([0, 1, 2, 3]), torch.rand(5, dtype=dtype)
    upstream = torch.ones(4 if reduction == "none" else (), dtype=dtype)
    if which == "input":
        z = without_storage(z)
    elif which == "target":
        t = without_storage(t)
    elif which == "weight":
        w = without_storage(w)
    elif which == "probabilities":
        t = without_storage(torch.rand(4, 5, dtype=dtype))
    else:
        if dtype == torch.bfloat16:
            pytest.skip("torch converts the gradient before the loss sees it, and crashes")
        z.requires_grad_()
        upstream = without_storage(upstream)
    # cross_entropy raises RuntimeError for these, too, but for probabilities, where it crashes.
    with pytest.raises(RuntimeError):
        lace_loss(z, t, w, reduction=reduction, **more).backward(upstream)


def test_zero_tensors_are_what_they_hold_as_in_cross_entropy():
    z, t = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    zeros = torch._efficientzerotensor
    for call in (
        lambda f, **o: f(zeros((4, 5)), t, **o),
        lambda f, **o: f(z, zeros(4, dtype=torch.int64), **o),
        lambda f, **o: f(z, zeros((4, 5)), **o),
        lambda f, **o: f(z, t, zeros(5), **o),
    ):
        assert call(lace_loss, strength=0.0).item() == pytest.approx(
            call(torch.nn.functional.cross_entropy).item(), rel=1e-6, nan_ok=True
        )


def test_an_array_at_address_0_is_refused_on_every_argument():
    class Nowhere:
        def __init__(self, shape, kind):
            self.__array_interface__ = {"shape": shape, "typestr": kind, "data": (0, False), "version": 3}

    z, t = np.zeros((2, 3)), np.array([0, 1])
    for name, nowhere in (
        ("logits", Nowhere((2, 3), "<f8")),
        ("target", Nowhere((2,), "<i8")),
        ("weight", Nowhere((3,), "<f8")),
        ("probabilities", Nowhere((2, 3), "<f8")),
    ):
        try:
            array = np.asarray(nowhere)
        except (ValueError, TypeError):
            pytest.skip("NumPy makes no array at address 0")
        given = {
            "logits": (array, t, {}),
            "target": (z, array, {}),
            "weight": (z, t, {"weight": array}),
            "probabilities": (z, array, {}),
        }[name]
        with pytest.raises(ValueError, match="address 0"):
            ext.forward(given[0], given[1], **given[2])


def test_every_code_of_the_kernel_is_looked_at():
    losses, z = np.zeros(2, np.float32), np.zeros((2, 3), np.float32)
    job = _cpu.KernelCall(losses, None, z, None, None, None, None, None, 2, 3, 0, 12, 4, -100, 0.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="missing"):
        job.run(0, 2)


@pytest.mark.parametrize("face", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(9, 5), (3, 5, 7)], ids=str)
def test_values_that_are_not_aligned_to_their_type_are_copied_and_right(face, shape):
    random = np.random.default_rng(0)
    labels = shape[:1] + shape[2:]

    def shifted(values):
        memory = bytearray(values.nbytes + 1)
        moved = np.frombuffer(memory, values.dtype, values.size, 1).reshape(values.shape)
        moved[...] = values
        assert not moved.flags.aligned
        return moved

    z, t, w = random.normal(size=shape).astype(np.float32), random.integers(0, 5, labels), random.random(5, np.float32)
    expected = ext.forward_backward(z, t, weight=w)
    if face == "numpy":
        out = shifted(np.zeros_like(z))
        found = ext.forward_backward(shifted(z), shifted(t), weight=shifted(w), out=out)
        assert found[1] is out
    else:
        moved = torch.from_numpy(shifted(z)).requires_grad_()
        loss = lace_loss(moved, torch.from_numpy(shifted(t)), torch.from_numpy(shifted(w)))
        loss.backward()
        found = loss.item(), moved.grad.numpy()
    assert found[0] == expected[0] and np.array_equal(found[1], expected[1])


# --- options and types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["statistics", "first", "gradient", "grad_output", "threads", "out", "size_average"])
def test_only_documented_options_are_taken(name):
    z, t = np.zeros((4, 3)), np.zeros(4, int)
    small = np.empty(1)
    takes = {ext.forward: (), ext.backward: ("grad_output",), ext.forward_backward: ("grad_output", "threads", "out")}
    takes |= {ref.forward: (), ref.backward: ("grad_output",), ext.evaluate: (), ext.Tally: ()}
    for function, known in takes.items():
        if name not in known:
            with pytest.raises(TypeError, match=name):
                function(*(() if function is ext.Tally else (z, t)), **{name: small})


@pytest.mark.parametrize("kind", ["<u8", ">u8"])
@pytest.mark.parametrize("ignore_index", [-100, 2**63 - 1, -(2**63), -1])
def test_a_class_beyond_64_bits_with_a_sign_is_never_another(kind, ignore_index):
    for value in (2**64 - 100, 2**63 + 5, 2**64 - 1, 2**63):
        target = np.array([1, value], kind)
        for function in (ref.forward, ref.backward, ext.forward, ext.forward_backward, ext.evaluate):
            with pytest.raises(IndexError, match=rf"target\[1\] is {value}, not a class: 0 to 2"):
                function(np.zeros((2, 3)), target, ignore_index=ignore_index)


@pytest.mark.parametrize("kind", [">i8", ">i4", ">u2", ">u8"])
def test_byte_order_changes_nothing(kind):
    random = np.random.default_rng(0)
    z, t, w = random.normal(size=(50, 7)), random.integers(0, 7, 50), random.random(7)
    for native, other in ((np.float32, ">f4"), (np.float64, ">f8")):
        expected = ext.forward_backward(z.astype(native), t, weight=w)
        loss, gradient = ext.forward_backward(z.astype(native).astype(other), t.astype(kind), weight=w.astype(">f8"))
        assert loss == expected[0] and gradient.dtype == native
        assert np.array_equal(gradient, expected[1])
        assert ext.evaluate(z.astype(other), t.astype(kind)) == ext.evaluate(z.astype(native).astype(native), t) or (
            native == np.float32
        )


@pytest.mark.parametrize("value", [2**63, 2**64 - 1, -(2**63) - 1])
def test_an_ignore_index_beyond_64_bits_is_a_value_error_everywhere(value):
    z, t = np.zeros((2, 3)), np.array([0, 1])
    for function in (ref.forward, ref.backward, ext.forward, ext.forward_backward, ext.evaluate):
        with pytest.raises(ValueError, match=str(value)):
            function(z, t, ignore_index=value)
    for function in (torch.nn.functional.cross_entropy, lace_loss, lambda *a, **o: LACELoss(**o)(*a)):
        with pytest.raises(ValueError):
            function(torch.tensor(z), torch.tensor(t), ignore_index=value)


def test_a_mask_is_refused_and_never_dropped():
    z, t = np.ma.masked_array(np.zeros((2, 3)), mask=np.eye(2, 3)), np.array([0, 1])
    masked_t, w = np.ma.masked_array(t, mask=[True, False]), np.ma.masked_array(np.ones(3), mask=[1, 0, 0])
    for function in (ref.forward, ref.backward, ext.forward, ext.forward_backward, ext.evaluate):
        for arguments, options in (((z, t), {}), ((z.data, masked_t), {}), ((z.data, t), {"weight": w})):
            with pytest.raises(TypeError, match="mask"):
                function(*arguments, **options)


def test_out_and_threads_are_what_they_must_be():
    z, t = np.zeros((2, 3)), np.array([0, 1])
    for out in ([0.0] * 6, memoryview(bytearray(48)), 3):
        with pytest.raises(TypeError, match="out must be a NumPy array"):
            ext.forward_backward(z, t, out=out)
    with pytest.raises(TypeError):
        ext.forward_backward(z, t, threads=1.5)


def test_a_mean_of_large_losses_is_there_although_their_sum_is_not():
    z, t = np.array([[0, 3e38], [0, 3e38]], np.float32), np.array([0, 0])
    assert ext.forward(z, t) == np.float32(3e38)
    assert lace_loss(torch.tensor(z), torch.tensor(t)).item() == np.float32(3e38)


# --- threads and the system -------------------------------------------------------------------------------------------

LARGE = "np.ones((4096, 1000), np.float32), np.zeros(4096, int)"


def test_a_thread_that_outlives_the_main_thread_and_an_exit_hook_get_their_values():
    program = f"""
import atexit, threading, time, numpy as np, torch
from lace_loss import ext
from lace_loss.ext.torch import lace_loss
expected = ext.forward({LARGE}, )
def late():
    time.sleep(0.5)
    z, y = {LARGE}
    assert ext.forward(z, y) == expected
    print("late", lace_loss(torch.tensor(z), torch.tensor(y)).item() == expected)
def last():
    print("last", ext.forward({LARGE}) == expected)
atexit.register(last)
threading.Thread(target=late).start()
"""
    assert sorted(in_a_process(program).splitlines()) == ["last True", "late True"]


def test_a_system_without_another_thread_leaves_the_work_to_the_caller(monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    random = np.random.default_rng(0)
    z, y = random.normal(size=(4096, 200)).astype(np.float32), random.integers(0, 200, 4096)
    expected = ext.forward_backward(z, y, threads=1)
    monkeypatch.setattr(threading.Thread, "start", none)
    monkeypatch.setattr(ext.threads, "_pool", None)
    loss, gradient = ext.forward_backward(z, y, threads=4)
    assert loss == expected[0] and np.array_equal(gradient, expected[1])
    monkeypatch.undo()
    gradient[:] = 7  # a part that was handed out and not begun is never worked on later
    ext.forward_backward(z, y, threads=4)
    assert (gradient == 7).all()


ARITHMETIC = """
import ctypes, ctypes.util, numpy as np, torch
from lace_loss import ext
from lace_loss.ext.torch import lace_loss
random = np.random.default_rng(0)
logits, y, weights = 60 * random.normal(size=(3000, 100)), random.integers(0, 100, 3000), random.random(100)
inputs = [(logits.astype(dtype), weights.astype(dtype)) for dtype in (np.float32, np.float64)]
def results(threads):
    found = []
    for z, w in inputs:
        for options in ({}, {"weight": w}, {"label_smoothing": 0.1}):
            loss, gradient = ext.forward_backward(z, y, 0.7, threads=threads, **options)
            found.append(np.asarray(loss).tobytes() + gradient.tobytes())
        found.append(ext.forward(z, y, reduction="sum").tobytes())
        found.append(lace_loss(torch.tensor(z), torch.tensor(y)).numpy().tobytes())
    return found
expected = results(1)
assert results(4) == expected
"""


@pytest.mark.parametrize(
    "change", ["assert torch.set_flush_denormal(True)"] + [f"ctypes.CDLL(None).fesetround({r})" for r in (0x400, 0x800)]
)
def test_every_number_of_threads_gives_the_same_bits_in_any_arithmetic_mode(change):
    """The mode of the calling thread alone is changed: flush to zero, rounding down (0x400 on x86), up (0x800)."""
    if not torch.set_flush_denormal(False):
        pytest.skip("torch cannot flush subnormal numbers here: not an x86 processor")
    in_a_process(ARITHMETIC + change + "\nassert results(4) == expected\nassert results(1) == expected\n")
