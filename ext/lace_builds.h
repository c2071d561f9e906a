/* The builds of lace.c in this library that the processor runs. SPDX-License-Identifier: MIT */
#ifndef LACE_BUILDS_H
#define LACE_BUILDS_H

#include "lace.h"

typedef struct {
    const char *name;
    int64_t (*rows_f32)(float *, float *, const float *, const int64_t *, const float *, const float *, size_t, size_t,
                        size_t, const lace_options_f32 *, const lace_statistics_f32 *);
    int64_t (*rows_f64)(double *, double *, const double *, const int64_t *, const double *, const double *, size_t,
                        size_t, size_t, const lace_options_f64 *, const lace_statistics_f64 *);
    int64_t (*columns_f32)(float *, float *, const float *, const int64_t *, const float *, size_t, size_t, size_t, size_t,
                           const lace_options_f32 *);
    int64_t (*columns_f64)(double *, double *, const double *, const int64_t *, const double *, size_t, size_t, size_t,
                           size_t, const lace_options_f64 *);
} lace_build;

/* `count` of them, the widest vectors last. */
const lace_build *lace_builds(size_t *count);

#endif
