"""LACE for PyTorch: a drop-in for `torch.nn.CrossEntropyLoss` and `torch.nn.functional.cross_entropy`.

`lace_loss` asks what is known of a call (`call.py`) and then has it computed: on a CPU by the C kernel (`cpu.py`), on a
GPU by Triton kernels (`gpu.py`), and where neither may serve by PyTorch operations (`composite.py`).
"""

from __future__ import annotations

from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "lace_loss.ext.torch needs PyTorch, which the extra torch installs: pip install 'lace-loss[torch]'"
    raise ModuleNotFoundError(message, name="torch") from error
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F
from torch.nn.modules.loss import _WeightedLoss
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import cpu, gpu
from .binary import BinaryLACELoss, binary_lace_loss
from .call import (
    Call,
    check_strength,
    check_target,
    describe,
    is_being_traced,
    is_ordinary,
    kinds_of,
    require_memory,
)
from .composite import composite
from .composite import statistics as composite_statistics
from .posterior import posterior

__all__ = ["BinaryLACELoss", "LACELoss", "binary_lace_loss", "check_target", "lace_loss", "posterior"]


@overload
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
    statistics: Literal[False] = False,
) -> Tensor: ...


@overload
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
    statistics: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
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
    statistics: bool,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Linearly Adaptive Cross Entropy between logits and target; arguments as `torch.nn.functional.cross_entropy`.

    Parameters
    ----------
    input : (C,), (N, C) or (N, C, d1, ...) logits, floating. float16 and bfloat16 are computed in float32.
    target : class indices of the shape without C (int8 to int64, uint8), or probabilities of the input's shape.
    weight : a factor for each class, (C,).
    size_average, reduce : deprecated, as in torch; they choose the reduction.
    ignore_index : the class index whose samples do not count.
    reduction : "mean", over the weights of the samples that count; "sum"; or "none", one loss a sample.
    label_smoothing : the part of the target, in [0, 1], that is spread evenly over all classes.
    strength : s in [0, 1]: 1 is LACE, 0 is cross entropy.
    normalizer : a number or 0-d tensor that takes the place of the mean's denominator: what all batches of a gradient
        accumulation, or all processes, count together.
    statistics : whether to return what is known of each sample, too; of class indices only.

    Returns
    -------
    The loss, a tensor in the input's dtype (float32 under autocast), 0-d or of the target's shape for "none". With
    `statistics` a tuple of it and {"cross_entropy": -log q_t in nats, "probability": q_t, "rank": classes ahead of t},
    tensors of the target's shape without derivatives. Rank < k is top-k accuracy; of equal logits the lower index is
    ahead. An ignored sample has 0, 0 and C.

    Raises
    ------
    What `cross_entropy` raises for the same arguments; IndexError for a class that does not exist where Python may read
    it (else its sample's loss and gradient are NaN: on a GPU, under `torch.func`, in exported and traced graphs, and
    where a composite form is compiled; see `check_target`); ValueError for a strength outside [0, 1], a normalizer
    without a mean or of a shape, and statistics of probabilities.

    Examples
    --------
        >>> import torch
        >>> from lace_loss.ext.torch import lace_loss
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> loss = lace_loss(logits, torch.tensor([0, 0]))
        >>> loss.backward()
        >>> print(f"{loss:.4f}", logits.grad.shape)
        0.9443 torch.Size([2, 2])
        >>> loss, statistics = lace_loss(logits, torch.tensor([0, 0]), statistics=True)
        >>> print(statistics["rank"])
        tensor([0, 1])
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            lace_loss,  # type: ignore[arg-type]
            (input, target, weight),
            *(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing),  # type: ignore[arg-type]
            strength=strength,
            normalizer=normalizer,
            statistics=statistics,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    ignore_index = _checked(ignore_index, reduction, label_smoothing, strength)
    if reduction not in ("mean", "sum", "none"):
        reduction = ("none", "mean", "sum")[_reduction.get_enum(reduction)]
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(f"normalizer takes the place of the mean's denominator, got reduction {reduction!r}")
        if isinstance(normalizer, (Tensor, np.ndarray)) and normalizer.ndim:
            raise ValueError(f"normalizer must be a number or 0-d, got shape {tuple(normalizer.shape)}")
        reduction = "sum"
    call = describe(input, target, weight, ignore_index)
    if call is None:
        by_torch = F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
        if input.numel() or statistics:
            kinds = kinds_of(input=input, target=target, weight=weight)
            raise RuntimeError(f"these do not go together: {kinds}, ignore_index {ignore_index}")
        return by_torch  # no logits, C = 0 among them: nothing for the strength to change
    if call.ordinary and not torch.compiler.is_compiling():
        require_memory(input, target, weight)
    if statistics and call.probabilities:
        raise ValueError("statistics are of class indices, and the target holds probabilities")
    if input.dim() == target.dim() == 1 and not call.probabilities:
        target = target[0]  # torch takes the class of a lone sample in this form, too
    options = (ignore_index, reduction, float(label_smoothing), float(strength))

    device = _kernel(call, input, target)
    if device is not None:
        loss, *of_samples = device.loss_and_statistics(input, target, weight, options, statistics)
    else:
        readable = input.is_cpu and target.is_cpu and is_ordinary(input, target) and not is_being_traced()
        if readable and not call.probabilities:
            check_target(target, input.shape[call.axis], ignore_index)
        loss = composite(input, target, weight, *options)
        of_samples = composite_statistics(input.detach(), target, ignore_index) if statistics else ()
    if normalizer is not None:
        loss = loss / normalizer
    if loss.dtype != call.result_dtype:
        loss = loss.to(call.result_dtype)
    if not statistics:
        return loss
    return loss, dict(zip(("cross_entropy", "probability", "rank"), of_samples, strict=True))


class LACELoss(_WeightedLoss):
    """`lace_loss` as a module, in the place of `torch.nn.CrossEntropyLoss`.

    Parameters
    ----------
    weight : a factor for each class, (C,); a buffer, which moves and is saved with the module.
    size_average, reduce : deprecated, as in torch; they choose the reduction.
    ignore_index, reduction, label_smoothing, strength : see `lace_loss`.

    Raises
    ------
    What a call would raise for these options, already when constructed.

    Examples
    --------
        >>> import torch
        >>> from lace_loss.ext.torch import LACELoss
        >>> criterion = LACELoss(label_smoothing=0.1)
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> criterion(logits, torch.tensor([0, 1])).backward()
        >>> print(logits.grad.shape)
        torch.Size([2, 2])
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

    @overload
    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        normalizer: float | Tensor | None = None,
        statistics: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None, statistics: Literal[True]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    @overload
    def forward(
        self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None, statistics: bool
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...

    def forward(
        self, input: Tensor, target: Tensor, *, normalizer: float | Tensor | None = None, statistics: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss of `lace_loss` with this module's options; arguments, results and errors are those.

        Parameters
        ----------
        input : (C,), (N, C) or (N, C, d1, ...) logits.
        target : class indices of the shape without C, or probabilities of the input's shape.
        normalizer : takes the place of the mean's denominator.
        statistics : whether to return each sample's cross entropy, probability and rank, too.

        Examples
        --------
            >>> import torch
            >>> from lace_loss.ext.torch import LACELoss
            >>> loss, statistics = LACELoss()(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), statistics=True)
            >>> print(f"{loss:.4f} {statistics['probability'].item():.4f}")
            0.0151 0.8808
        """
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

    def posterior(self, input: Tensor) -> Tensor:
        """The class probabilities that logits of a model trained with this loss stand for: see `posterior`.

        Examples
        --------
            >>> import torch
            >>> from lace_loss.ext.torch import LACELoss
            >>> print(LACELoss(strength=0.0).posterior(torch.tensor([0.0, 2.0])))  # cross entropy's are the softmax
            tensor([0.1192, 0.8808])
        """
        return posterior(input, self.weight, self.label_smoothing, strength=self.strength)

    if TYPE_CHECKING:
        __call__ = forward  # what a module's call returns; torch says Any

    def extra_repr(self) -> str:
        return "" if self.strength == 1 else f"strength={self.strength}"


def _kernel(call: Call, input: Tensor, target: Tensor) -> Any:
    """The module whose kernel serves the call, or None."""
    if not call.kernel_reads:
        return None
    if gpu.on_gpu(input):
        return gpu if gpu.serves(input, target) else None
    return cpu if input.is_cpu else None


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
    if type(label_smoothing) is not float and not isinstance(label_smoothing, (Real, Tensor)):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0 <= label_smoothing <= 1:  # type: ignore[operator]
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    check_strength(strength)
    return ignore_index
