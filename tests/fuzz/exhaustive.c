/* Every float x with 2^-30 <= |x| <= 128, or every STEP-th of them: loss and gradient of short rows of 0 and x, by the
 * kernel and in double.
 *
 * Why double is exact enough: with own = exp(z_t) and others = the sum of exp(z_j) elsewhere,
 *     n = log1p(others / own)    r = others / (own + others)    q = own / (own + others)    L = r n    K = r + q n
 * has no difference of two numbers. So no operation makes earlier errors larger, they add up: exp and log1p are within
 * 1 ulp in glibc, with at most ten roundings more. That is below 2^-48 of the value, 2^-24 ulp of a float. */
#include "lace_builds.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 1024, MOST_CLASSES = 3 };

typedef struct { size_t k, target; } Kind; /* of rows (0, x, ...) */
static const Kind kinds[] = {{2, 0}, {3, 0}, {3, 1}};
enum { KINDS = sizeof kinds / sizeof *kinds };

static const char *const functions[] = {"lace_rows_f32", "lace_row_f32", "lace_binary_f32"};
enum { FUNCTIONS = sizeof functions / sizeof *functions };

/* A label that is absent is class 0 of (0, x). */
static int has(int function, Kind kind)
{
    return function != 2 || kind.k == 2;
}

/* The one place that knows the functions' arguments. */
static void call(int function, const lace_build *build, Kind kind, float *loss, float *gradient, const float *z)
{
    int64_t targets[ROWS];
    for (size_t i = 0; i < ROWS; i++) targets[i] = (int64_t)kind.target;
    if (function == 0)
        build->rows_f32(&(lace_args_f32){
            .loss = loss, .gradient = gradient, .logits = z, .target = targets, .n = ROWS, .k = kind.k});
    for (size_t i = 0; function == 1 && i < ROWS; i++)
        lace_row_f32(&loss[i], gradient + i * kind.k, NULL, z + i * kind.k, kind.target, kind.k);
    if (function == 2) {
        static const uint8_t absent[ROWS] = {0};
        float x[ROWS], slope[ROWS];
        for (size_t i = 0; i < ROWS; i++) x[i] = z[2 * i + 1];
        build->binary_f32(&(lace_binary_args_f32){
            .loss = loss, .gradient = slope, .logits = x, .label = absent, .n = ROWS, .strength = 1});
        for (size_t i = 0; i < ROWS; i++) gradient[2 * i] = -(gradient[2 * i + 1] = slope[i]);
    }
}

typedef struct { double loss, gradient; float at_loss, at_gradient; } Worst; /* in ulp */

static float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* How far `found` is from `exact`, an ordinary number, in ulp of float. */
static double ulps(float found, double exact)
{
    uint64_t bits;
    double units_in_one;
    memcpy(&bits, &exact, sizeof bits);
    const uint64_t exponent = bits >> 52 & 2047, unit = exponent - 23 > 1023 - 149 ? exponent - 23 : 1023 - 149;
    bits = (2046 - unit) << 52;
    memcpy(&units_in_one, &bits, sizeof bits);
    return found == found ? fabs((double)found - exact) * units_in_one : INFINITY;
}

static void compare(Worst *worst, Kind kind, float x, double e, float loss, const float *gradient)
{
    const size_t k = kind.k, t = kind.target;
    const double own = t == 0 ? 1 : e, others = (t == 0 ? 0 : 1) + (double)(k - 1 - t) * e, sum = own + others;
    const double n = log1p(others / own), r = others / sum, K = r + own / sum * n, off = ulps(loss, r * n);
    if (off > worst->loss) worst->loss = off, worst->at_loss = x;
    for (size_t j = 0; j < k; j++) {
        const double from = ulps(gradient[j], j == t ? -K * r : K * (j == 0 ? 1 : e) / sum);
        if (from > worst->gradient) worst->gradient = from, worst->at_gradient = x;
    }
}

static void try_all(Worst worst[FUNCTIONS][KINDS], const lace_build *build, const float x[ROWS])
{
    float z[ROWS * MOST_CLASSES], loss[ROWS], gradient[ROWS * MOST_CLASSES];
    double e[ROWS];
    for (size_t i = 0; i < ROWS; i++) e[i] = exp((double)x[i]);
    for (size_t p = 0; p < KINDS; p++) {
        const size_t k = kinds[p].k;
        for (size_t i = 0; i < ROWS * k; i++) z[i] = i % k == 0 ? 0 : x[i / k];
        for (int f = 0; f < FUNCTIONS; f++) {
            if (!has(f, kinds[p])) continue;
            call(f, build, kinds[p], loss, gradient, z);
            for (size_t i = 0; i < ROWS; i++) compare(&worst[f][p], kinds[p], x[i], e[i], loss[i], gradient + i * k);
        }
    }
}

int main(int count, char **arguments)
{
    const int64_t first = 0x30800000, last = 0x43000000; /* the bits of 2^-30 and of 128 */
    const int64_t step = count > 1 ? atol(arguments[1]) : 1, each = (last - first) / step + 1;
    Worst worst[FUNCTIONS][KINDS] = {{{0, 0, 0, 0}}};
    size_t builds;
    const lace_build *build = lace_builds(&builds);
    build += builds - 1;
#pragma omp parallel
    {
        Worst own[FUNCTIONS][KINDS] = {{{0, 0, 0, 0}}};
#pragma omp for schedule(dynamic, 64)
        for (int64_t start = 0; start < 2 * each; start += ROWS) {
            float x[ROWS];
            for (int64_t i = 0; i < ROWS; i++) { /* the last one again where there are no more */
                const int64_t at = start + i < 2 * each ? start + i : 2 * each - 1;
                x[i] = from_bits((uint32_t)(first + at / 2 * step)) * (at % 2 ? -1 : 1);
            }
            try_all(own, build, x);
        }
#pragma omp critical
        for (int f = 0; f < FUNCTIONS; f++)
            for (size_t p = 0; p < KINDS; p++) {
                Worst *w = &worst[f][p], *o = &own[f][p];
                if (o->loss > w->loss) w->loss = o->loss, w->at_loss = o->at_loss;
                if (o->gradient > w->gradient) w->gradient = o->gradient, w->at_gradient = o->at_gradient;
            }
    }
    for (int f = 0; f < FUNCTIONS; f++)
        for (size_t p = 0; p < KINDS && has(f, kinds[p]); p++)
            printf("%s, rows (0, x%s) of class %zu: of %lld x, the worst loss is off by %.4f ulp, at %a, "
                   "the worst gradient by %.4f, at %a\n",
                   functions[f], kinds[p].k == 3 ? ", x" : "", kinds[p].target, (long long)(2 * each), worst[f][p].loss,
                   (double)worst[f][p].at_loss, worst[f][p].gradient, (double)worst[f][p].at_gradient);
    return 0;
}
