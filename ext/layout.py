"""Where the rows of logits lie in memory: one rule for NumPy arrays, tensors and GPUs."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["row_stride"]


def row_stride(shape: Sequence[int], strides: Sequence[int], unit: int) -> int | None:
    """How far apart the rows of (C,), (N, C) or (N, C, d1, ...) values start; None where only a copy has such rows.

    `unit` is the stride of neighbours: 1 where strides count values, the size of a value where they count bytes. The
    values of a row lie side by side, and rows do not overlap. Rows of images are all equally far apart.
    """
    axis = 1 if len(shape) > 1 else 0
    classes = shape[axis]
    if strides[axis] != unit and classes > 1:
        return None
    row = classes * unit
    if len(shape) > 2:
        expected = row
        for i in (*range(len(shape) - 1, 1, -1), 0):
            if strides[i] != expected and shape[i] > 1:
                return None
            expected *= shape[i]
    elif axis and shape[0] > 1:
        apart = strides[0]
        return None if apart % unit or -row < apart < row else apart
    return row
