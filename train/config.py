"""Every setting of a run, and the one exception for what its user can put right."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# Of every setting that is a whole number: sizes of layers stay below 2**63, so that the memory is what ends first.
MOST = 1 << 24


class TrainError(Exception):
    """A wrong setting, data folder, record or checkpoint; shown as one line."""


def setting(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Config:
    """One run. The values are the paper's recipe for CIFAR-100; `DIGITS` lists what the small data set changes."""

    data: str = setting("cifar100", "digits, cifar100, or the name of an image folder")
    loss: str = setting("lace", "ce, lace, or focal: torch's (1 - exp(-ce)) * ce, to see whether numerics matter")
    seed: int = setting(0, "seed of the initial weights, the order of the images, crops and flips")
    width: int = setting(64, "channels of the first stage")
    strength: float = setting(1.0, "strength of LACE: 1 is the paper's, 0 is cross entropy")
    epochs: int = setting(200, "passes over the training images")
    batch: int = setting(100, "images a step")
    lr: float = setting(0.1, "learning rate at the start")
    schedule: str = setting("steps", "learning rate schedule: steps, or triangle: to twice --lr in 15 %, then to 0")
    lr_step: int = setting(50, "epochs between drops; a quarter of --epochs where that is given, 0.45 of less than 100")
    lr_drop: float = setting(0.1, "factor of each drop")
    momentum: float = setting(0.9, "SGD momentum")
    weight_decay: float = setting(5e-4, "SGD weight decay, on every parameter")
    pad: int = setting(4, "pixels of zeros around an image before the random crop")
    flip: bool = setting(True, "mirror every other image at random")
    precision: str = setting("float32", "float32, or bfloat16 (default on a GPU) but for weights, sums, head and loss")
    shrink: int = setting(1, "side of the blocks of pixels that are replaced by their mean")
    subset: int = setting(0, "training images, the same number from each class; the rest is tested, too; 0 is all")
    test_every: int = setting(1, "epochs between tests; the last epoch is always tested")

    def __post_init__(self) -> None:
        for name in ("lr", "lr_drop", "momentum", "weight_decay"):
            self.require(name, lambda x: 0 <= x < math.inf, "be at least 0 and finite")
        self.require("batch", lambda x: x != 1, "be at least 2, which batch normalisation needs")
        self.require("loss", lambda x: x in ("ce", "lace", "focal"), "be ce or lace or focal")
        self.require("precision", lambda x: x in ("float32", "bfloat16"), "be float32 or bfloat16")
        self.require("schedule", lambda x: x in ("steps", "triangle"), "be steps or triangle")
        for name in ("width", "epochs", "batch", "lr_step", "shrink", "test_every"):
            self.require(name, lambda x: 1 <= x <= MOST, f"be at least 1 and at most {MOST}")
        for name in ("pad", "subset"):
            self.require(name, lambda x: 0 <= x <= MOST, f"be at least 0 and at most {MOST}")
        self.require("data", str.isprintable, "have a name of printable characters")
        self.require("strength", lambda x: 0 <= x <= 1, "be in [0, 1]")

    def require(self, name: str, follows: Callable[[Any], bool], rule: str) -> None:
        """Raise TrainError, which names the flag, the rule and the value, unless the setting follows the rule."""
        if not follows(value := getattr(self, name)):
            raise TrainError(f"--{name.replace('_', '-')} must {rule}, got {value!r}")

    def require_device(self, kind: str) -> None:
        """Refuse bfloat16 on a CPU that would only imitate it, several times slower than float32."""
        if self.precision == "bfloat16" and kind == "cpu" and not torch.cpu._is_avx512_bf16_supported():
            raise TrainError("--precision bfloat16: this processor has no avx512_bf16; use float32")


# 8x8 pixels: one is the eighth that 4 of 32 are. A mirrored digit is another sign or none.
DIGITS: dict[str, Any] = {"width": 8, "epochs": 20, "lr_step": 9, "pad": 1, "flip": False}
