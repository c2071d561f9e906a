"""Finished models against images changed on purpose, by FGSM (Goodfellow 2015) and PGD-10 (Madry 2018).

Every model is attacked through cross entropy, whatever it was trained with, so that all face the same attack. By our
kernel: the gradient of torch's is 0 in float32 where the model is sure, and would make a sure model look robust.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from lace_loss.ext.torch import lace_loss

from .config import TrainError
from .data import Data, load, normalised
from .experiment import evaluation_logits, figures
from .lock import owned
from .model import logits_of, network
from .store import finished_checkpoint, record_lines, restore, write_record

STEPS = 10  # of PGD, each a quarter of the size of the attack


def sizes(text: str) -> list[float]:
    """Largest changes of a pixel, of 255, meant by `0.5,1,2`."""
    try:
        largest = [float(part) for part in text.split(",")]
    except ValueError:
        largest = [math.nan]
    if not all(0 < size < math.inf for size in largest) or len(set(largest)) < len(largest):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different positive, finite sizes such as 0.5,1,2")
    return largest


def attack(files: list[Path], largest: list[float], data: str, root: str, device: torch.device) -> None:
    """Add the figures under both attacks of these sizes to the records of finished runs whose checkpoints are beside
    them: as `sets` with the name of the attack and its size.

    Raises TrainError where the data are not those of the run, its checkpoint is not beside it, or another process works
    on the run.
    """
    attacks = {
        f"{name} {str(size).removesuffix('.0')}/255": (size, steps)
        for name, steps in (("FGSM", 1), ("PGD-10", STEPS))
        for size in largest
    }
    loaded: dict[tuple[int, int], Data] = {}
    for file in files:
        _, _, final = record_lines(file)
        if not final or attacks.keys() <= final["sets"].keys():
            continue
        with owned(file):
            header, log, final = record_lines(file)
            settings = header["shrink"], header["subset"]
            images = loaded[settings] = loaded.get(settings) or load(data, root, device, *settings)
            if images.sha256 != header["data_sha256"]:
                sha256 = header["data_sha256"]
                raise TrainError(f"{file} belongs to other data than --data {data}: its data_sha256 is {sha256}")
            state, precision = finished_checkpoint(file, header, log, device), header["precision"]
            model = network(header["width"], images)
            restore(file.with_suffix(".checkpoint"), {"model": state["model"]}, {"model": model.state_dict()})
            model.eval()
            for name, (size, steps) in attacks.items():
                if name in final["sets"]:
                    continue
                torch.manual_seed(0)
                parts = zip(torch.split(images.test_images, 1000), torch.split(images.test_labels, 1000), strict=True)
                changed = torch.cat([adversarial(model, x, y, images.mean, size, steps, precision) for x, y in parts])
                logits = evaluation_logits(model, changed, images.mean, precision)
                final["sets"][name] = figures(logits, images.test_labels)
                error = final["sets"][name]["top1_error"]
                print(f"{file.stem}: {error:.2f} % top-1 error under {name}", file=sys.stderr)
            write_record(file, header, log, final)


def adversarial(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    mean: Tensor,
    size: float,
    steps: int,
    precision: str = "float32",
) -> Tensor:
    """Images (N, C, H, W), float32 in 0 to 255, changed for the worse, each pixel by at most `size` of 255: by one full
    step, or by several of a quarter of it from a random start.
    """
    clean = images.float()
    low, high = (clean - size).clamp_(min=0), (clean + size).clamp_(max=255)
    step = size if steps == 1 else size / 4
    x = clean if steps == 1 else low + torch.rand_like(clean) * (high - low)
    for _ in range(steps):
        x.requires_grad_()
        loss = lace_loss(logits_of(model, normalised(x, mean), precision), labels, reduction="sum", strength=0.0)
        (gradient,) = torch.autograd.grad(loss, x)
        x = (x.detach() + step * gradient.sign()).clamp(low, high)
    return x
