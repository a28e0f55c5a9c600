"""Element maths of the Triton kernels, in float32; csrc/core/math.h explains the choices."""

import triton
import triton.language as tl

from ..constants import LOWEST_LOGIT

LOWEST = tl.constexpr(LOWEST_LOGIT)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
#: Below this |x| a series replaces exp(x) - 1 - x, which cancels there.
SERIES_RADIUS = tl.constexpr(0.5)
NATS_PER_BIT = tl.constexpr(0.6931471805599453)
#: Floats about this are spaced by 1/64.
GRID = tl.constexpr(1.5 * 2.0**17)
#: The smallest positive float of full precision.
LEAST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def times_or_zero(x, y):
    """x y, and 0 where x is 0, whatever y is."""
    return tl.where(x == 0.0, 0.0, x * y)


@triton.jit
def phi_over_x(x):
    """(exp(x) - 1 - x) / x for |x| < SERIES_RADIUS (minimax polynomial)."""
    polynomial = 1.98756199e-4 * x + 1.3981997e-3
    polynomial = polynomial * x + 8.33345205e-3
    polynomial = polynomial * x + 4.16657962e-2
    polynomial = polynomial * x + 1.66666657e-1
    polynomial = polynomial * x + 0.5
    return polynomial * x


@triton.jit
def exp(x):
    """exp(x), which every platform has as a power of 2."""
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """exp(x) - 1 to full relative accuracy."""
    return tl.where(tl.abs(x) < SERIES_RADIUS, phi_over_x(x) * x + x, exp(x) - 1.0)


@triton.jit
def phi(x):
    """exp(x) - 1 - x to full relative accuracy."""
    return tl.where(tl.abs(x) < SERIES_RADIUS, phi_over_x(x) * x, (exp(x) - 1.0) - x)


@triton.jit
def _octave(x):
    """n and the mantissa in [sqrt(1/2), sqrt(2)) of x = mantissa 2^n."""
    n = (x.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
    return n, (x.to(tl.int32, bitcast=True) - (n << 23)).to(tl.float32, bitcast=True)


@triton.jit
def log_of_sum(w, lost):
    """log(w + lost) for positive finite w, `lost` being below its last place; tl.log is coarse."""
    n, mantissa = _octave(w)
    f = (mantissa - 1.0) + lost * ((127 - n) << 23).to(tl.float32, bitcast=True)
    # Minimax polynomial of (log(1 + f) - f + f^2 / 2) / f^3 on that interval.
    polynomial = 8.70035961e-2 * f - 1.42674759e-1
    polynomial = polynomial * f + 1.49147868e-1
    polynomial = polynomial * f - 1.65775865e-1
    polynomial = polynomial * f + 1.99630618e-1
    polynomial = polynomial * f - 2.50013381e-1
    polynomial = polynomial * f + 3.33339095e-1
    return n.to(tl.float32) * 6.93147181e-1 + (f + f * f * (polynomial * f - 0.5))


@triton.jit
def log(x):
    """log(x) for positive finite x, to full relative accuracy."""
    return log_of_sum(x, 0.0)


@triton.jit
def inverse64(x):
    """1 / x of a float64 in float32's range, within 2e-14.

    Many GPUs do float64 at 1/64 of float32's rate, and a division or logarithm takes 10 and 40
    operations; all threads of a row do them.
    """
    near = (1.0 / x.to(tl.float32)).to(tl.float64)
    return near * (2.0 - x * near)


@triton.jit
def log64(x):
    """log(x) of a positive float64 in float32's range, within 4e-12."""
    n, mantissa = _octave(x.to(tl.float32))
    x = x * ((127 - n) << 23).to(tl.float32, bitcast=True).to(tl.float64)
    # log(x) = 2 artanh(z) = z (2 + z^2 (2/3 + z^2 (2/5 + ...))), the rest by a minimax polynomial.
    inverse = (1.0 / (mantissa + 1.0)).to(tl.float64)
    z = (x - 1.0) * inverse
    z += ((x - 1.0) - z * (x + 1.0)) * inverse
    w = z * z
    near = w.to(tl.float32)
    rest = 1.91204548e-1 * near + 2.22047621e-1
    rest = rest * near + 2.85715318e-1
    rest = rest * near + 3.99999999e-1
    return z * (2.0 + w * (2.0 / 3.0 + w * rest.to(tl.float64))) + n.to(tl.float64) * NATS_PER_BIT


@triton.jit
def log2_minus(log_x, y):
    """log_x - log2(y) for y >= 0, finite where y is 0.

    The whole part of log2(y) goes first: added up, log2(y) would round more than what is left.
    """
    n, mantissa = _octave(y)
    f = mantissa - 1.0
    # Minimax polynomial of log2(1 + f) / f on that interval.
    polynomial = 1.2555973e-1 * f - 2.1017416e-1
    polynomial = polynomial * f + 2.1724966e-1
    polynomial = polynomial * f - 2.3853607e-1
    polynomial = polynomial * f + 2.876764e-1
    polynomial = polynomial * f - 3.6072063e-1
    polynomial = polynomial * f + 4.8092154e-1
    polynomial = polynomial * f - 7.2134715e-1
    polynomial = polynomial * f + 1.4426949
    return (log_x - n.to(tl.float32)) - f * polynomial


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1, to full relative accuracy."""
    w = 1.0 + x
    return tl.where(w == 0.0, -float("inf"), log_of_sum(w, x - (w - 1.0)))


@triton.jit
def shift_between(student, teacher):
    """The constant between models in whole 64ths: shifts_between of csrc/core/point.h."""
    apart = student - teacher
    return tl.where(tl.abs(apart) >= 2.0, (apart + GRID) - GRID, 0.0)


@triton.jit
def tanh(x):
    """tanh(x) to full relative accuracy."""
    e = expm1(-2.0 * tl.abs(x))
    magnitude = -e / (2.0 + e)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def bregman_excess(p, m, u):
    """p (exp(u) - 1 - u) with m = p exp(u): the term of KL(p || m), made non-negative."""
    pu = times_or_zero(p, u)
    return tl.where(tl.abs(u) < SERIES_RADIUS, phi_over_x(u) * pu, (m - p) - pu)


@triton.jit
def bregman_difference(p, m, u):
    """m - p with m = p exp(u), without cancellation."""
    pu = times_or_zero(p, u)
    return tl.where(tl.abs(u) < SERIES_RADIUS, phi_over_x(u) * pu + pu, m - p)
