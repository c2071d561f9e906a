"""`ext.evaluate`: torch's and scikit-learn's figures, block by block."""

import functools
import math
import operator
import pickle
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import top_k_accuracy_score

from lace_loss import ext, ref

torch = pytest.importorskip("torch")


def classifier(dtype=np.float64, shape=(600,), classes=20):
    """Logits of every confidence, whose class leads in about half of the samples; the last five are ignored."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(*shape, classes)) * rng.uniform(0.1, 4, (*shape, 1))
    target = np.where(rng.random(shape) < 0.4, logits.argmax(-1), rng.integers(0, classes, shape))
    target[-5:] = -100
    return np.moveaxis(logits, -1, 1).astype(dtype), target


def by_definition(logits, target):
    """Expected calibration error of (N, C) logits: 15 bins of equal width, each open below and closed above."""
    probability = softmax(logits.astype(np.float64), 1)
    confidence, right = probability.max(1), probability.argmax(1) == target
    error = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


# Of the figures of 595 samples: float64 rounds both sides, float32 the kernel's losses and probabilities.
CLOSE = {"float64": 1e-13, "float32": 1e-6, "float16": 1e-6}


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_figures_are_those_of_torch_sklearn_and_the_definition(dtype):
    logits, target = classifier(dtype)
    found = ext.evaluate(logits, target, topk=(1, 3, 5))
    kept = target >= 0
    z, y = logits[kept].astype(np.float64), target[kept]
    ce = torch.nn.functional.cross_entropy(torch.tensor(z), torch.tensor(y)).item()
    assert found.count == kept.sum()
    assert found.cross_entropy == pytest.approx(ce, rel=CLOSE[dtype])
    assert found.calibration_error == pytest.approx(by_definition(z, y), rel=CLOSE[dtype])
    for k, accuracy in found.accuracy.items():
        assert accuracy == pytest.approx(top_k_accuracy_score(y, z, k=k, labels=range(20)), rel=1e-15)
    assert 0.3 < found.accuracy[1] < found.accuracy[3] < found.accuracy[5] < 1
    assert found.calibration_error > 0.1


def test_the_calibration_error_is_that_of_torchmetrics():
    calibration_error = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    logits, target = (values[:-5] for values in classifier())
    expected = calibration_error(torch.tensor(logits), torch.tensor(target), 20, n_bins=15).item()
    assert ext.evaluate(logits, target).calibration_error == pytest.approx(expected, rel=1e-6)  # it works in float32


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.5}, {"weight": np.arange(20) / 8}, {"label_smoothing": 0.1}, {"ignore_index": 3}],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_the_loss_is_the_mean_of_forward(dtype, options):
    logits, target = (values[:-5] for values in classifier(dtype))
    found = ext.evaluate(logits, target, **options)
    assert found.loss == pytest.approx(ext.forward(logits, target, **options), rel=CLOSE[dtype])


def test_blocks_layouts_and_memory_maps_change_no_bit(monkeypatch, tmp_path):
    logits, target = classifier(shape=(40, 3, 5))
    expected = ext.evaluate(np.moveaxis(logits, 1, -1).reshape(-1, 20), target.reshape(-1))
    np.save(tmp_path / "z.npy", logits.astype(">f8"))  # as a big-endian machine writes it
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    for block in (1, 999, 1 << 20):
        monkeypatch.setattr(ext.evaluation, "_LOGITS_IN_A_BLOCK", block)
        for z in (logits, mapped, np.asfortranarray(logits)):
            assert ext.evaluate(z, target) == expected


OPTIONS = {"weight": np.arange(20) / 8, "ignore_index": 3, "label_smoothing": 0.1, "strength": 0.5}


def tally_of(logits, target, **options):
    tally = ext.Tally(**options)
    tally.add(logits, target)
    return tally


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tallies_add_up_to_the_same_bits_in_any_order_and_parts(dtype, options):
    logits, target = (values[:-5] for values in classifier(dtype))
    logits[::7] *= np.array(1e6, dtype)  # losses of every size: a plain sum depends on its order
    expected = ext.evaluate(logits, target, **options)
    rng = np.random.default_rng(0)
    for parts in (2, 7, 100):
        of_row = rng.integers(0, parts, len(target))
        tallies = [tally_of(logits[of_row == i], target[of_row == i], **options) for i in range(parts)]
        tallies = pickle.loads(pickle.dumps(tallies))
        before = [tally.figures() for tally in tallies]
        pairs = [a + b for a, b in zip(tallies[::2], tallies[1::2], strict=False)] + tallies[len(tallies) // 2 * 2 :]
        for order in (tallies, tallies[::-1], pairs):
            assert functools.reduce(operator.add, order).figures() == expected
        assert str([tally.figures() for tally in tallies]) == str(before), "an operand has changed"
    assert (tally_of(logits, target, **options) + ext.Tally(**options)).figures() == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_are_exact_over_all_exponents(dtype):
    """Weighted losses from the smallest number to the largest, of both signs; the witness adds fractions."""
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    classes = 300
    weight = (2.0 ** rng.uniform(np.log2(info.smallest_subnormal), info.maxexp - 9, classes)).astype(dtype)
    weight *= rng.choice(np.array([1, -1], dtype), classes)
    weight[:3] = info.smallest_subnormal, info.max / 256, -info.max / 256
    logits = np.zeros((2000, classes), dtype)
    logits[np.arange(2000), rng.integers(0, classes, 2000)] = 3
    target = rng.integers(0, classes, 2000)
    losses = [Fraction(x) for x in ext.forward(logits, target, weight=weight, reduction="none").tolist()]
    divisor = sum(Fraction(x) for x in weight[target].tolist())
    found = ext.evaluate(logits, target, weight=weight)
    assert found.loss == float(sum(losses) / divisor)
    ce = ext.forward(logits, target, reduction="none", strength=0).astype(np.float64)
    assert found.cross_entropy == float(sum(map(Fraction, ce.tolist())) / 2000)


def test_a_sum_beyond_the_largest_number_has_its_mean():
    logits = np.array([[0, -1.7e308]] * 9)
    assert ext.evaluate(logits, [1] * 9).cross_entropy == 1.7e308


def test_counts_add_up_and_a_later_error_counts_on():
    logits, target = classifier()
    both = tally_of(logits[:300], target[:300]) + tally_of(logits[300:], target[300:])
    with pytest.raises(IndexError, match=r"target\[601\] is 20, not a class"):
        both.add(logits[:2], np.array([0, 20]))
    assert both.figures() == ext.evaluate(logits, target), "what is refused counts nowhere"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"topk": (1,)}, r"topk \[1, 5\] and \[1\]"),
        ({"ignore_index": 0}, "ignore_index -100 and 0"),
        ({"label_smoothing": 0.5}, "label_smoothing 0.0 and 0.5"),
        ({"strength": 0.5}, "strength 1.0 and 0.5"),
        ({"weight": [1, 2]}, r"weight None and \[1 2\]"),
    ],
)
def test_tallies_of_different_options_are_not_added(options, sentence):
    with pytest.raises(ValueError, match=f"tallies of different options cannot be added: {sentence}"):
        ext.Tally() + ext.Tally(**options)
    with pytest.raises(TypeError):
        ext.Tally() + 1


CLASSES, ONE_CLASS, IGNORED = [0, 1, 2, 0, 1, 2], [2] * 6, [-100] * 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [CLASSES, ONE_CLASS, IGNORED, []], ids=["all", "one class", "ignored", "empty"])
@pytest.mark.parametrize(
    "weight",
    [[0, 0, 0], [1, -1, 0], [-1, 1, 0], [math.inf, 1, 1], [-math.inf, math.inf, 0], [math.nan, 1, 1], [-1, -2, -1]],
    ids=str,
)
def test_whatever_weights_add_up_to_a_mean_is_the_same_by_all_ways(weight, target, smoothing):
    z = np.random.default_rng(0).normal(size=(len(target), 3))
    options = {"weight": np.array(weight, float), "label_smoothing": smoothing}
    target = np.array(target, int)
    if smoothing == 0:  # else torch divides two sums by 0, one by one, and adds NaN to infinity
        tensors = map(torch.tensor, (z, target, options["weight"]))
        theirs = torch.nn.functional.cross_entropy(*tensors).item()
        assert ext.evaluate(z, target, strength=0, **options).loss == pytest.approx(theirs, rel=1e-12, nan_ok=True)
    expected = ref.forward(z, target, **options)
    assert ext.forward(z, target, **options) == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert ext.evaluate(z, target, **options).loss == pytest.approx(expected, rel=1e-12, nan_ok=True)
    half = tally_of(z[::2], target[::2], **options) + tally_of(z[1::2], target[1::2], **options)
    assert str(half.figures()) == str(ext.evaluate(z, target, **options))


def test_one_sample_without_its_axis_counts_as_one():
    assert ext.evaluate([0.0, 2.0, 1.0], 2) == ext.evaluate([[0.0, 2.0, 1.0]], [2])


def test_of_equal_logits_the_first_comes_first():
    assert ext.evaluate([[1.0, 1.0, 1.0]] * 3, [0, 1, 2], topk=(1, 2)).accuracy == {1: 1 / 3, 2: 2 / 3}


def test_an_impossible_class_costs_infinity_and_its_confidence_is_that_of_the_class_in_front():
    found = ext.evaluate([[0.0, -np.inf, np.log(3)]], [1])
    assert found.loss == found.cross_entropy == np.inf
    assert found.calibration_error == pytest.approx(0.75, rel=1e-15)


def test_ignored_rows_do_not_count_whatever_they_hold():
    logits, target = classifier()
    expected = ext.evaluate(logits, target)
    logits[-5:] = np.nan
    assert ext.evaluate(logits, target) == expected


@pytest.mark.parametrize(("logits", "target"), [(np.zeros((0, 3)), np.zeros(0, int)), (np.zeros((2, 3)), [-100, -100])])
def test_nothing_to_count_is_nan(logits, target):
    found = ext.evaluate(logits, target)
    assert found.count == 0
    assert np.isnan([found.loss, found.cross_entropy, found.calibration_error, *found.accuracy.values()]).all()


def changed(place, value, shape=(50,)):
    logits, target = classifier(shape=shape)
    logits[place] = value
    return logits, np.maximum(target, 0)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (*changed((44, 3), np.nan), {}, ValueError, r"logits\[44\] holds NaN"),
        (*changed((44, 3), np.inf), {}, ValueError, r"logits\[44\] holds \+inf"),
        (*changed(44, -np.inf), {}, ValueError, r"logits\[44\] holds -inf only"),
        (*changed((6, 3, 2, 1), np.nan, (9, 3, 2)), {}, ValueError, r"logits\[6, :, 2, 1\] holds NaN"),
        (np.zeros((50, 2)), np.arange(50) // 44 * 7, {}, IndexError, r"target\[44\] is 7, not a class: 0 to 1"),
        (np.zeros((5, 2)), np.zeros(4, int), {}, ValueError, "each of 5 samples"),
        (np.zeros((5, 2)), np.zeros((5, 2), int), {}, ValueError, r"target must have shape \(5,\)"),
        (np.zeros((5, 2)), np.zeros((5, 2)), {}, TypeError, r"must hold integers \(classes\), got float64"),
        (np.zeros((5, 2), int), np.zeros(5, int), {}, TypeError, "float16, float32 or float64, got int64"),
        (np.zeros((5, 0)), np.zeros(5, int), {}, ValueError, "C >= 1"),
        (1.0, 0, {}, ValueError, "C >= 1"),
        (np.zeros((5, 2)), np.zeros(5, int), {"topk": (1, 0)}, ValueError, "topk must hold numbers from 1, got 0"),
        (np.zeros((5, 2)), np.zeros(5, int), {"topk": 1}, TypeError, r"topk must hold whole numbers, .*, got 1"),
        (np.zeros((5, 2)), np.zeros(5, int), {"topk": (1.5,)}, TypeError, r"whole numbers, .*, got \(1.5,\)"),
        (np.zeros((5, 2)), np.zeros(5, int), {"topk": "15"}, TypeError, r"whole numbers, .*, got '15'"),
        (np.zeros((5, 2)), np.zeros(5, int), {"strength": 2}, ValueError, r"strength must be in \[0, 1\], got 2"),
        (np.zeros((5, 2)), np.zeros(5, int), {"strength": "1"}, TypeError, "strength must be a number, got '1'"),
        (np.zeros((5, 2)), np.zeros(5, int), {"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got"),
        (np.zeros((5, 2)), np.zeros(5, int), {"weight": "w"}, TypeError, "weight must hold real numbers, got <U1"),
        (np.zeros((5, 2)), np.zeros(5, int), {"weight": [1]}, ValueError, r"each of the 2 classes, got shape \(1,\)"),
    ],
)
def test_errors_name_the_sample_and_the_rule(logits, target, options, error, message, monkeypatch):
    monkeypatch.setattr(ext.evaluation, "_LOGITS_IN_A_BLOCK", 100)
    with pytest.raises(error, match=message):
        ext.evaluate(logits, target, **options)
