"""What a run leaves on disk: its record and its checkpoint, both written whole or not at all.

A record is a JSON Lines file: the header (settings, versions, data, device), a line an epoch, and once the run is
finished a last line with `"final": true`, the last epoch's figures, and under `sets` the figures of the test images,
of the training images (without augmentation) and of the unused ones: errors in percent, `nll`, the mean negative
log-likelihood in nats, and the calibration error of the softmax, then `probabilities.qualities`. The gradient's norm is
the mean over the steps. The training loss is the run's own on augmented
images, so that of one loss does not compare with that of another; `nll` does.

A checkpoint is the SHA-256 of what follows, in hexadecimal, a line feed, and a `torch.save`d dict: header, log (the
record's epochs), mean of the images, model, momentum. The generation before stays beside it until the run is finished.
"""

import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.backends.cpu import get_cpu_capability as cpu_capability

from .config import Config, TrainError
from .data import Data

Record = dict[str, Any]

TRAINED = ("train_loss", "train_top1_error", "grad_norm")  # of every epoch
TESTED = ("top1_error", "top5_error", "nll", "calibration_error")  # of those with a test
FIGURES = (*TRAINED, *TESTED)  # of a finished run
SIZES = ("train_images", "test_images", "unused_images", "classes")
# What must not change within a run. The commit may: one that edits the README must not strand a long run.
IDENTITY = (*(f.name for f in fields(Config)), "data_sha256", "device", "threads")


def describe(config: Config, data: Data, made: Record) -> Record:
    """The header of a record, with how the run is `made`: mode, replicas and command."""
    gpu = data.images.is_cuda
    amx = " AMX" if torch.cpu._is_amx_tile_supported() else ""  # which sums bfloat16 in another order
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()} {cpu_capability()}{amx}"
    processes = f"{dist.get_world_size()} processes, " if dist.is_initialized() else ""
    return asdict(config) | {
        "train_images": len(data.images),
        "test_images": len(data.test_images),
        "unused_images": len(data.unused_images),
        "classes": data.classes,
        "data_sha256": data.sha256,
        "device": processes + device,
        "threads": None if gpu else torch.get_num_threads(),  # they change no bit there
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "numpy", "lace-loss")}
        | (versions_of_cuda() if gpu else {}),
        "commit": commit(),
        **made,
    }


def versions_of_cuda() -> Record:
    cudnn: Any = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return {"triton": version("triton"), "cuda": torch.version.cuda, "cudnn": cudnn}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def commit() -> str | None:
    """Commit of this checkout, "-dirty" appended where files differ from it; None for an installed copy."""
    here = Path(__file__).resolve()  # an editable install links to the checkout
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed copy may lie inside another project's checkout: ask whether this file is tracked.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def refuse_other(path: Path, found: Record, header: Record) -> None:
    for key in IDENTITY:
        if found.get(key) != header[key]:
            raise TrainError(
                f"{path} is of a run with {key} = {found.get(key)!r}, this one has {header[key]!r}:"
                " choose another --out"
            )


def write(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace the file, which becomes `keep`, by one that is on the disk already: a kill leaves one of them whole.

    Raises TrainError, and leaves everything as it was, where there is no room.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TrainError(f"{path} cannot be written and is left as it was: {error}") from error
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)


def write_record(path: Path, header: Record, log: list[Record], final: Record | None = None) -> None:
    lines = [header, *log, final] if final else [header, *log]
    write(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def record_lines(path: Path) -> tuple[Record, list[Record], Record]:
    """Header, the epochs' lines, and the final line, which is empty while the run is unfinished.

    Raises TrainError, which names the file and the line, for what is not a record.
    """
    lines: list[Record] = []
    for number, text in enumerate(path.read_text(errors="replace").splitlines() or [""], 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise TrainError(f"{path}, line {number}: not JSON, perhaps cut short") from error
        final = isinstance(lines[-1], dict) and "final" in lines[-1]
        required = (*IDENTITY, *SIZES) if number == 1 else (*FIGURES, "sets") if final else TRAINED
        if not isinstance(lines[-1], dict) or (missing := [key for key in required if key not in lines[-1]]):
            lacks = f": it lacks {', '.join(missing)}" if isinstance(lines[-1], dict) else ""
            raise TrainError(f"{path}, line {number}: not a line of a record{lacks}")
    header, *log = lines
    return header, log, log.pop() if log and "final" in log[-1] else {}


def read_record(path: Path) -> Record:
    """Header and final line merged, the epochs' lines under `epochs_log`; no `final` while the run is unfinished."""
    header, log, final = record_lines(path)
    return header | final | {"epochs_log": log}


def write_logits(record_path: Path, logits: np.ndarray, target: np.ndarray) -> None:
    """Keep the test images' logits and classes beside the record, for `python -m lace_loss.ext` and later questions."""
    buffer = io.BytesIO()
    np.savez(buffer, logits=logits, target=target)
    write(record_path.with_suffix(".logits.npz"), buffer.getvalue())


def previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def save_checkpoint(path: Path, state: Record) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content, keep=previous(path))


def load_checkpoint(path: Path, device: torch.device) -> Record | None:
    """The newest generation that is whole, or None where there was none yet.

    Raises TrainError where every generation is damaged.
    """
    damaged: list[Path] = []
    for file in (path, previous(path)):
        if not file.exists():
            continue
        digest, _, content = file.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == digest:
            for bad in damaged:
                print(f"{bad} is damaged: going back to {file}", file=sys.stderr)
                bad.unlink()  # or the next save would put it in the place of the good one
            state: Record = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
            return state
        damaged.append(file)
    if damaged:
        raise TrainError(f"{' and '.join(map(str, damaged))} damaged (SHA-256 differs): remove to start this run again")
    return None


def finished_checkpoint(record_path: Path, log: list[Record], device: torch.device) -> Record:
    """The checkpoint of a finished run, which lies beside its record, whose epochs' lines are `log`.

    Raises TrainError where there is none, or one of another run or epoch.
    """
    path = record_path.with_suffix(".checkpoint")
    state = load_checkpoint(path, device)
    if state is None:
        raise TrainError(f"{record_path} has its weights in {path}, which is not there")
    if state["log"] != log:
        raise TrainError(f"{path} is not of the run that {record_path} records: its epochs went otherwise")
    return state
