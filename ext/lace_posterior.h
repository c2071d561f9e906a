/* Class probabilities of many rows or columns, after lace_columns.h: ref/posterior.py. SPDX-License-Identifier: MIT
 *
 * With h = q / (w K) and the class `top` of the largest logit: p = h / (sum of h). Only K of `top` may be small, so that all
 * h are taken times w_top K_top / q_top: then that of `top` is 1, and no other is a quotient of small numbers. */
#if DIGITS == 24
typedef lace_posterior_f32 PosteriorArgs;
#define FARTHEST_WEIGHTS (Real)1152921504606846976.0 /* 2^60: a product of two such numbers and EXP_SCALE is finite */
#else
typedef lace_posterior_f64 PosteriorArgs;
#define FARTHEST_WEIGHTS (Real)6.668014432879854e240 /* 2^800 */
#endif

/* What all classes of a row need: the sum of exponentials, what `top` gives to the others, and 1 / (sum of h). */
typedef struct {
    Real max[BATCH];
    Pairs inverse, log_sum, share, scale;
} Shares;

typedef struct {
    const Real *weight; /* or NULL */
    Real weight_unit;   /* times it no weight is less than 1 */
    Real strength, spread; /* s, e / k */
} Model;

static inline Real model_weight(const Model *m, size_t j)
{
    return m->weight ? m->weight[j] * m->weight_unit : 1;
}

/* (1-s) + s (r + q n) */
static inline Pair slope_of(Pair r, Pair q, Pair n, Real strength)
{
    const Pair s = {strength, 0}, qn = multiply(q, n);
    const Pair kept = {q.high == 0 ? 0 : qn.high, q.high == 0 ? 0 : qn.low}; /* its limit where n is infinite */
    return add(two_sum(1, -strength), multiply(s, add(r, kept)));
}

/* After finish_sums: what `top` gives to the others. */
static void top_shares(Shares *restrict x, const Sums *restrict sums, const Real *restrict w_top, Real strength,
                       size_t count)
{
    for (size_t r = 0; r < count; r++) {
        const Pair inverse = load_pair(&sums->inverse, r), log_sum = load_pair(&sums->log_sum, r), w = {w_top[r], 0};
        const Pair rest = unscaled(multiply(load_pair(&sums->sum_others, r), inverse));
        x->max[r] = sums->max[r];
        store_pair(&x->inverse, r, inverse);
        store_pair(&x->log_sum, r, log_sum);
        store_pair(&x->share, r, multiply(w, slope_of(rest, inverse, log_sum, strength)));
    }
}

/* h of a class below the top. `e` is EXP_SCALE too large. */
static inline Real share_of(Real e, Real z, Real w, Real max, Pair inverse, Pair log_sum, Pair share, Real strength)
{
    const Pair weight = {w, 0}, minus = {-1, 0}, one = {1, 0}, scaled = {e, 0}, exponential_of = {e * EXP_UNSCALE, 0};
    const Pair q = multiply(exponential_of, inverse), n = add(two_sum(max, -z), log_sum);
    const Pair slope = slope_of(add(one, multiply(minus, q)), q, n, strength);
    return rounded(divide(multiply(scaled, share), multiply(weight, slope))) * EXP_UNSCALE;
}

/* p of a class, or with label smoothing what it is proportional to. */
static inline Real probability_of(Real h, Pair scale, Real spread)
{
    const Pair share = {h, 0}, less = {-spread, 0};
    const Real p = rounded(spread > 0 ? add(multiply(share, scale), less) : multiply(share, scale));
    return p < 0 ? 0 : p;
}

