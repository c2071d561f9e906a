"""One run by several processes, where torchrun started them: each trains on its share of every batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import Config
from .data import Data
from .experiment import Training


class SumOfProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward  # every process's loss depends on the sum


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the shares of all processes as if they were one batch.

    torch's own SyncBatchNorm does not run on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32, along = x.float(), (1, -1, 1, 1)
        count = torch.full((), x32.numel() // x32.shape[1], dtype=x32.dtype, device=x32.device)
        dist.all_reduce(count)
        mean = SumOfProcesses.apply(x32.sum((0, 2, 3))) / count
        centred = x32 - mean.view(along)
        variance = SumOfProcesses.apply((centred * centred).sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(along) + self.bias.view(along)).to(x.dtype)


class SharedTraining(Training):
    """Training of which this process does its share."""

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = SharedBatchNorm  # the same parameters and sums under the same names
        self.forward = DistributedDataParallel(self.model)

    def share(self, positions: Tensor) -> tuple[Tensor, float]:
        processes, count = dist.get_world_size(), float(len(positions))
        # DistributedDataParallel averages the gradients of the processes.
        return positions.tensor_split(processes)[dist.get_rank()], count / processes

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        dist.all_reduce(self.losses)
        self.losses /= dist.get_world_size()
        dist.all_reduce(self.ranks)
        return super().end()
