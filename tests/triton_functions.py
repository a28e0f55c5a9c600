"""Kernels that apply element functions of the Triton backend."""

import triton
import triton.language as tl

from kdkernels.triton.math import inverse64, log1p, log64


@triton.jit
def log_and_inverse(x, logs, inverses, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    numbers = tl.load(x + at)
    tl.store(logs + at, log64(numbers))
    tl.store(inverses + at, inverse64(numbers))


@triton.jit
def log1p_of(x, logs, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(logs + at, log1p(tl.load(x + at)))


@triton.jit
def minus_overlap(p, q, log_p, log_q, r):
    return -tl.sqrt(p * q)


@triton.jit
def minus_overlap_slope(p, q, log_p, log_q, r):
    return -0.5 * tl.sqrt(p * q)
