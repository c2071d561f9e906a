"""The loss on a GPU: which calls the Triton kernels of `kernels.py` serve, their launches, and their derivatives."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..layout import row_stride
from .call import Options, class_axis, is_being_traced, working_dtype
from .composite import composite
from .second import input_gradient

__all__ = ["OnGPU", "backward", "forward", "loss_and_statistics", "on_gpu", "serves"]

ENOUGH_PROGRAMS = 256  # about two for each multiprocessor

# The loss, what the backward pass needs (floats of every sample and the mean's divisor), and of each sample cross
# entropy, probability and rank; None where it is not asked for.
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def on_gpu(input: Tensor) -> bool:
    return input.is_cuda


def serves(input: Tensor, target: Tensor) -> bool:
    """Whether the kernels know these, which a kernel could read: class indices, and no float64."""
    single = working_dtype(input, target, None) == torch.float32
    return single and not target.is_floating_point() and triton_supported(input.device)


def triton_supported(device: torch.device) -> bool:
    return has_triton() and runs_kernels(device)


# What torch.compiler.assume_constant_result does, but that imports the whole compiler: as long as torch itself takes.
triton_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def has_triton() -> bool:
    try:
        from . import kernels  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run there, which wants more than an import: Triton compiles a launcher, with a C compiler."""
    from . import kernels

    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.cuda.device(device):
            kernels.trial[(1,)](torch.empty(1, device=device))
    except Exception as error:
        message = f"Triton cannot run the loss's kernels on {device}, so torch's own operations do: {error!r}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    return True


def loss_and_statistics(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, with_statistics: bool
) -> tuple[Tensor, ...]:
    """The loss in float32 and, if asked for, the three statistics."""
    if input.requires_grad and torch.is_grad_enabled():
        return OnGPU.apply(input, target, weight, options, with_statistics)
    compute = registered_forward if is_being_traced() else forward
    loss, _, _, *statistics = compute(input, target, weight, False, *options, with_statistics)
    return (loss, *statistics) if with_statistics else (loss,)


class OnGPU(torch.autograd.Function):
    """The loss and the statistics. The backward pass forms the gradient from what the forward pass leaves."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: Options, with_statistics: bool
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.set_materialize_grads(False)  # the statistics have none
        compute = registered_forward if is_being_traced() else forward
        loss, saved, divisor, *statistics = compute(input, target, weight, True, *options, with_statistics)
        ctx.save_for_backward(input, target, weight, saved, divisor)
        if not with_statistics:
            return (loss,)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return 5 * (None,)
        compute = registered_backward if is_being_traced() else backward
        saved = ctx.saved_tensors
        return input_gradient(grad_output, compute, composite, ctx.options, saved[:3], saved[3:]), *4 * (None,)


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    save_for_backward: bool,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
    with_statistics: bool,
) -> Results:
    """`Results`, all but the rank in float32."""
    from . import kernels

    z, row, side_by_side = layout(input)
    classes, total, mean = _classes(input), target.numel(), reduction == "mean"
    target, weight = target.contiguous(), None if weight is None else weight.float().contiguous()
    saved = saved_like(input, label_smoothing) if save_for_backward else None
    statistics = _statistics_like(target, with_statistics)
    bm, bc, v, warps = block(z, row, side_by_side, label_smoothing > 0)

    # Few logits are a matter of launches: one program reduces the loss, too.
    single_program = reduction != "none" and row > 0 and 0 < total <= 8192
    single_program = single_program and bc >= classes and _power_of_2(total) * bc <= 16384
    # The loss is a tensor of its own, for it may be changed in place.
    pairs = z.new_empty((2, *target.shape), dtype=torch.float32) if mean and not single_program else None
    loss = z.new_empty(() if single_program else target.shape, dtype=torch.float32) if pairs is None else pairs[1]
    weights = pairs[0] if pairs is not None else torch.empty_like(loss) if single_program and mean else None
    if total:
        if single_program:
            bm = _power_of_2(total)
            bc = min(bc, 8192 // bm)
            warps = _warps(bm * bc)
        launch(
            kernels.forward, total // side_by_side * _ceil_div(side_by_side, bm), warps, input,
            *(z, target, weight, loss, weights, saved, *statistics),
            *(side_by_side, total, ignore_index, strength, 1 - strength, label_smoothing),
            *(classes, row, bm, bc, v, label_smoothing > 0, reduction if single_program else "none"),
        )  # fmt: skip
    divisor = weights
    if pairs is not None:
        divisor, loss = pairs.view(2, -1).sum(1).unbind()
        loss = loss / divisor
    elif reduction == "sum" and not single_program:
        loss = loss.sum()
    return loss, saved, divisor, *statistics


def backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
) -> Tensor:
    """The gradient times `grad_output`."""
    from . import kernels

    z, row, side_by_side = layout(input)
    classes, total = _classes(input), target.numel()
    target, weight = target.contiguous(), None if weight is None else weight.float().contiguous()
    gradient = gradient_like(input)
    each = any(grad_output.stride())
    grad_output = grad_output.resolve_neg().contiguous() if each else grad_output
    gradient_row = _gradient_row(row, classes)
    bm, bc, v, warps = block(z, row, side_by_side, label_smoothing > 0)
    blocks, columns = total // max(1, side_by_side) * _ceil_div(side_by_side, bm), _ceil_div(classes, bc)
    splits = _power_of_2(min(columns, _ceil_div(16 * ENOUGH_PROGRAMS, max(1, blocks))))
    if total:
        launch(
            kernels.backward, blocks * splits, warps, input,
            *(gradient, grad_output, z, target, weight, saved, divisor if reduction == "mean" else None),
            *(side_by_side, total, splits, ignore_index, strength, 1 - strength, label_smoothing),
            *(classes, row, gradient_row, bm, bc, v, label_smoothing > 0, each),
        )  # fmt: skip
    return gradient


# One operation each to compilers and other modes that record what runs. What was not asked for is empty.
_SCHEMA = (
    "(Tensor input, Tensor target, Tensor? weight, bool save_for_backward, SymInt ignore_index, str reduction, "
    "float label_smoothing, float strength, bool with_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _without_none(results: Results) -> tuple[Tensor, ...]:
    return tuple(results[0].new_empty(0) if x is None else x for x in results)


def forward_without_none(*arguments: Any) -> tuple[Tensor, ...]:
    return _without_none(forward(*arguments))


registered_forward = torch.library.custom_op(
    "lace_loss::gpu_forward", forward_without_none, mutates_args=(), device_types="cuda", schema=_SCHEMA
)
registered_backward = torch.library.custom_op("lace_loss::gpu_backward", backward, mutates_args=(), device_types="cuda")


@registered_forward.register_fake
def _(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    save_for_backward: bool,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
    with_statistics: bool,
) -> tuple[Tensor, ...]:
    loss = input.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    saved = saved_like(input, label_smoothing) if save_for_backward else None
    divisor = torch.empty_like(loss) if reduction == "mean" else None
    return _without_none((loss, saved, divisor, *_statistics_like(target, with_statistics)))


@registered_backward.register_fake
def _(grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return gradient_like(input)


def launch(kernel: Any, programs: int, warps: int, input: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(input):  # type: ignore[no-untyped-call]  # launches go to the current device
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True)  # 3.9 wants to be told


def _warps(logits: int) -> int:
    """Of a program."""
    return max(1, min(4, logits // 256), min(16, logits // 1024))


def _classes(input: Tensor) -> int:
    return input.shape[class_axis(input)]


def layout(input: Tensor) -> tuple[Tensor, int, int]:
    """The logits or, if they lie neither in rows nor in planes, a copy; the distance of rows, 0 for planes; and how
    many samples follow each other.
    """
    z, classes = input.detach().resolve_neg(), _classes(input)
    apart = row_stride(z.shape, z.stride(), 1)
    if apart is not None:
        return z, apart, z.numel() // classes
    if z.dim() == 2 and z.t().is_contiguous():
        return z, 0, z.shape[0]
    z = z.contiguous()
    return (z, 0, z[0, 0].numel()) if z.dim() > 2 and z.shape[0] else (z, classes, z.numel() // classes)


def gradient_like(input: Tensor) -> Tensor:
    """Room for the gradient, where `backward` writes it: as the logits lie, without large gaps."""
    z, row, _ = layout(input)
    classes = _classes(input)
    if row in (0, classes):
        return torch.empty_like(z)
    return z.new_empty((z.shape[0], _gradient_row(row, classes)))[:, :classes]


def _gradient_row(row: int, classes: int) -> int:
    """The distance of its rows: that of the logits' where these are cut from somewhat longer ones, for one pattern of
    16 bytes to serve both.
    """
    return row if row <= classes + classes // 8 else classes


def _statistics_like(target: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for cross entropy, probability and rank."""
    if not wanted:
        return None, None, None
    cross_entropy, probability = (torch.empty_like(target, dtype=torch.float32) for _ in range(2))
    return cross_entropy, probability, torch.empty_like(target, dtype=torch.int64)


def saved_like(input: Tensor, label_smoothing: float) -> Tensor:
    """Room for what the backward pass wants to know of each sample."""
    return input.new_empty((7 if label_smoothing else 3, input.numel() // _classes(input)), dtype=torch.float32)


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def block(z: Tensor, row: int, side_by_side: int, smoothed: bool) -> tuple[int, int, int, int]:
    """Samples and classes of a program, how many logits make up 16 bytes where rows begin in between, and its warps.

    The many instructions of a sample after its last logit are run by all threads that share it. Where there are samples
    enough, a thread has them for itself, or a warp. Elsewhere more threads are faster.
    """
    classes, v = _classes(z), 16 // z.element_size()
    samples = z.numel() // classes
    shifted = row > 0 and (classes % v or row % v) and _gradient_row(row, classes) == row and z.data_ptr() % 16 == 0
    if row == 0 and not smoothed and side_by_side >= 32 and samples >= 32 * ENOUGH_PROGRAMS:
        warps = 2 if classes >= 64 else 1
        bm = 32 * v * warps
        while bm > 32 and (bm > side_by_side or samples < 2 * bm * ENOUGH_PROGRAMS):
            bm //= 2
        return bm, min(4 * warps, _power_of_2(classes)), 1, warps
    if row > 0 and not smoothed and classes <= 512 and samples >= 64 * ENOUGH_PROGRAMS:
        bm = 128
        while samples < 2 * bm * ENOUGH_PROGRAMS:
            bm //= 2
        return bm, v, v if shifted else 1, 1
    if row > 0 and not smoothed and classes > 512 and samples >= 8 * ENOUGH_PROGRAMS:
        bm, bc = (32, 4 * v) if classes <= 2048 and samples >= 64 * ENOUGH_PROGRAMS else (1, 1024)
        return bm, bc, v if shifted else 1, 1
    # 32 logits a thread; 16 with smoothing, which keeps more in registers.
    logits = 2048 if smoothed else 4096
    bc = min(_power_of_2(classes + v - 1 if shifted else classes), logits if row else 32)
    bm = min(logits // bc, _power_of_2(side_by_side))
    while bm > max(1, 512 // bc) and samples < ENOUGH_PROGRAMS * bm:
        bm //= 2
    return bm, bc, v if shifted and classes >= v else 1, _warps(bm * bc)
