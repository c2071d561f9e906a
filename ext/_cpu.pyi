from typing import Any

from numpy.typing import NDArray

def rows(
    loss: NDArray[Any],
    logits: NDArray[Any],
    gradient: NDArray[Any] | None,
    target: NDArray[Any] | None,
    probability: NDArray[Any] | None,
    scale: NDArray[Any] | None,
    weight: NDArray[Any] | None,
    ignore_index: int,
    label_smoothing: float,
    strength: float,
    statistics: tuple[NDArray[Any], ...] | None,
) -> int: ...
