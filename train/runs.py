"""A run's files, and what it says: resumed, kept, finished. Only the first of several processes writes and speaks."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from . import store
from .config import Config, TrainError
from .data import Data
from .lock import owned
from .processes import any_past_deadline, is_first_process, on_first_process
from .schema import Record

SAVING_SHARE = 0.02  # of the time, at most, goes into checkpoints


class Deadline:
    """When the last epoch must have ended, by the longest one so far."""

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds, self.end, self.longest = max_seconds, time.perf_counter() + max_seconds, 0.0

    def is_near(self) -> bool:
        """Whether the next epoch is likely to end too late in any process."""
        return any_past_deadline(time.perf_counter() + self.longest - self.end)


class Run:
    """One configuration's run: its record, its log and its checkpoint.

    The files are this process's own until `lock` is closed, at the end of the run or of the command's `locks`.

    Raises TrainError where another process works on the run, files in `out` belong to another run, no checkpoint is
    whole, or the loss, a gradient or a weight is not finite.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        out: Path,
        invocation: Record,
        bar: "tqdm[NoReturn]",
        locks: ExitStack,
        deadline: Deadline,
        verbose: bool = False,
    ) -> None:
        strength = "" if config.loss != "lace" or config.strength == 1 else f"{config.strength:g}"
        self.name = f"{config.data}_{config.loss}{strength}_seed{config.seed}_w{config.width}"
        self.config, self.data, self.bar, self.deadline, self.verbose = config, data, bar, deadline, verbose
        self.record_path, self.checkpoint_path = out / f"{self.name}.jsonl", out / f"{self.name}.checkpoint"
        self.header, self.log = store.describe(config, data, invocation), list[Record]()
        self.replicas: int = invocation["replicas"]
        self.lock = locks.enter_context(ExitStack())
        n = len(data.images)
        if n % config.batch == 1:
            batches = f"{n} images in batches of {config.batch} leave a last batch of one"
            raise TrainError(f"{batches}; batch normalisation needs two images")
        self.finished = on_first_process(self.has_finished_record)
        if self.finished:
            self.lock.close()
            self.say("already finished")
            bar.total = (bar.total or 0) - config.epochs * n

    def has_finished_record(self) -> bool:
        self.lock.enter_context(owned(self.record_path))
        if not self.record_path.exists():
            return False
        record = store.read_record(self.record_path)
        store.require_same_run(self.record_path, record, self.header)
        return "final" in record

    def resume(self, state: Record) -> None:
        """Bring the run's tensors, `state`, to the last checkpoint, and begin or go on with its record."""
        self.state, self.saved, self.saved_at, self.saving = state, -1, time.perf_counter(), 0.0
        self.lock.callback(delattr, self, "state")  # the tensors' memory is the next run's
        if checkpoint := on_first_process(lambda: store.load_checkpoint(self.checkpoint_path, torch.device("cpu"))):
            store.require_same_run(self.checkpoint_path, checkpoint["header"], self.header)
            store.restore(self.checkpoint_path, checkpoint, state)
            now = {key: self.header[key] for key in ("versions", "commit")}
            self.header, self.log = checkpoint["header"], checkpoint["log"]
            self.saved = len(self.log)
            if any(self.header.get(key) != now[key] for key in now):
                change = {"after_epoch": self.saved, **now}
                self.header = self.header | {"resumed": [*self.header.get("resumed", []), change]}
            self.say(f"resumed after epoch {self.saved}")
            self.bar.total = (self.bar.total or 0) - self.saved * len(self.data.images)
        if is_first_process():
            store.write_record(self.record_path, self.header, self.log)

    def epochs_left(self) -> Iterator[int]:
        """Yield the epochs that follow, up to the last one that fits before the deadline; save what is left then."""
        while (epoch := len(self.log)) < self.config.epochs:
            start = time.perf_counter()
            if self.deadline.is_near():
                self.save()
                self.say(f"stopped by --max-seconds {self.deadline.max_seconds:g}: the same command goes on")
                return
            self.bar.set_description(f"{self.config.loss} seed {self.config.seed}, {epoch + 1}/{self.config.epochs}")
            yield epoch
            self.deadline.longest = max(self.deadline.longest, time.perf_counter() - start)

    def require_finite(self, epoch: int, losses: Tensor, norms: Tensor) -> None:
        """Raise TrainError, which names the step, where the epoch left a loss, norm or weight that is not finite."""
        place = f"epoch {epoch + 1}"
        for what, values in (("loss", losses), ("gradient's norm", norms)):
            if len(bad := (~values.isfinite()).nonzero()):
                text = f"the {what} is {values[bad[0]].item()} in {place}, step {bad[0].item() + 1} of {len(values)}"
                raise TrainError(f"{self.name}: {text}; the last checkpoint is kept")
        if not all(bool(tensor.isfinite().all()) for tensor in store.tensors(self.state).values()):
            raise TrainError(f"{self.name}: not all weights are finite after {place}; the last checkpoint is kept")

    def add(self, row: Record) -> None:
        """Log an epoch; save it if it is the last one or a checkpoint is due."""
        self.log.append(row)
        if self.verbose:
            errors = f", top-1 {row['top1_error']:.2f} %, top-5 {row['top5_error']:.2f} %" if "nll" in row else ""
            self.say(f"epoch {len(self.log)}/{self.config.epochs}: loss {row['train_loss']:.4g}{errors}")
        now = time.perf_counter()
        # The replicas beside this one save as often, each in this one's time.
        if len(self.log) == self.config.epochs or now - self.saved_at >= self.saving / SAVING_SHARE:
            self.save()
            self.saved_at = time.perf_counter()
            self.saving = (self.saved_at - now) * self.replicas

    def save(self) -> None:
        if is_first_process() and self.saved < len(self.log):
            checkpoint = {"header": self.header, "log": self.log, "mean": self.data.mean, **self.state}
            store.save_checkpoint(self.checkpoint_path, checkpoint)
            store.write_record(self.record_path, self.header, self.log)
            self.saved = len(self.log)

    def finish(self, last_line: Record, logits: Tensor) -> None:
        """Keep the logits of the test images and write the record's last line."""
        if is_first_process():
            store.write_logits(self.record_path, logits.numpy(), self.data.test_labels.cpu().numpy())
            store.write_record(self.record_path, self.header, self.log, last_line)
            store.previous_generation(self.checkpoint_path).unlink(missing_ok=True)
        errors = f"top-1 error {last_line['top1_error']:.2f} %, top-5 {last_line['top5_error']:.2f} %"
        self.say(f"{errors}, {last_line['seconds']:.0f} s")

    def say(self, text: str) -> None:
        if is_first_process():
            self.bar.write(f"{self.name}: {text}", file=sys.stderr)
