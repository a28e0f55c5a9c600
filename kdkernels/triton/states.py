"""The first sweep over a row pair: softmax states, and what tells far rows."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .math import LARGEST_FLOAT, LOG2E, LOWEST, exp
from .sweeps import folded, less, load_logits, no_sum, row_of, this_row, top_of, transformed

#: How far a logit may lie above the base of a sum, in powers of two: its distance is rounded.
HEADROOM = tl.constexpr(8.0)


class States(NamedTuple):
    """Of a row pair: sums of exp((x - base) / T) and what labels and metrics need.

    The ratio of the sums enters every log q - log p, where float32 would drown close logits.
    """

    s_base: tl.tensor
    s_sum: tl.tensor
    s_sum64: tl.tensor  # the same in float64
    t_base: tl.tensor
    t_sum: tl.tensor
    t_sum64: tl.tensor
    s_sum_at_1: tl.tensor  # of exp(x - base)
    s_top: tl.tensor  # the largest raw logits and the first places that hold them
    s_token: tl.tensor
    t_top: tl.tensor
    t_token: tl.tensor


class Gaps(NamedTuple):
    """Sums over a row pair, by exponentials e: gap = (s - s_base) - (t - t_base)."""

    forward: tl.tensor  # e_t gap
    reverse: tl.tensor  # e_s gap
    entropy: tl.tensor  # e_t (t - t_base)


@triton.jit
def valid(sum):
    """Whether a row has a softmax: not all -inf, no NaN, no +inf."""
    return (sum > 0.0) & (sum <= LARGEST_FLOAT)


@triton.jit
def base_for(top, base, c):
    """What exponentials are relative to from here on, where ``top`` is the largest logit.

    It moves only far, since that multiplies the sum so far by a rounded factor.
    """
    return tl.where((top - base) * c > HEADROOM, top, base)


@triton.jit
def risen(base, to, c):
    """A base moved to another one, what x - base grows by, and the factor of its exponential."""
    up = base - to
    return to, up, tl.exp2(up * c)


@triton.jit
def moved(forward, reverse, entropy, s_sum, t_sum, s_up, t_up, s_factor, t_factor):
    """The sums of Gaps once the bases have risen; ``s_sum`` and ``t_sum`` are those before."""
    apart = s_up - t_up
    return (
        (forward + t_sum * apart) * t_factor,
        (reverse + s_sum * apart) * s_factor,
        (entropy + t_sum * t_up) * t_factor,
    )


@triton.jit
def first_top(tops, tokens):
    """The largest of some logits and the first of the places that hold it."""
    top = tl.max(tops, 0)
    return top, tl.min(tl.where(tops == top, tokens, 0x7FFFFFFF), 0)


@triton.jit
def states(pair):
    """Sweep 1: the states, and what tells far rows."""
    c = LOG2E / pair.weights.temperature
    s_row = row_of(pair.student.rows, this_row())
    t_row = row_of(pair.teacher.rows, this_row())
    # Each thread has bases of its own until the end, so that none waits for the others.
    s_base = no_sum(pair) + LOWEST
    t_base = s_base
    s_top = tl.full((pair.BLOCK,), -float("inf"), tl.float32)
    t_top = s_top
    s_token = tl.zeros((pair.BLOCK,), tl.int32)
    t_token = s_token
    s_sum = no_sum(pair)
    t_sum = no_sum(pair)
    s_sum_at_1 = no_sum(pair)
    forward = no_sum(pair)
    reverse = no_sum(pair)
    entropy = no_sum(pair)
    s_c = tl.maximum(c, LOG2E) if pair.wanted.CROSS_ENTROPY else c
    for start in range(0, pair.vocab, pair.BLOCK):
        columns = start + tl.arange(0, pair.BLOCK)
        s_raw = load_logits(pair, s_row, columns)
        x = transformed(s_raw, pair.student)
        s_base, s_up, s_factor = risen(s_base, base_for(top_of(pair, x), s_base, s_c), c)
        x = less(pair, x, s_base)
        if pair.wanted.DIVERGENCE:
            t_raw = load_logits(pair, t_row, columns)
            y = transformed(t_raw, pair.teacher)
            t_base, t_up, t_factor = risen(t_base, base_for(top_of(pair, y), t_base, c), c)
            y = less(pair, y, t_base)
            if pair.divergence.far is not None:
                forward, reverse, entropy = moved(
                    forward, reverse, entropy, s_sum, t_sum, s_up, t_up, s_factor, t_factor
                )
            t_sum *= t_factor
        s_sum *= s_factor
        s_e = tl.exp2(x * c)
        s_sum += folded(pair, s_e)
        if pair.wanted.CROSS_ENTROPY:
            s_sum_at_1 = s_sum_at_1 * exp(s_up) + folded(pair, exp(x))
        if pair.wanted.DIVERGENCE:
            t_e = tl.exp2(y * c)
            t_sum += folded(pair, t_e)
            if pair.divergence.far is not None:
                inside = columns < pair.vocab  # beyond, a gap would be -inf - -inf
                gap = tl.where(inside, x - y, 0.0)
                if pair.divergence.far.FORWARD:
                    forward += folded(pair, t_e * gap)
                if pair.divergence.far.REVERSE:
                    reverse += folded(pair, s_e * gap)
                if pair.divergence.far.ENTROPY:
                    entropy += folded(pair, t_e * tl.where(inside, y, 0.0))
        if pair.wanted.METRICS:
            s_token = tl.where(s_raw > s_top, columns, s_token)
            s_top = tl.maximum(s_top, s_raw)
        if pair.wanted.DIVERGENCE and pair.wanted.METRICS:
            t_token = tl.where(t_raw > t_top, columns, t_token)
            t_top = tl.maximum(t_top, t_raw)
    s_base, s_up, s_factor = risen(s_base, tl.max(s_base, 0), c)
    t_base, t_up, t_factor = risen(t_base, tl.max(t_base, 0), c)
    if pair.divergence.far is not None:
        forward, reverse, entropy = moved(
            forward, reverse, entropy, s_sum, t_sum, s_up, t_up, s_factor, t_factor
        )
    s_sum_at_1 *= exp(s_up)
    s_sum *= s_factor
    t_sum *= t_factor
    s_sum64 = tl.sum(s_sum.to(tl.float64), 0)
    t_sum64 = tl.sum(t_sum.to(tl.float64), 0)
    s_total_at_1 = tl.sum(s_sum_at_1, 0)
    s_top, s_token = first_top(s_top, s_token)
    t_top, t_token = first_top(t_top, t_token)
    state = States(
        s_base,
        s_sum64.to(tl.float32),
        s_sum64,
        t_base,
        t_sum64.to(tl.float32),
        t_sum64,
        s_total_at_1,
        s_top,
        s_token,
        t_top,
        t_token,
    )
    gaps = Gaps(
        tl.sum(forward.to(tl.float64), 0),
        tl.sum(reverse.to(tl.float64), 0),
        tl.sum(entropy.to(tl.float64), 0),
    )
    return state, gaps
