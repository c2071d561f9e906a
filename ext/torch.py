"""LACE for PyTorch: a drop-in for `torch.nn.CrossEntropyLoss` and `torch.nn.functional.cross_entropy`.

With q = softmax(z), t the true class, s the strength and u = log(sum over j != t of exp z_j) - z_t:

    1 - q_t = sigmoid(u)        -log q_t = softplus(u)        L = (1 - s + s sigmoid(u)) softplus(u)

The sum leaves the true class out, so nothing is lost when the model is sure. `log_softmax` rounds -log q_t to a
multiple of 1.2e-7 in float32, and L, which is about its square, is then exactly 0 from a margin of 20 on.

This composite form runs on any device and can be differentiated any number of times. On a CPU the C kernel takes its
place where the result is the same, on a GPU those of `gpu.py`, which wants Triton (see `_kernel_applies`).
"""

from __future__ import annotations

from functools import cache
from math import isfinite
from numbers import Real
from operator import index
from typing import Any

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "lace_loss.ext.torch needs PyTorch, which the extra torch installs: pip install 'lace-loss[torch]'"
    raise ModuleNotFoundError(message, name="torch") from error
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn import functional as F
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _LOGITS_WORTH_A_THREAD, _WORTH_THREADS, _cpu, _in_threads

__all__ = ["LACELoss", "check_target", "lace_loss"]

_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.float64, *_HALF)
_PLAIN = (Tensor, torch.nn.Parameter)
_LARGE = 1 << 20  # logits
_SCALAR = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
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
    normalizer: float | Tensor | None = None,
    statistics: bool = False,
) -> Any:
    """Linearly Adaptive Cross Entropy between logits and target; arguments as `torch.nn.functional.cross_entropy`.

    Parameters
    ----------
    input : (C,), (N, C) or (N, C, d1, ...) logits, floating. float16 and bfloat16 are computed in float32.
    target : class indices of the shape without C (int8 to int64, uint8), or probabilities of the input's shape.
    strength : s in [0, 1]: 1 is LACE, 0 is cross entropy.
    normalizer : a number or 0-d tensor that takes the place of the mean's denominator: what all batches of a gradient
        accumulation, or all processes, count together.
    statistics : return (loss, {"cross_entropy": -log q_t, "probability": q_t, "rank": classes ahead of t}), tensors of
        the target's shape without derivatives, for class indices. Rank < k is top-k accuracy; of equal logits the
        lower index is ahead. An ignored sample has 0, 0 and C.

    Raises
    ------
    What `cross_entropy` raises for the same arguments; IndexError for a class that does not exist where Python may read
    it (else its sample's loss and gradient are NaN: on a GPU, under `torch.func`, in exported and traced graphs, and
    where a composite form is compiled; see `check_target`); ValueError for a strength outside [0, 1], a normalizer
    without a mean or of a shape, and statistics of probabilities.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            lace_loss,
            (input, target, weight),
            *(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing),
            strength=strength,
            normalizer=normalizer,
            statistics=statistics,
        )
    if (
        weight is None
        and size_average is None
        and reduce is None
        and normalizer is None
        and reduction == "mean"
        and label_smoothing == 0
        and not statistics
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and type(strength) is float
        and 0 <= strength <= 1
        and _are_usual(input, target)
    ):
        if input.requires_grad and torch.is_grad_enabled():
            return _Usual.apply(input, target, ignore_index, strength)
        return _usual(input, target, ignore_index, strength, False)[0]
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    ignore_index = _checked(ignore_index, reduction, label_smoothing, strength)
    reduction = ("none", "mean", "sum")[_reduction.get_enum(reduction)]
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer takes the place of the mean's denominator, got reduction {reduction!r}")
        if isinstance(normalizer, (Tensor, np.ndarray)) and normalizer.ndim:
            raise ValueError(f"normalizer must be a number or 0-d, got shape {tuple(normalizer.shape)}")
        reduction = "sum"
    if not _is_well_formed(input, target, weight, ignore_index):
        by_torch = F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
        if input.numel() or statistics:
            given = {"input": input, "target": target, "weight": weight}
            kinds = [f"{name} {x.dtype} {tuple(x.shape)}" for name, x in given.items() if x is not None]
            raise RuntimeError(f"these do not go together: {', '.join(kinds)}, ignore_index {ignore_index}")
        return by_torch  # no logits, C = 0 among them: nothing for the strength to change
    _require_memory(*((input, target) if weight is None else (input, target, weight)))
    probabilities = target.is_floating_point()
    if statistics and probabilities:
        raise ValueError("statistics are of class indices, and the target holds probabilities")
    if input.dim() == target.dim() == 1 and not probabilities:
        target = target[0]  # torch takes the class of a lone sample in this form, too
    options = (ignore_index, reduction, float(label_smoothing), float(strength))

    if _kernel_applies(input, target, weight):
        if input.requires_grad and torch.is_grad_enabled():
            loss, *found = _Kernel.apply(input, target, weight, options, statistics)
        else:
            loss, *found = _operation()(input, target, weight, None, False, *options, statistics)
    else:
        if not probabilities and input.is_cpu and target.is_cpu and _is_plain(input, target) and not _is_recorded():
            check_target(target, input.shape[_class_axis(input)], ignore_index)
        loss = _composite(input, target, weight, *options)
        found = _statistics(input.detach(), target, ignore_index) if statistics else ()
    if normalizer is not None:
        loss = loss / normalizer
    if loss.dtype != (dtype := _result_dtype(input, target, weight)):
        loss = loss.to(dtype)
    return (loss, dict(zip(("cross_entropy", "probability", "rank"), found, strict=True))) if statistics else loss


class LACELoss(_WeightedLoss):
    """`lace_loss` as a module: constructed as `torch.nn.CrossEntropyLoss`, with `strength`; called with input, target
    and, on request, `normalizer` and `statistics`.
    """

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
        _checked(ignore_index, self.reduction, label_smoothing, strength)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.strength = strength

    def forward(
        self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None, statistics: bool = False
    ) -> Any:
        return lace_loss(
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            self.label_smoothing,
            strength=self.strength,
            normalizer=normalizer,
            statistics=statistics,
        )

    def extra_repr(self) -> str:
        return "" if self.strength == 1 else f"strength={self.strength}"


def check_target(target: Tensor, classes: int, ignore_index: int = -100) -> None:
    """Raise IndexError with the place and value of the first class index outside 0 to classes - 1.

    For a loss that became NaN on a GPU, where `lace_loss` does not look: asking waits for the device.
    """
    _, _, wrong = _looked_up(target, classes, ignore_index)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise IndexError(f"target{place or ''} is {target[tuple(place)]}, not a class: 0 to {classes - 1}")


def _refuse_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise for a class that the kernel found not to exist."""
    check_target(target, classes, ignore_index)
    raise RuntimeError(
        "another thread wrote to the target during the call: a class that did not exist is not there now"
    )


def _checked(ignore_index: Any, reduction: Any, label_smoothing: Any, strength: Any) -> int:
    """`ignore_index`, where the options are those of a loss; raises what `cross_entropy` raises for them."""
    if type(ignore_index) is not int and isinstance(ignore_index, (np.integer, Tensor)):
        ignore_index = index(ignore_index)
    if type(ignore_index) is not int:
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in 64 bits with a sign, got {ignore_index}")
    if reduction not in ("none", "mean", "sum", "elementwise_mean"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if isinstance(strength, Tensor):
        raise TypeError("strength must be a number, not a Tensor: the loss has no derivative with respect to it")
    for name, value in (("label_smoothing", label_smoothing), ("strength", strength)):
        if type(value) is not float and not isinstance(value, (Real, Tensor)):  # a class's own question takes 1 us
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    return ignore_index


def _is_well_formed(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> bool:
    """Whether `cross_entropy` would take these arguments (but for other index dtypes); it words the refusal itself."""
    for x in (input, target) if weight is None else (input, target, weight):
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            return False
    shape, given = input.shape, target.shape
    if input.dtype not in _FLOATING or not shape:
        return False
    axis = _class_axis(input)
    if given == shape:
        fits = target.is_floating_point() and ignore_index < 0 and (weight is None or not weight.is_complex())
    else:
        fits = (given == shape[:axis] + shape[axis + 1 :] or len(shape) == len(given) == target.numel() == 1) and (
            target.dtype in _INDEX_DTYPES
            and (weight is None or _seen_as(weight.dtype, input) == _seen_as(input.dtype, input))
        )
    return fits and shape[axis] > 0 and (weight is None or weight.shape == shape[axis : axis + 1])


def _require_memory(*tensors: Tensor) -> None:
    """Refuse tensors whose storage was given back, which torch's own operations may read all the same."""
    if _is_plain(*tensors) and not torch.compiler.is_compiling():
        for x in tensors:
            if x.device.type in ("cpu", "cuda") and not x.data_ptr() and x.numel():
                raise RuntimeError(f"a tensor of shape {tuple(x.shape)} has no storage: its data is not allocated")


def _seen_as(dtype: torch.dtype, input: Tensor) -> torch.dtype:
    """Autocast calls cross_entropy with float32 in place of the half types."""
    if dtype not in _HALF:
        return dtype
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.float32 if autocast else dtype


def _result_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    dtype = _seen_as(input.dtype, input)
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, _seen_as(target.dtype, input))
        dtype = dtype if weight is None else torch.promote_types(dtype, _seen_as(weight.dtype, input))
    return dtype


def _working_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    dtype = _result_dtype(input, target, weight)
    return torch.float32 if dtype in _HALF else dtype


def _kernel_applies(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    """A kernel has a first derivative with respect to the input (the second is the composite's), no forward mode, and
    it is part of no graph that is meant to run elsewhere (export, trace). Compilers see it as one operation. On a GPU
    it knows class indices and no float64.
    """
    given = (input, target) if weight is None else (input, target, weight)
    # The flag itself: compiled, is_exporting() is always True in torch 2.11.
    if not _is_plain(*given) or torch.compiler._is_exporting_flag:
        return False
    work = _working_dtype(input, target, weight)
    for x in given:
        if x.dtype != work and x.is_floating_point() and not (x.dtype in _HALF and work == torch.float32):
            return False
        if (x.requires_grad and x is not input) or _has_tangent(x) or x.device != input.device:
            return False
    if _on_gpu(input):
        return work == torch.float32 and not target.is_floating_point() and _triton_serves(input.device)
    return input.is_cpu


def _on_gpu(input: Tensor) -> bool:
    return input.is_cuda


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _triton_serves(device: torch.device) -> bool:
    if not _has_triton():
        return False
    from . import gpu

    return gpu.serves(device)


@cache
def _has_triton() -> bool:
    try:
        from . import gpu  # noqa: F401
    except ImportError:
        return False
    return True


def _has_tangent(x: Tensor) -> bool:
    # Asking for the level first saves 2 us a tensor.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _is_plain(*tensors: Tensor) -> bool:
    """Whether they are what they seem: no subclass, with memory, outside of torch.func and jit's tracing."""
    compiling = torch.compiler.is_compiling()
    for x in tensors:
        if type(x) not in _PLAIN or (not compiling and x._is_zerotensor()):
            return False
    return torch._C._get_tracing_state() is None and not torch._C._are_functorch_transforms_active()


def _is_recorded() -> bool:
    """Whether a compiler or another mode notes which operations run."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _is_retained() -> bool:
    """Whether the graph stays after this backward pass, and what is saved in it."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _is_transformed(grad_output: Tensor) -> bool:
    """Whether the backward pass runs under torch.func, in forward mode, or in the vmap of `is_grads_batched=True`."""
    return (
        torch._C._are_functorch_transforms_active()
        or _has_tangent(grad_output)
        or (not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_output))
    )


def _are_usual(input: Tensor, target: Tensor) -> bool:
    """Whether these are rows of logits and their classes on a CPU as the C kernel takes them, and nothing looks on.

    Asked first because most calls have them, and a loss of so few steps and its gradient take 30 us less: as long as
    the kernel takes for 200 rows of 100 classes.
    """
    return (
        not _is_recorded()
        and _is_plain(input, target)
        and not _has_tangent(input)
        and input.dtype in _SCALAR
        and target.dtype == torch.int64
        and input.is_cpu
        and target.is_cpu
        and input.layout is target.layout is torch.strided
        and input.is_contiguous()
        and target.is_contiguous()
        and len(shape := input.shape) == 2
        and shape[1] > 0
        and target.shape == (shape[0],)
        and not input.is_neg()
        and _is_aligned(input)
        and _is_aligned(target)
    )


def _usual(
    input: Tensor, target: Tensor, ignore_index: int, strength: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean, and the gradient where it is asked for, of what `_are_usual`."""
    loss = torch.empty_like(_SCALAR[input.dtype])  # 4 us less than by an empty shape
    g = torch.empty_like(input) if gradient else None
    (n, k), size = input.shape, input.element_size()
    if g is not None and n * k >= _LARGE:
        _cpu.in_large_pages(g, g.nbytes)
    options = (ignore_index, 0.0, strength, None, 1.0)
    job = _cpu.KernelCall(None, g, input, target, None, None, None, None, n, k, 0, k * size, size, *options)
    wrong = job.run(0, n) if n * k < _WORTH_THREADS else _in_threads(job, torch.get_num_threads())
    if wrong >= 0:
        _refuse_target(target, k, ignore_index)
    job.reduce(loss)
    return loss, g


class _Usual(torch.autograd.Function):
    """`_usual`, differentiated as `_Kernel`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, ignore_index: int, strength: float) -> Tensor:
        ctx.options = (ignore_index, "mean", 0.0, strength)
        loss, gradient = _usual(input, target, ignore_index, strength, True)
        ctx.save_for_backward(input, target, gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, target, gradient = ctx.saved_tensors
        special = torch.is_grad_enabled() or _is_recorded() or _is_transformed(grad_output) or _is_retained()
        if special or grad_output.item() != 1:
            gradient = _differentiated(grad_output, (input, target, None, gradient, None), ctx.options)
        return gradient, None, None, None


class _Kernel(torch.autograd.Function):
    """The loss and what is known beside it. On a CPU the gradient is formed in the same pass, except for a half type:
    rounded to it before a loss scale is known, it would underflow. On a GPU the backward pass forms it from what the
    forward pass leaves.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: Any, statistics: bool
    ) -> tuple[Tensor, ...]:
        ctx.options = options
        ctx.set_materialize_grads(False)  # the statistics have none
        left: list[Any]
        if _on_gpu(input):
            loss, rows, divisor, *found = _operation()(input, target, weight, None, True, *options, statistics)
            left = [rows, divisor]
        else:
            at_once = input.dtype not in _HALF
            loss, *others = _operation()(input, target, weight, None, at_once, *options, statistics)
            left, found = [others[0] if at_once else None, None], others[at_once:]
        ctx.save_for_backward(input, target, weight, *left)
        if statistics:
            ctx.mark_non_differentiable(*found)
        return loss, *found

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return 5 * (None,)
        return _differentiated(grad_output, ctx.saved_tensors, ctx.options), *4 * (None,)


def _differentiated(grad_output: Tensor, given: Any, options: Any) -> Tensor:
    """The gradient, from what the forward pass leaves, with derivatives of its own where they are asked for."""
    input, target, weight, *_ = given
    again = torch.is_grad_enabled()
    if _is_transformed(grad_output):
        return _composite_gradient(grad_output, input, target, weight, options, again)[0]
    if again:
        return _Gradient.apply(grad_output, *given, options)
    return _gradient(*(grad_output, *given, options))


def _gradient(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    gradient: Tensor | None,
    divisor: Tensor | None,
    options: Any,
) -> Tensor:
    """`gradient`, which the kernel has formed, times `grad_output`. For a half type, and where a factor is above 1, the
    kernel forms it now. On a GPU it is formed from the rows in the place of `gradient`, and divided by `divisor`.

    The result is the caller's, who may change it: a copy where a later backward pass will want `gradient` again.
    """
    if _on_gpu(input) and gradient is not None and divisor is not None:
        compute = _registered_backward if _is_recorded() else _backward
        return compute(grad_output, input, target, weight, gradient, divisor, *options)
    if gradient is None:
        return _operation()(input, target, weight, grad_output, True, *options, False)[1]
    axis = _class_axis(input)
    factor = grad_output.unsqueeze(axis) if grad_output.dim() else grad_output  # raises if it has no storage
    if not _is_recorded():
        if not factor.dim() and isfinite(value := factor.item()) and abs(value) <= 1:
            if value == 1:
                return gradient.clone() if _is_retained() else gradient
            return gradient * value
        if input.is_cpu and _is_plain(factor) and factor.isfinite().all() and (factor.abs() > 1).any():
            # Formed again: an entry that is subnormal has few digits left to multiply.
            return _operation()(input, target, weight, grad_output, True, *options, False)[1]
    if not target.is_floating_point():  # an ignored sample's 0 times an infinite or NaN gradient from above is 0
        factor = torch.where((target.long() == options[0]).unsqueeze(axis), 0, factor)
    return gradient * factor


class _Gradient(torch.autograd.Function):
    """`_gradient`, with the composite form's derivatives."""

    @staticmethod
    def forward(ctx: Any, grad_output: Tensor, *given: Any) -> Tensor:
        input, target, weight, _, _, ctx.options = given
        ctx.save_for_backward(grad_output, input, target, weight)
        result, formed = _gradient(grad_output, *given), given[3]
        return result.clone() if result is formed else result  # which would be input and output

    @staticmethod
    def backward(ctx: Any, vector: Tensor) -> tuple[Tensor | None, ...]:
        grad_output, input, target, weight = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            seed = grad_output.view_as(grad_output) if grad_output.requires_grad else grad_output
            gradient, alias = _composite_gradient(seed, input, target, weight, ctx.options, True)
            by_input, *by_output = torch.autograd.grad(
                gradient, [alias, seed] if seed.requires_grad else [alias], vector, create_graph=again
            )
        return by_output[0] if by_output else None, by_input, None, None, None, None, None


def _composite_gradient(
    grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, options: Any, create_graph: bool
) -> tuple[Tensor, Tensor]:
    """And the alias of the input that it belongs to: hooks of the input itself run once, when the result reaches it."""
    with torch.enable_grad():
        alias = input.view_as(input)
        loss = _composite(alias, target, weight, *options)
        return torch.autograd.grad(loss, alias, grad_output, create_graph=create_graph)[0], alias


def _operation() -> Any:
    # The dispatcher takes about as long to call a registered operation as cross_entropy takes for 10 logits.
    return _registered if _is_recorded() else _by_kernel


def _outputs(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    gradient: bool,
    reduction: str,
    label_smoothing: float,
    statistics: bool,
) -> list[Tensor]:
    """Room for the loss, then for the gradient and for the three statistics, where they are asked for. On a GPU, what
    the backward pass forms the gradient from is in its place.
    """
    dtype, outputs = _working_dtype(input, target, weight), []
    if reduction == "none" or statistics:
        axis = _class_axis(input)
        samples = input.shape[:axis] + input.shape[axis + 1 :]
    loss = input.new_empty(samples if reduction == "none" else (), dtype=dtype)
    outputs.append(loss)
    if gradient and _on_gpu(input):
        from . import gpu

        outputs += [gpu.rows_like(input, label_smoothing), loss.new_empty(() if reduction == "mean" else 0)]
    elif gradient:
        outputs.append(torch.empty_like(input))
    if statistics:
        outputs += [input.new_empty(samples, dtype=kind) for kind in (dtype, dtype, torch.int64)]
    return outputs


def _by_kernel(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_output: Tensor | None,
    gradient: bool,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
    statistics: bool,
) -> list[Tensor]:
    """`_outputs`, written by the C kernel, the gradient multiplied by `grad_output`; or by the kernels of a GPU."""
    if _on_gpu(input):
        from . import gpu

        return gpu.forward(
            input, target, weight, gradient, ignore_index, reduction, label_smoothing, strength, statistics
        )
    outputs = _outputs(input, target, weight, gradient, reduction, label_smoothing, statistics)
    loss, axis, probabilities = outputs[0], _class_axis(input), target.is_floating_point()
    stats = [x.view(-1) for x in outputs[-3:]] if statistics else None
    dtype, k, threads = loss.dtype, input.shape[axis], torch.get_num_threads()
    n = input.numel() // k
    # As in the NumPy face: plane by plane where the kernel can.
    planes = input.dim() > 2 and not (probabilities or label_smoothing or statistics) and input.dtype == dtype
    planes = planes and not input.movedim(1, -1).is_contiguous()
    inner = n // max(1, len(input)) if planes else 0
    z = _aligned(input).detach().resolve_neg().contiguous() if planes else _rows(input)
    t, y = (None, _rows(target).to(dtype).contiguous()) if probabilities else (_integers(target), None)
    w = None if weight is None else _aligned(weight).detach().to(dtype).resolve_neg().contiguous()
    losses = loss.view(-1) if reduction == "none" else None
    g = as_z = outputs[1] if gradient else None
    if g is not None and n * k >= _LARGE:
        _cpu.in_large_pages(g, g.nbytes)
    if g is not None and z is not input:  # in another order
        as_z = g if planes or not axis else g.movedim(axis, -1)
        g = as_z.reshape(z.shape) if z.data_ptr() == input.data_ptr() else torch.empty_like(z)
    each, above = None, 1.0
    if grad_output is not None:
        if grad_output.dim():
            each = _aligned(grad_output).detach().to(dtype).resolve_neg().contiguous().view(-1)
        else:
            above = grad_output.item()

    options = (loss.element_size(), ignore_index, label_smoothing, strength)
    apart, divisor = z.stride(0) * z.element_size(), None if reduction == "mean" else 1.0
    whole = _cpu.KernelCall(losses, g, z, t, y, w, each, stats, n, k, inner, apart, *options, divisor, above)
    if z.dtype == dtype:
        wrong = _in_threads(whole, threads)
    else:
        block, wrong = max(1, _LOGITS_WORTH_A_THREAD * threads // k), -1
        for part in (slice(i, i + block) for i in range(0, n, block)):
            z_part, stats_part = z[part].to(dtype).contiguous(), stats and [x[part] for x in stats]
            g_part = None if g is None else torch.empty_like(z_part)
            t_part, y_part, each_part = (None if x is None else x[part] for x in (t, y, each))
            given = (whole.losses(part.start), g_part, z_part, t_part, y_part, w, each_part, stats_part)
            job = _cpu.KernelCall(*given, len(z_part), k, 0, k * options[0], *options, whole.divisor, above)
            wrong = max(wrong, _in_threads(job, threads))
            if g is not None and g_part is not None:
                g[part] = g_part
    if wrong >= 0:
        _refuse_target(target, k, ignore_index)
    if g is not as_z and g is not None and as_z is not None and g.data_ptr() != outputs[1].data_ptr():
        as_z.copy_(g.view(as_z.shape))
    if reduction != "none":
        whole.reduce(loss)
    return outputs


def _is_aligned(x: Tensor) -> bool:
    """To its type, as C wants it; torch.frombuffer and from_numpy may give others."""
    return x.data_ptr() % x.element_size() == 0


def _aligned(x: Tensor) -> Tensor:
    return x if _is_aligned(x) else x.detach().clone()


def _rows(x: Tensor) -> Tensor:
    """(C,), (N, C) or (N, C, d1, ...) as (M, C) with contiguous rows, without a copy where possible."""
    x = _aligned(x)
    if x.dim() == 2 and not x.is_neg() and (x.is_contiguous() or (x.stride(1) == 1 and x.stride(0) >= x.shape[1])):
        return x
    x = x.detach().resolve_neg()
    x = x.movedim(1, -1) if x.dim() > 2 else x
    return x.reshape(-1, x.shape[-1]).contiguous()


def _integers(target: Tensor) -> Tensor:
    target = _aligned(target)
    plain = target.dtype == torch.int64 and target.dim() == 1 and target.is_contiguous()
    return target if plain else target.to(torch.int64).contiguous().view(-1)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
) -> Tensor:
    from . import gpu

    options = (ignore_index, reduction, label_smoothing, strength)
    return gpu.backward(grad_output, input, target, weight, rows, divisor, *options)


def _like_gradient(grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    from . import gpu

    return gpu.gradient_like(input)


# One operation to compilers and other modes that record what runs, and one more on a GPU.
_registered = torch.library.custom_op("lace_loss::by_kernel", _by_kernel, mutates_args=(), device_types=("cpu", "cuda"))
_registered.register_fake(
    lambda input, target, weight, _above, gradient, _ignored, reduction, label_smoothing, _s, statistics: _outputs(
        input, target, weight, gradient, reduction, label_smoothing, statistics
    )
)
_registered_backward = torch.library.custom_op("lace_loss::backward", _backward, mutates_args=(), device_types="cuda")
_registered_backward.register_fake(_like_gradient)


def _composite(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    strength: float,
) -> Tensor:
    axis, dtype = _class_axis(input), _working_dtype(input, target, weight)
    z, e, classes = input.to(dtype), label_smoothing, input.shape[axis]
    w = z.new_ones(classes) if weight is None else weight.to(dtype)
    every_w = w.reshape(_along(axis, z))
    if target.is_floating_point():
        losses = _loss_of_every_class(z, axis, strength, ((1 - e) * target.to(dtype) + e / classes) * every_w).sum(axis)
        divisor: Tensor | int = losses.numel()
    else:
        t, kept, wrong = _looked_up(target, classes, ignore_index)
        z = z.masked_fill(~kept.unsqueeze(axis), 0)
        w_t = F.embedding(t, w.unsqueeze(1)).squeeze(-1).masked_fill(~kept, 0)  # w[t], also under vmap
        f = _loss_of_log_odds(_log_odds(z, t, axis), strength)
        # The sample of a class that does not exist gets NaN as a factor, for its gradient to be NaN, too.
        losses = _weighted(((1 - e) * w_t).masked_fill(wrong, torch.nan), f)
        if e:
            losses = losses + _loss_of_every_class(z, axis, strength, e / classes * every_w).sum(axis)
        losses = losses.masked_fill(~kept, 0)
        divisor = w_t.sum()
    if reduction == "none":
        return losses
    return losses.sum() / divisor if reduction == "mean" else losses.sum()


def _statistics(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    axis, z = _class_axis(input), input.to(_working_dtype(input, target, None))
    classes = z.shape[axis]
    t, kept, wrong = _looked_up(target, classes, ignore_index)
    u = _log_odds(z, t, axis).masked_fill(wrong, torch.nan)
    t = t.unsqueeze(axis)
    z_t, j = z.gather(axis, t), torch.arange(classes, device=z.device).reshape(_along(axis, z))
    ahead = (j != t) & ~((z < z_t) | ((z == z_t) & (j > t)))  # NaN counts as larger
    e = (-u.abs()).exp()
    q = torch.where(u < 0, 1, e) / (1 + e)  # a sigmoid is 0 where q is subnormal
    n, rank = _loss_of_log_odds(u, 0.0), ahead.sum(axis).masked_fill(wrong, classes)
    return n.masked_fill(~kept, 0), q.masked_fill(~kept, 0), rank.masked_fill(~kept, classes)


def _looked_up(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class indices that are safe to look up, which samples count, and which of those name no class."""
    t = target.long()
    kept = t != ignore_index
    wrong = kept & ((t < 0) | (t >= classes))
    return t.masked_fill(~kept | wrong, 0), kept, wrong


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
    sum = 1 + e
    lost = (sum - 1 - e).detach()  # exactly what the rounding of the sum added
    # log(1 + e) by exp and log alone, which every backend has right: ONNX takes log1p literally, Inductor's vectorised
    # atanh is 0 for small arguments.
    n = torch.where(v < 0, 0, v) + (sum.log() - lost / sum)
    r = torch.where(v < 0, e, 1) / sum
    return torch.where(u > 1000, u, (1 - strength + strength * r) * n)


def _along(axis: int, z: Tensor) -> list[int]:
    """The shape that broadcasts one value a class over z."""
    return [-1 if i == axis else 1 for i in range(z.dim())]


def _class_axis(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0
