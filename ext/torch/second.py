"""The gradient of a kernel's loss, with derivatives of its own: those of the loss as PyTorch operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import has_tangent

Form = Callable[..., Tensor]
Tensors = Sequence[Tensor | None]  # of a loss, the input first


def input_gradient(
    grad_output: Tensor, compute: Form, composite: Form, options: tuple[Any, ...], tensors: Tensors, kept: Tensors = ()
) -> Tensor:
    """The gradient, differentiable where that is asked for.

    It is `compute(grad_output, *tensors, *kept, *options)`. `composite(*tensors, *options)` is the loss.
    """
    create_graph = torch.is_grad_enabled()
    if in_functional_transform(grad_output):
        return _composite_gradient(grad_output, composite, options, tensors, create_graph)[0]
    if create_graph:
        return KernelGradient.apply(grad_output, compute, composite, options, len(tensors), *tensors, *kept)
    return compute(grad_output, *tensors, *kept, *options)


class KernelGradient(torch.autograd.Function):
    """What `compute` makes, with the composite form's derivatives."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        compute: Form,
        composite: Form,
        options: tuple[Any, ...],
        count: int,
        *saved: Tensor | None,
    ) -> Tensor:
        ctx.composite, ctx.options, ctx.others = composite, options, len(saved) - 1
        ctx.save_for_backward(grad_output, *saved[:count])
        gradient = compute(grad_output, *saved, *options)
        return gradient.clone() if any(gradient is x for x in saved) else gradient  # which would be input and output

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, *tensors = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            seed = grad_output.view_as(grad_output) if grad_output.requires_grad else grad_output
            gradient, alias = _composite_gradient(seed, ctx.composite, ctx.options, tensors, True)
            by_input, *by_output = torch.autograd.grad(
                gradient, [alias, seed] if seed.requires_grad else [alias], vector, create_graph=create_graph
            )
        return by_output[0] if by_output else None, None, None, None, None, by_input, *ctx.others * [None]


def _composite_gradient(
    grad_output: Tensor, composite: Form, options: tuple[Any, ...], tensors: Tensors, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """The gradient, and the alias of the input that it belongs to: hooks of the input run once, at the end."""
    input, *others = tensors
    assert input is not None
    with torch.enable_grad():
        alias = input.view_as(input)
        loss = composite(alias, *others, *options)
        return torch.autograd.grad(loss, alias, grad_output, create_graph=create_graph)[0], alias


def in_functional_transform(grad_output: Tensor) -> bool:
    """Whether the backward pass runs under torch.func, in forward mode, or in the vmap of `is_grads_batched=True`."""
    return (
        torch._C._are_functorch_transforms_active()
        or has_tangent(grad_output)
        or (not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_output))
    )
