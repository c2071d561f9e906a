/* lace_f64.c for AVX2. SPDX-License-Identifier: MIT */
#define DIGITS 53
#include "avx2.h"
