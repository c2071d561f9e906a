/* The values that a row should have, in 113 bits. Compiled apart, by GCC, which has them (libquadmath). */
#ifndef EXACT_H
#define EXACT_H

#include <stddef.h>

typedef struct {
    size_t width;              /* 4 or 8: bytes of a value, of float or of double */
    size_t k, target;          /* the target is not looked at if there are probabilities */
    const double *logits;      /* k */
    const double *probability; /* k, or NULL */
    const double *weight;      /* k, or NULL */
    double smoothing, strength, scale;
} Row;

typedef struct {
    const double *loss;                   /* or NULL */
    const double *gradient;               /* k, or NULL */
    const double *cross_entropy, *chance; /* -log q and q of the target, one each, or NULL */
    const double *confidence;             /* the largest q, or NULL */
} Results;

/* NULL, or in words what is not within the bounds of tests/tolerances.py.
 * `losses` becomes the exact loss and cross entropy, or is NULL. */
const char *wrong_row(const Row *row, const Results *found, double losses[2]);
const char *wrong_posterior(const Row *row, const double *found); /* the target is not looked at */
const char *wrong_totals(const double *losses, size_t n, const double total[2]); /* of floats */
const char *wrong_sum(const double *values, size_t n, size_t width, const double sum[2]);

#endif
