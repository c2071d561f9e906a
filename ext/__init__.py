"""LACE for NumPy arrays in float32 and float64, by the C kernel of `lace.h`; `lace_loss.ref` is the definition."""

from .arrays import Options, backward, forward, forward_backward
from .binary import binary_backward, binary_forward, binary_forward_backward
from .evaluation import Evaluation, Tally, evaluate
from .posterior import posterior

__all__ = [
    "Evaluation",
    "Options",
    "Tally",
    "backward",
    "binary_backward",
    "binary_forward",
    "binary_forward_backward",
    "evaluate",
    "forward",
    "forward_backward",
    "posterior",
]
