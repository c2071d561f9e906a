/* Labels that are present or absent, each by itself, for processors where every byte counts: rows of two classes, which
 * lace_row.c evaluates. SPDX-License-Identifier: MIT */
#include "lace.h"

int lace_labels_f32(float *loss, float *gradient, lace_totals_f32 *totals, const float *logits, const uint8_t *label,
                    size_t k)
{
    if (k > 0 && !(logits && label)) return LACE_NULL;
    for (size_t j = 0; j < k; j++) {
        /* (0, z) or (-z, 0): the one whose larger logit is 0, so that it is not +inf */
        const float z = logits[j], two[2] = {z > 0 ? -z : 0, z > 0 ? 0 : z};
        float slopes[2];
        lace_row_f32(loss ? &loss[j] : NULL, gradient ? slopes : NULL, totals, two, label[j] != 0, 2);
        if (gradient) gradient[j] = slopes[1];
    }
    return LACE_DONE;
}
