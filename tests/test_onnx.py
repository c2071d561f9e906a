"""A model with the loss in it exports to ONNX, and onnxruntime computes the same loss, for confident samples too."""

import numpy as np
import pytest
import torch

from lace_loss import ref
from lace_loss.ext.torch import LACELoss

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
