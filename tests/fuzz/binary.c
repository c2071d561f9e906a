/* lace_binary_* and lace_labels_f32: what they return, what they write and what not, every value, and the same bits from
 * every build. An input is one call. With ALONE there is one build, this program's own. */
#include "exact.h"
#include "fuzz.h"

enum { MOST_LABELS = 2048, RESULTS = 2 };
enum { LOSS, GRADIENT, LOGITS, TARGET, LABEL, WEIGHT, POS_WEIGHT, SCALE, ROW_LOSS, ROW_GRADIENT, ROW_TOTALS };

typedef struct {
    size_t width, n, k, first, step;
    double strength;
    Array arrays[SCALE + 1];
} Call;

/* The one place that knows the functions' arguments. */
static int64_t result_of(const lace_build *build, const Call *c)
{
    const Array *a = c->arrays;
#define ARGS                                                                                                            \
    {a[LOSS].given, a[GRADIENT].given, a[LOGITS].given, a[TARGET].given, a[LABEL].given, a[WEIGHT].given,               \
     a[POS_WEIGHT].given, a[SCALE].given, c->step, c->n, c->k, c->first,
    const lace_binary_args_f32 a32 = ARGS (float)c->strength};
    const lace_binary_args_f64 a64 = ARGS c->strength};
    return c->width == 4 ? build->binary_f32(&a32) : build->binary_f64(&a64);
}

static void read_call(Call *c, Input *in)
{
    const size_t flags = byte(in), absent = byte(in), which_n = byte(in), which_k = byte(in), kind = byte(in);
    const double strengths[] = {1, 0, 0.5, 1 - 0x1p-24}, sizes[] = {1, 65536, 0x1p-30, 0x1p64};
    const int at_end = flags & 2;
    Array *a = c->arrays;
    in->random = two_bytes(in);
    c->width = flags & 1 ? 8 : 4;
    c->n = which_n < 240 ? which_n % 150 : 100 * (which_n - 238);
    c->k = 1 + which_k % 70;
    c->first = which_k / 70 % c->k;
    c->step = kind >> 6;
    c->strength = strengths[flags >> 2 & 3];
    for (size_t p = LOSS; p <= SCALE; p++)
        a[p] = array(p, p == WEIGHT || p == POS_WEIGHT ? c->k : p == SCALE ? c->step * c->n + 1 : c->n,
                     p == LABEL ? 1 : c->width, at_end);
    const Bulk logits = bulk(in, c->width);
    for (size_t i = 0; i < c->n; i++) {
        const int present = uniform(in) > 0.3;
        put(&a[LOGITS], i, one_of(logits, in));
        put(&a[TARGET], i, kind & 1 ? fabs(uniform(in)) : present);
        a[LABEL].at[i] = (uint8_t)present;
    }
    for (size_t j = 0; j < c->k; j++) {
        put(&a[WEIGHT], j, sizes[kind >> 1 & 3] * (kind & 8 ? uniform(in) : fabs(uniform(in))));
        put(&a[POS_WEIGHT], j, sizes[kind >> 4 & 3] * fabs(uniform(in)));
    }
    for (size_t p = 0; p < a[SCALE].count; p++) put(&a[SCALE], p, sizes[flags >> 4 & 3] * uniform(in));
    while (c->n > 0 && in->at < in->end) { /* one number becomes an odd one */
        const double tame[] = {0, 1, 0x1p-149, 0x1p-126, 0x1p-30, 0x1p20, -1, 2};
        const size_t what = byte(in), i = two_bytes(in);
        if (what % 8 < 4)
            put(&a[LOGITS], i % c->n, any_number(in, c->width));
        else if (what % 8 == 4)
            put(&a[TARGET], i % c->n, what & 128 ? NAN : tame[what >> 3 & 7]);
        else
            put(&a[what % 8 == 5 ? WEIGHT : POS_WEIGHT], i % c->k, tame[what >> 3 & 7]);
    }
    if (flags & 64) a[TARGET].given = NULL;
    if (absent & 1) a[LOSS].given = NULL;
    if (absent & 2) a[GRADIENT].given = NULL;
    if (absent & 4) a[WEIGHT].given = NULL;
    if (absent & 8) a[POS_WEIGHT].given = NULL;
    if (absent & 16) a[SCALE].given = NULL;
    switch (absent >> 5) { /* what is refused, or not looked at */
    case 1: a[LOGITS].given = NULL; break;
    case 2: a[LABEL].given = NULL; break;
    case 3: c->k = 0; break;
    case 4: c->n = SIZE_MAX / c->width + 1; break;
    }
}

static int64_t expected(const Call *c)
{
    const Array *a = c->arrays;
    if (c->n > SIZE_MAX / c->width) return LACE_SIZE;
    if (c->n > 0 && c->k == 0 && (a[WEIGHT].given || a[POS_WEIGHT].given)) return LACE_SIZE;
    if (c->n > 0 && !(a[LOGITS].given && (a[TARGET].given || a[LABEL].given))) return LACE_NULL;
    return LACE_DONE;
}

/* What is wrong with a label's loss and slope, if they are given: as the two classes it is. */
static void check_label(const char *function, size_t width, double z, double y, double w, double p, double scale,
                        double strength, const double *loss, const double *slope)
{
    const double logits[] = {z > 0 ? -z : 0, z > 0 ? 0 : z}, both[] = {1 - y, y}, weights[] = {w, w * p};
    const double slopes[] = {slope ? -*slope : 0, slope ? *slope : 0};
    const int hard = y == 0 || y == 1;
    const Row row = {width, 2, hard ? (size_t)y : 0, logits, hard ? NULL : both, w == 1 && p == 1 ? NULL : weights, 0,
                     strength, scale};
    const Results found = {loss, slope ? slopes : NULL, NULL, NULL, NULL};
    const char *wrong = wrong_row(&row, &found, NULL);
    must(!wrong, "%s, %s: logit %a, target %a, weight %a, pos_weight %a, scale %a, strength %a: %s", function,
         width == 4 ? "f32" : "f64", z, y, w, p, scale, strength, wrong);
}

static void check_values(const Call *c)
{
    const Array *a = c->arrays;
    for (size_t i = 0; i < c->n; i++) {
        const size_t j = c->k > 0 ? (c->first + i) % c->k : 0;
        const double w = a[WEIGHT].given ? get(&a[WEIGHT], j) : 1, p = a[POS_WEIGHT].given ? get(&a[POS_WEIGHT], j) : 1;
        const double y = a[TARGET].given ? get(&a[TARGET], i) : a[LABEL].at[i];
        const double scale = a[SCALE].given ? get(&a[SCALE], i * c->step) : 1;
        const double loss = a[LOSS].given ? get(&a[LOSS], i) : 0, slope = a[GRADIENT].given ? get(&a[GRADIENT], i) : 0;
        check_label("lace_binary", c->width, get(&a[LOGITS], i), y, w, p, scale, c->strength,
                    a[LOSS].given ? &loss : NULL, a[GRADIENT].given ? &slope : NULL);
    }
}

static void check_build(const Call *c, const lace_build *build, unsigned char first[RESULTS][ROOM], int is_first)
{
    for (size_t r = 0; r < RESULTS; r++) mark_results(&c->arrays[r]);
    const int64_t got = result_of(build, c), right = expected(c);
    must(got == right, "%s returns %lld, not %lld", build->name, (long long)got, (long long)right);
    must(build->binary_f32(NULL) == LACE_NULL && build->binary_f64(NULL) == LACE_NULL, "no arguments are accepted");
    for (size_t r = 0; r < RESULTS; r++) {
        const Array *a = &c->arrays[r];
        const int written = right == LACE_DONE && a->given;
        must(written ? marked_around(a) : untouched(a), "%s writes where it should not, result %zu", build->name, r);
        Array before = *a;
        before.at = first[r];
        if (is_first) memcpy(first[r], a->at, a->count * a->width);
        for (size_t p = 0; !is_first && written && p < a->count; p++)
            must(same_bits(get(a, p), get(&before, p)), "%s has other bits, result %zu", build->name, r);
    }
    if (right == LACE_DONE && is_first) check_values(c);
}

/* The same labels one after another. */
static void check_row(const Call *c, int at_end)
{
    const Array *a = c->arrays, loss = array(ROW_LOSS, c->n, 4, at_end), slopes = array(ROW_GRADIENT, c->n, 4, at_end);
    lace_totals_f32 totals = {{0, 0}, {0, 0}, 0, {0}};
    size_t right = 0;
    mark_results(&loss);
    mark_results(&slopes);
    float *const l = a[LOSS].given ? loss.given : NULL, *const g = a[GRADIENT].given ? slopes.given : NULL;
    const int got = lace_labels_f32(l, g, &totals, a[LOGITS].given, a[LABEL].given, c->n);
    must(got == (c->n == 0 || (a[LOGITS].given && a[LABEL].given) ? LACE_DONE : LACE_NULL), "a row returns %d", got);
    must(l && got == LACE_DONE ? marked_around(&loss) : untouched(&loss), "a row's loss is written to");
    must(g && got == LACE_DONE ? marked_around(&slopes) : untouched(&slopes), "a row's gradient is written to");
    for (size_t i = 0; got == LACE_DONE && i < c->n; i++) {
        const double z = get(&a[LOGITS], i), value = l ? get(&loss, i) : 0, slope = g ? get(&slopes, i) : 0;
        check_label("lace_labels", 4, z, a[LABEL].at[i], 1, 1, 1, 1, l ? &value : NULL, g ? &slope : NULL);
        right += a[LABEL].at[i] ? z > 0 : z <= 0;
    }
    must(totals.count == (got == LACE_DONE ? c->n : 0), "a row counts %zu labels", totals.count);
    must(got != LACE_DONE || totals.top[0] == right, "%zu of a row's labels are right, not %zu", right, totals.top[0]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static unsigned char first[RESULTS][ROOM];
    Input in = {data, data + size, 0};
    Call c;
    read_call(&c, &in);
    for (size_t p = LOGITS; p <= SCALE; p++) read_only(&c.arrays[p]);
    for (size_t b = 0; build(b); b++) check_build(&c, build(b), first, b == 0);
    if (c.width == 4 && c.n <= MOST_LABELS) check_row(&c, size % 2);
    return 0;
}
