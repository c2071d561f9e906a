"""A model with the loss in it exports to ONNX, and onnxruntime computes the same loss, for confident samples too."""

import io

import numpy as np
import pytest
import torch
from test_backends import Rows, values

from lace_loss import ref
from lace_loss.ext.torch import BinaryLACELoss, LACELoss, lace_loss

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

INPUT = 4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 4, -100, 2, 1, 1])
PROBABILITIES = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)).softmax(1)


def in_onnxruntime(module, *inputs, dynamic_shapes=None):
    """A function that runs the exported module."""
    program = torch.onnx.export(module, inputs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]
    return lambda *arguments: session.run(None, dict(zip(names, map(torch.Tensor.numpy, arguments), strict=True)))[0]


class Net(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))
        self.loss = LACELoss(**options)

    def forward(self, input, target):
        return self.loss(self.scale * input, target)


@pytest.mark.parametrize("target", [CLASSES, PROBABILITIES], ids=["classes", "probabilities"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted and smoothed"])
def test_a_model_with_the_loss_gives_the_same_loss_in_onnxruntime(target, reduction, weighted):
    options = {"weight": torch.arange(1.0, 6.0), "label_smoothing": 0.1} if weighted else {}
    net = Net(reduction=reduction, strength=0.7, **options)
    exported = in_onnxruntime(net, INPUT, target, dynamic_shapes=({0: "n"}, {0: "n"}))
    for n in (6, 4):
        expected = net(INPUT[:n], target[:n]).detach().numpy()
        assert np.allclose(exported(INPUT[:n], target[:n]), expected, rtol=2e-6, atol=0)


def test_confident_samples_keep_their_digits_in_onnxruntime():
    """log(1 + x), as exporters write log1p, is 0 from a margin of 18 on. Rounding the margin costs 2^-24, twice."""
    margins = torch.arange(41.0)
    logits = torch.nn.functional.pad(margins.unsqueeze(1), (0, 9))
    target = torch.zeros(41, dtype=torch.long)
    got = in_onnxruntime(LACELoss(reduction="none"), logits, target)(logits, target)
    assert np.allclose(got, ref.forward(logits, target, reduction="none"), rtol=2 * 40 * 2.0**-24, atol=0)


class Found(torch.nn.Module):
    """What a dictionary of results holds."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return tuple(self.function(*tensors).values())


def losses_and_statistics(z, t):
    loss, found = lace_loss(z, t, reduction="none", statistics=True)
    return {"loss": loss} | found


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("way", ["under vmap and jvp", "of a batch", "of a batch by the old exporter"])
def test_the_golden_vectors_hold_in_onnxruntime_and_so_do_statistics(way, dtype):
    rows = Rows(dtype)
    z, v, t = rows.tensors
    function, tensors = (values, (z, v, t)) if "vmap" in way else (losses_and_statistics, (z, t))
    if "old" in way:
        file = io.BytesIO()
        torch.onnx.export(Found(function), tensors, file, dynamo=False)
        program = file.getvalue()
    else:
        program = torch.onnx.export(
            Found(function), tensors, dynamo=True, verbose=False
        ).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(program)
    names = [node.name for node in session.get_inputs()]
    results = session.run(None, dict(zip(names, map(torch.Tensor.numpy, tensors), strict=True)))
    rows.assert_hold(dict(zip(function(*tensors), results, strict=True)))


class Posterior(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, input):
        return self.loss.posterior(input)


@pytest.mark.parametrize(
    ("loss", "definition"),
    [(LACELoss(), ref.posterior), (BinaryLACELoss(), ref.binary_posterior)],
    ids=["classes", "labels"],
)
def test_the_class_probabilities_of_confident_samples_keep_their_digits_in_onnxruntime(loss, definition):
    """As above; a probability's logarithm is about twice the margin."""
    margins = torch.arange(-40.0, 41.0)
    logits = torch.nn.functional.pad(margins.unsqueeze(1), (0, 2))
    got = in_onnxruntime(Posterior(loss), logits)(logits)
    assert np.allclose(got, definition(logits.numpy()), rtol=4 * 40 * 2.0**-24, atol=0)
