"""Train with cross entropy and LACE, several seeds each; report on the records of such runs, or export their models.

Without options it trains on scikit-learn's handwritten digits, offline, in seconds; `--data cifar100` is the paper's
experiment. A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

import argparse
import math
import os
import re
import shlex
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

try:
    import torch
    import torch.distributed as dist
    from tqdm import tqdm

    from .attack import attack, sizes
    from .config import DIGITS, Config, TrainError
    from .data import load
    from .experiment import Training
    from .export import export
    from .processes import gather_objects, in_turn, is_first_process, is_out_of_memory, join_processes
    from .replicas import GraphTraining, train_all
    from .report import record_files, report, what_was_seen
    from .runs import Deadline, Run
    from .shared import SharedTraining
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"error: python -m lace_loss.train needs {error.name}: pip install 'lace-loss[train]'\n")
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise TrainError(message)


def seeds(text: str) -> list[int]:
    """Numbers meant by `0-4`, `0,2,5` or `3`, in order."""
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not numbers or len(numbers) + len(chosen) > 10_000 or set(numbers) & set(chosen):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of at most 10,000 different seeds such as 0-4, 0,2,5 or 3"
            )
        chosen += numbers
    return chosen


def parser() -> Parser:
    top = Parser(prog="python -m lace_loss.train", description=__doc__)
    top.add_argument("--data", default="digits", help="digits (default), cifar100, or a folder with train/ and test/")
    losses = ("ce", "lace", "focal", "both")
    top.add_argument("--loss", default="both", choices=losses, help="both is ce and lace; default both")
    top.add_argument("--seeds", type=seeds, default=[0], help="such as 0-4, 0,2,5 or 3; default 0")
    top.add_argument("--out", type=Path, default="runs", help="folder of records, checkpoints and curves; default runs")
    top.add_argument("--root", default="data", help="where cifar100 lies or is downloaded to; default data")
    top.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default cuda if there is one")
    top.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    top.add_argument(
        "--mode", choices=("graph", "eager"), help="whole steps as CUDA graphs; default where there is a GPU"
    )
    top.add_argument("--replicas", type=int, help="runs side by side on one GPU, in --mode graph; default 4 there")
    top.add_argument("--max-seconds", type=float, default=math.inf, help="end after the last epoch that fits")
    top.add_argument("--verbose", action="store_true", help="a line for every epoch")
    recipe = top.add_argument_group("recipe", "defaults are the paper's, in brackets those of --data digits")
    for f in fields(Config):
        if f.name not in ("data", "loss", "seed"):
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            digits = f" [{DIGITS[f.name]}]" if f.name in DIGITS else ""
            meaning = f"{f.metadata['help']}; {f.default}{digits}".replace("%", "%%")  # argparse formats it
            recipe.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, help=meaning, **kind)
    commands = top.add_subparsers(dest="command", metavar="report|export")
    onnx = commands.add_parser("export", help="a finished run's model as ONNX, beside its record")
    onnx.add_argument("record", type=Path)
    table = commands.add_parser("report", help="table and curves of records")
    table.add_argument("records", nargs="*", type=Path, default=[Path("runs")], help="files or folders; default runs")
    table.add_argument(
        "--attack",
        type=sizes,
        nargs="?",
        const="0.5,1,2",
        help="first test under FGSM and PGD-10 of these sizes, of 255, on --data before report; default %(const)s",
    )
    table.add_argument("--json", action="store_true", help="the same figures as JSON")
    return top


def machine(args: argparse.Namespace) -> tuple[torch.device, bool]:
    """Device, and whether steps run as graphs on it; joins the other processes where torchrun started them."""
    for option in ("threads", "replicas"):
        if getattr(args, option) is not None and not 1 <= getattr(args, option) <= 1024:
            raise TrainError(f"--{option} must be at least 1 and at most 1024, got {getattr(args, option)}")
    if not args.max_seconds >= 0:
        raise TrainError(f"--max-seconds must be at least 0, got {args.max_seconds}")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False  # float32 would be 10 bits of mantissa in convolutions
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    kind = "cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda"
    if args.device == "cuda" != kind:
        raise TrainError("--device cuda: torch sees no CUDA device")
    several = dist.is_torchelastic_launched()
    graph = args.mode == "graph" or (args.mode is None and kind == "cuda" and not several)
    if graph and kind == "cpu":
        raise TrainError("--mode graph needs a CUDA device, and torch sees none or --device is cpu")
    if graph and several:
        raise TrainError("--mode graph runs in one process, but torchrun started several")
    if several:
        join_processes(kind)
    return torch.device(kind), graph


def configurations(args: argparse.Namespace, kind: str) -> list[Config]:
    """Settings of every run that the flags ask for, on this kind of device."""
    names = {f.name for f in fields(Config)} - {"data", "loss"}
    options = {name: value for name, value in vars(args).items() if name in names}
    if "epochs" in options:
        # Quarters, as in the paper, starve a short run: 45.3 % in place of 39.8 % top-5 error (README).
        share = 0.45 if options["epochs"] < 100 else 0.25
        options.setdefault("lr_step", math.ceil(share * options["epochs"]))
    if kind == "cuda":
        options.setdefault("precision", "bfloat16")
    recipe = (DIGITS if args.data == "digits" else {}) | options
    losses = ("ce", "lace") if args.loss == "both" else (args.loss,)
    # The strength of LACE is no setting of the others, whose records serve beside LACE of every strength.
    fixed: dict[str, dict[str, Any]] = {"ce": {"strength": 0.0}, "lace": {}, "focal": {"strength": 1.0}}
    name = Path(args.data).resolve().name
    configs = [Config(name, loss, seed, **(recipe | fixed[loss])) for seed in args.seeds for loss in losses]
    configs[0].require_device(kind)
    return configs


def experiment(args: argparse.Namespace, command: str) -> list[Path]:
    """Run every configuration that the flags ask for, and return the paths of the records."""
    device, graph = machine(args)
    configs = configurations(args, device.type)
    config = configs[0]
    args.out.mkdir(parents=True, exist_ok=True)
    first_downloads = args.data == "cifar100"
    data = in_turn(lambda: load(args.data, args.root, device, config.shrink, config.subset), first_downloads)
    if len(set(gather_objects(data.sha256))) > 1:
        raise TrainError(f"--data {args.data} is not the same for all processes")
    if graph and len(data.images) % config.batch:
        uneven = f"--batch {config.batch} does not divide {len(data.images)} images"
        if args.mode == "graph":
            raise TrainError(f"--mode graph: {uneven}")
        print(f"{uneven}: --mode eager", file=sys.stderr)
        graph = False
    replicas = args.replicas or (4 if graph else 1)
    if replicas > 1 and not graph:
        raise TrainError(f"--replicas {replicas} needs --mode graph: eager steps do not run side by side")
    make = GraphTraining if graph else SharedTraining if dist.is_initialized() else Training
    invocation = {"mode": "graph" if graph else "eager", "replicas": replicas, "command": command}
    deadline, images = Deadline(args.max_seconds), len(configs) * config.epochs * len(data.images)
    hidden = None if is_first_process() else True  # None: where stderr is no terminal
    bar = tqdm(total=images, unit=" img", unit_scale=True, dynamic_ncols=True, disable=hidden)
    with bar, ExitStack() as locks:
        runs = [Run(c, data, args.out, invocation, bar, locks, deadline, args.verbose) for c in configs]
        train_all(runs, make, replicas, deadline)
    return [run.record_path for run in runs if run.record_path.exists()]


def main(arguments: list[str]) -> int:
    """Exit status: 0, 2 after an error that its message tells how to put right, 130 after Ctrl-C."""
    command = shlex.join(["python", "-m", "lace_loss.train", *arguments])
    try:
        args = parser().parse_args(arguments)
        if args.command == "export":
            print(export(args.record))
        elif args.command == "report":
            if args.attack:
                attack(record_files(args.records), args.attack, args.data, args.root, machine(args)[0])
            report(args.records, args.json)
        else:
            records = experiment(args, command)
            if is_first_process():
                (summary,) = report(records)  # the runs of a command share data and recipe
                print(f"\n{what_was_seen(summary)}")
    except (TrainError, OSError) as error:
        return print_error(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return print_error(f"out of memory: {error}")
    except KeyboardInterrupt:
        if is_first_process():
            print(f"stopped; the same command goes on from the last checkpoint: {command}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def print_error(why: object) -> int:
    # One write: torchrun's processes share the stream, and print writes each argument by itself.
    sys.stderr.write(f"error: {' '.join(str(why).split())}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
