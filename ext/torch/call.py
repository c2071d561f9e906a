"""What is known of one call, asked once: its shapes and dtypes, who looks on, and whether a kernel can read it."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

HALF = (torch.float16, torch.bfloat16)

FLOATING = (torch.float32, torch.float64, *HALF)
_INDEX_DTYPES = (torch.int64, torch.uint8, torch.int32, torch.int16, torch.int8)
_ORDINARY = (Tensor, torch.nn.Parameter)

Options = tuple[int, str, float, float]  # ignore_index, reduction, label_smoothing, strength


def check_strength(strength: Any) -> None:
    if isinstance(strength, Tensor):
        raise TypeError("strength must be a number, not a Tensor: the loss has no derivative with respect to it")
    if type(strength) is not float and not isinstance(strength, Real):  # a class's own question takes 1 us
        raise TypeError(f"strength must be a number, got {strength!r}")
    if not 0 <= strength <= 1:  # type: ignore[operator]
        raise ValueError(f"strength must be in [0, 1], got {strength}")


def require_memory(*tensors: Tensor | None) -> None:
    """Refuse tensors whose storage was given back, which torch's own operations may read all the same."""
    for x in tensors:
        if x is not None and not x.data_ptr() and x.numel() and x.device.type in ("cpu", "cuda"):
            raise RuntimeError(f"a tensor of shape {tuple(x.shape)} has no storage: its data is not allocated")


def kinds_of(**tensors: Tensor | None) -> str:
    """Names, dtypes and shapes, for a message."""
    return ", ".join(f"{name} {x.dtype} {tuple(x.shape)}" for name, x in tensors.items() if x is not None)


class Call(NamedTuple):
    """What the arguments of a call say.

    axis : of the classes.
    probabilities : whether the target holds them.
    result_dtype : of the loss.
    ordinary : whether all tensors are what they seem, see `is_ordinary`.
    kernel_reads : whether a kernel may take the tensors, if there is one for their device.
    """

    axis: int
    probabilities: bool
    result_dtype: torch.dtype
    ordinary: bool
    kernel_reads: bool


def describe(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Call | None:
    """The call of these arguments, or None where `cross_entropy` would refuse them (but for other index dtypes)."""
    tensors = (input, target) if weight is None else (input, target, weight)
    for x in tensors:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:
            return None
    shape, target_shape, dtype, target_dtype = input.shape, target.shape, input.dtype, target.dtype
    if dtype not in FLOATING or not shape:
        return None
    axis = 1 if len(shape) > 1 else 0
    probabilities = target.is_floating_point()
    if target_shape == shape:
        fits = probabilities and ignore_index < 0 and (weight is None or not weight.is_complex())
    else:
        samples = shape[:1] if len(shape) == 2 else shape[:axis] + shape[axis + 1 :]
        fits = (target_shape == samples or len(shape) == len(target_shape) == target.numel() == 1) and (
            target_dtype in _INDEX_DTYPES
            and (weight is None or autocast_dtype(weight.dtype, input) == autocast_dtype(dtype, input))
        )
    if not fits or shape[axis] == 0 or (weight is not None and weight.shape != shape[axis : axis + 1]):
        return None
    result_dtype = autocast_dtype(dtype, input)
    if probabilities:
        for x in tensors[1:]:
            result_dtype = torch.promote_types(result_dtype, autocast_dtype(x.dtype, input))
    ordinary = is_ordinary(*tensors)
    return Call(axis, probabilities, result_dtype, ordinary, ordinary and _kernel_reads(*tensors))


def _kernel_reads(input: Tensor, *others: Tensor) -> bool:
    """A kernel has a first derivative with respect to the input (the second is the composite's), no forward mode, and
    it is part of no graph that is meant to run elsewhere (export, trace). Compilers see it as one operation.
    """
    # The flag itself: compiled, is_exporting() is always True in torch 2.11.
    if torch.compiler._is_exporting_flag:
        return False
    dtype, device = kernel_dtype(input), input.device
    for x in others:
        if x.requires_grad or x.device != device:
            return False
        if x.is_floating_point() and x.dtype != dtype and not (x.dtype in HALF and dtype == torch.float32):
            return False
    return forward_ad._current_level < 0 or not any(map(has_tangent, (input, *others)))


def class_axis(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0


def kernel_dtype(input: Tensor) -> torch.dtype:
    """What a kernel computes in."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def working_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """What torch's own operations compute in."""
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    return torch.float32 if dtype in HALF else dtype


def autocast_dtype(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    """Autocast calls cross_entropy with float32 in place of the half types."""
    if dtype not in HALF:
        return dtype
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.float32 if autocast else dtype


def has_tangent(x: Tensor) -> bool:
    # Asking for the level first saves 2 us a tensor.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether they are what they seem: no subclass, with memory, outside of torch.func and jit's tracing."""
    compiling = torch.compiler.is_compiling()
    for x in tensors:
        if type(x) not in _ORDINARY or (not compiling and x._is_zerotensor()):
            return False
    return torch._C._get_tracing_state() is None and not torch._C._are_functorch_transforms_active()


def is_being_traced() -> bool:
    """Whether a compiler or another mode notes which operations run."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def safe_class_index(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class indices that are safe to look up, which samples count, and which of those name no class."""
    t = target.long()
    kept = t != ignore_index
    wrong = kept & ((t < 0) | (t >= classes))
    return t.masked_fill(~kept | wrong, 0), kept, wrong


def check_target(target: Tensor, classes: int, ignore_index: int = -100) -> None:
    """Raise IndexError with the position and value of the first class index outside 0 to classes - 1.

    For a loss that became NaN on a GPU, where `lace_loss` does not look: asking waits for the device.

        >>> import torch
        >>> from lace_loss.ext.torch import check_target
        >>> check_target(torch.tensor([0, 3, 7]), classes=5)
        Traceback (most recent call last):
        IndexError: target[2] is 7, not a class: 0 to 4
    """
    _, _, wrong = safe_class_index(target, classes, ignore_index)
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        raise IndexError(f"target{position or ''} is {target[tuple(position)]}, not a class: 0 to {classes - 1}")
