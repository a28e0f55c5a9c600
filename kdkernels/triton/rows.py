"""The kernels: loss and gradient of a row pair by one program, and the scaling of a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .far import entropies, exceeds, far_values, is_far, kl_gradient, kls
from .math import LARGEST_FLOAT, NATS_PER_BIT, log
from .row_pair import SOFTCAPPED
from .states import states, valid
from .sweeps import (
    Scales,
    Sums,
    fill,
    row_of,
    slopes,
    softmaxes,
    this_row,
    transformed,
    values,
)


@triton.jit
def weight_of(pair):
    """The weight of a row."""
    weight = tl.full((), 1.0, tl.float32)
    if pair.per_row.weight is not None:
        weight = tl.load(pair.per_row.weight + this_row())
    return weight


@triton.jit
def share_of(pair):
    """What the loss of a row is multiplied by."""
    share = weight_of(pair) / pair.weights.divisor
    if pair.per_row.normalizer is not None:
        share = share / tl.load(pair.per_row.normalizer)
    return share


@triton.jit
def label_of(pair):
    """The label of a row and its logit, NaN for one outside the vocabulary; without labels 0."""
    label = tl.zeros((), tl.int64)
    logit = tl.zeros((), tl.float32)
    if pair.per_row.labels is not None:
        label = tl.load(pair.per_row.labels + this_row())
        inside = (label >= 0) & (label < pair.vocab)
        at = row_of(pair.student.rows, this_row()) + tl.where(inside, label, 0)
        raw = tl.load(at).to(tl.float32)
        logit = tl.where(inside, transformed(raw, pair.student), float("nan"))
    return label, logit


@triton.jit
def scales_of(pair, share, state, label, label_logit):
    """What a row's gradient is multiplied by."""
    scale = share
    if pair.wanted.ROW_SCALE:
        scale = pair.weights.gradient_scale
    if pair.student.TRANSFORM != SOFTCAPPED:
        scale = scale * pair.student.scale
    good = label_logit == label_logit
    if pair.wanted.KD_GRADIENT:
        good = good & valid(state.s_sum) & valid(state.t_sum)
    if pair.wanted.CE_GRADIENT:
        good = good & valid(state.s_sum_at_1)
    scale = tl.where(good, scale, float("nan"))
    ce = scale * pair.weights.ce
    row_scale = share / pair.weights.gradient_scale
    kd = scale * pair.weights.kd / pair.weights.temperature
    return Scales(kd, ce, ce / state.s_sum_at_1, label, row_scale)


@triton.jit
def scales_for(slope_sum, size, scales, wanted):
    """The scales once the slopes' sum is known: NaN where it is not finite.

    Slopes, or their sum, may be of any size (reverse KL, alpha-beta): a float16 row takes another
    power of two then.
    """
    kd = tl.where(tl.abs(slope_sum) <= LARGEST_FLOAT, scales.kd, float("nan"))
    size = tl.maximum(size, tl.abs(slope_sum))
    exponent = tl.zeros((), tl.int32)
    if wanted.ROW_SCALE:
        exponent = (size.to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.where((size >= 1.0) & (size <= LARGEST_FLOAT), exponent, 0)
    down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    up = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    ce_over_sum = scales.ce_over_sum * down
    return Scales(kd * down, scales.ce * down, ce_over_sum, scales.label, scales.row_scale * up)


@triton.jit
def divergence_of(state, sums, divergence):
    """The divergence of a row pair."""
    value = sums.value
    if divergence.FEELS_SHIFT:
        # sum q - p is 0; what it comes to is how far rounding of the sums moved all log q.
        correction = sums.shift * sums.slope
        value = value - tl.where(tl.abs(sums.slope) <= LARGEST_FLOAT, correction, 0.0)
        value = tl.where(value < 0.0, 0.0, value)
    return tl.where(valid(state.s_sum) & valid(state.t_sum), value, float("nan"))


@triton.jit
def write_loss(pair, rows, share, state, sums, label_logit):
    """The loss of a row and its metrics."""
    # A term of weight 0 may be infinite: it is left out, not multiplied.
    loss = tl.where(label_logit == label_logit, 0.0, label_logit)
    distance = tl.zeros((), tl.float32)
    cross_entropy = tl.zeros((), tl.float32)
    if pair.wanted.DIVERGENCE:
        distance = divergence_of(state, sums, pair.divergence)
        loss += tl.where(pair.weights.kd != 0.0, pair.weights.kd * distance, 0.0)
    if pair.wanted.CROSS_ENTROPY:
        cross_entropy = (state.s_base - label_logit) + log(state.s_sum_at_1)
        cross_entropy = tl.where(valid(state.s_sum_at_1), cross_entropy, float("nan"))
        loss += tl.where(pair.weights.ce != 0.0, pair.weights.ce * cross_entropy, 0.0)
    tl.store(pair.per_row.loss + this_row(), share * loss)
    if pair.wanted.METRICS:
        nan = float("nan")
        defined = valid(state.s_sum) & valid(state.t_sum)
        agreement = (state.s_token == state.t_token).to(tl.float32)
        out = pair.per_row.metrics + this_row()
        tl.store(out, distance)
        tl.store(out + rows, cross_entropy)
        tl.store(out + 2 * rows, tl.where(valid(state.t_sum), sums.t_entropy, nan))
        tl.store(out + 3 * rows, tl.where(valid(state.s_sum), sums.s_entropy, nan))
        tl.store(out + 4 * rows, tl.where(defined, agreement, nan))


@triton.jit
def finish_gradient(pair, begin, row_scale):
    """Zeros in the columns from ``begin`` on, and the row scale."""
    fill(pair.gradient, this_row(), begin, pair.gradient.width, pair.BLOCK)
    if pair.wanted.ROW_SCALE:
        tl.store(pair.per_row.row_scale + this_row(), row_scale)


@triton.jit
def write_masked_row(pair, rows):
    """A row of weight 0: exact zeros, whatever the logits hold."""
    tl.store(pair.per_row.loss + this_row(), 0.0)
    if pair.wanted.METRICS:
        for metric in tl.static_range(5):
            tl.store(pair.per_row.metrics + metric * rows + this_row(), 0.0)
    if pair.wanted.GRADIENT:
        finish_gradient(pair, 0, 0.0)


@triton.jit
def write_far(pair, state, gaps, of, scales):
    """Sums over a far row and its gradient; any other is left to ``write_near``."""
    kl = kls(state, gaps, of)
    done, value = is_far(kl, pair.divergence.far)
    s_entropy = tl.zeros((), tl.float32)
    t_entropy = tl.zeros((), tl.float32)
    if done:
        if pair.wanted.METRICS:  # before the gradient, which may overwrite the student
            s_entropy, t_entropy = entropies(pair, of)
        if pair.divergence.far.IS_KL:
            if pair.wanted.GRADIENT:
                if pair.divergence.far.REVERSE:
                    size = kl.reverse * pair.divergence.far.reverse
                    scales = scales_for(size, size, scales, pair.wanted)
                kl_gradient(pair, state, kl.mean_gap, of, scales)
            if pair.divergence.far.ENTROPY:
                value = kl.forward + kl.entropy
        else:
            bits, slope = far_values(pair, of)
            value = bits * NATS_PER_BIT
            done = exceeds(value, pair.divergence.far.threshold)
            if pair.wanted.GRADIENT:
                scales = scales_for(slope * NATS_PER_BIT, 0.0, scales, pair.wanted)
                if done:
                    slopes(pair, of, scales, slope, FAR=True)
    nothing = tl.zeros((), tl.float32)
    return done, Sums(value, nothing, nothing, nothing, s_entropy, t_entropy), scales.row_scale


@triton.jit
def write_near(pair, of, scales):
    """Sums over a row pair and its gradient, by formulas that keep digits near the teacher."""
    nothing = tl.zeros((), tl.float32)
    sums = Sums(nothing, nothing, nothing, nothing, nothing, nothing)
    if pair.wanted.DIVERGENCE:
        sums = values(pair, of, scales)
    if pair.wanted.GRADIENT and not (
        pair.wanted.KD_GRADIENT and pair.divergence.SLOPE_SUMS_TO_ZERO
    ):
        if pair.wanted.KD_GRADIENT:
            scales = scales_for(sums.slope, sums.size, scales, pair.wanted)
        slopes(pair, of, scales, sums.slope, FAR=False)
    return sums, scales.row_scale


@triton.jit
def write_kept_row(pair, rows):
    """Loss, gradient and metrics of a row pair."""
    share = share_of(pair)
    label, label_logit = label_of(pair)
    state, gaps = states(pair)
    of = softmaxes(state, pair.weights.temperature)
    scales = scales_of(pair, share, state, label, label_logit)
    if pair.divergence.far is None:
        sums, row_scale = write_near(pair, of, scales)
    else:
        done, sums, row_scale = write_far(pair, state, gaps, of, scales)
        if not done:
            sums, row_scale = write_near(pair, of, scales)
    if pair.wanted.GRADIENT:
        finish_gradient(pair, pair.vocab, row_scale)
    write_loss(pair, rows, share, state, sums, label_logit)


@triton.jit(do_not_specialize=["rows"])  # which change with every batch
def loss_kernel(pair, rows: tl.int64):
    """One program per row; see row_pair.py."""
    if weight_of(pair) == 0.0:
        write_masked_row(pair, rows)
    else:
        write_kept_row(pair, rows)


@triton.jit(do_not_specialize=["rows"])  # which change with every batch
def scale_kernel(
    gradient, grad_output, row_scale, rows: tl.int64, PER_ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """gradient *= grad_output * row_scale, row by row; leaves at once where that is 1."""
    factor = tl.load(grad_output)
    if PER_ROW or row_scale is not None or factor != 1.0:
        for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
            if PER_ROW:
                factor = tl.load(grad_output + row)
            scale = factor
            if row_scale is not None:
                scale = factor * tl.load(row_scale + row)
            if scale != 1.0:
                at = row_of(gradient, row)
                for start in range(0, gradient.width, BLOCK):
                    columns = start + tl.arange(0, BLOCK)
                    mask = columns < gradient.width
                    g = tl.load(at + columns, mask=mask).to(tl.float32) * scale
                    tl.store(at + columns, g.to(at.dtype.element_ty), mask=mask)
