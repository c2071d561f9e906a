/* The rows of lace_rows.h for float and for double. SPDX-License-Identifier: MIT */
#include "lace.h"

#ifdef __cplusplus
#define restrict __restrict
#endif
#ifndef LACE_ISA
#define LACE_ISA /* what ends the names of a build for one instruction set */
#endif
#define JOIN(x, type, isa) x##type##isa
#define SUFFIXED(x, type, isa) JOIN(x, type, isa)

#define NEAR 32768 /* logits of the rows that are worked on together: with their gradients they take 256 KiB of cache */

#define DIGITS 24
#define NAME(x) SUFFIXED(x, _f32, LACE_ISA)
#define OPTIONS lace_options_f32
#define STATISTICS lace_statistics_f32
#include "lace_math.h"
#include "lace_rows.h"

#define DIGITS 53
#define NAME(x) SUFFIXED(x, _f64, LACE_ISA)
#define OPTIONS lace_options_f64
#define STATISTICS lace_statistics_f64
#include "lace_math.h"
#include "lace_rows.h"
