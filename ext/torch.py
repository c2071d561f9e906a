"""LACE for PyTorch: a drop-in for `torch.nn.CrossEntropyLoss` and `torch.nn.functional.cross_entropy`.

With q = softmax(z), t the true class, s the strength and u = log(sum over j != t of exp z_j) - z_t:

    1 - q_t = sigmoid(u)        -log q_t = softplus(u)        L = (1 - s + s sigmoid(u)) softplus(u)

The sum leaves the true class out, so nothing is lost when the model is sure. `log_softmax` rounds -log q_t to a
multiple of 1.2e-7 in float32, and L, which is about its square, is then exactly 0 from a margin of 20 on.

This composite form runs on any device and can be differentiated any number of times. On a CPU the C kernel takes its
place where the result is the same (see `_kernel_applies`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn import functional as F
from torch.nn.modules.loss import _WeightedLoss

from . import _run

__all__ = ["LACELoss", "lace_loss"]

_HALF = (torch.float16, torch.bfloat16)
_INDEX_DTYPES = (torch.int64, torch.uint8, torch.int32, torch.int16, torch.int8)


def lace_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    strength: float = 1.0,
) -> Tensor:
    """Linearly Adaptive Cross Entropy between logits and target; arguments as `torch.nn.functional.cross_entropy`.

    Parameters
    ----------
    input : (C,), (N, C) or (N, C, d1, ...) logits, floating. float16 and bfloat16 are computed in float32.
    target : class indices of the shape without C (any integer dtype), or probabilities of the input's shape.
    strength : s in [0, 1]: 1 is LACE, 0 is cross entropy.

    Raises
    ------
    What `cross_entropy` raises for the same arguments; IndexError for a class that does not exist (on a CPU);
    ValueError for a strength outside [0, 1].
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    if not _is_well_formed(input, target, weight, ignore_index, reduction, label_smoothing):
        F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
        if 0 <= label_smoothing <= 1:
            raise RuntimeError(f"target {tuple(target.shape)} does not fit an input of shape {tuple(input.shape)}")
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "strength": strength,
    }
    if not _kernel_applies(input, target, weight):
        if target.shape != input.shape and _is_plain(input, target):
            _check_classes(target, ignore_index, input.shape[_class_axis(input)])
        return _composite(input, target, weight, **options)
    if input.requires_grad and torch.is_grad_enabled():
        loss: Tensor = _Kernel.apply(input, target, weight, options)
        return loss
    return _by_kernel(input, target, weight, None, options)


class LACELoss(_WeightedLoss):
    """`lace_loss` as a module; arguments as `torch.nn.CrossEntropyLoss`, and `strength`."""

    __constants__ = ("ignore_index", "reduction", "label_smoothing", "strength")

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        strength: float = 1.0,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.strength = strength

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return lace_loss(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            strength=self.strength,
        )


def _is_well_formed(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> bool:
    """Whether `cross_entropy` would take these arguments (but for other index dtypes); it words the refusal itself."""
    tensors = all(isinstance(x, Tensor) for x in (input, target, *([] if weight is None else [weight])))
    if not (tensors and isinstance(ignore_index, int) and input.is_floating_point() and input.dim()):
        return False
    classes = input.shape[_class_axis(input)]
    if target.shape == input.shape:
        ok = target.is_floating_point() and ignore_index < 0
    else:
        samples = input.shape[:1] * (input.dim() > 1) + input.shape[2:]
        ok = (
            target.shape == samples
            and target.dtype in _INDEX_DTYPES
            and (weight is None or weight.dtype == input.dtype)
        )
    ok = ok and classes > 0 and (weight is None or weight.shape == (classes,))
    return ok and reduction in ("none", "mean", "sum") and 0 <= label_smoothing <= 1


def _kernel_applies(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """The kernel has a first derivative only (its second is the composite's), none in forward mode, and no graph."""
    return (
        _is_plain(input, target)
        and input.dtype in (torch.float32, torch.float64)
        and (target.shape != input.shape or target.dtype == input.dtype)
        and (weight is None or weight.dtype == input.dtype)
        and not any(x is not None and x.requires_grad for x in (target, weight))
        and all(
            x is None or forward_ad.unpack_dual(x).tangent is None  # type: ignore[no-untyped-call]
            for x in (input, target, weight)
        )
    )


def _is_plain(input: Tensor, target: Tensor) -> bool:
    """Whether Python may look at the numbers: on a CPU, outside of compilation, functorch and tensor subclasses."""
    return (
        input.device.type == target.device.type == "cpu"
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in (input, target))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
    )


def _check_classes(target: Tensor, ignore_index: int, classes: int) -> None:
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise IndexError(f"target{place or ''} is {target[tuple(place)]}, not a class: 0 to {classes - 1}")


class _Kernel(torch.autograd.Function):
    """Loss and gradient in one pass; backward only scales."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: dict[str, Any]) -> Tensor:
        gradient = torch.empty_like(input, memory_format=torch.contiguous_format)
        ctx.options = options
        ctx.save_for_backward(input, target, weight, gradient)
        return _by_kernel(input, target, weight, gradient.numpy(), options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        input, target, weight, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a second derivative may follow
            alias = input.view_as(input)  # the hooks of `input` itself run once, when this gradient reaches it
            loss = _composite(alias, target, weight, **ctx.options)
            (gradient,) = torch.autograd.grad(loss, alias, grad_output, create_graph=True)
            return gradient, None, None, None
        if grad_output.shape == target.shape != input.shape:  # 0 times an infinite gradient would be NaN
            grad_output = grad_output.masked_fill(target == ctx.options["ignore_index"], 0)
        if grad_output.dim():
            grad_output = grad_output.unsqueeze(_class_axis(input))
        return gradient * grad_output, None, None, None


def _by_kernel(input: Tensor, target: Tensor, weight: Tensor | None, gradient: Any, options: dict[str, Any]) -> Tensor:
    w = None if weight is None else weight.numpy()
    threads = torch.get_num_threads()
    loss = _run(input.detach().numpy(), target.numpy(), gradient, 1.0, threads, weight=w, **options)
    return torch.from_numpy(np.asarray(loss))


def _composite(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
) -> Tensor:
    axis = _class_axis(input)
    z, target = (x.float() if x.dtype in _HALF else x for x in (input, target))
    w = torch.ones(z.shape[axis], dtype=z.dtype, device=z.device) if weight is None else weight
    w = w.float() if w.dtype in _HALF else w
    every_w = w.reshape([-1 if i == axis else 1 for i in range(z.dim())])
    e, classes = label_smoothing, z.shape[axis]
    if target.shape == input.shape:
        losses = _loss_of_every_class(z, axis, strength, ((1 - e) * target + e / classes) * every_w).sum(axis)
        divisor: Tensor | int = losses.numel()
    else:
        kept = target != ignore_index
        t = target.long().masked_fill(~kept, 0)
        z = z.masked_fill(~kept.unsqueeze(axis), 0)
        w_t = F.embedding(t, w.unsqueeze(1)).squeeze(-1).masked_fill(~kept, 0)  # w[t], also under vmap
        losses = _weighted((1 - e) * w_t, _loss_of_class(z, t, axis, strength))
        if e:
            losses = losses + _loss_of_every_class(z, axis, strength, e / classes * every_w).sum(axis)
        losses = losses.masked_fill(~kept, 0)
        divisor = w_t.sum()
    if reduction == "mean":
        losses = losses.sum() / divisor
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(input.dtype) if z.dtype != input.dtype else losses


def _loss_of_class(z: Tensor, t: Tensor, axis: int, strength: float) -> Tensor:
    """f of class t of each sample."""
    z = z - z.amax(axis, keepdim=True).detach()  # +inf becomes NaN
    t = t.unsqueeze(axis)
    # Not -inf: the gradient of logsumexp stays finite where no other class is left (C = 1).
    others = z.scatter(axis, t, torch.finfo(z.dtype).min)
    return _loss_of_log_odds((others.logsumexp(axis, keepdim=True) - z.gather(axis, t)).squeeze(axis), strength)


def _loss_of_every_class(z: Tensor, axis: int, strength: float, a: Tensor) -> Tensor:
    """a f of every class. Only the largest logit's class needs a sum that leaves it out; for the rest 1 - q >= 1/2."""
    z = z - z.amax(axis, keepdim=True).detach()
    exp_z, top = z.exp(), z.argmax(axis, keepdim=True)
    others = exp_z.scatter(axis, top, 0).sum(axis, keepdim=True)
    rest = (exp_z.sum(axis, keepdim=True) - exp_z).scatter(axis, top, others)
    tiny = torch.finfo(z.dtype).tiny
    f = _loss_of_log_odds(torch.where(rest < tiny, tiny, rest).log() - z, strength)
    return _weighted(a, f)


def _weighted(a: Tensor, f: Tensor) -> Tensor:
    """a f; 0 where an infinite loss has no weight."""
    return a * f.masked_fill(f.isinf() & (a == 0), 0)


def _loss_of_log_odds(u: Tensor, strength: float) -> Tensor:
    """f(u). From u = 1000 on f(u) = u exactly, and written so the slope stays 1 at u = inf (a logit of -inf).

    From e = exp(-|u|), because torch's second derivatives of sigmoid and logsigmoid form 1 - sigmoid, which is 0 from
    |u| = 37 on. `where` and not `clamp` or `abs`, which give a NaN or a tie (u = 0) the slope 0.
    """
    v = torch.where(u > 1000, 0, u)
    e = torch.where(v < 0, v, -v).exp()
    n = torch.where(v < 0, 0, v) + e.log1p()
    r = torch.where(v < 0, e, 1) / (1 + e)
    return torch.where(u > 1000, u, (1 - strength + strength * r) * n)


def _class_axis(input: Tensor) -> int:
    return min(1, input.dim() - 1)
