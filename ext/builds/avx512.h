/* The kernel for AVX-512, where GCC or clang compiles for x86-64. SPDX-License-Identifier: MIT */
#include "../lace.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define LACE_ISA _avx512
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")
#endif
#include "../lace_math.h"
#include "../lace_rows.h"
#include "../lace_columns.h"
#include "../lace_binary.h"
#include "../lace_posterior.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
