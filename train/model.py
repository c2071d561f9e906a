"""ResNet-18 for small images: a 3x3 stem without pooling, four stages of two blocks, widths w, 2w, 4w, 8w."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Data


def conv(channels_in: int, channels: int, size: int, stride: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation, which makes a bias useless."""
    norm = nn.BatchNorm2d(channels)
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


def network(width: int, data: Data) -> ResNet18:
    """A network with fresh weights for these images, on their device."""
    model = ResNet18(width, data.classes, data.images.shape[1]).to(data.images.device)
    # 1.3 to 1.4 times the images/s on CPU at width 16. With fewer channels than its blocks have (8 with AVX2, 16 with
    # AVX-512) oneDNN corrupts the heap in the backward of a strided 1x1 convolution: uxlfoundation/oneDNN#6035.
    return model.to(memory_format=torch.channels_last) if width >= 16 else model


def logits_of(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Logits of normalised images."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = model(images)
    return logits
