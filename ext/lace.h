/* Linearly Adaptive Cross Entropy in C99: no libc, no allocation, no global state. SPDX-License-Identifier: MIT
 *
 * For one row of k logits z with q = softmax(z), true class t and strength s in [0, 1]:
 *     loss      L       = ((1-s) + s (1 - q_t)) (-log q_t)
 *     gradient  dL/dz_j = K (q_j - [j = t]),   K = (1-s) + s ((1 - q_t) - q_t log q_t)
 * each within 4 ulp of the exact value for any finite logits. With probabilities, label smoothing or weights L is a sum
 * over the classes; ref/loss.py is the definition.
 *
 * On a microcontroller: copy lace.h, lace_math.h and lace_row.c, which has no options and evaluates row by row.
 *     static lace_totals_f32 totals;                          // all 0
 *     while (classify(logits, &target))                       // logits[10] and the true class of the next sample
 *         lace_row_f32(NULL, NULL, &totals, logits, target, 10);
 *     mean = totals.loss.high / totals.count;    correct = totals.top[0];
 *
 * With all options, many rows at once, in float or double: copy lace.h, lace_math.h, lace_rows.h and lace.c.
 *     float logits[2][3] = {{1, 4, 2}, {0, 5, 0}}, loss[2], gradient[2][3];
 *     int64_t target[2] = {1, 0};
 *     lace_rows_f32(loss, gradient[0], logits[0], target, NULL, NULL, 0, 2, 3, NULL, NULL);
 *
 * Compile with contraction off (-ffp-contract=off, or -std=c99 with GCC) for the same bits everywhere, and never with
 * -ffast-math. What the compiler calls must be there: nothing of libc, but on a processor without floating point its own
 * library (-lgcc).
 */
#ifndef LACE_H
#define LACE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What the functions return, beside the number of the first row whose target is not allowed. Unless it is LACE_DONE,
 * nothing has been written. */
enum {
    LACE_DONE = -1,
    LACE_NULL = -2, /* an address is missing */
    LACE_SIZE = -3  /* no class, or more values than memory has bytes for */
};

typedef struct { float high, low; } lace_pair_f32; /* their exact sum, |low| at most about an ulp of high */
typedef struct { double high, low; } lace_pair_f64;

/* Of the rows so far, all 0 before the first. A mean is high / count: low keeps what has been rounded off the sum. */
typedef struct {
    lace_pair_f32 loss, cross_entropy;
    size_t count;
    size_t top[5]; /* top[i]: rows whose class is among the i + 1 that lead in the order of falling logits */
} lace_totals_f32;

/* Loss and gradient of one row of k logits at strength 1; at strength s it is (1-s) cross entropy + s loss.
 *     loss         written, or NULL
 *     gradient     k values, written, or NULL
 *     totals       the row is added, or NULL
 *     logits       k values; may not overlap an output
 *     target       class index, less than k
 * Returns LACE_DONE, 0 if the target is no class, or another of the codes above. */
int lace_row_f32(float *loss, float *gradient, lace_totals_f32 *totals, const float *logits, size_t target, size_t k);

typedef struct {
    const float *weight;    /* k class weights, or NULL for 1 */
    float label_smoothing;  /* in [0, 1]: probabilities y become (1 - e) y + e / k */
    float strength;         /* in [0, 1]: 1 is LACE, 0 cross entropy */
    int64_t ignore_index;   /* rows with this target have loss 0 and gradient 0 */
} lace_options_f32;

typedef struct {
    const double *weight;
    double label_smoothing;
    double strength;
    int64_t ignore_index;
} lace_options_f64;

/* What else is known of a row with class t, n values each, written, or NULL: -log q_t; q_t; the number of classes that
 * come before t in the order of falling logits, equal ones by index; and the largest probability of the row. An ignored
 * row has 0, 0, k and 0. */
typedef struct {
    float *cross_entropy;
    float *probability;
    int64_t *rank;
    float *confidence;
} lace_statistics_f32;

typedef struct {
    double *cross_entropy;
    double *probability;
    int64_t *rank;
    double *confidence;
} lace_statistics_f64;

/* Arrays are aligned to their type. Arithmetic rounds to nearest and keeps subnormal numbers, as a program starts: a thread
 * that was told otherwise (fesetround, flush-to-zero) sets it back before a call, or gets results with errors of that size.
 * Targets are checked before anything is written. What another thread writes to an array during a call may make values
 * wrong, but no address outside the arrays is ever formed from it: a class that is none by then is ignored.
 * A term larger than the largest number of its type is infinite. */

/* Loss and gradient of n rows of k >= 1 logits.
 *     loss         n values, written
 *     gradient     n*k values, written row by row, or NULL
 *     logits       n*k values, row by row; may not overlap an output
 *     target       n class indices in [0, k) or ignore_index; not read if there are probabilities
 *     probability  n*k target probabilities, or NULL
 *     scale        factors for the rows of the gradient (not of the loss), `step` values apart: 0 for one that serves all
 *                  rows; or NULL for 1
 *     options      NULL for no weights, no smoothing, strength 1, ignore_index -100
 *     statistics   or NULL; there are none for probabilities
 * Returns LACE_DONE, the number of the first row whose target is not allowed, or another of the codes above. */
int64_t lace_rows_f32(float *loss, float *gradient, const float *logits, const int64_t *target,
                      const float *probability, const float *scale, size_t step, size_t n, size_t k,
                      const lace_options_f32 *options, const lace_statistics_f32 *statistics);
int64_t lace_rows_f64(double *loss, double *gradient, const double *logits, const int64_t *target,
                      const double *probability, const double *scale, size_t step, size_t n, size_t k,
                      const lace_options_f64 *options, const lace_statistics_f64 *statistics);

/* The same for n columns, as images have them, where a column's classes are `stride` values apart: class j of column i is
 * at logits[j * stride + i]. For class indices without smoothing; label_smoothing is not looked at. */
int64_t lace_columns_f32(float *loss, float *gradient, const float *logits, const int64_t *target, const float *scale,
                         size_t step, size_t n, size_t k, size_t stride, const lace_options_f32 *options);
int64_t lace_columns_f64(double *loss, double *gradient, const double *logits, const int64_t *target,
                         const double *scale, size_t step, size_t n, size_t k, size_t stride,
                         const lace_options_f64 *options);

/* The sum of n values, as the exact sum of sum[0] and the much smaller sum[1]; floats are summed in double, so that the
 * mean of large ones is there although their sum is no float. */
void lace_sum_f32(double sum[2], const float *values, size_t n);
void lace_sum_f64(double sum[2], const double *values, size_t n);

#ifdef __cplusplus
}
#endif
#endif
