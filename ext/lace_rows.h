/* Many rows, in terms of lace_math.h's Real; lace_f32.c and lace_f64.c include both, for float and for double.
 * SPDX-License-Identifier: MIT
 *
 * Design. "EXP_SCALE too large" means multiplied by EXP_SCALE.
 * a) Every exponential is taken of z - max with the rounding error of the subtraction put back: without it the error of
 *    exp grows with the margin, to 16 ulp and more. It ends with one rounding, 0.55 ulp in all.
 *    It stays EXP_SCALE too large until it is summed: terms that underflow one by one may add up to much.
 * b) The sum leaves one class out, by index: the target's, or in rows with a target for every class the largest
 *    logit's. So 1 - q is a quotient of sums of non-negative terms, never a difference.
 * c) Sums run in fixed lanes, of float in double, of double with every rounding error kept: exact enough at any k, the same
 *    bits at any vector width.
 * d) What remains of a row is a dozen operations on pairs (high, low): seven plain roundings in a row would cost 7 ulp.
 *    Alone they cost as much as 300 exponentials. BATCH rows at a time they vectorise.
 *
 * Sizes, each a part of the one above it.
 *     NEAR     logits of a batch: with their gradients they take 256 KiB of cache
 *     BATCH    rows side by side in the formulas, fewer where they would have more than NEAR logits
 *     GROUP    rows of a batch whose lanes are added up side by side
 *     CHUNK    values of a row whose exponentials are taken together, a multiple of LANES
 *     LANES    partial sums of a row, of which term j goes to number j modulo LANES
 */
#include "lace.h"

#define NEAR ((size_t)32768)
#define BATCH ((size_t)32)
#define GROUP ((size_t)8)
#define CHUNK ((size_t)256)
#if DIGITS == 24
#define LANES ((size_t)16)
#define SUFFIX _f32
typedef lace_args_f32 Args;
typedef lace_options_f32 Options;
#else
#define LANES ((size_t)32)
#define SUFFIX _f64
typedef lace_args_f64 Args;
typedef lace_options_f64 Options;
#endif

/* The names that other files see. LACE_ISA ends those of a build for one instruction set. */
#ifndef LACE_ISA
#define LACE_ISA
#endif
#define JOIN(name, type, isa) name##type##isa
#define EXPAND_AND_JOIN(name, type, isa) JOIN(name, type, isa)
#define NAME(name) EXPAND_AND_JOIN(name, SUFFIX, LACE_ISA)

#ifdef __cplusplus
#define restrict __restrict
#endif

/* p / EXP_SCALE */
static inline Pair unscaled(Pair p)
{
    p.high *= EXP_UNSCALE;
    p.low *= EXP_UNSCALE;
    return p;
}

/* As values, for formulas that read like formulas. */
static inline Pair add(Pair a, Pair b)
{
    pair_sum(&a, &a, &b);
    return a;
}

static inline Pair multiply(Pair a, Pair b)
{
    pair_product(&a, &a, &b);
    return a;
}

static inline Pair divide(Pair a, Pair b)
{
    pair_quotient(&a, &a, &b);
    return a;
}

static inline Real rounded(Pair a)
{
    return is_finite(a.high) ? a.high + a.low : a.high;
}

#define SURE (Real)16384.0 /* 2^14: a sum that is EXP_SCALE too large and still less makes 1 - q less than 2^-50 */
#define LARGE (Real)4294967296.0 /* 2^32 */
#define NEAR_ZERO (Real)9.313225746154785e-10 /* 2^-30: a 1 - q that is EXP_SCALE too large and still less is -log q, too */

/* A factor of numbers that are held EXP_SCALE too large, (x * first) * last: neither a product that is to become an
 * ordinary number is rounded as a subnormal one on its way, nor does one overflow. */
typedef struct { Real first, last; } Factor;

static inline Factor factor_of(Real x)
{
    const int large = x > LARGE || x < -LARGE;
    Factor f = {large ? x * EXP_UNSCALE : x, large ? 1 : EXP_UNSCALE};
    return f;
}

/* a f; 0 where an infinite loss has no weight. */
static inline Real weighted(Real a, Real f)
{
    return a == 0 && f == f && !is_finite(f) ? 0 : a * f;
}

/* two_sum(z, -m) for z <= m, of which the lesser of z and -m has the larger amount: 5 operations instead of 6. */
static inline Pair difference(Real z, Real m)
{
    Real larger = z < -m ? z : -m, smaller = z < -m ? -m : z;
    Pair d = {z - m, 0};
    d.low = smaller - (d.high - larger);
    return d;
}

/* Exponentials are taken in three loops; the first, over `exp_reduce_to`, is the callers'. One exponential is a longer chain
 * of operations than a processor holds in flight. Of three shorter chains it works on several at once. Together they
 * have a quarter more instructions than one loop, and the kernel takes 0.9 of the time on a Zen 3. */
static inline void exp_reduce_to(Real *high, Real *low, Real *shifted, Pair d)
{
    *shifted = exp_reduce(&d);
    *high = d.high;
    *low = d.low;
}

static inline void exp_finish_all(Real *restrict e, const Real *restrict high, const Real *restrict low,
                                  const Real *restrict shifted, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const Pair r = {high[i], low[i]};
        e[i] = exp_tail(r);
    }
    for (size_t i = 0; i < count; i++) {
        const Pair r = {high[i], low[i]};
        e[i] = exp_finish(r, e[i], shifted[i]);
    }
}

/* e = EXP_SCALE exp(z - max), of at most CHUNK values. */
static void exponentials(Real *restrict e, const Real *restrict z, Real max, size_t count)
{
    Real high[CHUNK], low[CHUNK], shifted[CHUNK];
    for (size_t i = 0; i < count; i++) exp_reduce_to(&high[i], &low[i], &shifted[i], difference(z[i], max));
    exp_finish_all(e, high, low, shifted, count);
}

/* A zero that the compiler cannot see through. It turns loops that store a known 0 into calls of memset, and loops that
 * copy into calls of memcpy, which a target without libc lacks; x - opaque_zero() is x. */
static inline Real opaque_zero(void)
{
    volatile Real x = 0;
    return x;
}

#if DIGITS == 24
typedef struct { double sum[LANES]; } Lanes; /* exact enough, in 0.6 of the time that pairs take */

static inline void clear(Lanes *lanes)
{
    const double zero = (double)opaque_zero();
    for (size_t l = 0; l < LANES; l++) lanes->sum[l] = zero;
}

static inline void add_to_lanes(Lanes *restrict lanes, const Real *restrict e, size_t count)
{
    for (size_t l = 0; l < count; l++) lanes->sum[l] += (double)e[l];
}

static inline void total_in_doubles(double sum[2], Lanes *lanes)
{
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) lanes->sum[l] += lanes->sum[l + half];
    sum[0] = lanes->sum[0];
    sum[1] = 0;
}

static inline Pair total(Lanes *lanes)
{
    double sum[2];
    total_in_doubles(sum, lanes);
    Pair all = {(Real)sum[0], 0};
    if (is_finite(all.high)) all.low = (Real)(sum[0] - (double)all.high);
    return all;
}
#else
typedef struct { Real high[LANES], low[LANES]; } Lanes; /* low: every rounding error of high */

static inline void clear(Lanes *lanes)
{
    const Real zero = opaque_zero();
    for (size_t l = 0; l < LANES; l++) lanes->high[l] = lanes->low[l] = zero;
}

static inline void add_to_lanes(Lanes *restrict lanes, const Real *restrict e, size_t count)
{
    for (size_t l = 0; l < count; l++) {
        Pair s = two_sum(lanes->high[l], e[l]);
        lanes->high[l] = s.high;
        lanes->low[l] += s.low;
    }
}

static inline Pair total(Lanes *lanes)
{
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) {
            Pair s = two_sum(lanes->high[l], lanes->high[l + half]);
            lanes->high[l] = s.high;
            lanes->low[l] += lanes->low[l + half] + s.low;
        }
    Pair all = two_sum(lanes->high[0], lanes->low[0]);
    if (!is_finite(lanes->high[0])) all.high = lanes->high[0], all.low = 0; /* beside an infinity a low part is NaN */
    return all;
}

static inline void total_in_doubles(double sum[2], Lanes *lanes)
{
    const Pair all = total(lanes);
    sum[0] = all.high;
    sum[1] = all.low;
}
#endif

/* `count` more terms. */
static inline void accumulate(Lanes *restrict lanes, const Real *restrict e, size_t count)
{
    size_t j = 0;
    for (; j + LANES <= count; j += LANES) add_to_lanes(lanes, e + j, LANES);
    add_to_lanes(lanes, e + j, count - j);
}

/* `count` terms, at most CHUNK, of which each is rounded twice more: four are added up before they go to a lane. */
static inline void accumulate_fours(Lanes *restrict lanes, const Real *restrict x, size_t count)
{
    const size_t m = count / 4 / 8 * 8, rest = count - 4 * m; /* whole vectors */
    Real fours[CHUNK / 4 + 32];
    for (size_t i = 0; i < m; i++) fours[i] = (x[i] + x[m + i]) + (x[2 * m + i] + x[3 * m + i]);
    for (size_t i = 0; i < rest; i++) fours[m + i] = x[4 * m + i] + 0; /* a plain copy would call memcpy */
    accumulate(lanes, fours, m + rest);
}

static Real maximum(const Real *z, size_t k)
{
    Real max[2 * LANES];
    if (k < 2 * LANES) {
        max[0] = z[0];
        for (size_t j = 1; j < k; j++) max[0] = z[j] > max[0] ? z[j] : max[0];
        return max[0];
    }
    const Real *last = z + k - 2 * LANES; /* some of them again: saves 1/8 of a row's time at k = 100 */
    for (size_t l = 0; l < 2 * LANES; l++) max[l] = z[0];
    for (size_t j = 0; j + 2 * LANES <= k; j += 2 * LANES)
        for (size_t l = 0; l < 2 * LANES; l++) max[l] = z[j + l] > max[l] ? z[j + l] : max[l];
    for (size_t l = 0; l < 2 * LANES; l++) max[l] = last[l] > max[l] ? last[l] : max[l];
    for (size_t half = LANES; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) max[l] = max[l + half] > max[l] ? max[l + half] : max[l];
    return max[0];
}

typedef struct { Real high[BATCH], low[BATCH]; } Pairs;

static inline Pair load_pair(const Pairs *pairs, size_t r)
{
    Pair p = {pairs->high[r], pairs->low[r]};
    return p;
}

static inline void store_pair(Pairs *pairs, size_t r, Pair p)
{
    pairs->high[r] = p.high;
    pairs->low[r] = p.low;
}

/* What the formulas need of the rows of a batch, side by side so that a compiler works on several at once. */
typedef struct {
    Real max[BATCH];
    Real z_left_out[BATCH];   /* the logit of the class that the sum leaves out */
    Real exp_left_out[BATCH]; /* its exp(z - max) */
    Pairs sum_others;         /* EXP_SCALE times the sum of exp(z_j - max) over the other classes */
    Pairs inverse;            /* 1 / sum over all classes */
    Pairs log_sum;            /* log of the sum over all classes */
} Sums;

/* The arguments of a call, with defaults in the place of what is 0. */
typedef struct {
    Real *loss, *gradient;
    const Real *logits;
    const int64_t *target;
    const Real *soft_target, *scale;
    size_t scale_step, k, soft_target_stride, gradient_stride;
    ptrdiff_t logits_stride;
    const Options *options;
} Job;

static inline const Real *row_of(const Job *job, size_t i)
{
    return job->logits + (ptrdiff_t)i * job->logits_stride;
}

/* Starts row r of the batch, whose largest logit is in `sums`. Leaves EXP_SCALE exp(z_j - max), and 0 at class `left_out`,
 * in `e` unless that is NULL, and their sum in the lanes. */
static void sum_exponentials(Sums *sums, size_t r, Lanes *lanes, Real *e, const Real *z, size_t k, size_t left_out)
{
    clear(lanes);
    for (size_t j = 0; j < k; j += CHUNK) {
        Real here[CHUNK], *chunk = e ? e + j : here;
        const size_t count = k - j < CHUNK ? k - j : CHUNK;
        exponentials(chunk, z + j, sums->max[r], count);
        if (left_out - j < count) {
            sums->exp_left_out[r] = chunk[left_out - j] * EXP_UNSCALE;
            chunk[left_out - j] = 0;
        }
        accumulate(lanes, chunk, count);
    }
    sums->z_left_out[r] = z[left_out];
}

/* The same for a batch: the `count` rows that `index` names. */
static void sum_rows(Sums *sums, const Job *job, const size_t *index, const size_t *left_out, size_t count, Real *gradient)
{
    Lanes lanes[GROUP];
    for (size_t first = 0; first < count; first += GROUP) {
        const size_t end = count - first < GROUP ? count : first + GROUP;
        for (size_t r = first; r < end; r++) {
            Real *e = gradient ? gradient + index[r] * job->gradient_stride : NULL;
            const Real *z = row_of(job, index[r]);
            sum_exponentials(sums, r, &lanes[r - first], e, z, job->k, left_out[r]);
        }
        for (size_t r = first; r < end; r++) store_pair(&sums->sum_others, r, total(&lanes[r - first]));
    }
}

/* Adds up all but the largest term, which is exactly 1: either the sum leaves it out already, or the class that the sum
 * leaves out is a small one. */
static void finish_sums(Sums *sums, size_t count)
{
    for (size_t r = 0; r < count; r++) {
        const int small = sums->z_left_out[r] < sums->max[r];
        Pair one = {1, 0}, missing = {small ? sums->exp_left_out[r] : 0, 0};
        Pair rest = unscaled(load_pair(&sums->sum_others, r));
        rest.high -= (small ? 1 : 0) + (sums->max[r] - sums->max[r]); /* NaN beside +inf */
        rest = add(rest, missing);
        store_pair(&sums->inverse, r, divide(one, add(rest, one)));
        log_1_plus(&rest, &rest);
        store_pair(&sums->log_sum, r, rest);
    }
}

/* -log q of the class whose logit is z */
static inline Pair negative_log(const Sums *sums, size_t r, Real z)
{
    return add(two_sum(sums->max[r], -z), load_pair(&sums->log_sum, r));
}

/* Writes what is asked for of row i, which is row r of its batch. */
static void write_statistics(const Args *to, size_t i, const Sums *sums, size_t r, const Real *z, size_t k, size_t t)
{
    const Pair inverse = load_pair(&sums->inverse, r);
    if (to->cross_entropy) to->cross_entropy[i] = rounded(negative_log(sums, r, z[t]));
    if (to->probability) {
        const Pair e_t = {exponential(difference(z[t], sums->max[r])) * EXP_UNSCALE, 0};
        to->probability[i] = rounded(multiply(e_t, inverse));
    }
    /* Of the largest logit the exponential is exactly 1. A NaN of class t is not in the sum. */
    if (to->confidence) to->confidence[i] = z[t] == z[t] ? rounded(inverse) : z[t];
    if (to->rank) {
        int64_t rank = 0;
        for (size_t j = 0; j < t; j++) rank += !(z[j] < z[t]); /* NaN counts as larger */
        for (size_t j = t + 1; j < k; j++) rank += !(z[j] <= z[t]);
        to->rank[i] = rank;
    }
}

/* The class of row i, or k for one that is ignored. It is read once: another thread may write to the targets, which were
 * all checked before, and a class that is none by now is ignored. */
static inline size_t class_of(const Job *job, size_t i)
{
    const int64_t t = *(const volatile int64_t *)&job->target[i];
    return t == job->options->ignore_index || t < 0 || (uint64_t)t >= job->k ? job->k : (size_t)t;
}

/* The rows of a batch whose targets are classes. */
typedef struct {
    Real w[BATCH];           /* class weight */
    Real g[BATCH];           /* class weight times the gradient's factor */
    Real loss[BATCH];
    Real grad_target[BATCH]; /* gradient at the target */
    Real grad_factor[BATCH]; /* elsewhere it is exp(z_j - max) times this */
    int some_large;          /* of grad_factor: then factor_of is needed, else the factor is {grad_factor, EXP_UNSCALE} */
} HardRows;

/* Row r again, where 1 - q is so small that it, -log q or their products may underflow before a factor brings them back:
 * they are taken as they are before they are unscaled, and a weight above 1 comes first. */
static void keep_digits(HardRows *x, const Sums *sums, size_t r, Real strength)
{
    const Pair s = {strength, 0}, rest = two_sum(1, -strength), scale = {x->g[r], 0}, e_t = {sums->exp_left_out[r], 0};
    const Pair inverse = load_pair(&sums->inverse, r), p_scaled = multiply(load_pair(&sums->sum_others, r), inverse);
    const Pair p = unscaled(p_scaled), q = multiply(e_t, inverse), n = negative_log(sums, r, sums->z_left_out[r]);
    const Pair factor = multiply(scale, add(rest, multiply(s, add(p, multiply(q, n)))));
    const int no_log = p_scaled.high < NEAR_ZERO, heavy = x->w[r] > 1 || x->w[r] < -1;
    const Factor g = factor_of(factor.high);
    const Pair first = {g.first, g.last == 1 ? factor.low * EXP_UNSCALE : factor.low}, w = {heavy ? x->w[r] : 1, 0};
    const Pair f = multiply(w, add(rest, multiply(s, p)));
    const Real loss = no_log ? rounded(multiply(f, p_scaled)) * EXP_UNSCALE : rounded(multiply(f, n));
    if (no_log) x->grad_target[r] = -rounded(multiply(first, p_scaled)) * g.last;
    x->loss[r] = weighted(heavy ? 1 : x->w[r], loss);
}

static void hard_formulas(HardRows *x, const Sums *sums, Real strength, size_t count)
{
    const Pair s = {strength, 0}, rest = two_sum(1, -strength);
    for (size_t r = 0; r < count; r++) {
        const Pair inverse = load_pair(&sums->inverse, r), e_t = {sums->exp_left_out[r], 0}, scale = {x->g[r], 0};
        Pair p = unscaled(multiply(load_pair(&sums->sum_others, r), inverse)), q = multiply(e_t, inverse);
        Pair n = negative_log(sums, r, sums->z_left_out[r]), qn = multiply(q, n);
        qn.high = q.high == 0 ? 0 : qn.high; /* its limit where n is infinite */
        qn.low = q.high == 0 ? 0 : qn.low;
        Pair factor = multiply(scale, add(rest, multiply(s, add(p, qn))));
        x->grad_factor[r] = rounded(multiply(factor, inverse));
        x->grad_target[r] = -rounded(multiply(factor, p));
        x->loss[r] = weighted(x->w[r], rounded(multiply(add(rest, multiply(s, p)), n)));
    }
    int some_sure = 0, some_large = 0;
    for (size_t r = 0; r < count; r++) {
        some_sure |= sums->sum_others.high[r] < SURE;
        some_large |= (x->grad_factor[r] > LARGE) | (x->grad_factor[r] < -LARGE);
    }
    x->some_large = some_large;
    for (size_t r = 0; some_sure && r < count; r++)
        if (sums->sum_others.high[r] < SURE) keep_digits(x, sums, r, strength);
}

static inline void load_weight_and_scale(HardRows *x, size_t r, const Job *job, size_t i, size_t c)
{
    x->w[r] = job->options->weight ? job->options->weight[c] : 1;
    x->g[r] = job->scale ? x->w[r] * job->scale[i * job->scale_step] : x->w[r];
}

/* Losses and gradients of a batch: the `count` rows that `index` names, of these classes. */
static void hard_rows(Sums *sums, const Job *job, const size_t *index, const size_t *classes, size_t count)
{
    const size_t k = job->k;
    HardRows x;
    for (size_t r = 0; r < count; r++) {
        sums->max[r] = maximum(row_of(job, index[r]), k);
        load_weight_and_scale(&x, r, job, index[r], classes[r]);
    }
    sum_rows(sums, job, index, classes, count, job->gradient);
    finish_sums(sums, count);
    hard_formulas(&x, sums, job->options->strength, count);
    for (size_t r = 0; r < count; r++) {
        const size_t i = index[r];
        job->loss[i] = x.loss[r];
        if (job->gradient) {
            Real *row = job->gradient + i * job->gradient_stride;
            Factor g = {x.grad_factor[r], EXP_UNSCALE};
            if (x.some_large) g = factor_of(x.grad_factor[r]);
            for (size_t j = 0; j < k; j++) row[j] = (row[j] * g.first) * g.last;
            row[classes[r]] = x.grad_target[r];
        }
    }
}

/* A row's target: coefficients a = (keep y + spread) w, as in ref/loss.py. */
typedef struct {
    const Real *probability; /* y of each class, or NULL: 1 for class t */
    const Real *weight;      /* or NULL */
    size_t t;
    Real keep, spread;       /* 1 - e, e / k */
} Target;

static void coefficients(Real *restrict a, const Target *y, size_t j, size_t count)
{
    const Real keep = y->keep, spread = y->spread;
    const Real *restrict p = y->probability ? y->probability + j : NULL, *restrict w = y->weight ? y->weight + j : NULL;
    for (size_t i = 0; p && w && i < count; i++) a[i] = (keep * p[i] + spread) * w[i];
    for (size_t i = 0; p && !w && i < count; i++) a[i] = keep * p[i] + spread;
    for (size_t i = 0; !p && w && i < count; i++) a[i] = spread * w[i];
    for (size_t i = 0; !p && !w && i < count; i++) a[i] = spread;
    if (!p && y->t - j < count) a[y->t - j] = (keep + spread) * (w ? w[y->t - j] : 1);
}

/* Of the classes but the one with the largest logit, which is the one that the sum leaves out: sums of a, a d, a e and
 * a e d, with d = max - z and e = exp(-d). What L and its gradient need of them, in one pass, as n = d + log(sum of e). */
typedef struct {
    Pairs a, ad, ae, aed;
    Real scale[BATCH]; /* the gradient's factor */
} SoftSums;

/* The terms of a class, whose e is EXP_SCALE too large. An infinite loss counts nothing where a is 0; q n is 0 where q is, its
 * limit. */
typedef struct { Real ad, ae, aed; } Term;

static inline Term soft_term(Real a, Real e, Real d)
{
    const Real q = e * EXP_UNSCALE, ad = a == 0 ? 0 : a * d;
    const Term x = {ad, a * q, q == 0 ? 0 : ad * q};
    return x;
}

static inline void soft_terms(Real *restrict ad, Real *restrict ae, Real *restrict aed, const Real *restrict a,
                              const Real *restrict e, const Real *restrict z, Real max, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const Term x = soft_term(a[i], e[i], max - z[i]);
        ad[i] = x.ad;
        ae[i] = x.ae;
        aed[i] = x.aed;
    }
}

/* As sum_exponentials, with the sums of row r; the coefficient of class `top` becomes the row's weight. */
static void sum_soft_row(HardRows *x, SoftSums *soft, Sums *sums, size_t r, Real *e, const Real *z, size_t k, size_t top,
                         const Target *y)
{
    Lanes others, a, ad, ae, aed;
    clear(&others);
    clear(&a);
    clear(&ad);
    clear(&ae);
    clear(&aed);
    for (size_t j = 0; j < k; j += CHUNK) {
        Real here[CHUNK], *chunk = e ? e + j : here, a_of[CHUNK], ad_of[CHUNK], ae_of[CHUNK], aed_of[CHUNK];
        const size_t count = k - j < CHUNK ? k - j : CHUNK;
        exponentials(chunk, z + j, sums->max[r], count);
        coefficients(a_of, y, j, count);
        if (top - j < count) {
            x->w[r] = a_of[top - j];
            a_of[top - j] = chunk[top - j] = 0;
        }
        soft_terms(ad_of, ae_of, aed_of, a_of, chunk, z + j, sums->max[r], count);
        accumulate(&others, chunk, count);
        accumulate_fours(&a, a_of, count);
        accumulate_fours(&ad, ad_of, count);
        accumulate_fours(&ae, ae_of, count);
        accumulate_fours(&aed, aed_of, count);
    }
    sums->z_left_out[r] = z[top];
    sums->exp_left_out[r] = 1;
    store_pair(&sums->sum_others, r, total(&others));
    store_pair(&soft->a, r, total(&a));
    store_pair(&soft->ad, r, total(&ad));
    store_pair(&soft->ae, r, total(&ae));
    store_pair(&soft->aed, r, total(&aed));
}

/* After hard_formulas of the class with the largest logit: adds the others. There grad_factor, of which every exponential
 * has its part, lacks the class's own part -a K. */
static void soft_formulas(HardRows *restrict x, const SoftSums *restrict soft, const Sums *restrict sums, Real strength,
                          size_t count)
{
    const Pair s = {strength, 0}, minus = {-1, 0}, minus_s = {-strength, 0}, nothing = {0, 0};
    for (size_t r = 0; r < count; r++) {
        const Pair inverse = load_pair(&sums->inverse, r), log_sum = load_pair(&sums->log_sum, r);
        const Pair a = load_pair(&soft->a, r), ae = load_pair(&soft->ae, r), scale = {soft->scale[r], 0};
        const Pair aqn = multiply(add(load_pair(&soft->aed, r), multiply(ae, log_sum)), inverse);
        const Pair an = add(load_pair(&soft->ad, r), multiply(a, log_sum)), top = {x->loss[r], 0};
        /* Infinite coefficients: what is taken away of an infinite sum is infinite, too, and less. */
        const Pair less_an = is_finite(an.high) ? multiply(minus_s, aqn) : nothing;
        const Pair less_ak = is_finite(a.high) ? multiply(s, add(aqn, multiply(minus, multiply(ae, inverse)))) : nothing;
        const Pair ak = add(a, less_ak);
        const Real part = rounded(multiply(multiply(scale, ak), inverse));
        x->loss[r] = rounded(add(top, add(an, less_an)));
        x->grad_factor[r] += part;
        x->grad_target[r] += part;
    }
}

/* An entry of the gradient, q (the sum of a K) - a K: `e` is EXP_SCALE too large, `ag` and the factor f have the gradient's
 * factor in them. */
static inline Real soft_entry(Real e, Real ag, Real d, Real inverse, Real log_sum, Real first, Real last, Real s)
{
    const Real q = e * (inverse * EXP_UNSCALE), qn = q == 0 ? 0 : q * (d + log_sum);
    return (e * first) * last - ag * ((1 - s) + s * ((1 - q) + qn));
}

static inline void soft_gradient(Real *restrict row, const Real *restrict a, const Real *restrict z, const Sums *sums,
                                 size_t r, Factor f, Real scale, Real s, size_t count)
{
    const Real max = sums->max[r], inverse = sums->inverse.high[r], log_sum = sums->log_sum.high[r];
    for (size_t i = 0; i < count; i++)
        row[i] = soft_entry(row[i], a[i] * scale, max - z[i], inverse, log_sum, f.first, f.last, s);
}

/* The first class with the largest logit. A NaN is not taken for it: it belongs into the sum. */
static size_t class_of_maximum(const Real *z, size_t k, Real max)
{
    size_t j = 0;
    for (Bits found = 0; j + 32 < k; j += 32) {
        for (size_t l = 0; l < 32; l++) found |= z[j + l] == max;
        if (found) break;
    }
    while (j < k - 1 && z[j] != max) j++;
    return j;
}

/* As hard_rows, for targets that give every class a coefficient. */
static void soft_rows(Sums *sums, const Job *job, const size_t *index, const size_t *classes, size_t count)
{
    const size_t k = job->k;
    const Real e = job->options->label_smoothing, s = job->options->strength;
    size_t top[BATCH];
    HardRows x;
    SoftSums soft;
    Target y = {NULL, job->options->weight, 0, 1 - e, e / (Real)k};
    for (size_t r = 0; r < count; r++) {
        const size_t i = index[r];
        const Real *z = row_of(job, i);
        if (job->soft_target) y.probability = job->soft_target + i * job->soft_target_stride;
        y.t = classes[r];
        sums->max[r] = maximum(z, k);
        top[r] = class_of_maximum(z, k, sums->max[r]);
        soft.scale[r] = job->scale ? job->scale[i * job->scale_step] : 1;
        Real *row = job->gradient ? job->gradient + i * job->gradient_stride : NULL;
        sum_soft_row(&x, &soft, sums, r, row, z, k, top[r], &y);
        x.g[r] = x.w[r] * soft.scale[r];
    }
    finish_sums(sums, count);
    hard_formulas(&x, sums, s, count);
    soft_formulas(&x, &soft, sums, s, count);
    for (size_t r = 0; r < count; r++) {
        const size_t i = index[r];
        const Real *z = row_of(job, i);
        job->loss[i] = x.loss[r];
        if (!job->gradient) continue;
        Real *row = job->gradient + i * job->gradient_stride;
        if (job->soft_target) y.probability = job->soft_target + i * job->soft_target_stride;
        y.t = classes[r];
        for (size_t j = 0; j < k; j += CHUNK) {
            Real a[CHUNK];
            const size_t part = k - j < CHUNK ? k - j : CHUNK;
            coefficients(a, &y, j, part);
            soft_gradient(row + j, a, z + j, sums, r, factor_of(x.grad_factor[r]), soft.scale[r], s, part);
        }
        row[top[r]] = x.grad_target[r];
    }
}

/* Fills the job from the arguments if `lines` of `length` values can be worked on. Returns what lace.h says. */
static int64_t check_arguments(Job *job, const Args *args, size_t lines, size_t length)
{
    static const Options defaults = LACE_DEFAULTS;
    const Options *options = args->options ? args->options : &defaults;
    const size_t given = args->logits_stride < 0 ? 0 - (size_t)args->logits_stride : (size_t)args->logits_stride;
    const size_t logits_stride = given ? given : length;
    const size_t gradient_stride = args->gradient_stride ? args->gradient_stride : length;
    const size_t soft_target_stride = args->soft_target_stride ? args->soft_target_stride : length;
    const size_t most = lines > 0 ? SIZE_MAX / sizeof(Real) / lines : SIZE_MAX;
    if (args->k == 0) return LACE_SIZE;
    if (logits_stride < length || gradient_stride < length || soft_target_stride < length) return LACE_SIZE;
    if (logits_stride > most || gradient_stride > most || soft_target_stride > most) return LACE_SIZE;
    if (args->n > 0 && !(args->loss && args->logits && (args->target || args->soft_target))) return LACE_NULL;
    for (size_t i = 0; !args->soft_target && i < args->n; i++) {
        const int64_t t = args->target[i];
        if (t != options->ignore_index && (t < 0 || (uint64_t)t >= args->k)) return (int64_t)i + 1;
    }
    job->loss = args->loss;
    job->gradient = args->gradient;
    job->logits = args->logits;
    job->target = args->target;
    job->soft_target = args->soft_target;
    job->soft_target_stride = soft_target_stride;
    job->scale = args->scale;
    job->scale_step = args->scale_step;
    job->k = args->k;
    job->logits_stride = given ? args->logits_stride : (ptrdiff_t)length;
    job->gradient_stride = gradient_stride;
    job->options = options;
    return LACE_DONE;
}

int64_t NAME(lace_rows)(const Args *args)
{
    Job job;
    if (!args) return LACE_NULL;
    const int64_t why = check_arguments(&job, args, args->n, args->k);
    if (why != LACE_DONE) return why;
    const size_t n = args->n, k = job.k, fitting = NEAR / k;
    const size_t limit = fitting < 1 ? 1 : fitting < BATCH ? fitting : BATCH;
    const int is_soft = job.soft_target || job.options->label_smoothing != 0;
    const int is_described =
        !job.soft_target && (args->cross_entropy || args->probability || args->rank || args->confidence);
    const Real zero = opaque_zero();
    size_t index[BATCH], classes[BATCH], count = 0;
    Sums sums;
    for (size_t i = 0; i < n; i++) {
        classes[count] = job.soft_target ? 0 : class_of(&job, i);
        if (classes[count] == k) {
            Real *row = job.gradient ? job.gradient + i * job.gradient_stride : NULL;
            job.loss[i] = 0;
            for (size_t j = 0; row && j < k; j++) row[j] = zero;
            if (args->cross_entropy) args->cross_entropy[i] = 0;
            if (args->probability) args->probability[i] = 0;
            if (args->rank) args->rank[i] = (int64_t)k;
            if (args->confidence) args->confidence[i] = 0;
        } else {
            index[count++] = i;
        }
        if (count == limit || (i == n - 1 && count > 0)) {
            if (is_soft)
                soft_rows(&sums, &job, index, classes, count);
            else
                hard_rows(&sums, &job, index, classes, count);
            for (size_t r = 0; is_described && r < count; r++) {
                const Real *z = row_of(&job, index[r]);
                write_statistics(args, index[r], &sums, r, z, k, classes[r]);
            }
            count = 0;
        }
    }
    return LACE_DONE;
}

void NAME(lace_sum)(double sum[2], const Real *values, size_t n)
{
    Lanes lanes;
    clear(&lanes);
    if (n > 0) accumulate(&lanes, values, n);
    total_in_doubles(sum, &lanes);
}
