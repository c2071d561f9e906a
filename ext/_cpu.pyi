from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

class Tensor(Protocol):
    def data_ptr(self) -> int: ...

Address = int | NDArray[Any] | Tensor

def builds() -> list[str]: ...
def use(name: str) -> None: ...
def in_large_pages(array: Address, size: int) -> None: ...

class KernelCall:
    n: int
    k: int
    divisor: float
    def __init__(
        self,
        loss: Address | None,
        gradient: Address | None,
        logits: Address,
        target: Address | None,
        probability: Address | None,
        weight: Address | None,
        row_grad_outputs: Address | None,
        statistics: Sequence[Address | None] | None,
        n: int,
        k: int,
        plane_size: int,
        row_stride: int,
        size: int,
        ignore_index: int,
        label_smoothing: float,
        strength: float,
        divisor: float | None,
        grad_output: float,
    ) -> None: ...
    def losses(self, start: int) -> int: ...
    def run(self, start: int, stop: int) -> int: ...
    def reduce(self, out: Address) -> None: ...

class BinaryCall:
    n: int
    k: int
    def __init__(
        self,
        loss: Address | None,
        gradient: Address | None,
        logits: Address,
        target: Address | None,
        label: Address | None,
        weight: Address | None,
        pos_weight: Address | None,
        grad_outputs: Address | None,
        count: int,
        row: int,
        size: int,
        strength: float,
        divisor: float,
        grad_output: float,
    ) -> None: ...
    def run(self, start: int, stop: int) -> int: ...
    def reduce(self, out: Address) -> None: ...

class PosteriorCall:
    n: int
    k: int
    def __init__(
        self,
        posterior: Address,
        logits: Address,
        weight: Address | None,
        n: int,
        k: int,
        plane_size: int,
        row_stride: int,
        size: int,
        label_smoothing: float,
        strength: float,
    ) -> None: ...
    def run(self, start: int, stop: int) -> int: ...
