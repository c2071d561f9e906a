/* The mathematics of one row in terms of REAL; lace.c includes this once for float and once for double.
 *
 * Design.
 * a) Every exponential is taken of z - max with the rounding error of the subtraction put back: without it the error of
 *    exp grows with the margin, to 16 ulp and more. It ends with one rounding, 0.55 ulp in all.
 *    It is kept 2^RAISED too large until it is summed: terms that underflow one by one may add up to much.
 * b) The sum leaves one class out, by index: the target's, or in rows with a target for every class the largest
 *    logit's. So 1 - q is a quotient of sums of non-negative terms, never a difference.
 * c) Sums run in LANES fixed lanes and keep every rounding error: exact enough at any k, the same bits at any vector width.
 * d) What remains of a row is a dozen operations on pairs (high, low): seven plain roundings in a row would cost 7 ulp.
 */
enum { NAME(LANES) = 16, NAME(CHUNK) = 64 };

#define LANES NAME(LANES)
#define CHUNK NAME(CHUNK)
#define Pair NAME(Pair)
#define Lanes NAME(Lanes)
#define Row NAME(Row)
#define Terms NAME(Terms)
#define Target NAME(Target)
#define bits_of NAME(bits_of)
#define from_bits NAME(from_bits)
#define finite NAME(finite)
#define two_sum NAME(two_sum)
#define two_product NAME(two_product)
#define add NAME(add)
#define multiply NAME(multiply)
#define divide NAME(divide)
#define rounded NAME(rounded)
#define weighted NAME(weighted)
#define horner NAME(horner)
#define exponentials NAME(exponentials)
#define log_1_plus NAME(log_1_plus)
#define accumulate NAME(accumulate)
#define total NAME(total)
#define maximum NAME(maximum)
#define sum_exponentials NAME(sum_exponentials)
#define hard_row NAME(hard_row)
#define negative_log NAME(negative_log)
#define describe NAME(describe)
#define class_terms NAME(class_terms)
#define soft_row NAME(soft_row)

typedef struct { REAL high, low; } Pair; /* their exact sum, |low| at most about an ulp of high */

static inline BITS bits_of(REAL x)
{
    union { REAL real; BITS bits; } u;
    u.real = x;
    return u.bits;
}

static inline REAL from_bits(BITS b)
{
    union { BITS bits; REAL real; } u;
    u.bits = b;
    return u.real;
}

static inline int finite(REAL x)
{
    return x - x == 0;
}

static inline Pair two_sum(REAL a, REAL b)
{
    REAL s = a + b, b_in_s = s - a;
    Pair p = {s, (a - (s - b_in_s)) + (b - b_in_s)};
    return p;
}

static inline Pair two_product(REAL a, REAL b)
{
    REAL a1 = from_bits(bits_of(a) & HIGH_HALF), a0 = a - a1;
    REAL b1 = from_bits(bits_of(b) & HIGH_HALF), b0 = b - b1;
    REAL p = a * b;
    Pair r = {p, ((a1 * b1 - p) + a1 * b0 + a0 * b1) + a0 * b0};
    return r;
}

static inline Pair add(Pair a, Pair b)
{
    Pair s = two_sum(a.high, b.high);
    return two_sum(s.high, finite(s.high) ? s.low + (a.low + b.low) : 0); /* beside an infinity a low part is NaN */
}

static inline Pair multiply(Pair a, Pair b)
{
    Pair p = two_product(a.high, b.high);
    p.low += a.high * b.low + a.low * b.high;
    return p;
}

static inline Pair divide(Pair a, Pair b)
{
    REAL q = a.high / b.high;
    Pair p = two_product(q, b.high);
    Pair r = {q, (((a.high - p.high) - p.low) + (a.low - q * b.low)) / b.high};
    return r;
}

static inline REAL rounded(Pair a)
{
    return finite(a.high) ? a.high + a.low : a.high;
}

/* a f; 0 where an infinite loss has no weight. */
static inline REAL weighted(REAL a, REAL f)
{
    return a == 0 && f == f && !finite(f) ? 0 : a * f;
}

static inline REAL horner(const REAL *c, int n, REAL x)
{
    REAL y = c[n - 1];
    for (int i = n - 2; i >= 0; i--) y = y * x + c[i];
    return y;
}

/* e[i] = 2^RAISED exp(z[i] - m) for z[i] <= m; 0 for -inf, NaN for NaN and for inf - inf. */
static void exponentials(REAL *restrict e, const REAL *restrict z, REAL m, size_t count)
{
    static const REAL c[] = EXP;
    for (size_t i = 0; i < count; i++) {
        Pair d = two_sum(z[i], -m);
        REAL shifted = d.high * LOG2E + ROUNDER;
        REAL n = shifted - ROUNDER;
        REAL r1 = d.high - n * LN2_HIGH; /* exact */
        REAL r0 = d.low - n * LN2_LOW;
        REAL r = r1 + r0, one_r = 1 + r;
        r0 = ((r1 - r) + r0) + (r - (one_r - 1)); /* what r and 1 + r have lost */
        REAL y = one_r + (r0 + r * r * horner(c, sizeof c / sizeof *c, r));
        BITS power = (bits_of(shifted) - bits_of(ROUNDER) + (BITS)(BIAS + RAISED)) << MANTISSA;
        e[i] = d.high < SMALLEST_EXPONENT ? 0 : y * from_bits(power);
    }
}

/* log(1 + x) for x >= 0, good to about 2^-28 (float) or 2^-58 (double) of itself. */
static Pair log_1_plus(Pair x)
{
    static const REAL c[] = LOG;
    REAL u = 1 + x.high;
    SIGNED k = (SIGNED)((bits_of(u) + (ONE_BITS - SQRT_HALF_BITS)) >> MANTISSA) - BIAS; /* u / 2^k in sqrt 1/2 .. sqrt 2 */
    REAL down = from_bits((BITS)(BIAS - k) << MANTISSA), n = (REAL)k;
    Pair f = two_sum(down - 1, down * x.high), two = {2, 0}, n_ln2 = {n * LN2_HIGH, n * LN2_LOW};
    f.low += down * x.low;
    Pair s = divide(f, add(two, f));
    REAL s2 = s.high * s.high;
    Pair log_f = {2 * s.high, 2 * s.low + s.high * s2 * horner(c, sizeof c / sizeof *c, s2)};
    return add(n_ln2, log_f);
}

typedef struct { REAL high[LANES], low[LANES]; } Lanes;

/* sum[l] += e[l] + e[l + LANES] + ..., with every rounding error kept */
static inline void accumulate(Lanes *restrict sum, const REAL *restrict e)
{
    for (size_t i = 0; i < CHUNK; i += LANES)
        for (size_t l = 0; l < LANES; l++) {
            Pair s = two_sum(sum->high[l], e[i + l]);
            sum->high[l] = s.high;
            sum->low[l] += s.low;
        }
}

static inline Pair total(const Lanes *sum)
{
    Pair all = {0, 0};
    for (size_t l = 0; l < LANES; l++) {
        Pair lane = {sum->high[l], sum->low[l]};
        all = add(all, lane);
    }
    return all;
}

static REAL maximum(const REAL *z, size_t k)
{
    REAL lanes[LANES];
    for (size_t l = 0; l < LANES; l++) lanes[l] = z[l < k ? l : 0];
    for (size_t j = LANES; j < k; j += LANES)
        for (size_t l = 0; l < (k - j < LANES ? k - j : LANES); l++) lanes[l] = z[j + l] > lanes[l] ? z[j + l] : lanes[l];
    for (size_t l = 1; l < LANES; l++) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
    return lanes[0];
}

/* What the formulas need of a row: q and r of class `out` and the logarithm of the sum over all classes. */
typedef struct {
    REAL max;
    Pair others;  /* sum of exp(z_j - max) over j != out */
    Pair inverse; /* 1 / sum over all j */
    Pair log_sum; /* log of the sum over all j */
    REAL own;     /* exp(z_out - max) */
} Row;

/* Leaves 2^RAISED exp(z_j - max), and 0 at `out`, in `e` unless that is NULL. */
static Row sum_exponentials(REAL *e, const REAL *z, size_t k, REAL max, size_t out)
{
    Row row = {max, {0, 0}, {0, 0}, {0, 0}, 0};
    Lanes lanes = {{0}, {0}};
    Pair one = {1, 0}, own = {0, 0}, rest;
    for (size_t j = 0; j < k; j += CHUNK) {
        REAL block[CHUNK];
        size_t count = k - j < CHUNK ? k - j : CHUNK;
        exponentials(block, z + j, max, count);
        for (size_t i = count; i < CHUNK; i++) block[i] = 0;
        if (out - j < count) {
            row.own = block[out - j] * LOWER;
            block[out - j] = 0;
        }
        accumulate(&lanes, block);
        if (e)
            for (size_t i = 0; i < count; i++) e[j + i] = block[i];
    }
    row.others = total(&lanes);
    row.others.high *= LOWER;
    row.others.low *= LOWER;
    own.high = row.own;
    /* All but the largest term, which is exactly 1: either `out` is left out of the sum already, or it is small. */
    rest = row.others;
    if (z[out] < max) {
        rest.high -= 1;
        rest = add(rest, own);
    }
    row.inverse = divide(one, add(rest, one));
    row.log_sum = log_1_plus(rest);
    return row;
}

/* -log q_t */
static inline Pair negative_log(const Row *row, REAL z_t)
{
    return add(two_sum(row->max, -z_t), row->log_sum);
}

static void describe(const NAME(lace_statistics) *to, size_t i, const REAL *z, size_t k, size_t t, const Row *row)
{
    REAL e;
    int64_t rank = 0;
    exponentials(&e, z + t, row->max, 1);
    Pair e_t = {e * LOWER, 0};
    for (size_t j = 0; j < t; j++) rank += !(z[j] < z[t]); /* NaN counts as larger */
    for (size_t j = t + 1; j < k; j++) rank += !(z[j] <= z[t]);
    to->cross_entropy[i] = rounded(negative_log(row, z[t]));
    to->probability[i] = rounded(multiply(e_t, row->inverse));
    to->rank[i] = rank;
}

/* Loss of one row; its gradient times `scale` if `gradient` is not NULL. */
static REAL hard_row(Row *row, REAL *gradient, const REAL *z, size_t k, size_t t, REAL scale, REAL strength)
{
    *row = sum_exponentials(gradient, z, k, maximum(z, k), t);
    Pair s = {strength, 0}, rest = two_sum(1, -strength), e_t = {row->own, 0}, g = {scale, 0}, none = {0, 0};
    Pair r = multiply(row->others, row->inverse), q = multiply(e_t, row->inverse);
    Pair n = negative_log(row, z[t]);
    Pair qn = q.high == 0 ? none : multiply(q, n); /* its limit where n is infinite */
    if (gradient) {
        Pair factor = multiply(g, add(rest, multiply(s, add(r, qn))));
        REAL f = rounded(multiply(factor, row->inverse));
        for (size_t j = 0; j < k; j++) gradient[j] = (gradient[j] * LOWER) * f;
        gradient[t] = -rounded(multiply(factor, r));
    }
    return rounded(multiply(add(rest, multiply(s, r)), n));
}

/* q, r, a f and a K, as in ref/loss.py, of `count` classes. */
typedef struct { REAL q[CHUNK], r[CHUNK], af[CHUNK], ak[CHUNK]; } Terms;

typedef struct {
    const REAL *probability; /* or NULL: all on class t */
    const REAL *weight;      /* or NULL */
    size_t t, k;
    REAL smoothing, strength;
} Target;

static void class_terms(Terms *x, const REAL *z, size_t j, size_t count, const Row *row, size_t top, const Target *y)
{
    const REAL s = y->strength, keep = 1 - y->smoothing, spread = y->smoothing / (REAL)y->k;
    exponentials(x->q, z + j, row->max, count);
    for (size_t i = 0; i < count; i++) {
        x->q[i] = (x->q[i] * LOWER) * row->inverse.high;
        x->r[i] = 1 - x->q[i];
    }
    if (top - j < count) x->r[top - j] = row->others.high * row->inverse.high;
    for (size_t i = 0; i < count; i++) {
        REAL n = (row->max - z[j + i]) + row->log_sum.high, q = x->q[i], r = x->r[i];
        REAL f = ((1 - s) + s * r) * n;
        REAL a = keep * (y->probability ? y->probability[j + i] : (REAL)(j + i == y->t)) + spread;
        a = y->weight ? a * y->weight[j + i] : a;
        x->af[i] = weighted(a, f);
        x->ak[i] = a * ((1 - s) + s * (r + (q == 0 ? 0 : q * n)));
    }
    for (size_t i = count; i < CHUNK; i++) x->af[i] = x->ak[i] = 0;
}

/* As hard_row, for a target that gives every class a coefficient. */
static REAL soft_row(Row *row, REAL *gradient, const REAL *z, REAL scale, const Target *y)
{
    const size_t k = y->k;
    const REAL max = maximum(z, k);
    size_t top = 0;
    while (top < k - 1 && z[top] < max) top++;
    *row = sum_exponentials(NULL, z, k, max, top);
    Lanes losses = {{0}, {0}}, slopes = {{0}, {0}};
    Terms x;
    for (size_t j = 0; j < k; j += CHUNK) {
        class_terms(&x, z, j, k - j < CHUNK ? k - j : CHUNK, row, top, y);
        accumulate(&losses, x.af);
        accumulate(&slopes, x.ak);
    }
    if (gradient) {
        const Pair all = total(&slopes); /* a pair, for what is left without a class that has nearly all */
        for (size_t j = 0; j < k; j += CHUNK) {
            size_t count = k - j < CHUNK ? k - j : CHUNK;
            class_terms(&x, z, j, count, row, top, y);
            for (size_t i = 0; i < count; i++)
                gradient[j + i] = scale * (x.q[i] * ((all.high - x.ak[i]) + all.low) - x.r[i] * x.ak[i]);
        }
    }
    return rounded(total(&losses));
}

int64_t NAME(lace_rows)(REAL *loss, REAL *gradient, const REAL *logits, const int64_t *target, const REAL *probability,
                        const REAL *scale, size_t n, size_t k, const NAME(lace_options) *options,
                        const NAME(lace_statistics) *statistics)
{
    const NAME(lace_options) defaults = {NULL, 0, 1, -100};
    if (!options) options = &defaults;
    if (!probability)
        for (size_t i = 0; i < n; i++)
            if (target[i] != options->ignore_index && (target[i] < 0 || (uint64_t)target[i] >= k)) return (int64_t)i;
    for (size_t i = 0; i < n; i++) {
        Row found;
        REAL *row = gradient ? gradient + i * k : NULL;
        REAL g = scale ? scale[i] : 1;
        Target y = {probability ? probability + i * k : NULL, options->weight, 0, k, options->label_smoothing,
                    options->strength};
        if (!probability && target[i] == options->ignore_index) {
            loss[i] = 0;
            for (size_t j = 0; row && j < k; j++) row[j] = 0;
            if (statistics) {
                statistics->cross_entropy[i] = statistics->probability[i] = 0;
                statistics->rank[i] = (int64_t)k;
            }
            continue;
        }
        if (!probability) y.t = (size_t)target[i];
        if (probability || y.smoothing != 0) {
            loss[i] = soft_row(&found, row, logits + i * k, g, &y);
        } else {
            REAL w = y.weight ? y.weight[y.t] : 1, f = hard_row(&found, row, logits + i * k, k, y.t, w * g, y.strength);
            loss[i] = weighted(w, f);
        }
        if (statistics && !probability) describe(statistics, i, logits + i * k, k, y.t, &found);
    }
    return -1;
}

#undef LANES
#undef CHUNK
#undef Pair
#undef Lanes
#undef Row
#undef Terms
#undef Target
#undef bits_of
#undef from_bits
#undef finite
#undef two_sum
#undef two_product
#undef add
#undef multiply
#undef divide
#undef rounded
#undef weighted
#undef horner
#undef exponentials
#undef log_1_plus
#undef accumulate
#undef total
#undef maximum
#undef sum_exponentials
#undef hard_row
#undef negative_log
#undef describe
#undef class_terms
#undef soft_row
