"""LACE of labels that are present or absent: a drop-in for `torch.nn.BCEWithLogitsLoss` and its function.

A label with logit z and target y is two classes with the logits (0, z). With u = -z for the present one, u = z for the
absent one, weight w and pos_weight p:

    f(u) = (1 - s + s sigmoid(u)) softplus(u)        L = w (p y f(-z) + (1 - y) f(z))

This composite form runs on any device and can be differentiated any number of times. Where the result is the same the C
kernel takes its place on a CPU and those of `binary_gpu.py` on a GPU.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _cpu
from ..binary import row_of
from ..threads import WORTH_THREADS, in_threads
from . import cpu, gpu
from .call import (
    FLOATING,
    HALF,
    autocast_dtype,
    check_strength,
    has_tangent,
    is_being_traced,
    is_ordinary,
    kinds_of,
    require_memory,
)
from .composite import log_1_plus, loss_of_log_odds, weighted
from .second import in_functional_transform, input_gradient

Labels = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # input, target, weight, pos_weight


def binary_lace_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    strength: float = 1.0,
) -> Tensor:
    """LACE of labels; arguments as `torch.nn.functional.binary_cross_entropy_with_logits`.

    Parameters
    ----------
    input : logits of any shape, floating. float16 and bfloat16 are computed in float32.
    target : of the input's shape: probabilities that a label is present, floating, outside [0, 1] too; or booleans.
    weight, pos_weight : broadcast to the input's shape; `pos_weight` counts where a label is present.
    strength : s in [0, 1]: 1 is LACE, 0 is binary cross entropy.

    Returns
    -------
    The loss in the type that input and target promote to; a mean is over all labels, whatever their weights.

    Raises
    ------
    What `binary_cross_entropy_with_logits` raises for the same arguments, and ValueError for a strength outside [0, 1].

    >>> binary_lace_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.0497)
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_lace_loss,
            (input, target, weight, pos_weight),
            *(input, target, weight, size_average, reduce, reduction, pos_weight),
            strength=strength,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    _check(reduction, strength)
    reduction = ("none", "mean", "sum")[_reduction.get_enum(reduction)]
    given = (input, target, weight, pos_weight)
    if not _is_well_formed(*given):
        F.binary_cross_entropy_with_logits(input, target, weight, None, None, reduction, pos_weight)
        kinds = kinds_of(input=input, target=target, weight=weight, pos_weight=pos_weight)
        raise RuntimeError(f"these do not go together: {kinds}")
    tensors = [x for x in given if x is not None]
    if is_ordinary(*tensors) and not torch.compiler.is_compiling():
        require_memory(*tensors)
    options = (reduction, float(strength))
    if not _kernel_applies(*given):
        loss = _composite(*given, *options)
    elif input.requires_grad and torch.is_grad_enabled():
        loss = _Kernel.apply(*given, *options)
    else:
        loss = (_registered_loss if is_being_traced() else _loss)(*given, *options)
    dtype = _result_dtype(input, target)
    return loss if loss.dtype == dtype else loss.to(dtype)


class BinaryLACELoss(torch.nn.Module):
    """`binary_lace_loss` as a module: constructed as `torch.nn.BCEWithLogitsLoss`, with `strength`.

    >>> loss = BinaryLACELoss(pos_weight=torch.tensor([3.0, 1.0]))
    >>> loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
    tensor(0.0648)
    >>> loss.posterior(torch.tensor([2.0, -1.0]))
    tensor([0.9236, 0.1445])
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        _check(reduction, strength)
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.strength = strength

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return binary_lace_loss(
            input, target, self.weight, None, None, self.reduction, self.pos_weight, strength=self.strength
        )

    def posterior(self, input: Tensor) -> Tensor:
        """Probability that each label is present, where a model that answers `input` has the smallest expected loss.

        In float32, or float64 for such an input. With the module's strength and pos_weight, every one of which must be
        positive and finite; `weight` changes nothing. See `lace_loss.ref.binary_posterior`.
        """
        return _posterior(input, self.pos_weight, float(self.strength))

    def extra_repr(self) -> str:
        return "" if self.strength == 1 else f"strength={self.strength}"


def _check(reduction: Any, strength: Any) -> None:
    if reduction not in ("none", "mean", "sum", "elementwise_mean"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    check_strength(strength)


def _is_well_formed(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> bool:
    for x in (input, target, weight, pos_weight):
        if x is not None and (not isinstance(x, Tensor) or x.layout != torch.strided):
            return False
    if input.dtype not in FLOATING or target.dtype not in (*FLOATING, torch.bool):
        return False
    for x in (weight, pos_weight):
        if x is not None and (x.is_complex() or not _broadcasts(x.shape, input.shape)):
            return False
    return target.shape == input.shape


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False))


def _result_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    if input.dtype == target.dtype and input.dtype in cpu.SCALAR:  # autocast leaves these alone
        return input.dtype
    return torch.promote_types(autocast_dtype(input.dtype, input), autocast_dtype(target.dtype, input))


def _working_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    dtype = _result_dtype(input, target)
    return torch.float32 if dtype in HALF else dtype


def _kernel_applies(input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> bool:
    """As for `lace_loss`: no derivative but the input's, no graph that is meant to run elsewhere."""
    given = [x for x in (input, target, weight, pos_weight) if x is not None]
    if not is_ordinary(*given) or torch.compiler._is_exporting_flag:
        return False
    for x in given:
        if (x.requires_grad and x is not input) or has_tangent(x) or x.device != input.device:
            return False
    work = _working_dtype(input, target)
    if gpu.on_gpu(input):
        return work == torch.float32 and gpu.triton_supported(input.device)
    return input.is_cpu and work in cpu.SCALAR


class _Kernel(torch.autograd.Function):
    """On a CPU the gradient of a sum or mean is formed in the same pass: exponentials cost more than memory. Elsewhere,
    and for a half type, which would round it before a loss scale is known, the backward pass forms it.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *labels, ctx.reduction, ctx.strength = given
        input, gradient = labels[0], None
        if is_being_traced():
            loss = _registered_loss(*given)
        elif gpu.on_gpu(input) or ctx.reduction == "none" or input.dtype != _working_dtype(*labels[:2]):
            loss = _loss(*given)
        else:
            loss, gradient = _loss_and_gradient(*given)
        ctx.save_for_backward(*labels, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *labels, formed = ctx.saved_tensors
        special = torch.is_grad_enabled() or is_being_traced() or in_functional_transform(grad_output)
        # A subnormal entry of `formed` has few digits left to multiply by more than 1.
        if special or formed is None or not abs(factor := grad_output.item()) <= 1:
            compute = _registered_gradient if is_being_traced() else _gradient
            gradient = input_gradient(grad_output, compute, _composite, (ctx.reduction, ctx.strength), labels)
        elif factor == 1:
            gradient = formed.clone() if cpu.is_retained() else formed
        else:
            gradient = formed * factor
        return gradient, *5 * (None,)


def _loss_like(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, strength: float
) -> Tensor:
    return input.new_empty(input.shape if reduction == "none" else (), dtype=_working_dtype(input, target))


def _gradient_like(grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return input.new_empty(input.shape)


def _loss(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, strength: float
) -> Tensor:
    """The loss in the working type, written by the C kernel or by that of a GPU."""
    loss = _loss_like(input, target, weight, pos_weight, reduction, strength)
    by, row = _factors(input, target, weight, pos_weight)
    if gpu.on_gpu(input):
        from . import binary_gpu

        return binary_gpu.forward(input, target, *by, row, reduction, strength)
    call = _call(loss if reduction == "none" else None, None, input, target, by, row, None, reduction, strength, 1.0)
    if reduction != "none":
        call.reduce(loss)
    return loss


def _loss_and_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, strength: float
) -> tuple[Tensor, Tensor]:
    """Of a sum or mean on a CPU, in one pass."""
    loss = _loss_like(input, target, weight, pos_weight, reduction, strength)
    gradient, (by, row) = _room(input, loss.dtype), _factors(input, target, weight, pos_weight)
    _call(None, gradient, input, target, by, row, None, reduction, strength, 1.0).reduce(loss)
    return loss, gradient


def _room(input: Tensor, dtype: torch.dtype) -> Tensor:
    gradient = input.new_empty(input.shape, dtype=dtype)
    cpu.in_large_pages(gradient)
    return gradient


def _gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    strength: float,
) -> Tensor:
    """The gradient in the input's type, times `grad_output`."""
    by, row = _factors(input, target, weight, pos_weight)
    if gpu.on_gpu(input):
        from . import binary_gpu

        return binary_gpu.backward(grad_output, input, target, *by, row, reduction, strength)
    grad_outputs, factor, dtype = None, 1.0, _working_dtype(input, target)
    if reduction == "none":
        grad_outputs = cpu.as_contiguous(grad_output, dtype)
    else:
        factor = grad_output.item()
    gradient = _room(input, dtype)
    _call(None, gradient, input, target, by, row, grad_outputs, reduction, strength, factor)
    return gradient.to(input.dtype)


def _call(
    loss: Tensor | None,
    gradient: Tensor | None,
    input: Tensor,
    target: Tensor,
    by: tuple[Tensor | None, Tensor | None],
    row: int,
    grad_outputs: Tensor | None,
    reduction: str,
    strength: float,
    factor: float,
) -> _cpu.BinaryCall:
    dtype, count = _working_dtype(input, target), input.numel()
    hard = target.dtype == torch.bool
    y = cpu.as_contiguous(target, torch.bool if hard else dtype)
    labels: tuple[Tensor | None, Tensor | None] = (None, y) if hard else (y, None)
    call = _cpu.BinaryCall(
        *(loss, gradient, cpu.as_contiguous(input, dtype), *labels, *by, grad_outputs, count, row),
        *(dtype.itemsize, strength, float(count) if reduction == "mean" else 1.0, factor),
    )
    if count < WORTH_THREADS:
        call.run(0, call.n)
    else:
        in_threads(call, torch.get_num_threads())
    return call


def _factors(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None
) -> tuple[tuple[Tensor | None, Tensor | None], int]:
    """Both for the labels of a row, and how many a row has."""
    if weight is None and pos_weight is None:
        return (None, None), 1
    dtype, given = _working_dtype(input, target), (weight, pos_weight)
    row = row_of([tuple(x.shape) for x in given if x is not None], tuple(input.shape))
    w, p = (
        None if x is None else cpu.as_contiguous(x.reshape(x.shape[max(0, x.dim() - len(row)) :]).expand(row), dtype)
        for x in given
    )
    return (w, p), prod(row)


# Each one operation to compilers and other modes that record what runs.
_registered_loss = torch.library.custom_op("lace_loss::binary", _loss, mutates_args=(), device_types=("cpu", "cuda"))
_registered_loss.register_fake(_loss_like)
_registered_gradient = torch.library.custom_op(
    "lace_loss::binary_gradient", _gradient, mutates_args=(), device_types=("cpu", "cuda")
)
_registered_gradient.register_fake(_gradient_like)


def _composite(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: str, strength: float
) -> Tensor:
    dtype = _working_dtype(input, target)
    z, y = input.to(dtype), target.to(dtype)
    present, absent = y, 1 - y
    if pos_weight is not None:
        present = present * pos_weight.to(dtype)
    if weight is not None:
        present, absent = present * weight.to(dtype), absent * weight.to(dtype)
    losses = weighted(present, loss_of_log_odds(-z, strength))
    losses = losses + weighted(absent, loss_of_log_odds(z, strength))
    if reduction == "none":
        return losses
    return losses.sum() / losses.numel() if reduction == "mean" else losses.sum()


def _posterior(input: Tensor, pos_weight: Tensor | None, strength: float) -> Tensor:
    """By e = exp(-|z|): the class with the smaller logit has the odds e K_top / K_other, times the other's weight."""
    z = input if input.dtype == torch.float64 else input.float()
    size = z.abs()
    e = torch.exp(-size)
    log, large = log_1_plus(e), 1 / (1 + e)
    small = e * large
    n = torch.where(e == 0, 0, size + log)  # e n has its limit 0
    k_top = 1 - strength + strength * (small + large * log)
    k_other = 1 - strength + strength * (large + small * n)
    odds = e * (k_top / k_other)
    if pos_weight is not None:
        p = pos_weight.to(z.dtype)
        if not ((p > 0) & p.isfinite()).all():
            raise ValueError("pos_weight must be positive and finite for a posterior")
        odds = odds * torch.where(z > 0, p, 1 / p)
    return torch.where(z > 0, 1, odds) / (1 + odds)
