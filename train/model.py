"""ResNet-18 for small images: a 3x3 stem without pooling, four stages of two blocks, widths w, 2w, 4w, 8w."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class SumOfProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    backward = forward  # every process's loss depends on the sum


class BatchNorm(nn.BatchNorm2d):
    """Over the batches of all processes, where there are several, as if they were one.

    torch's own SyncBatchNorm does not run on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
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


def conv(channels_in: int, channels: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation, which makes a bias useless."""
    norm = BatchNorm(channels)
    norm.num_batches_tracked = None  # only a momentum of None reads it; 20 kernels a step
    return nn.Sequential(nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, bias=False), norm)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, 1x1 where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = conv(channels_in, channels, 3, stride)
        self.second = conv(channels, channels, 3)
        same = stride == 1 and channels_in == channels
        self.shortcut = nn.Identity() if same else conv(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """(N, channels, H, W) images to (N, classes) logits; 11,220,132 parameters at width 64 with 100 classes.

    Under autocast the head stays in float32: logits in bfloat16 tie, and a rank among ties means little.
    """

    def __init__(self, width: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.stem = conv(channels, width, 3)
        blocks = []
        channels = width
        for stage in range(4):
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(Block(channels, width << stage, stride))
                channels = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        # A mean over the pixels, not adaptive pooling: the backward of that one is not deterministic on CUDA.
        features = self.blocks(F.relu(self.stem(x))).mean((2, 3), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.head(features)
        return logits
