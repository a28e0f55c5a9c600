"""Sweeps over a row pair: what the kernels of the Triton backend are made of.

1. ``states`` of states.py: softmax states of student and teacher
2. ``values``: value and slope of every entry, and the gradient where the slopes sum to 0
3. ``slopes``: the gradient otherwise, from slopes computed again

A sweep runs over columns [0, vocab) in blocks; entries beyond are -inf in both models, a term of
0 in every divergence.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .math import (
    LOG2E,
    NATS_PER_BIT,
    bregman_difference,
    exp,
    inverse64,
    log64,
    shift_between,
    tanh,
    times_or_zero,
)
from .row_pair import SCALED, SOFTCAPPED


class Sums(NamedTuple):
    """Over a row pair; shift is the sum of q - p, size that of the largest slope or their sum."""

    value: tl.tensor
    slope: tl.tensor
    shift: tl.tensor
    size: tl.tensor
    s_entropy: tl.tensor
    t_entropy: tl.tensor


class Softmaxes(NamedTuple):
    """What turns a pair of logits into probabilities."""

    c: tl.tensor  # log2(e) / T
    inverse_temperature: tl.tensor
    per_unit: tl.tensor  # 1 / T as the exponentials have it, in float64
    s_base: tl.tensor
    t_base: tl.tensor
    s_inverse: tl.tensor
    t_inverse: tl.tensor
    s_log: tl.tensor  # logarithms of the sums, in float64
    t_log: tl.tensor
    s_lse: tl.tensor  # log q = (s - s_lse) / T - s_rest: what is large is subtracted first
    s_rest: tl.tensor
    t_lse: tl.tensor
    t_rest: tl.tensor
    s_shift: tl.tensor
    t_shift: tl.tensor
    offset: tl.tensor  # log q - log p = ((s - s_shift) - (t - t_shift)) / T + offset


class Scales(NamedTuple):
    """What the terms of a gradient are multiplied by; NaN for a row that has none."""

    kd: tl.tensor
    ce: tl.tensor
    ce_over_sum: tl.tensor
    label: tl.tensor
    row_scale: tl.tensor  # what a float16 gradient has yet to be multiplied by


@triton.jit
def this_row():
    """The row of this program."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def row_of(rows, row):
    """The address of a row."""
    outer = (row // rows.inner_size) * rows.outer_stride
    return rows.pointer + outer + (row % rows.inner_size) * rows.inner_stride


@triton.jit
def load_raw(row, columns, end, LAST: tl.constexpr = False):
    """Logits of a row in float32, -inf beyond the end; LAST: the cache may forget them."""
    POLICY: tl.constexpr = "evict_first" if LAST else ""
    mask = columns < end
    x = tl.load(row + columns, mask=mask, other=-float("inf"), eviction_policy=POLICY)
    return x.to(tl.float32)


@triton.jit
def load_logits(pair, row, columns, LAST: tl.constexpr = False):
    """A block of a row in float32, -inf beyond the vocabulary."""
    x = load_raw(row, columns, pair.end, LAST)
    if pair.PADDED:
        x = tl.where(columns < pair.vocab, x, -float("inf"))
    return x


@triton.jit
def no_sum(pair):
    """What sums of blocks begin with."""
    return tl.zeros((pair.BLOCK // pair.FOLD,), tl.float32)


@triton.jit
def by_thread(pair, x):
    """A block with an axis along which one thread holds FOLD columns."""
    if pair.ALIGNED:
        x = tl.reshape(x, (pair.BLOCK // pair.FOLD, pair.FOLD))
    else:
        x = tl.reshape(x, (pair.FOLD, pair.BLOCK // pair.FOLD))
    return x


@triton.jit
def folded(pair, x):
    """Sums over a block's columns by FOLD of them, which one thread holds."""
    return tl.sum(by_thread(pair, x), 1 if pair.ALIGNED else 0)


@triton.jit
def top_of(pair, x):
    """The largest of the columns that one thread holds."""
    return tl.max(by_thread(pair, x), 1 if pair.ALIGNED else 0)


@triton.jit
def less(pair, x, base):
    """x - base, of a base for each thread."""
    base = tl.expand_dims(base, 1 if pair.ALIGNED else 0)
    return tl.reshape(by_thread(pair, x) - base, (pair.BLOCK,))


@triton.jit
def transformed(x, logits):
    """After scale and softcap; -inf stays -inf."""
    if logits.TRANSFORM == SOFTCAPPED:
        capped = logits.softcap * tanh(x * (logits.scale / logits.softcap))
        x = tl.where(x == -float("inf"), x, capped)
    if logits.TRANSFORM == SCALED:
        x = x * logits.scale
    return x


@triton.jit
def softcap_derivative(raw, logits):
    """d transformed / d raw, which has the scale: scale / cosh(scale raw / softcap)^2."""
    e = exp(-2.0 * tl.abs(raw * (logits.scale / logits.softcap)))
    return 4.0 * logits.scale * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def per_unit_of(temperature):
    """1 / T as the exponentials have it."""
    return tl.full((), LOG2E / temperature, tl.float32).to(tl.float64) * NATS_PER_BIT


@triton.jit
def softmaxes(state, temperature):
    """The constants of a row pair."""
    inverse_temperature = 1.0 / temperature
    c = tl.full((), LOG2E / temperature, tl.float32)
    per_unit = per_unit_of(temperature)
    s_log = log64(state.s_sum64)
    t_log = log64(state.t_sum64)
    s_base = state.s_base.to(tl.float64)
    t_base = state.t_base.to(tl.float64)
    # Any number near base + T log(sum) serves, with a rest that makes up for what it is off.
    s_lse = state.s_base + s_log.to(tl.float32) * temperature
    t_lse = state.t_base + t_log.to(tl.float32) * temperature
    s_up = s_lse.to(tl.float64) - s_base
    t_up = t_lse.to(tl.float64) - t_base
    shift = shift_between(s_lse, t_lse)
    of_student = tl.abs(s_lse) > tl.abs(t_lse)
    apart = t_base - s_base + shift.to(tl.float64) + (t_log - s_log) * inverse64(per_unit)
    return Softmaxes(
        c,
        inverse_temperature,
        per_unit,
        state.s_base,
        state.t_base,
        1.0 / state.s_sum,
        1.0 / state.t_sum,
        s_log,
        t_log,
        s_lse,
        (s_log - s_up * per_unit).to(tl.float32),
        t_lse,
        (t_log - t_up * per_unit).to(tl.float32),
        tl.where(of_student, shift, 0.0),
        tl.where(of_student, 0.0, -shift),
        (apart * inverse_temperature.to(tl.float64)).to(tl.float32),
    )


@triton.jit
def log_ratio(x, y, of):
    """r = log q - log p of transformed logits."""
    return ((x - of.s_shift) - (y - of.t_shift)) * of.inverse_temperature + of.offset


@triton.jit
def point(x, y, of):
    """p, q, log p, log q and r = log q - log p of transformed logits; r is 0 if both are -inf."""
    p = tl.exp2((y - of.t_base) * of.c) * of.t_inverse
    q = tl.exp2((x - of.s_base) * of.c) * of.s_inverse
    log_p = (y - of.t_lse) * of.inverse_temperature - of.t_rest
    log_q = (x - of.s_lse) * of.inverse_temperature - of.s_rest
    r = log_ratio(x, y, of)
    return p, q, log_p, log_q, tl.where(r == r, r, 0.0)


@triton.jit
def far_point(x, y, of):
    """p, q, log2 p, log2 q and r of transformed logits."""
    log_p = (y - of.t_lse) * of.c - of.t_rest * LOG2E
    log_q = (x - of.s_lse) * of.c - of.s_rest * LOG2E
    return tl.exp2(log_p), tl.exp2(log_q), log_p, log_q, log_ratio(x, y, of)


@triton.jit
def term(function, divergence, of):
    """Value or slope of the points of a block."""
    return function(*of, divergence.a, divergence.b) if divergence.PARAMETERS else function(*of)


@triton.jit
def values(pair, of, scales):
    """Sweep 2: the sums over the row pair, and the gradient where it needs none of them."""
    s_row = row_of(pair.student.rows, this_row())
    t_row = row_of(pair.teacher.rows, this_row())
    if pair.wanted.GRADIENT:
        g_row = row_of(pair.gradient, this_row())
    LAST: tl.constexpr = pair.divergence.SLOPE_SUMS_TO_ZERO or not pair.wanted.GRADIENT
    value = no_sum(pair)
    slope = no_sum(pair)
    shift = no_sum(pair)
    size = tl.zeros((pair.BLOCK,), tl.float32)
    s_entropy = no_sum(pair)
    t_entropy = no_sum(pair)
    for start in range(0, pair.vocab, pair.BLOCK):
        columns = start + tl.arange(0, pair.BLOCK)
        raw = load_logits(pair, s_row, columns, LAST)
        x = transformed(raw, pair.student)
        y = transformed(load_logits(pair, t_row, columns, LAST), pair.teacher)
        here = point(x, y, of)
        p, q, log_p, log_q, r = here
        value += folded(pair, term(pair.divergence.value, pair.divergence, here))
        if pair.divergence.FEELS_SHIFT:
            shift += folded(pair, bregman_difference(p, q, r))
        if pair.wanted.METRICS:
            s_entropy -= folded(pair, times_or_zero(q, log_q))
            t_entropy -= folded(pair, times_or_zero(p, log_p))
        if pair.wanted.KD_GRADIENT and pair.divergence.SLOPE_SUMS_TO_ZERO:
            g = term(pair.divergence.slope, pair.divergence, here) * scales.kd
            store_gradient(pair, g_row, columns, g, raw, x, of, scales)
        elif pair.wanted.KD_GRADIENT or pair.divergence.FEELS_SHIFT:
            here_slope = term(pair.divergence.slope, pair.divergence, here)
            slope += folded(pair, here_slope)
            if pair.wanted.ROW_SCALE and pair.divergence.SLOPES_CANCEL:
                size = tl.maximum(size, tl.abs(here_slope))
    return Sums(
        tl.sum(value, 0),
        tl.sum(slope, 0),
        tl.sum(shift, 0),
        tl.max(size, 0),
        tl.sum(s_entropy, 0),
        tl.sum(t_entropy, 0),
    )


@triton.jit
def slopes(pair, of, scales, slope_sum, FAR: tl.constexpr):
    """Sweep 3: the gradient, or the hard-label term alone where there is no divergence.

    Slopes of a far row are in bits.
    """
    s_row = row_of(pair.student.rows, this_row())
    t_row = row_of(pair.teacher.rows, this_row())
    g_row = row_of(pair.gradient, this_row())
    for start in range(0, pair.vocab, pair.BLOCK):
        columns = start + tl.arange(0, pair.BLOCK)
        raw = load_logits(pair, s_row, columns, LAST=True)
        x = transformed(raw, pair.student)
        g = tl.zeros((pair.BLOCK,), tl.float32)
        if pair.wanted.KD_GRADIENT:
            y = transformed(load_logits(pair, t_row, columns, LAST=True), pair.teacher)
            if FAR:
                here = far_point(x, y, of)
                slope = term(pair.divergence.far.slope, pair.divergence, here)
                g = (slope - here[1] * slope_sum) * (scales.kd * NATS_PER_BIT)
            else:
                here = point(x, y, of)
                slope = term(pair.divergence.slope, pair.divergence, here)
                g = (slope - here[1] * slope_sum) * scales.kd
        store_gradient(pair, g_row, columns, g, raw, x, of, scales)


@triton.jit
def store_gradient(pair, g_row, columns, g, raw, x, of, scales):
    """Adds the hard-label term, applies the softcap's derivative and stores a block."""
    if pair.wanted.CE_GRADIENT:
        g += exp(x - of.s_base) * scales.ce_over_sum
        # The row of a label that this cannot hold is NaN anyway.
        g -= tl.where(columns == scales.label.to(tl.int32), scales.ce, 0.0)
    if pair.student.TRANSFORM == SOFTCAPPED:
        # A row without a gradient stays NaN where the derivative is 0.
        g = times_or_zero(softcap_derivative(raw, pair.student), g) + (scales.kd + scales.ce) * 0.0
    to = g_row + columns
    if pair.PADDED:
        g = tl.where(columns < pair.vocab, g, 0.0)
    g = g.to(to.dtype.element_ty)
    tl.store(to, g, mask=columns < pair.end, eviction_policy="evict_first")


@triton.jit
def fill(rows, row, begin, end, BLOCK: tl.constexpr):
    """Columns [begin, end) become 0."""
    for start in range(begin, end, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        to = row_of(rows, row) + columns
        tl.store(to, tl.zeros((BLOCK,), to.dtype.element_ty), mask=columns < end)
