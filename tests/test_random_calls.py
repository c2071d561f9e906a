"""Random calls, with fixed seeds, have the definition's values; sanitizers and a lack of memory find nothing."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import random_calls
import torch
from tolerances import FLOAT64, ROUNDINGS
from torch.nn.functional import cross_entropy

from lace_loss import ext
from lace_loss.ext.torch import lace_loss

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("seed", range(2))
def test_ext_has_the_values_and_errors_of_the_definition(seed):
    wrong = [(fault, call) for fault, call in random_calls.calls(1000, seed) if fault]
    assert not wrong, wrong[0]


@pytest.mark.parametrize(("name", "change"), [("forward", 1e-5), ("backward", 1e-5), ("backward", np.nan)])
def test_a_planted_mistake_is_seen(name, change, monkeypatch):
    right = getattr(ext, name)
    monkeypatch.setattr(ext, name, lambda *call, **options: right(*call, **options) * np.float32(1 + change))
    assert any(fault for fault, _ in random_calls.calls(200, 0))


def sanitized(folder):
    """Environment in which Python loads a copy of the package whose kernel is built with ASan and UBSan."""
    package = folder / "lace_loss"
    package.mkdir()
    shutil.copy(ROOT / "__init__.py", package)
    for part in ("ref", "ext"):
        shutil.copytree(ROOT / part, package / part, ignore=shutil.ignore_patterns("*.so", "vectors", "__pycache__"))
    # _cpu.c is what Cython made when the package was installed.
    sources = [package / "ext" / name for name in ("_cpu.c", "lace_f32.c", "lace_f64.c", "lace_builds.c")]
    sources += (package / "ext" / "builds").glob("*.c")
    flags = ["-g", "-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=undefined", f"-I{sysconfig.get_path('include')}", "-shared", "-fPIC"]
    library = package / "ext" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["gcc", *flags, *sources, "-o", library], check=True)
    names = ("libasan.so", "libubsan.so")
    found = [subprocess.run(["gcc", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "PYTHONPATH": str(folder),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",  # of the interpreter's own
    }


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc: the extension is not tried with sanitizers")
def test_the_extension_passes_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    environment = sanitized(tmp_path)
    where = "import ctypes, lace_loss.ext._cpu as m; ctypes.CDLL(None).__asan_init; print(m.__file__)"
    loaded = subprocess.run([sys.executable, "-c", where], env=environment, capture_output=True, text=True)
    assert loaded.stdout.startswith(str(tmp_path)), loaded.stderr
    program = [sys.executable, ROOT / "tests/random_calls.py", "400", "100"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "400 calls compared, 0 wrong\n"), done.stdout + done.stderr[-3000:]


def test_the_nth_allocation_that_fails_is_a_memory_error_and_nothing_else():
    """Of Python's own allocations, one after another; the next call has the right values again."""
    memory = pytest.importorskip("_testcapi", reason="Python without its own test modules")
    logits = np.random.default_rng(0).normal(size=(40, 17)).astype(np.float32)
    target, weight, strided = np.arange(40) % 17, np.ones(17), np.repeat(logits, 2, axis=1)[:, ::2]
    for z, options in ((logits, {}), (strided, {"weight": weight, "label_smoothing": 0.1}), (logits[:, :, None], {})):
        y = target[:, None] if z.ndim == 3 else target
        wanted, refused = ext.forward_backward(z, y, **options), 0
        for n in range(400):
            error = None
            try:
                memory.set_nomemory(n, n + 1)
                ext.forward_backward(z, y, **options)
                memory.remove_mem_hooks()
                break
            except (MemoryError, SystemError) as raised:  # the second from NumPy, which has lost the first
                memory.remove_mem_hooks()
                error = raised
            refused += isinstance(error, MemoryError)
            found = ext.forward_backward(z, y, **options)
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert refused > 5


# --- torch ------------------------------------------------------------------------------------------------------------


def tensors(rng):
    """Logits, target and options of a call of cross_entropy."""
    shape = random_calls.SHAPES[rng.integers(len(random_calls.SHAPES))]
    axis = 0 if len(shape) == 1 else 1
    k, samples = shape[axis], shape[:axis] + shape[axis + 1 :]
    dtype = [torch.float32, torch.float64, torch.bfloat16, torch.float16][rng.integers(4)]
    logits = torch.tensor(rng.normal(size=shape) * rng.choice([0.0, 1, 20])).to(dtype)
    if len(shape) == 4 and rng.random() < 0.5:
        logits = logits.to(memory_format=torch.channels_last)
    elif rng.random() < 0.3:
        logits = torch.stack([logits, logits], -1)[..., 0]
    elif len(shape) > 1 and rng.random() < 0.3:
        logits = logits[:1].expand(shape)
    options = {"reduction": ["mean", "sum", "none"][rng.integers(3)], "label_smoothing": float(rng.choice([0, 0.1]))}
    if rng.random() < 0.4:
        options["weight"] = torch.tensor(rng.uniform(size=k)).to(dtype)
    if rng.random() < 0.3:
        target = torch.tensor(np.moveaxis(rng.dirichlet(np.ones(k), samples), -1, axis)).to(dtype)
    else:
        options["ignore_index"] = int(rng.choice([-100, 0]))
        target = torch.tensor(rng.integers(k, size=samples))
        if target.ndim and rng.random() < 0.3:
            target = torch.where(torch.tensor(rng.random(samples) < 0.3), options["ignore_index"], target)
    return logits, target, options


def loss_and_gradient(function, logits, target, **options):
    """Of the mean of what the function gives, so that `none` has a gradient from above; or the kind of error."""
    z = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    try:
        loss = function(z, target, **options)
        loss.sum().backward()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return type(error)
    return loss.detach(), z.grad


@pytest.mark.parametrize("seed", range(2))
def test_strength_0_is_torchs_cross_entropy(seed):
    """In float64, whatever the dtype: torch's own rounding in half types is coarser than ours."""
    rng = np.random.default_rng(seed)
    for number in range(400):
        logits, target, options = tensors(rng)
        wide = {key: value.double() if key == "weight" else value for key, value in options.items()}
        y = target.double() if target.is_floating_point() else target
        wanted = loss_and_gradient(cross_entropy, logits.double(), y, **wide)
        found = loss_and_gradient(lace_loss, logits, target, strength=0.0, **options)
        assert not isinstance(found, type) and not isinstance(wanted, type), (number, found, wanted)
        unit = torch.finfo(logits.dtype).eps
        tolerance = max(FLOAT64, unit * (max(ROUNDINGS.values()) / 2 if logits.itemsize > 2 else 1))
        for name, a, b in zip(("loss", "gradient"), found, wanted, strict=True):
            assert a.dtype == logits.dtype and a.shape == b.shape, (number, name)
            largest = b.abs().nan_to_num(0).max().clamp(min=1) if b.numel() else 1
            close = torch.allclose(a.double(), b, rtol=0, atol=float(tolerance * largest), equal_nan=True)
            assert close, (number, name, logits, target, options, a, b)
