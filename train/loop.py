"""Runs: train, test, and keep a checkpoint and the record.

Everything random is a function of seed and epoch and the learning rate one of the epoch, so the weights, the
optimizer's momentum and the log of the epochs before are all that a run needs to go on.
"""

import math
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from lace_loss.ext.torch import lace_loss

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

SAVING_SHARE = 0.02  # of the time, at most, goes into checkpoints


class Replica:
    """A model in training. What a step reads and writes stays where it is, so that a CUDA graph can replay the step."""

    def __init__(self, config: Config, data: Data) -> None:
        device, n = data.images.device, len(data.images)
        self.config, self.data = config, data
        torch.manual_seed(config.seed)
        # channels_last: 1.3 to 1.4 times the images/s on CPU at width 16.
        model = ResNet18(config.width, data.classes, data.images.shape[1])
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.lr, config.momentum, weight_decay=config.weight_decay, fused=True
        )
        # Zeros, the same as none at the first step: a graph of a step that has none would forget them at every replay.
        self.momentum = [torch.zeros_like(p) for p in self.model.parameters()]
        for p, buffer in zip(self.model.parameters(), self.momentum, strict=True):
            self.optimizer.state[p]["momentum_buffer"] = buffer
        self.order, self.offsets, self.flips = (values.to(device) for values in draws(config.seed, 0, n, config.pad))
        steps = math.ceil(n / config.batch)
        self.losses, self.grad_norms = torch.zeros(steps, device=device), torch.zeros(steps, device=device)
        self.ranks = torch.zeros(n, dtype=torch.int64, device=device)

    def state(self) -> Record:
        return {"model": self.model.state_dict(), "momentum": self.momentum}

    def restore(self, state: Record) -> None:
        self.model.load_state_dict(state["model"])
        for buffer, saved in zip(self.momentum, state["momentum"], strict=True):
            buffer.copy_(saved)

    def begin(self, epoch: int) -> float:
        """Learning rate, order and augmentation of this epoch."""
        config = self.config
        lr = config.lr * config.lr_drop ** (epoch // config.lr_step)
        self.lr.fill_(lr)
        drawn = draws(config.seed, epoch, len(self.order), config.pad)
        for buffer, values in zip((self.order, self.offsets, self.flips), drawn, strict=True):
            buffer.copy_(values)
        return lr

    def step(self, places: Tensor) -> None:
        """Train on the images at these places of the epoch's order; nothing is read back from the device."""
        config, data = self.config, self.data
        index = self.order[places]
        labels = data.labels[index]
        images = crop(normalised(data.images[index], data.mean), self.offsets[places], config.pad)
        if config.flip:
            images = flip(images, self.flips[places])
        with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = self.model(images)
        loss, found = lace_loss(logits, labels, strength=config.strength, statistics=True)
        if config.loss == "focal":
            ce = F.cross_entropy(logits, labels, reduction="none")
            loss = ((1 - torch.exp(-ce)) * ce).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        step = places[:1] // config.batch
        self.losses[step] = loss.detach()
        self.grad_norms[step] = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.ranks[places] = found["rank"]


class Run:
    """One configuration's training and its files.

    Raises TrainError where files in `out` belong to another run, or no checkpoint is whole.
    """

    def __init__(self, config: Config, data: Data, out: Path, command: str, bar: "tqdm[NoReturn]") -> None:
        strength = "" if config.loss != "lace" or config.strength == 1 else f"{config.strength:g}"
        self.name = f"{config.data}_{config.loss}{strength}_seed{config.seed}_w{config.width}"
        self.config, self.data, self.bar = config, data, bar
        self.record_path, self.checkpoint_path = out / f"{self.name}.jsonl", out / f"{self.name}.checkpoint"
        self.header, self.log = describe(config, data, command), list[Record]()
        n = len(data.images)
        if self.record_path.exists():
            record = read_record(self.record_path)
            refuse_other(self.record_path, record, self.header)
            if "final" in record:
                self.log = record["epochs_log"]
                bar.write(f"{self.name}: already finished", file=sys.stderr)
                bar.total = (bar.total or 0) - config.epochs * n
        if n % config.batch == 1:
            raise TrainError(f"batch normalisation needs two images: {n} in batches of {config.batch} leave one over")
        self.finished = bool(self.log)

    def load(self) -> None:
        """The model, from the last checkpoint if there is one."""
        self.replica = Replica(self.config, self.data)
        if state := load_checkpoint(self.checkpoint_path, self.data.images.device):
            refuse_other(self.checkpoint_path, state["header"], self.header)
            self.header, self.log = state["header"], state["log"]
            self.replica.restore(state)
            self.bar.write(f"{self.name}: resumed after epoch {len(self.log)}", file=sys.stderr)
            self.bar.total = (self.bar.total or 0) - len(self.log) * len(self.data.images)
        write_record(self.record_path, self.header, self.log)
        self.saved_at, self.saving = time.perf_counter(), 0.0

    def epoch(self) -> None:
        """Train for an epoch, test if it is due, and save.

        Raises TrainError where the loss is not finite.
        """
        config, replica, epoch, n = self.config, self.replica, len(self.log), len(self.data.images)
        start = time.perf_counter()
        self.bar.set_description(f"{self.name} epoch {epoch + 1}/{config.epochs}")
        lr = replica.begin(epoch)
        replica.model.train()
        for places in torch.split(torch.arange(n, device=replica.order.device), config.batch):
            replica.step(places)
            self.bar.update(len(places))
        losses, norms = replica.losses.double(), replica.grad_norms.double()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            raise TrainError(
                f"{self.name}: the loss is {losses[bad[0]].item()} in epoch {epoch + 1}, step {bad[0].item() + 1} of"
                f" {len(losses)}; the last checkpoint is kept"
            )
        sizes = torch.full_like(losses, config.batch)
        sizes[-1] = n - config.batch * (len(losses) - 1)
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_loss": (losses @ sizes).item() / n,
            "train_top1_error": percent(replica.ranks >= 1),
            "grad_norm": norms.mean().item(),
        }
        train_seconds = time.perf_counter() - start
        last = epoch + 1 == config.epochs
        tested = last or (epoch + 1) % config.test_every == 0
        if tested:
            found = evaluate(replica.model, self.data.test_images, self.data.test_labels, self.data.mean)
            row |= {key: found[key] for key in FIGURES if key in found}
        seconds = time.perf_counter() - start
        self.log.append(row | {"seconds": seconds, "images_per_second": n / train_seconds})
        if last:
            self.finish(found)
        elif time.perf_counter() - self.saved_at >= self.saving / SAVING_SHARE:
            self.save()
        errors = f", test error {row['top1_error']:.2f} % top-1, {row['top5_error']:.2f} % top-5" if tested else ""
        self.bar.write(
            f"{self.name} epoch {epoch + 1}/{config.epochs}: train loss {row['train_loss']:.4g}{errors},"
            f" {n / train_seconds:.0f} images/s",
            file=sys.stderr,
        )

    def save(self) -> None:
        start = time.perf_counter()
        save_checkpoint(self.checkpoint_path, {"header": self.header, "log": self.log, **self.replica.state()})
        write_record(self.record_path, self.header, self.log)
        self.saved_at = time.perf_counter()
        self.saving = self.saved_at - start

    def finish(self, tested: Record) -> None:
        """The last checkpoint, and the record's last line: the last epoch's figures, and those of every set."""
        data, model = self.data, self.replica.model
        sets = {"test": tested, "train": evaluate(model, data.images, data.labels, data.mean)}
        if len(data.unused_images):
            sets["unused"] = evaluate(model, data.unused_images, data.unused_labels, data.mean)
        self.save()
        seconds = sum(row["seconds"] for row in self.log)
        final = {"final": True, **{key: self.log[-1][key] for key in FIGURES}, "sets": sets, "seconds": seconds}
        write_record(self.record_path, self.header, self.log, final)
        previous(self.checkpoint_path).unlink(missing_ok=True)
        self.finished = True


def train(runs: list[Run], max_seconds: float) -> None:
    """Train what is not finished; no epoch is begun that would probably end after `max_seconds`."""
    began, longest = time.perf_counter(), 0.0
    for run in runs:
        if run.finished:
            continue
        run.load()
        while not run.finished:
            start = time.perf_counter()
            if start - began + longest > max_seconds:
                run.save()
                run.bar.write(f"stopped by --max-seconds {max_seconds:g}: the same command goes on", file=sys.stderr)
                return
            run.epoch()
            longest = max(longest, time.perf_counter() - start)


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, mean: Tensor) -> Record:
    """Errors in percent, mean negative log-likelihood and calibration of the model on images as they are.

    Calibration: samples in 15 bins by the largest probability; `confidence` and `accuracy` are the bins' means, and the
    calibration error is their mean difference in absolute value over all samples, in percent.
    """
    model.eval()
    ranks, nll, confidence = [], [], []
    for batch, target in zip(torch.split(images, 1000), torch.split(labels, 1000), strict=True):
        logits = model(normalised(batch, mean))
        _, found = lace_loss(logits, target, reduction="none", statistics=True)
        ranks.append(found["rank"])
        nll.append(found["cross_entropy"])
        confidence.append(logits.softmax(1).amax(1))
    rank, sure = torch.cat(ranks).cpu().numpy(), torch.cat(confidence).double().cpu().numpy()
    bins = np.minimum((sure * 15).astype(int), 14)
    count = np.bincount(bins, minlength=15)
    sums = [np.bincount(bins, values, minlength=15) for values in (sure, (rank == 0).astype(float))]
    mean_nll = torch.cat(nll).double().mean().item()
    if not np.isfinite(mean_nll):
        raise TrainError(f"the negative log-likelihood of the test is {mean_nll}; the last checkpoint is kept")
    return {
        "top1_error": 100 * float(np.mean(rank >= 1)),
        "top5_error": 100 * float(np.mean(rank >= 5)),
        "nll": mean_nll,
        "calibration_error": 100 * float(np.abs(sums[0] - sums[1]).sum()) / len(rank),
        "count": count.tolist(),
        "confidence": (sums[0] / np.maximum(count, 1)).tolist(),
        "accuracy": (sums[1] / np.maximum(count, 1)).tolist(),
    }


def percent(wrong: Tensor) -> float:
    return 100 * wrong.sum().item() / len(wrong)
