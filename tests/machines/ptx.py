"""Run PTX, the instructions that Triton compiles kernels to, without a GPU: every thread at once, by NumPy.

    Kernel(text).run(programs, arguments, shared=bytes)

changes the arrays among the arguments as the kernel would on a GPU of compute capability 8.0 to 10.0, or raises a
`Fault` that names the instruction and the threads. Faults are what a GPU may pass over in silence:

* an address outside the tensors or the shared memory, one that is no multiple of what is moved, a part of an element;
* a race in shared memory: between two barriers, threads write different values to one place, or one writes what another
  reads; and in tensors two threads, of one program or several, that write to one place, or one that reads it after;
* a barrier that not all threads of its program reach together, a shuffle that not all lanes of its warp reach;
* a register, or a place in shared memory, that is read before it is written;
* an instruction that is not known here.

A register holds the bits of all threads, one array for each name. Of threads that parted those at the lowest place in
the text run, until they meet others: so they are together again wherever the program wants all of them.

Arithmetic is IEEE 754's, as PTX defines it. Not known here are the error of `div.full`, which is rounded correctly, and
what ptxas, the next compiler, fuses: `mul` and `add` may become one `fma`.
"""

import ctypes
import re
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

TYPES = {
    **{f"{t}{8 * size}": np.dtype(f"{kind}{size}") for t, kind in ("bu", "uu", "si") for size in (1, 2, 4, 8)},
    **{"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4")},
}
REGISTERS = {"%p": TYPES["pred"], "%rs": TYPES["b16"], "%r": TYPES["b32"], "%rd": TYPES["b64"]}
NOBODY, SEVERAL = -1, -2


class Fault(Exception): ...


# Bytes of this process that a kernel may use, in elements of `size` bytes.
Tensor = namedtuple("Tensor", "address bytes size")

# The instructions without memory: name -> types of result and operands, and a function of arrays of those types.
# In a type, T stands for the last part of the name and W for one twice as wide; ? is an operand that may be missing.
PLAIN = {}


def define(names, types, function):
    for name in names.split():
        t = name.rpartition(".")[2]
        wide = {"T": t, "T?": t + "?", "W": f"{t[0]}{2 * int(t[1:])}" if t[1:].isdigit() else ""}
        PLAIN[name] = [wide.get(x, x) for x in types.split()], function


def flushed(x):
    """Numbers of float32, those below the normal ones as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def fma(a, b, c):
    """a b + c of float32, rounded once: the sum of doubles, where it is not exact, is made odd before it is rounded."""
    product, c = np.float64(a) * b, np.float64(c)
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = np.atleast_1d(total).view(np.int64)
    even = (np.abs(lost) > 0) & (bits & 1 == 0)  # not of NaN
    away = (lost > 0) == (total > 0)
    return (bits + np.where(even, np.where(away, 1, -1), 0)).view(np.float64).astype(np.float32)


def extreme(larger):
    """The larger or smaller of two, of a number and NaN the number, and +0 larger than -0."""
    choose, sign = (np.fmax, np.bitwise_and) if larger else (np.fmin, np.bitwise_or)

    def of(a, b, *more):
        same = sign(a.view(np.uint32), b.view(np.uint32)).view(np.float32)
        chosen = np.where(a == b, same, choose(a, b))
        return of(chosen, *more) if more else chosen

    return of


def to_bfloat16(x):
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def shift(a, count, to_left):
    """By the width or more, it is by the width: nothing or, to the right, the sign is left."""
    width = 8 * a.dtype.itemsize
    count = np.asarray(count).astype(np.int64)
    beyond = np.zeros_like(a) if to_left or a.dtype.kind == "u" else a >> a.dtype.type(width - 1)
    by = np.minimum(count, width - 1).astype(a.dtype)
    return np.where(count < width, a << by if to_left else a >> by, beyond)


def field(a, start, length):
    """Of `length` bits, not none, which a has from `start` on; the highest is its sign if a has one."""
    return a << (32 - start - length).astype(a.dtype) >> (32 - length).astype(a.dtype)


def paired(function):
    """Of two numbers in one register each."""
    return lambda *given: function(*(x.view(np.float32) for x in given)).view(np.uint64)


def permuted(a, b, selectors):
    """Four of the eight bytes of a and b, each as it is or its sign eight times."""
    result, both = np.uint32(0), a.astype(np.uint64) | b.astype(np.uint64) << 32
    for i in range(0, 16, 4):
        byte = both >> (selectors >> i & 7) * 8 & 255
        result = result | np.where(selectors >> i & 8, (byte >> 7) * 255, byte).astype(np.uint32) << 2 * i
    return result


def quotient(a, b):
    if (b == 0).any():
        raise Fault("division by zero")
    return np.trunc(np.float64(a) / b).astype(np.int32)


def widened(function):
    """Of integers, for a result twice as wide."""
    return lambda a, b, *c: function(*(x.astype(f"{x.dtype.kind}{2 * x.dtype.itemsize}") for x in (a, b)), *c)


define("add.s16 add.s32 add.s64 add.f32 add.rn.f32", "T T T", np.add)
define("sub.s16 sub.s32 sub.s64 sub.f32 sub.rn.f32", "T T T", np.subtract)
define("mul.lo.s16 mul.lo.s32 mul.lo.s64 mul.f32 mul.rn.f32", "T T T", np.multiply)
define("mad.lo.s32 mad.lo.s64", "T T T T", lambda a, b, c: a * b + c)
define("mul.wide.s16 mul.wide.s32 mul.wide.u16 mul.wide.u32", "W T T", widened(np.multiply))
define("mad.wide.s32 mad.wide.u32", "W T T W", widened(lambda a, b, c: a * b + c))
define("div.s32", "T T T", quotient)
define("rem.s32", "T T T", lambda a, b: a - quotient(a, b) * b)
define("div.rn.f32 div.full.f32", "T T T", np.divide)
define("fma.rn.f32", "T T T T", fma)
define("sub.rn.f32.f16", "f32 f16 f32", lambda a, b: np.float32(a) - b)
define("sub.rn.f32.bf16", "f32 b16 f32", lambda a, b: from_bfloat16(a) - b)
for name, of_two in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
    define(f"{name}.f32x2", "b64 b64 b64", paired(of_two))
define("fma.rn.f32x2", "b64 b64 b64 b64", paired(fma))
define("fma.rn.ftz.f32", "T T T T", lambda *given: flushed(fma(*map(flushed, given))))
define("neg.f32 neg.s16 neg.s32 neg.s64", "T T", np.negative)
define("abs.f32", "T T", np.abs)
define("max.s16 max.u16 max.s32 max.u32 max.s64 max.u64", "T T T", np.maximum)
define("min.s16 min.u16 min.s32 min.u32 min.s64 min.u64", "T T T", np.minimum)
define("max.f32", "T T T T?", extreme(True))
define("min.f32", "T T T T?", extreme(False))
define("prmt.b32", "T T T T", permuted)
define("popc.b32", "u32 u32", lambda x: np.bitwise_count(x).astype(np.uint32))
define("and.pred and.b16 and.b32 and.b64", "T T T", np.bitwise_and)
define("or.pred or.b16 or.b32 or.b64", "T T T", np.bitwise_or)
define("xor.pred xor.b16 xor.b32 xor.b64", "T T T", np.bitwise_xor)
define("not.pred not.b16 not.b32 not.b64", "T T", np.invert)
define("shl.b16 shl.b32 shl.b64", "T T u32", lambda a, n: shift(a, n, True))
define("shr.s16 shr.u16 shr.s32 shr.u32 shr.s64 shr.u64", "T T u32", lambda a, n: shift(a, n, False))
define("bfe.u32 bfe.s32", "T T s32 s32", field)
define("selp.b16 selp.b32 selp.b64 selp.f32", "T T T pred", lambda a, b, p: np.where(p, a, b))
define("cvt.rn.f32.s32 cvt.rn.f32.u32", "f32 T", lambda x: x.astype(np.float32))
define("cvt.rmi.f32.f32", "f32 f32", np.floor)
define("cvt.rmi.ftz.f32.f32", "f32 f32", lambda x: np.floor(flushed(x)))
define("cvt.f32.f16", "f32 f16", np.float32)
define("cvt.f32.bf16", "f32 b16", from_bfloat16)
for name, to_half in {"f16": lambda x: np.float16(x).view(np.uint16), "bf16": to_bfloat16}.items():
    define(f"cvt.rn.{name}.f32", "b16 f32", to_half)
    define(f"cvt.rn.{name}x2.f32", "b32 f32 f32", lambda a, b, to=to_half: to(a).astype(np.uint32) << 16 | to(b))
for result in TYPES:
    for source in TYPES:
        if result[0] + source[0] in ("uu", "us", "su", "ss"):
            define(f"cvt.{result}.{source}", f"{result} {source}", lambda x, to=TYPES[result]: x.astype(to))
for name, compare, opposite in [
    ("eq", np.equal, np.not_equal), ("ne", np.not_equal, np.equal), ("lt", np.less, np.greater_equal),
    ("le", np.less_equal, np.greater), ("gt", np.greater, np.less_equal), ("ge", np.greater_equal, np.less),
]:  # fmt: skip
    define(" ".join(f"setp.{name}.{kind}{bits}" for kind in "bsu" for bits in (16, 32, 64)), "pred T T", compare)
    if name != "ne":  # false of NaN
        define(f"setp.{name}.f32 setp.{name}.f16", "pred T T", compare)
        define(f"setp.{name}.bf16", "pred b16 b16", lambda a, b, f=compare: f(*map(from_bfloat16, (a, b))))
    if name != "eq":  # true of NaN
        define(f"setp.{name}u.f32 setp.{name}u.f16", "pred T T", lambda a, b, f=opposite: ~f(a, b))
        define(f"setp.{name}u.bf16", "pred b16 b16", lambda a, b, f=opposite: ~f(*map(from_bfloat16, (a, b))))
define("setp.nan.f32", "pred T T", lambda a, b: np.isnan(a) | np.isnan(b))


class Memory:
    """A tensor, or the shared memory of all programs, in cells of `size` bytes: which thread wrote each and which read
    it, and after how many barriers.
    """

    def __init__(self, start, end, size, data=None):
        self.start, self.end, self.size, self.shared, self.writer = start, end, size, data is not None, None
        self.first = start // 16 * 16  # what is aligned in the tensor is aligned in these bytes, too
        if data is None:
            data = (ctypes.c_uint8 * (-(-end // 16) * 16 - self.first)).from_address(self.first)
        self.data = np.frombuffer(data, np.uint8)

    def cells(self, places, width):
        if width < self.size:
            raise Fault(f"{width} bytes of an element of {self.size}")
        if self.writer is None:
            self.writer, self.reader = np.full((2, len(self.data) // self.size), NOBODY, np.int32)
            self.written_at, self.read_at = np.zeros((2, len(self.writer)), np.int32)
        return places[:, None] // self.size + np.arange(width // self.size)

    def load(self, machine, places, dtype):
        if self.shared or self.writer is not None:
            cells = self.cells(places, dtype.itemsize)
            if self.shared:
                machine.refuse(self.writer[cells] == NOBODY, "shared memory is read before it is written")
            by_another = machine.by_another(self.writer[cells], self.written_at[cells])
            machine.refuse(by_another, "a race: another thread wrote this")
        if self.shared:
            mine, now = machine.threads[:, None], machine.barriers[machine.program][:, None]
            before = np.where(self.read_at[cells] == now, self.reader[cells], NOBODY)
            self.reader[cells] = np.where((before == NOBODY) | (before == mine), mine, SEVERAL)
            self.reader[cells[self.reader[cells] != mine]] = SEVERAL  # in the same instruction
            self.read_at[cells] = now
        return self.data.view(dtype)[places // dtype.itemsize]

    def store(self, machine, places, values):
        view, index = self.data.view(values.dtype), places // values.itemsize
        cells, mine = self.cells(places, values.itemsize), machine.threads[:, None]
        wrote = machine.by_another(self.writer[cells], self.written_at[cells])
        if self.shared:  # where threads that have one value between them may all write it
            wrote &= (view[index] != values)[:, None]
            read = machine.by_another(self.reader[cells], self.read_at[cells])
            machine.refuse(read, "a race: another thread reads what is here")
        machine.refuse(wrote, "a race: another thread wrote here")
        view[index] = values
        self.writer[cells], self.written_at[cells] = mine, machine.barriers[machine.program][:, None]
        together = view[index] != values if self.shared else self.writer[cells] != mine
        machine.refuse(together, "a race: threads write to one place")


class Machine:
    """All threads of a launch: registers, memories, and the threads that are active, as an index of all."""

    def __init__(self, programs, block, arguments, shared, ex2_error):
        self.block, self.arguments, self.ex2_error = block, arguments, ex2_error
        self.all = np.arange(programs * block, dtype=np.int32)
        self.barriers = np.zeros(programs, np.int32)  # that its threads have passed
        self.registers, self.known = {}, {}
        self.shared_bytes = -(-shared // 16) * 16
        self.shared = Memory(0, programs * self.shared_bytes, 1, bytearray(programs * self.shared_bytes))
        given = [x for x in arguments if isinstance(x, Tensor) and x.bytes]
        self.tensors = [Memory(x.address, x.address + x.bytes, x.size) for x in given]
        self.activate(slice(None))

    def activate(self, which):
        self.active, self.threads = which, self.all[which]
        self.program = self.threads // self.block

    def refuse(self, wrong, why):
        if wrong.any():
            bad = self.threads[wrong.reshape(len(wrong), -1).any(1)].tolist()
            some = ", ".join(f"{t % self.block} of program {t // self.block}" for t in bad[:3])
            raise Fault(f"{why}: {len(bad)} threads, among them {some}")

    def by_another(self, threads, at):
        """Of what `threads` did after `at` barriers, what another one than each did, with no barrier in between."""
        mine, program = self.threads[:, None], self.program[:, None]
        elsewhere = (threads // self.block != program) & (threads != SEVERAL)
        return (threads != NOBODY) & (threads != mine) & (elsewhere | (at == self.barriers[program]))

    def read(self, name):
        known = self.known.get(name)
        if known is None or (known is not True and not known[self.active].all()):
            raise Fault(f"{name} is read before it is written")
        return self.registers[name][self.active]

    def value(self, text, kind):
        """Of an operand, as a type: a register's bits, the low ones if it is wider, or a number."""
        dtype = TYPES[kind]
        if not text.startswith("%"):
            return number(text, dtype)
        bits = self.read(text)
        return (bits.astype(f"u{dtype.itemsize}") if bits.itemsize > dtype.itemsize else bits).view(dtype)

    def address(self, text):
        base, add = address(text)
        return self.read(base) + add if base != "global_smem" else np.full(len(self.threads), add)

    def write(self, name, value):
        """Its bits; those of a narrower integer are extended, by its sign if it has one."""
        to, value = register(name), np.asarray(value)
        if value.itemsize == to.itemsize:
            value = value.view(to)
        else:
            value = (value.view(f"u{value.itemsize}") if value.dtype.kind == "f" else value).astype(to)
        if len(self.threads) == len(self.all):
            self.registers[name] = value if value.ndim else np.full(len(self.all), value)
            self.known[name] = True
            return
        before = self.registers.get(name)
        after = np.zeros(len(self.all), to) if before is None else before.copy()  # it may be another's array, too
        after[self.active] = value
        self.registers[name] = after
        known = self.known.setdefault(name, np.zeros(len(self.all), bool))
        if known is not True:
            known[self.active] = True

    def by_warps(self, values):
        """A row a warp, of which all lanes must be here."""
        whole = len(self.threads) % 32 == 0
        if not whole or (self.threads.reshape(-1, 32) != self.threads[::32, None] // 32 * 32 + np.arange(32)).any():
            raise Fault("not all lanes of a warp come here together")
        return np.broadcast_to(values, len(self.threads)).reshape(-1, 32)

    def synchronize(self):
        count = np.bincount(self.program, minlength=len(self.barriers))
        if ((count > 0) & (count < self.block)).any():
            raise Fault("not all threads of a program come to this barrier together")
        self.barriers[count > 0] += 1

    def find(self, space, addresses, width):
        """The memory that is meant, and the bytes' places in it."""
        self.refuse(addresses % width != 0, f"addresses that are no multiple of {width}")
        addresses = addresses.astype(np.int64)
        if space == "shared":
            self.refuse(addresses + width > self.shared_bytes, "an address outside the shared memory")
            return self.shared, addresses + np.int64(self.shared_bytes) * self.program
        for memory in self.tensors:
            outside = (addresses < memory.start) | (addresses + width > memory.end)
            if not outside.all():
                self.refuse(outside, "an address outside the tensor that others are in")
                return memory, addresses - memory.first
        raise Fault("an address outside the tensors")


@cache
def register(name):
    prefix = name.rstrip("0123456789")
    if prefix not in REGISTERS or prefix == name:
        raise Fault(f"{name} is not known here")
    return REGISTERS[prefix]


@cache
def number(text, dtype):
    if dtype.kind == "b":
        return np.bool_(int(text))
    if text.startswith("0f"):
        return np.uint32(int(text[2:], 16)).view(dtype)
    bits = int(text.rstrip("U").replace("global_smem", "0"), 0) % (1 << 8 * dtype.itemsize)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]


@cache
def address(text):
    """Of [register + number] both; a name, global_smem, is at 0."""
    base, add = re.fullmatch(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\d+)\s*)?\]", text).groups()
    return base, np.array(int(add or 0)).astype(np.uint32 if base == "global_smem" else register(base))


@cache
def several(text):
    return re.findall(r"[^\s,{}]+", text)


# What runs the instructions with an effect beyond a result: of the machine, operands' texts and a match of the name.
SPECIAL = {}


PLACES = {"%tid.x": lambda m: m.threads % m.block, "%ctaid.x": lambda m: m.program}


@partial(SPECIAL.setdefault, r"mov\.([bu]\d+|pred)")
def _(m, to, value, name):
    """Two halves may be joined, or a register split."""
    whole = TYPES[name[1]]
    half = 4 * whole.itemsize
    if "{" in value:
        # A half that nobody wrote, which some code for two numbers never uses, would be seen as NaN.
        low, high = (m.value(x if x in m.known else "-1", f"b{half}").astype(whole) for x in several(value))
        bits = low | high << half
    else:
        bits = PLACES[value](m) if value in PLACES else m.value(value, name[1])
    for i, part in enumerate(several(to)):
        if part != "_":
            m.write(part, (bits >> half * i).astype(TYPES[f"b{half}"]) if "{" in to else bits)


@partial(SPECIAL.setdefault, r"setp\.(\w+)\.(b?f16)x2")
def _(m, to, a, b, name):
    """A predicate for each of two halves, the low one first."""
    (_, kind, _), compare = PLAIN[f"setp.{name[1]}.{name[2]}"]
    for i, part in enumerate(to.split("|")):
        m.write(part, compare(*((m.value(x, "b32") >> 16 * i).astype("u2").view(TYPES[kind]) for x in (a, b))))


@partial(SPECIAL.setdefault, r"ex2\.approx\.ftz\.f32")
def _(m, to, value, name):
    """Of 0 it is 1, and elsewhere within 2^-22: as far off as the machine is told."""
    x = flushed(m.value(value, "f32"))
    found = np.where(x == 0, 1, np.exp2(np.float64(x)) * (1 + m.ex2_error))
    m.write(to, flushed(found.astype(np.float32)))


@partial(SPECIAL.setdefault, r"ld\.param\.([bsuf]\d+)")
def _(m, to, place, name):
    value, dtype = m.arguments[int(re.fullmatch(r"\[\w+_param_(\d+)\]", place)[1])], TYPES[name[1]]
    if isinstance(value, float):
        value = int(np.float32(value).view(np.uint32))
    elif isinstance(value, Tensor):
        value = value.address
    m.write(to, number(str(value), dtype))


@partial(SPECIAL.setdefault, r"ld\.(global|shared)(?:\.v[24])?\.([bsu]\d+)")
def _(m, to, place, name):
    dtype, parts = TYPES[name[2]], several(to)
    memory, places = m.find(name[1], m.address(place), dtype.itemsize * len(parts))
    for i, part in enumerate(parts):
        m.write(part, memory.load(m, places + i * dtype.itemsize, dtype))


@partial(SPECIAL.setdefault, r"st\.(global|shared)(?:::cta)?(?:\.v[24])?\.([bsu]\d+)")
def _(m, place, values, name):
    width, parts = TYPES[name[2]].itemsize, several(values)
    memory, places = m.find(name[1], m.address(place), width * len(parts))
    for i, part in enumerate(parts):
        memory.store(m, places + i * width, np.broadcast_to(m.value(part, name[2]), len(m.threads)))


@partial(SPECIAL.setdefault, r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124]\.shared\.b16")
def _(m, *operands, name):
    """Lane 8 k + i has the address of row i of matrix k, of eight halves, and lane l two of them of row l // 4."""
    place, parts = operands if name[1] == "st" else operands[::-1]
    rows, lane = m.by_warps(m.address(place)), np.arange(32, dtype=np.uint32)
    for k, part in enumerate(several(parts)):
        memory, places = m.find("shared", (rows[:, 8 * k + lane // 4] + lane % 4 * 4).reshape(-1), 4)
        if name[1] == "st":
            memory.store(m, places, m.value(part, "b32"))
        else:
            m.write(part, memory.load(m, places, TYPES["b32"]))


@partial(SPECIAL.setdefault, r"shfl\.sync\.(bfly|idx)\.b32")
def _(m, to, value, lane, clamp, members, name):
    if (clamp, members) != ("31", "-1"):
        raise Fault("a shuffle of a part of a warp")
    lanes = m.by_warps(m.value(lane, "b32"))
    lanes = lanes ^ np.arange(32, dtype=np.uint32) if name[1] == "bfly" else lanes
    m.write(to, np.take_along_axis(m.by_warps(m.value(value, "b32")), lanes & 31, 1).reshape(-1))


@partial(SPECIAL.setdefault, r"redux\.sync\.(?:add\.(s32)|max\.(f32))")
def _(m, to, value, members, name):
    if (m.value(members, "s32") != -1).any():
        raise Fault("a reduction of a part of a warp")
    warps = m.by_warps(m.value(value, name[1] or name[2]))
    m.write(to, (np.add if name[1] else np.fmax).reduce(warps, axis=1, dtype=warps.dtype).repeat(32))


@partial(SPECIAL.setdefault, r"bar\.(warp\.)?sync")
def _(m, barrier, name):
    if barrier != ("-1" if name[1] else "0") or (name[1] and m.block > 32):
        raise Fault("a barrier of other threads than all")
    m.synchronize()


@dataclass
class Instruction:
    text: str
    source: str
    guard: str  # a predicate's name, or nothing
    holds: bool  # what it must be for a thread to run this
    run: Callable | None  # None: a branch
    target: str  # to this label


def decoded(text, source):
    match = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*);", text)
    negated, guard, name, rest = match.groups() if match else ("", "", "", "")
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", rest)
    run = next((partial(run, name=found) for x, run in SPECIAL.items() if (found := re.fullmatch(x, name))), None)
    if name in PLAIN:
        (_, *kinds), function = PLAIN[name]
        kinds = [kind.rstrip("?") for i, kind in enumerate(kinds, 1) if i < len(operands) or kind[-1] != "?"]
        if len(operands) == 1 + len(kinds):
            run = partial(plain, kinds=kinds, function=function)
    elif name in ("bra", "bra.uni", "ret"):
        return Instruction(text, source, guard, not negated, None, operands[0] if operands else "end")
    if not run:
        raise Fault(f"unknown: {text}")
    return Instruction(text, source, guard, not negated, lambda machine: run(machine, *operands), "")


def plain(machine, to, *operands, kinds, function):
    machine.write(to, function(*map(machine.value, operands, kinds)))


class Kernel:
    """What a PTX text of one kernel says."""

    def __init__(self, text):
        self.block = int(re.search(r"\.reqntid (\d+)", text)[1])
        body = text[text.index("{", text.index(".reqntid")) + 1 : text.index("\n}")]
        self.instructions, self.labels, source = [], {}, ""
        for line in body.split("\n"):
            statement, _, comment = line.strip().partition("//")
            statement = statement.strip()
            if statement.startswith(".loc"):
                source = comment.strip()
            elif match := re.fullmatch(r"(\$\w+):", statement):
                self.labels[match[1]] = len(self.instructions)
            elif statement and not statement.startswith((".reg", ".pragma")):
                self.instructions.append(decoded(statement, source))
        self.labels["end"] = len(self.instructions)

    def run(self, programs, arguments, shared=0, ex2_error=0.0):
        """`ex2_error`, relative, of every `ex2.approx`: up to 2^-22 is the architecture's promise."""
        machine = Machine(programs, self.block, arguments, shared, ex2_error)
        place, end = np.zeros(len(machine.all), np.int64), len(self.instructions)
        with np.errstate(all="ignore"):
            while (here := place.min(initial=end)) < end:
                chosen = place == here
                machine.activate(slice(None) if chosen.all() else np.flatnonzero(chosen))
                meet = place.min(where=~chosen, initial=end)
                self.straight(machine, place, int(here), int(meet))

    def straight(self, machine, place, here, meet):
        """From `here` to a branch or to where others wait."""
        everyone = machine.active
        while here < meet:
            instruction = self.instructions[here]
            here += 1
            try:
                if instruction.guard:
                    holds = machine.read(instruction.guard) == instruction.holds
                    if not holds.all():
                        machine.activate(machine.threads[holds])
                if instruction.run is None:
                    place[everyone] = here
                    place[machine.active] = self.labels[instruction.target]
                    return
                if len(machine.threads):
                    instruction.run(machine)
            except (Fault, TypeError, ValueError, AttributeError) as error:
                raise Fault(f"{error}: {instruction.text} ({instruction.source})") from error
            if machine.active is not everyone:
                machine.activate(everyone)
        place[everyone] = here
