"""The golden vectors through every backend that compiles the composite form, within the tolerance of a plain one.

What is compiled is made of a backend's own elementary functions: under `torch.func`, in exported and traced graphs and
where a weight requires a gradient. Inductor runs many rows in vectorised loops and few in scalar ones.
"""

import os
import shutil
from itertools import chain

import mpmath
import numpy as np
import pytest
import torch
from tolerances import FLOAT32
from torch.func import grad, grad_and_value, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from lace_loss import ref
from lace_loss.ext.torch import lace_loss
from lace_loss.ref.case import FORMATS, VECTORS, read
from lace_loss.ref.check import judge

pytestmark = pytest.mark.filterwarnings("ignore")  # the compilers' own

DTYPES = {"f32": torch.float32, "f64": torch.float64}


@pytest.fixture
def inductor():
    """torch.compile with the default backend, which needs a C++ compiler for a CPU."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        assert "CI" not in os.environ, "no C++ compiler: the golden vectors were not put through Inductor"
        pytest.skip("NO C++ COMPILER: the golden vectors were not put through Inductor")
    torch.compiler.reset()
    return lambda function: torch.compile(function, dynamic=False)


class Rows:
    """All cases of one row without options that have `classes` of them, or up to 16: a logit of -inf is none."""

    def __init__(self, dtype, classes=None):
        files = (VECTORS / f"{dtype}-{level}.txt" for level in ("gradient", "second"))
        self.dtype, self.format, width = DTYPES[dtype], FORMATS[dtype], classes or 16
        self.cases = [
            case
            for case in chain.from_iterable(map(read, files))
            if case.options == {"reduction": "none"}
            and len(case.shape) == 1
            and (case.classes == classes or (classes is None and case.classes <= width))
            and not {"probabilities", "grad-output"} & case.words.keys()
        ]
        vectors = [x.vector if x.level == "second" else np.linspace(-1, 2, x.classes) for x in self.cases]
        self.logits, self.vector = np.full((len(vectors), width), -np.inf), np.zeros((len(vectors), width))
        for i, (case, vector) in enumerate(zip(self.cases, vectors, strict=True)):
            self.logits[i, : case.classes], self.vector[i, : case.classes] = case.logits, vector
        self.target = torch.tensor([int(case.target) for case in self.cases])
        self.tensors = [torch.tensor(x).to(self.dtype) for x in (self.logits, self.vector)] + [self.target]

    def assert_hold(self, found):
        for name, values in found.items():
            got = torch.as_tensor(values).detach().double().numpy()
            failed = [f"{case} {got[i]}" for i, case in enumerate(self.cases) if not self.holds(name, i, got[i])]
            assert failed == [], f"{name}, {self.dtype}"

    def holds(self, name, i, got):
        """Whether a result is near the golden one, near what follows from it, or near what `ref` gives."""
        case, z, t = self.cases[i], self.logits[i], int(self.target[i])
        if name == "rank":  # in a stable order, where NaN comes first, but last for itself
            order = sorted(range(len(z)), key=lambda j: (not np.isnan(z[j]), -z[j]))
            return got == (len(z) - 1 if np.isnan(z[t]) else order.index(t))
        if name in ("cross_entropy", "probability"):
            wanted = ref.forward(z, t, strength=0.0)
            wanted = np.asarray(np.exp(-wanted) if name == "probability" else wanted, np.float64)
            finite = z[np.isfinite(z)]
            plain = 4 + 4 * min(1000, np.ptp(finite) if finite.size else 0)
            return near(got, torch.tensor(wanted).to(self.dtype).item(), plain * 4 * self.format.ulp(wanted))
        quantity = {"loss": "loss", "by weight": "loss", "product": "product"}.get(name, "gradient")
        if quantity not in case.asked:
            return True
        plain = float(case.words.get("plain", ["1"])[0])
        wanted, allowed = (case.values(key).astype(float) for key in (quantity, f"{quantity}-tolerance"))
        allowed *= plain
        v, others = self.vector[i, : case.classes], np.array([])
        if name == "tangent":
            terms = wanted * v
            allowed = np.abs(v) @ allowed + 2 * len(v) * torch.finfo(self.dtype).eps * np.abs(terms).sum()
            wanted = terms.sum()
        elif name == "by weight":
            got, others = got[t], np.delete(got, t)
        elif name != "loss":
            got, others = got[: case.classes], got[case.classes :]
        return near(got, wanted, allowed) and (not others.any() or not np.isfinite(wanted).all())


def near(got, wanted, allowed):
    with np.errstate(invalid="ignore"):
        return np.all((np.abs(got - wanted) <= allowed) | (got == wanted) | (np.isnan(got) & np.isnan(wanted)))


def statistics(z, t):
    return vmap(lambda z, t: lace_loss(z, t, statistics=True)[1])(z, t)


def values(z, v, t):
    """What torch.export takes: it has no torch.func.grad."""
    loss, tangent = jvp(lambda z: vmap(lace_loss)(z, t), (z,), (v,))
    return {"loss": loss, "tangent": tangent} | statistics(z, t)


def derivatives(z, v, t):
    gradient, change = jvp(lambda z: vmap(grad(lace_loss))(z, t), (z,), (v,))
    weighted = grad(lambda w, z, t: lace_loss(z, t, w, reduction="sum"))
    return {"gradient": gradient, "product": change, "by weight": vmap(weighted, (None, 0, 0))(0 * v[0] + 1, z, t)}


def each(function):
    """Of two batches in one graph."""
    return lambda *tensors: [function(*tensors[:3]), function(*tensors[3:])]


class Values(torch.nn.Module):
    def forward(self, *tensors):
        return values(*tensors)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_rows_hold_where_torch_s_own_functions_run(backend):
    torch.compiler.reset()
    for rows in (Rows("f32"), Rows("f64")):
        for function in (values, derivatives):
            compiled = function if backend == "eager" else torch.compile(function, backend=backend)
            rows.assert_hold(compiled(*rows.tensors))
        if backend == "aot_eager":
            break  # the second graph would be the first one's


@pytest.mark.parametrize("function", [values, derivatives])
def test_many_rows_hold_in_inductor(function, inductor):
    batches = [Rows(dtype) for dtype in DTYPES]
    found = inductor(each(function))(*(x for rows in batches for x in rows.tensors))
    for rows, results in zip(batches, found, strict=True):
        rows.assert_hold(results)


def test_few_rows_hold_in_inductor(inductor):
    """Three of three classes at a time: fewer than a vector holds."""
    batches = [Rows(dtype, 3) for dtype in DTYPES]
    n = min(len(rows.cases) for rows in batches) // 3 * 3

    @inductor
    def function(*tensors):
        results = []
        for z, t in (tensors[:2], tensors[2:]):
            gradient, loss = vmap(grad_and_value(lace_loss))(z, t)
            results.append({"loss": loss, "gradient": gradient} | statistics(z, t))
        return results

    parts = [
        function(*(x[i : i + 3].clone() for rows in batches for x in (rows.tensors[0], rows.tensors[2])))
        for i in range(0, n, 3)
    ]
    for k, rows in enumerate(batches):
        rows.cases = rows.cases[:n]
        rows.assert_hold({name: torch.cat([part[k][name] for part in parts]) for name in parts[0][k]})


def test_an_exported_graph_holds_as_it_is_compiled_and_packaged(inductor, tmp_path):
    rows = Rows("f32")
    assert len(rows.cases) >= 64
    program = torch.export.export(Values(), tuple(rows.tensors))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "values.pt2"))
    for run in (program.module(), inductor(program.module()), torch._inductor.aoti_load_package(package)):
        rows.assert_hold(run(*rows.tensors))


def test_a_torchscript_trace_holds_and_so_does_its_gradient():
    rows = Rows("f32")

    def function(z, t):
        loss, found = lace_loss(z, t, reduction="none", statistics=True)
        return loss, *found.values()

    z, _, t = rows.tensors
    traced = torch.jit.trace(function, (z, t), check_trace=False)
    for _ in range(3):  # the executor rewrites the graph for what it has seen
        leaf = z.clone().requires_grad_()
        results = traced(leaf, t)
        results[0].sum().backward()
        names = ("loss", "cross_entropy", "probability", "rank", "gradient")
        rows.assert_hold(dict(zip(names, (*results, leaf.grad), strict=True)))


# Names in the batch files; every second one once more in 64 rows or more.
PROBLEMS = (
    "ignored-weights-strength-none",
    "confident-none",
    "weights-smoothing-strength-mean",
    "strength-half-mean",
    "negative-smoothing-none",
)


def test_every_option_holds_in_inductor_where_the_weight_requires_a_gradient(inductor):
    """The loss is linear in the weights: their derivatives times themselves add up to it, and to 0 for a mean."""
    cases = [
        case
        for case in read(VECTORS / "f32-batch.txt")
        if case.name in PROBLEMS and case.category in ("smoothing", "probabilities", "weights")
    ]
    assert {case.name for case in cases} == set(PROBLEMS)
    repeats = [16, 1] * len(cases)
    problems = []
    for case, repeat in zip(cases, repeats, strict=False):
        options = dict(case.options)
        weight = torch.tensor(options.pop("weight", np.ones(case.classes, np.float32)), requires_grad=True)
        z = torch.tensor(case.logits).repeat(repeat, 1).requires_grad_()
        y = torch.tensor(case.target)
        problems.append((z, y.repeat(*([repeat] + [1] * (y.dim() - 1))), weight, options))
    options = [each for *_, each in problems]

    @inductor
    def losses(tensors):
        return [lace_loss(*three, **each) for three, each in zip(tensors, options, strict=True)]

    found = losses([three for *three, _ in problems])
    leaves = [x for z, _, w, _ in problems for x in (z, w)]
    gradients = torch.autograd.grad(found, leaves, [torch.ones_like(loss) for loss in found])
    for i, (case, repeat) in enumerate(zip(cases, repeats, strict=False)):
        mean, n = case.options["reduction"] == "mean", len(case.logits)
        loss, gradient, by_weight = found[i].detach(), gradients[2 * i], gradients[2 * i + 1]
        weight = problems[i][2].detach()
        for part in range(repeat):
            rows = slice(part * n, part * n + n)
            answer = {
                "loss": (loss if mean else loss[rows]).numpy(),
                "gradient": (gradient[rows] * (repeat if mean else 1)).numpy(),
            }
            assert judge(case, answer, plain=True).passes, case
        terms, wanted = by_weight * weight, loss.sum() if not mean or "probabilities" in case.words else torch.zeros(())
        if loss.isfinite().all():
            assert abs(terms.sum() - wanted) <= FLOAT32 * (terms.abs().sum() + loss.abs().sum()), case


ARITHMETIC = {
    *("add", "sub", "mul", "div", "div_", "neg", "abs", "where", "masked_fill"),
    *("eq", "ne", "lt", "gt", "ge", "isinf", "bitwise_and", "bitwise_or", "bitwise_not"),
}


def test_the_composite_form_uses_no_elementary_function_but_those_that_are_probed():
    z, v, t = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])

    def second(z, y, w):
        z, w = z.requires_grad_(), w.requires_grad_()
        (gradient,) = torch.autograd.grad(lace_loss(z, y, w, label_smoothing=0.1), z, create_graph=True)
        return torch.autograd.grad((gradient * v).sum(), (z, w))

    graphs = [make_fx(values)(z, v, t), make_fx(derivatives)(z, v, t)]
    graphs += [make_fx(second)(z, y, torch.rand(5)) for y in (t, v.softmax(1))]
    operations = {node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    pointwise = {x.overloadpacket.__name__ for x in operations if torch.Tag.pointwise in getattr(x, "tags", ())}
    assert pointwise - ARITHMETIC == set(FUNCTIONS)


FUNCTIONS = {"exp": mpmath.exp, "log": mpmath.log}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_inductor_has_the_elementary_functions_right(name, dtype, inductor):
    """Within 2 ulp, from the smallest number to the largest; its vectorised atanh is off by all of them at 1e-28."""
    kind, limits, function = FORMATS[dtype], torch.finfo(DTYPES[dtype]), getattr(torch, name)
    powers = 2.0 ** np.arange(kind.smallest, np.floor(np.log2(limits.max)))
    sizes = np.concatenate([powers, 1.3 * powers, 1.9 * powers])
    if name == "exp":  # of what is not positive
        x = -np.concatenate([[0, np.inf], sizes, np.linspace(0, -1.1 * kind.smallest * np.log(2), 500)])
    else:
        x = np.concatenate([sizes, 1 + sizes[sizes <= 1], 1 - sizes[sizes < 1]])
    x = torch.tensor(x[: len(x) // 3 * 3]).to(DTYPES[dtype])
    many = inductor(function)(x)
    torch.compiler.reset()
    compiled = inductor(function)
    few = torch.cat([compiled(part.clone()) for part in x.split(3)])
    with mpmath.workdps(30):
        wanted = np.array([float(FUNCTIONS[name](mpmath.mpf(value))) for value in x.tolist()])
    for got in (function(x), many, few):
        off = np.abs(got.double().numpy() - wanted)
        assert np.all(off <= 2 * kind.ulp(wanted))
