/* Many columns, after lace_rows.h, whose formulas they share: what images are made of. SPDX-License-Identifier: MIT */

/* Class j of column i and of those after it. */
static inline const Real *plane_of(const Job *job, size_t i, size_t j)
{
    return job->logits + i + (ptrdiff_t)j * job->logits_stride;
}

/* EXP_SCALE exp(z - max) of one class of `count` columns. */
static inline void plane_exponentials(Real *restrict e, const Real *restrict z, const Real *restrict max, size_t count)
{
    Real high[BATCH], low[BATCH], shifted[BATCH];
    for (size_t r = 0; r < count; r++) exp_reduce_to(&high[r], &low[r], &shifted[r], difference(z[r], max[r]));
    exp_finish_all(e, high, low, shifted, count);
}

static inline void add_to_pair(Pairs *pairs, size_t r, Real value)
{
    const Pair sum = two_sum(pairs->high[r], value);
    pairs->high[r] = sum.high;
    pairs->low[r] += sum.low;
}

/* So that low is within an ulp of high. Beside an infinity it would be NaN. */
static inline void renormalize(Pairs *pairs, size_t count)
{
    for (size_t r = 0; r < count; r++) {
        const Real high = pairs->high[r];
        const Pair sum = two_sum(high, pairs->low[r]);
        pairs->high[r] = is_finite(high) ? sum.high : high;
        pairs->low[r] = is_finite(high) ? sum.low : 0;
    }
}

/* Losses and gradients of the columns i to i + count - 1, at most BATCH, worked on side by side and class by class. */
static inline void hard_columns(Sums *sums, const Job *job, size_t i, size_t count)
{
    const size_t k = job->k, stride = job->gradient_stride;
    const Real *z = job->logits + i;
    const Real zero = opaque_zero();
    Real *gradient = job->gradient ? job->gradient + i : NULL;
    Real unused[BATCH], *e = gradient ? gradient : unused; /* exponentials, until they become the gradient */
    const size_t e_stride = gradient ? stride : 0;
    Bits t[BATCH]; /* as wide as Real, so that a compiler compares several at once */
    int some_ignored = 0;
    HardRows x;
    for (size_t r = 0; r < count; r++) {
        const size_t c = class_of(job, i + r);
        const int ignored = c == k;
        t[r] = ignored ? (Bits)-1 : (Bits)c;
        some_ignored |= ignored;
        x.w[r] = x.g[r] = zero;
        if (!ignored) load_weight_and_scale(&x, r, job, i + r, c);
        sums->max[r] = z[r] - zero;
        sums->z_left_out[r] = plane_of(job, i, ignored ? 0 : c)[r];
        sums->sum_others.high[r] = sums->sum_others.low[r] = zero;
    }
    for (size_t j = 0; j < k; j++) {
        z = plane_of(job, i, j);
        for (size_t r = 0; r < count; r++) sums->max[r] = z[r] > sums->max[r] ? z[r] : sums->max[r];
    }
    for (size_t r = 0; r < count; r++)
        sums->exp_left_out[r] = exponential(difference(sums->z_left_out[r], sums->max[r])) * EXP_UNSCALE;
    for (size_t j = 0; j < k; j++) {
        Real values[BATCH];
        plane_exponentials(values, plane_of(job, i, j), sums->max, count);
        for (size_t r = 0; r < count; r++) {
            const Real value = t[r] == (Bits)j ? 0 : values[r];
            add_to_pair(&sums->sum_others, r, value);
            e[j * e_stride + r] = value;
        }
    }
    renormalize(&sums->sum_others, count);
    finish_sums(sums, count);
    hard_formulas(&x, sums, job->options->strength, count);
    for (size_t r = 0; r < count; r++) job->loss[i + r] = t[r] == (Bits)-1 ? 0 : x.loss[r];
    if (!gradient) return;
    for (size_t j = 0; !x.some_large && j < k; j++)
        for (size_t r = 0; r < count; r++) {
            Real *g = &gradient[j * stride + r];
            *g = (*g * x.grad_factor[r]) * EXP_UNSCALE;
        }
    for (size_t r = 0; x.some_large && r < count; r++) {
        const Factor f = factor_of(x.grad_factor[r]);
        for (size_t j = 0; j < k; j++) {
            Real *g = &gradient[j * stride + r];
            *g = (*g * f.first) * f.last;
        }
    }
    for (size_t r = 0; r < count; r++)
        if (t[r] != (Bits)-1) gradient[(size_t)t[r] * stride + r] = x.grad_target[r];
    for (size_t j = 0; some_ignored && j < k; j++)
        for (size_t r = 0; r < count; r++)
            if (t[r] == (Bits)-1) gradient[j * stride + r] = zero;
}

/* Coefficients of class j, as in lace_rows.h. */
static inline void plane_coefficients(Real *restrict a, const Job *job, const Bits *restrict t, size_t i, size_t j, size_t count)
{
    const Real e = job->options->label_smoothing, keep = 1 - e, spread = e / (Real)job->k;
    const Real w = job->options->weight ? job->options->weight[j] : 1;
    if (job->soft_target) {
        const Real *y = job->soft_target + i + j * job->soft_target_stride;
        for (size_t r = 0; r < count; r++) a[r] = (keep * y[r] + spread) * w;
    } else {
        for (size_t r = 0; r < count; r++) a[r] = (t[r] == (Bits)j ? keep + spread : spread) * w;
    }
}

/* Terms of a few classes, added up in the working precision, and the pairs that they go to then. */
enum { FEW = 3 }; /* each term is rounded twice more */
typedef struct { Real a[BATCH], ad[BATCH], ae[BATCH], aed[BATCH]; } Few;

static inline void clear_few(Few *few, Real zero, size_t count)
{
    for (size_t r = 0; r < count; r++) few->a[r] = few->ad[r] = few->ae[r] = few->aed[r] = zero;
}

static inline void add_few(SoftSums *restrict soft, const Few *restrict few, size_t count)
{
    for (size_t r = 0; r < count; r++) {
        add_to_pair(&soft->a, r, few->a[r]);
        add_to_pair(&soft->ad, r, few->ad[r]);
        add_to_pair(&soft->ae, r, few->ae[r]);
        add_to_pair(&soft->aed, r, few->aed[r]);
    }
}

/* Class j, of which `e` has the exponentials: 0 where it has the largest logit. */
static inline void add_class(Few *restrict few, Pairs *restrict others, Real *restrict e, const Real *restrict a,
                             const Real *restrict z, const Real *restrict max, const Bits *restrict top, size_t j,
                             size_t count)
{
    for (size_t r = 0; r < count; r++) {
        const int is_top = top[r] == (Bits)j;
        const Real value = is_top ? 0 : e[r];
        const Term term = soft_term(a[r], value, max[r] - z[r]);
        add_to_pair(others, r, value);
        few->a[r] += is_top ? 0 : a[r];
        few->ad[r] += term.ad;
        few->ae[r] += term.ae;
        few->aed[r] += term.aed;
        e[r] = value;
    }
}

/* The largest logit of each column, and the first class that has it. */
static inline void top_of_columns(Sums *sums, Bits *restrict top, const Job *job, size_t i, size_t count)
{
    const Real zero = opaque_zero();
    for (size_t r = 0; r < count; r++) {
        top[r] = (Bits)zero;
        sums->max[r] = plane_of(job, i, 0)[r] - zero;
    }
    for (size_t j = 1; j < job->k; j++) {
        const Real *z = plane_of(job, i, j);
        for (size_t r = 0; r < count; r++) {
            const int larger = z[r] > sums->max[r];
            sums->max[r] = larger ? z[r] : sums->max[r];
            top[r] = larger ? (Bits)j : top[r];
        }
    }
}

/* As hard_columns, for targets that give every class a coefficient. */
static inline void soft_columns(Sums *sums, const Job *job, size_t i, size_t count)
{
    const size_t k = job->k, stride = job->gradient_stride;
    const Real zero = opaque_zero(), s = job->options->strength;
    Real *gradient = job->gradient ? job->gradient + i : NULL;
    Real unused[BATCH], *e = gradient ? gradient : unused; /* exponentials, until they become the gradient */
    const size_t e_stride = gradient ? stride : 0;
    Bits t[BATCH], top[BATCH];
    Real a[BATCH], first[BATCH], last[BATCH];
    HardRows x;
    SoftSums soft;
    Few few;
    clear_few(&few, zero, count);
    for (size_t r = 0; r < count; r++) {
        sums->sum_others.high[r] = soft.a.high[r] = soft.ad.high[r] = soft.ae.high[r] = soft.aed.high[r] = zero;
        sums->sum_others.low[r] = soft.a.low[r] = soft.ad.low[r] = soft.ae.low[r] = soft.aed.low[r] = zero;
        const size_t c = job->soft_target ? 0 : class_of(job, i + r);
        t[r] = c == k ? (Bits)-1 : (Bits)c;
        soft.scale[r] = job->scale ? job->scale[(i + r) * job->scale_step] : 1;
    }
    top_of_columns(sums, top, job, i, count);
    for (size_t j = 0; j < k; j++) {
        const Real *z = plane_of(job, i, j);
        plane_exponentials(e + j * e_stride, z, sums->max, count);
        plane_coefficients(a, job, t, i, j, count);
        add_class(&few, &sums->sum_others, e + j * e_stride, a, z, sums->max, top, j, count);
        if (j % FEW < FEW - 1 && j < k - 1) continue;
        add_few(&soft, &few, count);
        clear_few(&few, zero, count);
    }
    renormalize(&sums->sum_others, count);
    renormalize(&soft.a, count);
    renormalize(&soft.ad, count);
    renormalize(&soft.ae, count);
    renormalize(&soft.aed, count);
    for (size_t r = 0; r < count; r++) {
        plane_coefficients(&x.w[r], job, &t[r], i + r, (size_t)top[r], 1);
        x.g[r] = x.w[r] * soft.scale[r];
        sums->z_left_out[r] = sums->max[r] - zero;
        sums->exp_left_out[r] = 1;
    }
    finish_sums(sums, count);
    hard_formulas(&x, sums, s, count);
    soft_formulas(&x, &soft, sums, s, count);
    for (size_t r = 0; r < count; r++) {
        const Factor f = factor_of(x.grad_factor[r]);
        first[r] = f.first;
        last[r] = f.last;
        job->loss[i + r] = t[r] == (Bits)-1 ? 0 : x.loss[r];
    }
    for (size_t j = 0; gradient && j < k; j++) {
        const Real *restrict z = plane_of(job, i, j);
        Real *restrict g = &gradient[j * stride];
        plane_coefficients(a, job, t, i, j, count);
        for (size_t r = 0; r < count; r++)
            g[r] = soft_entry(g[r], a[r] * soft.scale[r], sums->max[r] - z[r], sums->inverse.high[r],
                              sums->log_sum.high[r], first[r], last[r], s);
    }
    for (size_t r = 0; gradient && r < count; r++) {
        gradient[(size_t)top[r] * stride + r] = x.grad_target[r];
        for (size_t j = 0; t[r] == (Bits)-1 && j < k; j++) gradient[j * stride + r] = zero;
    }
}

int64_t NAME(lace_columns)(const Args *args)
{
    Job job;
    if (!args) return LACE_NULL;
    const int64_t why = check_arguments(&job, args, args->k, args->n);
    if (why != LACE_DONE) return why;
    const size_t n = args->n;
    const int is_soft = job.soft_target || job.options->label_smoothing != 0;
    Sums sums;
    size_t i = 0;
    for (; !is_soft && i + BATCH <= n; i += BATCH) hard_columns(&sums, &job, i, BATCH); /* a known number: 0.9 of the time */
    for (; is_soft && i + BATCH <= n; i += BATCH) soft_columns(&sums, &job, i, BATCH);
    if (i < n && !is_soft) hard_columns(&sums, &job, i, n - i);
    if (i < n && is_soft) soft_columns(&sums, &job, i, n - i);
    return LACE_DONE;
}
