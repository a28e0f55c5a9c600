"""The kernel that cuts a row pair over several programs.

One program per row has so many rows in flight at a large vocabulary that they do not fit the cache,
and the later sweeps read memory again. Here a group of programs shares a row, each a slice of it,
so that there are fewer. Between the sweeps a group meets: each program publishes what its slice
came to, and waits until all have. They all have to be running, which a cooperative launch makes
sure of.

The interpreter runs programs one after the other, so nobody could wait there: it launches the
kernel once for each phase.

No row is far here: a group would have to meet over more sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import LOG2E
from .rows import (
    label_of,
    scales_for,
    scales_of,
    share_of,
    weight_of,
    write_loss,
    write_masked_row,
)
from .states import States, states
from .sweeps import Sums, fill, slopes, softmaxes, values

#: Phases of a row; a launch runs those from FIRST to LAST.
STATES = tl.constexpr(0)
VALUES = tl.constexpr(1)
GRADIENT = tl.constexpr(2)

#: What a program publishes for a row: the fields of States, the label's logit, those of Sums.
N_STATES = tl.constexpr(len(States._fields))
N_SUMS = tl.constexpr(len(Sums._fields))
SUMS = tl.constexpr(len(States._fields) + 1)
FIELDS = tl.constexpr(len(States._fields) + 1 + len(Sums._fields))


@triton.jit
def publish(record, first, numbers, N: tl.constexpr, SPLITS: tl.constexpr):
    """Writes numbers to fields of a record (FIELDS, SPLITS), at this program's place."""
    for i in tl.static_range(N):
        tl.store(record + (first + i) * SPLITS, numbers[i].to(tl.float32))


@triton.jit
def collect(records, field, SPLITS: tl.constexpr):
    """One field of all programs of a group."""
    return tl.load(records + field * SPLITS + tl.arange(0, SPLITS))


@triton.jit
def arrive(counter):
    """Tells the group that what this program published is there."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, SPLITS: tl.constexpr):
    """Until all programs of the group have arrived."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < SPLITS:
        pass
    tl.debug_barrier()


@triton.jit
def merged_sum(records, base_field, c, SPLITS: tl.constexpr):
    """Base, sum and what rounding took from it, of the group; see sum_and_lost."""
    base = collect(records, base_field, SPLITS)
    sums = collect(records, base_field + 1, SPLITS).to(tl.float64)
    sums += collect(records, base_field + 2, SPLITS).to(tl.float64)
    highest = tl.max(base, 0)
    total = tl.sum(sums * tl.exp2(((base - highest) * c).to(tl.float64)), 0)
    rounded = total.to(tl.float32)
    return highest, rounded, (total - rounded.to(tl.float64)).to(tl.float32)


@triton.jit
def merged_top(records, field, SPLITS: tl.constexpr):
    """The largest raw logit of the group and the first place that holds it."""
    top = collect(records, field, SPLITS)
    token = collect(records, field + 1, SPLITS)
    highest = tl.max(top, 0)
    first = tl.min(tl.where(top == highest, token, float("inf")), 0)
    return highest, first


@triton.jit
def merged_states(records, temperature, SPLITS: tl.constexpr):
    """The states of a row pair."""
    c = LOG2E / temperature
    s_base, s_sum, s_lost = merged_sum(records, 0, c, SPLITS)
    t_base, t_sum, t_lost = merged_sum(records, 3, c, SPLITS)
    at_1 = collect(records, 6, SPLITS)
    at_1 *= tl.exp2((collect(records, 0, SPLITS) - s_base) * LOG2E)
    s_top, s_token = merged_top(records, 7, SPLITS)
    t_top, t_token = merged_top(records, 9, SPLITS)
    s_sum_at_1 = tl.sum(at_1, 0)
    return States(
        s_base,
        s_sum,
        s_lost,
        t_base,
        t_sum,
        t_lost,
        s_sum_at_1,
        s_top,
        s_token,
        t_top,
        t_token,
    )


@triton.jit
def merged_sums(records, SPLITS: tl.constexpr):
    """The sums over a row pair."""
    return Sums(
        tl.sum(collect(records, SUMS, SPLITS), 0),
        tl.sum(collect(records, SUMS + 1, SPLITS), 0),
        tl.sum(collect(records, SUMS + 2, SPLITS), 0),
        tl.max(collect(records, SUMS + 3, SPLITS), 0),
        tl.sum(collect(records, SUMS + 4, SPLITS), 0),
        tl.sum(collect(records, SUMS + 5, SPLITS), 0),
    )


@triton.jit
def write_slice(
    student,
    teacher,
    gradient,
    per_row,
    records,
    arrivals,
    row,
    rows,
    vocab,
    split,
    weights,
    divergence,
    wanted,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """This program's part of a row pair; the first of the group writes the loss."""
    size = tl.cdiv(tl.cdiv(vocab, SPLITS), BLOCK) * BLOCK
    begin = split * size
    end = tl.minimum(begin + size, vocab)
    record = records + split
    if FIRST == STATES:
        # Before anything is written: the gradient may overwrite the student.
        label, logit = label_of(student, per_row, row, vocab)
        state, _ = states(
            student, teacher, row, begin, end, weights.temperature, divergence, wanted, BLOCK
        )
        publish(record, 0, state, N_STATES, SPLITS)
        tl.store(record + N_STATES * SPLITS, logit)
        arrive(arrivals)
    if LAST > STATES:
        if FIRST == STATES:
            wait(arrivals, SPLITS)
        state = merged_states(records, weights.temperature, SPLITS)
        logit = tl.load(records + N_STATES * SPLITS)
        label = tl.zeros((), tl.int64)
        if per_row.labels is not None:
            label = tl.load(per_row.labels + row)
        share = share_of(per_row, weights, row)
        of = softmaxes(state, weights.temperature)
        scales = scales_of(student, share, state, label, logit, weights, wanted)
        if FIRST <= VALUES and wanted.DIVERGENCE:
            sums = values(
                student,
                teacher,
                gradient,
                row,
                begin,
                end,
                of,
                scales,
                divergence,
                wanted,
                BLOCK,
            )
            publish(record, SUMS, sums, N_SUMS, SPLITS)
            arrive(arrivals + 1)
        if LAST == GRADIENT:
            late = wanted.GRADIENT and not (wanted.KD_GRADIENT and divergence.SLOPE_SUMS_TO_ZERO)
            nothing = tl.zeros((), tl.float32)
            sums = Sums(nothing, nothing, nothing, nothing, nothing, nothing)
            if late or split == 0:
                if wanted.DIVERGENCE:
                    if FIRST <= VALUES:
                        wait(arrivals + 1, SPLITS)
                    sums = merged_sums(records, SPLITS)
                if wanted.KD_GRADIENT and late:
                    scales = scales_for(sums.slope, sums.size, scales, wanted)
                if late:
                    slopes(
                        student,
                        teacher,
                        gradient,
                        row,
                        begin,
                        end,
                        of,
                        None,
                        scales,
                        divergence,
                        sums.slope,
                        wanted,
                        BLOCK,
                    )
            if split == 0:
                if wanted.GRADIENT:
                    fill(gradient, row, vocab, gradient.width, BLOCK)
                if wanted.ROW_SCALE:
                    tl.store(per_row.row_scale + row, scales.row_scale)
                write_loss(
                    per_row, row, rows, weights, share, state, sums, logit, divergence, wanted
                )


@triton.jit(do_not_specialize=["rows"])  # which change with every batch
def split_kernel(
    student,
    teacher,
    gradient,
    per_row,
    rows: tl.int64,
    vocab,
    weights,
    divergence,
    wanted,
    workspace,
    arrivals,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Groups of SPLITS programs walk over the rows.

    workspace (rows, FIELDS, SPLITS) float32; arrivals (rows, 2) int32, zeros.
    """
    group = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    for row in range(group.to(tl.int64), rows, tl.num_programs(0) // SPLITS):
        if weight_of(per_row, row) == 0.0:
            if split == 0:
                write_masked_row(gradient, per_row, row, rows, wanted, BLOCK)
        else:
            write_slice(
                student,
                teacher,
                gradient,
                per_row,
                workspace + row * (FIELDS * SPLITS),
                arrivals + row * 2,
                row,
                rows,
                vocab,
                split,
                weights,
                divergence,
                wanted,
                FIRST,
                LAST,
                SPLITS,
                BLOCK,
            )
