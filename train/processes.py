"""Several processes, where torchrun started them, act as one: what they tell each other, and who speaks for them."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from .config import TrainError

Value = TypeVar("Value")


def is_first_process() -> bool:
    """Whether this process has the files and speaks to the user; torchrun may have started others beside it."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather_objects(value: Value) -> list[Value]:
    """The value of every process, the first one's first."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def on_first_process(compute: Callable[[], Value]) -> Value:
    """Return or raise in every process what the first one computes or raises; their folders may be others."""
    result: Value | TrainError | OSError | None = None
    if is_first_process():
        try:
            result = compute()
        except (TrainError, OSError) as error:
            result = error
    result = gather_objects(result)[0]
    if isinstance(result, Exception):
        raise result
    return cast("Value", result)


def any_past_deadline(seconds: float) -> bool:
    """Whether `seconds`, the time past the deadline, is above 0 in any process."""
    late = torch.tensor(seconds > 0, dtype=torch.int)
    if dist.is_initialized():
        dist.all_reduce(late)
    return bool(late)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU (its driver's and libraries' errors are no OutOfMemoryError) or the CPU has no memory left."""
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
