"""The kernel for a shard of the vocabulary, whose other columns other processes hold.

The sweeps of a row pair are a launch each. Between them the processes add up what their shards
came to, so that the later ones go by softmaxes of the whole vocabulary. They tell each other
ShardState and ShardSum of csrc/core/params.h.

Rows may be far only by a KL divergence: the others would have the processes add up more sums.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..options import SHARD_PHASES, SHARD_STATES, SHARD_SUMS
from .far import KLs, entropies, kl_gradient, kls
from .rows import scales_for, scales_of, share_of, weight_of
from .states import Gaps, States, states, valid
from .sweeps import Sums, fill, slopes, softmaxes, values

#: Phases: places in SHARD_PHASES.
STATES = tl.constexpr(SHARD_PHASES.index("states"))
SUMS = tl.constexpr(SHARD_PHASES.index("sums"))

#: Numbers of a row.
N_STATES = tl.constexpr(len(SHARD_STATES))
N_SUMS = tl.constexpr(len(SHARD_SUMS))
S_BASE = tl.constexpr(SHARD_STATES.index("student_base"))
T_BASE = tl.constexpr(SHARD_STATES.index("teacher_base"))
S_SUM = tl.constexpr(SHARD_STATES.index("student_sum"))
T_SUM = tl.constexpr(SHARD_STATES.index("teacher_sum"))
REVERSE = tl.constexpr(SHARD_STATES.index("reverse"))
S_SUM_AT_1 = tl.constexpr(SHARD_STATES.index("student_sum_at_1"))
SLOPE = tl.constexpr(SHARD_SUMS.index("slope"))
LARGEST_SLOPE = tl.constexpr(SHARD_SUMS.index("largest_slope"))


class Records(NamedTuple):
    """What processes tell each other, float64."""

    states: tl.tensor  # (rows, N_STATES), out in the first phase, then of the whole vocabulary
    sums: tl.tensor  # (rows, N_SUMS), out in the second, then of the whole one; or None


class ShardStates(NamedTuple):
    """Of a row: the fields of SHARD_STATES."""

    s_base: tl.tensor
    t_base: tl.tensor
    s_sum: tl.tensor
    t_sum: tl.tensor
    reverse: tl.tensor
    forward: tl.tensor
    entropy: tl.tensor
    s_sum_at_1: tl.tensor


@triton.jit
def write_record(to, numbers, N: tl.constexpr):
    """The numbers of a row."""
    for i in tl.static_range(N):
        tl.store(to + i, numbers[i].to(tl.float64))


@triton.jit
def write_zeros(to, N: tl.constexpr):
    """Those of a row that takes no part."""
    for i in tl.static_range(N):
        tl.store(to + i, tl.zeros((), tl.float64))


@triton.jit
def write_states(
    student, teacher, records, row, vocab, weights, divergence, wanted, BLOCK: tl.constexpr
):
    """Phase 1: the softmax states of a shard."""
    state, gaps = states(
        student, teacher, row, vocab, weights.temperature, divergence, wanted, BLOCK
    )
    per_unit = kls(state, gaps, weights.temperature).per_unit
    record = ShardStates(
        state.s_base,
        state.t_base,
        state.s_sum.to(tl.float64) + state.s_lost.to(tl.float64),
        state.t_sum.to(tl.float64) + state.t_lost.to(tl.float64),
        gaps.reverse * per_unit,
        gaps.forward * per_unit,
        gaps.entropy * per_unit,
        state.s_sum_at_1,
    )
    write_record(records.states + row * N_STATES, record, N_STATES)


@triton.jit
def whole_sum(record, field):
    """A sum and what rounding took from it; see sum_and_lost."""
    total = tl.load(record + field)
    rounded = total.to(tl.float32)
    return rounded, (total - rounded.to(tl.float64)).to(tl.float32)


@triton.jit
def whole_states(record):
    """The states of a row pair over the whole vocabulary, without the largest logits."""
    s_sum, s_lost = whole_sum(record, S_SUM)
    t_sum, t_lost = whole_sum(record, T_SUM)
    s_base = tl.load(record + S_BASE).to(tl.float32)
    s_sum_at_1 = tl.load(record + S_SUM_AT_1).to(tl.float32)
    t_base = tl.load(record + T_BASE).to(tl.float32)
    nothing = tl.zeros((), tl.float32)
    return States(
        s_base,
        s_sum,
        s_lost,
        t_base,
        t_sum,
        t_lost,
        s_sum_at_1,
        nothing,
        nothing,
        nothing,
        nothing,
    )


@triton.jit
def write_sums(to, state, sums):
    """The sums over a shard, NaN where the whole row has no softmax."""
    s_valid = valid(state.s_sum)
    t_valid = valid(state.t_sum)
    nan = float("nan")
    record = Sums(
        tl.where(s_valid & t_valid, sums.value, nan),
        sums.slope,
        sums.shift,
        sums.size,
        tl.where(s_valid, sums.s_entropy, nan),
        tl.where(t_valid, sums.t_entropy, nan),
    )
    write_record(to, record, N_SUMS)


@triton.jit
def finish(gradient, per_row, row, vocab, scales, wanted, BLOCK: tl.constexpr):
    """What belongs to the gradient of a row besides."""
    fill(gradient, row, vocab, gradient.width, BLOCK)
    if wanted.ROW_SCALE:
        tl.store(per_row.row_scale + row, scales.row_scale)


@triton.jit
def write_far_sums(
    student,
    teacher,
    gradient,
    per_row,
    records,
    row,
    vocab,
    state,
    of,
    scales,
    weights,
    divergence,
    wanted,
    BLOCK: tl.constexpr,
):
    """Phase 2 of a far row: no sums but entropies, and the gradient."""
    nothing = tl.zeros((), tl.float32)
    s_entropy = nothing
    t_entropy = nothing
    if wanted.METRICS:  # before the gradient, which may overwrite the student
        s_entropy, t_entropy = entropies(student, teacher, row, vocab, of, BLOCK)
    sums = Sums(nothing, nothing, nothing, nothing, s_entropy, t_entropy)
    write_record(records.sums + row * N_SUMS, sums, N_SUMS)
    if wanted.KD_GRADIENT:
        zero = tl.zeros((), tl.float64)
        kl = kls(state, Gaps(zero, zero, zero), weights.temperature)
        reverse = tl.load(records.states + row * N_STATES + REVERSE)
        if divergence.far.REVERSE:
            size = (reverse * divergence.far.reverse).to(tl.float32)
            scales = scales_for(size, size, scales, wanted)
        kl_gradient(
            student,
            teacher,
            gradient,
            row,
            vocab,
            state,
            KLs(kl.forward, reverse, kl.entropy, kl.offset, kl.per_unit),
            of,
            scales,
            divergence.far,
            wanted,
            BLOCK,
        )
        finish(gradient, per_row, row, vocab, scales, wanted, BLOCK)


@triton.jit
def write_near_terms(
    student,
    teacher,
    gradient,
    per_row,
    records,
    row,
    vocab,
    state,
    of,
    scales,
    divergence,
    wanted,
    PHASE: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 2 or 3 of a row that is not far."""
    record = records.sums + row * N_SUMS
    if PHASE == SUMS:
        sums = values(student, teacher, gradient, row, vocab, of, scales, divergence, wanted, BLOCK)
        write_sums(record, state, sums)
    else:
        slope_sum = tl.zeros((), tl.float32)
        if wanted.KD_GRADIENT:
            slope_sum = tl.load(record + SLOPE).to(tl.float32)
            size = tl.load(record + LARGEST_SLOPE).to(tl.float32)
            scales = scales_for(slope_sum, size, scales, wanted)
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
            slope_sum,
            wanted,
            BLOCK,
        )
    if WRITES:
        finish(gradient, per_row, row, vocab, scales, wanted, BLOCK)


@triton.jit
def write_terms(
    student,
    teacher,
    gradient,
    per_row,
    records,
    row,
    vocab,
    weights,
    divergence,
    wanted,
    PHASE: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Phase 2, sums over the terms of a shard, or 3, its gradient."""
    record = records.states + row * N_STATES
    state = whole_states(record)
    of = softmaxes(state, weights.temperature)
    label = tl.zeros((), tl.int64)
    if per_row.labels is not None:
        label = tl.load(per_row.labels + row)  # in no column of a shard that does not have it
    good = tl.zeros((), tl.float32)  # in the place of the label's logit
    share = share_of(per_row, weights, row)
    scales = scales_of(student, share, state, label, good, weights, wanted)
    far = False
    if divergence.far is not None:
        reverse = tl.load(record + REVERSE)
        far = reverse == reverse
        if far and PHASE == SUMS:
            write_far_sums(
                student,
                teacher,
                gradient,
                per_row,
                records,
                row,
                vocab,
                state,
                of,
                scales,
                weights,
                divergence,
                wanted,
                BLOCK,
            )
    if not far:
        write_near_terms(
            student,
            teacher,
            gradient,
            per_row,
            records,
            row,
            vocab,
            state,
            of,
            scales,
            divergence,
            wanted,
            PHASE,
            WRITES,
            BLOCK,
        )


@triton.jit
def write_masked(
    gradient,
    per_row,
    records,
    row,
    wanted,
    PHASE: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of weight 0: exact zeros, whatever the logits hold."""
    if PHASE == STATES:
        write_zeros(records.states + row * N_STATES, N_STATES)
    if PHASE == SUMS:
        write_zeros(records.sums + row * N_SUMS, N_SUMS)
    if WRITES:
        fill(gradient, row, 0, gradient.width, BLOCK)
        if wanted.ROW_SCALE:
            tl.store(per_row.row_scale + row, 0.0)


@triton.jit
def shard_kernel(
    student,
    teacher,
    gradient,
    per_row,
    records,
    vocab,
    weights,
    divergence,
    wanted,
    PHASE: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One phase, one program per row; WRITES: it is the phase that writes the gradient."""
    row = tl.program_id(0).to(tl.int64)
    if weight_of(per_row, row) == 0.0:
        write_masked(gradient, per_row, records, row, wanted, PHASE, WRITES, BLOCK)
    else:
        if PHASE == STATES:
            write_states(student, teacher, records, row, vocab, weights, divergence, wanted, BLOCK)
        else:
            write_terms(
                student,
                teacher,
                gradient,
                per_row,
                records,
                row,
                vocab,
                weights,
                divergence,
                wanted,
                PHASE,
                WRITES,
                BLOCK,
            )
