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
 * lace_labels.c, which needs them too, does the same for labels that are present or absent, each by itself.
 *
 * With all options, many rows at once: copy lace.h, lace_math.h, lace_rows.h, lace_columns.h, lace_binary.h,
 * lace_posterior.h, and lace_f32.c for float, lace_f64.c for double. In C:
 *     float logits[2][3] = {{1, 4, 2}, {0, 5, 0}}, loss[2], gradient[2][3];
 *     const int64_t target[2] = {1, 0};
 *     const int64_t status = lace_rows_f32(&(lace_args_f32){
 *         .loss = loss, .gradient = gradient[0], .logits = logits[0], .target = target, .n = 2, .k = 3});
 *
 * In C++, and with options:
 *     lace_options_f32 options = LACE_DEFAULTS;
 *     options.label_smoothing = 0.1f;
 *     lace_args_f32 args = {};
 *     args.loss = loss, args.gradient = gradient[0], args.logits = logits[0], args.target = target;
 *     args.n = 2, args.k = 3, args.options = &options;
 *     const int64_t status = lace_rows_f32(&args);
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

/* What the functions return: LACE_DONE; below it what is wrong with the call; or, above it, 1 + the number of the first
 * row whose target is not allowed. Unless it is LACE_DONE, nothing has been written. */
enum {
    LACE_DONE = 0,
    LACE_NULL = -1, /* an address is missing */
    LACE_SIZE = -2,  /* no class, lines that overlap, or more values than memory has bytes for */
    LACE_OPTION = -3 /* lace_posterior_: a weight or a label smoothing for which logits do not tell the probabilities */
};

typedef struct { float high, low; } lace_pair_f32; /* their exact sum, |low| at most about an ulp of high */
typedef struct { double high, low; } lace_pair_f64;

/* Of the rows so far, all 0 before the first. A mean is high / count: low keeps what has been rounded off the sum. Once
 * a sum is larger than the largest number, high is infinite and low NaN. */
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
 * Returns LACE_DONE, 1 if the target is no class, or another of the codes above. */
int lace_row_f32(float *loss, float *gradient, lace_totals_f32 *totals, const float *logits, size_t target, size_t k);

/* The same, in lace_labels.c, for k labels that are present or absent, each by itself: k losses and k values of the gradient,
 * k labels added to the totals. label[j] is 1 where label j is present, else 0. totals.top[0] counts those whose logit has
 * the right sign: 0 is an absent label's, NaN is never right. Returns LACE_DONE or LACE_NULL. */
int lace_labels_f32(float *loss, float *gradient, lace_totals_f32 *totals, const float *logits, const uint8_t *label,
                    size_t k);

/* Class probabilities of one row: where a model that was trained with LACE answers these logits, and has learnt all that
 * there is to learn, classes come with these probabilities. They are not the softmax.
 *     posterior    k values, written
 *     logits       k values, as they were trained; may not overlap the output
 * Returns LACE_DONE or another of the codes above. A logit of -inf has probability 0. With a logit of NaN or +inf, or -inf
 * only, all are NaN. */
int lace_row_posterior_f32(float *posterior, const float *logits, size_t k);

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

/* Where options begin: all 0 would be strength 0, cross entropy, and ignore class 0. */
#define LACE_DEFAULTS {NULL, 0, 1, -100}

/* Arrays are aligned to their type. Arithmetic rounds to nearest and keeps subnormal numbers, as a program starts: a thread
 * that was told otherwise (fesetround, flush-to-zero) sets it back before a call, or gets results with errors of that size.
 * Targets are checked before anything is written. What another thread writes to an array during a call may make values
 * wrong, but no address outside the arrays is ever formed from it: a class that is none by then is ignored.
 *
 * At the ends of a type's range: a term larger than its largest number is infinite, so that where weights of both signs
 * meet such terms a loss may be NaN although the exact sum is infinite. An exponential exp(z_j - max) below 2^-168 (float)
 * or 2^-1093 (double) counts as 0, before a factor of the gradient could make it larger. */

/* What lace_rows_ and lace_columns_ work on. A field left 0 has the default that is named here; the others are needed. A
 * matrix of n rows of k values lies row by row for lace_rows_, class by class for lace_columns_: its lines are n rows of
 * k values or k classes of n values. */
typedef struct {
    float *loss;              /* n values, written */
    float *gradient;          /* matrix, written; NULL: it is not computed */
    const float *logits;      /* matrix; may not overlap what is written */
    const int64_t *target;    /* n class indices in [0, k) or ignore_index; not read if there is a soft_target */
    const float *soft_target; /* matrix of target probabilities; NULL: there are none */
    const float *scale;       /* factors for the rows of the gradient, not of the loss; NULL: 1 */
    size_t scale_step;        /* values from a factor to the next row's; 0: one factor serves all rows */
    size_t n;                 /* rows; 0: nothing is done */
    size_t k;                 /* classes, at least 1 */
    ptrdiff_t logits_stride;  /* values from where a line starts to the next one, negative where lines run backwards; 0:
                               * they lie side by side */
    size_t gradient_stride;   /* the same of the gradient; what lies between its lines is not written */
    const lace_options_f32 *options; /* NULL: LACE_DEFAULTS */

    /* What else is known of a row with class t: n values, written; NULL: it is not computed. An ignored row has 0, 0, k
     * and 0. Not written by lace_columns_, nor if there is a soft_target. */
    float *cross_entropy;     /* -log q_t */
    float *probability;       /* q_t */
    int64_t *rank;            /* classes that come before t in the order of falling logits, equal ones by index */
    float *confidence;        /* the largest probability of the row */

    size_t soft_target_stride; /* as gradient_stride, of the soft target */
} lace_args_f32;

typedef struct {
    double *loss;
    double *gradient;
    const double *logits;
    const int64_t *target;
    const double *soft_target;
    const double *scale;
    size_t scale_step;
    size_t n;
    size_t k;
    ptrdiff_t logits_stride;
    size_t gradient_stride;
    const lace_options_f64 *options;
    double *cross_entropy;
    double *probability;
    int64_t *rank;
    double *confidence;
    size_t soft_target_stride;
} lace_args_f64;

/* Loss and gradient of n rows. Returns LACE_DONE or what is wrong, see above. */
int64_t lace_rows_f32(const lace_args_f32 *args);
int64_t lace_rows_f64(const lace_args_f64 *args);

/* The same where class j of row i is at logits[j * logits_stride + i], as images have it, whose rows are pixels. */
int64_t lace_columns_f32(const lace_args_f32 *args);
int64_t lace_columns_f64(const lace_args_f64 *args);

/* What lace_binary_ works on: n labels that are present or absent, each by itself. A field left 0 has the default that is
 * named here, but for `strength`, where 0 is binary cross entropy. With q = sigmoid(z), weight w and pos_weight p:
 *     loss  w (p y f(q) + (1 - y) f(1 - q))        f(q) = ((1-s) + s (1 - q)) (-log q)
 * Rows of k labels share their weights, as those of a matrix do whose columns are labels. */
typedef struct {
    float *loss;             /* n values, written; NULL: it is not computed */
    float *gradient;         /* n values, written; NULL: it is not computed */
    const float *logits;     /* n values; may not overlap what is written */
    const float *target;     /* n probabilities y that a label is present; the loss is linear in them, outside [0, 1] too */
    const uint8_t *label;    /* read in place of a `target` NULL: n bytes, 1 where a label is present and 0 where absent */
    const float *weight;     /* k values, w; NULL: 1 */
    const float *pos_weight; /* k values, p; NULL: 1 */
    const float *scale;      /* factors of the gradient, not of the loss; NULL: 1 */
    size_t scale_step;       /* values from a factor to the next label's; 0: one factor serves all */
    size_t n;                /* labels; 0: nothing is done */
    size_t k;                /* labels that a row has; not read without weights */
    size_t first;            /* labels of its row that come before label 0 */
    float strength;          /* s, in [0, 1]: 1 is LACE, 0 binary cross entropy */
} lace_binary_args_f32;

typedef struct {
    double *loss;
    double *gradient;
    const double *logits;
    const double *target;
    const uint8_t *label;
    const double *weight;
    const double *pos_weight;
    const double *scale;
    size_t scale_step;
    size_t n;
    size_t k;
    size_t first;
    double strength;
} lace_binary_args_f64;

/* Loss and gradient of n labels. Returns LACE_DONE or what is wrong with the call. A logit of +inf or -inf is a label that is
 * present or absent for certain: where that is wrong its loss is infinite, and its gradient is not. */
int64_t lace_binary_f32(const lace_binary_args_f32 *args);
int64_t lace_binary_f64(const lace_binary_args_f64 *args);

/* What lace_posterior_rows_ and lace_posterior_columns_ work on, with matrices as above. A field left 0 has the default
 * that is named here; the others are needed. */
typedef struct {
    float *posterior;         /* matrix, written: class probabilities, as lace_row_posterior_f32 describes them */
    const float *logits;      /* matrix; may not overlap what is written */
    size_t n;                 /* rows; 0: nothing is done */
    size_t k;                 /* classes, at least 1 */
    ptrdiff_t logits_stride;  /* as in lace_args_f32 */
    size_t posterior_stride;  /* as gradient_stride there */
    const lace_options_f32 *options; /* those of the training loss; NULL: LACE_DEFAULTS. ignore_index is not looked at.
                               * Weights are positive, finite, and no more than a factor of 2^60 apart (double: 2^800);
                               * label_smoothing is less than 1. Else the result is LACE_OPTION. */
} lace_posterior_f32;

typedef struct {
    double *posterior;
    const double *logits;
    size_t n;
    size_t k;
    ptrdiff_t logits_stride;
    size_t posterior_stride;
    const lace_options_f64 *options;
} lace_posterior_f64;

/* Class probabilities of n rows or columns; ref/posterior.py is the definition. Each is within 4 ulp. With label smoothing e
 * a class's part of the smoothed target, (1 - e) p + e / k, is: a p that is much less than e has fewer digits, and is 0
 * where logits say that the part is less than e / k. Where weights differ by more than 2^18 an exponential that counts
 * as 0, see above, may have counted. Returns LACE_DONE or what is wrong. */
int64_t lace_posterior_rows_f32(const lace_posterior_f32 *args);
int64_t lace_posterior_rows_f64(const lace_posterior_f64 *args);
int64_t lace_posterior_columns_f32(const lace_posterior_f32 *args);
int64_t lace_posterior_columns_f64(const lace_posterior_f64 *args);

/* The sum of n values, as the exact sum of sum[0] and the much smaller sum[1]; floats are summed in double, so that the
 * mean of large ones is there although their sum is no float. */
void lace_sum_f32(double sum[2], const float *values, size_t n);
void lace_sum_f64(double sum[2], const double *values, size_t n);

#ifdef __cplusplus
}
#endif
#endif
