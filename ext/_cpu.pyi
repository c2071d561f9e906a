from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

Address = int | NDArray[Any]

def builds() -> list[str]: ...
def use(name: str) -> None: ...

class Job:
    keep: list[Any]
    n: int
    k: int
    def __init__(
        self,
        loss: Address,
        gradient: Address | None,
        logits: Address,
        target: Address | None,
        probability: Address | None,
        weight: Address | None,
        statistics: Sequence[Address] | None,
        n: int,
        k: int,
        inner: int,
        size: int,
        ignore_index: int,
        label_smoothing: float,
        strength: float,
    ) -> None: ...
    def count(self) -> float: ...
    def scale_by(self, above: float, divisor: float, each: Address | None) -> None: ...
    def run(self, start: int, stop: int) -> int: ...
    def mean(self, out: Address, divisor: float) -> None: ...
