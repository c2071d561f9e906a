"""torch's own cases of a function and of its module."""

import warnings
from unittest.mock import patch

import torch

# The import would freeze the flags of cudnn for the whole process.
with warnings.catch_warnings(), patch.object(torch.backends, "disable_global_flags"):
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

DOUBLE = {"device": "cpu", "dtype": torch.double, "requires_grad": True}


def cases_of(function, module_class):
    """Both entries of torch's databases: of torch.nn.functional's function of this name, and of the module."""
    (op,) = [op for op in op_db if op.name == f"nn.functional.{function}"]
    (module,) = [module for module in module_db if module.module_cls is module_class]
    return op, module
