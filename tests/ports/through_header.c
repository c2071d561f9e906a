/* LACE in C, by the kernel's header: what a program does around lace_rows_f32, here the checker's questions. Without malloc.
 *
 * Certified at the levels core, gradient, batch, layout and large within the exact tolerances, in float32 and float64:
 *
 *     cc -O2 -ffp-contract=off -Iext -o port tests/ports/through_header.c ext/lace.c
 *     python -m lace_loss.ref check --command ./port --levels core gradient batch layout large --dtypes f32
 *
 * and for float64 with cc -DREAL=double ... and --dtypes f64.
 */
#include "lace.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef TYPE
#define TYPE float
#endif
#define float_OF(name) name##_f32
#define double_OF(name) name##_f64
#define JOIN(type, name) type##_OF(name)
#define TYPED(type, name) JOIN(type, name)
#define LACE(name) TYPED(TYPE, name) /* lace_rows_f32 or lace_rows_f64 */

enum { MOST = 1 << 16 };
static TYPE logits[MOST], gradient[MOST], probability[MOST], weight[MOST], scale[MOST], loss[MOST], inputs[MOST];
static int64_t target[MOST], at[MOST];
static char *lines[32];

/* What a line of this case says after its key, or NULL. */
static const char *said(const char *key)
{
    const size_t length = strlen(key);
    for (int i = 0; lines[i]; i++)
        if (strncmp(lines[i], key, length) == 0 && (lines[i][length] == ' ' || !lines[i][length])) return lines[i] + length;
    return NULL;
}

/* The values of a line; how many there are. */
static size_t reals(TYPE *to, const char *words)
{
    size_t n = 0;
    for (; words && *words == ' ' && words[1] && n < MOST; n++) {
        char *end = (char *)words + 4;
        uint64_t bits = UINT64_MAX; /* a NaN */
        if (strncmp(words, " nan", 4) != 0) bits = strtoull(words, &end, 16);
        const uint32_t low = (uint32_t)bits;
        if (sizeof(TYPE) == 4) memcpy(to + n, &low, 4);
        else memcpy(to + n, &bits, 8);
        words = end;
    }
    return n;
}

static size_t integers(int64_t *to, const char *words)
{
    size_t n = 0;
    for (char *end; words && *words == ' ' && words[1] && n < MOST; n++, words = end) to[n] = strtoll(words, &end, 10);
    return n;
}

/* Options are f64 in every file. */
static TYPE option(const char *words, TYPE otherwise)
{
    double value = otherwise;
    const uint64_t bits = words ? strtoull(words, NULL, 16) : 0;
    if (words) memcpy(&value, &bits, 8);
    return (TYPE)value;
}

static void print(const char *key, const TYPE *values, const int64_t *places, size_t n)
{
    fputs(key, stdout);
    for (size_t i = 0; i < n; i++) {
        uint64_t bits = 0;
        uint32_t low;
        memcpy(&bits, values + (places ? (size_t)places[i] : i), sizeof(TYPE));
        memcpy(&low, values + (places ? (size_t)places[i] : i), 4);
        if (sizeof(TYPE) == 4) printf(" %08lx", (unsigned long)low);
        else printf(" %016llx", (unsigned long long)bits);
    }
    putchar('\n');
}

/* Rows of k values from images of k planes of `space` values, or back. */
static void turn(TYPE *rows, TYPE *images, size_t n, size_t k, size_t space, int back)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < k; j++) {
            TYPE *image = images + (i / space * k + j) * space + i % space;
            if (back) *image = rows[i * k + j];
            else rows[i * k + j] = *image;
        }
}

static void answer(void)
{
    int64_t shape[8];
    const size_t axes = integers(shape, said("shape"));
    const size_t k = (size_t)shape[axes > 1];
    size_t n = axes > 1 ? (size_t)shape[0] : 1, space = 1;
    for (size_t i = 2; i < axes; i++) space *= (size_t)shape[i];
    n *= space;
    if (n * k > MOST) exit(3);

    if (said("lcg")) {
        int64_t lcg[2];
        integers(lcg, said("lcg"));
        uint32_t x = (uint32_t)lcg[0];
        for (size_t j = 0; j < n * k; j++) {
            x = x * 1664525 + 1013904223;
            inputs[j] = (TYPE)ldexp((double)(x / 256) - 8388608, (int)lcg[1]);
        }
        char *value;
        const int64_t put = said("put") ? strtoll(said("put"), &value, 10) : -1;
        if (put >= 0) reals(inputs + put, value);
    } else {
        reals(inputs, said("logits"));
    }
    turn(logits, inputs, n, k, space, 0);
    const int soft = said("probabilities") != NULL;
    reals(inputs, said("probabilities"));
    if (soft) turn(probability, inputs, n, k, space, 0);
    integers(target, said("target"));

    LACE(lace_options) o = {NULL, option(said("smoothing"), 0), option(said("strength"), 1), -100};
    if (reals(weight, said("weight"))) o.weight = weight;
    integers(&o.ignore_index, said("ignore-index"));
    const int mean = strstr(said("reduction"), "mean") != NULL, none = strstr(said("reduction"), "none") != NULL;
    double divisor = mean ? 0 : 1;
    for (size_t i = 0; mean && i < n; i++) {
        const int counts = soft || (target[i] != o.ignore_index && target[i] >= 0 && (uint64_t)target[i] < k);
        if (counts) divisor += soft || !o.weight ? 1 : (double)weight[target[i]];
    }
    if (reals(scale, said("grad-output")) == 0) scale[0] = 1;
    const size_t step = none && said("grad-output") ? 1 : 0;
    if (mean) scale[0] = (TYPE)(scale[0] / divisor);

    if (LACE(lace_rows)(loss, gradient, logits, target, soft ? probability : NULL, scale, step, n, k, &o, NULL) >= 0) {
        puts("error");
        return;
    }
    turn(gradient, inputs, n, k, space, 1);
    if (!none) {
        TYPE sum[2];
        LACE(lace_sum)(sum, loss, n);
        loss[0] = (TYPE)(((double)sum[0] + (double)sum[1]) / divisor);
    }
    const size_t some = integers(at, said("at"));
    print("loss", loss, NULL, none ? n : 1);
    print("gradient", inputs, some ? at : NULL, some ? some : n * k);
}

int main(void)
{
    static char text[1 << 21];
    size_t length = fread(text, 1, sizeof text - 1, stdin), count = 0;
    if (length == sizeof text - 1) return 3;
    for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
        if (strncmp(line, "case ", 5) == 0) count = 0;
        if (strcmp(line, "end") != 0) {
            lines[count++ % 31] = line;
            continue;
        }
        lines[count] = NULL;
        printf("case %ld\n", strtol(said("case"), NULL, 10));
        answer();
        puts("end");
    }
    return 0;
}
