"""The ports of ref/ports, each certified by the checker as its head says, and used as their users do.

Needs jax and keras (`pip install '.[peers]'`), node and rustc. C, by machines/through_header.c, is test_machines.py's.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lace_loss import ref
from lace_loss.ref.__main__ import main, parser
from lace_loss.ref.case import VECTORS, read
from lace_loss.ref.check import judge

TESTS = Path(__file__).parent
PORTS = TESTS.parent / "ref" / "ports"
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


@pytest.mark.parametrize("port", sorted(path.name for path in PORTS.iterdir() if path.is_file()))
def test_the_commands_at_a_ports_head_are_the_checkers_and_ask_for_the_levels_that_are_certified_here(port):
    head = re.sub(r"\\\n[ *]*", "", (PORTS / port).read_text()[:2000])
    commands = [shlex.split(line) for line in re.findall(r"-m lace_loss\.ref (check .*?)(?:   .*)?\n", head)]
    called = [parser().parse_args(command) for command in commands]
    assert set(LEVELS) <= set.union(*(set(args.levels or LEVELS) for args in called))
    for args in called:
        file = args.command.split()[-1] if args.command else args.port.rpartition(":")[0]
        assert file == "./port" or (TESTS.parent / file) == PORTS / port


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


# ---- what users hand to a port ----

INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
CLASSES = 300  # more than 8 bits have; class 156 is -100 in them


def beyond(integer):
    """Integers of a type that are no class of CLASSES, though others with the same low bits are."""
    low, high = np.iinfo(integer).min, np.iinfo(integer).max
    wanted = [-1, -100, 2**16 + 1, 2**16 - 100, 2**32 + 1, 2**32 - 100, 2**64 - 100, 2**63 + 1, low, high]
    return [value for value in wanted if low <= value <= high and not 0 <= value < CLASSES]


def check_integers(integer, loss):
    """`loss` of logits, targets and an ignored class is `ref`'s; a class that is none is NaN or an error."""
    logits = np.random.default_rng(0).normal(size=(2, CLASSES)).astype(np.float32)
    known = [0, 1, 100, 127, 128, 156, 255, 256, 299]
    for ignore_index in (-100, 156, 0):
        for value in [value for value in known if value <= np.iinfo(integer).max]:
            target = np.array([1, value], integer)
            expected = ref.forward(logits, target, ignore_index=ignore_index)
            assert loss(logits, target, ignore_index) == pytest.approx(expected, rel=1e-5), (value, ignore_index)
    for value in beyond(integer):
        if value != -100:
            try:
                assert np.isnan(loss(logits, np.array([1, value], integer), -100)), value
            except (ValueError, RuntimeError, OverflowError) as error:
                assert re.search(r"integers|dtype|no class|not a class", str(error)), error
    if np.iinfo(integer).min <= -100:
        alone = ref.forward(logits[:1], [1])
        assert loss(logits, np.array([1, -100], integer), -100) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("jit", [False, True])
def test_every_integer_is_the_class_that_it_is_in_jax(integer, jit, monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.syspath_prepend(PORTS)
    from lace_jax import lace_loss

    def loss(logits, target, ignore_index):
        def function(target):
            return lace_loss(logits, target, ignore_index=ignore_index)

        if jit and target.itemsize == 8:
            pytest.skip("jax.jit narrows arrays of 64 bits before the port sees them")
        return float((jax.jit(function) if jit else function)(target))

    jax.config.update("jax_enable_x64", False)
    check_integers(integer, loss)


IN_KERAS = """
import sys, numpy as np, pytest
sys.path[:0] = [{ports!r}, {tests!r}]
from lace_keras import lace_loss
from test_ports import INTEGERS, check_integers
for integer in INTEGERS:
    try:
        check_integers(integer, lambda z, t, i: float(lace_loss(z, t, ignore_index=i)))
    except ValueError as error:
        assert integer == "uint64" and "Unsupported dtype for PyTorch: uint64" in str(error), (integer, error)
for target in (np.zeros(2, bool), np.zeros(2, np.float32), np.zeros((2, 1), int), np.zeros(3, int)):
    with pytest.raises(ValueError, match="target must hold integers or floats of shape"):
        lace_loss(np.zeros((2, 3), np.float32), target)
with pytest.raises(ValueError, match="'none', 'mean' or 'sum', got 'avg'"):
    lace_loss(np.zeros((2, 3), np.float32), np.zeros(2, int), reduction="avg")
with pytest.raises(TypeError, match="gamma"):
    lace_loss(np.zeros((2, 3), np.float32), np.zeros(2, int), gamma=2)
print("done")
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_integer_is_the_class_that_it_is_in_keras(backend):
    for package in (backend, "keras"):
        if not find_spec(package):
            pytest.skip(f"no {package}")
    code = IN_KERAS.format(ports=str(PORTS), tests=str(TESTS))
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "done\n", done.stderr[-2000:]


def test_jax_refuses_what_it_cannot_take(monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.syspath_prepend(PORTS)
    from lace_jax import lace_loss

    logits = np.zeros((2, 3), np.float32)
    for target in (np.zeros(2, bool), np.zeros(2, np.float32), np.zeros((2, 1), int), np.zeros(3, int)):
        with pytest.raises(ValueError, match="target must hold integers or floats of shape"):
            lace_loss(logits, target)
    with pytest.raises(ValueError, match="'none', 'mean' or 'sum', got 'avg'"):
        lace_loss(logits, [0, 1], reduction="avg")
    with pytest.raises(TypeError, match="gamma"):
        lace_loss(logits, [0, 1], gamma=2)


UNCHANGED = """
import os, sys, {package}
sys.path.insert(0, {ports!r})
def state():
    import numpy
    found = {{"environment": dict(os.environ), "errors": numpy.geterr(), "folder": os.getcwd()}}
    if "jax" in sys.modules:
        import jax
        found["jax"] = dict(jax.config.values)
    if "keras" in sys.modules:
        import keras
        found["keras"] = keras.config.backend(), keras.config.floatx(), keras.config.epsilon()
        found["keras"] += (keras.config.image_data_format(), str(keras.config.dtype_policy()))
    return found
before = state()
import {port}
assert state() == before
print("same")
"""


@pytest.mark.parametrize(("package", "port"), [("jax", "lace_jax"), ("keras", "lace_keras")])
def test_importing_a_port_changes_nothing_outside_it(package, port):
    if not find_spec(package):
        pytest.skip(f"no {package}")
    code = UNCHANGED.format(package=package, port=port, ports=str(PORTS))
    environment = os.environ | {"KERAS_BACKEND": "torch"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "same\n", done.stderr[-2000:]


IN_JAVASCRIPT = """
const before = Object.getOwnPropertyNames(globalThis).join();
const { lace } = require(process.argv[1]), assert = require("assert");
assert.equal(Object.getOwnPropertyNames(globalThis).join(), before);
const z = [Array.from({ length: 300 }, (_, j) => Math.sin(j)), Array.from({ length: 300 }, (_, j) => Math.cos(j))];
const wanted = lace(z, [1, 156]);
const kinds = [Uint8Array, Int16Array, Uint16Array, Int32Array, Uint32Array, Float64Array];
for (const kind of kinds) assert.deepEqual(lace(z, kind.from([1, 156])), wanted);
for (const kind of [BigInt64Array, BigUint64Array]) assert.deepEqual(lace(z, kind.from([1n, 156n])), wanted);
const alone = lace([z[0]], [1]).loss;
for (const kind of [Int8Array, Int16Array, Int32Array]) assert.equal(lace(z, kind.from([1, -100])).loss, alone);
assert.equal(lace(z, BigInt64Array.from([1n, -100n])).loss, alone);
assert.equal(lace(z, [1n, 7n], { ignoreIndex: 7 }).loss, alone);
assert.equal(lace(z, [1, 7], { ignoreIndex: 7n }).loss, alone);
for (const bad of [300, 300n, -1, -1n, 2n ** 64n - 100n, 2n ** 32n + 1n, 1.5, NaN])
  assert.throws(() => lace(z, [1, bad]), { name: "RangeError", message: /target 1 is .*, not a class: 0 to 299/ });
for (const bad of ["1", null, undefined, true, [1, 2]])
  assert.throws(() => lace(z, [1, bad]), { name: "TypeError", message: /target 1 must be a number, a BigInt or 300/ });
assert.throws(() => lace(z, [1]), /1 targets for 2 rows/);
for (const name of ["ignoreindex", "ignore_index", "label_smoothing", "gamma", "toString"])
  assert.throws(() => lace(z, [1, 2], { [name]: 1 }), { name: "TypeError", message: new RegExp(`no option ${name}`) });
assert.throws(() => lace(z, [1, 2], { reduction: "avg" }), /reduction is avg: none, mean or sum/);
console.log("done");
"""


def test_every_integer_is_the_class_that_it_is_in_javascript(tool):
    done = subprocess.run([tool("node"), "-e", IN_JAVASCRIPT, PORTS / "lace.js"], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_other_integers_do_not_compile_in_rust(tool, tmp_path):
    """Nor do options that do not exist; what is converted with `as` is its user's."""
    port = PORTS / "lace.rs"
    call = "lace(&[vec![0.0; 300]], &Target::Classes(&[{}]), &Options {{ {} ..Options::default() }})"
    wrong = (("156u8", "", "expected `i64`"), ("0", "gamma: 2.0,", "no field"))
    for classes, options, sentence in (("156i64", "", ""), *wrong):
        source = tmp_path / "user.rs"
        text = port.read_text().replace("fn main()", "#[allow(dead_code)]\nfn answers()")
        source.write_text(text + "fn main() { let _ = " + call.format(classes, options) + "; }")
        command = [tool("rustc"), "--edition", "2021", "--emit=metadata", "-o", tmp_path / "user.rmeta", source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode == 0) == (not sentence) and sentence in done.stderr, done.stderr


@pytest.mark.parametrize("integer", ["uint8_t", "int32_t", "uint64_t"])
def test_other_integers_do_not_compile_in_c(integer, tool, tmp_path):
    (tmp_path / "user.c").write_text(
        '#include "lace.h"\nint64_t f(float *z, float *l) '
        f"{{ static const {integer} t[1] = {{0}}; return lace_rows_f32(l, 0, z, t, 0, 0, 0, 1, 3, 0, 0); }}\n"
    )
    include = f"-I{TESTS.parent / 'ext'}"
    command = [tool("gcc"), "-std=c99", "-pedantic-errors", include, "-fsyntax-only", tmp_path / "user.c"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "int64_t" in done.stderr
