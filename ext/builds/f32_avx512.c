/* lace_f32.c for AVX-512. SPDX-License-Identifier: MIT */
#define DIGITS 24
#include "avx512.h"
