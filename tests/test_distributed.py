"""Two processes with DistributedDataParallel and `normalizer` take the step of one process with the whole batch."""

import subprocess
import sys

import torch
import torch.distributed as dist

from lace_loss.ext.torch import LACELoss

# Rank 0 has one sample that counts, rank 1 has three: the mean of the means would weigh the one three times as much.
TARGET = torch.tensor([0, -100, -100, -100, 2, 1, -100, 2])
INPUT = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def model():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 3)


def step(path):
    """What each process of torchrun does; rank 0 writes the gradients and the sum of the losses."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    criterion, parallel = LACELoss(), torch.nn.parallel.DistributedDataParallel(model())
    input, target = INPUT.chunk(world)[rank], TARGET.chunk(world)[rank]
    count = (target != criterion.ignore_index).sum()
    dist.all_reduce(count)
    loss = criterion(parallel(input), target, normalizer=count / world)  # as DDP averages the gradients
    loss.backward()
    shared = loss.detach().clone()
    dist.all_reduce(shared)
    if rank == 0:
        torch.save([shared / world, *(p.grad for p in parallel.parameters())], path)
    dist.destroy_process_group()


def test_uneven_ignored_samples_over_two_processes_give_the_gradient_of_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, __file__, tmp_path / "step.pt"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone = model()
    loss = LACELoss()(alone(INPUT), TARGET)
    loss.backward()
    for got, wanted in zip(
        torch.load(tmp_path / "step.pt"), [loss, *(p.grad for p in alone.parameters())], strict=True
    ):
        torch.testing.assert_close(got, wanted.detach())


if __name__ == "__main__":
    step(sys.argv[1])
