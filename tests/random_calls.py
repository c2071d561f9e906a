"""Call the NumPy face at random, hostile values and layouts included, and compare each result with the definition.

    python tests/random_calls.py 1000 0     1000 calls, drawn with seed 0; prints what is wrong

NumPy is all that it needs, so that `test_random_calls.py` can run it also with the kernel built for sanitizers.
"""

import sys
import warnings

import numpy as np
from tolerances import ROUNDINGS, ULP, UNDERFLOW

from lace_loss import ext, ref

SHAPES = [(6,), (1, 2), (7, 5), (40, 17), (3, 70), (2, 1), (0, 4), (2, 5, 3), (1, 19, 2, 9), (3, 4, 0), (2, 33, 40)]
SCALES = [0, 1e-40, 1e-6, 1, 30, 1000, 1e30]  # times weight and factor still numbers of float32
SPECIAL = [np.nan, np.inf, -np.inf, -np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e30, -1e30]
INTEGERS = ["<i8", ">i8", "i4", "i2", "i1", "u1", "u2", ">u4", "u8"]
FACTORS = [1.0, 1.0, -2.5, 0.0, 65536.0, 1e-30]


def laid_out(rng, values):
    """The same values in other memory: strided, reversed, at an odd address, in the other byte order, read-only."""
    way = rng.integers(7)
    if way == 1:
        values = np.asfortranarray(values)
    elif way == 2:
        values = np.repeat(values, 2, axis=-1)[..., ::2] if values.ndim else values
    elif way == 3:
        values = values[::-1].copy()[::-1] if values.ndim else values
    elif way == 4:
        odd = np.empty(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(values.shape)
        odd[...] = values
        values = odd
    elif way == 5:
        values = values.astype(values.dtype.newbyteorder())
    elif way == 6:
        values = values.copy()
        values.flags.writeable = False
    return values


def drawn(rng):
    """Logits, target, gradient of the result (a number, or one a sample), and options."""
    shape = SHAPES[rng.integers(len(SHAPES))]
    axis = 0 if len(shape) == 1 else 1
    k, samples = shape[axis], shape[:axis] + shape[axis + 1 :]
    dtype = np.dtype([np.float32, np.float64][rng.integers(2)])
    logits = np.clip(rng.normal(size=shape), -3, 3) * SCALES[rng.integers(len(SCALES))]
    if rng.random() < 0.3:
        hostile = rng.random(shape) < rng.choice([0.02, 0.3])
        logits[hostile] = rng.choice(SPECIAL, hostile.sum())
    logits = logits.astype(dtype)
    options = {
        "reduction": ["mean", "sum", "none"][rng.integers(3)],
        "strength": float(rng.choice([1, 1, 0, 0.5, 0.1])),
        "label_smoothing": float(rng.choice([0, 0, 0.1, 1])),
    }
    if rng.random() < 0.4:
        options["weight"] = rng.choice([0.0, 0.3, 1.0, 2.0, 65536.0], k) if rng.random() < 0.5 else rng.uniform(size=k)
    if rng.random() < 0.3:
        y = rng.dirichlet(np.ones(k), samples) if k else np.zeros((*samples, k))
        target = np.moveaxis(y, -1, axis).astype([np.float32, np.float64][rng.integers(2)])
    else:
        options["ignore_index"] = int(rng.choice([-100, 0, k - 1, 200]))
        classes = rng.integers(k, size=samples)
        if rng.random() < 0.3:
            classes = np.where(rng.random(samples) < 0.3, options["ignore_index"], classes)
        kind = np.dtype(INTEGERS[rng.integers(len(INTEGERS))])
        target = np.array(classes).astype(kind if (classes.astype(kind) == classes).all() else np.int64)
    factor = FACTORS[rng.integers(len(FACTORS))]
    if options["reduction"] == "none" and rng.random() < 0.5:
        factor = factor * rng.normal(size=samples)
    return laid_out(rng, logits), laid_out(rng, target), factor, options


def spoiled(rng, logits, target, factor, options):
    """The same call with one thing that is refused."""
    k = logits.shape[min(1, logits.ndim - 1)]
    way = rng.integers(6)
    if way == 0 and target.dtype.kind in "iu" and target.size:
        target = target.astype(np.int64)
        target.flat[rng.integers(target.size)] = rng.choice([k, -1, 2**40, -(2**63)])
    elif way == 1:
        options = {**options, "weight": np.ones(k + 1)}
    elif way == 2:
        options = {**options, ["label_smoothing", "strength"][rng.integers(2)]: rng.choice([-0.1, 1.5, np.nan])}
    elif way == 3:
        target = target[..., None, None]
    elif way == 4:
        options = {**options, "reduction": "average"}
    else:
        options = {**options, "ignore_index": 1.5}
    return logits, target, factor, options


def answer(loss_of, gradient_of, logits, target, factor, options):
    """Loss and gradient, or the kind of error."""
    try:
        return loss_of(logits, target, **options), gradient_of(logits, target, factor, **options)
    except (IndexError, TypeError, ValueError) as error:
        return type(error)


def compare(logits, target, factor, options):
    """What is wrong with ext's answer to this call, or ""."""
    wanted = answer(ref.forward, ref.backward, logits, target, factor, options)
    found = answer(ext.forward, ext.backward, logits, target, factor, options)
    if isinstance(wanted, type) or isinstance(found, type):
        return "" if wanted is found else f"ref gives {wanted}, ext {found}"
    with np.errstate(all="ignore"):
        return difference(found, wanted, *bounds(wanted, logits, target, factor, options))


def bounds(wanted, logits, target, factor, options):
    """How far loss and gradient may be from `wanted`, and the dtype of both."""
    info = np.finfo(logits.dtype.newbyteorder("="))
    several = options["label_smoothing"] > 0 or target.dtype.kind == "f"
    weight = np.max(options.get("weight", 1.0), initial=0)
    each = np.abs(ref.forward(logits, target, **{**options, "reduction": "none"}))
    size = each if options["reduction"] == "none" else np.nansum(each)
    if options["reduction"] == "mean" and size:
        size = np.abs(wanted[0])
    ulps = [count / 2 if several else ULP["kernel, weighted"] for count in ROUNDINGS.values()]
    factor = np.abs(factor)
    terms = factor * weight if several else np.zeros_like(factor)  # of a row's gradient, which may cancel
    if options["reduction"] == "mean" and np.isfinite(size) and 0 < np.nansum(each) < np.inf:
        terms = terms / (np.nansum(each) / size)
    if terms.ndim:
        terms, factor = (np.expand_dims(x, min(1, logits.ndim - 1)) for x in (terms, factor))
    # 2 for ref's own rounding and the sum's; near 0, the smallest number a term.
    lost = UNDERFLOW * (1 + weight) * info.smallest_subnormal
    return (
        (ulps[0] + 2) * info.eps * size + lost * max(1, each.size if options["reduction"] == "sum" else 1),
        (ulps[1] + 2) * info.eps * (np.abs(wanted[1]) + terms) + lost * np.maximum(1, factor),
    ), info.dtype


def difference(found, wanted, bounds, dtype):
    for name, got, right, bound in zip(("loss", "gradient"), found, wanted, bounds, strict=True):
        got, right = np.asarray(got, dtype), np.asarray(right).astype(dtype)
        near = np.abs(got.astype(float) - right) <= bound
        good = near | (got == right) | (np.isnan(got) & np.isnan(right))
        if not good.all():
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            return f"{name}{list(at)} is {got[at]!r}, ref's is {right[at]!r}"
    return ""


def calls(count, seed):
    """Yield what is wrong with each of so many calls, and the call."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        call = drawn(rng)
        if number % 8 == 7:
            call = spoiled(rng, *call)
        before = [np.array(x) for x in call[:2]]
        wrong = compare(*call)
        if not wrong and not all(
            np.array_equal(x, y, equal_nan=y.dtype.kind == "f") for x, y in zip(before, call[:2], strict=True)
        ):
            wrong = "an input was changed"
        yield wrong, call


def main(count, seed):
    warnings.simplefilter("error")
    wrong = 0
    for number, (fault, (logits, target, factor, options)) in enumerate(calls(count, seed)):
        if fault:
            wrong += 1
            print(f"WRONG: call {number} of seed {seed}: {fault}\n{logits!r}\n{target!r}\n{factor!r}\n{options!r}")
    print(f"{count} calls compared, {wrong} wrong")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
