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
from .far import entropies, kl_gradient
from .rows import finish_gradient, scales_for, scales_of, share_of, weight_of
from .states import States, states, valid
from .sweeps import Sums, per_unit_of, slopes, softmaxes, this_row, values

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
def write_states(pair, records):
    """Phase 1: the softmax states of a shard."""
    state, gaps = states(pair)
    per_unit = per_unit_of(pair.weights.temperature)
    record = ShardStates(
        state.s_base,
        state.t_base,
        state.s_sum64,
        state.t_sum64,
        gaps.reverse * per_unit,
        gaps.forward * per_unit,
        gaps.entropy * per_unit,
        state.s_sum_at_1,
    )
    write_record(records.states + this_row() * N_STATES, record, N_STATES)


@triton.jit
def whole_states(record):
    """The states of a row pair over the whole vocabulary, without the largest logits."""
    s_sum64 = tl.load(record + S_SUM)
    t_sum64 = tl.load(record + T_SUM)
    s_base = tl.load(record + S_BASE).to(tl.float32)
    s_sum_at_1 = tl.load(record + S_SUM_AT_1).to(tl.float32)
    t_base = tl.load(record + T_BASE).to(tl.float32)
    nothing = tl.zeros((), tl.float32)
    return States(
        s_base,
        s_sum64.to(tl.float32),
        s_sum64,
        t_base,
        t_sum64.to(tl.float32),
        t_sum64,
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
def write_far_sums(pair, records, state, of, scales):
    """Phase 2 of a far row: no sums but entropies, and the gradient."""
    nothing = tl.zeros((), tl.float32)
    s_entropy = nothing
    t_entropy = nothing
    if pair.wanted.METRICS:  # before the gradient, which may overwrite the student
        s_entropy, t_entropy = entropies(pair, of)
    sums = Sums(nothing, nothing, nothing, nothing, s_entropy, t_entropy)
    write_record(records.sums + this_row() * N_SUMS, sums, N_SUMS)
    if pair.wanted.KD_GRADIENT:
        reverse = tl.load(records.states + this_row() * N_STATES + REVERSE)
        if pair.divergence.far.REVERSE:
            size = (reverse * pair.divergence.far.reverse).to(tl.float32)
            scales = scales_for(size, size, scales, pair.wanted)
        mean_gap = (reverse - (of.t_log - of.s_log)).to(tl.float32)
        kl_gradient(pair, state, mean_gap, of, scales)
        finish_gradient(pair, pair.vocab, scales.row_scale)


@triton.jit
def write_near_terms(pair, records, state, of, scales, PHASE: tl.constexpr, WRITES: tl.constexpr):
    """Phase 2 or 3 of a row that is not far."""
    record = records.sums + this_row() * N_SUMS
    if PHASE == SUMS:
        sums = values(pair, of, scales)
        write_sums(record, state, sums)
    else:
        slope_sum = tl.zeros((), tl.float32)
        if pair.wanted.KD_GRADIENT:
            slope_sum = tl.load(record + SLOPE).to(tl.float32)
            size = tl.load(record + LARGEST_SLOPE).to(tl.float32)
            scales = scales_for(slope_sum, size, scales, pair.wanted)
        slopes(pair, of, scales, slope_sum, FAR=False)
    if WRITES:
        finish_gradient(pair, pair.vocab, scales.row_scale)


@triton.jit
def write_terms(pair, records, PHASE: tl.constexpr, WRITES: tl.constexpr):
    """Phase 2, sums over the terms of a shard, or 3, its gradient."""
    record = records.states + this_row() * N_STATES
    state = whole_states(record)
    of = softmaxes(state, pair.weights.temperature)
    label = tl.zeros((), tl.int64)
    if pair.per_row.labels is not None:
        # In no column of a shard that does not have it.
        label = tl.load(pair.per_row.labels + this_row())
    good = tl.zeros((), tl.float32)  # in the place of the label's logit
    scales = scales_of(pair, share_of(pair), state, label, good)
    far = False
    if pair.divergence.far is not None:
        reverse = tl.load(record + REVERSE)
        far = reverse == reverse
        if far and PHASE == SUMS:
            write_far_sums(pair, records, state, of, scales)
    if not far:
        write_near_terms(pair, records, state, of, scales, PHASE, WRITES)


@triton.jit
def write_masked(pair, records, PHASE: tl.constexpr, WRITES: tl.constexpr):
    """A row of weight 0: exact zeros, whatever the logits hold."""
    if PHASE == STATES:
        write_zeros(records.states + this_row() * N_STATES, N_STATES)
    if PHASE == SUMS:
        write_zeros(records.sums + this_row() * N_SUMS, N_SUMS)
    if WRITES:
        finish_gradient(pair, 0, 0.0)


@triton.jit
def shard_kernel(pair, records, PHASE: tl.constexpr, WRITES: tl.constexpr):
    """One phase, one program per row; WRITES: it is the phase that writes the gradient."""
    if weight_of(pair) == 0.0:
        write_masked(pair, records, PHASE, WRITES)
    else:
        if PHASE == STATES:
            write_states(pair, records)
        else:
            write_terms(pair, records, PHASE, WRITES)
