"""What a model's logits say of probabilities: by softmax, by the class probabilities that LACE stands for, and after a
temperature.

The softmax q of a model trained with LACE is not its class probability. The expected loss is smallest where the class
probabilities p are proportional to q_k / K_k, with the factor K of the gradient (see `lace_loss.ref`). With strength 0
they are the softmax itself.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

Array = NDArray[np.float64]

BINS = 15  # of the calibration error
BLOCK = 1000  # samples worked on at a time


def log_probabilities(logits: Array, strength: float) -> Array:
    """Logarithms of the class probabilities of (N, C) finite logits, for a model trained at this strength.

    Everything is relative to the class of the largest logit, whose K alone vanishes, so that no digits are lost where
    the model is sure.
    """
    top = logits.argmax(1, keepdims=True)
    below = logits - np.take_along_axis(logits, top, 1)
    e = np.exp(below)
    np.put_along_axis(e, top, 0, 1)
    others = e.sum(1, keepdims=True)
    np.put_along_axis(e, top, 1, 1)
    q, n = e / (1 + others), np.log1p(others) - below
    r = 1 - q
    np.put_along_axis(r, top, others / (1 + others), 1)
    log_k = np.log((1 - strength) + strength * (r + q * n))
    log_p = below - (log_k - np.take_along_axis(log_k, top, 1))
    e = np.exp(log_p)
    np.put_along_axis(e, top, 0, 1)
    return log_p - np.log1p(e.sum(1, keepdims=True))


def quality(logits: Array, labels: NDArray[np.int64], strength: float, temperature: Array) -> dict[str, float]:
    """Negative log-likelihood in nats, calibration error in percent (15 bins of equal width of the largest probability)
    and Brier score (the mean over the samples of the summed squares of p - y) of logits divided by the `temperature` of
    their sample.
    """
    nll = brier = 0.0
    bins = np.zeros((2, BINS))  # sum of the confidences, number of right samples
    for start in range(0, len(labels), BLOCK):
        part = slice(start, start + BLOCK)
        log_p, t = log_probabilities(logits[part] / temperature[part, None], strength), labels[part, None]
        log_p_t, p = np.take_along_axis(log_p, t, 1), np.exp(log_p)
        nll -= log_p_t.sum()
        brier += (p * p).sum() + (1 - 2 * np.exp(log_p_t)).sum()
        confidence = p.max(1)
        bin_of = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        right = p.argmax(1) == t[:, 0]
        bins += [np.bincount(bin_of, values, BINS) for values in (confidence, right)]
    n = len(labels)
    calibration_error = 100 * float(np.abs(bins[1] - bins[0]).sum()) / n
    return {"nll": float(nll / n), "calibration_error": calibration_error, "brier": float(brier / n)}


def fitted_temperature(logits: Array, labels: NDArray[np.int64], strength: float) -> float:
    """Temperature in [1/20, 20] whose negative log-likelihood is smallest."""

    def nll(log_temperature: float) -> float:
        return quality(logits, labels, strength, np.full(len(labels), np.exp(log_temperature)))["nll"]

    limit = np.log(20)
    return float(np.exp(minimize_scalar(nll, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-4}).x))


def qualities(logits: NDArray[np.float32], labels: NDArray[np.int64], strength: float, scaled: bool) -> dict[str, Any]:
    """`quality` of the softmax and of the class probabilities of a model trained at this strength, and where `scaled`
    both after one temperature as well.

    The temperature of the samples with even numbers is fitted on those with odd numbers, and the other way round: every
    sample counts, and none has a part in its own temperature. `temperature` is the mean of the two.
    """
    z, ones, by_name = logits.astype(np.float64), np.ones(len(labels)), dict[str, Any]()
    for name, s in (("softmax", 0.0), ("posterior", strength)):
        by_name[name] = quality(z, labels, s, ones)
        if scaled:
            temperature = ones.copy()
            for half, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
                temperature[half] = fitted_temperature(z[other], labels[other], s)
            mean = float(temperature[:2].mean())
            by_name[f"{name}_scaled"] = {"temperature": mean, **quality(z, labels, s, temperature)}
    return by_name
