/* lace.c for wider vectors of x86-64, under names that end in _avx2 and _avx512. The results are the same to the bit.
 * SPDX-License-Identifier: MIT */
#include "lace.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2")
#define LACE_ISA _avx2
#include "lace.c"
#undef LACE_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#define LACE_ISA _avx512
#include "lace.c"
#undef LACE_ISA
#pragma GCC pop_options
#endif
