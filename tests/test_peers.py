"""The peer table: what it says of the focal one-liner and of each peer installed here, and that it leaves none out."""

import re

import numpy as np
import pytest
from benchmarks.peers import PEERS, focal, main, span

from lace_loss import ref
from lace_loss.ref.margins import relative_error

# What a peer warns of on import or in use is its own business.
pytestmark = pytest.mark.filterwarnings("default")


def installed(package):
    for name, _, make, binary in PEERS:
        if name == package:
            try:
                return make(), 2 if binary else 10
            except ImportError as problem:
                pytest.skip(f"{package} is not installed: {problem}")
    raise AssertionError(package)


def worst(peer, dtype, margin, classes=10):
    """Error of loss and gradient for one confident sample."""
    z, t = np.zeros((1, classes), dtype), np.array([0])
    z[0, 0] = margin
    loss, gradient = peer(z, t)
    assert loss.dtype == gradient.dtype == dtype
    return relative_error(loss, ref.forward(z, t, reduction="none")), relative_error(gradient, ref.backward(z, t))


def test_the_focal_one_liner_equals_lace_at_margin_4_and_has_lost_everything_at_margin_20():
    assert max(worst(focal(), np.float32, 4)) < 1e-5
    assert worst(focal(), np.float32, 20) == (1, 1)
    assert max(worst(focal(), np.float64, 20)) < 1e-6
    assert worst(focal(), np.float64, 40) == (1, 1)


def test_the_margins_of_the_focal_one_liner_lie_between_those_of_the_claims():
    for dtype, right, lost in (("f32", (4, 12), (12, 20)), ("f64", (20, 34), (34, 40))):
        found = [float(margin) for margin in span(focal(), dtype, 10)]
        assert right[0] <= found[0] < right[1]
        assert lost[0] < found[1] <= lost[1]


def test_a_span_names_what_is_never_and_what_is_always_wrong():
    def exact(z, t):
        return ref.forward(z, t, reduction="none"), ref.backward(z, t, reduction="sum")

    assert span(exact, "f32", 10) == span(exact, "f64", 2) == ("all", "never")
    assert span(lambda z, t: (np.zeros(len(z)), exact(z, t)[1]), "f32", 10) == ("none", "0")


def test_an_error_is_relative_to_the_largest_value_and_keeps_infinities_and_nan_apart():
    assert relative_error(np.array([1.0, 3.0]), np.array([1.5, 4.0])) == 0.25
    assert relative_error(np.array([np.inf]), np.array([np.inf])) == 0
    assert relative_error(np.array([16.1]), np.array([np.inf])) == np.inf
    assert relative_error(np.array([np.inf]), np.array([2.0])) == np.inf
    assert relative_error(np.array([np.nan]), np.array([np.nan])) == 0
    assert relative_error(np.array([1e-14, 0.0]), np.array([0.0, 0.0])) == 1e-14
    assert np.isnan(relative_error(np.array([np.nan, 1.0]), np.array([1.0, 1.0])))


@pytest.mark.parametrize("package", ["torch", "timm", "kornia", "keras", "optax"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_peer_is_lace_at_margin_4(package, dtype):
    peer, classes = installed(package)
    assert max(worst(peer, dtype, 4, classes)) < 50 * np.finfo(dtype).eps


@pytest.mark.parametrize("package", ["timm", "kornia", "keras"])
def test_a_peer_of_any_number_of_classes_has_lost_float32_at_margin_20(package):
    assert worst(installed(package)[0], np.float32, 20)[1] == 1


def test_the_gradient_of_the_focal_one_liner_is_nan_where_the_targets_logit_is_minus_infinity():
    loss, gradient = focal()(np.array([[-np.inf, 0.0, 1.0]]), np.array([0]))
    assert loss == np.inf and np.isnan(gradient).all()


def test_keras_clips_probabilities_to_a_ten_millionth():
    peer, _ = installed("keras")
    loss, gradient = peer(np.array([[-40.0, 0.0]]), np.array([0]))
    assert loss == pytest.approx((1 - 1e-7) * np.log(1e7)) and not gradient.any()


def test_optax_is_right_for_two_classes_at_any_margin():
    peer, _ = installed("optax")
    assert span(peer, "f32", 2) == span(peer, "f64", 2) == ("all", "never")


def test_the_losses_of_labels_of_torchvision_and_timm_have_lost_float32_at_margin_17():
    for package, name, make, binary in PEERS:
        if binary and package in ("torchvision", "timm"):
            try:
                peer = make()
            except ImportError as problem:
                pytest.skip(f"{package} is not installed: {problem}")
            assert max(worst(peer, np.float32, 4, 2)) < 1e-5, name
            assert max(worst(peer, np.float32, 17, 2)) >= 0.99, name


def test_the_table_is_markdown_that_fits_a_page_and_names_every_peer(capsys):
    main()
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert max(map(len, lines)) <= 120
    assert len({row.count("|") for row in rows}) == 1
    for package, name, *_ in PEERS:
        mine = [row for row in rows if row.startswith(f"| {package} {name} |")]
        absent = re.search(rf"^{package} {re.escape(name)}: not installed", printed, re.M)
        assert [row.split(" | ")[1] for row in mine] == ([] if absent else ["f32", "f64"])
    for name in ("ext", "LACELoss", "BinaryLACELoss, C = 2"):
        verdicts = re.findall(rf"^\| lace_loss {name} \| f.. \| (\w+), \S+ \| (\w+) \| (\w+) \|", printed, re.M)
        assert verdicts == [("yes", "all", "never")] * 2
