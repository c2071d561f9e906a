"""Runs side by side on one GPU, and whole steps as CUDA graphs; elsewhere one run after the other."""

import copy
from collections.abc import Callable

import torch

from .config import Config, TrainError
from .data import Data
from .experiment import Training, learning_rate, train
from .processes import is_out_of_memory
from .runs import Deadline, Run
from .store import tensors


class GraphTraining(Training):
    """Training whose whole step is one CUDA graph, on a stream of its own, so that replicas run side by side."""

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__(config, data)
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.positions = self.batches[0].clone()
        before = copy.deepcopy(tensors(self.state()))
        super().begin(0)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # libraries choose and allocate outside of the graph
            for _ in range(3):
                self.update(self.positions)
        torch.cuda.current_stream().wait_stream(self.stream)
        for name, tensor in tensors(self.state()).items():
            tensor.copy_(before[name])
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.update(self.positions)
            self.positions += config.batch

    def begin(self, epoch: int) -> None:
        super().begin(epoch)
        self.positions.copy_(self.batches[0])
        self.stream.wait_stream(torch.cuda.current_stream())

    def step(self, i: int) -> None:
        """Take step i of the epoch; steps follow each other."""
        with torch.cuda.stream(self.stream):
            self.lr.fill_(learning_rate(self.config, self.epoch, i, len(self.batches)))
            self.graph.replay()

    def end(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.cuda.current_stream().wait_stream(self.stream)
        return super().end()


def train_all(runs: list[Run], make: Callable[[Config, Data], Training], replicas: int, deadline: Deadline) -> None:
    """Train what is not finished, `replicas` at a time; no epoch is begun that is likely to end after the deadline.

    Raises TrainError after the others are done where a run's loss was not finite.
    """
    waiting, failures = [run for run in runs if not run.finished], list[str]()
    for k in range(0, len(waiting), replicas):
        wave, ready = waiting[k : k + replicas], 0
        if k and deadline.is_near():
            wave[0].say(f"not begun within --max-seconds {deadline.max_seconds:g}: the same command goes on")
            break
        trained = [train(run, make) for run in wave]
        try:
            for run in trained:
                next(run)  # to where its network is loaded
                ready += 1
            while trained:
                for run in trained.copy():
                    try:
                        next(run)
                    except StopIteration:
                        trained.remove(run)
                    except TrainError as error:
                        failures.append(str(error))
                        trained.remove(run)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = min(ready, len(wave) - 1)
            fit = (
                f"--replicas {fits} may fit" if fits else "not even one replica fits: use a smaller --width or --batch"
            )
            text = f"out of memory with {len(wave)} replicas, {fit}; checkpoints are kept: {error}"
            raise TrainError(text) from error
    if failures:
        raise TrainError("; ".join(failures))
