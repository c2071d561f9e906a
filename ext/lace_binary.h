/* Labels that are present or absent, each by itself, after lace_rows.h. SPDX-License-Identifier: MIT
 *
 * A label is a sample of two classes with the logits (0, z). With e = exp(-|z|), whose argument no subtraction rounds:
 *                                       q          1 - q      -log q
 *     the class with the larger logit   1/(1+e)    e/(1+e)    log(1+e)
 *     the other one                     e/(1+e)    1/(1+e)    |z| + log(1+e)
 * A Wide holds the digits that products of these need. For float it is a double, in less time than pairs of floats; for
 * double it is a pair. What is small as e is held KEPT times too large, clear of subnormal numbers.
 *
 * log(1+e) = log((1+s)/(1-s)) with s = e/(2+e) <= 1/3. LOG_TO_2 is LOG of lace_math.h in s^2 <= 1.01 / 9. */

#define BLOCK ((size_t)64) /* labels side by side */
#if DIGITS == 24
typedef double Wide;
typedef lace_binary_args_f32 BinaryArgs;
#define KEPT 1.0 /* a double has them */
#define LARGEST FLT_MAX
#define LOG_TO_2 \
    {0.6666666735567979, 0.39999693613854664, 0.2859304597485878, \
     0.21695019260835285, 0.23283684279466701}

static inline Wide wide(double x) { return x; }
static inline double w_rounded(Wide a) { return a; }
static inline Wide w_sum(Wide a, Wide b) { return a + b; }
static inline Wide w_product(Wide a, Wide b) { return a * b; }
static inline Wide w_scaled(Wide a, double power_of_2) { return a * power_of_2; }
static inline Wide w_plus(double a, Wide b) { return a + b; }
static inline Wide w_either(int first, Wide a, Wide b) { return first ? a : b; }

typedef struct { double value[BLOCK]; } Wides;
static inline Wide w_load(const Wides *wides, size_t l) { return wides->value[l]; }
static inline void w_store(Wides *wides, size_t l, Wide x) { wides->value[l] = x; }

/* 1 / (1 + e) and, at `part`, e / (2 + e). One division serves both. */
static inline Wide w_inverse(Wide *part, Wide e)
{
    const double one_e = 1 + e, two_e = 2 + e, inverse = 1 / (one_e * two_e);
    *part = e * (one_e * inverse);
    return two_e * inverse;
}

static inline double log_series(double x)
{
    static const double c[] = LOG_TO_2;
    const double x2 = x * x;
    return (c[0] + c[1] * x) + x2 * ((c[2] + c[3] * x) + x2 * c[4]);
}

/* exp(-size), to 2^-29 of itself. What is below e^-700 is lost before any three floats make a float of it. */
static void kept_exponentials(double *restrict e, const double *restrict size, size_t count)
{
    static const float c[] = EXP;
    const double c0 = (double)c[0], c1 = (double)c[1], c2 = (double)c[2], c3 = (double)c[3], c4 = (double)c[4];
    const double c5 = (double)c[5], shift = 6755399441056767.0; /* 1.5 * 2^52 + 1023 */
    for (size_t l = 0; l < count; l++) {
        const double x = size[l] > 700 ? -700 : -size[l], shifted = x * 1.4426950408889634 + shift;
        const double r = x - (shifted - shift) * 0.6931471805599453, r2 = r * r;
        union { double real; uint64_t bits; } power;
        power.real = shifted;
        power.bits <<= 52;
        e[l] = ((1 + r) + r2 * ((c0 + c1 * r) + r2 * ((c2 + c3 * r) + r2 * (c4 + c5 * r)))) * power.real;
    }
}
#else
typedef Pair Wide;
typedef lace_binary_args_f64 BinaryArgs;
#define KEPT EXP_SCALE
#define LARGEST DBL_MAX
#define LOG_TO_2 \
    {0.6666666666666666, 0.4000000000001604, 0.2857142856672487, 0.2222222275606996, \
     0.1818178750224232, 0.15385624086485936, 0.13313262601967046, \
     0.120094183811604, 0.0875831212433233, 0.16253585564486742}

static inline Wide wide(double x)
{
    Pair p = {x, 0};
    return p;
}

static inline double w_rounded(Wide a) { return rounded(a); }
static inline Wide w_sum(Wide a, Wide b) { return add(a, b); }
static inline Wide w_product(Wide a, Wide b) { return multiply(a, b); }

static inline Wide w_scaled(Wide a, double power_of_2)
{
    a.high *= power_of_2;
    a.low *= power_of_2;
    return a;
}

/* a + b. What it lacks of w_sum is that the low part is at most about an ulp of the high one. */
static inline Wide w_plus(double a, Wide b)
{
    Pair p = two_sum(a, b.high);
    p.low += b.low;
    return p;
}

static inline Wide w_either(int first, Wide a, Wide b)
{
    Pair p = {first ? a.high : b.high, first ? a.low : b.low};
    return p;
}

typedef struct { double high[BLOCK], low[BLOCK]; } Wides;

static inline Wide w_load(const Wides *wides, size_t l)
{
    Pair p = {wides->high[l], wides->low[l]};
    return p;
}

static inline void w_store(Wides *wides, size_t l, Wide x)
{
    wides->high[l] = x.high;
    wides->low[l] = x.low;
}

static inline Wide w_inverse(Wide *part, Wide e)
{
    *part = divide(e, w_plus(2, e));
    return divide(wide(1), w_plus(1, e));
}

static inline double log_series(double x)
{
    static const double c[] = LOG_TO_2;
    return horner(c, sizeof c / sizeof *c, x);
}

static void kept_exponentials(double *restrict e, const double *restrict size, size_t count)
{
    double high[BLOCK], low[BLOCK], shifted[BLOCK];
    for (size_t l = 0; l < count; l++) exp_reduce_to(&high[l], &low[l], &shifted[l], wide(-size[l]));
    exp_finish_all(e, high, low, shifted, count);
}
#endif

/* x times a factor, of an x that is `kept` times too large */
static inline double times(Wide x, double factor, double kept)
{
    const int large = kept > 1 && (factor > 4294967296.0 || factor < -4294967296.0); /* 2^32 */
    return (w_rounded(x) * (large ? factor / kept : factor)) * (large ? 1 : 1 / kept);
}

/* BLOCK labels or fewer side by side, in double so that a compiler works on as many of each at once. `top` is the class with
 * the larger logit. */
typedef struct {
    double size[BLOCK];       /* |z|, at most LARGEST */
    double top[BLOCK];        /* coefficient of f(q) of the class top in the loss */
    double other[BLOCK];      /* that of the other class */
    double slope_scale[BLOCK]; /* factor of the derivative with respect to |z| */
    double loss[BLOCK], slope[BLOCK];
} Labels;

static void load_labels(Labels *x, const BinaryArgs *args, size_t i, size_t count)
{
    const Real *z = args->logits + i;
    const double scale = args->scale && !args->scale_step ? (double)args->scale[0] : 1, zero = (double)opaque_zero();
    double present[BLOCK], absent[BLOCK];
    if (args->target)
        for (size_t l = 0; l < count; l++) present[l] = (double)args->target[i + l] - zero;
    else
        for (size_t l = 0; l < count; l++) present[l] = (double)args->label[i + l];
    for (size_t l = 0; l < count; l++) {
        absent[l] = 1 - present[l];
        x->slope_scale[l] = scale;
    }
    if (args->weight || args->pos_weight)
        for (size_t l = 0, j = (args->first + i) % args->k; l < count; l++, j = j + 1 < args->k ? j + 1 : 0) {
            const double w = args->weight ? (double)args->weight[j] : 1;
            present[l] *= args->pos_weight ? w * (double)args->pos_weight[j] : w;
            absent[l] *= w;
        }
    if (args->scale && args->scale_step)
        for (size_t l = 0; l < count; l++) x->slope_scale[l] = (double)args->scale[(i + l) * args->scale_step] - zero;
    for (size_t l = 0; l < count; l++) {
        const double value = (double)z[l], size = value < 0 ? -value : value;
        x->size[l] = size > (double)LARGEST ? (double)LARGEST : size;
        x->top[l] = value > 0 ? present[l] : absent[l];
        x->other[l] = value > 0 ? absent[l] : present[l];
        x->slope_scale[l] = value > 0 ? x->slope_scale[l] : -x->slope_scale[l];
    }
}

/* (1-s) + s x; at `whole` strength nothing is to be done. */
static inline Wide tempered(int whole, Wide s, Wide rest, Wide x)
{
    return whole ? x : w_sum(rest, w_product(s, x));
}

/* Three loops, for the reason that `exp_reduce_to` has three. */
static inline void solve_labels(Labels *x, double strength, int whole, size_t count)
{
    const Wide s = wide(strength), rest = w_sum(wide(1), wide(-strength));
    double e[BLOCK]; /* KEPT times */
    Wides larges, logs;
    kept_exponentials(e, x->size, count);
    for (size_t l = 0; l < count; l++) {
        Wide part;
        w_store(&larges, l, w_inverse(&part, wide(e[l] * (1 / KEPT))));
        const double s1 = w_rounded(part), s2 = s1 * s1;
        w_store(&logs, l, w_plus(s1 * (s2 * log_series(s2)), w_scaled(part, 2)));
    }
    for (size_t l = 0; l < count; l++) {
        /* f and K (1-q) of both classes; of a small e the logarithm is e, too, and has fewer digits where it is subnormal */
        const Wide large = w_load(&larges, l), log = w_load(&logs, l), n = w_plus(x->size[l], log);
        const Wide kept_small = w_product(wide(e[l]), large), small = w_scaled(kept_small, 1 / KEPT);
        const int tiny = KEPT > 1 && e[l] < KEPT * 8.673617379884035e-19; /* 2^-60 */
        const Wide kept_log = w_either(tiny, kept_small, w_scaled(log, KEPT));
        const Wide f_top = w_product(tempered(whole, s, rest, small), kept_log);
        const Wide f_other = w_product(tempered(whole, s, rest, large), n);
        const Wide k_top = tempered(whole, s, rest, w_sum(small, w_product(large, log)));
        const Wide k_other = tempered(whole, s, rest, w_sum(large, w_product(small, n)));
        const double top = x->top[l], other = x->other[l], scale = x->slope_scale[l];
        x->loss[l] = times(f_top, top, KEPT) + times(f_other, other, 1);
        x->slope[l] = times(w_product(k_other, large), other * scale, 1) -
                      times(w_product(k_top, kept_small), top * scale, KEPT);
    }
}

int64_t NAME(lace_binary)(const BinaryArgs *args)
{
    const Real zero = opaque_zero();
    if (!args) return LACE_NULL;
    if (args->n > 0 && args->k == 0 && (args->weight || args->pos_weight)) return LACE_SIZE;
    if (args->n > SIZE_MAX / sizeof(Real)) return LACE_SIZE;
    if (args->n > 0 && !(args->logits && (args->target || args->label))) return LACE_NULL;
    for (size_t i = 0; i < args->n; i += BLOCK) {
        const size_t count = args->n - i < BLOCK ? args->n - i : BLOCK;
        const Real *z = args->logits + i;
        Labels x;
        load_labels(&x, args, i, count);
        if (args->strength == 1)
            solve_labels(&x, 1, 1, count);
        else
            solve_labels(&x, (double)args->strength, 0, count);
        if (args->loss)
            for (size_t l = 0; l < count; l++) {
                const Real loss = (Real)x.loss[l]; /* of LARGEST where |z| is infinite */
                args->loss[i + l] = z[l] > LARGEST || z[l] < -LARGEST ? loss * LARGEST * LARGEST : loss;
            }
        if (args->gradient)
            for (size_t l = 0; l < count; l++) args->gradient[i + l] = (Real)x.slope[l] - zero;
    }
    return LACE_DONE;
}
