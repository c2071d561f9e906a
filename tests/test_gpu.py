"""The kernels of a GPU: against the golden vectors, in the choice of path, and as machine code.

Without a GPU an emulator runs what is compiled for one, and machine code is compiled for machines not here.
"""

import collections
import contextlib
import importlib.util
import io
import random
import re
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import exact, rows, ulps
from test_options import assert_close, each_problem
from tolerances import COMPOSITE, FLOAT32, ULP
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from lace_loss import ref
from lace_loss.ext import torch as lace_torch
from lace_loss.ext.torch import LACELoss, gpu, lace_loss
from lace_loss.ext.torch.call import describe
from lace_loss.ext.torch.composite import statistics as composite_statistics
from lace_loss.ref.case import VECTORS, read
from lace_loss.ref.check import run
from lace_loss.ref.installed import in_torch

triton = pytest.importorskip("triton", reason="no Triton on this machine")
from benchmarks import gpu_counts  # noqa: E402
from machines import emulated  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from lace_loss.ext.torch import kernels  # noqa: E402

HERE = Path(__file__).parent


@pytest.fixture(params=["cuda"])
def launched(a_gpu, monkeypatch):
    """The device, and the names of the kernels that ran."""
    names = []
    launch = gpu.launch
    monkeypatch.setattr(gpu, "launch", lambda kernel, *rest: names.append(kernel.__name__) or launch(kernel, *rest))
    return a_gpu, names


@pytest.mark.parametrize(
    "name", ["f32-gradient", "f32-batch", "f32-layout", "f32-large", "f16-gradient", "bf16-gradient"]
)
def test_the_golden_vectors_hold_within_16_ulp_of_float32_or_one_of_a_half_type(name, launched):
    device, names = launched
    dtype = name.split("-")[0]
    cases = [case for case in read(VECTORS / f"{name}.txt") if "probabilities" not in case.words]
    results = run(in_torch(lace_loss, dtype, device), cases, 4 if dtype == "f32" else False)
    assert [f"{result.case} {result.errors}" for result in results if not result.passes] == []
    assert len(names) >= len(cases)


def test_hostile_rows_are_within_16_ulp(launched):
    """Rows of one block and of several, that begin at multiples of 16 bytes and between them."""
    device, _ = launched
    for classes in (2, 10, 65, 100, 1000, 4097, 50_257):
        names, logits, targets = zip(*rows(classes, np.dtype(np.float32)), strict=True)
        input = torch.tensor(np.array(logits), device=device, requires_grad=True)
        losses = lace_loss(input, torch.tensor(targets, device=device), reduction="none")
        losses.sum().backward()
        for i, name in enumerate(names):
            loss, gradient = exact(logits[i], targets[i])
            assert ulps(losses[i].item(), loss, np.float32) <= ULP["gpu"], name
            assert ulps(input.grad[i].cpu().numpy(), gradient, np.float32) <= ULP["gpu"], name


def test_long_rows_are_as_exact_as_short_ones(launched):
    """An odd number of classes, for the second row to begin between 16 bytes; the target in the second block."""
    device, _ = launched
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(2, 9001))).astype(np.float32)
    logits[1, 5000] = logits.max() + 14
    input = torch.tensor(logits, device=device, requires_grad=True)
    lace_loss(input, torch.tensor([17, 5000], device=device), reduction="sum").backward()
    wanted = ref.backward(logits, [17, 5000], reduction="sum")
    off = np.abs(input.grad.cpu().numpy() - wanted) / np.spacing(np.abs(wanted).astype(np.float32))
    assert off.max() <= ULP["gpu"]


def a_call(rng):
    """Logits in some layout at some address, their classes, a grad_output that float16 has, and options, as drawn."""
    classes = rng.choice([1, 2, 3, 10, 19, 37, 65, 100, 127, 256, 257, 300, 513, 1100])
    samples = rng.choice([1, 2, 3, 7, 33, 70])
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    layout = rng.choice(["rows", "rows", "offset", "of longer rows", "strided", "transposed", "planes", "last"])
    shape = (samples, classes, rng.choice([1, 3, 40])) if layout in ("planes", "last") else (samples, classes)
    logits = rng.choice([0.1, 3.0, 30.0]) * torch.randn(shape, generator=generator)
    if rng.random() < 0.3:
        logits[torch.rand(shape, generator=generator) < 0.05] = rng.choice([-torch.inf, -200.0, 0.0])
    z = logits.to(dtype)
    if layout == "offset":
        offset = rng.randrange(1, 8)
        z = torch.cat([z.new_full((offset,), torch.nan), z.reshape(-1)])[offset:].view(shape)
    elif layout == "of longer rows":
        z = torch.cat([z, z.new_full((samples, rng.randrange(1, 9)), torch.nan)], 1)[:, :classes]
    elif layout == "strided":
        z = z.repeat_interleave(2, 0)[::2]
    elif layout == "transposed":
        z = z.t().contiguous().t()
    elif layout == "last":
        z = z.movedim(1, -1).contiguous().movedim(-1, 1)
    target = torch.randint(classes, shape[:1] + shape[2:], generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = -100
    target = target.to(rng.choice([torch.int64, torch.int32, torch.int16]))
    options = {"reduction": rng.choice(["mean", "sum", "none"]), "strength": rng.choice([1.0, 1.0, 0.0, 0.5])}
    if rng.random() < 0.3:
        options["weight"] = torch.rand(classes, generator=generator).to(dtype)
    size = target.shape if options["reduction"] == "none" and rng.random() < 0.5 else ()
    grad_output = rng.choice([1.0, 32768.0, -0.3]) * (torch.rand(size, generator=generator) if size else torch.ones(()))
    return z, target, grad_output, options


@pytest.mark.parametrize("ex2", [0, -1, 1], ids=["exact", "low", "high"])
@pytest.mark.parametrize("many", [256, 1], ids=["few", "many"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own exp2 is what it is")
def test_random_calls_are_within_16_ulp_with_the_worst_exp2_that_is_allowed(ex2, many, monkeypatch):
    """Of what is not a sum of losses or rounded to a half type: those are within a few units of it, too."""
    rng = random.Random(f"{ex2} {many}")
    monkeypatch.setattr(gpu, "ENOUGH_PROGRAMS", many)
    with emulated.active(emulated.Driver(ex2_error=ex2 * 2.0**-22)):
        for number in range(24):
            z, target, grad_output, options = a_call(rng)
            z.requires_grad_()
            loss = lace_loss(z, target, **options)
            expected = dict(options)
            if (weight := options.get("weight")) is not None:
                expected["weight"] = weight.float().numpy()
            above = torch.broadcast_to(grad_output, loss.shape).to(loss.dtype)
            (gradient,) = torch.autograd.grad(loss, z, above)
            given = z.detach().double().numpy(), target.numpy()
            with np.errstate(all="ignore"):
                wanted = ref.forward(*given, **expected), ref.backward(*given, above.double().numpy(), **expected)
                for got, right in zip((loss.detach(), gradient), wanted, strict=True):
                    assert is_near(got, np.asarray(right), grad_output.abs().max().item()), (number, z.shape, options)


def is_near(got, right, factor):
    """Within the bound in units of float32 and, of a half type, one of its own for the last rounding."""
    info, half = torch.finfo(got.dtype), got.dtype != torch.float32
    got = got.double().numpy()
    unit = np.maximum(2.0**-23 * np.abs(right), 2.0**-149 * max(1, factor))
    last = half * info.eps * np.maximum(np.abs(right), info.smallest_normal)
    overflown = np.isinf(got) & (np.abs(right) > info.max)
    same = (got == right) | (np.isnan(got) & np.isnan(right)) | overflown
    return bool((same | (np.abs(got - right) <= ULP["gpu"] * unit + last)).all())


# The largest of the other logits and what all the rest hold, for which 262,144 exponentials lose most of their sum, if
# their arguments' roundings are left in and 64 blocks are added one after the other: 61 to 66 x 2^-24, twice that of L.
FAR_BELOW = {
    torch.float16: (12.0, -3.611328125),
    torch.bfloat16: (11.4375, -3.28125),
    torch.float32: (12.0, -3.6106219),
}


@pytest.mark.parametrize(("dtype", "values"), FAR_BELOW.items(), ids=str)
def test_a_quarter_million_classes_far_below_the_largest_cost_16_ulp_at_most_before_rounding(
    dtype, values, launched, monkeypatch
):
    """The loss is float32 inside, and a buffer of float32 takes the gradient as it is."""
    monkeypatch.setattr(gpu, "gradient_like", lambda input: torch.empty(input.shape, device=input.device))
    device, _ = launched
    largest, others = values
    logits = torch.full((2, 262_144), others, dtype=torch.double)
    logits[:, 7] = largest
    logits[:, 200_000] = torch.tensor([largest + 12, largest - 1])
    input, target = logits.to(device, dtype), torch.full((2,), 200_000, device=device)
    loss, saved, divisor, *_ = gpu.forward(input, target, None, True, -100, "none", 0.0, 1.0, False)
    above = torch.tensor(2.0, device=device)
    gradient = gpu.backward(above, input, target, None, saved, divisor, -100, "sum", 0.0, 1.0)
    given = input.double().cpu().numpy(), target.cpu().numpy()
    for got, wanted in (
        (loss, ref.forward(*given, reduction="none")),
        (gradient / 2, ref.backward(*given, reduction="sum")),
    ):
        off = np.abs(got.double().cpu().numpy() - wanted) / np.spacing(np.abs(wanted).astype(np.float32))
        assert off.max() <= ULP["gpu"]


def test_a_lone_row_may_be_longer_than_a_block(launched):
    device, _ = launched
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        input = torch.tensor(logits, device=device, requires_grad=True)
        loss = lace_loss(input, torch.tensor(4321, device=device), **options)
        loss.backward()
        assert loss.shape == ()
        assert_close(loss.detach().cpu(), ref.forward(logits, 4321, **options), FLOAT32, options)
        assert_close(input.grad.cpu(), ref.backward(logits, 4321, **options), FLOAT32, options)


def test_a_launch_compares_no_globals(launched):
    """As Triton would with each constant of the module that a kernel uses, for a quarter of a launch's time."""
    device, _ = launched
    lace_loss(torch.randn(2, 3, device=device, requires_grad=True), torch.tensor([0, 1], device=device)).backward()
    assert kernels.forward.used_global_vals == kernels.backward.used_global_vals == {}


def test_the_statistics_of_a_step_cost_its_backward_pass_nothing(launched):
    """Autograd would fill three tensors with zeros, their gradients, in kernels of their own."""
    device, _ = launched
    input = torch.randn(4, 5, device=device, requires_grad=True)
    for statistics in (False, True):
        input.grad = None
        loss = lace_loss(input, torch.tensor([0, 4, 2, 1], device=device), statistics=statistics)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (loss[0] if statistics else loss).backward()
        operations = [event.name for event in profile.events() if event.name.startswith("aten::")]
        if not statistics:
            without = operations
    assert "aten::ones_like" in without
    assert sorted(operations) == sorted(without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(259, 10), (130, 65), (70, 256), (67, 513), (9, 4099), (2, 19, 3, 43), (3, 70, 65)])
def test_many_samples_are_given_a_thread_or_a_warp_each(shape, dtype, launched, monkeypatch):
    """As if a GPU had few multiprocessors, for so many samples to be many."""
    device, _ = launched
    monkeypatch.setattr(gpu, "ENOUGH_PROGRAMS", 1)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    target.view(-1)[3] = -100
    logits = logits.to(dtype)
    for statistics in (False, True):
        input = logits.detach().clone().to(device).requires_grad_()
        assert gpu.block(input, *gpu.layout(input)[1:], False)[-1] <= 2
        loss = lace_loss(input, target.to(device), statistics=statistics)
        loss, found = loss if statistics else (loss, None)
        loss.backward()
        given = logits.double().numpy(), target.numpy()
        tolerance = FLOAT32 if dtype == torch.float32 else 2**-8
        assert_close(loss.detach().float().cpu(), ref.forward(*given), tolerance, shape)
        assert_close(input.grad.float().cpu(), ref.backward(*given), tolerance, shape)
        if statistics:
            wanted = composite_statistics(logits, target, -100)
            assert torch.equal(found["rank"].cpu(), wanted[2])
            torch.testing.assert_close(found["cross_entropy"].cpu(), wanted[0], rtol=1e-4, atol=1e-6)


def test_every_option_agrees_with_the_reference(launched):
    device, names = launched
    problems = [found for found in each_problem(np.float32) if found[0][1] == "classes"]
    for case, (logits, target, grad_output, options) in islice(problems, 0, None, 11):
        weight = None if options["weight"] is None else torch.tensor(options["weight"], device=device)
        input = torch.tensor(logits, device=device, requires_grad=True)
        loss = lace_loss(input, torch.tensor(target, device=device), **options | {"weight": weight})
        loss.backward(torch.tensor(grad_output, device=device))
        assert_close(loss.detach().cpu(), ref.forward(logits, target, **options), FLOAT32, case)
        assert_close(input.grad.cpu(), ref.backward(logits, target, grad_output, **options), FLOAT32, case)
    assert set(names) == {"forward", "backward"}


@pytest.mark.parametrize("integer", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_narrow_class_indices_and_strided_logits_are_read_where_they_lie(integer, launched):
    device, _ = launched
    wide = torch.randn(6, 40, device=device)
    for logits in (wide[:, :30], wide[::2, 3:20], wide.t(), wide[:, ::2], wide[:1].expand(6, 40)):
        target = torch.arange(len(logits), device=device) % logits.shape[1]
        results = []
        for z, t in ((logits, target.to(integer)), (logits.contiguous(), target)):
            loss = lace_loss(z := z.detach().requires_grad_(), t)
            results.append((loss.detach(), *torch.autograd.grad(loss, z)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_losses_call_the_kernels_in_one_graph(dynamic, launched):
    device, names = launched
    for shape in ((5, 7), (5, 7, 2)):
        torch.compiler.reset()
        graphs = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(LACELoss(), fullgraph=True, dynamic=dynamic, backend=graphs)
        input = torch.randn(shape, device=device)
        target = (
            torch.tensor([0, 6, -100, 1, 2], device=device).reshape(-1, *[1] * (len(shape) - 2)).expand(5, *shape[2:])
        )
        for n in (5, 4, 3):
            z, t = input[:n].clone().requires_grad_(), target[:n].clone()
            if dynamic:
                torch._dynamo.mark_dynamic(z, 0)
            compiled(z, t).backward()
            assert_close(z.grad.cpu(), ref.backward(z.detach().cpu().numpy(), t.cpu().numpy()), FLOAT32, n)
        assert {"forward", "backward"} <= set(names)
        assert graphs.frame_count == 2 or not dynamic  # one forward and one backward


def test_the_registered_operations_pass_opcheck(launched):
    device, _ = launched
    target = torch.tensor([[0, 4], [2, -100]], device=device)
    for smoothing, reduction in ((0.0, "mean"), (0.1, "none")):
        for input in (torch.randn(2, 5, 2, device=device), torch.randn(2, 2, 5, device=device).movedim(-1, 1)):
            options = (-100, reduction, smoothing, 1.0)
            for wanted in product((False, True), repeat=2):
                torch.library.opcheck(gpu.registered_forward, (input, target, None, wanted[0], *options, wanted[1]))
            loss, saved, divisor, *_ = gpu.registered_forward(input, target, None, True, *options, False)
            arguments = (torch.ones_like(loss), input, target, None, saved, divisor, *options)
            torch.library.opcheck(gpu.registered_backward, arguments)


def test_second_derivatives_are_the_composite_form_s(launched):
    device, names = launched
    input, vector = torch.randn(4, 5, device=device, requires_grad=True), torch.randn(4, 5, device=device)
    target = torch.tensor([0, 4, -100, 2], device=device)
    (gradient,) = torch.autograd.grad(lace_loss(input, target), input, create_graph=True)
    (product,) = torch.autograd.grad(gradient, input, vector)
    given = [x.detach().cpu().numpy() for x in (input, target, vector)]
    assert_close(product.cpu(), ref.hessian_vector_product(*given), COMPOSITE["float32"], "product")
    assert names == ["forward", "backward"]


# What the choice of path depends on, and whether the kernels serve.
CHOICES = {
    "float32": ({}, True),
    "float16 and float32 weights under autocast": ({"dtype": torch.float16, "weight": torch.ones(5)}, True),
    "bfloat16": ({"dtype": torch.bfloat16}, True),
    "float64": ({"dtype": torch.float64}, False),
    "probabilities": ({"target": torch.ones(4, 5)}, False),
    "a weight that requires a gradient": ({"weight": torch.ones(5, requires_grad=True)}, False),
    "a target elsewhere": ({"target": torch.zeros(4, dtype=torch.long, device="meta")}, False),
    "no Triton or an old GPU": ({"triton": False}, False),
}


@pytest.mark.parametrize(("given", "serves"), CHOICES.values(), ids=CHOICES.keys())
def test_the_kernels_serve_float32_and_half_logits_with_class_indices(given, serves, monkeypatch):
    given = {"dtype": torch.float32, "target": torch.zeros(4, dtype=torch.long), "weight": None, "triton": True} | given
    monkeypatch.setattr(gpu, "on_gpu", lambda input: True)
    monkeypatch.setattr(gpu, "triton_supported", lambda device: given["triton"])

    def served(z, target, weight):
        with torch.autocast("cpu"):
            call = describe(z, target, weight, -100)
        return lace_torch._kernel(call, z, target) is gpu

    input, target, weight = torch.zeros(4, 5, dtype=given["dtype"]), given["target"], given["weight"]
    assert served(input, target, weight) == serves
    under_vmap = []
    torch.func.vmap(lambda z, t: under_vmap.append(served(z, t, None)) or z)(input, target)
    assert under_vmap == [False]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, torch.ones_like(input))
        assert not served(dual, target, weight)


def test_triton_serves_from_compute_capability_8_on_if_it_can_launch_a_kernel(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gpu, "runs_kernels", gpu.runs_kernels.__wrapped__)
    with emulated.active(emulated.Driver()):
        for capability, serves in (((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
            assert gpu.runs_kernels(device) == serves

        def no_compiler(*_):
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(emulated.Driver, "run", no_compiler)
        with pytest.warns(RuntimeWarning, match="cannot run the loss's kernels on cpu.*Failed to find C compiler"):
            assert not gpu.runs_kernels(device)
    for serves in (False, True):
        monkeypatch.setattr(gpu, "runs_kernels", lambda device, serves=serves: serves)
        assert gpu.triton_supported(device) == serves
    monkeypatch.delattr(lace_torch, "kernels")
    monkeypatch.setitem(sys.modules, "lace_loss.ext.torch.kernels", None)  # an import that fails
    assert not gpu.has_triton.__wrapped__()


def test_importing_the_module_and_using_it_on_a_cpu_needs_no_triton():
    code = """
import sys, torch
sys.modules["triton"] = None
from lace_loss.ext.torch import lace_loss
lace_loss(torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
assert "lace_loss.ext.torch.kernels" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


SHAPES = {
    "100 x 100": ((100, 100), torch.float32, {"statistics": True}),
    "256 x 1000": ((256, 1000), torch.bfloat16, {}),
    "8192 x 8192": ((8192, 8192), torch.float16, {}),
    "8192 x 50257": ((8192, 50_257), torch.bfloat16, {}),
    "8192 x 262144": ((8192, 262_144), torch.float32, {}),
    "images": ((8, 19, 512, 512), torch.bfloat16, {}),
    "smoothed and weighted": ((4096, 1000), torch.bfloat16, {"smoothing": 0.1}),
}


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
@pytest.mark.parametrize(("shape", "dtype", "options"), SHAPES.values(), ids=SHAPES.keys())
def test_compiled_kernels_keep_to_registers_read_16_bytes_at_a_time_and_know_no_float64(shape, dtype, options, arch):
    target = GPUTarget(*(("hip", arch, 64) if arch == "gfx942" else ("cuda", arch, 32)))
    for launch in gpu_counts.launches(torch.empty(shape, dtype=dtype, device="meta"), **options):
        binary = gpu_counts.compiled(launch, target)
        if arch == "gfx942":
            text = binary.asm["amdgcn"]
            assert "_f64" not in text
            assert re.search(r"\.vgpr_spill_count: +0\n", text)
            assert re.search(r"\.private_segment_fixed_size: 0\n", text)
            assert "_load_dwordx4" in text
        else:
            assert ".f64" not in binary.asm["ptx"]
            code = gpu_counts.Code(binary)
            names = collections.Counter(name for _, name, _ in code.instructions)
            assert names.total() > 100
            assert code.stack == 0
            assert names["LDG.E.128"] >= 1
            if launch.kernel is kernels.backward:
                assert names["STG.E.128"] >= 1


# What a kernel may cost, in instructions a logit forward and backward: an H100 issues 17 while it reads a logit of 16
# bits, and 34 while it reads and writes it. Short rows cost more, by what is to be done for a row.
COSTS = {
    "8192 x 128256": (13, 19),
    "8192 x 50257": (14, 23),
    "8192 x 50257 of 50304": (14, 23),
    "8192 x 128256, statistics": (18, 19),
    "65536 x 4160": (22, 25),
    "65536 x 513": (29, 31),
    "4096 x 1000": (32, 30),
    "1048576 x 256": (20, 20),
    "1048576 x 100": (29, 29),
    "1048576 x 65": (35, 34),
    "1048576 x 10": (90, 76),
    "8 x 19 x 512 x 512": (45, 28),
    "8 x 150 x 512 x 512": (25, 22),
}


@pytest.mark.parametrize(("text", "most"), COSTS.items(), ids=COSTS.keys())
def test_a_logit_of_16_bits_costs_so_many_instructions_and_no_register_spills(text, most):
    z = gpu_counts.logits_of(text, torch.bfloat16)
    for launch, instructions in zip(gpu_counts.launches(z, **gpu_counts.SHAPES[text]), most, strict=True):
        _, spilled, width, counted = gpu_counts.counted(launch, z.numel())
        assert (spilled, width) == (0, 16)
        assert instructions / 2 < counted <= instructions


@pytest.mark.parametrize("classes", [2, 10, 19, 37, 65, 100, 127, 151, 199, 250, 257, 513, 1000, 4097])
@pytest.mark.parametrize("samples", [8192, 1 << 20])
def test_no_number_of_classes_makes_registers_spill(samples, classes):
    for dtype in (torch.float32, torch.bfloat16):
        for launch in gpu_counts.launches(torch.empty(samples, classes, dtype=dtype, device="meta")):
            code = gpu_counts.Code(gpu_counts.compiled(launch, GPUTarget("cuda", 90, 32)))
            assert code.stack == 0, (dtype, launch.kernel)


def test_kernels_reach_past_2_31_logits():
    """8193 x 262144 is more: places are formed in 64 bits, in the kernels' own IR."""
    for launch in gpu_counts.launches(torch.empty(8193, 262_144, dtype=torch.bfloat16, device="meta")):
        binary = gpu_counts.compiled(launch, GPUTarget("cuda", 90, 32))
        assert not re.search(r"tt\.addptr [^\n]*!tt\.ptr<bf16>>, tensor<[\dx]+xi32>", binary.asm["ttir"])


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", HERE / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_fills_a_row_a_shape_and_pass_with_the_bytes_it_claims(benchmark):
    out = io.StringIO()
    shapes = ["8x16:float32", "2x5x3x4:bfloat16"]
    benchmark.measured(shapes, "cpu", 0, 1, benchmark.Timer("cpu"), out)
    head, table = out.getvalue().split("\n\n")
    bandwidth = float(re.match(r"Copy: (\S+) GB/s", head)[1])
    header, _, *body = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().split("\n"))
    assert header[:6] == ["shape", "pass", "us", "GB/s", "of copy", "cross_entropy"]
    assert {len(row) for row in body} == {len(header)}
    assert [row[:2] for row in body] == [[shape, name] for shape in shapes for name in ("forward", "backward", "both")]
    touches = {"forward": 1, "backward": 2, "both": 3}
    for shape, name, microseconds, rate, share, *others in body:
        size = {shapes[0]: 8 * 16 * 4, shapes[1]: 2 * 5 * 3 * 4 * 2}[shape]
        expected = touches[name] * size / float(microseconds) / 1e3
        assert abs(float(rate) - expected) <= 0.02 * expected + 1e-4
        assert abs(float(share.split()[0]) - 100 * expected / bandwidth) <= 1 + 5 * expected / bandwidth
        assert float(others[0]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu():
    """As a program, whose folder comes first in the search for modules: called cuda.py, torch would import it."""
    done = subprocess.run([sys.executable, HERE / "benchmarks" / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no CUDA device" in done.stderr


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@on_a_gpu
@pytest.mark.parametrize("options", [{}, {"statistics": True}], ids=str)
@pytest.mark.parametrize("shape", [(100, 100), (64, 50_257)])
def test_a_cuda_graph_holds_a_whole_step_and_replays_it_on_new_numbers(shape, options):
    input = torch.randn(shape, device="cuda", requires_grad=True)
    target = torch.randint(shape[1], shape[:1], device="cuda")
    criterion = LACELoss()
    statistics = options.get("statistics", False)

    def step():
        input.grad = None
        outputs = criterion(input, target, statistics=statistics)
        (outputs[0] if statistics else outputs).backward()
        return outputs

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        input.copy_(torch.randn(shape))
        target.copy_(torch.randint(shape[1], shape[:1]))
    gradient = input.grad
    graph.replay()
    loss = captured[0] if statistics else captured
    replayed = loss.clone(), gradient.clone()
    again = step()
    assert torch.equal(replayed[0], again[0] if statistics else again)
    assert torch.equal(replayed[1], input.grad)


@on_a_gpu
def test_nothing_waits_for_the_device_and_the_bits_are_the_same_in_every_run():
    input = torch.randn(4096, 5003, device="cuda", requires_grad=True)
    target = torch.randint(5003, (4096,), device="cuda")
    weight = torch.rand(5003, device="cuda")
    results = []
    for _ in range(3):
        input.grad = None
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = lace_loss(input, target, weight)
            (3 * loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((loss.detach(), input.grad))
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(found, results[0], strict=True))


@on_a_gpu
def test_a_class_out_of_range_leaves_the_context_alive():
    input = torch.randn(5, 7, device="cuda", requires_grad=True)
    lace_loss(input, torch.full((5,), 2**40, device="cuda")).backward()
    torch.cuda.synchronize()
    assert input.grad.isnan().all()
