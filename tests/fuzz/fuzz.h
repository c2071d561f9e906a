/* What the fuzz targets share: an input that is read as choices and numbers, and arrays between pages that nothing may
 * touch. An input decides everything, so that a finding is a small file. */
#ifndef FUZZ_H
#define FUZZ_H

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "lace_builds.h"

#if __has_feature(memory_sanitizer)
#include <sanitizer/msan_interface.h>
#else
#define __msan_poison(address, size) ((void)0)
#define __msan_unpoison(address, size) ((void)0)
#define __msan_check_mem_is_initialized(address, size) ((void)0)
#endif

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the program with a sentence. */
__attribute__((format(printf, 2, 3))) static inline void must(int condition, const char *sentence, ...)
{
    va_list values;
    if (condition) return;
    va_start(values, sentence);
    fputs("\nWRONG: ", stderr);
    vfprintf(stderr, sentence, values);
    fputs("\n", stderr);
    va_end(values);
    abort();
}

typedef struct {
    const uint8_t *at, *end;
    uint64_t random;
} Input;

static inline size_t byte(Input *in) /* 0 when there are no more */
{
    return in->at < in->end ? *in->at++ : 0;
}

static inline size_t two_bytes(Input *in)
{
    const size_t low = byte(in);
    return low + 256 * byte(in);
}

static inline double uniform(Input *in) /* -1 to 1, 24 bits */
{
    in->random = in->random * 6364136223846793005u + 1442695040888963407u;
    return (double)(int64_t)(in->random >> 39) / 16777216 - 1;
}

/* Any number of a type of this width in bytes, often one of the odd ones. */
static inline double any_number(Input *in, size_t width)
{
    const double odd[] = {NAN, INFINITY, -INFINITY, width == 4 ? FLT_MAX : DBL_MAX, width == 4 ? -FLT_MAX : -DBL_MAX,
                          width == 4 ? 0x1p-149 : 0x1p-1074, width == 4 ? FLT_MIN : DBL_MIN, 0, -0.0, 1};
    const size_t which = byte(in) % 16;
    uint8_t bits[8] = {0};
    if (which < sizeof odd / sizeof *odd) return odd[which];
    if (which < 14) return ((double)two_bytes(in) - 32768) / (which < 12 ? 256 : 16);
    for (size_t i = 0; i < width; i++) bits[i] = (uint8_t)byte(in);
    float f;
    double d;
    memcpy(&f, bits, sizeof f);
    memcpy(&d, bits, sizeof d);
    return width == 4 ? (double)f : d;
}

/* Numbers of one size, from what is random: they may have many ties. */
typedef struct { double scale, step; } Bulk;

static inline Bulk bulk(Input *in, size_t width)
{
    const double scales[] = {10, 0, 1e-3, 1, 30, 100, 760, 1e5, width == 4 ? 0x1p126 : 0x1p1022,
                             width == 4 ? 0x1p-130 : 0x1p-1030};
    const size_t choice = byte(in);
    const Bulk b = {scales[choice % (sizeof scales / sizeof *scales)], choice & 128 ? 0.25 : 0};
    return b;
}

static inline double one_of(Bulk b, Input *in)
{
    const double u = uniform(in);
    return b.scale * (b.step > 0 ? floor(u / b.step) * b.step : u);
}

/* An array that ends where a forbidden page begins, or starts where one ends. On its other side are marks. */
typedef struct {
    unsigned char *room, *at;
    void *given; /* what a call gets: the same as `at`, or NULL */
    size_t count, width;
} Array;

enum { ROOM = 1 << 20, PAGE = 1 << 12, MARKS = 64, MARK = 0xa5, PLACES = 12 };

static inline size_t marks_before(const Array *a)
{
    const size_t before = (size_t)(a->at - a->room);
    return before < MARKS ? before : MARKS;
}

static inline size_t marks_after(const Array *a)
{
    const size_t after = ROOM - (size_t)(a->at - a->room) - a->count * a->width;
    return after < MARKS ? after : MARKS;
}

static inline Array array(size_t place, size_t count, size_t width, int at_end)
{
    static unsigned char *memory;
    const size_t each = ROOM + PAGE;
    if (!memory) memory = mmap(NULL, PLACES * each + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(memory != MAP_FAILED && place < PLACES && count * width <= ROOM, "the target needs more memory");
    Array a = {memory + PAGE + place * each, NULL, NULL, count, width};
    a.given = a.at = at_end ? a.room + ROOM - count * width : a.room;
    must(mprotect(a.room, ROOM, PROT_READ | PROT_WRITE) == 0, "mprotect failed");
    return a;
}

static inline void read_only(const Array *a)
{
    must(mprotect(a->room, ROOM, PROT_READ) == 0, "mprotect failed");
}

/* Before a call that may write to it. */
static inline void mark_results(const Array *a)
{
    const size_t size = a->count * a->width;
    __msan_unpoison(a->room, ROOM);
    memset(a->at - marks_before(a), MARK, marks_before(a) + size + marks_after(a));
    __msan_poison(a->at, size);
}

static inline int marked(const unsigned char *from, size_t size)
{
    __msan_unpoison(from, size);
    for (size_t i = 0; i < size; i++)
        if (from[i] != MARK) return 0;
    return 1;
}

static inline int marked_around(const Array *a)
{
    return marked(a->at - marks_before(a), marks_before(a)) && marked(a->at + a->count * a->width, marks_after(a));
}

static inline int untouched(const Array *a)
{
    return marked(a->at, a->count * a->width) && marked_around(a);
}

static inline void put(const Array *a, size_t i, double value)
{
    const float f = (float)value;
    memcpy(a->at + i * a->width, a->width == 4 ? (const void *)&f : &value, a->width);
}

static inline double get(const Array *a, size_t i)
{
    float f;
    double d;
    __msan_check_mem_is_initialized(a->at + i * a->width, a->width);
    memcpy(&f, a->at + i * a->width, sizeof f);
    if (a->width == 4) return (double)f;
    memcpy(&d, a->at + i * a->width, sizeof d);
    return d;
}

static inline int same_bits(double a, double b)
{
    return (a != a && b != b) || memcmp(&a, &b, sizeof a) == 0;
}

/* The build that the target was compiled with, then those of lace_builds, compiled apart. NULL after the last. */
static inline const lace_build *build(size_t which)
{
    static const lace_build own = {"own", lace_rows_f32, lace_columns_f32, lace_rows_f64, lace_columns_f64,
                                   lace_binary_f32, lace_binary_f64, lace_posterior_rows_f32, lace_posterior_columns_f32,
                                   lace_posterior_rows_f64, lace_posterior_columns_f64};
    if (which == 0) return &own;
#ifdef ALONE
    return NULL;
#else
    size_t count;
    const lace_build *others = lace_builds(&count);
    return which <= count ? &others[which - 1] : NULL;
#endif
}

#endif
