"""The worked example of docs/triton.md: squared Hellinger, a divergence that is not built in."""

import triton
import triton.language as tl

from kdkernels.triton.math import expm1

# With the larger of p and q factored out, sqrt(p) - sqrt(q) is its root times 1 - exp(-|r| / 2).


@triton.jit
def value(p, q, log_p, log_q, r):
    gap = expm1(-0.5 * tl.abs(r))
    return 0.5 * tl.maximum(p, q) * gap * gap


@triton.jit
def slope(p, q, log_p, log_q, r):
    gap = expm1(-0.5 * tl.abs(r))
    return 0.5 * tl.where(r > 0.0, -q * gap, p * gap * (1.0 + gap))


def reference(log_p, log_q):
    return ((log_p / 2).exp() - (log_q / 2).exp()).square() / 2
