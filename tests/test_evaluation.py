"""`ext.evaluate`: torch's and scikit-learn's figures, block by block."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import top_k_accuracy_score

from lace_loss import ext

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


def test_blocks_layouts_and_memory_maps_change_nothing(monkeypatch, tmp_path):
    logits, target = classifier(shape=(40, 3, 5))
    expected = ext.evaluate(np.moveaxis(logits, 1, -1).reshape(-1, 20), target.reshape(-1))
    np.save(tmp_path / "z.npy", logits.astype(">f8"))  # as a big-endian machine writes it
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    for block in (1, 999, 1 << 20):
        monkeypatch.setattr(ext, "_LOGITS_IN_A_BLOCK", block)
        for z in (logits, mapped, np.asfortranarray(logits)):
            found = ext.evaluate(z, target)
            assert found.accuracy == expected.accuracy
            assert (found.loss, found.cross_entropy, found.calibration_error) == pytest.approx(
                (expected.loss, expected.cross_entropy, expected.calibration_error), rel=CLOSE["float64"]
            )


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
        (np.zeros((5, 2)), np.zeros(5, int), {"strength": 2}, ValueError, "strength"),
    ],
)
def test_errors_name_the_sample_and_the_rule(logits, target, options, error, message, monkeypatch):
    monkeypatch.setattr(ext, "_LOGITS_IN_A_BLOCK", 100)
    with pytest.raises(error, match=message):
        ext.evaluate(logits, target, **options)
