/* Many columns, after lace_rows.h, whose formulas they share: what images are made of. SPDX-License-Identifier: MIT */

/* Class j of column i and of those after it. */
static inline const Real *plane_of(const Job *job, size_t i, size_t j)
{
    return job->logits + i + (ptrdiff_t)j * job->logits_stride;
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
        Real high[BATCH], low[BATCH], shifted[BATCH], values[BATCH];
        z = plane_of(job, i, j);
        for (size_t r = 0; r < count; r++)
            exp_reduce_to(&high[r], &low[r], &shifted[r], difference(z[r], sums->max[r]));
        exp_finish_all(values, high, low, shifted, count);
        for (size_t r = 0; r < count; r++) {
            const Real value = t[r] == (Bits)j ? 0 : values[r];
            const Pair sum = two_sum(sums->sum_others.high[r], value);
            sums->sum_others.high[r] = sum.high;
            sums->sum_others.low[r] += sum.low;
            e[j * e_stride + r] = value;
        }
    }
    for (size_t r = 0; r < count; r++) {
        const Pair sum = load_pair(&sums->sum_others, r);
        store_pair(&sums->sum_others, r, two_sum(sum.high, sum.low));
    }
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

int64_t NAME(lace_columns)(const Args *args)
{
    Job job;
    if (!args) return LACE_NULL;
    const int64_t why = check_arguments(&job, args, NULL, args->k, args->n);
    if (why != LACE_DONE) return why;
    const size_t n = args->n;
    Sums sums;
    size_t i = 0;
    for (; i + BATCH <= n; i += BATCH) hard_columns(&sums, &job, i, BATCH); /* a known number takes 0.9 of the time */
    if (i < n) hard_columns(&sums, &job, i, n - i);
    return LACE_DONE;
}
