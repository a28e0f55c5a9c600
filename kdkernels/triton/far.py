"""Far rows: those that lose nothing by the textbook's formulas (see csrc/core/divergences.h).

The first sweep adds up how far a row is from its teacher. For a KL divergence that is its value,
and one more sweep, ``kl_gradient``, writes the gradient. The others take the sweep ``far_values``,
and ``slopes``, whose terms are in bits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .. import constants
from .math import LARGEST_FLOAT, inverse64, times_or_zero
from .sweeps import (
    far_point,
    folded,
    load_logits,
    no_sum,
    point,
    row_of,
    store_gradient,
    term,
    this_row,
    transformed,
)

MOST_CANCELLED = tl.constexpr(constants.MOST_CANCELLED)


class KLs(NamedTuple):
    """Of a row pair without infinite logits, in nats; with some, infinite or NaN."""

    forward: tl.tensor  # KL(p || q)
    reverse: tl.tensor  # KL(q || p)
    entropy: tl.tensor  # of p
    offset: tl.tensor  # log q - log p = gap / T + offset
    mean_gap: tl.tensor  # by q, over T


@triton.jit
def kls(state, gaps, of):
    """The KL divergences of a row pair, from the sums of the first sweep."""
    by_t = of.per_unit * inverse64(state.t_sum64)
    mean_gap = gaps.reverse * (of.per_unit * inverse64(state.s_sum64))
    offset = of.t_log - of.s_log
    return KLs(
        -(gaps.forward * by_t + offset).to(tl.float32),
        (mean_gap + offset).to(tl.float32),
        (of.t_log - gaps.entropy * by_t).to(tl.float32),
        offset.to(tl.float32),
        mean_gap.to(tl.float32),
    )


@triton.jit
def exceeds(value, threshold):
    """Whether a divergence is finite and makes its row far."""
    return (value > threshold) & (value <= LARGEST_FLOAT)


@triton.jit
def is_far(kl, far):
    """Whether a row may be far by its KL divergences; and the divergence that these make."""
    value = kl.forward * 0.0 if far.FORWARD else kl.reverse * 0.0
    if far.FORWARD:
        value += kl.forward * far.forward
    if far.REVERSE:
        value += kl.reverse * far.reverse
    done = exceeds(value, far.kl_threshold)
    if far.IS_KL:
        done = done & (tl.abs(kl.offset) <= value * MOST_CANCELLED)
    return done, value


@triton.jit
def entropies(pair, of):
    """The entropies of student and teacher, which metrics ask for."""
    s_row = row_of(pair.student.rows, this_row())
    t_row = row_of(pair.teacher.rows, this_row())
    s_entropy = no_sum(pair)
    t_entropy = no_sum(pair)
    for start in range(0, pair.vocab, pair.BLOCK):
        columns = start + tl.arange(0, pair.BLOCK)
        x = transformed(load_logits(pair, s_row, columns), pair.student)
        y = transformed(load_logits(pair, t_row, columns), pair.teacher)
        p, q, log_p, log_q, _ = point(x, y, of)
        s_entropy -= folded(pair, times_or_zero(q, log_q))
        t_entropy -= folded(pair, times_or_zero(p, log_p))
    return tl.sum(s_entropy, 0), tl.sum(t_entropy, 0)


@triton.jit
def kl_gradient(pair, state, mean_gap, of, scales):
    """forward (q - p) + reverse q (log q - log p - KL(q || p))."""
    s_row = row_of(pair.student.rows, this_row())
    t_row = row_of(pair.teacher.rows, this_row())
    g_row = row_of(pair.gradient, this_row())
    s_scale = scales.kd / state.s_sum
    of_p = scales.kd / state.t_sum * pair.divergence.far.forward
    of_q = s_scale * pair.divergence.far.forward
    of_gap = s_scale * pair.divergence.far.reverse * of.inverse_temperature
    if pair.divergence.far.REVERSE:
        of_q -= s_scale * pair.divergence.far.reverse * mean_gap
    for start in range(0, pair.vocab, pair.BLOCK):
        columns = start + tl.arange(0, pair.BLOCK)
        raw = load_logits(pair, s_row, columns, LAST=True)
        x = transformed(raw, pair.student)
        y = transformed(load_logits(pair, t_row, columns, LAST=True), pair.teacher)
        s_shifted = x - state.s_base
        t_shifted = y - state.t_base
        s_e = tl.exp2(s_shifted * of.c)
        g = s_e * of_q
        if pair.divergence.far.REVERSE:
            # Not (gap of_gap + of_q) s_e: where s_e is 0 the gap may be huge.
            g += (s_shifted - t_shifted) * (s_e * of_gap)
        if pair.divergence.far.FORWARD:
            g -= tl.exp2(t_shifted * of.c) * of_p
        store_gradient(pair, g_row, columns, g, raw, x, of, scales)


@triton.jit
def far_values(pair, of):
    """The divergence and the sum of its slopes, in bits."""
    s_row = row_of(pair.student.rows, this_row())
    t_row = row_of(pair.teacher.rows, this_row())
    value = no_sum(pair)
    slope = no_sum(pair)
    for start in range(0, pair.vocab, pair.BLOCK):
        columns = start + tl.arange(0, pair.BLOCK)
        x = transformed(load_logits(pair, s_row, columns), pair.student)
        y = transformed(load_logits(pair, t_row, columns), pair.teacher)
        points = far_point(x, y, of)
        inside = columns < pair.vocab
        here = tl.where(inside, term(pair.divergence.far.value, pair.divergence, points), 0.0)
        value += folded(pair, here)
        if pair.wanted.GRADIENT:
            here = tl.where(inside, term(pair.divergence.far.slope, pair.divergence, points), 0.0)
            slope += folded(pair, here)
    return tl.sum(value, 0), tl.sum(slope, 0)
