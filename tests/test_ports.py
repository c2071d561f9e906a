"""The ports of tests/ports, each certified by the checker as its head says, and used as their users do.

Needs jax and keras (`pip install '.[peers]'`), node and rustc. The port in C, through_header.c, is test_machines.py's.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lace_loss import ref
from lace_loss.ref.__main__ import main
from lace_loss.ref.case import VECTORS, read
from lace_loss.ref.check import judge

PORTS = Path(__file__).parent / "ports"
LEVELS = ["core", "gradient", "batch", "layout", "large", "rows"]


@pytest.fixture
def tool():
    """A program's path, or a skip that names it."""

    def found(name):
        return shutil.which(name) or pytest.skip(f"no {name}")

    return found


def certify(capsys, *arguments, levels=LEVELS):
    """The checker passes the port, and says so of every level."""
    status = main(["check", *map(str, arguments), "--levels", *levels])
    printed = capsys.readouterr()
    assert status == 0, printed.out + printed.err
    for level in levels:
        assert f"-{level}.txt" in printed.out


@pytest.mark.parametrize(("dtype", "plain"), [("f32", []), ("f64", ["--plain"])])
def test_the_javascript_port_is_exact_in_float32_and_plain_in_float64(dtype, plain, tool, capsys):
    certify(capsys, "--command", f"{tool('node')} {PORTS / 'lace.js'}", "--dtypes", dtype, *plain)


@pytest.mark.parametrize(("dtype", "plain"), [("f32", []), ("f64", ["--plain"])])
def test_the_rust_port_is_exact_in_float32_and_plain_in_float64(dtype, plain, tool, tmp_path, capsys):
    command = [tool("rustc"), "-O", "--edition", "2021", "-D", "warnings", "-o", tmp_path / "port", PORTS / "lace.rs"]
    subprocess.run(command, check=True)
    certify(capsys, "--command", tmp_path / "port", "--dtypes", dtype, *plain)


@pytest.mark.parametrize(("dtype", "levels"), [("f32", [*LEVELS, "second"]), ("f64", ["gradient", "large"])])
def test_the_jax_port_is_plain_and_flushes_subnormal_numbers(dtype, levels, capsys):
    pytest.importorskip("jax")
    port = [f"{PORTS / 'lace_jax.py'}:answer", "--product", f"{PORTS / 'lace_jax.py'}:product"]
    certify(capsys, *port, "--plain", "--flushed", "--dtypes", dtype, levels=levels)


def test_the_jax_port_is_right_under_jit_of_vmap_of_grad(monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.syspath_prepend(PORTS)
    from lace_jax import lace_loss

    cases = [case for case in read(VECTORS / "f32-gradient.txt") if case.shape == (3,) and not case.refused]
    logits, target = (np.stack([getattr(case, key) for case in cases]) for key in ("logits", "target"))
    loss, gradient = jax.jit(jax.vmap(jax.value_and_grad(lambda z, t: lace_loss(z, t, reduction="sum"))))(
        logits, target
    )
    assert len(cases) > 20
    for case, *found in zip(cases, loss, gradient, strict=True):
        answer = {"loss": np.asarray(found[0]), "gradient": np.asarray(found[1])}
        assert judge(case, answer, plain=True, flushed=True).holds, str(case)


def test_the_keras_port_is_plain_on_torch(capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip(f"keras runs on {keras.backend.backend()} already")
    certify(capsys, f"{PORTS / 'lace_keras.py'}:answer", "--plain")


def test_the_keras_port_is_plain_on_jax():
    pytest.importorskip("jax")
    pytest.importorskip("keras")
    port = [f"{PORTS / 'lace_keras.py'}:answer", "--plain", "--flushed", "--levels", "gradient", "--dtypes", "f32"]
    command = [sys.executable, "-m", "lace_loss.ref", "check", *port]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"KERAS_BACKEND": "jax"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "f32-gradient.txt" in done.stdout


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # Keras's own
def test_a_keras_model_is_trained_and_evaluated_by_the_port(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    monkeypatch.syspath_prepend(PORTS)
    from lace_keras import LACE

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8)).astype(np.float32), rng.integers(0, 5, 64)
    soft = np.eye(5, dtype=np.float32)[y] * 0.75 + 0.05
    weights = rng.uniform(0.5, 2, 64)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(5)])
    model.compile("sgd", LACE(label_smoothing=0.1, strength=0.5))
    logits, options = model.predict(x, verbose=0), {"label_smoothing": 0.1, "strength": 0.5}
    for target in (y, y[:, None], soft):
        expected = ref.forward(logits, target if target is soft else y, **options)
        assert model.evaluate(x, target, verbose=0) == pytest.approx(expected, rel=1e-5)
    losses = ref.forward(logits, y, reduction="none", **options)
    weighted = model.loss(y, logits, sample_weight=weights)
    assert float(weighted) == pytest.approx((losses * weights).mean(), rel=1e-5)
    assert LACE.from_config(model.loss.get_config()).get_config() == model.loss.get_config()
    history = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert history[2] < history[0]
