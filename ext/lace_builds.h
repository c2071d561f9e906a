/* The builds of the kernel in this library that the processor runs. SPDX-License-Identifier: MIT */
#ifndef LACE_BUILDS_H
#define LACE_BUILDS_H

#include "lace.h"

typedef struct {
    const char *name;
    int64_t (*rows_f32)(const lace_args_f32 *), (*columns_f32)(const lace_args_f32 *);
    int64_t (*rows_f64)(const lace_args_f64 *), (*columns_f64)(const lace_args_f64 *);
    int64_t (*binary_f32)(const lace_binary_args_f32 *), (*binary_f64)(const lace_binary_args_f64 *);
    int64_t (*posterior_rows_f32)(const lace_posterior_f32 *), (*posterior_columns_f32)(const lace_posterior_f32 *);
    int64_t (*posterior_rows_f64)(const lace_posterior_f64 *), (*posterior_columns_f64)(const lace_posterior_f64 *);
} lace_build;

/* `count` of them, the widest vectors last. */
const lace_build *lace_builds(size_t *count);

#endif
