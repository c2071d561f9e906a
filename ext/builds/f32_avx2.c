/* lace_f32.c for AVX2. SPDX-License-Identifier: MIT */
#define DIGITS 24
#include "avx2.h"
