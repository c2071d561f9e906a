/* lace.c again for the wider vectors of x86-64, and which of the builds the processor runs. All give the same bits.
 * SPDX-License-Identifier: MIT */
#include "lace_builds.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDER

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

const lace_build *lace_builds(size_t *count)
{
    static const lace_build builds[] = {
        {"baseline", lace_rows_f32, lace_rows_f64, lace_columns_f32, lace_columns_f64},
#ifdef WIDER
        {"avx2", lace_rows_f32_avx2, lace_rows_f64_avx2, lace_columns_f32_avx2, lace_columns_f64_avx2},
        {"avx512", lace_rows_f32_avx512, lace_rows_f64_avx512, lace_columns_f32_avx512, lace_columns_f64_avx512},
#endif
    };
    *count = 1;
#ifdef WIDER
    if (__builtin_cpu_supports("avx2")) *count = 2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        *count = 3;
#endif
    return builds;
}
