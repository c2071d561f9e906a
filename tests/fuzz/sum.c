/* lace_sum_*. An input is the numbers. */
#include "exact.h"
#include "fuzz.h"
#include "lace.h"

enum { MOST_VALUES = ROOM / 8 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static double values[MOST_VALUES];
    Input in = {data, data + size, 0};
    const size_t flags = byte(&in), which_n = two_bytes(&in), width = flags & 1 ? 8 : 4;
    const Bulk numbers = bulk(&in, width);
    const size_t n = which_n < 65280 ? which_n % 300 : which_n - 60000;
    in.random = two_bytes(&in);
    const Array of = array(0, n, width, flags >> 1 & 1), sum = array(1, 2, 8, flags >> 2 & 1);
    for (size_t i = 0; i < n; i++) put(&of, i, one_of(numbers, &in));
    while (n > 0 && in.at < in.end) {
        const size_t i = two_bytes(&in) % n;
        put(&of, i, any_number(&in, width));
    }
    for (size_t i = 0; i < n; i++) values[i] = flags & 8 ? fabs(get(&of, i)) : get(&of, i);
    for (size_t i = 0; i < n; i++) put(&of, i, values[i]);
    read_only(&of);
    mark_results(&sum);
    if (width == 4)
        lace_sum_f32(sum.given, n > 0 ? of.given : NULL, n);
    else
        lace_sum_f64(sum.given, n > 0 ? of.given : NULL, n);
    must(marked_around(&sum), "it writes around the sum");
    const double found[] = {get(&sum, 0), get(&sum, 1)};
    const char *wrong = wrong_sum(values, n, width, found);
    must(!wrong, "%zu values of %zu bytes: %s", n, width, wrong);
    return 0;
}
