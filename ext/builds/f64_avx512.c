/* lace_f64.c for AVX-512. SPDX-License-Identifier: MIT */
#define DIGITS 53
#include "avx512.h"
