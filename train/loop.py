"""Runs: train, test, and keep a checkpoint and the record.

Everything random is a function of seed and epoch and the learning rate one of the epoch, so the weights, the
optimizer's momentum and the log of the epochs before are all that a run needs to go on.
"""

import copy
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from lace_loss import ext
from lace_loss.ext.torch import lace_loss

from .config import Config, TrainError
from .data import Data, crop, draws, flip, normalised
from .lock import owned
from .model import ResNet18
from .probabilities import qualities
from .processes import from_first, is_another_process, is_out_of_memory, too_late
from .schema import FIGURES, TESTED, Record
from .store import (
    describe,
    load_checkpoint,
    previous,
    read_record,
    refuse_misfit,
    refuse_other,
    save_checkpoint,
    tensors,
    write_logits,
    write_record,
)

SAVING_SHARE = 0.02  # of the time, at most, goes into checkpoints


def network(width: int, data: Data) -> ResNet18:
    model = ResNet18(width, data.classes, data.images.shape[1]).to(data.images.device)
    # 1.3 to 1.4 times the images/s on CPU at width 16. With fewer channels than its blocks have (8 with AVX2, 16 with
    # AVX-512) oneDNN corrupts the heap in the backward of a strided 1x1 convolution: uxlfoundation/oneDNN#6035.
    return model.to(memory_format=torch.channels_last) if width >= 16 else model


class Replica:
    """A model in training. What a step reads and writes stays where it is, so that a CUDA graph can replay the step.

    Under torchrun every process holds a replica and takes its share of each batch.
    """

    def __init__(self, config: Config, data: Data) -> None:
        device, n = data.images.device, len(data.images)
        self.config, self.data = config, data
        torch.manual_seed(config.seed)
        self.model = network(config.width, data)
        self.forward: nn.Module = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.lr, config.momentum, weight_decay=config.weight_decay, fused=True
        )
        # Zeros, the same as none at the first step: a graph of a step that has none would forget them at every replay.
        self.momentum = [torch.zeros_like(p) for p in self.model.parameters()]
        for p, buffer in zip(self.model.parameters(), self.momentum, strict=True):
            self.optimizer.state[p]["momentum_buffer"] = buffer
        self.order, self.offsets, self.flips = (values.to(device) for values in draws(config.seed, 0, n, config.pad))
        self.batches = torch.split(torch.arange(n, device=device), config.batch)
        self.losses, self.grad_norms = torch.zeros(2, len(self.batches), device=device)
        self.ranks = torch.zeros(n, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def state(self) -> Record:
        return {"model": self.model.state_dict(), "momentum": self.momentum}

    def restore(self, state: Record) -> None:
        saved = tensors(state)
        for name, tensor in tensors(self.state()).items():
            tensor.copy_(saved[name])

    def begin(self, epoch: int) -> float:
        """Order and augmentation of this epoch; returns its first learning rate."""
        config, self.epoch = self.config, epoch
        drawn = draws(config.seed, epoch, len(self.order), config.pad)
        for buffer, values in zip((self.order, self.offsets, self.flips), drawn, strict=True):
            buffer.copy_(values)
        self.ranks.zero_()
        self.model.train()
        if self.graph:
            self.places.copy_(self.batches[0])
            self.stream.wait_stream(torch.cuda.current_stream())
        return config.learning_rate(epoch, 0, len(self.batches))

    def advance(self, i: int) -> None:
        """Step i of the epoch; those of a graph follow each other."""
        lr = self.config.learning_rate(self.epoch, i, len(self.batches))
        if self.graph:
            with torch.cuda.stream(self.stream):
                self.lr.fill_(lr)
                self.graph.replay()
        else:
            self.lr.fill_(lr)
            self.step(self.batches[i])

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the epoch: the losses and the gradient's norms of the steps, the ranks of the images; waits for them."""
        if self.graph:
            torch.cuda.current_stream().wait_stream(self.stream)
        if dist.is_initialized():
            dist.all_reduce(self.losses)
            self.losses /= dist.get_world_size()
            dist.all_reduce(self.ranks)
        return self.losses.cpu().double(), self.grad_norms.cpu().double(), self.ranks.cpu()

    def capture(self) -> None:
        """Make a graph of the step, on a stream of its own, so that replicas run side by side."""
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.places = self.batches[0].clone()
        before = copy.deepcopy(self.state())
        self.begin(0)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # libraries choose and allocate outside of the graph
            for _ in range(3):
                self.step(self.places)
        torch.cuda.current_stream().wait_stream(self.stream)
        self.restore(before)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step(self.places)
            self.places += self.config.batch
        self.graph = graph

    def step(self, places: Tensor) -> None:
        """Train on the images at these places of the epoch's order; nothing is read back from the device."""
        config, data = self.config, self.data
        step, count = places[:1] // config.batch, float(len(places))
        if dist.is_initialized():  # DistributedDataParallel averages the gradients of the processes
            count /= dist.get_world_size()
            places = places.tensor_split(dist.get_world_size())[dist.get_rank()]
        index = self.order[places]
        labels = data.labels[index]
        images = crop(normalised(data.images[index], data.mean), self.offsets[places], config.pad)
        if config.flip:
            images = flip(images, self.flips[places])
        logits = logits_of(self.forward, images, config.precision)
        loss, found = lace_loss(logits, labels, strength=config.strength, normalizer=count, statistics=True)
        if config.loss == "focal":
            ce = F.cross_entropy(logits, labels, reduction="none")
            loss = ((1 - torch.exp(-ce)) * ce).sum() / count
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses[step] = loss.detach()
        self.grad_norms[step] = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.ranks[places] = found["rank"]


class Run:
    """One configuration's training and its files, which only the first of several processes writes.

    The files are this process's own until the run is finished, or else until `locks` are closed.

    Raises TrainError where another process works on the run, files in `out` belong to another run, no checkpoint is
    whole, or the loss, a gradient or a weight is not finite.
    """

    def __init__(
        self, config: Config, data: Data, out: Path, made: Record, bar: "tqdm[NoReturn]", locks: ExitStack
    ) -> None:
        strength = "" if config.loss != "lace" or config.strength == 1 else f"{config.strength:g}"
        self.name = f"{config.data}_{config.loss}{strength}_seed{config.seed}_w{config.width}"
        self.config, self.data, self.bar = config, data, bar
        self.record_path, self.checkpoint_path = out / f"{self.name}.jsonl", out / f"{self.name}.checkpoint"
        self.header, self.log = describe(config, data, made), list[Record]()
        self.finished = False
        self.lock = locks.enter_context(ExitStack())  # closed by itself where the run ends before the command does
        n = len(data.images)
        if n % config.batch == 1:
            raise TrainError(f"batch normalisation needs two images: {n} in batches of {config.batch} leave one over")
        if from_first(self.find_record):
            self.finished = True
            self.lock.close()
            self.say("already finished")
            bar.total = (bar.total or 0) - config.epochs * n

    def find_record(self) -> bool:
        """Whether there is a finished one."""
        self.lock.enter_context(owned(self.record_path))
        if not self.record_path.exists():
            return False
        record = read_record(self.record_path)
        refuse_other(self.record_path, record, self.header)
        return "final" in record

    def find_checkpoint(self) -> Record | None:
        state = load_checkpoint(self.checkpoint_path, torch.device("cpu"))
        if state:
            refuse_other(self.checkpoint_path, state["header"], self.header)
            refuse_misfit(self.checkpoint_path, state, self.replica.state())
        return state

    def load(self) -> None:
        """The model, from the last checkpoint if there is one."""
        self.replica = Replica(self.config, self.data)
        self.saved = -1
        if state := from_first(self.find_checkpoint):
            by = {key: self.header[key] for key in ("versions", "commit")}
            self.header, self.log = state["header"], state["log"]
            if any(self.header.get(key) != by[key] for key in by):
                change = {"after_epoch": len(self.log), **by}
                self.header = self.header | {"resumed": [*self.header.get("resumed", []), change]}
            self.replica.restore(state)
            self.saved = len(self.log)
            self.say(f"resumed after epoch {self.saved}")
            self.bar.total = (self.bar.total or 0) - self.saved * len(self.data.images)
        if not is_another_process():
            write_record(self.record_path, self.header, self.log)
        if len(self.log) >= self.config.epochs:  # killed between its last checkpoint and the record's last line
            self.finish()

    def begin(self) -> None:
        self.bar.set_description(f"{self.name} epoch {len(self.log) + 1}/{self.config.epochs}")
        self.lr = self.replica.begin(len(self.log))

    def end(self, losses: Tensor, norms: Tensor, ranks: Tensor, seconds: float) -> None:
        """Log the epoch, which took so many seconds and gave these figures of steps and images; test if it is due."""
        config, epoch, n, start = self.config, len(self.log), len(self.data.images), time.perf_counter()
        for what, values in (("loss", losses), ("gradient's norm", norms)):
            if len(bad := (~values.isfinite()).nonzero()):
                raise TrainError(
                    f"{self.name}: the {what} is {values[bad[0]].item()} in epoch {epoch + 1},"
                    f" step {bad[0].item() + 1} of {len(values)}; the last checkpoint is kept"
                )
        weights = (*self.replica.model.state_dict().values(), *self.replica.momentum)
        if not all(bool(tensor.isfinite().all()) for tensor in weights):
            raise TrainError(
                f"{self.name}: not all weights are finite after epoch {epoch + 1}; the last checkpoint is kept"
            )
        sizes = losses.new_tensor([len(places) for places in self.replica.batches])
        row = {
            "epoch": epoch,
            "lr": self.lr,
            "train_loss": (losses @ sizes).item() / n,
            "train_top1_error": 100 * (ranks >= 1).sum().item() / n,
            "grad_norm": norms.mean().item(),
        }
        last = epoch + 1 == config.epochs
        tested: Record = {}
        if last or (epoch + 1) % config.test_every == 0:
            tested = figures(self.logits(self.data.test_images), self.data.test_labels)
            row |= {key: tested[key] for key in TESTED}
        row |= {"seconds": seconds + time.perf_counter() - start, "images_per_second": n / seconds}
        self.log.append(row)
        if last:
            self.save()
            self.finish()
        errors = f", test error {row['top1_error']:.2f} % top-1, {row['top5_error']:.2f} % top-5" if tested else ""
        self.say(
            f"epoch {epoch + 1}/{config.epochs}: train loss {row['train_loss']:.4g}{errors}, {n / seconds:.0f} images/s"
        )

    def say(self, text: str) -> None:
        if not is_another_process():
            self.bar.write(f"{self.name}: {text}", file=sys.stderr)

    def logits(self, images: Tensor) -> Tensor:
        return evaluation_logits(self.replica.model, images, self.data.mean, self.config.precision)

    def save(self) -> None:
        if is_another_process() or self.saved == len(self.log):
            return
        state = {"header": self.header, "log": self.log, "mean": self.data.mean, **self.replica.state()}
        save_checkpoint(self.checkpoint_path, state)
        write_record(self.record_path, self.header, self.log)
        self.saved = len(self.log)

    def finish(self) -> None:
        """The record's last line: the last epoch's figures, and those of every set; keeps the test's logits."""
        self.finished = True
        if is_another_process():
            return
        data, sets = self.data, dict[str, Record]()
        for name, images, labels in (
            ("test", data.test_images, data.test_labels),
            ("train", data.images, data.labels),
            ("unused", data.unused_images, data.unused_labels),
        ):
            if not len(images):
                continue
            logits, classes = self.logits(images), labels.cpu().numpy()
            sets[name] = figures(logits, labels)
            sets[name] |= qualities(logits.numpy(), classes, self.config.strength, scaled=name == "test")
            if name == "test":
                write_logits(self.record_path, logits.numpy(), classes)
        seconds = sum(row["seconds"] for row in self.log)
        final = {"final": True, **{key: self.log[-1][key] for key in FIGURES}, "sets": sets, "seconds": seconds}
        write_record(self.record_path, self.header, self.log, final)
        previous(self.checkpoint_path).unlink(missing_ok=True)


def train(runs: list[Run], graph: bool, replicas: int, max_seconds: float) -> None:
    """Train what is not finished, `replicas` at a time; no epoch is begun that is likely to end after `max_seconds`.

    Raises TrainError after the others are done where a run's loss was not finite.
    """
    deadline, longest, failures = time.perf_counter() + max_seconds, 0.0, list[str]()
    waiting = [run for run in runs if not run.finished]
    while waiting:
        wave, waiting, ready = waiting[:replicas], waiting[replicas:], 0
        size = len(wave)
        if longest and too_late(time.perf_counter() + longest - deadline):
            wave[0].say(f"not begun within --max-seconds {max_seconds:g}: the same command goes on")
            break
        try:
            for run in wave:
                run.load()
                if graph and not run.finished:
                    run.replica.capture()
                ready += 1
            wave = unfinished(wave)
            saved_at, saving = time.perf_counter(), 0.0
            while wave:
                start = time.perf_counter()
                if too_late(start + longest - deadline):
                    for run in wave:
                        run.save()
                        run.say(f"stopped by --max-seconds {max_seconds:g}: the same command goes on")
                    waiting = []
                    break
                for run in wave:
                    run.begin()
                for i in range(len(wave[0].replica.batches)):
                    for run in wave:
                        run.replica.advance(i)
                        run.bar.update(len(run.replica.batches[i]))
                ended = [run.replica.end() for run in wave]
                seconds = time.perf_counter() - start
                for run, found in zip(wave, ended, strict=True):
                    try:
                        run.end(*found, seconds)
                    except TrainError as error:
                        failures.append(str(error))
                        run.finished = True
                wave = unfinished(wave)
                now = time.perf_counter()
                longest = max(longest, now - start)
                if now - saved_at >= saving / SAVING_SHARE:
                    for run in wave:
                        run.save()
                    saved_at = time.perf_counter()
                    saving = saved_at - now
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = min(ready, size - 1)
            fit = (
                f"--replicas {fits} may fit" if fits else "not even one replica fits: use a smaller --width or --batch"
            )
            raise TrainError(f"out of memory with {size} replicas, {fit}; checkpoints are kept: {error}") from error
    if failures:
        raise TrainError("; ".join(failures))


def unfinished(wave: list[Run]) -> list[Run]:
    """Those that go on; the others let go of their models, graphs, memory and files."""
    for run in wave:
        if run.finished:
            del run.replica
            run.lock.close()
    return [run for run in wave if not run.finished]


def logits_of(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Of normalised images."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits: Tensor = model(images)
    return logits


@torch.inference_mode()
def evaluation_logits(model: nn.Module, images: Tensor, mean: Tensor, precision: str) -> Tensor:
    """The model's logits of images as they are, without augmentation, on the CPU."""
    model.eval()
    return torch.cat([logits_of(model, normalised(part, mean), precision) for part in torch.split(images, 1000)]).cpu()


def figures(logits: Tensor, labels: Tensor) -> Record:
    """Errors in percent, mean negative log-likelihood and calibration of the softmax."""
    try:
        found = ext.evaluate(logits.numpy(), labels.cpu().numpy(), strength=0.0)
    except ValueError as error:
        raise TrainError(f"in a test {error}; the last checkpoint is kept") from error
    return {
        "top1_error": 100 * (1 - found.accuracy[1]),
        "top5_error": 100 * (1 - found.accuracy[5]),
        "nll": found.cross_entropy,
        "calibration_error": 100 * found.calibration_error,
        **found.bins,
    }
