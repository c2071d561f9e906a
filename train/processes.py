"""Several processes, where torchrun started them, act as one: what they tell each other, and who speaks for them."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from .config import TrainError

Found = TypeVar("Found")


def is_another_process() -> bool:
    """Whether torchrun started this process beside the first one, which has the files and speaks to the user."""
    return dist.is_initialized() and dist.get_rank() > 0


def from_all(value: Found) -> list[Found]:
    """The value of every process, the first one's first."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def from_first(find: Callable[[], Found]) -> Found:
    """What the first process finds or raises, in all of them, whose folders may be others."""
    found: Found | TrainError | OSError | None = None
    if not is_another_process():
        try:
            found = find()
        except (TrainError, OSError) as error:
            found = error
    found = from_all(found)[0]
    if isinstance(found, Exception):
        raise found
    return cast("Found", found)


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU (its driver's and libraries' are no OutOfMemoryError) or a CPU."""
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def too_late(seconds: float) -> bool:
    """Whether `seconds` is above 0 in any process."""
    late = torch.tensor(seconds > 0, dtype=torch.int)
    if dist.is_initialized():
        dist.all_reduce(late)
    return bool(late)
