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

import glob
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.backends.cpu import get_cpu_capability as cpu_capability

from .config import Config, TrainError
from .data import Data
from .processes import is_out_of_memory
from .schema import IDENTITY, Kind, Record, parse_record, require


def is_dense(value: Any) -> bool:
    """Whether it is a tensor with an element for every place, which can be copied from."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


CHECKPOINT: dict[str, Kind] = {
    "header": ("a dict", lambda x: isinstance(x, dict)),
    "log": ("a list", lambda x: isinstance(x, list)),
    "mean": (
        "a float32 tensor of three dimensions",
        lambda x: is_dense(x) and x.dtype == torch.float32 and x.dim() == 3 and x.numel() > 0,
    ),
    "model": ("a dict of tensors", lambda x: isinstance(x, dict) and all(map(is_dense, x.values()))),
    "momentum": ("a list of tensors", lambda x: isinstance(x, list) and all(map(is_dense, x))),
}


def describe(config: Config, data: Data, invocation: Record) -> Record:
    """Header of a record; `invocation` is mode, replicas and command."""
    gpu = data.images.is_cuda
    amx = " AMX" if torch.cpu._is_amx_tile_supported() else ""  # which sums bfloat16 in another order
    device = torch.cuda.get_device_name() if gpu else f"{platform.machine()} {cpu_capability()}{amx}"
    processes = f"{dist.get_world_size()} processes, " if dist.is_initialized() else ""
    versions: Record = {name: version(name) for name in ("torch", "numpy", "lace-loss")}
    if gpu:
        cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        versions |= {"triton": version("triton"), "cuda": torch.version.cuda, "cudnn": cudnn}
    return asdict(config) | {
        "train_images": len(data.images),
        "test_images": len(data.test_images),
        "unused_images": len(data.unused_images),
        "classes": data.classes,
        "class_names": data.class_names,
        "data_sha256": data.sha256,
        "device": processes + device,
        "threads": None if gpu else torch.get_num_threads(),  # they change no bit there
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit(),
        **invocation,
    }


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


def difference(saved: Record, header: Record) -> str:
    """First setting that keeps them from being headers of one run, in words; empty where there is none."""
    others = (f"{key} = {saved[key]!r}, not {header[key]!r}" for key in IDENTITY if saved[key] != header[key])
    return next(others, "")


def require_same_run(path: Path, saved: Record, header: Record) -> None:
    if other := difference(saved, header):
        raise TrainError(f"{path} belongs to a run with {other}: choose another --out")


def write(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace the file, which becomes `keep`, by one that is on the disk already: a kill leaves one of them whole.

    Raises TrainError where that fails; the content before is then still there, as the file or as `keep`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # no other process writes to it
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise TrainError(f"{path} cannot be written, what was written before is kept: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(record_path: Path) -> None:
    """Remove what processes left that were killed in `write`; for the one process that works on the run."""
    for suffix in (".jsonl", ".checkpoint", ".logits.npz"):
        for file in record_path.parent.glob(glob.escape(record_path.stem + suffix) + ".*tmp"):
            file.unlink(missing_ok=True)


def record_text(*lines: Record) -> bytes:
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()


def write_record(path: Path, header: Record, log: list[Record], *final: Record) -> None:
    write(path, record_text(header, *log, *final))


def record_lines(path: Path) -> tuple[Record, list[Record], Record]:
    """Read header, the epochs' lines, and the final line, which is empty while the run is unfinished.

    Raises TrainError, which names the file and the line, for what is not a record.
    """
    if not path.is_file():  # a device or a pipe may have no end
        raise TrainError(f"{path} is not a file")
    return parse_record(path, path.read_bytes())


def read_record(path: Path) -> Record:
    """Header and final line merged, the epochs' lines under `epochs_log`; no `final` while the run is unfinished."""
    header, log, final = record_lines(path)
    return header | final | {"epochs_log": log}


def write_logits(record_path: Path, logits: np.ndarray, target: np.ndarray) -> None:
    """Keep the test images' logits and classes beside the record, for `python -m lace_loss.ext` and later questions."""
    buffer = io.BytesIO()
    np.savez(buffer, logits=logits, target=target)
    write(record_path.with_suffix(".logits.npz"), buffer.getvalue())


def previous_generation(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def save_checkpoint(path: Path, state: Record) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content, keep=previous_generation(path))


def load_checkpoint(path: Path, device: torch.device) -> Record | None:
    """Load the newest generation that is whole, or None where there was none yet.

    Raises TrainError where every generation is damaged, or one is whole but no checkpoint.
    """
    damaged: list[Path] = []
    for file in (path, previous_generation(path)):
        if not file.exists():
            continue
        digest, _, content = file.read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == digest:
            state = unpack_checkpoint(file, content, device)
            for bad in damaged:
                print(f"{bad} is damaged: going back to {file}", file=sys.stderr)
                bad.unlink()  # or the next save would put it in the place of the good one
            return state
        damaged.append(file)
    if damaged:
        raise TrainError(f"{' and '.join(map(str, damaged))} damaged (SHA-256 differs): remove to start this run again")
    return None


def unpack_checkpoint(path: Path, content: bytes, device: torch.device) -> Record:
    """Read what `save_checkpoint` was given. Raises TrainError for content of another meaning."""
    wrong = f"{path} is whole (SHA-256 is right), but not a checkpoint"
    try:
        state: Record = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # what it raises for content that torch did not save is written nowhere
        if is_out_of_memory(error):
            raise
        raise TrainError(f"{wrong} that this torch reads: {type(error).__name__}") from error
    if not isinstance(state, dict):
        raise TrainError(f"{wrong}: it holds no dict, but {type(state).__name__}")
    require(wrong, state, CHECKPOINT)
    try:
        text = record_text(state["header"], *state["log"])
    except (TypeError, ValueError, RecursionError) as error:
        raise TrainError(f"{wrong}: header and log are not those of a record: {error}") from error
    header, log, final = parse_record(f"{path}, header and log", text)
    if final:
        raise TrainError(f"{wrong}: its log has the last line of a record")
    return state | {"header": header, "log": log}


def tensors(state: Record) -> dict[str, Tensor]:
    """Tensors of the model and, where it is there, of the momentum, by name."""
    return state["model"] | {f"momentum of parameter {i}": t for i, t in enumerate(state.get("momentum", []))}


def restore(path: Path, saved: Record, ours: Record) -> None:
    """Copy a checkpoint's tensors into ours. Raises TrainError unless they have the names, shapes and types of ours."""
    source, target = tensors(saved), tensors(ours)
    for name in [*target, *source]:
        kinds = [f"{tuple(t[name].shape)} {t[name].dtype}" if name in t else "missing" for t in (source, target)]
        if kinds[0] != kinds[1]:
            raise TrainError(f"{path} does not fit: its {name} is {kinds[0]}, and this run's {kinds[1]}")
    for name, tensor in target.items():
        tensor.copy_(source[name])


def finished_checkpoint(record_path: Path, header: Record, log: list[Record], device: torch.device) -> Record:
    """Load the checkpoint of a finished run, which lies beside its record, whose header and epochs' lines these are.

    Raises TrainError where there is none, or one of another run or epoch.
    """
    path = record_path.with_suffix(".checkpoint")
    state = load_checkpoint(path, device)
    if state is None:
        raise TrainError(f"{record_path} has its weights in {path}, which is not there")
    other = difference(state["header"], header)
    if other or state["log"] != log:
        raise TrainError(f"{path} does not belong to the run recorded in {record_path}: {other or 'their logs differ'}")
    return state
