"""The kernel for a shard of the vocabulary, whose other columns other processes hold.

The sweeps of a row pair are a launch each. Between them the processes add up what their shards
came to, so that the later ones go by softmaxes of the whole vocabulary. They tell each other
ShardState and ShardSum of csrc/core/params.h.

No row is far here: the processes would have to add up more sums.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..options import SHARD_PHASES, SHARD_STATES, SHARD_SUMS
from .rows import scales_for, scales_of, share_of, weight_of
from .states import States, states, valid
from .sweeps import Sums, fill, slopes, softmaxes, values

#: Phases: places in SHARD_PHASES.
STATES = tl.constexpr(SHARD_PHASES.index("states"))
SUMS = tl.constexpr(SHARD_PHASES.index("sums"))

#: Numbers of a row.
N_STATES = tl.constexpr(len(SHARD_STATES))
N_SUMS = tl.constexpr(len(SHARD_SUMS))
SLOPE = tl.constexpr(SHARD_SUMS.index("slope"))
LARGEST_SLOPE = tl.constexpr(SHARD_SUMS.index("largest_slope"))


class Records(NamedTuple):
    """What processes tell each other, float64."""

    states: tl.tensor  # (rows, N_STATES), out in the first phase, then of the whole vocabulary
    sums: tl.tensor  # (rows, N_SUMS), out in the second, then of the whole one; or None


class ShardStates(NamedTuple):
    """Of a row: the fields of SHARD_STATES."""

    s_base: tl.tensor
    s_sum: tl.tensor
    s_sum_at_1: tl.tensor
    t_base: tl.tensor
    t_sum: tl.tensor


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
    state, _ = states(student, teacher, row, vocab, weights.temperature, divergence, wanted, BLOCK)
    record = ShardStates(
        state.s_base,
        state.s_sum.to(tl.float64) + state.s_lost.to(tl.float64),
        state.s_sum_at_1,
        state.t_base,
        state.t_sum.to(tl.float64) + state.t_lost.to(tl.float64),
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
    s_sum, s_lost = whole_sum(record, 1)
    t_sum, t_lost = whole_sum(record, 4)
    s_base = tl.load(record).to(tl.float32)
    s_sum_at_1 = tl.load(record + 2).to(tl.float32)
    t_base = tl.load(record + 3).to(tl.float32)
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
    state = whole_states(records.states + row * N_STATES)
    of = softmaxes(state, weights.temperature)
    label = tl.zeros((), tl.int64)
    if per_row.labels is not None:
        label = tl.load(per_row.labels + row)  # in no column of a shard that does not have it
    good = tl.zeros((), tl.float32)  # in the place of the label's logit
    share = share_of(per_row, weights, row)
    scales = scales_of(student, share, state, label, good, weights, wanted)
    if PHASE == SUMS:
        sums = values(student, teacher, gradient, row, vocab, of, scales, divergence, wanted, BLOCK)
        write_sums(records.sums + row * N_SUMS, state, sums)
    else:
        slope_sum = tl.zeros((), tl.float32)
        if wanted.KD_GRADIENT:
            record = records.sums + row * N_SUMS
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
        fill(gradient, row, vocab, gradient.width, BLOCK)
        if wanted.ROW_SCALE:
            tl.store(per_row.row_scale + row, scales.row_scale)


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
