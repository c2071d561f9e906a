"""One run: train, test, and write a checkpoint and the record after every epoch.

Everything random is a function of seed and epoch and the learning rate one of the epoch, so the weights, the
optimizer's momentum and the log of the epochs before are all that a run needs to go on.
"""

import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lace_loss.ext.torch import LACELoss

from .config import Config, TrainError
from .data import Data, crop, draws, flip, normalised
from .model import ResNet18
from .store import (
    FIGURES,
    Record,
    describe,
    load_checkpoint,
    previous,
    read_record,
    refuse_other,
    save_checkpoint,
    write_record,
)


def run(config: Config, data: Data, out: Path, command: str, bar: "tqdm[NoReturn]") -> Path:
    """Train one model, from the last checkpoint if there is one, and return the path of its record.

    Raises TrainError where files in `out` belong to another run, no checkpoint is whole, or the loss is not finite.
    """
    name = f"{config.data}_{config.loss}_seed{config.seed}_w{config.width}"
    record_path, checkpoint_path = out / f"{name}.jsonl", out / f"{name}.checkpoint"
    header, log = describe(config, data, command), list[Record]()
    n = len(data.images)
    bar.set_description(name)
    if record_path.exists():
        record = read_record(record_path)
        refuse_other(record_path, record, header)
        if "final" in record:
            bar.write(f"{name}: already finished", file=sys.stderr)
            bar.total = (bar.total or 0) - config.epochs * n
            return record_path
    if n % config.batch == 1:
        raise TrainError(f"batch normalisation needs two images: {n} in batches of {config.batch} leave one over")

    device = data.images.device
    torch.manual_seed(config.seed)
    # channels_last: 1.3 to 1.4 times the images/s on CPU at width 16.
    model = ResNet18(config.width, data.classes, data.images.shape[1]).to(device).to(memory_format=torch.channels_last)
    loss_of = nn.CrossEntropyLoss() if config.loss == "ce" else LACELoss(strength=config.strength)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    if state := load_checkpoint(checkpoint_path, device):
        refuse_other(checkpoint_path, state["header"], header)
        header, log = state["header"], state["log"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        bar.write(f"{name}: resumed after epoch {len(log)}", file=sys.stderr)
        bar.total = (bar.total or 0) - len(log) * n
    write_record(record_path, header, log)

    for epoch in range(len(log), config.epochs):
        start = time.perf_counter()
        lr = config.lr * config.lr_drop ** (epoch // config.lr_step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        bar.set_description(f"{name} epoch {epoch + 1}/{config.epochs}")
        losses, ranks = train_epoch(model, loss_of, optimizer, config, data, epoch, bar)
        sizes = torch.full_like(losses, config.batch)
        sizes[-1] = n - config.batch * (len(losses) - 1)
        figures = {"train_loss": (losses @ sizes).item() / n, "train_top1_error": percent(ranks >= 1)}
        train_seconds = time.perf_counter() - start
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise TrainError(
                f"{name}: the loss is {losses[bad[0]].item()} in epoch {epoch + 1}, step {bad[0].item() + 1} of"
                f" {len(losses)}; the epochs before it are kept"
            )
        figures |= evaluate(model, data)
        seconds = time.perf_counter() - start
        log.append({"epoch": epoch, "lr": lr, **figures, "seconds": seconds, "images_per_second": n / train_seconds})
        state = {"header": header, "log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint_path, state)
        write_record(record_path, header, log)
        bar.write(
            f"{name} epoch {epoch + 1}/{config.epochs}: train loss {figures['train_loss']:.4g}, test error"
            f" {figures['top1_error']:.2f} % top-1, {figures['top5_error']:.2f} % top-5,"
            f" {n / train_seconds:.0f} images/s",
            file=sys.stderr,
        )
    final = {"final": True, **{key: log[-1][key] for key in FIGURES}, "seconds": sum(row["seconds"] for row in log)}
    write_record(record_path, header, log, final)
    previous(checkpoint_path).unlink(missing_ok=True)
    return record_path


def train_epoch(
    model: nn.Module,
    loss_of: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    data: Data,
    epoch: int,
    bar: "tqdm[NoReturn]",
) -> tuple[Tensor, Tensor]:
    """Loss of every step (float64) and rank of every image; nothing is read back from the device before the end."""
    losses, ranks = [], []
    model.train()
    drawn = [values.to(data.images.device) for values in draws(config.seed, epoch, len(data.images), config.pad)]
    for index, offsets, flips in zip(*(torch.split(values, config.batch) for values in drawn), strict=True):
        images = crop(normalised(data.images[index], data.mean), offsets, config.pad)
        if config.flip:
            images = flip(images, flips)
        labels = data.labels[index]
        logits = model(images)
        loss = loss_of(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        ranks.append(rank(logits.detach(), labels))
        bar.update(len(index))
    return torch.stack(losses).double(), torch.cat(ranks)


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    """Test errors in percent and mean negative log-likelihood; images as they are, 1,000 at a time."""
    model.eval()
    ranks, nll = [], []
    for images, labels in zip(torch.split(data.test_images, 1000), torch.split(data.test_labels, 1000), strict=True):
        logits = model(normalised(images, data.mean))
        ranks.append(rank(logits, labels))
        nll.append(F.cross_entropy(logits, labels, reduction="none"))
    every = torch.cat(ranks)
    mean_nll = torch.cat(nll).double().mean().item()
    if not np.isfinite(mean_nll):
        raise TrainError(f"the test negative log-likelihood is {mean_nll}; the epochs before are kept")
    return {"top1_error": percent(every >= 1), "top5_error": percent(every >= 5), "test_nll": mean_nll}


def rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of classes ahead of the true one, (N,); of equal logits the lower class is ahead."""
    true = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > true) | ((logits == true) & lower)).sum(1)


def percent(wrong: Tensor) -> float:
    return 100 * wrong.sum().item() / len(wrong)
