/* lace_rows_* and lace_columns_*: what they return, what they write and what not, every value, and the same bits from
 * every build. An input is one call. With ALONE there is one build, this program's own. */
#include "exact.h"
#include "fuzz.h"

enum { MOST_VALUES = ROOM / 8, USUAL_VALUES = 4096, RESULTS = 6 };

typedef struct {
    size_t width, n, k, gradient_stride, probability_stride, step;
    ptrdiff_t logits_stride;
    int columns, options, statistics;
    double smoothing, strength;
    int64_t ignored;
    Array logits, target, probability, weight, scale; /* what is read */
    Array results[RESULTS];                           /* what is written, in this order: */
} Call;
enum { LOSS, GRADIENT, CROSS_ENTROPY, CHANCE, RANK, CONFIDENCE };

/* The one place that knows the functions' arguments. */
static int64_t result_of(const lace_build *build, const Call *c)
{
    const Array *r = c->results;
    const lace_options_f32 o32 = {c->weight.given, (float)c->smoothing, (float)c->strength, c->ignored};
    const lace_options_f64 o64 = {c->weight.given, c->smoothing, c->strength, c->ignored};
#define ARGS(with_options)                                                                                              \
    {r[LOSS].given, r[GRADIENT].given, c->logits.given, c->target.given, c->probability.given, c->scale.given,          \
     c->step, c->n, c->k, c->logits_stride, c->gradient_stride, c->options ? with_options : NULL,                       \
     r[CROSS_ENTROPY].given, r[CHANCE].given, r[RANK].given, r[CONFIDENCE].given, c->probability_stride}
    const lace_args_f32 a32 = ARGS(&o32);
    const lace_args_f64 a64 = ARGS(&o64);
    if (c->columns) return c->width == 4 ? build->columns_f32(&a32) : build->columns_f64(&a64);
    return c->width == 4 ? build->rows_f32(&a32) : build->rows_f64(&a64);
}

static size_t size_of(ptrdiff_t stride)
{
    return stride < 0 ? 0 - (size_t)stride : (size_t)stride;
}

/* Lines lie side by side where the stride is 0. */
static size_t length_of(const Call *c) { return c->columns ? c->n : c->k; }
static size_t lines_of(const Call *c) { return c->columns ? c->k : c->n; }
static size_t or_length(const Call *c, size_t stride) { return stride > 0 ? stride : length_of(c); }

static size_t values_of(const Call *c, size_t stride)
{
    return lines_of(c) == 0 || c->n == 0 ? 0 : (lines_of(c) - 1) * or_length(c, stride) + length_of(c);
}

/* Where class j of sample i is in the array of the logits, whose lines may run backwards, and in that of the gradient. */
static size_t place_of(const Call *c, size_t i, size_t j)
{
    const size_t line = c->columns ? j : i, place = c->columns ? i : j;
    return (c->logits_stride < 0 ? lines_of(c) - 1 - line : line) * or_length(c, size_of(c->logits_stride)) + place;
}

static size_t line_place(const Call *c, size_t stride, size_t i, size_t j)
{
    return (c->columns ? j : i) * or_length(c, stride) + (c->columns ? i : j);
}

static int64_t class_of(const Call *c, size_t i)
{
    return ((const int64_t *)(const void *)c->target.at)[i];
}

static int has_statistics(const Call *c)
{
    return c->statistics && !c->columns && !c->probability.given;
}

static double fraction(Input *in) /* 0 to 1 */
{
    const size_t choice = byte(in);
    return choice == 255 ? 1 : choice == 254 ? 1 - 0x1p-24 : choice == 253 ? 0x1p-149 : (double)choice / 256;
}

/* One number of a call becomes an odd one. */
static void disturb(Call *c, Input *in)
{
    const size_t what = byte(in), i = byte(in) % c->n, j = two_bytes(in) % c->k;
    const double tame[] = {0, 1, 0x1p-149, 0x1p-126, 0x1p-30, 0x1p20, -1, -0.0}, value = tame[byte(in) % 8];
    const int64_t k = (int64_t)c->k, classes[] = {k, -1, INT64_MIN, INT64_MAX, k + (INT64_C(1) << 32), -100, 0, k - 1};
    switch (what % 16) {
    case 0: put(&c->weight, j, value); break;
    case 1:
        if (c->probability.count > 0) put(&c->probability, line_place(c, c->probability_stride, i, j), value);
        break;
    case 2: put(&c->scale, c->step * i, value); break;
    case 3: ((int64_t *)(void *)c->target.at)[i] = classes[byte(in) % 8]; break;
    case 4:
    case 5:
    case 6: put(&c->logits, place_of(c, i, (size_t)class_of(c, i) % c->k), any_number(in, c->width)); break;
    default: put(&c->logits, place_of(c, i, j), any_number(in, c->width));
    }
}

static void read_numbers(Call *c, Input *in)
{
    const double sizes[] = {1, 65536, 0x1p-30, 0};
    const Bulk logits = bulk(in, c->width);
    const size_t kind = byte(in), ignoring = byte(in) % 64;
    const double margin = kind & 1 ? (c->width == 4 ? 110 : 760) : 0;
    for (size_t p = 0; p < c->logits.count; p++) put(&c->logits, p, NAN);
    for (size_t i = 0; i < c->n; i++) {
        const size_t t = (size_t)(fabs(uniform(in)) * (double)c->k) % c->k;
        ((int64_t *)(void *)c->target.at)[i] = fabs(uniform(in)) * 64 < (double)ignoring ? c->ignored : (int64_t)t;
        for (size_t j = 0; j < c->k; j++) put(&c->logits, place_of(c, i, j), one_of(logits, in));
        const size_t p = place_of(c, i, t);
        put(&c->logits, p, get(&c->logits, p) + margin * uniform(in));
    }
    for (size_t j = 0; j < c->k; j++) {
        const double w = sizes[kind >> 1 & 3] * uniform(in);
        put(&c->weight, j, kind & 8 ? w : fabs(w));
    }
    for (size_t p = 0; p < c->probability.count; p++)
        put(&c->probability, p, kind & 16 ? fabs(uniform(in)) / (double)c->k : uniform(in) > 0.5);
    const double scale = kind & 32 ? 0x1p64 : sizes[kind >> 6];
    for (size_t p = 0; p < c->scale.count; p++) put(&c->scale, p, scale * uniform(in));
    while (c->n > 0 && in->at < in->end) disturb(c, in);
}

static void read_call(Call *c, Input *in)
{
    const size_t flags = byte(in), absent = byte(in), layout = byte(in), which_k = byte(in), which_n = byte(in);
    const size_t sizes[] = {128, 129, 255, 256, 257, 300, 512, 1000, 1025, 2000, 4099, 32769};
    const int64_t ignorable[] = {-100, 0, INT64_MIN, 1};
    const int at_end = !(flags & 4);
    in->random = two_bytes(in);
    c->width = flags & 1 ? 8 : 4;
    c->columns = flags >> 1 & 1;
    c->options = !(flags & 32);
    c->statistics = absent >> 6 & 1;
    c->step = flags >> 6 == 3 ? 1 : flags >> 6 == 2 ? 3 : 0;
    c->ignored = c->options ? ignorable[layout & 3] : -100;
    const double smoothing = fraction(in), strength = fraction(in);
    c->smoothing = c->options && absent & 128 ? smoothing : 0;
    c->strength = c->options ? strength : 1;

    c->k = which_k < 200 ? 1 + which_k % 70 : sizes[which_k % 12];
    const size_t most = (which_n < 240 ? USUAL_VALUES : MOST_VALUES) / c->k, n = which_n < 240 ? which_n % 101 : 10;
    c->n = n <= most ? n : most > 0 ? most : 1;
    /* Room between the lines of both, of the logits only, or of the gradient only; and lines that run backwards. */
    const size_t room = (layout >> 2 & 3) * (length_of(c) + 3) * lines_of(c) > MOST_VALUES ? 0 : layout >> 2 & 3;
    const size_t apart = room > 0 ? length_of(c) + room : flags & 4 ? length_of(c) : 0;
    c->logits_stride = (ptrdiff_t)(layout >> 4 == 8 ? 0 : apart);
    c->gradient_stride = layout >> 4 == 9 ? 0 : apart;
    c->probability_stride = layout & 2 ? apart : 0;
    if (layout >> 4 >= 12 && apart > 0) c->logits_stride = -c->logits_stride;
    const size_t counts[RESULTS] = {c->n, values_of(c, c->gradient_stride), c->n, c->n, c->n, c->n};
    for (size_t r = 0; r < RESULTS; r++) c->results[r] = array(r, counts[r], r == RANK ? 8 : c->width, at_end);
    c->logits = array(RESULTS, values_of(c, size_of(c->logits_stride)), c->width, at_end);
    c->target = array(RESULTS + 1, c->n, 8, at_end);
    c->probability = array(RESULTS + 2, values_of(c, c->probability_stride), c->width, at_end);
    c->weight = array(RESULTS + 3, c->k, c->width, at_end);
    c->scale = array(RESULTS + 4, c->n == 0 ? 0 : c->step * (c->n - 1) + 1, c->width, at_end);
    read_numbers(c, in);
    if (c->logits_stride < 0 && c->n > 0) c->logits.given = c->logits.at + place_of(c, 0, 0) * c->width;

    Array *const needed[] = {&c->results[LOSS], &c->logits, &c->target, &c->results[CROSS_ENTROPY],
                             &c->results[CHANCE], &c->results[RANK], &c->results[CONFIDENCE]};
    if (absent & 1) c->results[GRADIENT].given = NULL;
    const size_t which = absent >> 1 & 31;
    if (which < 7) needed[which]->given = NULL;
    for (size_t r = CROSS_ENTROPY; r < RESULTS; r++) /* none of the statistics, or one */
        if (!c->statistics || (which >= 8 && which < 12 && r != which - 8 + CROSS_ENTROPY)) c->results[r].given = NULL;
    if (!(flags & 8)) c->probability.given = NULL;
    if (!c->options || !(flags & 16)) c->weight.given = NULL;
    if (flags >> 6 == 0) c->scale.given = NULL;
    const size_t limit = SIZE_MAX / c->width;
    switch (layout >> 4) { /* what is refused */
    case 1: c->k = 0; break;
    case 2: c->k = c->n > 0 ? limit / c->n + 1 : c->k; break;
    case 3: c->n = limit / c->k + 1; break;
    case 4: c->logits_stride = (ptrdiff_t)length_of(c) - 1; break;
    case 5: *(layout & 1 ? &c->gradient_stride : &c->probability_stride) = length_of(c) - 1; break;
    case 6: c->logits_stride = (ptrdiff_t)(limit / (lines_of(c) > 0 ? lines_of(c) : 1)) + 1; break;
    case 7:
        *(layout & 1 ? &c->gradient_stride : &c->probability_stride) = limit / (lines_of(c) > 0 ? lines_of(c) : 1) + 1;
        break;
    }
}

static int64_t expected(const Call *c)
{
    const size_t strides[] = {or_length(c, size_of(c->logits_stride)), or_length(c, c->gradient_stride),
                              or_length(c, c->probability_stride)};
    const Array *r = c->results;
    if (c->k == 0) return LACE_SIZE;
    for (size_t s = 0; s < 3; s++)
        if (strides[s] < length_of(c) || (lines_of(c) > 0 && strides[s] > SIZE_MAX / c->width / lines_of(c)))
            return LACE_SIZE;
    if (c->n == 0) return LACE_DONE;
    if (!r[LOSS].given || !c->logits.given || !(c->target.given || c->probability.given)) return LACE_NULL;
    for (size_t i = 0; i < c->n && !c->probability.given; i++) {
        const int64_t t = class_of(c, i);
        if (t != c->ignored && (t < 0 || t >= (int64_t)c->k)) return (int64_t)i + 1;
    }
    return LACE_DONE;
}

/* What a sample has to be. */
static void check_sample(const Call *c, size_t i)
{
    static double logits[MOST_VALUES], probability[MOST_VALUES], weight[MOST_VALUES], gradient[MOST_VALUES];
    const Array *r = c->results;
    const int has = has_statistics(c);
    const int ignored = !c->probability.given && class_of(c, i) == c->ignored;
    const size_t t = c->probability.given || ignored ? 0 : (size_t)class_of(c, i);
    const double loss = get(&r[LOSS], i), *described[RESULTS];
    double values[RESULTS] = {0};
    for (size_t s = CROSS_ENTROPY; s < RESULTS; s++) {
        described[s] = has && r[s].given ? &values[s] : NULL;
        if (described[s] && s != RANK) values[s] = get(&r[s], i);
    }
    int64_t rank = 0;
    for (size_t j = 0; j < c->k; j++) {
        logits[j] = get(&c->logits, place_of(c, i, j));
        if (c->probability.given) probability[j] = get(&c->probability, line_place(c, c->probability_stride, i, j));
        if (c->weight.given) weight[j] = get(&c->weight, j);
        if (r[GRADIENT].given) gradient[j] = get(&r[GRADIENT], line_place(c, c->gradient_stride, i, j));
        must(!ignored || !r[GRADIENT].given || gradient[j] == 0, "row %zu is ignored, its gradient is not 0", i);
    }
    for (size_t j = 0; j < c->k; j++) /* NaN counts as larger */
        rank += j < t ? !(logits[j] < logits[t]) : j > t && !(logits[j] <= logits[t]);
    if (described[RANK]) {
        __msan_check_mem_is_initialized(r[RANK].at + 8 * i, 8);
        const int64_t found = ((const int64_t *)(const void *)r[RANK].at)[i], right = ignored ? (int64_t)c->k : rank;
        must(found == right, "row %zu has rank %lld, not %lld", i, (long long)found, (long long)right);
    }
    if (ignored) {
        must(loss == 0 && values[CROSS_ENTROPY] == 0 && values[CHANCE] == 0 && values[CONFIDENCE] == 0,
             "row %zu is ignored, its loss or statistics are not 0", i);
        return;
    }
    const double scale = c->scale.given ? get(&c->scale, c->step * i) : 1;
    const Row row = {c->width, c->k, t, logits, c->probability.given ? probability : NULL,
                     c->weight.given ? weight : NULL, c->smoothing, c->strength, scale};
    const Results found = {&loss, r[GRADIENT].given ? gradient : NULL, described[CROSS_ENTROPY], described[CHANCE],
                           described[CONFIDENCE]};
    const char *wrong = wrong_row(&row, &found, NULL);
    must(!wrong, "%s %zu, %s, %zu classes, target %zu: logit %a, weight %a, scale %a, strength %a, smoothing %a%s: %s",
         c->columns ? "column" : "row", i, c->width == 4 ? "f32" : "f64", c->k, t, logits[t],
         row.weight ? weight[t] : 1, scale, c->strength, c->smoothing, row.probability ? ", probabilities" : "", wrong);
}

/* What one build does, whose results may be compared with the `first` one's. */
static void check_build(const Call *c, const lace_build *build, unsigned char first[RESULTS][ROOM], int is_first)
{
    for (size_t r = 0; r < RESULTS; r++) mark_results(&c->results[r]);
    const int64_t got = result_of(build, c), right = expected(c);
    must(got == right, "%s returns %lld, not %lld", build->name, (long long)got, (long long)right);
    must(build->rows_f32(NULL) == LACE_NULL && build->columns_f32(NULL) == LACE_NULL &&
             build->rows_f64(NULL) == LACE_NULL && build->columns_f64(NULL) == LACE_NULL, "no arguments are accepted");
    for (size_t r = 0; r < RESULTS; r++) {
        const Array *a = &c->results[r];
        const int written = right == LACE_DONE && a->given && (r < CROSS_ENTROPY || has_statistics(c));
        must(written ? marked_around(a) : untouched(a), "%s writes where it should not, result %zu", build->name, r);
        Array before = *a;
        before.at = first[r];
        if (is_first) memcpy(first[r], a->at, a->count * a->width);
        for (size_t p = 0; !is_first && written && p < a->count; p++)
            must(same_bits(get(a, p), get(&before, p)), "%s has other bits, result %zu", build->name, r);
    }
    const Array *gradient = &c->results[GRADIENT];
    const size_t length = length_of(c), stride = or_length(c, c->gradient_stride);
    for (size_t l = 0; right == LACE_DONE && gradient->given && c->n > 0 && l + 1 < lines_of(c); l++)
        must(marked(gradient->at + (l * stride + length) * c->width, (stride - length) * c->width),
             "%s writes between the lines of the gradient", build->name);
    for (size_t i = 0; right == LACE_DONE && is_first && i < c->n; i++) check_sample(c, i);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static unsigned char first[RESULTS][ROOM];
    Input in = {data, data + size, 0};
    Call c;
    read_call(&c, &in);
    const Array *const inputs[] = {&c.logits, &c.target, &c.probability, &c.weight, &c.scale};
    for (size_t a = 0; a < sizeof inputs / sizeof *inputs; a++) read_only(inputs[a]);
    for (size_t b = 0; build(b); b++) check_build(&c, build(b), first, b == 0);
    return 0;
}
