"""What people use today in place of the loss, run through the golden vectors: which of it is LACE, and up to where.

    python tests/benchmarks/peers.py        needs pip install '.[peers]'; prints a table in Markdown

Each peer is called as its documentation says for gamma 1 and no alpha; the gradient is that of its own framework.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lace_loss.ref.case import VECTORS, Case, read
from lace_loss.ref.margins import MARGINS, logits_at_margins, relative_error, right_and_lost

Array = NDArray[Any]
# (N, C) logits and N classes: N losses, and the gradient of their sum.
Peer = Callable[[Array, Array], tuple[Array, Array]]

# Errors that rounding explains where the loss is above UNCONFIDENT; below, 1 - exp(-ce) has begun to cancel.
EQUAL = {"f32": 1e-5, "f64": 1e-13}
UNCONFIDENT = 0.01
COLUMNS = {
    "is LACE": ("nominal", "ties"),
    "q to 0": ("q-to-0",),
    "-inf elsewhere": ("minus-infinity-other",),
    "-inf at t": ("minus-infinity-target",),
}
LEGEND = """
is LACE: the largest error of loss and gradient in nominal cases and ties with a loss above 0.01. right to, lost from:
the margins of the target's logit over equal others (nine; one where C = 2) up to which both are right to 0.1 % and from
which either is 100 % off. The rest: largest error of loss / gradient; inf: infinite, or finite, where it should not be.
Errors are relative to the largest value expected, absolute where that is 0.
"""


def kernel() -> Peer:
    from lace_loss import ext

    return lambda z, t: ext.forward_backward(z, t, reduction="none")


def module() -> Peer:
    from lace_loss.ext.torch import LACELoss

    return in_torch(LACELoss(reduction="none"))


def module_on_gpu() -> Peer:
    import torch

    from lace_loss.ext.torch import LACELoss

    if not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA device")
    return in_torch(LACELoss(reduction="none"), "cuda")


def focal() -> Peer:
    import torch

    def losses(z: Any, t: Any) -> Any:
        ce = torch.nn.functional.cross_entropy(z, t, reduction="none")
        return (1 - torch.exp(-ce)) * ce

    return in_torch(losses)


def timm() -> Peer:
    from timm.loss import AsymmetricLossSingleLabel

    return in_torch(AsymmetricLossSingleLabel(gamma_pos=1, gamma_neg=0, eps=0.0, reduction="none"))


def kornia() -> Peer:
    from kornia.losses import focal_loss

    return in_torch(lambda z, t: focal_loss(z, t, alpha=None, gamma=1.0).sum(1))


def keras() -> Peer:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import torch
    from keras import backend, losses

    if backend.backend() != "torch":
        raise ImportError(f"it runs on {backend.backend()}, KERAS_BACKEND=torch is needed")

    def losses_of(z: Any, t: Any) -> Any:
        dtype = str(z.dtype).removeprefix("torch.")
        loss = losses.CategoricalFocalCrossentropy(alpha=1, gamma=1, from_logits=True, reduction=None, dtype=dtype)
        return loss(torch.nn.functional.one_hot(t, z.shape[1]), z)

    return in_torch(losses_of)


def optax() -> Peer:
    import jax
    from optax.losses import sigmoid_focal_loss

    def losses(z: Any, t: Any) -> Any:
        return sigmoid_focal_loss(z[:, 1] - z[:, 0], t, gamma=1.0)

    def answer(logits: Array, target: Array) -> tuple[Array, Array]:
        jax.config.update("jax_enable_x64", True)  # without it float64 becomes float32
        gradient = jax.grad(lambda z: losses(z, target).sum())(logits)
        return np.asarray(losses(logits, target)), np.asarray(gradient)

    return answer


def binary(losses: Callable[[Any, Any], Any]) -> Peer:
    """Losses of labels, of logits and floating targets: class 1 of two is a label that is present."""
    return in_torch(lambda z, t: losses(z[:, 1] - z[:, 0], t.to(z.dtype)))


def binary_module() -> Peer:
    from lace_loss.ext.torch import BinaryLACELoss

    return binary(BinaryLACELoss(reduction="none"))


def binary_torchvision() -> Peer:
    from torchvision.ops import sigmoid_focal_loss

    return binary(lambda z, y: sigmoid_focal_loss(z, y, alpha=-1, gamma=1))


def binary_timm() -> Peer:
    from timm.loss import AsymmetricLossMultiLabel

    loss = AsymmetricLossMultiLabel(gamma_pos=1, gamma_neg=1, clip=0)  # a sum
    return binary(lambda z, y: sum_of_each(loss, z, y))


def sum_of_each(loss: Any, z: Any, y: Any) -> Any:
    """The losses one by one, of a loss that can only add them up."""
    import torch

    return torch.stack([loss(z[i : i + 1], y[i : i + 1]) for i in range(len(z))])


def binary_kornia() -> Peer:
    from kornia.losses import binary_focal_loss_with_logits

    return binary(lambda z, y: binary_focal_loss_with_logits(z[:, None], y[:, None], alpha=None, gamma=1.0)[:, 0])


def in_torch(losses: Callable[[Any, Any], Any], device: str = "cpu") -> Peer:
    import torch

    def answer(logits: Array, target: Array) -> tuple[Array, Array]:
        z = torch.tensor(logits, device=device, requires_grad=True)
        loss = losses(z, torch.tensor(target, device=device))
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        return loss.detach().cpu().numpy(), gradient.cpu().numpy()

    return answer


# Package, loss, the peer where it is installed, and whether it knows two classes only.
PEERS: list[tuple[str, str, Callable[[], Peer], bool]] = [
    ("lace_loss", "ext", kernel, False),
    ("lace_loss", "LACELoss", module, False),
    ("lace_loss", "LACELoss on a GPU", module_on_gpu, False),
    ("torch", "(1 - exp(-ce)) * ce", focal, False),
    ("timm", "AsymmetricLossSingleLabel", timm, False),
    ("kornia", "focal_loss", kornia, False),
    ("keras", "CategoricalFocalCrossentropy", keras, False),
    ("optax", "sigmoid_focal_loss, C = 2", optax, True),
    ("lace_loss", "BinaryLACELoss, C = 2", binary_module, True),
    ("torchvision", "sigmoid_focal_loss, C = 2", binary_torchvision, True),
    ("timm", "AsymmetricLossMultiLabel, C = 2", binary_timm, True),
    ("kornia", "binary_focal_loss_with_logits, C = 2", binary_kornia, True),
]


def errors(peer: Peer, cases: list[Case]) -> dict[str, float]:
    """Worst error of the losses and of the gradients."""
    worst: dict[str, float] = {}
    for case in cases:
        loss, gradient = peer(case.logits.reshape(1, -1), case.target.reshape(1))
        for key, got in (("loss", loss), ("gradient", gradient[0])):
            if key in case.asked:
                worst[key] = float(np.maximum(worst.get(key, 0.0), relative_error(got, case.values(key))))
    return worst


def span(peer: Peer, dtype: str, classes: int) -> tuple[str, str]:
    """Margin of the target over equal others up to which loss and gradient are right, and from which one is lost."""
    logits = logits_at_margins(dtype, classes)
    losses, gradients = peer(logits, np.zeros(len(logits), np.int64))
    return right_and_lost(dtype, logits, [{"loss": x, "gradient": y} for x, y in zip(losses, gradients, strict=True)])


def brief(value: float) -> str:
    if not 0.01 <= value < np.inf:
        return "NaN" if np.isnan(value) else f"{value:.0e}".replace("e-0", "e-").replace("0e+00", "0")
    return f"{100 * value:.0f} %"


def cells(peer: Peer, dtype: str, cases: list[Case], classes: int) -> list[str]:
    nominal, *rest = (errors(peer, [case for case in cases if case.category in column]) for column in COLUMNS.values())
    worst = float(np.max(list(nominal.values())))
    pairs = [" / ".join(map(brief, each.values())) or "-" for each in rest]
    return [f"{'yes' if worst < EQUAL[dtype] else 'no'}, {brief(worst)}", *span(peer, dtype, classes), *pairs]


def fits(case: Case, binary: bool) -> bool:
    """Whether the table puts the case to a peer: it knows so many classes, and a nominal case is not confident."""
    classes, nominal = case.shape[-1], case.category in COLUMNS["is LACE"]
    return (classes == 2 if binary else classes > 1) and not (nominal and case.values("loss")[0] < UNCONFIDENT)


def main() -> None:
    """Print the table, in Markdown."""
    cases = {dtype: read(VECTORS / f"{dtype}-core.txt") + read(VECTORS / f"{dtype}-gradient.txt") for dtype in MARGINS}
    first, *rest = COLUMNS
    header = ["loss", "dtype", first, "right to", "lost from", *rest]
    print(line(header), line(["---"] * len(header)), sep="\n")
    versions, missing = [], []
    for package, name, make, binary in PEERS:
        try:
            peer = make()
        except ImportError as problem:
            missing.append(f"{package} {name}: not installed ({problem})")
            continue
        for dtype in cases:
            known = [case for case in cases[dtype] if fits(case, binary)]
            print(line([f"{package} {name}", dtype, *cells(peer, dtype, known, 2 if binary else 10)]))
        if hasattr(sys.modules[package], "__version__"):
            versions.append(f"{package} {sys.modules[package].__version__}")
    print(LEGEND, ", ".join(dict.fromkeys(versions)), *missing, sep="\n")


def line(words: list[str]) -> str:
    return f"| {' | '.join(words)} |"


if __name__ == "__main__":
    main()
