"""The loss on a GPU: the Triton kernels, which `gpu.py` launches.

Logits are read where they lie: in rows (classes side by side) or in planes (the samples of an image side by side, as in
(N, C, H, W)). The forward pass reads them once and leaves three floats a sample, from which the backward pass forms the
gradient in one more reading. With m the largest logit but the target's and S = sum exp(z_j - m), j != t:

    d = m - z_t    e = exp(-|d|)    r = 1 - q_t, q_t and q = exp(0) / sum, the probability of a logit of m,
    are S e, 1 and e over their sum where the target leads, S, e and 1 elsewhere;  n = log1p(S e) or d + log(S + e)
    dL/dz_j = K q exp(z_j - m), j != t                       dL/dz_t = -K r

What rounding takes from z - m and from its product with log2 e is put back: 87 / 2 ulp would be missing otherwise.
The sum is of exp(z_j - o), o a multiple of 32 near the m of its time, and keeps what its own roundings take: adding 64
equal blocks one after the other cost the loss up to 93 ulp. Nothing here waits for the device or depends on how
programs are scheduled: the same bits in every run. Everything is float32.
"""

import triton
import triton.language as tl

from .gpu_math import exp, exp_of_row, exp_to_add, log1p, loss_and_slope, origin_near, plus, weighted

__all__ = ["backward", "forward", "store_own", "trial"]


@triton.jit
def _samples_of(block, samples, C: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr):
    """Of one block of BM: which of all samples, which exist, and where their first logits are."""
    blocks = tl.cdiv(samples, BM)
    plane = (block // blocks).to(tl.int64)
    p = block % blocks * BM + tl.arange(0, BM)
    start = plane * samples * C + p if ROW == 0 else p.to(tl.int64) * ROW
    return plane * samples + p, p < samples, start


@triton.jit
def _class_of(target, sample, exists, ignore_index, C: tl.constexpr):
    """The class, -1 where there is none; whether the sample counts, and whether its class is no class."""
    given = tl.load(target + sample, mask=exists, other=0).to(tl.int64)
    counts, known = exists & (given != ignore_index), (given >= 0) & (given < C)
    return tl.where(counts & known, given.to(tl.int32), -1), counts, counts & (known == 0)


@triton.jit
def _tile(first, start, samples, C: tl.constexpr, ROW: tl.constexpr, BC: tl.constexpr, V: tl.constexpr):
    """Of BC columns: their classes, which exist, which to load, which to store 16 bytes at a time, and where they are.

    A row that begins between multiples of V logits (C = 50,257) is read from the multiple before it. Its masks are
    alike for V logits side by side, or they would not be one load of 16 bytes, which may reach over the row's ends.
    """
    i = first + tl.arange(0, BC)[None, :]
    if ROW == 0:
        return i, i < C, i < C, i < C, start[:, None] + i.to(tl.int64) * samples
    elif V == 1:
        return i, i < C, i < C, i < C, start[:, None] + i
    else:
        before = start % V
        shift, group = before.to(tl.int32)[:, None], i // V * V
        j, whole = i - shift, (group >= shift) & (group + V <= C + shift)
        return j, (j >= 0) & (j < C), group < C + shift, whole, tl.multiple_of(start - before, V)[:, None] + i


@triton.jit
def _load(z, exists, counts, first, start, ends, samples, C, ROW: tl.constexpr, BC: tl.constexpr, V: tl.constexpr):
    """The logits of BC columns in float32, their classes, and which exist. Ignored rows are not read; of planes they
    are, in the same 16 bytes as others, and count as -inf. The last row is read one logit at a time, for 16 bytes may
    reach over the end of all: `ends` where it is among these.
    """
    j, inside, near, _, place = _tile(first, start, samples, C, ROW, BC, V)
    wanted = (exists if ROW == 0 else counts)[:, None]
    if V > 1:
        x = tl.load(z + place, mask=near & (wanted & (ends == 0)), other=float("-inf")).to(tl.float32)
        if ends:
            x = tl.load(z + place, mask=inside & wanted, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(z + place, mask=near & wanted, other=float("-inf")).to(tl.float32)
    if ROW == 0:
        x = tl.where(counts[:, None], x, float("-inf"))
    return x, j, inside


@triton.jit
def _add(m, total, lost, ahead, x, z_t, before, others, WIDE: tl.constexpr):
    """The largest other logit, the sum of exponentials relative to its origin, and the rank, with those of x. Classes
    `before` the target's are ahead of it if they tie; it is None where nobody asks for the rank.
    """
    if before is not None:
        counted = tl.where(before, x < z_t[:, None], x <= z_t[:, None]) == 0  # NaN, too
        if others is not None:
            counted &= others
        ahead += tl.sum(counted.to(tl.int32), 1)
    larger = tl.maximum(m, tl.max(x, 1))
    origin = tl.where(larger == float("-inf"), 0.0, origin_near(larger))
    moved = exp(origin_near(m), origin, 0, True)
    total, lost = plus(total * moved, lost * moved, exp_to_add(x, origin[:, None], WIDE))
    return larger, total, lost, ahead


@triton.jit
def _others(
    z, t, z_t, exists, counts, start, ends, samples,
    C: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr,
    WIDE: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """The largest logit of other classes than the target's, the sum of their exponentials relative to its origin in two
    parts, and the rank.

    Of one row in several blocks most are whole and without the target: they are read first, and no logit is asked for
    its class, which would be a quarter of the instructions. Then come the first block, the last and the target's.
    """
    m, s, lost = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    ahead = tl.zeros([BM], tl.int32)
    BLOCKS: tl.constexpr = (C + V - 1 + BC - 1) // BC
    FIRST: tl.constexpr = 1 if V > 1 else 0  # that is whole, and the first that is not
    WHOLE: tl.constexpr = C // BC
    steps = BLOCKS
    own, inner = 0, 0
    if BM == 1 and WHOLE - FIRST > 1:
        own = tl.max(tl.where(t < 0, -1, (t + (start % V).to(tl.int32)) // BC), 0)
        inner = ((own >= FIRST) & (own < WHOLE)).to(tl.int32)
        base = start - start % V
        for n in range(FIRST, tl.where(own < 0, FIRST, WHOLE - inner)):
            k = n + inner * (n >= own).to(tl.int32)
            place = tl.multiple_of(base, V)[:, None] + (k * BC + tl.arange(0, BC)[None, :])
            x = tl.load(z + place).to(tl.float32)
            m, s, lost, ahead = _add(m, s, lost, ahead, x, z_t, k < own if RANKED else None, None, WIDE)
        steps = FIRST + BLOCKS - WHOLE + inner
    for n in range(0, steps):
        k = n
        if BM == 1 and WHOLE - FIRST > 1:
            k = tl.where(n < FIRST, n, n - FIRST + WHOLE)
            k = tl.where(k == BLOCKS, own, k)
        x, j, inside = _load(z, exists, counts, k * BC, start, ends, samples, C, ROW, BC, V)
        others = inside & (j != t[:, None])
        x = tl.where(others, x, float("-inf"))
        m, s, lost, ahead = _add(m, s, lost, ahead, x, z_t, j < t[:, None] if RANKED else None, others, WIDE)
    return m, s, lost, ahead


@triton.jit
def _row(z_t, m, total, lost):
    """Of a sample whose largest other logit is about m: m, r, q, n, the probability of a logit of m and its -log. r and
    that probability are also given 2^24 times as large.
    """
    m = tl.where(m == float("-inf"), z_t, m)  # no other class is left
    d = tl.where(z_t == float("inf"), float("nan"), m - z_t)
    leads, top = d <= 0, tl.maximum(m, z_t)
    high, low = exp_of_row(tl.minimum(m, z_t), top)
    e = tl.where(d != d, d, high + low)
    high, low = exp_of_row(origin_near(m), top)
    r = tl.fma(total, high, tl.fma(total, low, lost * high))
    q = tl.where(leads, 1.0, e * 2.0**-64)
    both = r * 2.0**-64 + q
    log = tl.where(leads, log1p(r * 2.0**-64), tl.log(both))
    r, q = tl.div_rn(r * 2.0**-40, both), tl.div_rn(q, both)
    q_m = tl.div_rn(tl.where(leads, e * 2.0**-40, 2.0**24), both)
    n, n_m = log + tl.where(leads, 0.0, d), log + tl.where(leads, -d, 0.0)
    return m, r * 2.0**-24, r, q, n, q_m * 2.0**-24, q_m, n_m


@triton.jit
def _gradient(x, m, a, WIDE: tl.constexpr):
    """a exp(x - m), for an a that is 2^24 times as large."""
    return exp(x, m[:, None], 40, WIDE) * a[:, None] * 2.0**-64


@triton.jit
def _smoothed_gradient(x, w, m, q_m, n_m, first, last, only, g_only, spread, strength, rest):
    """q_j sum a K - a_j K_j, and g_only for the largest logit but the target's if it is the only one; all times the
    gradient's factor. (2^40 q first) last is the first term, whose digits an underflow of q would take.
    """
    raised = exp(x, m[:, None], 40, True) * q_m[:, None]
    q = raised * 2.0**-40
    _, k = loss_and_slope(1.0 - q, q, m[:, None] - x + n_m[:, None], strength, rest)
    value = raised * first[:, None] * last[:, None] - spread[:, None] * w * k
    return tl.where(x == only[:, None], g_only[:, None], value)


@triton.jit
def _store(
    gradient, value, first, start, to, exists, samples,
    C, ROW: tl.constexpr, GRADIENT_ROW: tl.constexpr, BC: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """16 bytes at a time where the gradient lies as the logits do."""
    j, inside, _, whole, place = _tile(first, start, samples, C, ROW, BC, V)
    value = value.to(gradient.dtype.element_ty)
    if V == 1 or ROW != GRADIENT_ROW:
        place = to[:, None] + (j.to(tl.int64) * samples if ROW == 0 else j)
        tl.store(gradient + place, value, mask=inside & exists[:, None])
    else:
        tl.store(gradient + place, value, mask=whole & exists[:, None])
        if (first == 0) | (first + BC > C - V):
            tl.store(gradient + place, value, mask=inside & (whole == 0) & exists[:, None])


@triton.jit
def store_own(gradient, g, t, to, mine, samples, ROW: tl.constexpr):
    """The target's entry, after those of all classes: to choose in each is a quarter of the instructions."""
    tl.debug_barrier()
    place = to + (t.to(tl.int64) * samples if ROW == 0 else t)
    tl.store(gradient + place, g.to(gradient.dtype.element_ty), mask=mine & (t >= 0))


@triton.jit(do_not_specialize=["ignore_index"])
def forward(
    z, target, weight, loss, weights, rows, cross_entropy, probability, rank,
    samples, total, ignore_index, strength, rest, smoothing,
    C: tl.constexpr, ROW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, V: tl.constexpr,
    SMOOTHED: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """Losses and weights of the samples or, with all in one program, their sum or mean; what `rows` keeps for the
    backward pass; statistics.
    """
    WIDE: tl.constexpr = z.dtype.element_ty == tl.float32
    sample, exists, start = _samples_of(tl.program_id(0), samples, C, ROW, BM)
    ends = tl.program_id(0) == tl.cdiv(samples, BM) - 1
    t, counts, wrong = _class_of(target, sample, exists, ignore_index, C)
    known = tl.maximum(t, 0)
    to_class = start + (known.to(tl.int64) * samples if ROW == 0 else known)
    z_t = tl.load(z + to_class, mask=t >= 0, other=0.0).to(tl.float32)
    w = tl.full([BM], 1.0, tl.float32) if weight is None else tl.load(weight + known)

    m, s, lost, ahead = _others(
        z, t, z_t, exists, counts, start, ends, samples, C, ROW, BM, BC, V, WIDE, rank is not None
    )
    if not (WIDE or SMOOTHED):
        m = tl.where(tl.abs(m) < 1 / 64, 0.0, m)  # for _split_exp; any m near the largest logit would do
    m, r, raised_r, q, n, q_m, raised_q_m, n_m = _row(z_t, m, s, lost)
    f, k_t = loss_and_slope(r, q, n, strength, rest)
    # Up to 2^-41 n is r. (1 - s + s r) r is formed with the weight before it is rounded to a subnormal number.
    tiny = raised_r < 2.0**-17
    of_sample = tl.where(tiny, (rest + strength * r) * raised_r * w * 2.0**-24, weighted(w, f))

    if SMOOTHED:
        # The classes that are neither the target nor tied for m have q <= 1/2 and 1 - q by subtraction.
        less, tied, w_m = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.int32), tl.zeros([BM], tl.float32)
        f_less, k_less = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        lost, f_lost, k_lost = less, less, less
        for first in range(0, C + V - 1, BC):
            x, j, inside = _load(z, exists, counts, first, start, ends, samples, C, ROW, BC, V)
            others = inside & (j != t[:, None])
            w_j = _class_weights(weight, j, C)
            e = exp(x, m[:, None], 0, True)
            q_j = e * q_m[:, None]
            f_j, k_j = loss_and_slope(1.0 - q_j, q_j, m[:, None] - x + n_m[:, None], strength, rest)
            below, at = others & (x < m[:, None]), others & (x == m[:, None])
            less, lost = plus(less, lost, tl.where(below, e, 0.0))
            tied += tl.sum(at.to(tl.int32), 1)
            w_m += tl.sum(tl.where(at, w_j, 0.0), 1)
            f_less, f_lost = plus(f_less, f_lost, tl.where(below, weighted(w_j, f_j), 0.0))
            k_less, k_lost = plus(k_less, k_lost, tl.where(below, w_j * k_j, 0.0))
        less, f_less, k_less = less + lost, f_less + f_lost, k_less + k_lost
        r_m = tl.fma(less + (tied - 1).to(tl.float32), q_m, q)
        f_m, k_m = loss_and_slope(r_m, q_m, n_m, strength, rest)
        spread = smoothing / C
        of_sample = (1.0 - smoothing) * of_sample + spread * (of_sample + weighted(w_m, f_m) + f_less)
        own, of_m, of_less = ((1.0 - smoothing) + spread) * w * k_t, spread * w_m * k_m, spread * k_less

    bad = tl.where(wrong, float("nan"), 1.0)
    of_sample = tl.where(counts, of_sample * bad, 0.0)
    w = tl.where(counts, w, 0.0)
    if REDUCED == "none":
        tl.store(loss + sample, of_sample, mask=exists)
        if weights is not None:
            tl.store(weights + sample, w, mask=exists)
    elif REDUCED == "sum":
        tl.store(loss, tl.sum(of_sample, 0))
    else:
        by = tl.sum(w, 0)
        tl.store(loss, tl.div_rn(tl.sum(of_sample, 0), by))
        tl.store(weights, by)
    if rows is not None:
        rows += sample  # and on by `total`, of which a multiple may not fit in 32 bits
        rows = _keep(rows, m, total, exists)
        if SMOOTHED:
            rows = _keep(rows, q_m * bad, total, exists)
            rows = _keep(rows, n_m, total, exists)
            rows = _keep(rows, (own + of_m + of_less) * bad, total, exists)
            rows = _keep(rows, (q * (of_m + of_less) - r * own) * bad, total, exists)
            rows = _keep(rows, tl.where(tied == 1, m, float("inf")), total, exists)
            _keep(rows, (q_m * (own + of_less) - r_m * of_m) * bad, total, exists)
        else:
            rows = _keep(rows, w * k_t * raised_q_m * bad, total, exists)
            _keep(rows, -w * k_t * raised_r * bad, total, exists)
    if rank is not None:
        tl.store(cross_entropy + sample, tl.where(counts, n * bad, 0.0), mask=exists)
        tl.store(probability + sample, tl.where(counts, q * bad, 0.0), mask=exists)
        tl.store(rank + sample, tl.where(counts & (wrong == 0), ahead, C).to(tl.int64), mask=exists)


@triton.jit
def _class_weights(weight, j, C: tl.constexpr):
    if weight is None:
        return tl.full([1, 1], 1.0, tl.float32)
    else:
        return tl.load(weight + j, mask=(j >= 0) & (j < C), other=0.0)


@triton.jit
def _keep(rows, value, total, exists):
    tl.store(rows, value, mask=exists)
    return rows + total


@triton.jit
def _next(rows, total, exists):
    return tl.load(rows, mask=exists, other=0.0), rows + total


@triton.jit(do_not_specialize=["ignore_index"])
def backward(
    gradient, grad_output, z, target, weight, rows, divisor,
    samples, total, splits: tl.constexpr, ignore_index, strength, rest, smoothing,
    C: tl.constexpr, ROW: tl.constexpr, GRADIENT_ROW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    V: tl.constexpr, SMOOTHED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The gradient, from `rows`."""
    WIDE: tl.constexpr = z.dtype.element_ty == tl.float32
    sample, exists, start = _samples_of(tl.program_id(0) // splits, samples, C, ROW, BM)
    ends = tl.program_id(0) // splits == tl.cdiv(samples, BM) - 1
    _, _, to = _samples_of(tl.program_id(0) // splits, samples, C, GRADIENT_ROW, BM)
    t, counts, _ = _class_of(target, sample, exists, ignore_index, C)
    scale = tl.load(grad_output + sample, mask=exists, other=0.0) if EACH else tl.load(grad_output)
    scale = tl.where(counts, scale.to(tl.float32), 0.0)
    if divisor is not None:
        scale = tl.div_rn(scale, tl.load(divisor))
    rows += sample
    m, rows = _next(rows, total, exists)
    if SMOOTHED:
        q_m, rows = _next(rows, total, exists)
        n_m, rows = _next(rows, total, exists)
        factors, rows = _next(rows, total, exists)
        g, rows = _next(rows, total, exists)
        only, rows = _next(rows, total, exists)
        g_m, rows = _next(rows, total, exists)
        g, factors = tl.where(counts, g * scale, 0.0), factors * scale
        large = tl.abs(factors) > 2.0**32
        f, last = tl.where(large, factors * 2.0**-40, factors), tl.where(large, 1.0, 2.0**-40)
    else:
        a, rows = _next(rows, total, exists)
        g, rows = _next(rows, total, exists)
        a, g = tl.where(counts, a * scale, 0.0), tl.where(counts, g * scale * 2.0**-24, 0.0)
    for step in range(0, C + V - 1, splits * BC):
        first = step + tl.program_id(0) % splits * BC
        x, j, _inside = _load(z, exists, counts, first, start, ends, samples, C, ROW, BC, V)
        if SMOOTHED:
            w = _class_weights(weight, j, C)
            spread = scale * (smoothing / C)
            value = _smoothed_gradient(x, w, m, q_m, n_m, f, last, only, g_m * scale, spread, strength, rest)
            value = tl.where(counts[:, None], value, 0.0)
        else:
            value = _gradient(x, m, a, WIDE)
        _store(gradient, value, first, start, to, exists, samples, C, ROW, GRADIENT_ROW, BC, V)
    mine = exists if splits == 1 else (t + (start % V).to(tl.int32)) // BC % splits == tl.program_id(0) % splits
    store_own(gradient, g, t, to, mine, samples, ROW)


@triton.jit
def trial(place):
    tl.store(place, 1.0)
