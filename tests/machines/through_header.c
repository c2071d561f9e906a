/* LACE in C, by the kernel's header: a program around it, here one that answers golden vectors by the protocol of
 * ref/vectors/README.md: a file's cases in, `loss` and `gradient` out. Exact in float32 and float64 (-DF64):
 *
 *     cc -std=c99 -O2 -ffp-contract=off -Iext -o port tests/machines/through_header.c ext/lace_f32.c
 *     python -m lace_loss.ref check --command ./port --levels core gradient batch layout large --dtypes f32
 *
 * and, where ROOM is defined as 263425, at the level rows.
 *
 * For float with lace_f32.c or, if ROW is defined, with lace_row.c; for double with lace_f64.c if F64 is defined.
 * Without an operating system (-ffreestanding) get, put and the call of main are the machine's. Exit status 2 where the
 * input is not what it can read.
 */
#include "lace.h"

#if __STDC_HOSTED__
#include <stdio.h>
#define get getchar
#define put putchar
#else
int get(void); /* the next byte of the input, or negative at its end */
int put(int byte);
int main(void);
#endif

#ifdef F64
#define REAL double
#define BITS uint64_t
#define NAME(x) x##_f64
#define DTYPE "f64"
#else
#define REAL float
#define BITS uint32_t
#define NAME(x) x##_f32
#define DTYPE "f32"
#endif
#ifndef ROOM
#define ROOM 50257 /* logits of a case; the level rows has up to 263425 */
#endif
/* Samples, probabilities, classes with weights, places asked for; axes. */
enum { FEW = ROOM < 1088 ? ROOM : 1088, AXES = 5 };

static char word[24];
static int ended = 1; /* the line */

static int same(const char *a, const char *b)
{
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

/* Reads the line's next word; 0 if there is none. */
static int next(void)
{
    size_t n = 0;
    int c = ended ? '\n' : get();
    while (c > ' ') {
        if (n < sizeof word - 1) word[n++] = (char)c;
        c = get();
    }
    ended = c != ' ';
    word[n] = 0;
    return n > 0;
}

/* Leaves the rest of the line, and reads the first word of the next that has one; 0 at the end of the input. */
static int line(void)
{
    int c;
    while (!ended) next();
    do c = get();
    while (c == '\n');
    if (c < 0) return 0;
    word[0] = (char)c;
    size_t n = 1;
    while ((c = get()) > ' ')
        if (n < sizeof word - 1) word[n++] = (char)c;
    word[n] = 0;
    ended = c != ' ';
    return 1;
}

static int64_t integer(void)
{
    const int minus = word[0] == '-';
    uint64_t x = 0;
    for (const char *c = word + minus; *c; c++) x = 10 * x + (uint64_t)(*c - '0');
    return minus ? -(int64_t)x : (int64_t)x;
}

static uint64_t pattern(void)
{
    uint64_t x = 0;
    for (const char *c = word; *c; c++) x = x << 4 | (uint64_t)(*c <= '9' ? *c - '0' : *c - 'a' + 10);
    return x;
}

static double double_of(uint64_t bits)
{
    union { uint64_t bits; double value; } u;
    u.bits = bits;
    return u.value;
}

static REAL real(void)
{
    union { BITS bits; REAL value; } u;
    u.bits = (BITS)pattern();
    return same(word, "nan") ? (REAL)double_of(UINT64_C(0x7ff8) << 48) : u.value;
}

static void say(const char *text)
{
    while (*text) put(*text++);
}

static void say_real(REAL value)
{
    union { REAL value; BITS bits; } u;
    u.value = value;
    put(' ');
    if (value != value)
        say("nan");
    else
        for (int shift = 8 * (int)sizeof(REAL) - 4; shift >= 0; shift -= 4) put("0123456789abcdef"[u.bits >> shift & 15]);
}

/* One case, as it is read. */
static REAL z[ROOM], gradient[ROOM], probability[FEW], weight[FEW], factor[FEW], loss[FEW];
static int64_t target[FEW];
static size_t shape[AXES], axes, places[FEW], asked, factors, samples, classes, inner;
static int has_weight, has_probability;
static double smoothing, strength;
static int64_t ignore;
static char reduction;

/* 2^exponent, of which the vectors ask for a few */
static REAL power(int64_t exponent)
{
    REAL x = 1;
    for (; exponent < 0; exponent++) x /= 2;
    for (; exponent > 0; exponent--) x *= 2;
    return x;
}

static int read_case(void)
{
    size_t n = 0;
    axes = asked = factors = 0;
    has_weight = has_probability = 0;
    smoothing = 0, strength = 1, ignore = -100;
    while (line() && !same(word, "end")) {
        n = 0;
        if (same(word, "shape"))
            while (next() && axes < AXES) shape[axes++] = (size_t)integer();
        else if (same(word, "logits"))
            while (next() && n < ROOM) z[n++] = real();
        else if (same(word, "lcg")) {
            next();
            uint32_t x = (uint32_t)integer();
            next();
            const REAL unit = power(integer());
            size_t count = 1;
            for (size_t i = 0; i < axes; i++) count *= shape[i];
            for (; n < count && n < ROOM; n++) {
                x = x * UINT32_C(1664525) + UINT32_C(1013904223);
                z[n] = (REAL)((int32_t)(x / 256) - INT32_C(8388608)) * unit;
            }
        } else if (same(word, "put")) {
            next();
            n = (size_t)integer();
            next();
            if (n < ROOM) z[n] = real();
        } else if (same(word, "target"))
            while (next() && n < FEW) target[n++] = integer();
        else if (same(word, "probabilities"))
            for (has_probability = 1; next() && n < FEW;) probability[n++] = real();
        else if (same(word, "weight"))
            for (has_weight = 1; next() && n < FEW;) weight[n++] = real();
        else if (same(word, "grad-output"))
            while (next() && factors < FEW) factor[factors++] = real();
        else if (same(word, "at"))
            while (next() && asked < FEW) places[asked++] = (size_t)integer();
        else if (same(word, "reduction"))
            next(), reduction = word[0];
        else if (same(word, "ignore-index"))
            next(), ignore = integer();
        else if (same(word, "smoothing"))
            next(), smoothing = double_of(pattern());
        else if (same(word, "strength"))
            next(), strength = double_of(pattern());
        else if (!same(word, "category"))
            return 0;
    }
    classes = shape[axes > 1];
    samples = inner = 1;
    for (size_t i = 2; i < axes; i++) inner *= shape[i];
    if (axes > 1) samples = shape[0] * inner;
    return axes > 0 && samples <= FEW && samples * classes <= (has_probability ? FEW : ROOM) &&
           (classes <= FEW || !(has_weight || inner > 1));
}

#ifdef ROW
static int work(void)
{
    return lace_row_f32(loss, gradient, NULL, z, (size_t)target[0], classes) == LACE_DONE;
}
#else
/* Losses, and gradients times factors; 0 if a target is refused. */
static int work(void)
{
    const NAME(lace_options) options = {has_weight ? weight : NULL, (REAL)smoothing, (REAL)strength, ignore};
    const REAL *y = has_probability ? probability : NULL;
    double divisor = reduction == 'm' ? 0 : 1;
    for (size_t i = 0; i < samples && reduction == 'm'; i++)
        if (y)
            divisor++;
        else if (target[i] != ignore && target[i] >= 0 && (uint64_t)target[i] < classes)
            divisor += has_weight ? (double)weight[target[i]] : 1;
    if (factors == 0) factor[0] = 1;
    if (reduction != 'n') factor[0] = (REAL)((double)factor[0] / divisor);
    const size_t step = factors > 1;
    static NAME(lace_args) args; /* compilers clear a local one by memset, which is not there without libc */
    args.loss = loss;
    args.gradient = gradient;
    args.logits = z;
    args.target = target;
    args.soft_target = y;
    args.scale = factor;
    args.scale_step = step;
    args.n = samples;
    args.k = classes;
    args.options = &options;
    if (inner == 1) {
        if (NAME(lace_rows)(&args) != LACE_DONE) return 0;
    } else {
        args.n = inner;
        for (size_t i = 0; i < samples; i += inner) {
            args.loss = loss + i;
            args.gradient = gradient + i * classes;
            args.logits = z + i * classes;
            args.target = target + i;
            args.soft_target = y ? y + i * classes : NULL;
            args.scale = factor + i * step;
            if (NAME(lace_columns)(&args) != LACE_DONE) return 0;
        }
    }
    if (reduction != 'n') {
        double sum[2];
        NAME(lace_sum)(sum, loss, samples);
        loss[0] = (REAL)((sum[0] + sum[1]) / divisor);
    }
    return 1;
}
#endif

int main(void)
{
    int wants_gradient = 1;
    if (!line() || !same(word, "lace-vectors") || !next() || !same(word, "1")) return 2;
    while (line()) {
        if (same(word, "dtype")) {
            if (!next() || !same(word, DTYPE)) return 2;
        } else if (same(word, "level")) {
            next();
            if (same(word, "second")) return 2;
            wants_gradient = !same(word, "core");
        } else if (same(word, "case")) {
            next();
            say("case ");
            say(word);
            if (!read_case()) return 2;
            if (work()) {
                const size_t n = reduction == 'n' ? samples : 1, m = asked ? asked : samples * classes;
                say("\nloss");
                for (size_t i = 0; i < n; i++) say_real(loss[i]);
                if (wants_gradient) say("\ngradient");
                for (size_t i = 0; i < m && wants_gradient; i++) say_real(gradient[asked ? places[i] : i]);
            } else {
                say("\nerror");
            }
            say("\nend\n");
        } else if (!same(word, "count")) {
            return 2;
        }
    }
    return 0;
}
