# cython: language_level=3, freethreading_compatible=True, cdivision=True
"""The door to lace.h: addresses in, C calls without the GIL. `lace_loss.ext` checks, this module trusts.

An address is an integer or what has one: an object with a buffer, or a tensor. The values there are of the right type,
enough and, but for rows of logits, C-contiguous.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
)
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stddef cimport size_t
from libc.stdint cimport int64_t
from libc.string cimport memcpy

import os


cdef extern from "lace.h" nogil:
    ctypedef struct lace_options_f32:
        const float *weight
        float label_smoothing
        float strength
        int64_t ignore_index

    ctypedef struct lace_options_f64:
        const double *weight
        double label_smoothing
        double strength
        int64_t ignore_index

    ctypedef struct lace_statistics_f32:
        float *cross_entropy
        float *probability
        int64_t *rank
        float *confidence

    ctypedef struct lace_statistics_f64:
        double *cross_entropy
        double *probability
        int64_t *rank
        double *confidence

    void lace_sum_f32(double *sum, const float *values, size_t n)
    void lace_sum_f64(double *sum, const double *values, size_t n)


cdef extern from "lace_builds.h" nogil:
    ctypedef struct lace_build:
        const char *name
        int64_t (*rows_f32)(float *loss, float *gradient, const float *logits, const int64_t *target,
                            const float *probability, const float *scale, size_t step, size_t n, size_t k,
                            const lace_options_f32 *options, const lace_statistics_f32 *statistics) noexcept nogil
        int64_t (*rows_f64)(double *loss, double *gradient, const double *logits, const int64_t *target,
                            const double *probability, const double *scale, size_t step, size_t n, size_t k,
                            const lace_options_f64 *options, const lace_statistics_f64 *statistics) noexcept nogil
        int64_t (*columns_f32)(float *loss, float *gradient, const float *logits, const int64_t *target,
                               const float *scale, size_t step, size_t n, size_t k, size_t stride,
                               const lace_options_f32 *options) noexcept nogil
        int64_t (*columns_f64)(double *loss, double *gradient, const double *logits, const int64_t *target,
                               const double *scale, size_t step, size_t n, size_t k, size_t stride,
                               const lace_options_f64 *options) noexcept nogil

    const lace_build *lace_builds(size_t *count)


# The arithmetic that the kernel is made for: rounding to nearest, subnormal numbers kept. Any thread may have been told
# otherwise, by torch.set_flush_denormal or a library that was built with -ffast-math.
cdef extern from *:
    """
    #include <stdint.h>
    #if defined(__SSE2__) || defined(_M_X64)
    #include <xmmintrin.h>
    static unsigned long long lace_default_arithmetic(void)
    {
        const unsigned mode = _mm_getcsr();
        if ((mode & 0xffc0) != 0x1f80) _mm_setcsr(0x1f80);
        return mode;
    }
    static void lace_restore_arithmetic(unsigned long long mode)
    {
        if ((mode & 0xffc0) != 0x1f80) _mm_setcsr((unsigned)mode);
    }
    #elif defined(__aarch64__) && defined(__GNUC__)
    static void lace_restore_arithmetic(unsigned long long mode)
    {
        __asm__ volatile("msr fpcr, %0" : : "r"(mode));
    }
    static unsigned long long lace_default_arithmetic(void)
    {
        unsigned long long mode;
        __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
        if (mode) lace_restore_arithmetic(0);
        return mode;
    }
    #else
    static unsigned long long lace_default_arithmetic(void) { return 0; }
    static void lace_restore_arithmetic(unsigned long long mode) { (void)mode; }
    #endif

    static int64_t lace_read_once(const int64_t *value)
    {
        return *(const volatile int64_t *)value; /* another thread may write to it */
    }
    """
    unsigned long long lace_default_arithmetic() noexcept nogil
    void lace_restore_arithmetic(unsigned long long mode) noexcept nogil
    int64_t lace_read_once(const int64_t *value) noexcept nogil


cdef extern from *:
    """
    #ifdef __linux__
    #include <sys/mman.h>
    #endif
    #include <stddef.h>
    #include <stdint.h>
    static void lace_in_large_pages(void *start, size_t size)
    {
    #ifdef MADV_HUGEPAGE
        const uintptr_t page = (uintptr_t)1 << 21;
        const uintptr_t first = ((uintptr_t)start + page - 1) / page * page, end = ((uintptr_t)start + size) / page * page;
        if (first < end) (void)madvise((void *)first, end - first, MADV_HUGEPAGE);
    #else
        (void)start, (void)size;
    #endif
    }
    """
    void lace_in_large_pages(void *start, size_t size)


cdef enum:
    TOGETHER = 32768  # logits, in at most 32 rows: what the kernel works on side by side
    NO_MEMORY = -4  # beside the codes of lace.h
    TO_READ = PyBUF_C_CONTIGUOUS
    TO_WRITE = PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE


ctypedef char *Bytes
ctypedef int64_t *Integers

cdef lace_build build


def builds():
    """The builds of the kernel that this processor runs, the widest vectors last."""
    cdef size_t count, i
    cdef const lace_build *found = lace_builds(&count)
    return [found[i].name.decode() for i in range(count)]


def use(str name):
    """Call this build from now on."""
    global build
    cdef size_t count
    names = builds()
    if name not in names:
        raise ImportError(f"LACE_BUILD must be one that this processor runs, {' or '.join(names)}, got {name!r}")
    build = lace_builds(&count)[<size_t> names.index(name)]


use(os.environ.get("LACE_BUILD") or builds()[-1])


cdef void *address(object array, int flags) except? NULL:
    """NULL for None."""
    cdef Py_buffer view
    if array is None:
        return NULL
    if isinstance(array, int):
        return <void *> <size_t> array
    if not PyObject_CheckBuffer(array):
        found = array.data_ptr()
        if not found and array.numel():
            raise RuntimeError(f"a tensor of shape {tuple(array.shape)} has no storage: its data is not allocated")
        return <void *> <size_t> found
    PyObject_GetBuffer(array, &view, flags)
    PyBuffer_Release(&view)
    if view.buf is NULL and view.len > 0:
        raise ValueError(f"an array of shape {array.shape} has the address 0")
    return view.buf


def in_large_pages(array, size_t size):
    """Ask for memory of so many bytes to be laid out in pages of 2 MiB, as NumPy asks for its own from 4 MiB on.

    Linux clears 4 KiB at a time otherwise, when they are first written, which takes longer than the kernel.
    """
    lace_in_large_pages(address(array, TO_READ), size)


cdef class Job:
    """n rows of k logits, and what is to be known of them: the arguments of lace_rows_f32 or _f64.

    With `inner` they are the columns of images, each of k planes of `inner` values: for lace_columns_f32 or _f64.
    Rows of logits start `apart` bytes apart; if there is room between them, they are brought together, a few at a time.
    `loss` None is memory of the job's own. The gradient is multiplied by above / divisor or, if `each` is not None, each
    row's by its factor there. `divisor` None is a mean's: the rows that count, by their classes' weights.
    `statistics` are those of lace.h in their order, as many as are asked for, None for one that is not.
    `keep` is whatever owns the memory: an interrupt may end the caller while another thread still runs the job.
    """

    cdef object keep

    cdef Bytes loss, own, gradient, logits, probability, scale, weight, cross_entropy, q, confidence
    cdef Integers target, rank
    cdef readonly size_t n, k
    cdef bint described
    cdef size_t step, size, inner
    cdef Py_ssize_t apart
    cdef int64_t ignore_index
    cdef double label_smoothing, strength, unit
    cdef readonly double divisor
    cdef float unit_f32

    def __init__(self, loss, gradient, logits, target, probability, weight, each, statistics,
                 size_t n, size_t k, size_t inner, Py_ssize_t apart, size_t size, int64_t ignore_index,
                 double label_smoothing, double strength, divisor, double above):
        self.keep = (loss, gradient, logits, target, probability, weight, each, statistics)
        self.loss = <Bytes> address(loss, TO_WRITE)
        if loss is None:
            self.loss = self.own = <Bytes> PyMem_RawMalloc(n * size)
            if self.own is NULL:
                raise MemoryError(f"no memory for {n} losses")
        self.gradient = <Bytes> address(gradient, TO_WRITE)
        self.logits = <Bytes> address(logits, PyBUF_STRIDES)
        self.target = <Integers> address(target, TO_READ)
        self.probability = <Bytes> address(probability, TO_READ)
        self.weight = <Bytes> address(weight, TO_READ)
        self.scale = <Bytes> address(each, TO_READ)
        self.described = statistics is not None
        if self.described:
            cross_entropy, q, rank, confidence = (*statistics, None, None, None, None)[:4]
            self.cross_entropy = <Bytes> address(cross_entropy, TO_WRITE)
            self.q = <Bytes> address(q, TO_WRITE)
            self.rank = <Integers> address(rank, TO_WRITE)
            self.confidence = <Bytes> address(confidence, TO_WRITE)
        self.n, self.k, self.inner, self.apart, self.size = n, k, inner, apart, size
        self.ignore_index, self.label_smoothing, self.strength = ignore_index, label_smoothing, strength
        self.divisor = 0 if divisor is None else divisor
        self.step = each is not None
        cdef bint mean = divisor is None
        cdef unsigned long long mode
        with nogil:
            mode = lace_default_arithmetic()
            self.settle(mean, above)
            lace_restore_arithmetic(mode)

    def __dealloc__(self):
        PyMem_RawFree(self.own)

    def losses(self, size_t start):
        """The address of row `start`'s loss."""
        return <size_t> (self.loss + start * self.size)

    cdef void settle(self, bint mean, double above) noexcept nogil:
        """The divisor of a mean, and the factor that serves all rows."""
        if mean:
            self.divisor = self.count()
        if not self.step:
            self.unit = above / self.divisor
            self.unit_f32 = <float> self.unit
            self.scale = <Bytes> &self.unit_f32 if self.size == 4 else <Bytes> &self.unit

    cdef double count(self) noexcept nogil:
        cdef double sum = 0
        cdef size_t i
        cdef int64_t t
        if self.probability is not NULL:
            return <double> self.n
        for i in range(self.n):
            t = lace_read_once(&self.target[i])
            if t == self.ignore_index or t < 0 or <size_t> t >= self.k:
                continue
            if self.weight is NULL:
                sum += 1
            else:
                sum += (<float *> self.weight)[t] if self.size == 4 else (<double *> self.weight)[t]
        return sum

    def run(self, size_t start, size_t stop):
        """Rows start to stop; the first whose target is no class, or -1.

        Raises ValueError where the kernel misses an address or cannot count so many values.
        """
        cdef unsigned long long mode
        cdef int64_t wrong
        with nogil:
            mode = lace_default_arithmetic()
            wrong = self.blocks(start, stop)
            lace_restore_arithmetic(mode)
        if wrong == NO_MEMORY:
            raise MemoryError(f"no memory for rows of {self.k} logits")
        if wrong < -1:
            raise ValueError("an array is missing" if wrong == -2 else "there is no class, or more values than memory has")
        return wrong

    cdef int64_t blocks(self, size_t start, size_t stop) noexcept nogil:
        cdef size_t end, i, image, row = self.k * self.size, together = max(1, min(32, TOGETHER // self.k))
        cdef int64_t wrong = -1
        cdef Bytes near = NULL
        if not self.inner and self.apart != <Py_ssize_t> row:
            near = <Bytes> PyMem_RawMalloc(together * row)
            if near is NULL:
                return NO_MEMORY
        while start < stop and wrong == -1:
            if near is not NULL:
                end = min(stop, start + together)
                for i in range(start, end):
                    memcpy(near + (i - start) * row, self.logits + <Py_ssize_t> i * self.apart, row)
                wrong = self.some(start, end - start, start * self.k, near)
            elif self.inner:
                end = min(stop, start - start % self.inner + self.inner)
                image = start // self.inner * self.inner * self.k + start % self.inner
                wrong = self.some(start, end - start, image, self.logits + image * self.size)
            else:
                end = stop
                wrong = self.some(start, end - start, start * self.k, self.logits + start * row)
            start = end
        PyMem_RawFree(near)
        return wrong

    cdef int64_t some(self, size_t start, size_t n, size_t skip_logits, Bytes logits) noexcept nogil:
        cdef size_t skip = start * self.size
        cdef Bytes gradient = NULL if self.gradient is NULL else self.gradient + skip_logits * self.size
        cdef Bytes loss = self.loss + skip
        cdef Bytes probability = NULL if self.probability is NULL else self.probability + skip_logits * self.size
        cdef Bytes scale = NULL if self.scale is NULL else self.scale + skip * self.step
        cdef Integers target = NULL if self.target is NULL else self.target + start
        cdef lace_options_f32 f32
        cdef lace_options_f64 f64
        cdef lace_statistics_f32 s32
        cdef lace_statistics_f64 s64
        cdef int64_t wrong
        if self.size == 4:
            f32.weight = <float *> self.weight
            f32.label_smoothing, f32.strength = self.label_smoothing, self.strength
            f32.ignore_index = self.ignore_index
            s32.cross_entropy = NULL if self.cross_entropy is NULL else <float *> (self.cross_entropy + skip)
            s32.probability = NULL if self.q is NULL else <float *> (self.q + skip)
            s32.rank = NULL if self.rank is NULL else self.rank + start
            s32.confidence = NULL if self.confidence is NULL else <float *> (self.confidence + skip)
            if self.inner:
                wrong = build.columns_f32(<float *> loss, <float *> gradient, <float *> logits, target,
                                          <float *> scale, self.step, n, self.k, self.inner, &f32)
            else:
                wrong = build.rows_f32(<float *> loss, <float *> gradient, <float *> logits, target,
                                       <float *> probability, <float *> scale, self.step, n, self.k, &f32,
                                       &s32 if self.described else NULL)
        else:
            f64.weight = <double *> self.weight
            f64.label_smoothing, f64.strength = self.label_smoothing, self.strength
            f64.ignore_index = self.ignore_index
            s64.cross_entropy = NULL if self.cross_entropy is NULL else <double *> (self.cross_entropy + skip)
            s64.probability = NULL if self.q is NULL else <double *> (self.q + skip)
            s64.rank = NULL if self.rank is NULL else self.rank + start
            s64.confidence = NULL if self.confidence is NULL else <double *> (self.confidence + skip)
            if self.inner:
                wrong = build.columns_f64(<double *> loss, <double *> gradient, <double *> logits, target,
                                          <double *> scale, self.step, n, self.k, self.inner, &f64)
            else:
                wrong = build.rows_f64(<double *> loss, <double *> gradient, <double *> logits, target,
                                       <double *> probability, <double *> scale, self.step, n, self.k, &f64,
                                       &s64 if self.described else NULL)
        return wrong if wrong < 0 else wrong + <int64_t> start

    def reduce(self, out):
        """Write the sum of the losses, divided, to one value at `out`."""
        cdef Bytes to = <Bytes> address(out, TO_WRITE)
        cdef unsigned long long mode
        with nogil:
            mode = lace_default_arithmetic()
            self.write_mean(to)
            lace_restore_arithmetic(mode)

    cdef void write_mean(self, Bytes to) noexcept nogil:
        cdef double sum[2]
        if self.size == 4:
            lace_sum_f32(sum, <float *> self.loss, self.n)
            (<float *> to)[0] = <float> ((sum[0] + sum[1]) / self.divisor)
        else:
            lace_sum_f64(sum, <double *> self.loss, self.n)
            (<double *> to)[0] = (sum[0] + sum[1]) / self.divisor
