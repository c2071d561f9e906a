/* Sums and products of pairs, exp and log for one Real: float where DIGITS is 24, double where it is 53.
 * SPDX-License-Identifier: MIT
 *
 * The coefficients are near-minimax polynomials; tests/test_kernel.py derives them again and compares.
 *     EXP    (e^x - 1 - x) / x^2 on |x| <= 1.01 log(2)/2, constant term first
 *     LOG    (log((1+s)/(1-s)) - 2s) / s^3 in s^2 <= 1.01 ((sqrt 2 - 1)/(sqrt 2 + 1))^2, constant term first
 *     LN2    log 2 as a part whose product with any exponent is exact, and the rest
 */
#include <float.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(_M_FP_FAST) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "lace: -ffast-math breaks error-free sums and NaN; compile without it and without its parts"
#endif
#ifdef __clang__ /* which does not say that it was given a part of -ffast-math, but forgets it again */
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wignored-pragmas" /* not every processor has the first */
#pragma float_control(precise, on)
#pragma clang fp reassociate(off) contract(off)
#pragma clang diagnostic pop
#endif
#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16 concerns half precision only */
#error "lace: float is worked on in a wider type here; on x86 add -msse2 -mfpmath=sse, on s390x use -std=gnu99"
#endif

#if DIGITS == 24
typedef float Real;
typedef uint32_t Bits;
typedef int32_t Int;
typedef lace_pair_f32 Pair;
#define BIAS 127
#define ONE_BITS UINT32_C(0x3f800000)
#define SQRT_HALF_BITS UINT32_C(0x3f3504f3)
#define HIGH_HALF UINT32_C(0xfffff000)
#define EXP_SCALE 18446744073709551616.0f /* 2^64: exponentials are formed so much too large, clear of subnormal numbers */
#define ROUND_SHIFT 12583103.0f           /* 1.5 * 2^23 + BIAS + 64: adding it rounds to an integer, held in the low bits */
#define EXP_UNDERFLOW (ROUND_SHIFT - 168) /* 2^18 exponentials below are less than 2^-150 */
#define LOG2E 1.442695f
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.4286068e-06f
#define EXP {0.5f, 0.16666667f, 0.041666456f, 0.0083333105f, 0.0013934541f, 0.0001989198f}
#define LOG {0.6666667f, 0.40000126f, 0.28550398f, 0.23341943f}
#else
typedef double Real;
typedef uint64_t Bits;
typedef int64_t Int;
typedef lace_pair_f64 Pair;
#define BIAS 1023
#define ONE_BITS UINT64_C(0x3ff0000000000000)
#define SQRT_HALF_BITS UINT64_C(0x3fe6a09e667f3bcd)
#define HIGH_HALF UINT64_C(0xfffffffff8000000)
#define EXP_SCALE 340282366920938463463374607431768211456.0 /* 2^128 */
#define ROUND_SHIFT 6755399441056895.0
#define EXP_UNDERFLOW (ROUND_SHIFT - 1093)
#define LOG2E 1.4426950408889634
#define LN2_HIGH 0.6931471805592082
#define LN2_LOW 7.371002565167799e-13
#define EXP                                                                                                      \
    {0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333325544, 0.0013888888888883327,                  \
     0.00019841269876864356, 2.4801587327007187e-05, 2.755725283351691e-06, 2.75572718102198e-07,                \
     2.5106274733573296e-08, 2.0915442297780116e-09}
#define LOG                                                                                                      \
    {0.6666666666666666, 0.4000000000000094, 0.2857142857076445, 0.2222222240054776, 0.181817947008978,          \
     0.15386290534658992, 0.13267418596474884, 0.1310072138350349}
/* Negative, and so an error, with -fsingle-precision-constant. */
typedef char lace_constants_are_double[sizeof 1.0 == sizeof(double) ? 1 : -1];
#endif
#define EXP_UNSCALE (1 / EXP_SCALE) /* exact */
#define MANTISSA (DIGITS - 1)

static inline Bits bits_of(Real x)
{
    union { Real real; Bits bits; } u;
    u.real = x;
    return u.bits;
}

static inline Real from_bits(Bits b)
{
    union { Bits bits; Real real; } u;
    u.bits = b;
    return u.real;
}

static inline int is_finite(Real x)
{
    return x - x == 0;
}

static inline Pair two_sum(Real a, Real b)
{
    Real s = a + b, b_in_s = s - a;
    Pair p = {s, (a - (s - b_in_s)) + (b - b_in_s)};
    return p;
}

static inline Pair two_product(Real a, Real b)
{
#ifdef FUSED
    Pair r = {a * b, FUSED(a, b, -(a * b))};
#else
    Real a1 = from_bits(bits_of(a) & HIGH_HALF), a0 = a - a1;
    Real b1 = from_bits(bits_of(b) & HIGH_HALF), b0 = b - b1;
    Real p = a * b;
    Pair r = {p, ((a1 * b1 - p) + a1 * b0 + a0 * b1) + a0 * b0};
#endif
    return r;
}

/* to = a + b. Beside an infinity a low part is NaN. */
static inline void pair_sum(Pair *to, const Pair *a, const Pair *b)
{
    Pair s = two_sum(a->high, b->high);
    Real low = s.low + (a->low + b->low);
    *to = two_sum(s.high, low == low ? low : 0);
}

/* to = a b, which is returned rounded. */
static inline Real pair_product(Pair *to, const Pair *a, const Pair *b)
{
    Pair p = two_product(a->high, b->high);
    p.low += a->high * b->low + a->low * b->high;
    *to = p;
    return p.high + p.low;
}

/* to = a / b for b from 1 on. With one division, a compiler that takes reciprocals for quotients changes nothing. */
static inline void pair_quotient(Pair *to, const Pair *a, const Pair *b)
{
    Real inverse = 1 / b->high, q = a->high * inverse;
    Pair p = two_product(q, b->high);
    to->low = (((a->high - p.high) - p.low) + (a->low - q * b->low)) * inverse;
    to->high = q;
}

static inline Real horner(const Real *c, int n, Real x)
{
    Real y = c[n - 1];
    for (int i = n - 2; i >= 0; i--) y = y * x + c[i];
    return y;
}

/* d = r + n log 2 with |r| < 0.35: r takes the place of d, n comes back as the last bits of what is returned. */
static inline Real exp_reduce(Pair *d)
{
    Real shifted = d->high * LOG2E + ROUND_SHIFT, n = shifted - ROUND_SHIFT;
    d->high -= n * LN2_HIGH; /* exact */
    d->low -= n * LN2_LOW;
    return shifted;
}

/* e^r - 1 - r of what `exp_reduce` leaves */
static inline Real exp_tail(Pair r)
{
    static const Real c[] = EXP;
    Real x = r.high + r.low;
    return x * x * horner(c, sizeof c / sizeof *c, x);
}

/* EXP_SCALE exp(d) from what `exp_reduce` leaves and returns, and from the tail; 0 from -inf, NaN from NaN. */
static inline Real exp_finish(Pair r, Real tail, Real shifted)
{
    Real one_r = 1 + r.high;
    Real y = one_r + ((r.high - (one_r - 1)) + (r.low + tail)); /* with what 1 + r has lost */
    return shifted < EXP_UNDERFLOW ? 0 : y * from_bits(bits_of(shifted) << MANTISSA); /* other bits are shifted out */
}

/* EXP_SCALE exp(d); 0 for -inf, NaN for NaN. */
static inline Real exponential(Pair d)
{
    Real shifted = exp_reduce(&d);
    return exp_finish(d, exp_tail(d), shifted);
}

/* to = log(1 + x) for x >= 0, good to about 2^-28 (float) or 2^-58 (double) of itself. `to` may be `x`. */
static inline void log_1_plus(Pair *to, const Pair *x)
{
    static const Real c[] = LOG;
    Real u = 1 + x->high;
    Int k = (Int)((bits_of(u) + (ONE_BITS - SQRT_HALF_BITS)) >> MANTISSA) - BIAS; /* u / 2^k in sqrt 1/2 .. sqrt 2 */
    Real down = from_bits((Bits)(BIAS - k) << MANTISSA), n = (Real)k;
    Pair s = two_sum(down - 1, down * x->high);
    s.low += down * x->low;
    to->high = 2;
    to->low = 0;
    pair_sum(to, to, &s);
    pair_quotient(&s, &s, to);
    Real s2 = s.high * s.high;
    to->high = 2 * s.high;
    to->low = 2 * s.low + s.high * s2 * horner(c, sizeof c / sizeof *c, s2);
    s.high = n * LN2_HIGH;
    s.low = n * LN2_LOW;
    pair_sum(to, &s, to);
}
