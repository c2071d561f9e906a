"""Bad input is refused with the value and the rule, by the same type in `ref` and `ext`, and by torch's in torch."""

from itertools import product

import numpy as np
import pytest
import torch

from lace_loss import ext, ref
from lace_loss.ext.torch import LACELoss, lace_loss

LOGITS, TARGET = np.zeros((4, 3)), np.array([0, 1, 2, 0])

REFUSED = {
    "a class too large": (LOGITS, [0, 1, 3, 0], {}, IndexError, r"target\[2\] is 3, not a class: 0 to 2"),
    "a negative class": (LOGITS, [0, -1, 2, 0], {}, IndexError, r"target\[1\] is -1, not a class: 0 to 2"),
    "a bad class in an image": (np.zeros((1, 3, 2, 2)), [[[0, 1], [7, 0]]], {}, IndexError, r"target\[0, 1, 0\] is 7"),
    "a bad class of one sample": (np.zeros(3), 3, {}, IndexError, "target is 3, not a class: 0 to 2"),
    "too few targets": (LOGITS, TARGET[:3], {}, ValueError, r"shape \(4,\) for logits of \(4, 3\), got \(3,\)"),
    "a column of targets": (LOGITS, TARGET[:, None], {}, ValueError, r"got \(4, 1\)"),
    "integers in the logits' shape": (LOGITS, np.zeros((4, 3), int), {}, ValueError, r"got \(4, 3\)"),
    "floats of another shape": (LOGITS, TARGET.astype(float), {}, ValueError, r"logits' shape \(4, 3\), got \(4,\)"),
    "a number as logits": (np.float64(1), 0, {}, ValueError, r"got shape \(\)"),
    "no classes": (np.zeros((4, 0)), TARGET, {}, ValueError, r"C >= 1, got shape \(4, 0\)"),
    "complex logits": (LOGITS + 0j, TARGET, {}, TypeError, "complex128"),
    "boolean targets": (LOGITS, TARGET > 0, {}, TypeError, "got bool"),
    "text as targets": (LOGITS, list("abcd"), {}, TypeError, "got <U1"),
    "an unknown reduction": (LOGITS, TARGET, {"reduction": "avg"}, ValueError, "'none', 'mean' or 'sum', got 'avg'"),
    "smoothing above 1": (LOGITS, TARGET, {"label_smoothing": 1.5}, ValueError, r"in \[0, 1\], got 1.5"),
    "NaN smoothing": (LOGITS, TARGET, {"label_smoothing": np.nan}, ValueError, r"in \[0, 1\], got nan"),
    "negative strength": (LOGITS, TARGET, {"strength": -0.1}, ValueError, r"strength must be in \[0, 1\], got -0.1"),
    "strength as text": (LOGITS, TARGET, {"strength": "1"}, TypeError, "strength must be a number, got '1'"),
    "no strength": (LOGITS, TARGET, {"strength": None}, TypeError, "strength must be a number, got None"),
    "a list of strengths": (LOGITS, TARGET, {"strength": [1.0]}, TypeError, r"strength must be a number, got \[1.0\]"),
    "complex smoothing": (
        LOGITS,
        TARGET,
        {"label_smoothing": 0j},
        TypeError,
        "label_smoothing must be a number, got 0j",
    ),
    "a float to ignore": (LOGITS, TARGET, {"ignore_index": 1.0}, TypeError, "ignore_index must be an integer, got 1.0"),
    "text to ignore": (LOGITS, TARGET, {"ignore_index": "1"}, TypeError, "ignore_index must be an integer, got '1'"),
    "too large to ignore": (LOGITS, TARGET, {"ignore_index": 2**63}, ValueError, "64 bits with a sign, got 92233720"),
    "too small to ignore": (LOGITS, TARGET, {"ignore_index": -(2**63) - 1}, ValueError, "with a sign, got -92233720"),
    "no reduction": (LOGITS, TARGET, {"reduction": None}, ValueError, "'none', 'mean' or 'sum', got None"),
    "too many weights": (
        LOGITS,
        TARGET,
        {"weight": np.ones(4)},
        ValueError,
        r"each of the 3 classes, got shape \(4,\)",
    ),
    "text as weights": (LOGITS, TARGET, {"weight": list("abc")}, TypeError, "weight must hold real numbers, got <U1"),
    "ignoring a probability": (
        LOGITS,
        LOGITS,
        {"ignore_index": 1},
        ValueError,
        "negative for a floating target, got 1",
    ),
    "an unknown option": (LOGITS, TARGET, {"gamma": 2}, TypeError, "gamma"),
}


@pytest.mark.parametrize("function", [ref.forward, ref.backward, ext.forward, ext.backward, ext.forward_backward])
@pytest.mark.parametrize(("logits", "target", "options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_numpy_faces_refuse(function, logits, target, options, error, message):
    with pytest.raises(error, match=message):
        function(logits, target, **options)


@pytest.mark.parametrize("function", [ref.backward, ext.backward])
def test_grad_output_is_a_number_or_one_a_sample(function):
    with pytest.raises(ValueError, match=r"be a number, got shape \(4,\)"):
        function(LOGITS, TARGET, np.ones(4))
    with pytest.raises(ValueError, match=r"the loss's shape \(4,\), got shape \(3,\)"):
        function(LOGITS, TARGET, np.ones(3), reduction="none")
    with pytest.raises(TypeError, match="grad_output must hold real numbers, got <U1"):
        function(LOGITS, TARGET, "1")


def test_the_hessian_product_wants_a_vector_like_the_logits():
    with pytest.raises(ValueError, match=r"the logits' shape \(4, 3\), got \(3,\)"):
        ref.hessian_vector_product(LOGITS, TARGET, np.ones(3))


@pytest.mark.parametrize("dtype", [np.float16, np.longdouble, np.int64])
def test_the_kernel_takes_float32_and_float64_only(dtype):
    with pytest.raises(TypeError, match=f"float32 or float64, got {np.dtype(dtype)}"):
        ext.forward(LOGITS.astype(dtype), TARGET)


def test_a_class_beyond_int64_is_refused_and_not_ignored():
    for function in (ref.forward, ext.forward):
        with pytest.raises(IndexError, match="18446744073709551516"):
            function(LOGITS, np.array([0, 2**64 - 100, 1, 2], np.uint64))
        with pytest.raises(TypeError):
            function(LOGITS, TARGET, ignore_index=1.5)


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.array(0.5), np.array(0.5, ">f4")], ids=repr)
def test_every_kind_of_number_is_a_strength(value):
    for function in (ref.forward, ext.forward):
        assert function(LOGITS, TARGET, strength=value) == function(LOGITS, TARGET, strength=0.5)
        assert function(LOGITS, TARGET, strength=np.bool_(True), label_smoothing=0) == function(LOGITS, TARGET)


def result(function, *arguments, **options):
    """Its value, or its exception's type and sentence."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return type(error), str(error)


EDGES = [0, 1, 2, 3, -1, -100, 255, 2**31, 2**32 + 1, 2**63 - 1, -(2**63), 2**63, 2**64 - 100, 2**64 - 1]
KINDS = ["b", "B", "h", "H", "i", "I", "q", "Q", ">i2", ">u4", ">i8", ">u8", "?", "e", "f", "d", "O", "U1"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_every_type_beside_every_ignored_one_is_the_same_in_ref_and_ext(kind):
    """Whatever a class is taken for at the edges of 64 bits and of narrower types: right, ignored or refused."""
    told = set()
    for value in EDGES:
        with np.errstate(all="ignore"):  # some become infinite, some another class
            target = np.array([1, value], np.uint64 if value >= 2**63 else np.int64).astype(kind)
        for ignore_index in (*EDGES, -(2**63) - 1, 2**64):
            options = {"ignore_index": ignore_index, "reduction": "none"}
            for z, t in ((LOGITS[:2] + np.array([0.0, 0.5, 1]), target), (np.array([0.0, 0.5, 1]), target[1])):
                by_ref, by_ext = result(ref.forward, z, t, **options), result(ext.forward, z, t, **options)
                case = (t, ignore_index)
                if isinstance(by_ref, tuple):
                    told.add(by_ref[0])
                    assert by_ext == by_ref, case
                    continue
                assert np.allclose(by_ext, by_ref, rtol=1e-15), case
                wanted = [int(c) for c in np.atleast_1d(t)]
                exact = [0 if c == ignore_index else ref.forward(z.reshape(-1, 3)[0], c) for c in wanted]
                assert np.allclose(by_ref, exact, rtol=1e-15), case
    # Of objects a lone one is the integer that it holds. ValueError: the shape of floats, or what is to be ignored.
    known = {"?": {TypeError}, "U1": {TypeError}, "O": {TypeError, IndexError}, **{float: set() for float in "efd"}}
    assert told == known.get(kind, {IndexError}) | {ValueError}


def test_out_may_lie_between_the_logits():
    """Every other value, or the other half of each row: no element is shared."""
    rng = np.random.default_rng(0)
    for logits, out in ((slice(0, None, 2), slice(1, None, 2)), (slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3))):
        base = rng.normal(size=(4, 6))
        z, g = base[:, logits], base[:, out]
        expected = ext.backward(z.copy(), TARGET)
        before = z.copy()
        assert ext.forward_backward(z, TARGET, out=g)[1] is g
        assert np.array_equal(g, expected) and np.array_equal(z, before)
    base = rng.normal(size=(4, 4))
    with pytest.raises(ValueError, match="shares memory with an input"):
        ext.forward_backward(base[:, :3], TARGET, out=base[:, 1:])


def test_out_must_fit_be_writable_and_stand_apart():
    read_only = np.zeros((4, 3))
    read_only.flags.writeable = False
    logits = LOGITS.copy()
    for out, message in (
        (np.zeros((3, 4)), r"shape \(4, 3\), got a writable float64 array of shape \(3, 4\)"),
        (np.zeros((4, 3), np.float32), "got a writable float32"),
        (read_only, "got a read-only"),
        (logits, "shares memory with an input"),
        (logits[::-1], "shares memory with an input"),
    ):
        with pytest.raises(ValueError, match=message):
            ext.forward_backward(logits, TARGET, out=out)
    weight = np.ones(12)
    with pytest.raises(ValueError, match="shares memory with an input"):
        ext.forward_backward(logits, TARGET, out=weight.reshape(4, 3), weight=weight[:3])
    with pytest.raises(TypeError, match=r"threads must be an integer, got 2.0"):
        ext.forward_backward(LOGITS, TARGET, threads=2.0)
    with pytest.raises(TypeError, match="out must be a NumPy array, got list"):
        ext.forward_backward(LOGITS, TARGET, out=[[0.0] * 3] * 4)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        ext.forward_backward(LOGITS, TARGET, threads=0)


def test_memory_that_is_not_there_is_refused_and_nothing_is_lost():
    """Rows of 2^46 equal logits, held by one: their gradient, or a copy for the kernel, would take 2^48 bytes."""
    logits, target = np.broadcast_to(np.float32(1), (2, 2**46)), np.array([0, 1])
    out = np.full((4, 3), 7.0)
    for call in (ext.forward_backward, ext.forward):
        with pytest.raises(MemoryError):
            call(logits, target)
    with pytest.raises(RuntimeError, match="memory"):
        lace_loss(torch.ones(1).expand(2, 2**46), torch.tensor(target))
    assert logits[0, 0] == 1
    assert np.array_equal(ext.forward_backward(LOGITS, TARGET, out=out)[1], ext.backward(LOGITS, TARGET))


IN_TORCH = {
    "a class too large": (torch.zeros(4, 3), torch.tensor([0, 1, 3, 0]), {}),
    "too few targets": (torch.zeros(4, 3), torch.zeros(3, dtype=torch.long), {}),
    "a column of targets": (torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long), {}),
    "two targets for one sample": (torch.zeros(3), torch.zeros(2, dtype=torch.long), {}),
    "an image of another size": (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 3, dtype=torch.long), {}),
    "integers in the logits' shape": (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long), {}),
    "floating classes": (torch.zeros(4, 3), torch.zeros(4), {}),
    "boolean classes": (torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool), {}),
    "integer logits": (torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long), {}),
    "complex logits": (torch.zeros(4, 3, dtype=torch.complex64), torch.zeros(4, dtype=torch.long), {}),
    "no dimension": (torch.tensor(1.0), torch.tensor(0), {}),
    "an array": (np.zeros((4, 3)), torch.zeros(4, dtype=torch.long), {}),
    "an unknown reduction": (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), {"reduction": "avg"}),
    "smoothing above 1": (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), {"label_smoothing": 1.5}),
    "too many weights": (torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), {"weight": torch.ones(4)}),
    "weights of another dtype": (
        torch.zeros(4, 3),
        torch.zeros(4, dtype=torch.long),
        {"weight": torch.ones(3).double()},
    ),
    "ignoring a probability": (torch.zeros(4, 3), torch.zeros(4, 3), {"ignore_index": 1}),
}


@pytest.mark.parametrize(("input", "target", "options"), IN_TORCH.values(), ids=IN_TORCH.keys())
def test_torch_refuses_what_cross_entropy_refuses_and_by_the_same_type(input, target, options, device, request):
    if "cuda" in (name := request.node.callspec.id) and "a class too large" in name:
        pytest.skip("NaN on a GPU, where cross_entropy's assertion would end the CUDA context")
    input, target = (x.to(device) if isinstance(x, torch.Tensor) else x for x in (input, target))
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(Exception) as by_torch:
        torch.nn.functional.cross_entropy(input, target, **options)
    with pytest.raises(by_torch.type):
        lace_loss(input, target, **options)


SHAPES = [
    (),
    (1,),
    (3,),
    (0,),
    (2, 3),
    (2, 0),
    (0, 3),
    (1, 1),
    (2, 1),
    (2, 3, 4),
    (2, 3, 0),
    (2, 3, 4, 5),
    (1, 3, 2, 2, 2),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
TARGET_DTYPES = [*DTYPES, torch.bool, torch.uint8]


def outcome(loss, *arguments, **options):
    try:
        return loss(*arguments, **options)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_call_is_taken_or_refused_as_by_cross_entropy(shape):
    """But for uint8 classes of images, which torch takes for rows only, and a lone sample's class given as (1,) with
    label smoothing, for which it trips over itself.
    """
    classes = shape[min(1, len(shape) - 1)] if shape else 1
    extras = [{}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"ignore_index": 0}, {"reduction": "sum"}]
    extras += [{"weight": torch.ones(n, dtype=dtype)} for n, dtype in product((classes, classes + 1), DTYPES)]
    targets = {shape, shape[:1] + shape[2:], shape[1:], (), (1,), (2,), (3,), (2, 1)}
    for target, dtype, target_dtype, extra in product(targets, DTYPES, TARGET_DTYPES, extras):
        arguments = torch.zeros(shape, dtype=dtype), torch.zeros(target, dtype=target_dtype)
        theirs = outcome(torch.nn.functional.cross_entropy, *arguments, **extra)
        ours = outcome(lace_loss, *arguments, strength=0, **extra)
        case = (shape, target, dtype, target_dtype, extra)
        if isinstance(theirs, type):
            images = target_dtype == torch.uint8 and len(shape) > 2
            lone = target == (1,) and len(shape) == 1 and "label_smoothing" in extra
            assert ours == theirs or images or lone, case
        else:
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), case
            assert torch.allclose(ours, theirs, equal_nan=True, rtol=1e-2), case


def test_torch_names_the_bad_class_and_its_place():
    for requires_grad in (False, True):
        with pytest.raises(IndexError, match=r"target\[2\] is 3, not a class: 0 to 2"):
            lace_loss(torch.zeros(4, 3, requires_grad=requires_grad), torch.tensor([0, 1, 3, 0]))
    with pytest.raises(IndexError, match=r"target\[2\] is 3, not a class: 0 to 2"):
        lace_loss(torch.zeros(4, 3, dtype=torch.float16), torch.tensor([0, 1, 3, 0]))


def test_torch_refuses_what_cross_entropy_would_silently_take_for_0():
    with pytest.raises(RuntimeError, match=r"between 0.0 and 1.0. Got: -0.5"):
        lace_loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), label_smoothing=-0.5)
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got 2"):
        LACELoss(strength=2)(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))


def test_what_torch_does_not_have_is_refused_with_the_value():
    input, classes = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(TypeError, match="strength must be a number, not a Tensor"):
        lace_loss(input, classes, strength=torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match="place of the mean's denominator, got reduction 'sum'"):
        lace_loss(input, classes, reduction="sum", normalizer=3)
    with pytest.raises(ValueError, match=r"normalizer must be a number or 0-d, got shape \(4,\)"):
        lace_loss(input, classes, normalizer=torch.ones(4))
    with pytest.raises(ValueError, match="statistics are of class indices"):
        lace_loss(input, input.softmax(1), statistics=True)
    with pytest.raises(ValueError, match=r"normalizer must be a number or 0-d, got shape \(2,\)"):
        lace_loss(input, classes, normalizer=np.array([3.0, 4.0]))
    with pytest.raises(
        RuntimeError, match=r"these do not go together: input torch.float32 \(4, 3\), target torch.int64"
    ):
        lace_loss(input.to("meta"), classes.to("meta"), torch.ones(3, dtype=torch.double, device="meta"))


def test_ignore_index_is_what_torch_takes_for_an_integer():
    input, classes = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    for ignore_index in (0, np.int64(0), torch.tensor(0), torch.tensor(0.0), True, 0.0, "0"):
        theirs = outcome(torch.nn.functional.cross_entropy, input, classes, ignore_index=ignore_index)
        ours = outcome(lace_loss, input, classes, ignore_index=ignore_index)
        assert ours == theirs if isinstance(theirs, type) else ours.isnan() == theirs.isnan()
