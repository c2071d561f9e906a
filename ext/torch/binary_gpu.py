"""LACE of labels on a GPU: Triton kernels, label by label, and how `binary.py` launches them.

Both passes read the labels once; the backward pass forms the gradient anew. With e = exp(-|z|), the class with the
larger logit has q = 1 / (1 + e), 1 - q = e q and -log q = log1p(e). The other one has 1 - q = 1 / (1 + e) and
-log q = |z| + log1p(e). What is small as e is held 2^64 times as large. Everything is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import launch
from .gpu_math import exp_of_row, loss_and_slope, weighted

_BLOCK = 1024  # labels of a program


@triton.jit
def _places(span, parts, row, count, BLOCK: tl.constexpr, LONG: tl.constexpr):
    """Of this program's labels: where they are, where in their row, and which exist. It has `span` labels, whole rows,
    or of a LONG row, which has `parts` programs, up to BLOCK.
    """
    i, first = tl.arange(0, BLOCK), tl.program_id(0) // parts
    offset = (tl.program_id(0) - first * parts).to(tl.int64) * BLOCK + i
    place = first.to(tl.int64) * span + offset
    return place, offset if LONG else i - i // row * row, (offset < span) & (place < count)


@triton.jit
def _labels(input, target, weight, pos_weight, above, place, j, exists, strength, rest):
    """Of the labels at `place`: loss, and the derivative with respect to their logits times `above`."""
    z = tl.load(input + place, mask=exists, other=0).to(tl.float32)
    y = tl.load(target + place, mask=exists, other=0).to(tl.float32)
    present, absent = y, 1.0 - y
    if pos_weight is not None:
        present *= tl.load(pos_weight + j, mask=exists, other=0)
    if weight is not None:
        w = tl.load(weight + j, mask=exists, other=0)
        present *= w
        absent *= w
    size = tl.where(z > 0, z, -z)
    high, low = exp_of_row(-size, 0.0)
    e = high + low  # NaN of NaN
    part = e * 2.0**-64
    # One division, which is good to 2 ulp, serves 1 / (1 + e) and the logarithm by y = e / (2 + e) <= 1/3.
    inverse = 1.0 / ((1.0 + part) * (2.0 + part))
    large, y = (2.0 + part) * inverse, part * ((1.0 + part) * inverse)
    square = y * y
    p = tl.fma(square, 0.23283684, 0.2169502)
    p = tl.fma(square, p, 0.28593047)
    p = tl.fma(square, p, 0.39999694)
    p = tl.fma(square, p, 0.6666667)
    log = tl.fma(y * square, p, 2.0 * y)
    small = e * large
    n, q = size + log, small * 2.0**-64
    # Of both classes the loss and K (1 - q); of a small e the logarithm is e, too, and may be subnormal.
    _, k_top = loss_and_slope(q, large, log, strength, rest)
    top = (rest + strength * q) * tl.where(part < 2.0**-30, e, log * 2.0**64)
    other, k_other = loss_and_slope(large, q, n, strength, rest)
    up = z > 0
    a_top, a_other = tl.where(up, present, absent), tl.where(up, absent, present)
    loss = (top * 2.0**-32) * a_top * 2.0**-32 + weighted(a_other, other)
    slope = (a_other * above) * (k_other * large) - (k_top * small * 2.0**-32) * (a_top * above) * 2.0**-32
    return tl.where(exists, loss, 0.0), tl.where(up, slope, -slope)


@triton.jit
def _binary_forward(
    input, target, weight, pos_weight, loss,
    span, parts, row, count, strength, rest, BLOCK: tl.constexpr, LONG: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    place, j, exists = _places(span, parts, row, count, BLOCK, LONG)
    value, _ = _labels(input, target, weight, pos_weight, 1.0, place, j, exists, strength, rest)
    if SUMMED:
        tl.store(loss + tl.program_id(0), tl.sum(value))
    else:
        tl.store(loss + place, value, mask=exists)


@triton.jit
def _binary_backward(
    gradient, grad_output, input, target, weight, pos_weight, divisor,
    span, parts, row, count, strength, rest, BLOCK: tl.constexpr, LONG: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    place, j, exists = _places(span, parts, row, count, BLOCK, LONG)
    if EACH:
        g = tl.load(grad_output + place, mask=exists, other=0).to(tl.float32)
    else:
        g = tl.div_rn(tl.load(grad_output).to(tl.float32), divisor)
    _, slope = _labels(input, target, weight, pos_weight, g, place, j, exists, strength, rest)
    tl.store(gradient + place, slope.to(gradient.dtype.element_ty), mask=exists)


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    row: int,
    reduction: str,
    strength: float,
) -> Tensor:
    """The loss in float32: a mean or sum from the sums of all programs."""
    count, summed = input.numel(), reduction != "none"
    programs, span, parts, long = _shared_out(count, row)
    loss = input.new_empty(programs if summed else input.shape, dtype=torch.float32)
    if count:
        launch(
            _binary_forward, programs, 4, input, *(_flat(input), _flat(target), weight, pos_weight, loss),
            *(span, parts, row, count, strength, 1 - strength, _BLOCK, long, summed),
        )  # fmt: skip
    if not summed:
        return loss
    total = loss.sum()
    return total / count if reduction == "mean" else total


def backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    row: int,
    reduction: str,
    strength: float,
) -> Tensor:
    """The gradient in the input's type, times `grad_output`."""
    count, divisor = input.numel(), float(input.numel()) if reduction == "mean" else 1.0
    programs, span, parts, long = _shared_out(count, row)
    gradient = input.new_empty(input.shape)
    if count:
        launch(
            _binary_backward, programs, 4, input,
            *(gradient, _flat(grad_output), _flat(input), _flat(target), weight, pos_weight, divisor),
            *(span, parts, row, count, strength, 1 - strength, _BLOCK, long, reduction == "none"),
        )  # fmt: skip
    return gradient


def _shared_out(count: int, row: int) -> tuple[int, int, int, bool]:
    """Programs, and what `_places` wants to know."""
    if row > _BLOCK:
        parts = triton.cdiv(row, _BLOCK)
        return count // row * parts, row, parts, True
    span = _BLOCK // row * row if row else 1
    return triton.cdiv(count, span), span, 1, False


def _flat(x: Tensor) -> Tensor:
    return x.detach().resolve_neg().contiguous()
