"""The emulator of a GPU's instructions: each against exact arithmetic, its faults, kernels with something left out."""

import copy
import inspect
import math
import random
import re
from dataclasses import replace
from fractions import Fraction
from itertools import product

import mpmath
import numpy as np
import pytest
from machines import ptx

FLOATS = {"f32": np.float32, "f16": np.float16}


def run(body, arrays, programs=1, block=32, shared=0, **options):
    """Threads that run `body`, which finds the arrays' addresses in %rd1, %rd2, ... and its own number in %r1."""
    parameters = ",\n".join(f"\t.param .u64 k_param_{i}" for i in range(len(arrays)))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(len(arrays)))
    text = f""".visible .entry k(\n{parameters}\n)\n.reqntid {block}\n{{
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
mov.b32 %r3, {block};
mad.lo.s32 %r1, %r2, %r3, %r1;
{loads}
{body}
ret;\n}}\n"""
    tensors = [ptx.Tensor(x.ctypes.data, x.nbytes, x.itemsize) for x in arrays]
    ptx.Kernel(text).run(programs, tensors, shared, **options)


REGISTER = {1: "%p", 2: "%rs", 4: "%r", 8: "%rd"}


def result(name, dtype, *operands, **options):
    """Of one instruction for each element of the operands. Predicates are kept as numbers of 16 bits."""
    count = -(-len(operands[0]) // 32) * 32
    lines, texts, arrays = [], [], []
    for i, x in enumerate((*operands, np.zeros(count, dtype))):
        x = np.resize(x, count)
        memory = x.astype(np.uint16) if x.dtype == bool else x
        arrays.append(memory)
        width, place, of = memory.itemsize, f"%rd{20 + i}", f"{REGISTER[x.itemsize]}{10 + i}"
        lines.append(f"mad.wide.u32 {place}, %r1, {width}, %rd{i + 1};")
        if i < len(operands):
            kept = f"%rs{30 + i}" if x.dtype == bool else of
            lines.append(f"ld.global.b{8 * width} {kept}, [{place}];")
            lines += [f"setp.ne.b16 {of}, {kept}, 0;"] if x.dtype == bool else []
            texts.append(of)
        else:
            lines.append(f"{name} {of}, {', '.join(texts)};")
            lines += [f"selp.b16 %rs40, 1, 0, {of};"] if x.dtype == bool else []
            lines.append(f"st.global.b{8 * width} [{place}], {'%rs40' if x.dtype == bool else of};")
    run("\n".join(lines), arrays, count // 32, **options)
    return arrays[-1][: len(operands[0])].astype(dtype, copy=False)


def rounded(x, digits=24, least=-149, largest=127):
    """The nearest number of so many digits, of two the even one, for an exact x: by integers alone."""
    if not x:
        return 0.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    found = round(x / unit) * unit
    return math.copysign(math.inf, x) if abs(found) >= Fraction(2) ** (largest + 1) else float(found)


def floats(count, seed, *, least=-149, largest=128):
    """Finite numbers of all sizes between, half of them with few digits, so that sums and products end in ties."""
    rng = random.Random(seed)
    drawn = []
    while len(drawn) < count:
        digits = rng.choice([2, 5, 12, 13, 24])
        x = rng.choice([-1, 1]) * rng.getrandbits(digits) * 2.0 ** rng.randint(least, largest - digits)
        drawn.append(x if np.float32(x) == x and math.isfinite(x) else 1.0)
    return np.array(drawn, np.float32)


def near(x, seed):
    """Numbers of about the same size, of which many differ by a few units or cancel."""
    rng = np.random.default_rng(seed)
    return (-x * (1 + rng.integers(-3, 4, len(x)) * np.float32(2**-23))).astype(np.float32)


ROUNDED = {
    "add.f32": (2, lambda a, b: a + b),
    "sub.f32": (2, lambda a, b: a - b),
    "mul.f32": (2, lambda a, b: a * b),
    "div.rn.f32": (2, lambda a, b: a / b if b else None),
    "fma.rn.f32": (3, lambda a, b, c: a * b + c),
}


@pytest.mark.parametrize("scale", ["any", "near 1", "subnormal"])
@pytest.mark.parametrize(("name", "arity", "exact"), [(k, *v) for k, v in ROUNDED.items()], ids=ROUNDED.keys())
def test_arithmetic_is_the_exact_result_rounded_once(name, arity, exact, scale):
    least, largest = {"any": (-149, 128), "near 1": (-40, 4), "subnormal": (-149, -60)}[scale]
    given = [floats(4096, seed, least=least, largest=largest) for seed in range(arity)]
    with np.errstate(all="ignore"):
        given[-1][::2] = near(np.prod(given[:-1], axis=0), 7)[::2] if arity == 3 else near(given[0], 7)[::2]
    given[-1][~np.isfinite(given[-1])] = 1
    found = result(name, np.float32, *given)
    inexact = 0
    for x, *operands in zip(found.tolist(), *(map(Fraction, a.tolist()) for a in given), strict=True):
        if (value := exact(*operands)) is not None:
            assert x == rounded(value), (name, *map(float, operands))
            inexact += math.isfinite(x) and Fraction(x) != value
    assert inexact > 300
    two = name.replace("f32", "f32x2")
    if two in ptx.PLAIN:
        pairs = result(two, np.uint64, *(a.view(np.uint64) for a in given))
        assert np.array_equal(pairs.view(np.float32), found, equal_nan=True)


def test_a_fused_multiply_add_is_not_rounded_twice():
    """Exact sums that double rounding to double and then to float32 gets wrong, of normal and subnormal results."""
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-12)  # 1 + 2^-11 + 2^-24: a tie, which c resolves
    for c in (2.0**-80, -(2.0**-80), 2.0**-140):
        (found,) = result("fma.rn.f32", np.float32, *(np.array([x], np.float32) for x in (a, b, c))).tolist()
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(c)
        assert found == rounded(exact)
    assert rounded(Fraction(1) + Fraction(2) ** -24 + Fraction(2) ** -60) != np.float32(float(1 + 2.0**-24 + 2.0**-60))
    (tiny,) = result(
        "fma.rn.f32", np.float32, *(np.array([x], np.float32) for x in (3 * 2.0**-75, 2.0**-75, 2.0**-149))
    )
    assert tiny == rounded(3 * Fraction(2) ** -150 + Fraction(2) ** -149) == 2 * 2.0**-149


def test_with_ftz_subnormal_operands_and_results_are_zeros_of_their_sign():
    one, small, least = 1.0, 2.0**-130, 2.0**-126
    cases = [
        (small, one, 0, 0),
        (one, -small, -0.0, -0.0),
        (one, one, small, one),
        (least, 0.5, 0, 0),
        (least, one, 0, least),
    ]
    *given, wanted = (np.array(x, np.float32) for x in zip(*cases, strict=True))
    found = result("fma.rn.ftz.f32", np.float32, *given)
    assert found.view(np.uint32).tolist() == wanted.view(np.uint32).tolist()
    assert result("fma.rn.f32", np.float32, *given).tolist() != wanted.tolist()


HALVES = {"f16": (11, -24, 15), "bf16": (8, -133, 127)}


@pytest.mark.parametrize("kind", HALVES)
def test_conversions_to_halves_round_to_the_nearest_and_back_are_exact(kind):
    digits, least, largest = HALVES[kind]
    given = np.concatenate([floats(4096, 1), floats(4096, 2, least=least - 4, largest=largest)])
    bits = result(f"cvt.rn.{kind}.f32", np.uint16, given)
    back = result(f"cvt.f32.{kind}", np.float32, bits)
    assert back.tolist() == [rounded(Fraction(x), digits, least, largest) for x in given.tolist()]
    two = result(f"cvt.rn.{kind}x2.f32", np.uint32, given, given[::-1].copy())
    assert (two >> 16).tolist() == bits.tolist()
    assert (two & 0xFFFF).tolist() == bits[::-1].tolist()
    assert np.isnan(
        result(f"cvt.f32.{kind}", np.float32, result(f"cvt.rn.{kind}.f32", np.uint16, given * np.nan))
    ).all()


def signed(x, bits):
    return x - (x >> (bits - 1) << bits)


INTEGERS = {
    "add.s{}": lambda a, b, n: a + b,
    "sub.s{}": lambda a, b, n: a - b,
    "mul.lo.s{}": lambda a, b, n: a * b,
    "and.b{}": lambda a, b, n: a & b,
    "or.b{}": lambda a, b, n: a | b,
    "xor.b{}": lambda a, b, n: a ^ b,
}
ONLY_32 = {
    "max.s32": lambda a, b, n: max(signed(a, n), signed(b, n)),
    "min.u32": lambda a, b, n: min(a, b),
    "div.s32": lambda a, b, n: int(Fraction(signed(a, n), signed(b, n))),  # towards 0
    "rem.s32": lambda a, b, n: signed(a, n) - signed(b, n) * int(Fraction(signed(a, n), signed(b, n))),
}


@pytest.mark.parametrize(
    ("name", "bits", "exact"),
    [(k.format(n), n, f) for k, f in INTEGERS.items() for n in (16, 32, 64)] + [(k, 32, f) for k, f in ONLY_32.items()],
)
def test_integers_wrap_as_python_s_do_modulo_2_to_the_width(name, bits, exact):
    rng = random.Random(name)
    a, b = ([rng.getrandbits(rng.randint(1, bits)) or 1 for _ in range(512)] for _ in range(2))
    a += [2 ** (bits - 1), 2**bits - 1]
    b += [2, 2**bits - 1]
    dtype = np.dtype(f"u{bits // 8}")
    found = result(name, dtype, np.array(a, dtype), np.array(b, dtype))
    assert found.tolist() == [exact(x, y, bits) % 2**bits for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_the_width_or_more_leave_nothing_or_the_sign(bits):
    dtype = np.dtype(f"u{bits // 8}")
    numbers = [1, 2**bits - 1, 2 ** (bits - 1), 0x5A5A]
    counts = [0, 1, bits - 1, bits, bits + 1, 2**32 - 1]
    a, n = (list(x) for x in zip(*product(numbers, counts), strict=True))
    given = np.array(a, dtype), np.array(n, np.uint32)
    assert result(f"shl.b{bits}", dtype, *given).tolist() == [
        (x << min(k, 99)) % 2**bits for x, k in zip(a, n, strict=True)
    ]
    assert result(f"shr.u{bits}", dtype, *given).tolist() == [x >> min(k, 99) for x, k in zip(a, n, strict=True)]
    wanted = [(signed(x, bits) >> min(k, 99)) % 2**bits for x, k in zip(a, n, strict=True)]
    assert result(f"shr.s{bits}", dtype, *given).tolist() == wanted


def test_wide_products_fields_and_counts_of_bits():
    rng = random.Random(0)
    a, b = ([rng.getrandbits(32) for _ in range(64)] for _ in range(2))
    c = [rng.getrandbits(64) for _ in range(64)]
    x, y, z = np.array(a, np.uint32), np.array(b, np.uint32), np.array(c, np.uint64)
    assert result("mul.wide.u32", np.uint64, x, y).tolist() == [i * j for i, j in zip(a, b, strict=True)]
    wanted = [signed(i, 32) * signed(j, 32) % 2**64 for i, j in zip(a, b, strict=True)]
    assert result("mul.wide.s32", np.uint64, x, y).tolist() == wanted
    wanted = [(signed(i, 32) * signed(j, 32) + k) % 2**64 for i, j, k in zip(a, b, c, strict=True)]
    assert result("mad.wide.s32", np.uint64, x, y, z).tolist() == wanted
    selectors = np.array([rng.getrandbits(16) for _ in a], np.uint32)
    wanted = []
    for i, j, selector in zip(a, b, selectors.tolist(), strict=True):
        eight = i.to_bytes(4, "little") + j.to_bytes(4, "little")
        picked = [(eight[n % 8], n > 7) for n in (selector >> 4 * k & 15 for k in range(4))]
        wanted.append(bytes((255 if byte > 127 else 0) if sign else byte for byte, sign in picked))
    assert result("prmt.b32", np.uint32, x, y, selectors).tobytes() == b"".join(wanted)
    assert result("popc.b32", np.uint32, x).tolist() == [i.bit_count() for i in a]
    start, length = np.arange(64, dtype=np.uint32) % 26, np.arange(64, dtype=np.uint32) % 7 + 1
    wanted = [(i >> s) % 2**n for i, s, n in zip(a, start.tolist(), length.tolist(), strict=True)]
    assert result("bfe.u32", np.uint32, x, start, length).tolist() == wanted
    wanted = [signed(i, n) % 2**32 for i, n in zip(wanted, length.tolist(), strict=True)]
    assert result("bfe.s32", np.uint32, x, start, length).tolist() == wanted
    assert result("cvt.s64.s32", np.uint64, x).tolist() == [signed(i, 32) % 2**64 for i in a]
    assert result("cvt.u32.u64", np.uint32, z).tolist() == [k % 2**32 for k in c]
    wanted = [rounded(Fraction(signed(i, 32))) for i in a]
    assert result("cvt.rn.f32.s32", np.float32, x).tolist() == wanted


SPECIAL = [math.nan, -math.inf, -1.5, -0.0, 0.0, 2.0**-149, 1.0, math.inf]


HALVES_COMPARED = """
mad.wide.u32 %rd11, %r1, 4, %rd1;
mad.wide.u32 %rd12, %r1, 4, %rd2;
mad.wide.u32 %rd13, %r1, 2, %rd3;
mad.wide.u32 %rd14, %r1, 2, %rd4;
ld.global.b32 %r4, [%rd11];
ld.global.b32 %r5, [%rd12];
setp.lt.f16x2 %p1|%p2, %r4, %r5;
selp.b16 %rs1, 1, 0, %p1;
selp.b16 %rs2, 1, 0, %p2;
st.global.b16 [%rd13], %rs1;
st.global.b16 [%rd14], %rs2;
"""


def test_comparisons_with_nan_are_false_and_the_unordered_ones_true():
    a, b = (np.array(x, np.float32) for x in zip(*product(SPECIAL, SPECIAL), strict=True))
    holds = {"eq": lambda x, y: x == y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y}
    holds |= {"gt": lambda x, y: x > y, "ge": lambda x, y: x >= y}
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    for name, of in holds.items():
        assert result(f"setp.{name}.f32", np.bool_, a, b).tolist() == [of(x, y) for x, y in pairs]
        if name != "eq":
            wanted = [of(x, y) or x != x or y != y for x, y in pairs]
            assert result(f"setp.{name}u.f32", np.bool_, a, b).tolist() == wanted
    assert result("setp.neu.f32", np.bool_, a, b).tolist() == [x != y for x, y in pairs]
    assert result("setp.nan.f32", np.bool_, a, b).tolist() == [x != x or y != y for x, y in pairs]
    low, high = (np.float16(x).view(np.uint16).astype(np.uint32) for x in (a, b))
    pairs = np.zeros((2, 64), np.uint16)
    run(HALVES_COMPARED, [low | high << 16, high | low << 16, pairs[0], pairs[1]], 2)
    with np.errstate(over="ignore"):
        assert pairs[0].tolist() == (np.float16(a) < np.float16(b)).tolist()
        assert pairs[1].tolist() == (np.float16(b) < np.float16(a)).tolist()
    signs = np.array([1, 2**31], np.uint32)
    assert result("setp.lt.s32", np.bool_, signs, signs[::-1].copy()).tolist() == [False, True]
    assert result("setp.lt.u32", np.bool_, signs, signs[::-1].copy()).tolist() == [True, False]


def test_the_larger_of_nan_and_a_number_is_the_number_and_plus_0_is_larger_than_minus_0():
    a, b = (np.array(x, np.float32) for x in zip(*product(SPECIAL, SPECIAL), strict=True))
    for name, choose in (("max", max), ("min", min)):
        found = result(f"{name}.f32", np.float32, a, b).tolist()
        assert (
            result(f"{name}.f32", np.float32, a, b, a).view(np.uint32).tolist()
            == np.float32(found).view(np.uint32).tolist()
        )
        for x, *given in zip(found, a.tolist(), b.tolist(), strict=True):
            numbers = [g for g in given if g == g]
            assert x == choose(numbers) if numbers else x != x
            if numbers and x == 0:
                assert math.copysign(1, x) == choose(math.copysign(1, g) for g in numbers if g == 0)


def test_ex2_is_the_nearest_number_or_as_far_off_as_it_may_be_and_1_of_0():
    x = np.concatenate([np.linspace(-125, 127, 4000), np.linspace(-1, 1, 97)]).astype(np.float32)
    with mpmath.workprec(100):
        exact = [mpmath.power(2, float(v)) for v in x]
        nearest = [rounded(Fraction(int(mpmath.floor(v * 2**250)), 2**250)) for v in exact]
        assert result("ex2.approx.ftz.f32", np.float32, x).tolist() == nearest
        for error in (-(2.0**-22), 2.0**-22):
            found = result("ex2.approx.ftz.f32", np.float32, x, ex2_error=error)
            off = [float(f / e - 1) / error for f, e in zip(found.tolist(), exact, strict=True) if e != 1]
            assert min(off) > 0.7
            assert max(off) < 1.3
            assert found[x == 0].tolist() == [1.0]
    edges = np.array([-127, -math.inf, math.inf, -0.0, 2.0**-140], np.float32)
    assert result("ex2.approx.ftz.f32", np.float32, edges).tolist() == [0, 0, math.inf, 1, 1]


def test_registers_are_split_and_joined_and_moved_between_lanes():
    lanes = np.arange(32, dtype=np.uint32)
    found = np.zeros((8, 32), np.uint32)
    body = """
mad.wide.u32 %rd9, %r1, 4, %rd1;
mov.b32 %r4, 0x20001;
add.s32 %r5, %r1, %r4;
mov.b32 {%rs1, %rs2}, %r5;
mov.b32 %r6, {%rs2, %rs1};
st.global.b32 [%rd9], %r6;
shfl.sync.bfly.b32 %r7, %r1, 5, 31, -1;
st.global.b32 [%rd9+128], %r7;
xor.b32 %r8, %r1, 9;
shfl.sync.idx.b32 %r9, %r1, %r8, 31, -1;
st.global.b32 [%rd9+256], %r9;
mov.b32 %r10, -1;
redux.sync.add.s32 %r11, %r1, %r10;
st.global.b32 [%rd9+384], %r11;
setp.lt.u32 %p1, %r1, 7;
selp.b32 %r12, %r1, 100, %p1;
st.global.b32 [%rd9+512], %r12;
@!%p1 mov.b32 %r12, 3;
st.global.b32 [%rd9+640], %r12;
@%p1 bra $less;
mov.b32 %r13, 1;
bra.uni $end;
$less:
mov.b32 %r13, 2;
$end:
st.global.b32 [%rd9+768], %r13;
"""
    run(body, [found])
    assert found[0].tolist() == [(x + 1) << 16 | 2 for x in range(32)]
    assert found[1].tolist() == [x ^ 5 for x in range(32)]
    assert found[2].tolist() == [x ^ 9 for x in range(32)]
    assert found[3].tolist() == [sum(range(32))] * 32
    assert found[4].tolist() == np.where(lanes < 7, lanes, 100).tolist()
    assert found[5].tolist() == np.where(lanes < 7, lanes, 3).tolist()
    assert found[6].tolist() == [2] * 7 + [1] * 25


def test_matrices_of_halves_lie_in_shared_memory_by_rows_of_16_bytes():
    """Stored as a matrix, the rows last first, and read lane by lane; and the other way."""
    found = np.zeros((2, 32), np.uint32)
    body = """
mad.wide.u32 %rd9, %r1, 4, %rd1;
and.b32 %r4, %r1, 7;
mov.b32 %r5, 7;
sub.s32 %r5, %r5, %r4;
shl.b32 %r5, %r5, 4;
mov.b32 %r6, global_smem;
add.s32 %r7, %r6, %r5;
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r1};
bar.sync 0;
shl.b32 %r8, %r1, 2;
ld.shared.b32 %r9, [%r8];
st.global.b32 [%rd9], %r9;
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r7];
st.global.b32 [%rd9+128], %r10;
"""
    run(body, [found], shared=128)
    assert found[0].tolist() == [4 * (7 - i // 4) + i % 4 for i in range(32)]
    assert found[1].tolist() == list(range(32))


ADDRESS = "mad.wide.u32 %rd9, %r1, 4, %rd1;\n"
OWN = "mov.u32 %r4, %tid.x;\nshl.b32 %r4, %r4, 2;\n"
FAULTS = {
    "outside the tensor": (ADDRESS + "ld.global.b32 %r4, [%rd9+4];", "outside the tensor that others are in: 1 thread"),
    "outside all tensors": (ADDRESS + "ld.global.b32 %r4, [%rd9+4096];", "outside the tensors"),
    "before the tensor": (ADDRESS + "st.global.b32 [%rd9+-4], %r1;", "outside the tensor that others are in: 1 thread"),
    "between elements": (ADDRESS + "ld.global.b32 %r4, [%rd9+2];", "no multiple of 4"),
    "a vector between its multiples": (
        "mad.wide.u32 %rd9, %r1, 4, %rd1;\nld.global.v2.b32 {%r4, %r5}, [%rd9];",
        "no multiple of 8",
    ),
    "half an element": ("mad.wide.u32 %rd9, %r1, 2, %rd1;\nst.global.b16 [%rd9], 1;", "2 bytes of an element of 4"),
    "outside shared memory": ("shl.b32 %r4, %r1, 2;\nst.shared.b32 [%r4+64], %r1;", "outside the shared memory"),
    "two threads write one place": ("st.global.b32 [%rd1], 7;", "race"),
    "a program reads what another wrote": (
        ADDRESS + "st.global.b32 [%rd9], 7;\nbar.sync 0;\nxor.b32 %r4, %r1, 63;\n"
        "mad.wide.u32 %rd9, %r4, 4, %rd1;\nld.global.b32 %r5, [%rd9];",
        "race",
    ),
    "shared memory read in the same stretch": (
        OWN + "st.shared.b32 [%r4], %r1;\nxor.b32 %r5, %r4, 4;\nld.shared.b32 %r6, [%r5];",
        "race: another thread wrote this",
    ),
    "shared memory written while it is read": (
        OWN + "st.shared.b32 [%r4], %r1;\nbar.sync 0;\nxor.b32 %r5, %r4, 4;\nld.shared.b32 %r6, [%r4];\n"
        "st.shared.b32 [%r5], %r1;",
        "race: another thread reads",
    ),
    "different values for one place": ("mov.b32 %r4, 0;\nst.shared.b32 [%r4], %r1;", "race: threads write"),
    "shared memory nobody wrote": ("mov.b32 %r4, 0;\nld.shared.b32 %r5, [%r4];", "before it is written"),
    "a register nobody wrote": ("add.s32 %r4, %r5, 1;", "%r5 is read before it is written"),
    "a register that some wrote": (
        "setp.lt.u32 %p1, %r1, 9;\n@%p1 mov.b32 %r4, 1;\nadd.s32 %r5, %r4, 1;",
        "%r4 is read before it is written",
    ),
    "a barrier for some": ("setp.lt.u32 %p1, %r1, 9;\n@%p1 bra $there;\nbar.sync 0;\n$there:", "not all threads"),
    "a barrier after some left": ("setp.lt.u32 %p1, %r1, 9;\n@%p1 ret;\nbar.sync 0;", "not all threads"),
    "a shuffle for some": ("setp.lt.u32 %p1, %r1, 9;\n@%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "not all lanes"),
    "a shuffle within half a warp": ("shfl.sync.bfly.b32 %r4, %r1, 1, 0x1c1f, -1;", "a part of a warp"),
    "an unknown instruction": ("brev.b32 %r4, %r1;", r"unknown: brev.b32 %r4, %r1;"),
    "an operand too many": ("add.s32 %r4, %r1, %r1, %r1;", r"unknown: add.s32"),
    "an unknown register": ("add.s32 %r4, %clock, 1;", "%clock"),
    "division by zero": ("sub.s32 %r4, %r1, %r1;\ndiv.s32 %r5, %r1, %r4;", "division by zero"),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_names_itself_and_the_instruction(body, message):
    """Two programs of 32 threads, 128 bytes of shared memory and a tensor of 64 numbers, of which each has its own."""
    array = np.zeros(192, np.uint32)[64:128]
    with pytest.raises(ptx.Fault, match=message) as raised:
        run(body, [array], 2, shared=128)
    assert re.search(r"[a-z]+\.[\w.:]+ .*;", str(raised.value))


def test_what_those_faults_forbid_is_allowed_with_a_barrier_or_in_its_own_place():
    array = np.zeros(64, np.uint32)
    body = """
and.b32 %r9, %r1, 31;
shl.b32 %r4, %r9, 2;
st.shared.b32 [%r4], %r1;
bar.sync 0;
xor.b32 %r5, %r4, 4;
ld.shared.b32 %r6, [%r5];
bar.sync 0;
st.shared.b32 [%r5], %r6;
mad.wide.u32 %rd9, %r1, 4, %rd1;
st.global.b32 [%rd9], %r6;
bar.sync 0;
xor.b32 %r7, %r1, 3;
mad.wide.u32 %rd9, %r7, 4, %rd1;
ld.global.b32 %r8, [%rd9];
mov.b32 %r4, 0;
bar.sync 0;
st.shared.b32 [%r4], 5;
"""
    run(body, [array], 2, shared=128)
    assert array.tolist() == [i ^ 1 for i in range(64)]


triton = pytest.importorskip("triton", reason="no Triton on this machine")
import torch  # noqa: E402
from machines import emulated  # noqa: E402
from machines.emulated import Driver, tensor  # noqa: E402

from lace_loss.ext.torch import kernels, lace_loss  # noqa: E402


class Kept(Driver):
    """Runs nothing before it has kept what it would run it on."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def run(self, kernel, programs, arguments, shared):
        self.launches.append((kernel, programs, arguments, [copied(x) for x in arguments], shared))
        super().run(kernel, programs, arguments, shared)


def copied(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) if isinstance(x, torch.Tensor) else x


def outcome(kernel, programs, given, shared):
    """All tensors' bits after a run on copies, or None where it is a fault."""
    arguments = [copied(x) for x in given]
    try:
        kernel.run(programs, [tensor(x) for x in arguments], shared)
    except ptx.Fault:
        return None
    return [x.reshape(-1).view(torch.uint8) for x in arguments if isinstance(x, torch.Tensor)]


def changed(kernel, i, **changes):
    """The kernel with one of its instructions changed."""
    other = copy.copy(kernel)
    other.instructions = kernel.instructions.copy()
    other.instructions[i] = replace(kernel.instructions[i], **changes)
    return other


# So many samples that the last program has few: what keeps the others from memory is what is left out.
KERNELS = {
    "a batch in one program": ((5, 7), torch.float32, {}),
    "rows": ((257, 100), torch.bfloat16, {"reduction": "none"}),
    "rows with statistics": ((37, 20), torch.float32, {"statistics": True}),
    "long rows": ((3, 4104), torch.bfloat16, {}),
    "rows that begin between 16 bytes": ((3, 300), torch.float16, {}),
    "long rows that do": ((2, 4099), torch.float32, {}),
    "smoothed and weighted": ((9, 150), torch.float32, {"label_smoothing": 0.1, "weight": torch.ones(150)}),
    "planes": ((2, 5, 3, 7), torch.float32, {}),
}


_lines, _first = inspect.getsourcelines(kernels.store_own.fn)
STORE_OWN = range(_first, _first + len(_lines))


@pytest.fixture
def kept():
    with emulated.active(Kept()) as driver:
        yield driver


@pytest.mark.parametrize(("shape", "dtype", "options"), KERNELS.values(), ids=KERNELS.keys())
def test_no_barrier_and_no_guard_of_a_compiled_kernel_can_be_left_out_unseen(shape, dtype, options, kept):
    """Without a barrier there is a race, but where a thread writes the target's entry over its own, or nothing. Without
    what guards a store, or a load that leaves its tensor, there is a fault or another result. What guards another load,
    of the rows' statistics, only saves the reading.
    """
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    target.view(-1)[0] = -100
    loss = lace_loss(input, target, **options)
    (loss[0] if "statistics" in options else loss).sum().backward()
    barriers = guards = 0
    for kernel, programs, _, given, shared in kept.launches:
        intact = outcome(kernel, programs, given, shared)
        assert intact is not None
        for i, instruction in enumerate(kernel.instructions):
            if instruction.text.startswith("bar.sync"):
                without = outcome(changed(kernel, i, run=lambda machine: None), programs, given, shared)
                alone = len(shape) > 2
                assert without is None or (alone and int(instruction.source.split(":")[1]) in STORE_OWN), instruction
                barriers += without is None
            elif instruction.guard and instruction.run:
                without = outcome(changed(kernel, i, guard=""), programs, given, shared)
                seen = without is None or not all(map(torch.equal, without, intact))
                held_back = outcome(
                    changed(kernel, i, holds=not instruction.holds, run=refuse), programs, given, shared
                )
                guards += seen
                assert seen or held_back is not None or " ld." in instruction.text, instruction
    assert guards >= 8
    assert barriers >= 1 or len(shape) > 2


def refuse(machine):
    raise ptx.Fault("a thread is held back")
