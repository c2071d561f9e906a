/* The rows of lace_rows.h for float and for double. SPDX-License-Identifier: MIT
 *
 * The coefficients are near-minimax polynomials; tests/test_kernel.py derives them again and compares.
 *     EXP    (e^x - 1 - x) / x^2 on |x| <= 1.01 log(2)/2, constant term first
 *     LOG    (log((1+s)/(1-s)) - 2s) / s^3 in s^2 <= 1.01 ((sqrt 2 - 1)/(sqrt 2 + 1))^2, constant term first
 *     LN2    log 2 as a part whose product with any exponent is exact, and the rest
 */
#include "lace.h"

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "lace: -ffast-math breaks error-free sums and NaN; compile without it"
#endif

#ifndef LACE_ISA
#define LACE_ISA /* what ends the names of a build for one instruction set */
#endif
#define JOIN(x, type, isa) x##type##isa
#define SUFFIXED(x, type, isa) JOIN(x, type, isa)

#define NEAR 32768 /* logits of the rows that are worked on together: with their gradients they take 256 KiB of cache */

#define REAL float
#define BITS uint32_t
#define SIGNED int32_t
#define NAME(x) SUFFIXED(x, _f32, LACE_ISA)
#define OPTIONS lace_options_f32
#define STATISTICS lace_statistics_f32
#define MANTISSA 23
#define BIAS 127
#define ONE_BITS UINT32_C(0x3f800000)
#define SQRT_HALF_BITS UINT32_C(0x3f3504f3)
#define HIGH_HALF UINT32_C(0xfffff000)
#define ROUNDER 12582912.0f           /* 1.5 * 2^23: adding it rounds to an integer, held in the low bits */
#define SMALLEST_EXPONENT (-104.0f)   /* e^x < 2^-150 below */
#define RAISED 64                     /* exponentials are formed 2^64 too large, clear of subnormal numbers */
#define LOWER 5.421010862427522e-20f  /* 2^-64 */
#define LOG2E 1.442695f
#define LN2_HIGH 0.693145751953125f
#define LN2_LOW 1.4286068e-06f
#define EXP {0.5f, 0.16666667f, 0.041666456f, 0.0083333105f, 0.0013934541f, 0.0001989198f}
#define LOG {0.6666667f, 0.40000126f, 0.28550398f, 0.23341943f}
#include "lace_rows.h"

#define REAL double
#define BITS uint64_t
#define SIGNED int64_t
#define NAME(x) SUFFIXED(x, _f64, LACE_ISA)
#define OPTIONS lace_options_f64
#define STATISTICS lace_statistics_f64
#define MANTISSA 52
#define BIAS 1023
#define ONE_BITS UINT64_C(0x3ff0000000000000)
#define SQRT_HALF_BITS UINT64_C(0x3fe6a09e667f3bcd)
#define HIGH_HALF UINT64_C(0xfffffffff8000000)
#define ROUNDER 6755399441055744.0
#define SMALLEST_EXPONENT (-746.0)
#define RAISED 128
#define LOWER 2.938735877055719e-39
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
#include "lace_rows.h"
