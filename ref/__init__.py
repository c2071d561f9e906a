"""The definition of LACE in plain NumPy, float64: what every other implementation is checked against."""

from .loss import Options, backward, forward, hessian_vector_product
from .posterior import posterior

__all__ = ["Options", "backward", "forward", "hessian_vector_product", "posterior"]
