"""JSD and the skew divergences, of a mixture of teacher and student: see divergences.py."""

import triton
import triton.language as tl

from .math import (
    LEAST_NORMAL,
    LOG2E,
    SERIES_RADIUS,
    bregman_difference,
    bregman_excess,
    exp,
    expm1,
    log1p,
    log2_minus,
    log_of_sum,
    phi_over_x,
    times_or_zero,
)


@triton.jit
def _bases_on_p(r, of_p, of_q):
    """Whether log m comes from log p, not from log q.

    From the larger part of m: the exponential never overflows, and with the smaller part's
    logarithm the other would be left by cancelling.
    """
    return r <= tl.log(of_p / of_q)


@triton.jit
def _mixture_over_base(r, of_p, of_q):
    on_p = _bases_on_p(r, of_p, of_q)
    of_base = tl.where(on_p, of_p, of_q)
    of_other = tl.where(on_p, of_q, of_p)
    apart = tl.where(on_p, r, -r)
    growth = of_other * expm1(apart)
    # Where most is gone, 1 + growth would have few digits of a small share.
    mixture = tl.where(growth < -0.5, of_base + of_other * exp(apart), 1.0 + growth)
    lost = tl.where(growth < -0.5, 0.0, growth - (mixture - 1.0))
    return log_of_sum(mixture, lost)


@triton.jit
def mixture_over_p(r, of_p, of_q):
    """log m - log p for the mixture m = of_p p + of_q q, whose shares are positive."""
    over_base = _mixture_over_base(r, of_p, of_q)
    return tl.where(_bases_on_p(r, of_p, of_q), over_base, over_base + r)


@triton.jit
def mixture_over_q(r, of_p, of_q):
    """log m - log q for the same mixture."""
    over_base = _mixture_over_base(r, of_p, of_q)
    return tl.where(_bases_on_p(r, of_p, of_q), over_base - r, over_base)


@triton.jit
def jsd_value(p, q, log_p, log_q, r, beta, rest):
    m = beta * p + rest * q
    of_p = bregman_excess(p, m, mixture_over_p(r, beta, rest))
    of_q = bregman_excess(q, m, mixture_over_q(r, beta, rest))
    return beta * of_p + rest * of_q


@triton.jit
def jsd_slope(p, q, log_p, log_q, r, beta, rest):
    return -rest * times_or_zero(q, mixture_over_q(r, beta, rest))


@triton.jit
def jsd_far_value(p, q, log_p, log_q, r, beta, rest):
    of_p = beta * p
    of_q = rest * q
    m = of_p + of_q
    return of_p * log2_minus(log_p, m) + of_q * log2_minus(log_q, m)


@triton.jit
def jsd_far_slope(p, q, log_p, log_q, r, beta, rest):
    of_q = rest * q
    return of_q * log2_minus(log_q, beta * p + of_q)


@triton.jit
def _skew_mixture(own, other, alpha, rest):
    """m of a skew divergence of ``own``, never 0: what divides by it is 0 where p and q are."""
    return alpha * own + (rest * other + LEAST_NORMAL)


@triton.jit
def skew_forward_kl_value(p, q, log_p, log_q, r, alpha, rest):
    return bregman_excess(p, _skew_mixture(p, q, alpha, rest), mixture_over_p(r, alpha, rest))


@triton.jit
def skew_forward_kl_slope(p, q, log_p, log_q, r, alpha, rest):
    ratio = bregman_difference(p, q, r) / _skew_mixture(p, q, alpha, rest)
    return rest * rest * q * ratio


# With m - p or m - q, whose sums are 0, rounding of log p and log q changes a skew divergence at
# second order only, and slopes where p and q are close keep their digits.
@triton.jit
def skew_forward_kl_far_value(p, q, log_p, log_q, r, alpha, rest):
    m = _skew_mixture(p, q, alpha, rest)
    return p * log2_minus(log_p, m) + LOG2E * (m - p)


@triton.jit
def skew_forward_kl_far_slope(p, q, log_p, log_q, r, alpha, rest):
    m = _skew_mixture(p, q, alpha, rest)
    return (LOG2E * rest) * ((m - p) * (q / m))


@triton.jit
def _skew_reverse_log(p, q, r, alpha, rest):
    """log q - log m, of what is close to 1 where the student's share is large."""
    m = _skew_mixture(q, p, alpha, rest)
    smaller = tl.where(r <= 0.0, q + LEAST_NORMAL, m)
    growth = log1p(rest * tl.abs(bregman_difference(p, q, r)) / smaller)
    return tl.where(r <= 0.0, -growth, growth)


@triton.jit
def skew_reverse_kl_value(p, q, log_p, log_q, r, alpha, rest):
    m = _skew_mixture(q, p, alpha, rest)
    return bregman_excess(q, m, -_skew_reverse_log(p, q, r, alpha, rest))


@triton.jit
def skew_reverse_kl_slope(p, q, log_p, log_q, r, alpha, rest):
    difference = bregman_difference(p, q, r) / _skew_mixture(q, p, alpha, rest)
    log = _skew_reverse_log(p, q, r, alpha, rest)
    # Where the student's share is large, the parts of the second nearly cancel.
    close = rest * rest * difference - phi_over_x(log) * log
    slope = tl.where(tl.abs(log) < SERIES_RADIUS, close, log - alpha * rest * difference)
    return times_or_zero(q, slope)


@triton.jit
def skew_reverse_kl_far_value(p, q, log_p, log_q, r, alpha, rest):
    m = rest * p + alpha * q
    return q * log2_minus(log_q, m) + LOG2E * (m - q)


@triton.jit
def skew_reverse_kl_far_slope(p, q, log_p, log_q, r, alpha, rest):
    m = rest * p + alpha * q
    over_m = log2_minus(log_q, m)
    return q * over_m + (LOG2E * alpha) * ((m - q) * tl.exp2(over_m))
