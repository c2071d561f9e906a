/* The kernel for AVX2, where GCC or clang compiles for x86-64. SPDX-License-Identifier: MIT */
#include "../lace.h"
#if defined(__x86_64__) && defined(__GNUC__)
#define LACE_ISA _avx2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
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
