"""The implementations that are installed here, as the checker puts cases to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import loss as definition
from .case import LEVELS, Answer, Case
from .check import Implementation, python_port


def by_reference(case: Case) -> Answer:
    options = case.options
    g = 1.0 if case.grad_output is None else case.grad_output
    try:
        if case.level == "second":
            return {"product": definition.hessian_vector_product(case.logits, case.target, case.vector, g, **options)}
        return {
            "loss": np.asarray(definition.forward(case.logits, case.target, **options)),
            "gradient": definition.backward(case.logits, case.target, g, **options),
        }
    except IndexError:
        return None


def in_torch(function: Any, dtype: str, device: str) -> Implementation:
    """`function(input, target, weight, **options)` of torch, with autograd's gradient and its gradient."""
    import torch

    kind = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]

    def tensor(values: Any) -> Any:
        values = torch.from_numpy(np.ascontiguousarray(values)).to(device)
        return values.to(kind) if values.is_floating_point() else values

    def answer(case: Case) -> Answer:
        options = case.options
        weight = options.pop("weight", None)
        weight = None if weight is None else tensor(weight)
        input = tensor(case.logits).reshape(case.shape).requires_grad_()
        try:
            loss = function(input, tensor(case.target).reshape(case.target.shape), weight, **options)
        except IndexError:
            if not case.refused:
                raise
            return None
        g = torch.ones_like(loss) if case.grad_output is None else tensor(case.grad_output).reshape(loss.shape)
        (gradient,) = torch.autograd.grad(loss, input, g, create_graph=case.level == "second")
        found = {"loss": loss, "gradient": gradient}
        if case.level == "second":
            (found["product"],) = torch.autograd.grad(gradient, input, tensor(case.vector).reshape(case.shape))
        return {key: value.detach().double().cpu().numpy() for key, value in found.items()}

    return answer


def installed() -> Iterator[tuple[str, str, list[str], float, Implementation | str]]:
    """Name, dtype, levels, whether plain tolerances apply or how many times the others, and the implementation or why
    it cannot run.
    """
    first = [level for level in LEVELS if level != "second"]
    yield "ref", "f64", list(LEVELS), False, by_reference
    try:
        from lace_loss import ext
    except ImportError as error:
        yield "ext", "", [], False, str(error)
    else:
        yield "ext", "f64", first, False, python_port(ext.forward_backward)
        yield "ext", "f32", first, False, python_port(ext.forward_backward)
    try:
        import torch

        from lace_loss.ext.torch import check_target, lace_loss
        from lace_loss.ext.torch.composite import composite as form
    except ImportError as error:
        yield "torch", "", [], False, str(error)
        return

    def composite(input: Any, target: Any, weight: Any, **options: Any) -> Any:
        given: dict[str, Any] = {
            "ignore_index": -100,
            "reduction": "mean",
            "label_smoothing": 0.0,
            "strength": 1.0,
        } | options
        if target.shape != input.shape:
            check_target(target, input.shape[min(1, input.dim() - 1)], given["ignore_index"])
        return form(input, target, weight, **given).to(input.dtype)

    for dtype in ("f64", "f32", "f16", "bf16"):
        yield "torch CPU", dtype, first, False, in_torch(lace_loss, dtype, "cpu")
    for dtype in ("f64", "f32", "f16", "bf16"):
        yield "composite", dtype, list(LEVELS), True, in_torch(composite, dtype, "cpu")
    if torch.cuda.is_available():
        # 16 ulp of float32; halves are rounded once, and float64 takes the composite form.
        for dtype, plain in (("f64", True), ("f32", 4), ("f16", False), ("bf16", False)):
            yield "torch CUDA", dtype, first, plain, in_torch(lace_loss, dtype, "cuda")
        for dtype in ("f64", "f32", "f16", "bf16"):
            yield "composite CUDA", dtype, list(LEVELS), True, in_torch(composite, dtype, "cuda")
    else:
        yield "torch CUDA", "", [], True, "torch sees no CUDA device"
