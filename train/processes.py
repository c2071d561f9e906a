"""Several processes, where torchrun started them, act as one: what they tell each other, and who speaks for them."""

import os
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from .config import TrainError

Value = TypeVar("Value")


def is_first_process() -> bool:
    """Whether this process has the files and speaks to the user; torchrun may have started others beside it."""
    return not dist.is_initialized() or dist.get_rank() == 0


def join_processes(kind: str) -> None:
    """Meet the other processes, each on a GPU of its own where the kind of device is cuda."""
    if kind == "cuda":
        rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank >= gpus:
            raise TrainError(f"process {rank} of this machine has no GPU: --nproc-per-node is at most {gpus} here")
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")


def in_turn(compute: Callable[[], Value], first_alone: bool) -> Value:
    """Compute in every process; if `first_alone`, after the first one of the machine, which may have to download."""
    rank = os.environ["LOCAL_RANK"] if first_alone and dist.is_initialized() else None
    if rank not in (None, "0"):
        dist.barrier()
    value = compute()
    if rank == "0":
        dist.barrier()
    return value


def gather_objects(value: Value) -> list[Value]:
    """Value of every process, the first one's first."""
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
