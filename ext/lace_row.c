/* One row, for processors where every byte counts: the operations of lace_columns_f32 in the same order, so the same bits,
 * without rows side by side. The order of independent lines is the one with the least code. SPDX-License-Identifier: MIT */
#include "lace.h"

#define DIGITS 24
#if defined(__FP_FAST_FMAF) && __ARM_ARCH_PROFILE == 'M'
#define FUSED __builtin_fmaf /* saves 100 bytes; other bits only where the low part of a product underflows, below 2^-102 */
#endif
#include "lace_math.h"

static const Pair one = {1, 0};

/* From exponentials p[j], EXP_SCALE too large, to class probabilities, as in lace_posterior.h: K is that of class `top`. */
static void probabilities(float *p, const float *logits, size_t top, size_t k, const Pair *inverse, const Pair *log_sum,
                          const Pair *K)
{
    const float max = logits[top];
    Pair sum, h, n;
    sum.low = max - max; /* NaN beside +inf */
    sum.high = 1;
    p[top] = 0;
    for (size_t j = 0; j < k; j++) {
        h.high = p[j] * EXP_UNSCALE;
        h.low = 0;
        if (h.high != 0) {
            pair_product(&h, &h, inverse); /* h = q */
            n = two_sum(max, -logits[j]);
            pair_sum(&n, &n, log_sum);
            n.high -= 1;
            pair_product(&n, &h, &n);
            pair_sum(&n, &one, &n);        /* n = K of class j: 1 + q (n - 1) */
            h.high = p[j];
            h.low = 0;
            pair_product(&h, &h, K);
            pair_quotient(&h, &h, &n);
            h.high = (h.high + h.low) * EXP_UNSCALE;
        }
        p[j] = h.high;
        n = two_sum(sum.high, h.high);
        sum.high = n.high;
        sum.low += n.low;
    }
    p[top] = 1;
    for (size_t j = 0; j < k; j++) {
        h.high = p[j];
        h.low = 0;
        pair_quotient(&h, &h, &sum);
        p[j] = h.high + h.low;
    }
}

/* Both functions, which begin alike: for `target` k, which is no class, the probabilities take the gradient's place. */
static int row(float *loss, float *gradient, lace_totals_f32 *totals, const float *logits, size_t target, size_t k)
{
    const int is_posterior = target == k;
    float max = logits[0], high = 0, low = 0;
    size_t rank = 0, top = 0;
    Pair K = {0, 0}; /* K = exp(z - max) */
    for (size_t j = 0; j < k; j++)
        if (logits[j] > max) {
            max = logits[j];
            top = j;
        }
    if (is_posterior) target = top;
    const float z = logits[target];
    for (size_t j = 0; j < k; j++) {
        Pair s = two_sum(logits[j], -max);
        const float e = exponential(s);
        if (gradient) gradient[j] = e;
        if (j == target) {
            K.high = e * EXP_UNSCALE;
        } else {
            if (!(logits[j] < z) && (j < target || logits[j] != z)) rank++; /* NaN counts as larger */
            s = two_sum(high, e);
            high = s.high;
            low += s.low;
        }
    }

    /* Pairs hold one value after another: fewer pairs, less stack. Values go over one by one: a copy would call memcpy on
     * a Cortex-M0. */
    Pair others = two_sum(high * EXP_UNSCALE, low * EXP_UNSCALE), p, inverse, n;
    p.high = others.high; /* p = the sum of all exponentials but the largest, which is exactly 1 */
    p.low = others.low;
    p.high -= max - max; /* NaN beside +inf */
    if (z < max) {
        p.high -= 1;
        pair_sum(&p, &p, &K);
    }
    log_1_plus(&n, &p);
    pair_sum(&p, &p, &one);                  /* p = the sum of all */
    pair_quotient(&inverse, &one, &p);
    p = two_sum(max, -z);                    /* p = max - z */
    pair_sum(&n, &p, &n);                    /* n = -log q */
    pair_product(&p, &others, &inverse);     /* p = 1 - q */
    pair_product(&K, &K, &inverse);          /* K = q */
    pair_product(&K, &K, &n);                /* K = q n */
    float l = pair_product(&others, &p, &n); /* others = the loss */
    if (n.high > FLT_MAX) {
        l = n.high;
        K.high = K.low = 0; /* the limit of q n */
    }
    if (loss) *loss = l;
    pair_sum(&K, &K, &p);                    /* K = 1 - q + q n */
    if (is_posterior) {
        probabilities(gradient, logits, target, k, &inverse, &n, &K);
    } else if (gradient) {
        const float factor = pair_product(&inverse, &K, &inverse);
        for (size_t j = 0; j < k; j++) gradient[j] = gradient[j] * factor * EXP_UNSCALE;
        gradient[target] = -pair_product(&K, &K, &p);
    }
    if (totals) {
        pair_sum(&totals->loss, &totals->loss, &others);
        pair_sum(&totals->cross_entropy, &totals->cross_entropy, &n);
        totals->count++;
        for (size_t i = 5; i-- > rank;) totals->top[i]++;
    }
    return LACE_DONE;
}

int lace_row_f32(float *loss, float *gradient, lace_totals_f32 *totals, const float *logits, size_t target, size_t k)
{
    if (!logits) return LACE_NULL;
    if (target >= k) return k == 0 ? LACE_SIZE : 1;
    return row(loss, gradient, totals, logits, target, k);
}

int lace_row_posterior_f32(float *posterior, const float *logits, size_t k)
{
    if (!posterior || !logits) return LACE_NULL;
    return k == 0 ? LACE_SIZE : row(NULL, posterior, NULL, logits, k, k);
}
