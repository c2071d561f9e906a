# cython: language_level=3, freethreading_compatible=True, cdivision=True
"""The door to lace.h: addresses in, C calls without the GIL. `lace_loss.ext` checks, this module trusts.

An address is an integer or what has one: an object with a buffer, or a tensor. The values there are of the right type,
enough and, but for rows of logits, C-contiguous.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS, PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
)
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stddef cimport ptrdiff_t, size_t
from libc.stdint cimport int64_t, uint8_t

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

    ctypedef struct lace_args_f32:
        float *loss
        float *gradient
        const float *logits
        const int64_t *target
        const float *soft_target
        const float *scale
        size_t scale_step, n, k
        ptrdiff_t logits_stride
        size_t gradient_stride
        const lace_options_f32 *options
        float *cross_entropy
        float *probability
        int64_t *rank
        float *confidence
        size_t soft_target_stride

    ctypedef struct lace_args_f64:
        double *loss
        double *gradient
        const double *logits
        const int64_t *target
        const double *soft_target
        const double *scale
        size_t scale_step, n, k
        ptrdiff_t logits_stride
        size_t gradient_stride
        const lace_options_f64 *options
        double *cross_entropy
        double *probability
        int64_t *rank
        double *confidence
        size_t soft_target_stride

    ctypedef struct lace_binary_args_f32:
        float *loss
        float *gradient
        const float *logits
        const float *target
        const uint8_t *label
        const float *weight
        const float *pos_weight
        const float *scale
        size_t scale_step, n, k, first
        float strength

    ctypedef struct lace_binary_args_f64:
        double *loss
        double *gradient
        const double *logits
        const double *target
        const uint8_t *label
        const double *weight
        const double *pos_weight
        const double *scale
        size_t scale_step, n, k, first
        double strength

    ctypedef struct lace_posterior_f32:
        float *posterior
        const float *logits
        size_t n, k
        ptrdiff_t logits_stride
        size_t posterior_stride
        const lace_options_f32 *options

    ctypedef struct lace_posterior_f64:
        double *posterior
        const double *logits
        size_t n, k
        ptrdiff_t logits_stride
        size_t posterior_stride
        const lace_options_f64 *options

    enum:
        LACE_NULL
        LACE_OPTION

    void lace_sum_f32(double *sum, const float *values, size_t n)
    void lace_sum_f64(double *sum, const double *values, size_t n)


cdef extern from "lace_builds.h" nogil:
    ctypedef struct lace_build:
        const char *name
        int64_t (*rows_f32)(const lace_args_f32 *) noexcept nogil
        int64_t (*columns_f32)(const lace_args_f32 *) noexcept nogil
        int64_t (*rows_f64)(const lace_args_f64 *) noexcept nogil
        int64_t (*columns_f64)(const lace_args_f64 *) noexcept nogil
        int64_t (*binary_f32)(const lace_binary_args_f32 *) noexcept nogil
        int64_t (*binary_f64)(const lace_binary_args_f64 *) noexcept nogil
        int64_t (*posterior_rows_f32)(const lace_posterior_f32 *) noexcept nogil
        int64_t (*posterior_columns_f32)(const lace_posterior_f32 *) noexcept nogil
        int64_t (*posterior_rows_f64)(const lace_posterior_f64 *) noexcept nogil
        int64_t (*posterior_columns_f64)(const lace_posterior_f64 *) noexcept nogil

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
    TO_READ = PyBUF_C_CONTIGUOUS
    TO_WRITE = PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE


ctypedef char *Bytes
ctypedef int64_t *Integers
ctypedef fused Args:
    lace_args_f32
    lace_args_f64

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


cdef void advance(Args *args, size_t rows, ptrdiff_t logits, size_t gradient) noexcept nogil:
    """Go on to a later row, whose logits and gradient are so many values further."""
    args.loss += rows
    args.logits += logits
    args.scale += rows * args.scale_step
    if args.gradient is not NULL:
        args.gradient += gradient
    if args.target is not NULL:
        args.target += rows
    if args.soft_target is not NULL:
        args.soft_target += rows * args.k
    if args.cross_entropy is not NULL:
        args.cross_entropy += rows
    if args.probability is not NULL:
        args.probability += rows
    if args.rank is not NULL:
        args.rank += rows
    if args.confidence is not NULL:
        args.confidence += rows


cdef size_t block_end(size_t start, size_t stop, size_t plane_size) noexcept nogil:
    """All rows at once, or of images the columns of each."""
    return min(stop, start - start % plane_size + plane_size) if plane_size else stop


cdef size_t column(size_t start, size_t plane_size, size_t k) noexcept nogil:
    """Where column `start` of images begins: the image, and the place in its planes."""
    return start // plane_size * plane_size * k + start % plane_size


cdef object refusal(int64_t status):
    return ValueError(
        "an array is missing" if status == LACE_NULL
        else "there is no class, rows overlap, or there are more values than memory has"
    )


cdef class KernelCall:
    """n rows of k logits, and what is to be known of them: the arguments of lace_rows_f32 or _f64.

    With `plane_size` they are the columns of images, each of k planes of so many values: for lace_columns_f32 or _f64.
    Rows of logits start `row_stride` bytes apart: a multiple of `size`, of whatever sign, with room for a row. Where n is
    1 it is not looked at. The rows of everything else lie side by side. `loss` None is memory of the call's own. The
    gradient is multiplied by grad_output / divisor or, if `row_grad_outputs` is not None, each row's by its factor there.
    `divisor` None is a mean's: the rows that count, by their classes' weights. `statistics` are those of lace.h in their
    order, as many as are asked for, None for one that is not.
    """

    cdef object owners  # of the memory: an interrupt may end the caller while another thread still runs the call
    cdef lace_args_f32 f32  # the arguments, where `size` is 4
    cdef lace_args_f64 f64  # the arguments, where it is 8
    cdef lace_options_f32 options_f32
    cdef lace_options_f64 options_f64
    cdef Bytes loss, owned_losses, weight
    cdef Integers target
    cdef readonly size_t n, k
    cdef size_t size, plane_size
    cdef ptrdiff_t row_stride  # in values
    cdef double factor  # of the gradient, where one serves all rows
    cdef float factor_f32
    cdef readonly double divisor

    def __init__(self, loss, gradient, logits, target, probability, weight, row_grad_outputs, statistics,
                 size_t n, size_t k, size_t plane_size, Py_ssize_t row_stride, size_t size, int64_t ignore_index,
                 double label_smoothing, double strength, divisor, double grad_output):
        cdef void *written[4]
        cdef void *g = address(gradient, TO_WRITE)
        cdef void *z = address(logits, PyBUF_STRIDES)
        cdef void *y = address(probability, TO_READ)
        cdef void *scale = address(row_grad_outputs, TO_READ)
        cdef size_t step = row_grad_outputs is not None
        cdef ptrdiff_t stride = plane_size
        cdef bint mean = divisor is None
        cdef unsigned long long mode
        cdef int i
        self.owners = (loss, gradient, logits, target, probability, weight, row_grad_outputs, statistics)
        self.loss = <Bytes> address(loss, TO_WRITE)
        if loss is None:
            self.loss = self.owned_losses = <Bytes> PyMem_RawMalloc(n * size)
            if self.owned_losses is NULL:
                raise MemoryError(f"no memory for {n} losses")
        self.target, self.weight = <Integers> address(target, TO_READ), <Bytes> address(weight, TO_READ)
        for i in range(4):
            written[i] = NULL
        if statistics is not None:
            for i, array in enumerate(statistics):
                written[i] = address(array, TO_WRITE)
        if not plane_size and n > 1:
            self.row_stride = stride = row_stride // <ptrdiff_t> size
        self.n, self.k, self.plane_size, self.size = n, k, plane_size, size
        if size == 4:
            self.f32 = lace_args_f32(<float *> self.loss, <float *> g, <float *> z, self.target, <float *> y,
                                     <float *> scale, step, n, k, stride, plane_size, &self.options_f32,
                                     <float *> written[0], <float *> written[1], <Integers> written[2],
                                     <float *> written[3], plane_size)
        else:
            self.f64 = lace_args_f64(<double *> self.loss, <double *> g, <double *> z, self.target, <double *> y,
                                     <double *> scale, step, n, k, stride, plane_size, &self.options_f64,
                                     <double *> written[0], <double *> written[1], <Integers> written[2],
                                     <double *> written[3], plane_size)
        if not mean:
            self.divisor = divisor
        with nogil:
            mode = lace_default_arithmetic()
            self.options_f32 = lace_options_f32(<float *> self.weight, label_smoothing, strength, ignore_index)
            self.options_f64 = lace_options_f64(<double *> self.weight, label_smoothing, strength, ignore_index)
            if mean:
                self.divisor = self.count(y is NULL, ignore_index)
            if not step:
                self.factor = grad_output / self.divisor
                self.factor_f32 = <float> self.factor
                self.f32.scale, self.f64.scale = &self.factor_f32, &self.factor
            lace_restore_arithmetic(mode)

    def __dealloc__(self):
        PyMem_RawFree(self.owned_losses)

    def losses(self, size_t start):
        """The address of row `start`'s loss."""
        return <size_t> (self.loss + start * self.size)

    cdef double count(self, bint classes, int64_t ignore_index) noexcept nogil:
        """The divisor of a mean."""
        cdef double sum = 0
        cdef size_t i
        cdef int64_t t
        if not classes:
            return <double> self.n
        for i in range(self.n):
            t = lace_read_once(&self.target[i])
            if t == ignore_index or t < 0 or <size_t> t >= self.k:
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
        cdef int64_t status
        with nogil:
            mode = lace_default_arithmetic()
            status = self.run_blocks(start, stop)
            lace_restore_arithmetic(mode)
        if status < 0:
            raise refusal(status)
        return status - 1

    cdef int64_t run_blocks(self, size_t start, size_t stop) noexcept nogil:
        """What lace.h says."""
        cdef size_t end
        cdef int64_t status = 0
        while start < stop and status == 0:
            end = block_end(start, stop, self.plane_size)
            status = self.run_block(start, end - start)
            start = end
        return status

    cdef int64_t run_block(self, size_t start, size_t n) noexcept nogil:
        cdef lace_args_f32 f32
        cdef lace_args_f64 f64
        cdef ptrdiff_t logits = <ptrdiff_t> start * self.row_stride
        cdef size_t gradient = start * self.k
        cdef int64_t status
        if self.plane_size:
            logits = gradient = column(start, self.plane_size, self.k)
        if self.size == 4:
            f32 = self.f32
            f32.n = n
            advance(&f32, start, logits, gradient)
            status = build.columns_f32(&f32) if self.plane_size else build.rows_f32(&f32)
        else:
            f64 = self.f64
            f64.n = n
            advance(&f64, start, logits, gradient)
            status = build.columns_f64(&f64) if self.plane_size else build.rows_f64(&f64)
        return status + <int64_t> start if status > 0 else status

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


ctypedef fused BinaryArgs:
    lace_binary_args_f32
    lace_binary_args_f64


cdef void place(BinaryArgs *args, size_t block, size_t count) noexcept nogil:
    """Go on to a block."""
    cdef size_t i = block * LABELS
    args.n = min(count - i, <size_t> LABELS)
    args.logits += i
    args.scale += i * args.scale_step
    if args.gradient is not NULL:
        args.gradient += i
    if args.target is not NULL:
        args.target += i
    if args.label is not NULL:
        args.label += i
    if args.k:
        args.first = i % args.k


cdef enum:
    LABELS = 4096  # of a block: those losses of float64 that are summed while they are near take 32 KiB


cdef class BinaryCall:
    """Labels in blocks, and what is to be known of them: the arguments of lace_binary_f32 or _f64.

    They are `n` blocks of `k` labels, the last one shorter, where `count` is the number of all labels. Row by row of
    `row` labels they share the values of `weight` and `pos_weight`. `target` None leaves it to `label`, bytes. `loss`
    None: only their sum is kept, block by block, so that it does not depend on who computes which. The gradient is
    multiplied by grad_output / divisor or, if `grad_outputs` is not None, each label's by its factor there.
    """

    cdef object owners  # of the memory: an interrupt may end the caller while another thread still runs the call
    cdef lace_binary_args_f32 f32
    cdef lace_binary_args_f64 f64
    cdef double *sums  # two of each block
    cdef readonly size_t n, k
    cdef size_t count, size
    cdef double factor, divisor
    cdef float factor_f32

    def __init__(self, loss, gradient, logits, target, label, weight, pos_weight, grad_outputs,
                 size_t count, size_t row, size_t size, double strength, double divisor, double grad_output):
        cdef void *f = address(loss, TO_WRITE)
        cdef void *g = address(gradient, TO_WRITE)
        cdef void *z = address(logits, TO_READ)
        cdef void *y = address(target, TO_READ)
        cdef void *w = address(weight, TO_READ)
        cdef void *p = address(pos_weight, TO_READ)
        cdef void *scale = address(grad_outputs, TO_READ)
        cdef const uint8_t *label_at = <const uint8_t *> address(label, TO_READ)
        cdef size_t step = grad_outputs is not None
        cdef unsigned long long mode
        self.owners = (loss, gradient, logits, target, label, weight, pos_weight, grad_outputs)
        self.count, self.size, self.k = count, size, LABELS
        self.n = (count + LABELS - 1) // LABELS
        if loss is None:
            self.sums = <double *> PyMem_RawMalloc((2 * self.n + 1) * sizeof(double))
            if self.sums is NULL:
                raise MemoryError(f"no memory for {2 * self.n} sums")
        with nogil:
            mode = lace_default_arithmetic()
            self.divisor, self.factor = divisor, grad_output / divisor
            self.factor_f32 = <float> self.factor
            if size == 4:
                self.f32 = lace_binary_args_f32(<float *> f, <float *> g, <float *> z, <float *> y, label_at, <float *> w,
                                                <float *> p, <float *> scale, step, 0, row, 0, <float> strength)
            else:
                self.f64 = lace_binary_args_f64(<double *> f, <double *> g, <double *> z, <double *> y, label_at,
                                                <double *> w, <double *> p, <double *> scale, step, 0, row, 0, strength)
            if not step:
                self.f32.scale, self.f64.scale = &self.factor_f32, &self.factor
            lace_restore_arithmetic(mode)

    def __dealloc__(self):
        PyMem_RawFree(self.sums)

    def run(self, size_t start, size_t stop):
        """Blocks start to stop; -1, as no label is wrong."""
        cdef unsigned long long mode
        cdef int64_t status = 0
        cdef size_t block
        with nogil:
            mode = lace_default_arithmetic()
            for block in range(start, stop):
                status = self.run_f32(block) if self.size == 4 else self.run_f64(block)
                if status != 0:
                    break
            lace_restore_arithmetic(mode)
        if status:
            raise ValueError("an array is missing" if status == LACE_NULL else "a row has no labels, or there are too many")
        return -1

    cdef int64_t run_f32(self, size_t block) noexcept nogil:
        cdef float losses[LABELS]
        cdef lace_binary_args_f32 args = self.f32
        place(&args, block, self.count)
        if args.loss is NULL:
            args.loss = &losses[0]
        else:
            args.loss += block * LABELS
        cdef int64_t status = build.binary_f32(&args)
        if self.sums is not NULL and status == 0:
            lace_sum_f32(&self.sums[2 * block], losses, args.n)
        return status

    cdef int64_t run_f64(self, size_t block) noexcept nogil:
        cdef double losses[LABELS]
        cdef lace_binary_args_f64 args = self.f64
        place(&args, block, self.count)
        if args.loss is NULL:
            args.loss = &losses[0]
        else:
            args.loss += block * LABELS
        cdef int64_t status = build.binary_f64(&args)
        if self.sums is not NULL and status == 0:
            lace_sum_f64(&self.sums[2 * block], losses, args.n)
        return status

    def reduce(self, out):
        """Write the sum of the losses, divided, to one value at `out`."""
        cdef void *to = address(out, TO_WRITE)
        cdef unsigned long long mode
        cdef double sum[2]
        with nogil:
            mode = lace_default_arithmetic()
            lace_sum_f64(sum, self.sums, 2 * self.n)
            sum[0] = (sum[0] + sum[1]) / self.divisor
            if self.size == 4:
                (<float *> to)[0] = <float> sum[0]
            else:
                (<double *> to)[0] = sum[0]
            lace_restore_arithmetic(mode)


cdef class PosteriorCall:
    """n rows of k logits, or with `plane_size` the columns of images as in KernelCall, and where their class probabilities
    go: the arguments of lace_posterior_rows_f32 or _f64, or of the columns. The results lie side by side.
    """

    cdef object owners  # of the memory: an interrupt may end the caller while another thread still runs the call
    cdef lace_options_f32 options_f32
    cdef lace_options_f64 options_f64
    cdef Bytes posterior, logits
    cdef readonly size_t n, k
    cdef size_t size, plane_size
    cdef ptrdiff_t row_stride  # in values

    def __init__(self, posterior, logits, weight, size_t n, size_t k, size_t plane_size, Py_ssize_t row_stride, size_t size,
                 double label_smoothing, double strength):
        cdef void *w = address(weight, TO_READ)
        cdef unsigned long long mode
        self.owners = (posterior, logits, weight)
        self.posterior = <Bytes> address(posterior, TO_WRITE)
        self.logits = <Bytes> address(logits, PyBUF_STRIDES)
        self.n, self.k, self.plane_size, self.size = n, k, plane_size, size
        self.row_stride = row_stride // <ptrdiff_t> size
        with nogil:
            mode = lace_default_arithmetic()
            self.options_f32 = lace_options_f32(<float *> w, label_smoothing, strength, 0)
            self.options_f64 = lace_options_f64(<double *> w, label_smoothing, strength, 0)
            lace_restore_arithmetic(mode)

    def run(self, size_t start, size_t stop):
        """Rows start to stop; -1, as no row is wrong.

        Raises ValueError for weights that are too far apart, and where the kernel misses an address.
        """
        cdef unsigned long long mode
        cdef size_t end
        cdef int64_t status = 0
        with nogil:
            mode = lace_default_arithmetic()
            while start < stop and status == 0:
                end = block_end(start, stop, self.plane_size)
                status = self.run_block(start, end - start)
                start = end
            lace_restore_arithmetic(mode)
        if status == LACE_OPTION:
            apart = "2^60" if self.size == 4 else "2^800"
            raise ValueError(f"weights must be no more than a factor of {apart} apart for a posterior, "
                             "and in the logits' type positive and finite")
        if status:
            raise refusal(status)
        return -1

    cdef int64_t run_block(self, size_t start, size_t n) noexcept nogil:
        cdef lace_posterior_f32 f32
        cdef lace_posterior_f64 f64
        cdef ptrdiff_t z = <ptrdiff_t> start * self.row_stride
        cdef size_t p = start * self.k
        cdef ptrdiff_t stride = self.row_stride
        if self.plane_size:
            z = p = column(start, self.plane_size, self.k)
            stride = self.plane_size
        if self.size == 4:
            f32 = lace_posterior_f32(<float *> self.posterior + p, <float *> self.logits + z, n, self.k, stride,
                                     self.plane_size, &self.options_f32)
            return build.posterior_columns_f32(&f32) if self.plane_size else build.posterior_rows_f32(&f32)
        f64 = lace_posterior_f64(<double *> self.posterior + p, <double *> self.logits + z, n, self.k, stride,
                                 self.plane_size, &self.options_f64)
        return build.posterior_columns_f64(&f64) if self.plane_size else build.posterior_rows_f64(&f64)
