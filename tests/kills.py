"""Kill a small training run at random moments, again and again, and compare what it ends with, byte by byte.

    python tests/kills.py 1000     about 2 s a kill on one core; prints what was killed, and whether all bytes agree

The witness is a run that nobody kills: every figure of the record but the times, every weight and every momentum must
be the same. A run that was finished before its kill is left, and the next one begins in a folder of its own.
"""

import json
import multiprocessing
import multiprocessing.process
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from lace_loss.train.__main__ import main
from lace_loss.train.store import Record, load_checkpoint, read_record

RUN = ["--device", "cpu", "--threads", "1", "--loss", "lace", "--width", "1", "--epochs", "12"]
RECORD = "digits_lace_seed0_w1.jsonl"
TIMINGS = ("seconds", "images_per_second", "command")

# Its children have torch loaded and no threads.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["lace_loss.train.__main__"])


def child(arguments: list[str], limits: dict[int, int], said: Path) -> None:
    torch.set_num_threads(1)
    for what, limit in limits.items():
        resource.setrlimit(what, (limit, limit))
    with open(os.devnull, "w") as sys.stdout, open(said, "w") as sys.stderr:
        status = main(arguments)
    os._exit(status)


def start(
    arguments: list[str], limits: dict[int, int] | None = None, said: Path = Path(os.devnull)
) -> multiprocessing.process.BaseProcess:
    """Start the command in a process of its own, under these limits of the system, its errors written to `said`."""
    process = server.Process(target=child, args=(arguments, limits or {}, said))
    process.start()
    return process


def figures(record: Path) -> list[Record]:
    """Lines of a record, without the times."""
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def weights(record: Path) -> dict[str, bytes]:
    """Bytes of a record's weights and momentum, from the checkpoint beside it."""
    state = load_checkpoint(record.with_suffix(".checkpoint"), torch.device("cpu"))
    assert state is not None
    momentum = {str(k): v for k, v in enumerate(state["momentum"])}
    return {name: tensor.numpy().tobytes() for name, tensor in (state["model"] | momentum).items()}


def kill(folder: Path, kills: int) -> Counter[str]:
    """Kill runs in `folder` so many times, let each end, and count what state the kills found.

    Raises AssertionError where a run ends with other bytes than one that nobody killed.
    """
    whole = folder / "whole"
    start([*RUN, "--out", str(whole)]).join()  # and the server has loaded torch
    before = time.perf_counter()
    start([*RUN, "--out", str(folder / "clock")]).join()
    seconds = time.perf_counter() - before
    random, states, n = np.random.default_rng(0), Counter[str](), 0
    while states["kills"] < kills:
        record = folder / str(n) / RECORD
        process = start([*RUN, "--out", str(record.parent)])
        process.join(seconds * random.uniform(0, 1))
        if process.is_alive():
            process.kill()
            process.join()
            states["kills"] += 1
            epochs = len(read_record(record)["epochs_log"]) if record.exists() else None
            states["before the first record" if epochs is None else f"after epoch {epochs}"] += 1
            states["with a file half written"] += bool(list(record.parent.glob("*.tmp*")))
        n += record.exists() and "final" in read_record(record)
    for k in range(n + 1):
        record = folder / str(k) / RECORD
        start([*RUN, "--out", str(record.parent)]).join()
        assert figures(record) == figures(whole / RECORD), f"{record} has other figures"
        assert weights(record) == weights(whole / RECORD), f"{record} has other weights"
    states["runs, all with the bytes of one that was not killed"] = n + 1
    return states


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        for what, count in kill(Path(path), int(sys.argv[1])).items():
            print(f"{count:6} {what}")
