/* Which builds of the kernel the processor runs: lace_f32.c and lace_f64.c as they are and, on x86-64, those of builds/
 * with wider vectors. All give the same bits. SPDX-License-Identifier: MIT */
#include "lace_builds.h"

#if defined(__x86_64__) && defined(__GNUC__)
int64_t lace_rows_f32_avx2(const lace_args_f32 *), lace_columns_f32_avx2(const lace_args_f32 *);
int64_t lace_posterior_rows_f32_avx2(const lace_posterior_f32 *);
int64_t lace_posterior_columns_f32_avx2(const lace_posterior_f32 *);
int64_t lace_rows_f64_avx2(const lace_args_f64 *), lace_columns_f64_avx2(const lace_args_f64 *);
int64_t lace_binary_f32_avx2(const lace_binary_args_f32 *), lace_binary_f64_avx2(const lace_binary_args_f64 *);
int64_t lace_posterior_rows_f64_avx2(const lace_posterior_f64 *);
int64_t lace_posterior_columns_f64_avx2(const lace_posterior_f64 *);
int64_t lace_rows_f32_avx512(const lace_args_f32 *), lace_columns_f32_avx512(const lace_args_f32 *);
int64_t lace_posterior_rows_f32_avx512(const lace_posterior_f32 *);
int64_t lace_posterior_columns_f32_avx512(const lace_posterior_f32 *);
int64_t lace_rows_f64_avx512(const lace_args_f64 *), lace_columns_f64_avx512(const lace_args_f64 *);
int64_t lace_binary_f32_avx512(const lace_binary_args_f32 *), lace_binary_f64_avx512(const lace_binary_args_f64 *);
int64_t lace_posterior_rows_f64_avx512(const lace_posterior_f64 *);
int64_t lace_posterior_columns_f64_avx512(const lace_posterior_f64 *);
#endif

const lace_build *lace_builds(size_t *count)
{
    static const lace_build builds[] = {
        {"baseline", lace_rows_f32, lace_columns_f32, lace_rows_f64, lace_columns_f64,
         lace_binary_f32, lace_binary_f64, lace_posterior_rows_f32, lace_posterior_columns_f32,
         lace_posterior_rows_f64, lace_posterior_columns_f64},
#if defined(__x86_64__) && defined(__GNUC__)
        {"avx2", lace_rows_f32_avx2, lace_columns_f32_avx2, lace_rows_f64_avx2, lace_columns_f64_avx2,
         lace_binary_f32_avx2, lace_binary_f64_avx2, lace_posterior_rows_f32_avx2, lace_posterior_columns_f32_avx2,
         lace_posterior_rows_f64_avx2, lace_posterior_columns_f64_avx2},
        {"avx512", lace_rows_f32_avx512, lace_columns_f32_avx512, lace_rows_f64_avx512, lace_columns_f64_avx512,
         lace_binary_f32_avx512, lace_binary_f64_avx512, lace_posterior_rows_f32_avx512, lace_posterior_columns_f32_avx512,
         lace_posterior_rows_f64_avx512, lace_posterior_columns_f64_avx512},
#endif
    };
    *count = 1;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx2")) *count = 2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        *count = 3;
#endif
    return builds;
}
