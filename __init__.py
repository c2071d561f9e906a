"""The Linearly Adaptive Cross Entropy loss: `LACELoss` for PyTorch, and the parts `ref`, `ext` and `train`.

What is asked for is imported then: `import lace_loss` imports neither NumPy nor torch.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ext, ref, train
    from .ext.torch import LACELoss

    __version__: str

__all__ = ["LACELoss", "__version__", "ext", "ref", "train"]


def __getattr__(name: str) -> Any:
    if name == "LACELoss":
        return importlib.import_module(".ext.torch", __name__).LACELoss
    if name == "__version__":
        return version("lace-loss")
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
