"""Training on a CPU: images a second of `lace_loss.train` over those of the loop that a user of PyTorch would write.

    python tests/benchmarks/training.py FOLDER [--width 16] [--threads 2] [--rounds 31]

FOLDER is CIFAR-100 as an image folder. The plain loop: a DataLoader over images in memory as torchvision's CIFAR100 has
them, RandomCrop, RandomHorizontalFlip, ToTensor and Normalize on PIL images, the same ResNet-18 and the loss as an
expression, SGD; float32, channels first. Ours: whole steps of a run, which also note the gradient's norm and every
image's rank, in float32 and, where the processor has it, in bfloat16.

All take turns in one process, two steps at a time, in an order of their own each round. Printed are the medians over
the rounds of the ratio within a round, and their quartiles: times themselves mean little on a shared machine. Ends with
status 1 where the last one, in bfloat16 if the processor has it, is below the bound.
"""

import argparse
import itertools
import platform
import random
import statistics
import sys
import time

import torch
import torchvision
from PIL import Image
from torch.backends.cpu import get_cpu_capability
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lace_loss.train.config import Config
from lace_loss.train.data import load
from lace_loss.train.experiment import Training
from lace_loss.train.model import ResNet18

BOUND, BATCH, STEPS = 1.9, 100, 2


class InMemory(Dataset):
    """As torchvision's CIFAR100: an array (N, height, width, 3), a PIL image and a transform a sample."""

    def __init__(self, data):
        self.pixels, self.labels = data.images.permute(0, 2, 3, 1).contiguous().numpy(), data.labels.tolist()
        mean, std = data.images.float().div(255).mean((0, 2, 3)), data.images.float().div(255).std((0, 2, 3))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(self.pixels.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean.tolist(), std.tolist()),
            ]
        )

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def plain(data, width):
    """A generator that makes one step each time, as a tutorial has it."""
    loader = DataLoader(InMemory(data), BATCH, shuffle=True, drop_last=True)
    torch.manual_seed(0)
    model = ResNet18(width, data.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    total, wrong = 0.0, 0
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            logits = model(images)
            ce = F.cross_entropy(logits, labels, reduction="none")
            loss = ((1 - torch.exp(-ce)) * ce).mean()
            loss.backward()
            optimizer.step()
            total += loss.item()
            wrong += (logits.argmax(1) != labels).sum().item()
            yield


def ours(data, width, precision):
    training = Training(Config("cifar100", width=width, precision=precision), data)
    for epoch in itertools.count():
        training.begin(epoch)
        for i in range(len(training.batches)):
            training.step(i)
            yield


def seconds(candidate):
    """Seconds of a step."""
    start = time.perf_counter()
    for _ in range(STEPS):
        next(candidate)
    return (time.perf_counter() - start) / STEPS


def main(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    data = load(args.folder, "", torch.device("cpu"))
    precisions = ["float32", *["bfloat16"] * torch.cpu._is_avx512_bf16_supported()]
    candidates = {"plain": plain(data, args.width)} | {p: ours(data, args.width, p) for p in precisions}
    for candidate in candidates.values():
        seconds(candidate)  # warm
    rounds = []
    for _ in range(args.rounds):
        order = random.sample(sorted(candidates), len(candidates))
        rounds.append({name: seconds(candidates[name]) for name in order})
    machine = f"{platform.machine()} {get_cpu_capability()}"
    print(f"{machine}, {args.threads} threads, width {args.width}, batches of {BATCH}, {args.rounds} rounds")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    for precision in precisions:
        low, middle, high = statistics.quantiles([r["plain"] / r[precision] for r in rounds], n=4)
        print(f"{precision}: {middle:.2f} times the plain loop's images a second ({low:.2f} to {high:.2f})")
    print(f"the bound: {BOUND} in {precision}")
    return int(middle < BOUND)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
