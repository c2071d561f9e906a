"""The designs whose n was declared before their runs. In words they are in `train/README.md` and in the main README."""

from dataclasses import dataclass
from typing import Any

from .config import Config

PAPER = {"CE": 6.7, "LACE": 6.2}  # top-5 test error in percent, CIFAR-100
PRIMARY, PAIR = "test.top5_error", ("CE", "LACE")


@dataclass(frozen=True)
class Design:
    """A recipe on CIFAR-100 with CE and with LACE, for each of them the seeds from 0 to n - 1."""

    name: str
    n: int
    recipe: Config

    def fits(self, recipe: dict[str, Any]) -> bool:
        return all(getattr(self.recipe, key) == value for key, value in recipe.items())


SMALL: dict[str, Any] = {"shrink": 2, "pad": 2, "subset": 10_000, "width": 16, "epochs": 40}
SHORT: dict[str, Any] = {"schedule": "triangle", "precision": "bfloat16"}
DESIGNS = (
    Design("design E", 20, Config(**SHORT, **SMALL, lr_step=18)),
    Design("design B", 5, Config(**SHORT, width=32, epochs=24, lr_step=11)),
    Design("the first study", 5, Config(**SMALL, lr_step=10)),
    Design("the paper's recipe", 5, Config()),
    Design("the paper's recipe", 5, Config(precision="bfloat16")),
)
