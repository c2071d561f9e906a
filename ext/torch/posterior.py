"""Class probabilities that the logits of a LACE model stand for; `lace_loss.ref.posterior` defines them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..posterior import posterior as by_kernel
from .call import HALF, check_strength, class_axis, is_being_traced, is_ordinary
from .composite import class_shape, log_1_plus

__all__ = ["posterior"]


def posterior(
    input: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0, *, strength: float = 1.0
) -> Tensor:
    """Class probabilities where a model that answers these logits has the smallest expected loss: not the softmax.

    Parameters
    ----------
    input : (C,), (N, C) or (N, C, d1, ...) logits, floating, before any temperature.
    weight, label_smoothing, strength : those of the training loss. Weights are positive and finite, label_smoothing is
        less than 1. Weights are looked at on a CPU only, where that makes nobody wait.

    Returns
    -------
    Tensor of the input's shape and dtype, which can be differentiated. On a CPU, and where no derivative is asked for,
    float32 and float64 are computed by the C kernel, within 4 ulp. A sample with a logit of NaN or +inf, or with -inf
    only, is NaN.

    Raises
    ------
    TypeError for a dtype, ValueError for a shape or an option.

    Examples
    --------
        >>> import torch
        >>> from lace_loss.ext.torch import posterior
        >>> print(posterior(torch.tensor([0.0, 2.0])))  # softmax: 0.1192, 0.8808
        tensor([0.0268, 0.9732])
    """
    if not input.is_floating_point():
        raise TypeError(f"logits must be floating, got {input.dtype}")
    axis = class_axis(input)
    if input.dim() == 0 or input.shape[axis] == 0:
        raise ValueError(f"logits must be (C,), (N, C) or (N, C, d1, ...) with C >= 1, got shape {tuple(input.shape)}")
    check_strength(strength)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    classes = input.shape[axis]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"weight must have one value for each of the {classes} classes, got shape {tuple(weight.shape)}"
        )
    ordinary = is_ordinary(input, *(() if weight is None else (weight,))) and not is_being_traced()
    recorded = torch.is_grad_enabled() and (input.requires_grad or (weight is not None and weight.requires_grad))
    if ordinary and input.is_cpu and (weight is None or weight.is_cpu):
        if not recorded and input.dtype in (torch.float32, torch.float64):
            values = input.detach().resolve_neg().numpy()
            w = None if weight is None else weight.detach().resolve_neg().to(input.dtype).numpy()
            options = {"label_smoothing": label_smoothing, "strength": strength, "threads": torch.get_num_threads()}
            return torch.from_numpy(by_kernel(values, weight=w, **options))  # type: ignore[arg-type]
        if weight is not None and not bool(((weight > 0) & weight.isfinite()).all()):
            raise ValueError("weight must be positive and finite for a posterior")
    return _composite(input, axis, weight, label_smoothing, strength).to(input.dtype)


def _composite(input: Tensor, axis: int, weight: Tensor | None, label_smoothing: float, strength: float) -> Tensor:
    """Softmax of log h, h = q / (w K). The K of the largest logit's class alone may be small: its logarithm is taken of
    sums of the other classes' exponentials, S, as log S + log(1 + log(1 + S) / S) - log(1 + S) at strength 1."""
    z = input.float() if input.dtype in HALF else input
    top = z.argmax(axis, keepdim=True)
    is_top = torch.zeros_like(z, dtype=torch.bool).scatter(axis, top, True)
    largest = z.gather(axis, top)
    d = z - largest
    others = d.masked_fill(is_top, -torch.inf)
    alone = (others == -torch.inf).all(axis, keepdim=True)  # no other class: its probability is 1
    log_s = torch.where(alone, 0.0, others).logsumexp(axis, keepdim=True)
    s = log_s.exp()
    log_sum = log_1_plus(s)
    q = others.exp() / (1 + s)
    n = torch.where(q == 0, 0.0, log_sum - d)
    k = (1 - strength) + strength * ((1 - q) + q * n)
    ratio = torch.where(s == 0, 1.0, log_sum / torch.where(s == 0, 1.0, s))
    log_k_top = log_s + log_1_plus(ratio) - log_sum
    if strength != 1:
        log_k_top = ((1 - strength) + strength * log_k_top.exp()).log()
    log_h = torch.where(is_top, -log_k_top, d - k.log())
    if weight is not None:
        log_h = log_h - weight.to(z.dtype).log().view(class_shape(axis, z))
    y = torch.where(alone, torch.where(is_top, d + 1, 0.0), log_h.softmax(axis))
    if label_smoothing:
        y = (y - label_smoothing / z.shape[axis]).clamp_min(0)
        y = y / y.sum(axis, keepdim=True)
    return torch.where(largest.isfinite(), y, torch.nan)
