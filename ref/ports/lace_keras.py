"""LACE in Keras 3, for any backend: copy this file; it needs Keras only.

    model.compile(optimizer, loss=LACE())       logits, the classes last; targets are classes or probabilities
    loss = lace_loss(logits, target)            PyTorch's options and shapes, the classes on axis 1

Certified on a CPU with the plain tolerances, where an error may grow with the margin. On the torch backend: float32 and
float64 at the levels core, gradient, batch, layout, large and rows. On JAX's, which takes subnormal numbers for 0:
float32 at the levels gradient, batch and large. TensorFlow's was not tried.

    KERAS_BACKEND=torch python -m lace_loss.ref check ref/ports/lace_keras.py:answer --plain
    KERAS_BACKEND=jax python -m lace_loss.ref check ref/ports/lace_keras.py:answer --plain --flushed --dtypes f32 \
        --levels gradient batch large
"""

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("lace")
class LACE(keras.losses.Loss):
    """Loss of logits (..., C) against classes (...) or (..., 1), or against probabilities (..., C)."""

    def __init__(self, label_smoothing=0.0, strength=1.0, reduction="sum_over_batch_size", name="lace", dtype=None):
        super().__init__(name, reduction, dtype)
        self.label_smoothing, self.strength = label_smoothing, strength

    def call(self, y_true, y_pred):
        options = {"label_smoothing": self.label_smoothing, "strength": self.strength, "reduction": "none"}
        if y_true.shape != y_pred.shape:
            if len(y_true.shape) == len(y_pred.shape):
                y_true = ops.squeeze(y_true, -1)
            return lace_loss(ops.moveaxis(y_pred, -1, 1), ops.cast(y_true, "int32"), **options)
        return lace_loss(ops.moveaxis(y_pred, -1, 1), ops.moveaxis(y_true, -1, 1), **options)

    def get_config(self):
        return {**super().get_config(), "label_smoothing": self.label_smoothing, "strength": self.strength}


def lace_loss(logits, target, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, strength=1.0):
    """Loss of (C,), (N, C) or (N, C, d1, ...) logits, computed in float32 at least; only they get a gradient.

    Integer targets are classes, floating ones of the logits' shape probabilities. A class that does not exist makes its
    sample's loss and gradient NaN, since compiled code cannot raise.
    """
    z, given, target = ops.convert_to_tensor(logits), target, ops.convert_to_tensor(target)
    whole = isinstance(given, np.ndarray) and given.dtype.kind in "iu"
    if whole and not np.array_equal(given, ops.convert_to_numpy(target)):
        raise ValueError(f"target holds integers that the backend has as {target.dtype} only")
    axis = min(1, len(z.shape) - 1)
    kind = keras.backend.standardize_dtype(target.dtype)
    hard = "int" in kind
    shape = (*z.shape[:axis], *z.shape[axis + 1 :]) if hard else tuple(z.shape)
    if not (hard or "float" in kind) or tuple(target.shape) != shape:
        raise ValueError(f"target must hold integers or floats of shape {shape}, got {kind} {tuple(target.shape)}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    z = ops.moveaxis(z, axis, -1)
    dtype, classes = "float64" if keras.backend.standardize_dtype(z.dtype) == "float64" else "float32", z.shape[-1]
    z = ops.cast(z, dtype)
    w = ops.ones(classes, dtype) if weight is None else ops.cast(weight, dtype)
    if hard:
        target = ops.cast(
            target, "int64" if "64" in kind else "int32"
        )  # a narrow one is never another that is negative
        kept, exists = target != ignore_index, (target >= 0) & (target < classes)
        if kind.startswith("u"):
            kept = kept | (target < 0)  # large ones, which have become negative
        y = ops.cast(ops.expand_dims(target, -1) == ops.arange(classes, dtype=target.dtype), dtype)
        y = ops.where(ops.expand_dims(exists, -1), y, float("nan"))
        a = ((1 - label_smoothing) * y + label_smoothing / classes) * w
        a = ops.where(ops.expand_dims(kept, -1), a, 0.0)
        z = ops.where(ops.expand_dims(kept, -1), z, 0.0)
        divisor = ops.sum(ops.where(kept, ops.take(w, ops.where(exists, target, 0)), 0.0))
    else:
        a = ((1 - label_smoothing) * ops.cast(ops.moveaxis(target, axis, -1), dtype) + label_smoothing / classes) * w
        divisor = ops.cast(ops.size(z) // classes, dtype)
    losses = sum_over_classes(z, ops.stop_gradient(a), strength)
    if reduction == "none":
        return losses
    return ops.sum(losses) / divisor if reduction == "mean" else ops.sum(losses)


def sum_over_classes(z, a, s):
    """sum_k a_k f_k over the last axis, f_k = ((1-s) + s (1 - q_k)) (-log q_k)."""

    # The gradient in closed form: that of the expression cancels, and is NaN where a logit is -inf.
    @ops.custom_gradient
    def losses(z):
        q, r, n = softmax(z)
        f = ((1 - s) + s * r) * n
        ak = a * ((1 - s) + s * (r + ops.where(q == 0, 0.0, q * n)))
        gradient = q * others(ak) - r * ak

        def grad(*args, upstream=None):
            return ops.expand_dims(args[0] if upstream is None else upstream, -1) * gradient

        return ops.sum(ops.where((a == 0) & ops.isinf(f), 0.0, a * f), -1), grad

    return losses(z)


def softmax(z):
    """q, 1 - q and -log q of every class, none of them by a subtraction that cancels."""
    top = ops.argmax(z, -1, keepdims=True)
    is_top = ops.arange(z.shape[-1], dtype=top.dtype) == top
    largest = ops.take_along_axis(z, top, -1)
    d = z - ops.where(ops.isfinite(largest), largest, float("nan"))
    e = ops.where(is_top, 0.0, ops.exp(d))
    rest = ops.sum(e, -1, keepdims=True)
    q = ops.where(is_top, 1.0, e) / (1 + rest)
    r = ops.where(is_top, rest / (1 + rest), 1 - q)
    return q, r, ops.log1p(rest) - d


def others(x):
    """For each class the sum over the other ones, without a cancellation if one entry outweighs the rest."""
    top = ops.argmax(ops.abs(x), -1, keepdims=True)
    most = ops.arange(x.shape[-1], dtype=top.dtype) == top
    total = ops.sum(x, -1, keepdims=True)
    return ops.where(most, ops.sum(ops.where(most, 0.0, x), -1, keepdims=True), total - x)


# What follows answers the checker: Keras itself has no gradients.


def answer(logits, target, grad_output=1.0, **options):
    if keras.backend.backend() == "torch":
        import torch

        z = ops.convert_to_tensor(logits).clone().requires_grad_()
        loss = lace_loss(z, target, **options)
        (gradient,) = torch.autograd.grad(loss, z, torch.as_tensor(grad_output).to(loss).expand_as(loss))
        return loss.detach().cpu().numpy(), gradient.cpu().numpy()
    import jax

    jax.config.update("jax_enable_x64", True)  # or float64 would become float32
    loss, pull = jax.vjp(lambda z: lace_loss(z, target, **options), logits)
    return loss, pull(jax.numpy.broadcast_to(jax.numpy.asarray(grad_output, loss.dtype), loss.shape))[0]
