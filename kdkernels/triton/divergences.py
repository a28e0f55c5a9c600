"""Value and slope of every built-in divergence for the Triton kernels.

Each function takes a block of vocabulary entries, ``(p, q, log_p, log_q, r)`` in float32 with
r = log q - log p exact where p and q are close, and the divergence's two parameters where it has
any. slope = d value / d log q up to a multiple of q. The formulas are those of
csrc/core/divergences.h, which says where they come from.

Those of a far row are the textbook's, and their logarithms (not r) and terms in bits. A divergence
that is a KL divergence, or a mean of two, has none: the sums of the first sweep are its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl

from ..constants import FAR_FROM, LEAST_SHARE
from . import mixtures
from .math import (
    LARGEST_FLOAT,
    LOG2E,
    LOWEST,
    bregman_difference,
    bregman_excess,
    exp,
    expm1,
    phi,
    times_or_zero,
)


@triton.jit
def forward_kl_value(p, q, log_p, log_q, r):
    return bregman_excess(p, q, r)


@triton.jit
def forward_kl_slope(p, q, log_p, log_q, r):
    return bregman_difference(p, q, r)


@triton.jit
def reverse_kl_value(p, q, log_p, log_q, r):
    return bregman_excess(q, p, -r)


@triton.jit
def reverse_kl_slope(p, q, log_p, log_q, r):
    return times_or_zero(q, r)


@triton.jit
def symmetric_kl_value(p, q, log_p, log_q, r, weight, rest):
    return weight * bregman_excess(p, q, r) + rest * bregman_excess(q, p, -r)


@triton.jit
def symmetric_kl_slope(p, q, log_p, log_q, r, weight, rest):
    return weight * bregman_difference(p, q, r) + rest * times_or_zero(q, r)


@triton.jit
def tvd_value(p, q, log_p, log_q, r):
    return 0.5 * tl.abs(bregman_difference(p, q, r))


@triton.jit
def tvd_slope(p, q, log_p, log_q, r):
    difference = bregman_difference(p, q, r)
    return tl.where(difference > 0.0, 0.5 * q, tl.where(difference < 0.0, -0.5 * q, 0.0))


@triton.jit
def tvd_far_value(p, q, log_p, log_q, r):
    return (0.5 * LOG2E) * tl.abs(q - p)


@triton.jit
def tvd_far_slope(p, q, log_p, log_q, r):
    half = (0.5 * LOG2E) * q
    return tl.where(r > 0.0, half, tl.where(r < 0.0, -half, 0.0))


@triton.jit
def _larger_to(power, log_p, log_q, r):
    """The larger of p and q to a power: of positive powers, the one that never overflows."""
    larger = tl.where(r >= 0.0, log_q, log_p)
    return tl.where(larger < -LARGEST_FLOAT, 0.0, exp(power * larger))


@triton.jit
def alpha_beta_value(p, q, log_p, log_q, r, a, b):
    # q^(a+b) K(a, b, d) with d = log p - log q, or p^(a+b) K(b, a, -d), from the larger of the two:
    # K = phi((a+b) d) / (b (a+b)) - phi(a d) / (a b) and its limits.
    d = -tl.abs(r)
    first = tl.where(r >= 0.0, a, b)
    second = tl.where(r >= 0.0, b, a)
    x = first * d
    y = (a + b) * d
    # Where one of the parameters is 0 the other one decides the shape.
    one = x * exp(x) - (exp(x) - 1.0)
    product = tl.where(tl.abs(x) < 0.5, x * expm1(x) - phi(x), tl.where(x > -30.0, one, 1.0))
    far = d < -1.0
    two = tl.where(far, expm1(y), phi(y)) / (second * (a + b)) - tl.where(far, expm1(x), phi(x)) / (
        first * second
    )
    k = tl.where(
        first == 0.0,
        tl.where(second == 0.0, 0.5 * d * d, phi(y) / (second * second)),
        tl.where(
            second == 0.0,
            product / (first * first),
            tl.where(a + b == 0.0, phi(x) / (first * first), two),
        ),
    )
    return times_or_zero(_larger_to(a + b, log_p, log_q, r), k)


@triton.jit
def alpha_beta_slope(p, q, log_p, log_q, r, a, b):
    # -q^(a+b) (exp(a d) - 1) / a, or p^(a+b) (exp(-(a+b) d) - exp(-b d)) / a from the larger p.
    d = -tl.abs(r)
    from_q = tl.where(a == 0.0, -d, -expm1(a * d) / a)
    finite = tl.maximum(d, LOWEST)  # times an exponent of 0
    x = a * finite
    power = exp(b * finite)
    difference = tl.where(tl.abs(x) < 0.5, power * expm1(x), exp((a + b) * finite) - power)
    from_p = tl.where(a == 0.0, times_or_zero(power, finite), difference / a)
    k = tl.where(r >= 0.0, from_q, from_p)
    return times_or_zero(_larger_to(a + b, log_p, log_q, r), k)


@triton.jit
def alpha_beta_far_value(p, q, log_p, log_q, r, a, b):
    both = tl.exp2(a * log_p + b * log_q)
    # Not by a + b, which rounds apart from the exponents of `both`.
    of_p = tl.exp2(a * log_p + b * log_p)
    of_q = tl.exp2(a * log_q + b * log_q)
    total = a + b
    return (LOG2E / (b * total)) * (of_p - both) + (LOG2E / (a * total)) * (of_q - both)


@triton.jit
def alpha_beta_far_slope(p, q, log_p, log_q, r, a, b):
    return (LOG2E / a) * (tl.exp2(a * log_q + b * log_q) - tl.exp2(a * log_p + b * log_q))


@triton.jit
def soft_cross_entropy_value(p, q, log_p, log_q, r):
    return -times_or_zero(p, log_q)


def _always_far(a: float, b: float) -> float:
    return FAR_FROM


def _mixture_far_from(share: float, rest: float) -> float:
    return FAR_FROM if min(share, rest) >= LEAST_SHARE else math.inf


def _alpha_beta_far_from(a: float, b: float) -> float:
    """Where nothing can overflow; coefficients multiply the errors of powers."""
    if min(a, b) < LEAST_SHARE or a + b > 8:
        return math.inf
    return 4 * FAR_FROM * max(1.0, 1 / (min(a, b) * (a + b)))


class Functions(NamedTuple):
    """A divergence as the kernels take it."""

    value: triton.JITFunction
    slope: triton.JITFunction
    parameters: bool = False  # whether the functions take two parameters at the end
    slope_sums_to_zero: bool = False  # one sweep less
    feels_shift: bool = False  # a rounding error common to all log q has to be taken back
    slopes_cancel: bool = False  # of either sign and without bound: their sum tells nothing of size
    lean: bool = False  # takes so few registers that a thread can hold schedule.MANY entries
    # For far rows, of log2 p and log2 q; None for a KL divergence, whose value one sweep adds up.
    far_value: triton.JITFunction | None = None
    far_slope: triton.JITFunction | None = None
    far_from: Callable[[float, float], float] = _always_far  # in nats, of the parameters
    # KL(p || q) of a row with that divergence, about; None: the same number.
    kl_from: Callable[[float, float], float] | None = None


def _of_mixture(*functions: triton.JITFunction, kl_from) -> Functions:
    value, slope, far_value, far_slope = functions
    return Functions(
        value,
        slope,
        parameters=True,
        far_value=far_value,
        far_slope=far_slope,
        far_from=_mixture_far_from,
        kl_from=kl_from,
    )


FUNCTIONS: dict[str, Functions] = {
    "forward_kl": Functions(forward_kl_value, forward_kl_slope, slope_sums_to_zero=True, lean=True),
    "reverse_kl": Functions(reverse_kl_value, reverse_kl_slope, lean=True),
    "jsd": _of_mixture(
        mixtures.jsd_value,
        mixtures.jsd_slope,
        mixtures.jsd_far_value,
        mixtures.jsd_far_slope,
        kl_from=lambda beta, rest: FAR_FROM / (beta * rest),
    ),
    "skew_forward_kl": _of_mixture(
        mixtures.skew_forward_kl_value,
        mixtures.skew_forward_kl_slope,
        mixtures.skew_forward_kl_far_value,
        mixtures.skew_forward_kl_far_slope,
        kl_from=lambda alpha, rest: FAR_FROM / rest**2,
    ),
    "skew_reverse_kl": _of_mixture(
        mixtures.skew_reverse_kl_value,
        mixtures.skew_reverse_kl_slope,
        mixtures.skew_reverse_kl_far_value,
        mixtures.skew_reverse_kl_far_slope,
        kl_from=lambda alpha, rest: FAR_FROM / rest**2,
    ),
    "symmetric_kl": Functions(symmetric_kl_value, symmetric_kl_slope, parameters=True, lean=True),
    "tvd": Functions(
        tvd_value,
        tvd_slope,
        lean=True,
        far_value=tvd_far_value,
        far_slope=tvd_far_slope,
        kl_from=lambda a, b: 2 * FAR_FROM**2,  # at least: Pinsker's inequality
    ),
    "alpha_beta": Functions(
        alpha_beta_value,
        alpha_beta_slope,
        parameters=True,
        feels_shift=True,
        slopes_cancel=True,
        far_value=alpha_beta_far_value,
        far_slope=alpha_beta_far_slope,
        far_from=_alpha_beta_far_from,
    ),
    "soft_cross_entropy": Functions(
        soft_cross_entropy_value, forward_kl_slope, slope_sums_to_zero=True, lean=True
    ),
}
