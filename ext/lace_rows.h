/* Many rows in terms of REAL, after lace_math.h; lace.c includes both once for float and once for double.
 *
 * Design.
 * a) Every exponential is taken of z - max with the rounding error of the subtraction put back: without it the error of
 *    exp grows with the margin, to 16 ulp and more. It ends with one rounding, 0.55 ulp in all.
 *    It is kept 2^RAISED too large until it is summed: terms that underflow one by one may add up to much.
 * b) The sum leaves one class out, by index: the target's, or in rows with a target for every class the largest
 *    logit's. So 1 - q is a quotient of sums of non-negative terms, never a difference.
 * c) Sums run in fixed lanes, of float in double, of double with every rounding error kept: exact enough at any k, the same
 *    bits at any vector width.
 * d) What remains of a row is a dozen operations on pairs (high, low): seven plain roundings in a row would cost 7 ulp.
 *    They take as long as 300 exponentials, but not for BATCH rows side by side.
 */
#define CHUNK ((size_t)256) /* a multiple of LANES */
#define BATCH ((size_t)32)
#define GROUP ((size_t)8)
#define TILE ((size_t)64)
#define Lanes NAME(Lanes)
#define Pairs NAME(Pairs)
#define Rows NAME(Rows)
#define Job NAME(Job)
#define Terms NAME(Terms)
#define Target NAME(Target)
#define add NAME(add)
#define multiply NAME(multiply)
#define divide NAME(divide)
#define rounded NAME(rounded)
#define weighted NAME(weighted)
#define zero NAME(zero)
#define lowered NAME(lowered)
#define Factor NAME(Factor)
#define factor_of NAME(factor_of)
#define class_of NAME(class_of)
#define clear NAME(clear)
#define Results NAME(Results)
#define keep_digits NAME(keep_digits)
#define hard_formulas NAME(hard_formulas)
#define weigh NAME(weigh)
#define hard_columns NAME(hard_columns)
#define difference NAME(difference)
#define reduce_to NAME(reduce_to)
#define raise_all NAME(raise_all)
#define exponentials NAME(exponentials)
#define add_to_lanes NAME(add_to_lanes)
#define accumulate NAME(accumulate)
#define total NAME(total)
#define total_in_doubles NAME(total_in_doubles)
#define maximum NAME(maximum)
#define sum_exponentials NAME(sum_exponentials)
#define sum_rows NAME(sum_rows)
#define get NAME(get)
#define set NAME(set)
#define finish_sums NAME(finish_sums)
#define hard_rows NAME(hard_rows)
#define negative_log NAME(negative_log)
#define describe NAME(describe)
#define class_terms NAME(class_terms)
#define soft_rows NAME(soft_rows)
#define refused NAME(refused)

/* p 2^-RAISED */
static inline Pair lowered(Pair p)
{
    p.high *= LOWER;
    p.low *= LOWER;
    return p;
}

/* As values, for formulas that read like formulas. */
static inline Pair add(Pair a, Pair b)
{
    pair_sum(&a, &a, &b);
    return a;
}

static inline Pair multiply(Pair a, Pair b)
{
    pair_product(&a, &a, &b);
    return a;
}

static inline Pair divide(Pair a, Pair b)
{
    pair_quotient(&a, &a, &b);
    return a;
}

static inline REAL rounded(Pair a)
{
    return finite(a.high) ? a.high + a.low : a.high;
}

#define SURE (REAL)16384.0 /* 2^14: a sum that is 2^RAISED too large and still less makes 1 - q less than 2^-50 */
#define LARGE (REAL)4294967296.0 /* 2^32 */
#define NEAR_ZERO (REAL)9.313225746154785e-10 /* 2^-30: below it, a 1 - q that is 2^RAISED too large serves as -log q, too */

/* A factor of numbers that are held 2^RAISED too large, (x * first) * last: neither a product that is to become an
 * ordinary number is rounded as a subnormal one on its way, nor does one overflow. */
typedef struct { REAL first, last; } Factor;

static inline Factor factor_of(REAL x)
{
    const int large = x > LARGE || x < -LARGE;
    Factor f = {large ? x * LOWER : x, large ? 1 : LOWER};
    return f;
}

/* a f; 0 where an infinite loss has no weight. */
static inline REAL weighted(REAL a, REAL f)
{
    return a == 0 && f == f && !finite(f) ? 0 : a * f;
}

/* two_sum(z, -m) for z <= m, of which the lesser of z and -m has the larger amount: 5 operations instead of 6. */
static inline Pair difference(REAL z, REAL m)
{
    REAL larger = z < -m ? z : -m, smaller = z < -m ? -m : z;
    Pair d = {z - m, 0};
    d.low = smaller - (d.high - larger);
    return d;
}

/* Exponentials are taken in three loops, of which the callers have the first, over `reduce_to`: a processor holds fewer
 * operations in flight than one exponential has, one after another, and works on more of the shorter chains side by
 * side. A quarter more instructions than in one loop, 0.9 of the kernel's time on a Zen 3. */
static inline void reduce_to(REAL *high, REAL *low, REAL *shifted, Pair d)
{
    *shifted = reduce(&d);
    *high = d.high;
    *low = d.low;
}

static inline void raise_all(REAL *restrict e, const REAL *restrict high, const REAL *restrict low,
                             const REAL *restrict shifted, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const Pair r = {high[i], low[i]};
        e[i] = tail(r);
    }
    for (size_t i = 0; i < count; i++) {
        const Pair r = {high[i], low[i]};
        e[i] = raise(r, e[i], shifted[i]);
    }
}

/* Of at most CHUNK. */
static void exponentials(REAL *restrict e, const REAL *restrict z, REAL max, size_t count)
{
    REAL high[CHUNK], low[CHUNK], shifted[CHUNK];
    for (size_t i = 0; i < count; i++) reduce_to(&high[i], &low[i], &shifted[i], difference(z[i], max));
    raise_all(e, high, low, shifted, count);
}

/* A zero of which no compiler knows: to fill memory with one that it knows it calls memset, which may not be there. */
static inline REAL zero(void)
{
    volatile REAL x = 0;
    return x;
}

/* Sums in which term j goes to lane j modulo LANES. */
#if DIGITS == 24
#define LANES ((size_t)16)
typedef struct { double sum[LANES]; } Lanes; /* exact enough, in 0.6 of the time that pairs take */

static inline void clear(Lanes *lanes)
{
    const double nothing = (double)zero();
    for (size_t l = 0; l < LANES; l++) lanes->sum[l] = nothing;
}

static inline void add_to_lanes(Lanes *restrict lanes, const REAL *restrict e, size_t count)
{
    for (size_t l = 0; l < count; l++) lanes->sum[l] += (double)e[l];
}

static inline void total_in_doubles(double sum[2], Lanes *lanes)
{
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) lanes->sum[l] += lanes->sum[l + half];
    sum[0] = lanes->sum[0];
    sum[1] = 0;
}

static inline Pair total(Lanes *lanes)
{
    double sum[2];
    total_in_doubles(sum, lanes);
    Pair all = {(REAL)sum[0], 0};
    if (finite(all.high)) all.low = (REAL)(sum[0] - (double)all.high);
    return all;
}
#else
#define LANES ((size_t)32)
typedef struct { REAL high[LANES], low[LANES]; } Lanes; /* low: every rounding error of high */

static inline void clear(Lanes *lanes)
{
    const REAL nothing = zero();
    for (size_t l = 0; l < LANES; l++) lanes->high[l] = lanes->low[l] = nothing;
}

static inline void add_to_lanes(Lanes *restrict lanes, const REAL *restrict e, size_t count)
{
    for (size_t l = 0; l < count; l++) {
        Pair s = two_sum(lanes->high[l], e[l]);
        lanes->high[l] = s.high;
        lanes->low[l] += s.low;
    }
}

static inline Pair total(Lanes *lanes)
{
    for (size_t half = LANES / 2; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) {
            Pair s = two_sum(lanes->high[l], lanes->high[l + half]);
            lanes->high[l] = s.high;
            lanes->low[l] += lanes->low[l + half] + s.low;
        }
    Pair all = two_sum(lanes->high[0], lanes->low[0]);
    if (!finite(lanes->high[0])) all.high = lanes->high[0], all.low = 0; /* beside an infinity a low part is NaN */
    return all;
}

static inline void total_in_doubles(double sum[2], Lanes *lanes)
{
    const Pair all = total(lanes);
    sum[0] = all.high;
    sum[1] = all.low;
}
#endif

/* `count` more terms, after a multiple of LANES. */
static inline void accumulate(Lanes *restrict lanes, const REAL *restrict e, size_t count)
{
    size_t j = 0;
    for (; j + LANES <= count; j += LANES) add_to_lanes(lanes, e + j, LANES);
    add_to_lanes(lanes, e + j, count - j);
}

static REAL maximum(const REAL *z, size_t k)
{
    REAL max[2 * LANES];
    if (k < 2 * LANES) {
        max[0] = z[0];
        for (size_t j = 1; j < k; j++) max[0] = z[j] > max[0] ? z[j] : max[0];
        return max[0];
    }
    const REAL *last = z + k - 2 * LANES; /* some of them again: saves 1/8 of a row's time at k = 100 */
    for (size_t l = 0; l < 2 * LANES; l++) max[l] = z[0];
    for (size_t j = 0; j + 2 * LANES <= k; j += 2 * LANES)
        for (size_t l = 0; l < 2 * LANES; l++) max[l] = z[j + l] > max[l] ? z[j + l] : max[l];
    for (size_t l = 0; l < 2 * LANES; l++) max[l] = last[l] > max[l] ? last[l] : max[l];
    for (size_t half = LANES; half > 0; half /= 2)
        for (size_t l = 0; l < half; l++) max[l] = max[l + half] > max[l] ? max[l + half] : max[l];
    return max[0];
}

typedef struct { REAL high[BATCH], low[BATCH]; } Pairs;

static inline Pair get(const Pairs *pairs, size_t r)
{
    Pair p = {pairs->high[r], pairs->low[r]};
    return p;
}

static inline void set(Pairs *pairs, size_t r, Pair p)
{
    pairs->high[r] = p.high;
    pairs->low[r] = p.low;
}

/* What the formulas need of some rows, side by side so that a compiler works on several at once. */
typedef struct {
    REAL max[BATCH];
    REAL z[BATCH];   /* the logit of class `out` */
    REAL own[BATCH]; /* exp(z - max) */
    Pairs others;    /* 2^RAISED times the sum of exp(z_j - max) over j != out */
    Pairs inverse;   /* 1 / sum over all j */
    Pairs log_sum;   /* log of the sum over all j */
} Rows;

typedef struct {
    REAL *loss, *gradient;
    const REAL *logits;
    const int64_t *target;
    const REAL *probability, *scale;
    size_t step, k;
    const OPTIONS *options;
} Job;

/* Starts row r, whose largest logit is in `rows`. Leaves 2^RAISED exp(z_j - max), and 0 at `out`, in `e` unless that is
 * NULL, and their sum in lanes. */
static void sum_exponentials(Rows *rows, size_t r, Lanes *lanes, REAL *e, const REAL *z, size_t k, size_t out)
{
    clear(lanes);
    for (size_t j = 0; j < k; j += CHUNK) {
        REAL here[CHUNK], *block = e ? e + j : here;
        const size_t count = k - j < CHUNK ? k - j : CHUNK;
        exponentials(block, z + j, rows->max[r], count);
        if (out - j < count) {
            rows->own[r] = block[out - j] * LOWER;
            block[out - j] = 0;
        }
        accumulate(lanes, block, count);
    }
    rows->z[r] = z[out];
}

/* The same of the `count` rows that `index` names. The lanes of GROUP rows become sums together, for a processor to work
 * on them side by side. */
static void sum_rows(Rows *rows, const Job *job, const size_t *index, const size_t *out, size_t count, REAL *gradient)
{
    const size_t k = job->k;
    Lanes lanes[GROUP];
    for (size_t first = 0; first < count; first += GROUP) {
        const size_t end = count - first < GROUP ? count : first + GROUP;
        for (size_t r = first; r < end; r++) {
            REAL *e = gradient ? gradient + index[r] * k : NULL;
            sum_exponentials(rows, r, &lanes[r - first], e, job->logits + index[r] * k, k, out[r]);
        }
        for (size_t r = first; r < end; r++) set(&rows->others, r, total(&lanes[r - first]));
    }
}

/* All but the largest term, which is exactly 1: either `out` is left out of the sum already, or it is small. */
static void finish_sums(Rows *rows, size_t count)
{
    for (size_t r = 0; r < count; r++) {
        const int small = rows->z[r] < rows->max[r];
        Pair one = {1, 0}, own = {small ? rows->own[r] : 0, 0}, rest = lowered(get(&rows->others, r));
        rest.high -= (small ? 1 : 0) + (rows->max[r] - rows->max[r]); /* NaN beside +inf */
        rest = add(rest, own);
        set(&rows->inverse, r, divide(one, add(rest, one)));
        log_1_plus(&rest, &rest);
        set(&rows->log_sum, r, rest);
    }
}

/* -log q of the class whose logit is z */
static inline Pair negative_log(const Rows *rows, size_t r, REAL z)
{
    return add(two_sum(rows->max[r], -z), get(&rows->log_sum, r));
}

static void describe(const STATISTICS *to, size_t i, const Rows *rows, size_t r, const REAL *z, size_t k,
                     size_t t)
{
    const Pair inverse = get(&rows->inverse, r);
    if (to->cross_entropy) to->cross_entropy[i] = rounded(negative_log(rows, r, z[t]));
    if (to->probability) {
        const Pair e_t = {exponential(difference(z[t], rows->max[r])) * LOWER, 0};
        to->probability[i] = rounded(multiply(e_t, inverse));
    }
    /* Of the largest logit the exponential is exactly 1. A NaN of class t is not in the sum. */
    if (to->confidence) to->confidence[i] = z[t] == z[t] ? rounded(inverse) : z[t];
    if (to->rank) {
        int64_t rank = 0;
        for (size_t j = 0; j < t; j++) rank += !(z[j] < z[t]); /* NaN counts as larger */
        for (size_t j = t + 1; j < k; j++) rank += !(z[j] <= z[t]);
        to->rank[i] = rank;
    }
}

/* The class of row i, or k for one that is ignored. It is read once: another thread may write to the targets, which were
 * all checked before, and a class that is none by now is ignored. */
static inline size_t class_of(const Job *job, size_t i)
{
    const int64_t t = *(const volatile int64_t *)&job->target[i];
    return t == job->options->ignore_index || t < 0 || (uint64_t)t >= job->k ? job->k : (size_t)t;
}

/* Of rows side by side: class weight, factor of the gradient; loss, gradient at the target and, over exp, elsewhere. */
typedef struct {
    REAL w[BATCH], g[BATCH], loss[BATCH], own[BATCH], others[BATCH];
    int some_large; /* of `others`: then factor_of is needed, else (x * others) * LOWER is the same */
} Results;

/* Row r again, where 1 - q is so small that it, -log q or their products may underflow before a factor brings them back:
 * they are taken as they are before they are lowered, and a weight above 1 comes first. */
static void keep_digits(Results *x, const Rows *rows, size_t r, REAL strength)
{
    const Pair s = {strength, 0}, rest = two_sum(1, -strength), scale = {x->g[r], 0}, inverse = get(&rows->inverse, r);
    const Pair e_t = {rows->own[r], 0}, p_raised = multiply(get(&rows->others, r), inverse), p = lowered(p_raised);
    const Pair q = multiply(e_t, inverse), n = negative_log(rows, r, rows->z[r]);
    const Pair factor = multiply(scale, add(rest, multiply(s, add(p, multiply(q, n)))));
    const int no_log = p_raised.high < NEAR_ZERO, heavy = x->w[r] > 1 || x->w[r] < -1;
    const Factor g = factor_of(factor.high);
    const Pair first = {g.first, g.last == 1 ? factor.low * LOWER : factor.low}, w = {heavy ? x->w[r] : 1, 0};
    const Pair f = multiply(w, add(rest, multiply(s, p)));
    const REAL loss = no_log ? rounded(multiply(f, p_raised)) * LOWER : rounded(multiply(f, n));
    if (no_log) x->own[r] = -rounded(multiply(first, p_raised)) * g.last;
    x->loss[r] = weighted(heavy ? 1 : x->w[r], loss);
}

static void hard_formulas(Results *x, const Rows *rows, REAL strength, size_t count)
{
    const Pair s = {strength, 0}, rest = two_sum(1, -strength);
    for (size_t r = 0; r < count; r++) {
        const Pair inverse = get(&rows->inverse, r), e_t = {rows->own[r], 0}, scale = {x->g[r], 0};
        Pair p = lowered(multiply(get(&rows->others, r), inverse)), q = multiply(e_t, inverse);
        Pair n = negative_log(rows, r, rows->z[r]), qn = multiply(q, n);
        qn.high = q.high == 0 ? 0 : qn.high; /* its limit where n is infinite */
        qn.low = q.high == 0 ? 0 : qn.low;
        Pair factor = multiply(scale, add(rest, multiply(s, add(p, qn))));
        x->others[r] = rounded(multiply(factor, inverse));
        x->own[r] = -rounded(multiply(factor, p));
        x->loss[r] = weighted(x->w[r], rounded(multiply(add(rest, multiply(s, p)), n)));
    }
    int some_sure = 0, some_large = 0;
    for (size_t r = 0; r < count; r++) {
        some_sure |= rows->others.high[r] < SURE;
        some_large |= (x->others[r] > LARGE) | (x->others[r] < -LARGE);
    }
    x->some_large = some_large;
    for (size_t r = 0; some_sure && r < count; r++)
        if (rows->others.high[r] < SURE) keep_digits(x, rows, r, strength);
}

static inline void weigh(Results *x, size_t r, const Job *job, size_t i, size_t c)
{
    x->w[r] = job->options->weight ? job->options->weight[c] : 1;
    x->g[r] = job->scale ? x->w[r] * job->scale[i * job->step] : x->w[r];
}

/* Losses and gradients of the `count` rows that `index` names, of these classes. */
static void hard_rows(Rows *rows, const Job *job, const size_t *index, const size_t *classes, size_t count)
{
    const size_t k = job->k;
    Results x;
    for (size_t r = 0; r < count; r++) {
        rows->max[r] = maximum(job->logits + index[r] * k, k);
        weigh(&x, r, job, index[r], classes[r]);
    }
    sum_rows(rows, job, index, classes, count, job->gradient);
    finish_sums(rows, count);
    hard_formulas(&x, rows, job->options->strength, count);
    for (size_t r = 0; r < count; r++) {
        const size_t i = index[r];
        job->loss[i] = x.loss[r];
        if (job->gradient) {
            REAL *row = job->gradient + i * k;
            Factor g = {x.others[r], LOWER};
            if (x.some_large) g = factor_of(x.others[r]);
            for (size_t j = 0; j < k; j++) row[j] = (row[j] * g.first) * g.last;
            row[classes[r]] = x.own[r];
        }
    }
}

/* The same for columns i to i + count - 1, whose classes are `stride` values apart: they are worked on class by class, up
 * to TILE classes in a tile of their own, because planes of 2^n values share their places in a cache. */
static inline void hard_columns(Rows *rows, const Job *job, size_t i, size_t count, size_t stride)
{
    const size_t k = job->k;
    REAL tile[TILE * BATCH], *gradient = job->gradient ? job->gradient + i : NULL;
    const int fits = k <= TILE;
    const REAL *z = job->logits + i;
    REAL *e = fits || !gradient ? tile : gradient;
    const size_t z_step = fits ? BATCH : stride, e_step = fits ? BATCH : gradient ? stride : 0;
    const REAL nothing = zero();
    BITS t[BATCH]; /* as wide as REAL, so that a compiler compares several at once */
    int some_ignored = 0;
    Results x;
    for (size_t r = 0; r < count; r++) {
        const size_t c = class_of(job, i + r);
        const int ignored = c == k;
        t[r] = ignored ? (BITS)-1 : (BITS)c;
        some_ignored |= ignored;
        x.w[r] = x.g[r] = nothing;
        if (!ignored) weigh(&x, r, job, i + r, c);
        rows->max[r] = z[r] - nothing; /* a plain copy would call memcpy */
        rows->z[r] = z[ignored ? r : c * stride + r];
        rows->others.high[r] = rows->others.low[r] = nothing;
    }
    for (size_t j = 0; j < k; j++)
        for (size_t r = 0; r < count; r++) {
            REAL value = z[j * stride + r];
            rows->max[r] = value > rows->max[r] ? value : rows->max[r];
            if (fits) tile[j * BATCH + r] = value - nothing;
        }
    if (fits) z = tile;
    for (size_t r = 0; r < count; r++) rows->own[r] = exponential(difference(rows->z[r], rows->max[r])) * LOWER;
    for (size_t j = 0; j < k; j++) {
        REAL high[BATCH], low[BATCH], shifted[BATCH], values[BATCH];
        for (size_t r = 0; r < count; r++)
            reduce_to(&high[r], &low[r], &shifted[r], difference(z[j * z_step + r], rows->max[r]));
        raise_all(values, high, low, shifted, count);
        for (size_t r = 0; r < count; r++) {
            REAL value = t[r] == (BITS)j ? 0 : values[r];
            Pair sum = two_sum(rows->others.high[r], value);
            rows->others.high[r] = sum.high;
            rows->others.low[r] += sum.low;
            e[j * e_step + r] = value;
        }
    }
    for (size_t r = 0; r < count; r++) set(&rows->others, r, two_sum(rows->others.high[r], rows->others.low[r]));
    finish_sums(rows, count);
    hard_formulas(&x, rows, job->options->strength, count);
    for (size_t r = 0; r < count; r++) job->loss[i + r] = t[r] == (BITS)-1 ? 0 : x.loss[r];
    if (!gradient) return;
    for (size_t j = 0; !x.some_large && j < k; j++)
        for (size_t r = 0; r < count; r++) gradient[j * stride + r] = (e[j * e_step + r] * x.others[r]) * LOWER;
    for (size_t r = 0; x.some_large && r < count; r++) {
        const Factor g = factor_of(x.others[r]);
        for (size_t j = 0; j < k; j++) gradient[j * stride + r] = (e[j * e_step + r] * g.first) * g.last;
    }
    for (size_t r = 0; r < count; r++)
        if (t[r] != (BITS)-1) gradient[(size_t)t[r] * stride + r] = x.own[r];
    for (size_t j = 0; some_ignored && j < k; j++)
        for (size_t r = 0; r < count; r++)
            if (t[r] == (BITS)-1) gradient[j * stride + r] = nothing;
}

/* q, r, a f and a K, as in ref/loss.py, of `count` classes. */
typedef struct { REAL q[CHUNK], r[CHUNK], af[CHUNK], ak[CHUNK]; } Terms;

typedef struct {
    const REAL *probability; /* or NULL: all on class t */
    const REAL *weight;      /* or NULL */
    size_t t, k, top;
    REAL keep, spread, strength; /* 1 - e, e / k, s */
} Target;

static void class_terms(Terms *x, const Rows *rows, size_t r, const REAL *z, size_t j, size_t count, const Target *y)
{
    const REAL s = y->strength, max = rows->max[r], inverse = rows->inverse.high[r], log_sum = rows->log_sum.high[r];
    exponentials(x->q, z + j, max, count);
    for (size_t i = 0; i < count; i++) {
        x->q[i] = (x->q[i] * LOWER) * inverse;
        x->r[i] = 1 - x->q[i];
    }
    if (y->top - j < count) x->r[y->top - j] = (rows->others.high[r] * LOWER) * inverse;
    for (size_t i = 0; i < count; i++) {
        REAL n = (max - z[j + i]) + log_sum, q = x->q[i], p = x->r[i], qn = q * n;
        REAL f = ((1 - s) + s * p) * n;
        REAL a = y->keep * (y->probability ? y->probability[j + i] : (REAL)(j + i == y->t)) + y->spread;
        a = y->weight ? a * y->weight[j + i] : a;
        x->af[i] = weighted(a, f);
        x->ak[i] = a * ((1 - s) + s * (p + (q == 0 ? 0 : qn)));
    }
}

/* As hard_rows, for targets that give every class a coefficient. */
static void soft_rows(Rows *rows, const Job *job, const size_t *index, const size_t *classes, size_t count)
{
    const size_t k = job->k;
    const REAL e = job->options->label_smoothing;
    size_t top[BATCH];
    for (size_t r = 0; r < count; r++) {
        const REAL *z = job->logits + index[r] * k;
        rows->max[r] = maximum(z, k);
        top[r] = 0;
        while (top[r] < k - 1 && z[top[r]] != rows->max[r]) top[r]++; /* not at a NaN, which belongs into the sum */
    }
    sum_rows(rows, job, index, top, count, NULL);
    finish_sums(rows, count);
    for (size_t r = 0; r < count; r++) {
        const size_t i = index[r];
        const REAL *z = job->logits + i * k, scale = job->scale ? job->scale[i * job->step] : 1;
        REAL *row = job->gradient ? job->gradient + i * k : NULL;
        Target y = {job->probability ? job->probability + i * k : NULL, job->options->weight, classes[r], k, top[r],
                    1 - e, e / (REAL)k, job->options->strength};
        Lanes losses, slopes;
        Terms x;
        clear(&losses);
        clear(&slopes);
        for (size_t j = 0; j < k; j += CHUNK) {
            const size_t part = k - j < CHUNK ? k - j : CHUNK;
            class_terms(&x, rows, r, z, j, part, &y);
            accumulate(&losses, x.af, part);
            accumulate(&slopes, x.ak, part);
        }
        job->loss[i] = rounded(total(&losses));
        const Pair all = total(&slopes); /* a pair, for what is left without a class that has nearly all */
        for (size_t j = 0; row && j < k; j += CHUNK) {
            const size_t part = k - j < CHUNK ? k - j : CHUNK;
            class_terms(&x, rows, r, z, j, part, &y);
            for (size_t c = 0; c < part; c++)
                row[j + c] = scale * (x.q[c] * ((all.high - x.ak[c]) + all.low) - x.r[c] * x.ak[c]);
        }
    }
}

/* LACE_DONE if n rows or, `stride` apart, columns of k values can be worked on; else what lace.h says. */
static int64_t refused(int missing, const int64_t *target, size_t n, size_t k, size_t stride, int64_t ignore_index)
{
    if (k == 0 || n > stride || stride > SIZE_MAX / sizeof(REAL) / k) return LACE_SIZE;
    if (missing && n > 0) return LACE_NULL;
    for (size_t i = 0; target && i < n; i++)
        if (target[i] != ignore_index && (target[i] < 0 || (uint64_t)target[i] >= k)) return (int64_t)i;
    return LACE_DONE;
}

int64_t NAME(lace_rows)(REAL *loss, REAL *gradient, const REAL *logits, const int64_t *target, const REAL *probability,
                        const REAL *scale, size_t step, size_t n, size_t k, const OPTIONS *options,
                        const STATISTICS *statistics)
{
    static const OPTIONS defaults = {NULL, 0, 1, -100};
    if (!options) options = &defaults;
    const int64_t why = refused(!loss || !logits || !(target || probability), probability ? NULL : target, n, k, n,
                                options->ignore_index);
    if (why != LACE_DONE) return why;
    const Job job = {loss, gradient, logits, target, probability, scale, step, k, options};
    const REAL nothing = zero();
    const size_t fitting = NEAR / k, limit = fitting < 1 ? 1 : fitting < BATCH ? fitting : BATCH;
    size_t index[BATCH], classes[BATCH], count = 0;
    Rows rows;
    for (size_t i = 0; i < n; i++) {
        classes[count] = probability ? 0 : class_of(&job, i);
        if (classes[count] == k) {
            loss[i] = 0;
            for (size_t j = 0; gradient && j < k; j++) gradient[i * k + j] = nothing;
            if (statistics) {
                if (statistics->cross_entropy) statistics->cross_entropy[i] = 0;
                if (statistics->probability) statistics->probability[i] = 0;
                if (statistics->rank) statistics->rank[i] = (int64_t)k;
                if (statistics->confidence) statistics->confidence[i] = 0;
            }
        } else {
            index[count++] = i;
        }
        if (count == limit || (i == n - 1 && count > 0)) {
            if (probability || options->label_smoothing != 0)
                soft_rows(&rows, &job, index, classes, count);
            else
                hard_rows(&rows, &job, index, classes, count);
            for (size_t r = 0; statistics && !probability && r < count; r++)
                describe(statistics, index[r], &rows, r, logits + index[r] * k, k, classes[r]);
            count = 0;
        }
    }
    return LACE_DONE;
}

int64_t NAME(lace_columns)(REAL *loss, REAL *gradient, const REAL *logits, const int64_t *target, const REAL *scale,
                           size_t step, size_t n, size_t k, size_t stride, const OPTIONS *options)
{
    static const OPTIONS defaults = {NULL, 0, 1, -100};
    if (!options) options = &defaults;
    const int64_t why = refused(!loss || !logits || !target, target, n, k, stride, options->ignore_index);
    if (why != LACE_DONE) return why;
    const Job job = {loss, gradient, logits, target, NULL, scale, step, k, options};
    Rows rows;
    size_t i = 0;
    for (; i + BATCH <= n; i += BATCH) hard_columns(&rows, &job, i, BATCH, stride); /* a known number takes 0.9 of the time */
    if (i < n) hard_columns(&rows, &job, i, n - i, stride);
    return LACE_DONE;
}

void NAME(lace_sum)(double sum[2], const REAL *values, size_t n)
{
    Lanes lanes;
    clear(&lanes);
    if (n > 0) accumulate(&lanes, values, n);
    total_in_doubles(sum, &lanes);
}

/* for the next type */
#undef DIGITS
#undef REAL
#undef BITS
#undef SIGNED
#undef NAME
#undef OPTIONS
#undef STATISTICS
#undef MANTISSA
#undef BIAS
#undef ONE_BITS
#undef SQRT_HALF_BITS
#undef HIGH_HALF
#undef ROUNDER
#undef SMALLEST
#undef RAISED
#undef LOWER
#undef LOG2E
#undef LN2_HIGH
#undef LN2_LOW
#undef EXP
#undef LOG
#undef Pair
#undef bits_of
#undef from_bits
#undef finite
#undef two_sum
#undef two_product
#undef pair_sum
#undef pair_product
#undef pair_quotient
#undef horner
#undef reduce
#undef tail
#undef raise
#undef exponential
#undef log_1_plus
#undef CHUNK
#undef BATCH
#undef SURE
#undef LARGE
#undef NEAR_ZERO
#undef GROUP
#undef LANES
#undef TILE
#undef Lanes
#undef Pairs
#undef Rows
#undef Job
#undef Terms
#undef Target
#undef add
#undef multiply
#undef divide
#undef rounded
#undef weighted
#undef zero
#undef lowered
#undef Factor
#undef factor_of
#undef class_of
#undef clear
#undef Results
#undef keep_digits
#undef hard_formulas
#undef weigh
#undef hard_columns
#undef exponentials
#undef difference
#undef reduce_to
#undef raise_all
#undef add_to_lanes
#undef accumulate
#undef total
#undef total_in_doubles
#undef maximum
#undef sum_exponentials
#undef sum_rows
#undef get
#undef set
#undef finish_sums
#undef hard_rows
#undef negative_log
#undef describe
#undef class_terms
#undef soft_rows
#undef refused
