# cython: language_level=3, freethreading_compatible=True
"""The door to lace.h: addresses in, one C call without the GIL. `lace_loss.ext` checks, this module trusts."""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport int64_t


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

    ctypedef struct lace_statistics_f64:
        double *cross_entropy
        double *probability
        int64_t *rank

    int64_t lace_rows_f32(float *loss, float *gradient, const float *logits, const int64_t *target,
                          const float *probability, const float *scale, size_t n, size_t k,
                          const lace_options_f32 *options, const lace_statistics_f32 *statistics)
    int64_t lace_rows_f64(double *loss, double *gradient, const double *logits, const int64_t *target,
                          const double *probability, const double *scale, size_t n, size_t k,
                          const lace_options_f64 *options, const lace_statistics_f64 *statistics)


cdef void *address(object array, int flags) except? NULL:
    """Of the data of a C-contiguous buffer, or NULL for None. The caller's reference keeps it alive."""
    cdef Py_buffer view
    if array is None:
        return NULL
    PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | flags)
    PyBuffer_Release(&view)
    return view.buf


def rows(loss, logits, gradient, target, probability, scale, weight, int64_t ignore_index, double label_smoothing,
         double strength, statistics):
    """lace_rows_f32 or _f64, by the item size of `logits` (N, C); all arrays of one dtype, `target` int64.

    `statistics` is None or (cross entropy, probability, rank), the last int64.
    """
    cdef void *out_loss = address(loss, PyBUF_WRITABLE)
    cdef void *out_gradient = address(gradient, PyBUF_WRITABLE)
    cdef void *z = address(logits, 0)
    cdef int64_t *t = <int64_t *> address(target, 0)
    cdef void *y = address(probability, 0)
    cdef void *g = address(scale, 0)
    cdef size_t n = logits.shape[0], k = logits.shape[1]
    cdef bint single = logits.itemsize == 4
    cdef lace_options_f32 f32
    cdef lace_options_f64 f64
    cdef lace_statistics_f32 s32
    cdef lace_statistics_f64 s64
    cdef bint described = statistics is not None
    cdef int64_t wrong
    f32.weight = <float *> address(weight, 0)
    f32.label_smoothing = label_smoothing
    f32.strength = strength
    f32.ignore_index = ignore_index
    f64.weight = <double *> f32.weight
    f64.label_smoothing = label_smoothing
    f64.strength = strength
    f64.ignore_index = ignore_index
    if described:
        s32.cross_entropy = <float *> address(statistics[0], PyBUF_WRITABLE)
        s32.probability = <float *> address(statistics[1], PyBUF_WRITABLE)
        s32.rank = <int64_t *> address(statistics[2], PyBUF_WRITABLE)
        s64.cross_entropy = <double *> s32.cross_entropy
        s64.probability = <double *> s32.probability
        s64.rank = s32.rank
    with nogil:
        if single:
            wrong = lace_rows_f32(<float *> out_loss, <float *> out_gradient, <float *> z, t, <float *> y, <float *> g,
                                  n, k, &f32, &s32 if described else NULL)
        else:
            wrong = lace_rows_f64(<double *> out_loss, <double *> out_gradient, <double *> z, t, <double *> y,
                                  <double *> g, n, k, &f64, &s64 if described else NULL)
    return wrong
