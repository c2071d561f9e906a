/* Many rows and columns of float. SPDX-License-Identifier: MIT */
#define DIGITS 24 /* of a float's significand */
#include "lace.h"
#include "lace_math.h"
#include "lace_rows.h"
#include "lace_columns.h"
#include "lace_binary.h"
#include "lace_posterior.h"
