/* lace_row_f32: what it returns, what it writes and what not, the bits of lace_columns_f32, every value and the totals.
 * An input is some rows that one total is taken of. */
#include "exact.h"
#include "fuzz.h"
#include "lace.h"

enum { MOST_CLASSES = 4096, MOST_ROWS = 40 };
enum { LOGITS, LOSS, GRADIENT, TOTALS, COLUMN_LOSS, COLUMN_GRADIENT };

typedef struct {
    size_t k, target;
    Array logits, loss, gradient, totals;
} Call;

/* The one place that knows the functions' arguments. */
static int result_of(const Call *c)
{
    return lace_row_f32(c->loss.given, c->gradient.given, c->totals.given, c->logits.given, c->target, c->k);
}

static void column(const Array *loss, const Array *gradient, const Call *c)
{
    const int64_t t = (int64_t)c->target;
    const lace_args_f32 args = {.loss = loss->given, .gradient = gradient->given, .logits = c->logits.given, .target = &t,
                                .n = 1, .k = c->k};
    must(lace_columns_f32(&args) == LACE_DONE, "a column is refused");
}

static void read_call(Call *c, Input *in)
{
    const size_t flags = byte(in), which_k = byte(in), sizes[] = {127, 256, 300, 1000, 2049, MOST_CLASSES};
    const int at_end = flags & 1;
    const Bulk numbers = bulk(in, 4);
    in->random += two_bytes(in);
    c->k = which_k < 250 ? 1 + which_k % 40 : sizes[which_k % 6];
    c->target = two_bytes(in) % c->k;
    c->logits = array(LOGITS, c->k, 4, at_end);
    c->loss = array(LOSS, 1, 4, at_end);
    c->gradient = array(GRADIENT, c->k, 4, at_end);
    for (size_t j = 0; j < c->k; j++) put(&c->logits, j, one_of(numbers, in));
    put(&c->logits, c->target, get(&c->logits, c->target) + (flags & 2 ? 110 * uniform(in) : 0));
    for (size_t odd = byte(in) % 8; odd > 0; odd--) {
        const size_t j = two_bytes(in);
        put(&c->logits, j < 40000 ? j % c->k : c->target, any_number(in, 4));
    }
    if (flags & 4) c->loss.given = NULL;
    if (flags & 8) c->gradient.given = NULL;
    if (flags & 16) c->totals.given = NULL;
    switch (flags >> 5) { /* what is refused */
    case 1: c->logits.given = NULL; break;
    case 2: c->k = 0; break;
    case 3: c->target = c->k + (flags & 16 ? 0 : SIZE_MAX - c->k); break;
    }
}

static size_t rank_of(const Call *c)
{
    const double z = get(&c->logits, c->target);
    size_t rank = 0;
    for (size_t j = 0; j < c->k; j++) { /* NaN counts as larger */
        const double other = get(&c->logits, j);
        rank += j < c->target ? !(other < z) : j > c->target && !(other <= z);
    }
    return rank;
}

static void check_row(const Call *c, double losses[2])
{
    static double logits[MOST_CLASSES], gradient[MOST_CLASSES];
    const Array loss = array(COLUMN_LOSS, 1, 4, 1), slopes = array(COLUMN_GRADIENT, c->k, 4, 1);
    column(&loss, &slopes, c);
    must(!c->loss.given || same_bits(get(&c->loss, 0), get(&loss, 0)), "the loss has not the bits of a column's");
    for (size_t j = 0; j < c->k; j++) {
        logits[j] = get(&c->logits, j);
        gradient[j] = get(&slopes, j);
        must(!c->gradient.given || same_bits(get(&c->gradient, j), gradient[j]), "gradient %zu has not the bits", j);
    }
    const Row row = {4, c->k, c->target, logits, NULL, NULL, 0, 1, 1};
    const double value = get(&loss, 0);
    const Results found = {&value, gradient, NULL, NULL, NULL};
    const char *wrong = wrong_row(&row, &found, losses);
    must(!wrong, "target %zu of %zu: %s", c->target, c->k, wrong);
}

static void check_totals(lace_pair_f32 found, const double losses[], size_t count)
{
    const double sum[] = {(double)found.high, (double)found.low};
    const char *wrong = wrong_totals(losses, count, sum);
    must(!wrong, "the totals: %s", wrong);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static double losses[MOST_ROWS], cross_entropies[MOST_ROWS];
    Input in = {data, data + size, 0};
    lace_totals_f32 totals = {{0, 0}, {0, 0}, 0, {0}};
    size_t count = 0, top[5] = {0};
    while (in.at < in.end && count < MOST_ROWS) {
        Call c = {.totals = array(TOTALS, 1, sizeof totals, 1)};
        read_call(&c, &in);
        read_only(&c.logits);
        mark_results(&c.loss);
        mark_results(&c.gradient);
        mark_results(&c.totals);
        memcpy(c.totals.at, &totals, sizeof totals);
        const int got = result_of(&c);
        const int right = !c.logits.given ? LACE_NULL : c.k == 0 ? LACE_SIZE : c.target >= c.k ? 1 : LACE_DONE;
        must(got == right, "it returns %d, not %d", got, right);
        must(got == LACE_DONE && c.loss.given ? marked_around(&c.loss) : untouched(&c.loss), "loss is written to");
        must(got == LACE_DONE && c.gradient.given ? marked_around(&c.gradient) : untouched(&c.gradient),
             "gradient is written to");
        must(marked_around(&c.totals), "it writes around the totals");
        if (got == LACE_DONE && c.totals.given) {
            const size_t rank = rank_of(&c);
            for (size_t i = rank; i < 5; i++) top[i]++;
            memcpy(&totals, c.totals.at, sizeof totals);
        } else {
            must(memcmp(&totals, c.totals.at, sizeof totals) == 0, "the totals are written to");
        }
        if (got != LACE_DONE) continue;
        double both[2];
        check_row(&c, both);
        if (!c.totals.given) continue;
        losses[count] = both[0];
        cross_entropies[count++] = both[1];
    }
    must(totals.count == count && memcmp(totals.top, top, sizeof top) == 0, "the totals count wrong");
    check_totals(totals.loss, losses, count);
    check_totals(totals.cross_entropy, cross_entropies, count);
    return 0;
}
