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
    const Real zero = opaque_zero(); /* taken off, it changes nothing, and is no copy */
    for (size_t r = 0; r < count; r++) {
        Pair inverse = load_pair(&sums->inverse, r), log_sum = load_pair(&sums->log_sum, r);
        inverse.high -= zero;
        inverse.low -= zero;
        log_sum.high -= zero;
        log_sum.low -= zero;
        const Pair w = {w_top[r], 0}, rest = unscaled(multiply(load_pair(&sums->sum_others, r), inverse));
        x->max[r] = sums->max[r] - zero;
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

/* Fills what the others need if `lines` of `length` values can be worked on. Returns what lace.h says. */
static int64_t check_posterior(Job *job, Model *m, const PosteriorArgs *args, size_t lines, size_t length)
{
    const Args sizes = {args->posterior, args->posterior, args->logits, NULL, args->logits, NULL, 0, args->n, args->k,
                  args->logits_stride, args->posterior_stride, args->options, NULL, NULL, NULL, NULL, 0};
    const int64_t why = check_arguments(job, &sizes, lines, length);
    if (why != LACE_DONE) return why;
    const Real e = job->options->label_smoothing, *w = job->options->weight;
    Real smallest = w ? w[0] : 1, largest = smallest, unit = 1;
    if (!(e >= 0 && e < 1)) return LACE_OPTION;
    for (size_t j = 0; w && j < args->k; j++) {
        if (!(w[j] > 0 && is_finite(w[j]))) return LACE_OPTION;
        smallest = w[j] < smallest ? w[j] : smallest;
        largest = w[j] > largest ? w[j] : largest;
    }
    if (largest > smallest * FARTHEST_WEIGHTS) return LACE_OPTION;
    while (smallest * unit < 1 && is_finite(2 * unit)) unit *= 2;
    while (smallest * unit >= 2) unit /= 2;
    m->weight = w;
    m->weight_unit = unit;
    m->strength = job->options->strength;
    m->spread = e / (Real)args->k;
    return LACE_DONE;
}

/* `others` is the sum of h over the classes but the top, whose h is 1. */
static inline Pair share_scale(Pair others, Real max)
{
    const Pair one = {1, 0};
    others.high += max - max; /* NaN beside +inf */
    return divide(one, add(others, one));
}

static void row_shares(Real *restrict p, const Real *restrict z, const Model *m, const Shares *x, size_t r, size_t j,
                       size_t count)
{
    const Pair inverse = load_pair(&x->inverse, r), log_sum = load_pair(&x->log_sum, r), share = load_pair(&x->share, r);
    const Real *restrict w = m->weight ? m->weight + j : NULL;
    const Real max = x->max[r], unit = m->weight_unit, s = m->strength;
    for (size_t i = 0; i < count; i++)
        p[i] = share_of(p[i], z[i], w ? w[i] * unit : 1, max, inverse, log_sum, share, s);
}

/* p times the scale, less the spread; their sum, if it is asked for. */
static void row_probabilities(Real *restrict p, size_t k, Pair scale, Real spread, Lanes *sum)
{
    for (size_t j = 0; j < k; j++) p[j] = probability_of(p[j], scale, spread);
    if (!sum) return;
    clear(sum);
    accumulate(sum, p, k);
}

int64_t NAME(lace_posterior_rows)(const PosteriorArgs *args)
{
    Job job;
    Model m;
    Sums sums;
    Shares x;
    Lanes lanes;
    if (!args) return LACE_NULL;
    const int64_t why = check_posterior(&job, &m, args, args->n, args->k);
    if (why != LACE_DONE) return why;
    const Pair one = {1, 0};
    const size_t k = job.k, fitting = NEAR / k, limit = fitting < 1 ? 1 : fitting < BATCH ? fitting : BATCH;
    size_t index[BATCH], top[BATCH];
    Real w_top[BATCH];
    for (size_t i = 0, count; i < args->n; i += count) {
        count = args->n - i < limit ? args->n - i : limit;
        for (size_t r = 0; r < count; r++) {
            index[r] = i + r;
            sums.max[r] = maximum(row_of(&job, i + r), k);
            top[r] = class_of_maximum(row_of(&job, i + r), k, sums.max[r]);
            w_top[r] = model_weight(&m, top[r]);
        }
        sum_rows(&sums, &job, index, top, count, job.gradient);
        finish_sums(&sums, count);
        top_shares(&x, &sums, w_top, m.strength, count);
        for (size_t r = 0; r < count; r++) {
            Real *p = job.gradient + (i + r) * job.gradient_stride;
            const Real *z = row_of(&job, i + r);
            clear(&lanes);
            for (size_t j = 0; j < k; j += CHUNK) {
                const size_t part = k - j < CHUNK ? k - j : CHUNK;
                row_shares(p + j, z + j, &m, &x, r, j, part);
                if (top[r] - j < part) p[top[r]] = 0;
                accumulate(&lanes, p + j, part);
            }
            const Pair scale = share_scale(total(&lanes), x.max[r]);
            p[top[r]] = 1;
            row_probabilities(p, k, scale, m.spread, m.spread > 0 ? &lanes : NULL);
            if (m.spread > 0) row_probabilities(p, k, divide(one, total(&lanes)), 0, NULL);
        }
    }
    return LACE_DONE;
}

/* As row_probabilities, of columns side by side, each with its scale. */
static inline void plane_probabilities(Real *restrict p, const Job *job, const Pairs *restrict scale, Real spread,
                                       size_t count)
{
    for (size_t j = 0; j < job->k; j++)
        for (size_t r = 0; r < count; r++) {
            Real *at = &p[j * job->gradient_stride + r];
            *at = probability_of(*at, load_pair(scale, r), spread);
        }
}

static inline void posterior_columns(Sums *sums, const Job *job, const Model *m, size_t i, size_t count)
{
    const size_t k = job->k, stride = job->gradient_stride;
    const Real zero = opaque_zero(), spread = m->spread;
    const Pair one = {1, 0};
    Real *p = job->gradient + i, w_top[BATCH];
    Bits top[BATCH];
    Shares x;
    top_of_columns(sums, top, job, i, count);
    for (size_t r = 0; r < count; r++) sums->sum_others.high[r] = sums->sum_others.low[r] = zero;
    for (size_t j = 0; j < k; j++) {
        Real *e = p + j * stride;
        plane_exponentials(e, plane_of(job, i, j), sums->max, count);
        for (size_t r = 0; r < count; r++) {
            e[r] = top[r] == (Bits)j ? 0 : e[r];
            add_to_pair(&sums->sum_others, r, e[r]);
        }
    }
    renormalize(&sums->sum_others, count);
    for (size_t r = 0; r < count; r++) {
        w_top[r] = model_weight(m, (size_t)top[r]);
        sums->z_left_out[r] = sums->max[r] - zero;
        sums->exp_left_out[r] = 1;
    }
    finish_sums(sums, count);
    top_shares(&x, sums, w_top, m->strength, count);
    for (size_t r = 0; r < count; r++) x.scale.high[r] = x.scale.low[r] = zero;
    for (size_t j = 0; j < k; j++) {
        const Real *restrict z = plane_of(job, i, j), w = model_weight(m, j);
        Real *restrict h = p + j * stride;
        for (size_t r = 0; r < count; r++) {
            const Real value = share_of(h[r], z[r], w, x.max[r], load_pair(&x.inverse, r), load_pair(&x.log_sum, r),
                                        load_pair(&x.share, r), m->strength);
            add_to_pair(&x.scale, r, top[r] == (Bits)j ? 0 : value);
            h[r] = top[r] == (Bits)j ? 1 : value;
        }
    }
    renormalize(&x.scale, count);
    for (size_t r = 0; r < count; r++) store_pair(&x.scale, r, share_scale(load_pair(&x.scale, r), x.max[r]));
    plane_probabilities(p, job, &x.scale, spread, count);
    if (!(spread > 0)) return;
    for (size_t r = 0; r < count; r++) x.scale.high[r] = x.scale.low[r] = zero;
    for (size_t j = 0; j < k; j++)
        for (size_t r = 0; r < count; r++) add_to_pair(&x.scale, r, p[j * stride + r]);
    renormalize(&x.scale, count);
    for (size_t r = 0; r < count; r++) store_pair(&x.scale, r, divide(one, load_pair(&x.scale, r)));
    plane_probabilities(p, job, &x.scale, 0, count);
}

int64_t NAME(lace_posterior_columns)(const PosteriorArgs *args)
{
    Job job;
    Model m;
    Sums sums;
    if (!args) return LACE_NULL;
    const int64_t why = check_posterior(&job, &m, args, args->k, args->n);
    if (why != LACE_DONE) return why;
    for (size_t i = 0; i < args->n; i += BATCH)
        posterior_columns(&sums, &job, &m, i, args->n - i < BATCH ? args->n - i : BATCH);
    return LACE_DONE;
}
