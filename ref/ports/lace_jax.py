"""LACE in JAX: copy this file. Right under grad, jvp, hessian, jit and vmap; needs JAX only.

    loss = lace_loss(logits, target)
    gradient = jax.grad(lace_loss)(logits, target)

Certified on a CPU in float32 and float64 at every level, rows among them, with the plain tolerances, where an error may
grow with the margin. --flushed allows for subnormal numbers, which XLA takes for 0:

    python -m lace_loss.ref check ref/ports/lace_jax.py:answer --plain --flushed \
        --product ref/ports/lace_jax.py:product
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def lace_loss(logits, target, *, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, strength=1.0):
    """Loss of (C,), (N, C) or (N, C, d1, ...) logits, computed in float32 at least; options as in PyTorch.

    Integer targets are classes, floating ones of the logits' shape probabilities; only the logits get a
    gradient. A class that does not exist makes its sample's loss and gradient NaN, since compiled code cannot raise.
    """
    logits, target = jnp.asarray(logits), exactly(target)
    axis = min(1, logits.ndim - 1)
    classes = logits.shape[axis]
    hard = jnp.issubdtype(target.dtype, jnp.integer)
    shape = logits.shape[:axis] + logits.shape[axis + 1 :] if hard else logits.shape
    if not (hard or jnp.issubdtype(target.dtype, jnp.floating)) or target.shape != shape:
        raise ValueError(f"target must hold integers or floats of shape {shape}, got {target.dtype} {target.shape}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    z = jnp.moveaxis(logits, axis, -1).astype(jnp.promote_types(logits.dtype, jnp.float32))
    w = jnp.ones(classes, z.dtype) if weight is None else jnp.asarray(weight, z.dtype)
    if hard:
        ignored = jnp.asarray(ignore_index)
        unsigned = jnp.issubdtype(target.dtype, jnp.unsignedinteger)
        kept = (target != ignored.astype(target.dtype)) | (unsigned & (ignored < 0))
        exists = (target >= 0) & (target < classes)
        y = jnp.where(exists[..., None], jax.nn.one_hot(target, classes, dtype=z.dtype), jnp.nan)
        y = jnp.where(kept[..., None], y, 0)
        divisor = jnp.where(kept, w[jnp.where(exists, target, 0)], 0).sum()
        smooth = jnp.where(kept[..., None], label_smoothing / classes, 0)
        z = jnp.where(kept[..., None], z, 0)
    else:
        y, smooth = jnp.moveaxis(target, axis, -1).astype(z.dtype), label_smoothing / classes
        divisor = z.size // classes
    a = jax.lax.stop_gradient(((1 - label_smoothing) * y + smooth) * w)
    losses = sum_over_classes(z, a, jax.lax.stop_gradient(jnp.asarray(strength, z.dtype)))
    if reduction == "none":
        return losses
    return losses.sum() / divisor if reduction == "mean" else losses.sum()


def exactly(target):
    """As an array in which no class is taken for another: of the widest integers, or ValueError where JAX has none."""
    if not isinstance(target, jax.Array):
        target = np.asarray(target)
    kind = np.dtype(target.dtype).kind
    if kind not in "iu":
        return jnp.asarray(target)
    wide = jax.dtypes.canonicalize_dtype(np.uint64 if kind == "u" else np.int64)
    if isinstance(target, np.ndarray) and not np.array_equal(target, target.astype(wide)):
        raise ValueError(f"target holds integers that are no {wide}: jax_enable_x64 has those of 64 bits")
    return jnp.asarray(target).astype(wide)


@jax.custom_jvp
def sum_over_classes(z, a, s):
    """sum_k a_k f_k over the last axis, f_k = ((1-s) + s (1 - q_k)) (-log q_k)."""
    _, r, n = softmax(z)
    f = ((1 - s) + s * r) * n
    return jnp.where((a == 0) & jnp.isinf(f), 0, a * f).sum(-1)


@sum_over_classes.defjvp
def _(primals, tangents):
    # In closed form: the derivative of the expression above cancels, and is NaN where a logit is -inf.
    z, a, s = primals
    q, r, n = softmax(z)
    ak = a * ((1 - s) + s * (r + q * jnp.where(q == 0, 0, n)))
    gradient = q * others(ak) - r * ak
    return sum_over_classes(z, a, s), (gradient * tangents[0]).sum(-1)


def softmax(z):
    """q, 1 - q and -log q of every class, none of them by a subtraction that cancels."""
    top = z.argmax(-1, keepdims=True)
    is_top = jnp.arange(z.shape[-1]) == top
    largest = jnp.take_along_axis(z, top, -1)
    d = z - jnp.where(jnp.isfinite(largest), largest, jnp.nan)
    e = jnp.where(is_top, 0, jnp.exp(d))
    rest = e.sum(-1, keepdims=True)
    q = jnp.where(is_top, 1, e) / (1 + rest)
    r = jnp.where(is_top, rest / (1 + rest), 1 - q)
    return q, r, jnp.log1p(rest) - d


def others(x):
    """For each class the sum over the other ones, without a cancellation if one entry outweighs the rest."""
    most = jnp.arange(x.shape[-1]) == jnp.abs(x).argmax(-1, keepdims=True)
    return jnp.where(most, jnp.where(most, 0, x).sum(-1, keepdims=True), x.sum(-1, keepdims=True) - x)


# What follows answers the checker.


@partial(jax.jit, static_argnames=["reduction"])
def loss_and_gradient(logits, target, grad_output, **options):
    loss, pull = jax.vjp(partial(lace_loss, target=target, **options), logits)
    return loss, pull(jnp.broadcast_to(grad_output, loss.shape).astype(loss.dtype))[0]


@partial(jax.jit, static_argnames=["reduction"])
def product_alone(logits, target, vector, grad_output, **options):
    return jax.jvp(lambda z: loss_and_gradient(z, target, grad_output, **options)[1], (logits,), (vector,))[1]


def given(logits, options):
    """All options, so that one compilation serves all of a shape."""
    jax.config.update("jax_enable_x64", True)  # or float64 would become float32
    classes = logits.shape[min(1, logits.ndim - 1)]
    return {"weight": jnp.ones(classes), "ignore_index": -100, "label_smoothing": 0.0, "strength": 1.0, **options}


def answer(logits, target, grad_output=1.0, **options):
    return loss_and_gradient(logits, target, grad_output, **given(logits, options))


def product(logits, target, vector, grad_output=1.0, **options):
    return product_alone(logits, target, vector, grad_output, **given(logits, options))
