"""The loss on a CPU: how tensors reach the C kernel, and the derivatives of what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _cpu
from ..layout import row_stride
from ..threads import LOGITS_WORTH_A_THREAD, WORTH_THREADS, in_threads
from .call import HALF, Options, check_target, class_axis, is_being_traced, is_ordinary, kernel_dtype
from .composite import composite
from .second import in_functional_transform, input_gradient

__all__ = [
    "SCALAR",
    "OnCPU",
    "as_contiguous",
    "in_large_pages",
    "is_retained",
    "loss_and_statistics",
    "registered",
    "run",
]

LARGE = 1 << 20  # logits
SCALAR = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}

# The loss, the gradient, and of each sample cross entropy, probability and rank; None where it is not asked for.
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def loss_and_statistics(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, with_statistics: bool
) -> tuple[Tensor, ...]:
    """The loss in the dtype that the kernel computes in and, if asked for, the three statistics."""
    if input.requires_grad and torch.is_grad_enabled():
        return OnCPU.apply(input, target, weight, options, with_statistics)
    loss, _, *statistics = _eager_or_registered()(input, target, weight, None, False, *options, with_statistics)
    return (loss, *statistics) if with_statistics else (loss,)


class OnCPU(torch.autograd.Function):
    """The loss and the statistics. The gradient is formed in the same pass, except for a half type: rounded to it
    before a loss scale is known, it would underflow.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: Options, with_statistics: bool
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        with_gradient = input.dtype not in HALF
        compute = _eager_or_registered()
        loss, gradient, *statistics = compute(input, target, weight, None, with_gradient, *options, with_statistics)
        ctx.save_for_backward(input, target, weight, gradient if with_gradient else None)
        if not with_statistics:
            return (loss,)
        ctx.set_materialize_grads(False)  # the statistics have none
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return None, None, None, None, None
        saved = ctx.saved_tensors
        special = torch.is_grad_enabled() or is_being_traced() or in_functional_transform(grad_output) or is_retained()
        if special or saved[3] is None or grad_output.dim() or grad_output.item() != 1:
            gradient = input_gradient(grad_output, _gradient, composite, ctx.options, saved[:3], saved[3:])
            return gradient, None, None, None, None
        return saved[3], None, None, None, None  # what input_gradient would return, found 2 us earlier


def _gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    gradient: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
) -> Tensor:
    """`gradient`, which the kernel has formed, times `grad_output`. For a half type, and where a factor is above 1, the
    kernel forms it now.

    The result is the caller's, who may change it: a copy where a later backward pass will want `gradient` again.
    """
    options = (ignore_index, reduction, label_smoothing, strength)
    if gradient is None:
        return _eager_or_registered()(input, target, weight, grad_output, True, *options, False)[1]
    traced = is_being_traced()
    if not traced and not grad_output.dim():
        if (value := grad_output.item()) == 1:
            return gradient.clone() if is_retained() else gradient
        if -1 <= value <= 1:
            return gradient * value
    axis = class_axis(input)
    factor = grad_output.unsqueeze(axis) if grad_output.dim() else grad_output  # raises if it has no storage
    if not traced and is_ordinary(factor) and factor.isfinite().all() and (factor.abs() > 1).any():
        # Formed again: an entry that is subnormal has few digits left to multiply.
        return _eager_or_registered()(input, target, weight, grad_output, True, *options, False)[1]
    if not target.is_floating_point():  # an ignored sample's 0 times an infinite or NaN gradient from above is 0
        factor = torch.where((target.long() == ignore_index).unsqueeze(axis), 0, factor)
    return gradient * factor


def is_retained() -> bool:
    """Whether the graph stays after this backward pass, and what is saved in it."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _eager_or_registered() -> Any:
    # The dispatcher takes about as long to call a registered operation as cross_entropy takes for 10 logits.
    return registered if is_being_traced() else run


def run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_output: Tensor | None,
    with_gradient: bool,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
    with_statistics: bool,
) -> Results:
    """What the C kernel makes of these, the gradient multiplied by `grad_output`."""
    dtype = kernel_dtype(input)
    results = _allocate(input, SCALAR[dtype], with_gradient, reduction, with_statistics)
    loss, gradient, *statistics = results
    probabilities = target.is_floating_point()
    shape = input.shape
    ndim, k = len(shape), shape[1 if len(shape) > 1 else 0]
    n = input.numel() // k
    apart = None if input.is_neg() or not _is_aligned(input) else row_stride(shape, input.stride(), 1)
    # As in the NumPy face: plane by plane where the kernel can.
    planes = ndim > 2 and apart is None and not (probabilities or label_smoothing or with_statistics)
    planes = planes and input.dtype == dtype
    plane_size = n // max(1, len(input)) if planes else 0
    if planes:
        z = _aligned(input).detach().resolve_neg().contiguous()
    else:
        z = input if ndim == 2 and apart is not None else _rows(input)
    t, y = (None, _rows(target).to(dtype).contiguous()) if probabilities else (_as_int64(target), None)
    w = None if weight is None else as_contiguous(weight, dtype)
    losses = loss.view(-1) if reduction == "none" else None
    stats = [x.view(-1) for x in statistics if x is not None] if with_statistics else None
    g = as_z = gradient
    if gradient is not None:
        in_large_pages(gradient)
    if gradient is not None and z is not input:  # in another order
        as_z = gradient if plane_size or ndim == 1 else gradient.movedim(1, -1)
        g = as_z.reshape(z.shape) if z.data_ptr() == input.data_ptr() else torch.empty_like(z)
    row_grad_outputs, factor = None, 1.0
    if grad_output is not None:
        if grad_output.dim():
            row_grad_outputs = as_contiguous(grad_output, dtype).view(-1)
        else:
            factor = grad_output.item()

    size = loss.element_size()
    options, divisor = (size, ignore_index, label_smoothing, strength), None if reduction == "mean" else 1.0
    apart = z.stride(0) * z.element_size()
    whole = _cpu.KernelCall(
        losses, g, z, t, y, w, row_grad_outputs, stats, n, k, plane_size, apart, *options, divisor, factor
    )
    if z.dtype == dtype:
        bad_row = whole.run(0, n) if n * k < WORTH_THREADS else in_threads(whole, torch.get_num_threads())
    else:
        # A half type, in blocks that are converted to the same memory: anew for each, the heap grew by 20 MiB and more.
        threads, bad_row = torch.get_num_threads(), -1
        block = min(n, max(1, LOGITS_WORTH_A_THREAD * threads // k))
        z_block = z.new_empty((block, k), dtype=dtype)
        g_block = None if g is None else torch.empty_like(z_block)
        for part in (slice(i, min(i + block, n)) for i in range(0, n, block or 1)):
            count = part.stop - part.start
            z_part, g_part = z_block[:count].copy_(z[part]), None if g_block is None else g_block[:count]
            t_part, y_part, outputs = (None if x is None else x[part] for x in (t, y, row_grad_outputs))
            tensors = (whole.losses(part.start), g_part, z_part, t_part, y_part, w, outputs)
            block_call = _cpu.KernelCall(
                *tensors, stats and [x[part] for x in stats], count, k, 0, k * size, *options, whole.divisor, factor
            )
            bad_row = max(bad_row, in_threads(block_call, threads))
            if g is not None and g_part is not None:
                g[part] = g_part
    if bad_row >= 0:
        check_target(target, k, ignore_index)
        raise RuntimeError(
            "another thread wrote to the target during the call: a class that did not exist is not there now"
        )
    if g is not as_z and g is not None and as_z is not None and g.data_ptr() != as_z.data_ptr():
        as_z.copy_(g.view(as_z.shape))
    if losses is None:
        whole.reduce(loss)
    return results


def _allocate(input: Tensor, scalar: Tensor, with_gradient: bool, reduction: str, with_statistics: bool) -> Results:
    """Room for the results; `scalar` is a 0-d tensor of the dtype that is computed in."""
    cross_entropy = probability = rank = None
    if reduction == "none" or with_statistics:
        axis = class_axis(input)
        samples = input.shape[:axis] + input.shape[axis + 1 :]
    # By a model of its own: 4 us less than by an empty shape.
    loss = input.new_empty(samples, dtype=scalar.dtype) if reduction == "none" else torch.empty_like(scalar)
    if with_statistics:
        cross_entropy, probability = (input.new_empty(samples, dtype=scalar.dtype) for _ in range(2))
        rank = input.new_empty(samples, dtype=torch.int64)
    return loss, torch.empty_like(input) if with_gradient else None, cross_entropy, probability, rank


def _is_aligned(x: Tensor) -> bool:
    """Whether to its type, as C wants it; torch.frombuffer and from_numpy may give others."""
    return x.data_ptr() % x.element_size() == 0


def _aligned(x: Tensor) -> Tensor:
    return x if _is_aligned(x) else x.detach().clone()


def as_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As C wants it: aligned, of this type, in the order of its indices."""
    if x.dtype == dtype and x.is_contiguous() and not x.is_neg() and _is_aligned(x):  # asking takes 1 us, not 5
        return x
    return _aligned(x).detach().to(dtype).resolve_neg().contiguous()


def in_large_pages(x: Tensor) -> None:
    if x.numel() >= LARGE:
        _cpu.in_large_pages(x, x.nbytes)


def _rows(x: Tensor) -> Tensor:
    """(C,), (N, C) or (N, C, d1, ...) as contiguous (M, C), without a copy where possible."""
    x = _aligned(x).detach().resolve_neg()
    x = x.movedim(1, -1) if x.dim() > 2 else x
    return x.reshape(-1, x.shape[-1]).contiguous()


def _as_int64(target: Tensor) -> Tensor:
    target = _aligned(target)
    if target.dtype == torch.int64 and target.dim() == 1 and target.is_contiguous():
        return target
    return target.to(torch.int64).contiguous().view(-1)


# One operation to compilers and other modes that record what runs. Where nothing was asked for, its result is empty.
_SCHEMA = (
    "(Tensor input, Tensor target, Tensor? weight, Tensor? grad_output, bool with_gradient, SymInt ignore_index, "
    "str reduction, float label_smoothing, float strength, bool with_statistics) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _without_none(results: Results) -> tuple[Tensor, ...]:
    return tuple(results[0].new_empty(0) if x is None else x for x in results)


registered = torch.library.custom_op(
    "lace_loss::cpu",
    lambda *arguments: _without_none(run(*arguments)),
    mutates_args=(),
    device_types="cpu",
    schema=_SCHEMA,
)


@registered.register_fake
def _(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_output: Tensor | None,
    with_gradient: bool,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
    with_statistics: bool,
) -> tuple[Tensor, ...]:
    scalar = input.new_empty((), dtype=kernel_dtype(input))
    return _without_none(_allocate(input, scalar, with_gradient, reduction, with_statistics))
