/* The formulas of ref/loss.py in 113 bits: even a sum of 100,000 terms is good to 2^-95 of its size.
 *
 * The bounds are those of tests/tolerances.py, which tests/test_fuzz.py passes:
 *     ULP, ULP_WEIGHTED, UNDERFLOW, ROUNDINGS_LOSS, ROUNDINGS_GRADIENT
 */
#include "exact.h"
#include <quadmath.h>
#include <float.h>
#include <math.h>
#include <stdio.h>

typedef __float128 Wide;
enum { MOST = 1 << 17 }; /* classes */

typedef struct {
    Wide loss, size_of_loss; /* size: the sum of the terms' amounts */
    int signs;               /* of the terms: 1 some above 0, 2 some below, 3 both */
    Wide mass, slopes;       /* the sums of the amounts of the coefficients, and of the coefficients times K */
    Wide lost;               /* what coefficients may lose that are subnormal, or were before their weight */
    Wide lost_loss;          /* the same of the loss */
    Wide cross_entropy, chance, confidence;
    Wide gradient[MOST], terms[MOST]; /* terms: q sum of |a K|, and |a K| */
} Exact;

static char said[300];

static Wide largest(size_t width)
{
    return width == 4 ? FLT_MAX : DBL_MAX;
}

static Wide smallest(size_t width)
{
    return ldexpq(1, width == 4 ? -149 : -1074);
}

static Wide ulp(Wide x, size_t width)
{
    int exponent = -20000;
    if (x != 0) frexpq(x, &exponent);
    return fmaxq(ldexpq(1, exponent - (width == 4 ? 24 : 53)), smallest(width));
}

/* All that is too large is as large as infinity. */
static Wide limited(Wide x, size_t width)
{
    const Wide limit = largest(width) + ulp(largest(width), width);
    return x > limit ? limit : x < -limit ? -limit : x;
}

/* "A term larger than the largest number of its type is infinite." */
static Wide or_infinite(Wide x, size_t width)
{
    return fabsq(x) < largest(width) + ulp(largest(width), width) / 2 ? x : x * HUGE_VALQ;
}

/* `found` is within `ulps` of `exact`, and what else is allowed. A message if not. */
static const char *unless_near(const char *name, size_t j, double found, Wide exact, Wide ulps, Wide more, size_t width)
{
    if (isnanq(exact) ? found != found : isinfq(exact) && found == (double)exact) return NULL;
    const Wide goal = limited(exact, width), off = fabsq(limited(found, width) - goal);
    if (finiteq(exact) && off <= ulps * ulp(goal, width) + more) return NULL; /* a NaN found is not */
    snprintf(said, sizeof said, "%s %zu is %a, exact %.9g: off by %.4g ulp, %.4g are allowed", name, j, found,
             (double)exact, (double)(off / ulp(goal, width)), (double)(ulps + more / ulp(goal, width)));
    return said;
}

/* Coefficient a of class j: a target of its own for every class, or all on one. */
static Wide coefficient(const Row *row, size_t j)
{
    const Wide e = row->smoothing, y = row->probability ? row->probability[j] : j == row->target;
    if (e == 0 && y == 0) return 0;
    return ((1 - e) * y + e / (Wide)row->k) * (row->weight ? row->weight[j] : 1);
}

/* The unit of subnormal numbers for each rounding, times what follows. */
static Wide lost_by(const Row *row, size_t j)
{
    const Wide e = row->smoothing, y = row->probability ? row->probability[j] : j == row->target;
    const Wide least = smallest(row->width), normal = row->width == 4 ? FLT_MIN : DBL_MIN;
    const Wide w = fabsq(row->weight ? row->weight[j] : 1), part = (1 - e) * y, all = part + e / (Wide)row->k;
    const int small = (part != 0 && fabsq(part) < normal) || (e != 0 && e / (Wide)row->k < normal) || fabsq(all) < normal;
    return e == 0 && !row->probability ? 0 : (small ? 2 * w * least : 0) + (fabsq(all * w) < normal ? 4 * least : 0);
}

static void solve(Exact *x, const Row *row)
{
    static Wide q[MOST], slope[MOST];
    const double *z = row->logits;
    const Wide s = row->strength;
    size_t top = 0;
    for (size_t j = 0; j < row->k; j++)
        if (z[j] > z[top] || z[top] != z[top]) top = j;
    int defined = z[top] - z[top] == 0;
    Wide others = 0, all = 0;
    for (size_t j = 0; j < row->k; j++) {
        defined &= z[j] == z[j];
        q[j] = expq((Wide)z[j] - z[top]);
        if (j != top) others += q[j];
    }
    const Wide sum = 1 + others, log_sum = log1pq(others);
    x->loss = x->size_of_loss = x->mass = x->slopes = x->lost = x->lost_loss = x->signs = 0;
    for (size_t j = 0; j < row->k; j++) {
        const Wide a = coefficient(row, j), n = ((Wide)z[top] - z[j]) + log_sum;
        const Wide r = a == 0 ? 0 : (j == top ? others : (others - q[j]) + 1) / sum;
        q[j] /= sum;
        slope[j] = x->gradient[j] = 0;
        if (j == row->target) x->cross_entropy = n;
        const Wide lost = lost_by(row, j), f = ((1 - s) + s * (j == top ? others : (others - q[j] * sum) + 1) / sum) * n;
        x->lost += lost;
        if (lost > 0) x->lost_loss += lost * f;
        if (a == 0) continue;
        const Wide af = a * or_infinite(((1 - s) + s * r) * n, row->width);
        slope[j] = a * ((1 - s) + s * (r + (q[j] == 0 ? 0 : q[j] * n)));
        x->gradient[j] = -r * slope[j]; /* its own part */
        all += slope[j];
        x->slopes += fabsq(slope[j]);
        x->loss += or_infinite(af, row->width);
        x->size_of_loss += fabsq(af);
        x->signs |= af > 0 ? 1 : af < 0 ? 2 : 0;
        x->mass += fabsq(a);
    }
    x->chance = q[row->target];
    x->confidence = q[top];
    for (size_t j = 0; j < row->k; j++) x->terms[j] = q[j] * x->slopes + fabsq(slope[j]);
    for (size_t j = 0; j < row->k; j++)
        x->gradient[j] = defined ? row->scale * (x->gradient[j] + q[j] * (all - slope[j])) : nanq("");
    if (!defined) x->loss = x->cross_entropy = x->chance = x->confidence = nanq("");
}

const char *wrong_row(const Row *row, const Results *found, double losses[2])
{
    static Exact x;
    solve(&x, row);
    if (losses) losses[0] = (double)x.loss, losses[1] = (double)x.cross_entropy;
    const size_t width = row->width;
    const int soft = row->probability || row->smoothing != 0;
    const Wide least = smallest(width), unit = ldexpq(1, width == 4 ? -24 : -53), size = fabsq(row->scale);
    const Wide ulps = soft ? 1 : row->weight ? ULP_WEIGHTED : ULP;
    /* Exponentials below 2^-18 of the smallest subnormal number count as 0 (SMALLEST in lace_math.h), at worst k. */
    const Wide gone = x.mass * (Wide)row->k * least * 0x1p-18q;
    const Wide underflow = (soft ? (Wide)row->k + 2 : UNDERFLOW) * least;
    const Wide loss_more = (soft ? ROUNDINGS_LOSS * unit * x.size_of_loss : 0) + underflow + gone + x.lost_loss;
    const Wide more = UNDERFLOW * least + size * (gone + x.lost);
    /* Terms of both signs may overflow before they are all added. */
    const int any_loss = !found->loss || (x.signs == 3 && x.size_of_loss > largest(width));
    const char *wrong = any_loss ? NULL : unless_near("loss", 0, *found->loss, x.loss, ulps, loss_more, width);
    for (size_t j = 0; !wrong && found->gradient && j < row->k; j++)
        wrong = unless_near("gradient", j, found->gradient[j], x.gradient[j], ulps,
                            more + (soft ? size * ROUNDINGS_GRADIENT * unit * x.terms[j] : 0), width);
    if (!wrong && found->cross_entropy)
        wrong = unless_near("cross entropy", 0, *found->cross_entropy, x.cross_entropy, ULP, UNDERFLOW * least, width);
    if (!wrong && found->chance)
        wrong = unless_near("probability", 0, *found->chance, x.chance, ULP, UNDERFLOW * least, width);
    if (!wrong && found->confidence) wrong = unless_near("confidence", 0, *found->confidence, x.confidence, ULP, 0, width);
    return wrong;
}

/* p from h = q / (w K), as in ref/posterior.py, with 1 - q of the top class a sum. Beside 4 ulp of the part (1-e) p + e/k: an
 * exponential below 2^-168 or 2^-1093 counts as 0, and weights may bring it back. */
const char *wrong_posterior(const Row *row, const double *found)
{
    static Wide h[MOST];
    const double *z = row->logits;
    const Wide s = row->strength, e = row->smoothing, each = e / (Wide)row->k;
    size_t top = 0;
    for (size_t j = 0; j < row->k; j++)
        if (z[j] > z[top] || z[top] != z[top]) top = j;
    int defined = z[top] - z[top] == 0;
    Wide others = 0, all = 0, kept = 0, heaviest = 0, lightest = HUGE_VALQ;
    for (size_t j = 0; j < row->k; j++) {
        defined &= z[j] == z[j];
        h[j] = expq((Wide)z[j] - z[top]);
        if (j != top) others += h[j];
    }
    const Wide sum = 1 + others, log_sum = log1pq(others);
    const Wide k_top = others == 0 ? 1 : (1 - s) + s * (others + log_sum) / sum;
    for (size_t j = 0; j < row->k; j++) {
        const Wide q = h[j] / sum, n = ((Wide)z[top] - z[j]) + log_sum, w = row->weight ? row->weight[j] : 1;
        const Wide k = (1 - s) + s * ((1 - q) + (q == 0 ? 0 : q * n));
        h[j] = (j == top ? 1 : h[j] * k_top / k) / w;
        all += h[j];
        heaviest = fmaxq(heaviest, w);
        lightest = fminq(lightest, w);
    }
    for (size_t j = 0; j < row->k; j++) kept += fmaxq(h[j] / all - each, 0);
    const Wide gone = (Wide)row->k * 2 * ldexpq(1, row->width == 4 ? -168 : -1093) * (heaviest / lightest);
    for (size_t j = 0; j < row->k; j++) {
        const Wide y = h[j] / all, p = e > 0 ? fmaxq(y - each, 0) / kept : y;
        const Wide more = e > 0 ? ULP * ulp(y, row->width) / kept : 0;
        const char *wrong = unless_near("posterior", j, found[j], defined ? p : nanq(""), ULP,
                                        UNDERFLOW * smallest(row->width) + gone / (1 - e) + more, row->width);
        if (wrong) return wrong;
    }
    return NULL;
}

/* `sum` is the exact sum of these within `part` of their amounts, and `more`. */
static const char *unless_sum(const double *values, size_t n, const double sum[2], Wide part, Wide more, size_t width)
{
    Wide exact = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        exact += or_infinite(values[i], width);
        size += fabsq(values[i]);
    }
    const Wide goal = limited(exact, width), off = fabsq(limited((Wide)sum[0] + sum[1], width) - goal);
    const int overflows = fabsq(exact) > largest(width);
    if (isnanq(exact) ? sum[0] != sum[0] : overflows && sum[0] == (double)exact * HUGE_VAL) return NULL;
    if (finiteq(exact) && off <= part * size + more && fabs(sum[1]) <= ulp(sum[0], width)) return NULL;
    snprintf(said, sizeof said, "%a + %a, exact %.17g", sum[0], sum[1], (double)exact);
    return said;
}

/* Floats go to 16 lanes of double, a rounding of 2^-53 for each value and for each of four halvings. Doubles go to 32
 * lanes that keep every rounding error, so that only theirs are lost. */
const char *wrong_sum(const double *values, size_t n, size_t width, const double sum[2])
{
    const Wide roundings = ldexpq((Wide)n / 16 + 6, -53);
    double size = 0;
    for (size_t i = 0; i < n; i++) size += fabs(values[i]);
    if (isinf(size) && width == 8) return NULL; /* may overflow on its way */
    return unless_sum(values, n, sum, width == 4 ? roundings : roundings * roundings + ldexpq(1, -106), 0, 8);
}

const char *wrong_totals(const double *losses, size_t n, const double total[2])
{
    return unless_sum(losses, n, total, ULP * 0x1p-23q, (Wide)n * UNDERFLOW * smallest(4), 4);
}
