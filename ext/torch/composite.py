"""The loss as PyTorch operations: on any device, and differentiable any number of times.

With q = softmax(z), t the true class, s the strength and u = log(sum over j != t of exp z_j) - z_t:

    1 - q_t = sigmoid(u)        -log q_t = softplus(u)        L = (1 - s + s sigmoid(u)) softplus(u)

The sum leaves the true class out, so nothing is lost when the model is sure. `log_softmax` rounds -log q_t to a
multiple of 1.2e-7 in float32, and L, which is about its square, is then exactly 0 from a margin of 20 on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .call import class_axis, safe_class_index, working_dtype

__all__ = ["class_shape", "composite", "log_1_plus", "loss_of_log_odds", "statistics", "weighted"]


def composite(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
) -> Tensor:
    axis, dtype = class_axis(input), working_dtype(input, target, weight)
    z, e, classes = input.to(dtype), label_smoothing, input.shape[axis]
    w = z.new_ones(classes) if weight is None else weight.to(dtype)
    every_w = w.reshape(class_shape(axis, z))
    if target.is_floating_point():
        losses = _loss_of_every_class(z, axis, strength, ((1 - e) * target.to(dtype) + e / classes) * every_w).sum(axis)
        divisor: Tensor | int = losses.numel()
    else:
        t, kept, wrong = safe_class_index(target, classes, ignore_index)
        z = z.masked_fill(~kept.unsqueeze(axis), 0)
        w_t = F.embedding(t, w.unsqueeze(1)).squeeze(-1).masked_fill(~kept, 0)  # w[t], also under vmap
        f = loss_of_log_odds(_log_odds(z, t, axis), strength)
        # The sample of a class that does not exist gets NaN as a factor, for its gradient to be NaN, too.
        losses = weighted(((1 - e) * w_t).masked_fill(wrong, torch.nan), f)
        if e:
            losses = losses + _loss_of_every_class(z, axis, strength, e / classes * every_w).sum(axis)
        losses = losses.masked_fill(~kept, 0)
        divisor = w_t.sum()
    if reduction == "none":
        return losses
    return losses.sum() / divisor if reduction == "mean" else losses.sum()


def statistics(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    axis, z = class_axis(input), input.to(working_dtype(input, target, None))
    classes = z.shape[axis]
    t, kept, wrong = safe_class_index(target, classes, ignore_index)
    u = _log_odds(z, t, axis).masked_fill(wrong, torch.nan)
    t = t.unsqueeze(axis)
    z_t, j = z.gather(axis, t), torch.arange(classes, device=z.device).reshape(class_shape(axis, z))
    ahead = (j != t) & ~((z < z_t) | ((z == z_t) & (j > t)))  # NaN counts as larger
    e = (-u.abs()).exp()
    q = torch.where(u < 0, 1, e) / (1 + e)  # a sigmoid is 0 where q is subnormal
    n, rank = loss_of_log_odds(u, 0.0), ahead.sum(axis).masked_fill(wrong, classes)
    return n.masked_fill(~kept, 0), q.masked_fill(~kept, 0), rank.masked_fill(~kept, classes)


def _log_odds(z: Tensor, t: Tensor, axis: int) -> Tensor:
    """u of class t of each sample."""
    z = z - z.amax(axis, keepdim=True).detach()  # +inf becomes NaN
    t = t.unsqueeze(axis)
    # Not -inf: the gradient of logsumexp stays finite where no other class is left (C = 1).
    others = z.scatter(axis, t, torch.finfo(z.dtype).min)
    return (others.logsumexp(axis, keepdim=True) - z.gather(axis, t)).squeeze(axis)


def _loss_of_every_class(z: Tensor, axis: int, strength: float, a: Tensor) -> Tensor:
    """a f of every class. Only the largest logit's class needs a sum that leaves it out; for the rest 1 - q >= 1/2."""
    z = z - z.amax(axis, keepdim=True).detach()
    exp_z, top = z.exp(), z.argmax(axis, keepdim=True)
    others = exp_z.scatter(axis, top, 0).sum(axis, keepdim=True)
    rest = (exp_z.sum(axis, keepdim=True) - exp_z).scatter(axis, top, others)
    tiny = torch.finfo(z.dtype).tiny
    f = loss_of_log_odds(torch.where(rest < tiny, tiny, rest).log() - z, strength)
    return weighted(a, f)


def weighted(a: Tensor, f: Tensor) -> Tensor:
    """a f; 0 where an infinite loss has no weight."""
    return a * f.masked_fill(f.isinf() & (a == 0), 0)


def loss_of_log_odds(u: Tensor, strength: float) -> Tensor:
    """f(u). From u = 1000 on f(u) = u exactly, and written so the slope stays 1 at u = inf (a logit of -inf).

    From e = exp(-|u|), because torch's second derivatives of sigmoid and logsigmoid form 1 - sigmoid, which is 0 from
    |u| = 37 on. `where` and not `clamp` or `abs`, which give a NaN or a tie (u = 0) the slope 0.
    """
    v = torch.where(u > 1000, 0, u)
    e = torch.where(v < 0, v, -v).exp()
    n = torch.where(v < 0, 0, v) + log_1_plus(e)
    r = torch.where(v < 0, e, 1) / (1 + e)
    return torch.where(u > 1000, u, (1 - strength + strength * r) * n)


def log_1_plus(x: Tensor) -> Tensor:
    """log(1 + x) of x >= 0 by log alone, which every backend has right.

    ONNX takes log1p literally, and Inductor's vectorised atanh is 0 for small arguments.
    """
    sum = 1 + x
    lost = (sum - 1 - x).detach()  # exactly what the rounding of the sum added
    return sum.log() - lost / sum


def class_shape(axis: int, z: Tensor) -> list[int]:
    """The shape that broadcasts one value a class over z."""
    return [-1 if i == axis else 1 for i in range(z.dim())]
