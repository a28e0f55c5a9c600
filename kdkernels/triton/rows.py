"""The kernels: loss and gradient of a row pair by one program, and the scaling of a gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .far import entropies, exceeds, far_values, is_far, kl_gradient, kls, log_probabilities
from .math import LARGEST_FLOAT, NATS_PER_BIT, log
from .states import states, valid
from .sweeps import SOFTCAPPED, Scales, Sums, fill, row_of, slopes, softmaxes, transformed, values


class PerRow(NamedTuple):
    """Tensors with an entry per row; None where a kernel has no use for one."""

    labels: tl.tensor  # (rows,) int64
    weight: tl.tensor  # (rows,), 0: the row takes no part
    normalizer: tl.tensor  # ()
    loss: tl.tensor  # (rows,), out: with all weights, the normalizer's included
    row_scale: tl.tensor  # (rows,), out: what a float16 gradient has yet to be multiplied by
    metrics: tl.tensor  # (5, rows), out


class Weights(NamedTuple):
    """Numbers that weigh the terms of the loss and of the gradient."""

    temperature: tl.tensor
    kd: tl.tensor  # includes temperature squared
    ce: tl.tensor
    divisor: tl.tensor  # what the host knows of the normalizer
    gradient_scale: tl.tensor  # the power of two of a float16 gradient


@triton.jit
def weight_of(per_row, row):
    """The weight of a row."""
    weight = tl.full((), 1.0, tl.float32)
    if per_row.weight is not None:
        weight = tl.load(per_row.weight + row)
    return weight


@triton.jit
def share_of(per_row, weights, row):
    """What the loss of a row is multiplied by."""
    share = weight_of(per_row, row) / weights.divisor
    if per_row.normalizer is not None:
        share = share / tl.load(per_row.normalizer)
    return share


@triton.jit
def label_of(student, per_row, row, vocab):
    """The label of a row and its logit, NaN for one outside the vocabulary; without labels 0."""
    label = tl.zeros((), tl.int64)
    logit = tl.zeros((), tl.float32)
    if per_row.labels is not None:
        label = tl.load(per_row.labels + row)
        inside = (label >= 0) & (label < vocab)
        raw = tl.load(row_of(student.rows, row) + tl.where(inside, label, 0)).to(tl.float32)
        logit = tl.where(inside, transformed(raw, student), float("nan"))
    return label, logit


@triton.jit
def scales_of(student, share, state, label, label_logit, weights, wanted):
    """What a row's gradient is multiplied by."""
    scale = share
    if wanted.ROW_SCALE:
        scale = weights.gradient_scale
    if student.TRANSFORM != SOFTCAPPED:
        scale = scale * student.scale
    good = label_logit == label_logit
    if wanted.KD_GRADIENT:
        good = good & valid(state.s_sum) & valid(state.t_sum)
    if wanted.CE_GRADIENT:
        good = good & valid(state.s_sum_at_1)
    scale = tl.where(good, scale, float("nan"))
    ce = scale * weights.ce
    row_scale = share / weights.gradient_scale
    kd = scale * weights.kd / weights.temperature
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
def write_loss(per_row, row, rows, weights, share, state, sums, label_logit, divergence, wanted):
    """The loss of a row and its metrics."""
    # A term of weight 0 may be infinite: it is left out, not multiplied.
    loss = tl.where(label_logit == label_logit, 0.0, label_logit)
    distance = tl.zeros((), tl.float32)
    cross_entropy = tl.zeros((), tl.float32)
    if wanted.DIVERGENCE:
        distance = divergence_of(state, sums, divergence)
        loss += tl.where(weights.kd != 0.0, weights.kd * distance, 0.0)
    if wanted.CROSS_ENTROPY:
        cross_entropy = (state.s_base - label_logit) + log(state.s_sum_at_1)
        cross_entropy = tl.where(valid(state.s_sum_at_1), cross_entropy, float("nan"))
        loss += tl.where(weights.ce != 0.0, weights.ce * cross_entropy, 0.0)
    tl.store(per_row.loss + row, share * loss)
    if wanted.METRICS:
        nan = float("nan")
        defined = valid(state.s_sum) & valid(state.t_sum)
        agreement = (state.s_token == state.t_token).to(tl.float32)
        out = per_row.metrics + row
        tl.store(out, distance)
        tl.store(out + rows, cross_entropy)
        tl.store(out + 2 * rows, tl.where(valid(state.t_sum), sums.t_entropy, nan))
        tl.store(out + 3 * rows, tl.where(valid(state.s_sum), sums.s_entropy, nan))
        tl.store(out + 4 * rows, tl.where(defined, agreement, nan))


@triton.jit
def write_masked_row(gradient, per_row, row, rows, wanted, BLOCK: tl.constexpr):
    """A row of weight 0: exact zeros, whatever the logits hold."""
    tl.store(per_row.loss + row, 0.0)
    if wanted.ROW_SCALE:
        tl.store(per_row.row_scale + row, 0.0)
    if wanted.METRICS:
        for metric in tl.static_range(5):
            tl.store(per_row.metrics + metric * rows + row, 0.0)
    if wanted.GRADIENT:
        fill(gradient, row, 0, gradient.width, BLOCK)


@triton.jit
def write_far(
    student,
    teacher,
    gradient,
    row,
    vocab,
    state,
    gaps,
    of,
    scales,
    weights,
    divergence,
    wanted,
    BLOCK: tl.constexpr,
):
    """Sums over a far row and its gradient; any other is left to ``write_near``."""
    kl = kls(state, gaps, weights.temperature)
    done, value = is_far(kl, divergence.far)
    value = value.to(tl.float32)
    s_entropy = tl.zeros((), tl.float32)
    t_entropy = tl.zeros((), tl.float32)
    if done:
        if wanted.METRICS:  # before the gradient, which may overwrite the student
            s_entropy, t_entropy = entropies(student, teacher, row, vocab, of, BLOCK)
        if divergence.far.IS_KL:
            if wanted.GRADIENT:
                if divergence.far.REVERSE:
                    size = (kl.reverse * divergence.far.reverse).to(tl.float32)
                    scales = scales_for(size, size, scales, wanted)
                kl_gradient(
                    student,
                    teacher,
                    gradient,
                    row,
                    vocab,
                    state,
                    kl,
                    of,
                    scales,
                    divergence.far,
                    wanted,
                    BLOCK,
                )
            if divergence.far.ENTROPY:
                value = (kl.forward + kl.entropy).to(tl.float32)
        else:
            logs = log_probabilities(of)
            bits, slope = far_values(
                student, teacher, row, vocab, of, logs, divergence, wanted, BLOCK
            )
            value = bits * NATS_PER_BIT
            done = exceeds(value, divergence.far.threshold)
            if wanted.GRADIENT:
                scales = scales_for(slope * NATS_PER_BIT, 0.0, scales, wanted)
                if done:
                    slopes(
                        student,
                        teacher,
                        gradient,
                        row,
                        vocab,
                        of,
                        logs,
                        scales,
                        divergence,
                        slope,
                        wanted,
                        BLOCK,
                    )
    nothing = tl.zeros((), tl.float32)
    return done, Sums(value, nothing, nothing, nothing, s_entropy, t_entropy), scales.row_scale


@triton.jit
def write_near(
    student,
    teacher,
    gradient,
    row,
    vocab,
    of,
    scales,
    divergence,
    wanted,
    BLOCK: tl.constexpr,
):
    """Sums over a row pair and its gradient, by formulas that keep digits near the teacher."""
    nothing = tl.zeros((), tl.float32)
    sums = Sums(nothing, nothing, nothing, nothing, nothing, nothing)
    if wanted.DIVERGENCE:
        sums = values(student, teacher, gradient, row, vocab, of, scales, divergence, wanted, BLOCK)
    if wanted.GRADIENT and not (wanted.KD_GRADIENT and divergence.SLOPE_SUMS_TO_ZERO):
        if wanted.KD_GRADIENT:
            scales = scales_for(sums.slope, sums.size, scales, wanted)
        slopes(
            student,
            teacher,
            gradient,
            row,
            vocab,
            of,
            None,
            scales,
            divergence,
            sums.slope,
            wanted,
            BLOCK,
        )
    return sums, scales.row_scale


@triton.jit
def write_row(
    student,
    teacher,
    gradient,
    per_row,
    row,
    rows,
    vocab,
    weights,
    divergence,
    wanted,
    BLOCK: tl.constexpr,
):
    """Loss, gradient and metrics of a row pair."""
    share = share_of(per_row, weights, row)
    label, label_logit = label_of(student, per_row, row, vocab)
    state, gaps = states(
        student, teacher, row, vocab, weights.temperature, divergence, wanted, BLOCK
    )
    of = softmaxes(state, weights.temperature)
    scales = scales_of(student, share, state, label, label_logit, weights, wanted)
    if divergence.far is None:
        sums, row_scale = write_near(
            student, teacher, gradient, row, vocab, of, scales, divergence, wanted, BLOCK
        )
    else:
        done, sums, row_scale = write_far(
            student,
            teacher,
            gradient,
            row,
            vocab,
            state,
            gaps,
            of,
            scales,
            weights,
            divergence,
            wanted,
            BLOCK,
        )
        if not done:
            sums, row_scale = write_near(
                student, teacher, gradient, row, vocab, of, scales, divergence, wanted, BLOCK
            )
    if wanted.GRADIENT:
        fill(gradient, row, vocab, gradient.width, BLOCK)
    if wanted.ROW_SCALE:
        tl.store(per_row.row_scale + row, row_scale)
    write_loss(per_row, row, rows, weights, share, state, sums, label_logit, divergence, wanted)


@triton.jit(do_not_specialize=["rows"])  # which change with every batch
def loss_kernel(
    student,
    teacher,
    gradient,
    per_row,
    rows: tl.int64,
    vocab,
    weights,
    divergence,
    wanted,
    BLOCK: tl.constexpr,
):
    """One program per row; see the structs of this file and of sweeps.py."""
    row = tl.program_id(0).to(tl.int64)
    if weight_of(per_row, row) == 0.0:
        write_masked_row(gradient, per_row, row, rows, wanted, BLOCK)
    else:
        write_row(
            student,
            teacher,
            gradient,
            per_row,
            row,
            rows,
            vocab,
            weights,
            divergence,
            wanted,
            BLOCK,
        )


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
