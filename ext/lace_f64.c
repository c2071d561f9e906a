/* Many rows and columns of double. SPDX-License-Identifier: MIT */
#define DIGITS 53 /* of a double's significand */
#include "lace.h"
#include "lace_math.h"
#include "lace_rows.h"
#include "lace_columns.h"
#include "lace_binary.h"
#include "lace_posterior.h"
