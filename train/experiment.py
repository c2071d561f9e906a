"""The paper's experiment from top to bottom: learning rate, step, test, epochs, record.

This is all of it on one device, but for images (`data.py`) and network (`model.py`). A run's files are in `runs.py`,
steps as CUDA graphs and runs side by side in `replicas.py`, several processes that share a batch in `shared.py`.

Everything random is a function of seed and epoch, and the learning rate is one of the step. So the weights, the
momentum and the log of the epochs before are all that a run needs to go on.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lace_loss import ext
from lace_loss.ext.torch import lace_loss

from .config import Config, TrainError
from .data import Data, crop, draw, flip, normalised
from .model import logits_of, network
from .probabilities import qualities
from .runs import Run
from .schema import FIGURES, TESTED, Record


def learning_rate(config: Config, epoch: int, step: int, steps: int) -> float:
    """Learning rate of this step, of so many an epoch; epochs and steps count from 0."""
    if config.schedule == "steps":
        return config.lr * config.lr_drop ** (epoch // config.lr_step)
    done = (epoch + (step + 0.5) / steps) / config.epochs  # the middle of the step: no step has a rate of 0
    return 2 * config.lr * min(done / 0.15, (1 - done) / 0.85)


class Training:
    """A network in training, and what an epoch's steps note: losses, the gradient's norms, ranks of the true classes.

    What a step reads and writes stays where it is, so that a CUDA graph can replay the step.
    """

    def __init__(self, config: Config, data: Data) -> None:
        device, n = data.images.device, len(data.images)
        self.config, self.data = config, data
        torch.manual_seed(config.seed)
        self.model = network(config.width, data)
        self.forward: nn.Module = self.model
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.lr, config.momentum, weight_decay=config.weight_decay, fused=True
        )
        # Zeros, the same as none at the first step: a graph of a step that has none would forget them at every replay.
        self.momentum = [torch.zeros_like(p) for p in self.model.parameters()]
        for p, buffer in zip(self.model.parameters(), self.momentum, strict=True):
            self.optimizer.state[p]["momentum_buffer"] = buffer
        self.order, self.offsets, self.flips = (values.to(device) for values in draw(config.seed, 0, n, config.pad))
        self.batches = torch.split(torch.arange(n, device=device), config.batch)
        self.losses, self.grad_norms = torch.zeros(2, len(self.batches), device=device)
        self.ranks = torch.zeros(n, dtype=torch.int64, device=device)

    def state(self) -> Record:
        """Tensors that a checkpoint holds; these themselves, not copies."""
        return {"model": self.model.state_dict(), "momentum": self.momentum}

    def begin(self, epoch: int) -> None:
        """Draw the epoch's order, crops and flips."""
        self.epoch = epoch
        drawn = draw(self.config.seed, epoch, len(self.order), self.config.pad)
        for buffer, values in zip((self.order, self.offsets, self.flips), drawn, strict=True):
            buffer.copy_(values)
        self.ranks.zero_()
        self.model.train()

    def step(self, i: int) -> None:
        """Take step i of the epoch."""
        self.lr.fill_(learning_rate(self.config, self.epoch, i, len(self.batches)))
        self.update(self.batches[i])

    def share(self, positions: Tensor) -> tuple[Tensor, float]:
        """Part of a batch that is trained on here, and what its sum of losses is divided by."""
        return positions, float(len(positions))

    def update(self, positions: Tensor) -> None:
        """Train on the images at these positions of the epoch's order; nothing is read back from the device."""
        config, data, step = self.config, self.data, positions[:1] // self.config.batch
        positions, count = self.share(positions)
        indices = self.order[positions]
        labels = data.labels[indices]
        images = crop(normalised(data.images[indices], data.mean), self.offsets[positions], config.pad)
        if config.flip:
            images = flip(images, self.flips[positions])
        logits = logits_of(self.forward, images, config.precision)
        loss, statistics = lace_loss(logits, labels, strength=config.strength, normalizer=count, statistics=True)
        if config.loss == "focal":
            ce = nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = ((1 - torch.exp(-ce)) * ce).sum() / count
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses[step] = loss.detach()
        self.grad_norms[step] = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.ranks[positions] = statistics["rank"]

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and norms of the epoch by step and ranks by image, on the CPU; waits for the device."""
        return self.losses.cpu().double(), self.grad_norms.cpu().double(), self.ranks.cpu()


@torch.inference_mode()
def evaluation_logits(model: nn.Module, images: Tensor, mean: Tensor, precision: str) -> Tensor:
    """Logits of images as they are, without augmentation, on the CPU."""
    model.eval()
    return torch.cat([logits_of(model, normalised(part, mean), precision) for part in torch.split(images, 1000)]).cpu()


def figures(logits: Tensor, labels: Tensor) -> Record:
    """Errors in percent, mean negative log-likelihood and calibration of the softmax."""
    try:
        evaluation = ext.evaluate(logits.numpy(), labels.cpu().numpy(), strength=0.0)
    except ValueError as error:
        raise TrainError(f"in a test {error}; the last checkpoint is kept") from error
    return {
        "top1_error": 100 * (1 - evaluation.accuracy[1]),
        "top5_error": 100 * (1 - evaluation.accuracy[5]),
        "nll": evaluation.cross_entropy,
        "calibration_error": 100 * evaluation.calibration_error,
        **evaluation.bins,
    }


def train(run: Run, make: Callable[[Config, Data], Training] = Training) -> Iterator[None]:
    """Train a run from its last checkpoint to the last line of its record.

    Yields where other runs on the same GPU may go on: after each step, and before and after what waits for the device.
    A run by itself is `for _ in train(run): pass`.
    Raises TrainError where the loss, a gradient or a weight is not finite.
    """
    config, data, n = run.config, run.data, len(run.data.images)
    with run.lock:
        training = make(config, data)
        run.resume(training.state())
        yield
        for epoch in run.epochs_left():
            start = time.perf_counter()
            training.begin(epoch)
            for i, positions in enumerate(training.batches):
                training.step(i)
                run.bar.update(len(positions))
                yield
            losses, norms, ranks = training.end()
            seconds = time.perf_counter() - start
            yield
            start = time.perf_counter()
            run.require_finite(epoch, losses, norms)
            row = {
                "epoch": epoch,
                "lr": learning_rate(config, epoch, 0, len(losses)),
                "train_loss": (losses @ losses.new_tensor([len(batch) for batch in training.batches])).item() / n,
                "train_top1_error": 100 * (ranks >= 1).sum().item() / n,
                "grad_norm": norms.mean().item(),
            }
            if epoch + 1 == config.epochs or (epoch + 1) % config.test_every == 0:
                logits = evaluation_logits(training.model, data.test_images, data.mean, config.precision)
                row |= {key: value for key, value in figures(logits, data.test_labels).items() if key in TESTED}
            row |= {"seconds": seconds + time.perf_counter() - start, "images_per_second": n / seconds}
            run.add(row)
            yield
        if len(run.log) == config.epochs:
            run.finish(*last_line(training, run.log))


def last_line(training: Training, log: list[Record]) -> tuple[Record, Tensor]:
    """Figures of the last epoch and those of every set of images, and the logits of the test images."""
    data, by_set, logits = training.data, dict[str, Record](), dict[str, Tensor]()
    for name, (images, labels) in data.sets.items():
        logits[name] = evaluation_logits(training.model, images, data.mean, training.config.precision)
        arguments = logits[name].numpy(), labels.cpu().numpy(), training.config.strength
        by_set[name] = figures(logits[name], labels) | qualities(*arguments, scaled=name == "test")
    seconds = sum(row["seconds"] for row in log)
    final = {"final": True, **{key: log[-1][key] for key in FIGURES}, "sets": by_set, "seconds": seconds}
    return final, logits["test"]
