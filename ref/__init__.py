"""The definition of LACE in plain NumPy, float64: what every other implementation is checked against."""

from .binary import binary_backward, binary_forward, binary_hessian_vector_product, binary_posterior
from .loss import Options, backward, forward, hessian_vector_product
from .posterior import posterior

__all__ = [
    "Options",
    "backward",
    "binary_backward",
    "binary_forward",
    "binary_hessian_vector_product",
    "binary_posterior",
    "forward",
    "hessian_vector_product",
    "posterior",
]
