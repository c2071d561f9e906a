/* lace_posterior_rows_*, lace_posterior_columns_* and lace_row_posterior_f32: what they return, what they write and what not,
 * every value, and the same bits from every build. An input is one call. With ALONE there is one build, this program's own. */
#include "exact.h"
#include "fuzz.h"

enum { MOST_CLASSES = 32769, MOST_VALUES = 16384 };
enum { LOGITS, WEIGHT, POSTERIOR, ALONE_LOGITS, ALONE_POSTERIOR };

typedef struct {
    size_t width, n, k, room;
    int columns, options;
    double smoothing, strength;
    Array logits, weight, posterior;
} Call;

static int64_t result_of(const lace_build *build, const Call *c)
{
    const lace_options_f32 o32 = {c->weight.given, (float)c->smoothing, (float)c->strength, 0};
    const lace_options_f64 o64 = {c->weight.given, c->smoothing, c->strength, 0};
    const size_t stride = c->room > 0 ? (c->columns ? c->n : c->k) + c->room : 0;
    const lace_posterior_f32 a32 = {c->posterior.given, c->logits.given, c->n, c->k, (ptrdiff_t)stride, stride,
                                    c->options ? &o32 : NULL};
    const lace_posterior_f64 a64 = {c->posterior.given, c->logits.given, c->n, c->k, (ptrdiff_t)stride, stride,
                                    c->options ? &o64 : NULL};
    if (c->width == 4) return c->columns ? build->posterior_columns_f32(&a32) : build->posterior_rows_f32(&a32);
    return c->columns ? build->posterior_columns_f64(&a64) : build->posterior_rows_f64(&a64);
}

static size_t place_of(const Call *c, size_t i, size_t j)
{
    return c->columns ? j * (c->n + c->room) + i : i * (c->k + c->room) + j;
}

static void read_call(Call *c, Input *in)
{
    const size_t flags = byte(in), which_k = byte(in), which_n = byte(in), e = byte(in), s = byte(in);
    const size_t sizes[] = {127, 256, 257, 300, 1000, 2049, MOST_CLASSES};
    const double spreads[] = {1, 0x1p10, 0x1p70, 0x1p-140};
    c->width = flags & 1 ? 8 : 4;
    c->columns = flags >> 1 & 1;
    c->options = flags >> 2 & 1;
    const Bulk numbers = bulk(in, c->width);
    in->random = two_bytes(in);
    c->k = which_k < 230 ? 1 + which_k % 40 : sizes[which_k % 7];
    c->room = flags >> 3 & 1 && c->k < MOST_VALUES ? 3 : 0;
    c->n = which_n % 70 * c->k < MOST_VALUES ? which_n % 70 : 1;
    c->smoothing = !c->options || e < 128 ? 0 : e == 255 ? 1 : (double)(e - 128) / 128;
    c->strength = c->options ? (double)s / 255 : 1;
    const size_t lines = c->columns ? c->k : c->n, length = c->columns ? c->n : c->k;
    const size_t count = c->n > 0 ? (lines - 1) * (length + c->room) + length : 0;
    c->logits = array(LOGITS, count, c->width, 1);
    c->posterior = array(POSTERIOR, count, c->width, flags >> 4 & 1);
    c->weight = array(WEIGHT, c->k, c->width, 1);
    for (size_t p = 0; p < count; p++) put(&c->logits, p, NAN);
    for (size_t i = 0; i < c->n; i++)
        for (size_t j = 0; j < c->k; j++) put(&c->logits, place_of(c, i, j), one_of(numbers, in));
    for (size_t j = 0; j < c->k; j++) put(&c->weight, j, spreads[s % 4] * (1.001 + uniform(in)));
    while (c->n > 0 && in->at < in->end) {
        const size_t what = byte(in), i = byte(in) % c->n, j = two_bytes(in) % c->k;
        const double value = any_number(in, c->width);
        if (what % 8 == 0)
            put(&c->weight, j, value);
        else
            put(&c->logits, place_of(c, i, j), value);
    }
    if (!c->options || flags >> 5 & 1) c->weight.given = NULL;
    switch (flags >> 6 ? in->random % 16 : 15) { /* what is refused */
    case 0: c->k = 0; break;
    case 1: c->posterior.given = NULL; break;
    case 2: c->logits.given = NULL; break;
    case 3: c->n = SIZE_MAX / c->width / c->k + 1; break;
    }
}

static int64_t expected(const Call *c)
{
    const size_t line = (c->columns ? c->n : c->k) + c->room, lines = c->columns ? c->k : c->n;
    double smallest = 1, largest = 1;
    if (c->k == 0 || (lines > 0 && line > SIZE_MAX / c->width / lines)) return LACE_SIZE;
    if (c->n > 0 && !(c->posterior.given && c->logits.given)) return LACE_NULL;
    if (c->smoothing >= 1) return LACE_OPTION;
    for (size_t j = 0; c->weight.given && j < c->k; j++) {
        const double w = get(&c->weight, j);
        if (!(w > 0) || w - w != 0) return LACE_OPTION;
        if (j == 0 || w < smallest) smallest = w;
        if (j == 0 || w > largest) largest = w;
    }
    return largest / smallest > (c->width == 4 ? 0x1p60 : 0x1p800) ? LACE_OPTION : LACE_DONE;
}

static void check_sample(const Call *c, size_t i)
{
    static double logits[MOST_CLASSES], weight[MOST_CLASSES], found[MOST_CLASSES];
    for (size_t j = 0; j < c->k; j++) {
        logits[j] = get(&c->logits, place_of(c, i, j));
        weight[j] = c->weight.given ? get(&c->weight, j) : 1;
        found[j] = get(&c->posterior, place_of(c, i, j));
    }
    const Row row = {c->width, c->k, 0, logits, NULL, c->weight.given ? weight : NULL, c->smoothing, c->strength, 1};
    const char *wrong = wrong_posterior(&row, found);
    must(!wrong, "%s %zu, %s, %zu classes, strength %a, smoothing %a: %s", c->columns ? "column" : "row", i,
         c->width == 4 ? "f32" : "f64", c->k, c->strength, c->smoothing, wrong);
    if (c->width == 8 || c->options) return;
    const Array alone = array(ALONE_LOGITS, c->k, 4, 1), p = array(ALONE_POSTERIOR, c->k, 4, 1);
    for (size_t j = 0; j < c->k; j++) put(&alone, j, logits[j]);
    mark_results(&p);
    must(lace_row_posterior_f32(p.given, alone.given, c->k) == LACE_DONE, "one row is refused");
    must(marked_around(&p), "one row writes around its result");
    for (size_t j = 0; j < c->k; j++) found[j] = get(&p, j);
    wrong = wrong_posterior(&row, found);
    must(!wrong, "one row of %zu classes: %s", c->k, wrong);
    must(lace_row_posterior_f32(NULL, alone.given, c->k) == LACE_NULL &&
             lace_row_posterior_f32(p.given, NULL, c->k) == LACE_NULL &&
             lace_row_posterior_f32(p.given, alone.given, 0) == LACE_SIZE, "one row accepts what it cannot use");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static unsigned char first[ROOM];
    Input in = {data, data + size, 0};
    Call c;
    read_call(&c, &in);
    read_only(&c.logits);
    read_only(&c.weight);
    const int64_t right = expected(&c);
    for (size_t b = 0; build(b); b++) {
        mark_results(&c.posterior);
        const int64_t got = result_of(build(b), &c);
        must(got == right, "%s returns %lld, not %lld", build(b)->name, (long long)got, (long long)right);
        must(right == LACE_DONE ? marked_around(&c.posterior) : untouched(&c.posterior), "it writes where it should not");
        must(build(b)->posterior_rows_f32(NULL) == LACE_NULL && build(b)->posterior_columns_f32(NULL) == LACE_NULL &&
                 build(b)->posterior_rows_f64(NULL) == LACE_NULL && build(b)->posterior_columns_f64(NULL) == LACE_NULL,
             "no arguments are accepted");
        Array before = c.posterior;
        before.at = first;
        for (size_t i = 0; right == LACE_DONE && i < c.n; i++)
            for (size_t j = 0; j < c.k; j++) {
                const size_t p = place_of(&c, i, j);
                must(b == 0 || same_bits(get(&c.posterior, p), get(&before, p)), "%s has other bits", build(b)->name);
            }
        for (size_t i = 0; right == LACE_DONE && b == 0 && i < c.n; i++) check_sample(&c, i);
        if (b == 0 && right == LACE_DONE) {
            __msan_unpoison(c.posterior.at, c.posterior.count * c.width);
            memcpy(first, c.posterior.at, c.posterior.count * c.width);
        }
    }
    return 0;
}
