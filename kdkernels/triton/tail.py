"""Kernels of a sparse teacher: log-sum-exps of the columns it does not list, and their gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .math import LOG2E, LOWEST, exp, log, times_or_zero
from .row_pair import SOFTCAPPED
from .states import HEADROOM, base_for, valid
from .sweeps import fill, load_raw, row_of, softcap_derivative, transformed


class Listed(NamedTuple):
    """Columns that are no tail, ascending: -1, then different columns of the vocabulary."""

    pointer: tl.tensor  # (rows, size) int64
    size: tl.tensor


@triton.jit
def listed_at(listed, row, position):
    """The column at a position of a row's list, and beyond its end none."""
    inside = position < listed.size
    return tl.load(listed.pointer + row * listed.size + position, mask=inside, other=1 << 62)


@triton.jit
def write_log_sum(to, total):
    """-inf of a tail that is empty or all -inf, NaN of one that holds NaN or +inf."""
    nothing = tl.where(total == 0.0, -float("inf"), float("nan"))
    tl.store(to, tl.where(valid(total), log(total), nothing))


@triton.jit
def write_tails(logits, listed, tails, row, rows, vocab, c, AT_1, BLOCK: tl.constexpr):
    """The tails of a row."""
    at = row_of(logits.rows, row)
    position = 0
    column = listed_at(listed, row, position)
    base = tl.full((), LOWEST, tl.float32)
    sum = tl.zeros((BLOCK,), tl.float32)
    sum_at_1 = tl.zeros((BLOCK,), tl.float32)
    widest = tl.maximum(c, LOG2E) if AT_1 else c
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = transformed(load_raw(at, columns, vocab), logits)
        while column < start + BLOCK:
            x = tl.where(columns == column.to(tl.int32), -float("inf"), x)
            position += 1
            column = listed_at(listed, row, position)
        if tl.max((x - base) * widest, 0) > HEADROOM:
            higher = base_for(tl.max(x, 0), base, widest)
            sum *= tl.exp2((base - higher) * c)
            sum_at_1 *= exp(base - higher)
            base = higher
        sum += tl.exp2((x - base) * c)
        if AT_1:
            sum_at_1 += exp(x - base)
    tl.store(tails + row, base)
    write_log_sum(tails + rows + row, tl.sum(sum.to(tl.float64), 0).to(tl.float32))
    if AT_1:
        total = tl.sum(sum_at_1.to(tl.float64), 0).to(tl.float32)
        write_log_sum(tails + 2 * rows + row, total)


@triton.jit(do_not_specialize=["rows"])  # which change with every batch
def tails_kernel(
    logits, listed, kept, tails, rows: tl.int64, vocab, temperature, AT_1, BLOCK: tl.constexpr
):
    """One program per row: a reference, and log sum exp((x - reference) / T) of its tail."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.full((), 1, tl.int1)
    if kept is not None:
        wanted = tl.load(kept + row) != 0
    if wanted:
        c = LOG2E / temperature
        write_tails(logits, listed, tails, row, rows, vocab, c, AT_1, BLOCK)
    else:
        tl.store(tails + row, 0.0)
        tl.store(tails + rows + row, -float("inf"))
        if AT_1:
            tl.store(tails + 2 * rows + row, -float("inf"))


@triton.jit
def factor_of(tails, grad_tails, row, rows, which, scale):
    """What makes an exponential its part of the gradient; NaN stays NaN."""
    gradient = tl.load(grad_tails + which * rows + row)
    log_sum = tl.load(tails + (1 + which) * rows + row)
    nothing = (gradient == 0.0) | (log_sum == -float("inf"))
    return tl.where(nothing, gradient * 0.0, gradient * scale * exp(-log_sum))


@triton.jit(do_not_specialize=["rows"])  # which change with every batch
def tails_gradient_kernel(
    logits,
    listed,
    gradient,
    tails,
    grad_tails,
    grad_listed,
    rows: tl.int64,
    vocab,
    temperature,
    AT_1,
    BLOCK: tl.constexpr,
):
    """One program per row: the gradient of its tail, and of the listed columns as it is given."""
    row = tl.program_id(0).to(tl.int64)
    at, to = row_of(logits.rows, row), row_of(gradient, row)
    of_listed = grad_listed + row * listed.size
    position = 0
    column = listed_at(listed, row, position)
    while column < 0:
        position += 1
        column = listed_at(listed, row, position)
    base = tl.load(tails + row)
    scale = tl.full((), 1.0, tl.float32)
    if logits.TRANSFORM != SOFTCAPPED:  # whose derivative has the scale
        scale = scale * logits.scale
    c = LOG2E / temperature
    factor = factor_of(tails, grad_tails, row, rows, 0, scale / temperature)
    has_tail = factor != 0.0
    factor_at_1 = tl.zeros((), tl.float32)
    if AT_1:
        factor_at_1 = factor_of(tails, grad_tails, row, rows, 1, scale)
        has_tail = has_tail | (factor_at_1 != 0.0)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        g = tl.zeros((BLOCK,), tl.float32)
        if has_tail:
            raw = load_raw(at, columns, vocab)
            x = transformed(raw, logits)
            g = tl.exp2((x - base) * c) * factor
            if AT_1:
                g += exp(x - base) * factor_at_1
            if logits.TRANSFORM == SOFTCAPPED:
                # A row without a gradient stays NaN where the derivative is 0.
                g = times_or_zero(softcap_derivative(raw, logits), g) + (factor + factor_at_1) * 0.0
        while column < start + BLOCK:
            g = tl.where(columns == column.to(tl.int32), tl.load(of_listed + position), g)
            position += 1
            column = listed_at(listed, row, position)
        tl.store(to + columns, g.to(to.dtype.element_ty), mask=columns < vocab)
    fill(gradient, row, vocab, gradient.width, BLOCK)
