"""A row of student and teacher, and all that a kernel is given for it.

Structs hold what belongs together; upper-case fields are known when a kernel is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

#: What is done to logits before the temperature.
AS_IS = tl.constexpr(0)
SCALED = tl.constexpr(1)
SOFTCAPPED = tl.constexpr(2)


class Rows(NamedTuple):
    """(rows, width) at two strides, as in csrc/core/params.h: row = outer * inner_size + inner."""

    pointer: tl.tensor
    width: tl.tensor
    inner_size: tl.tensor
    outer_stride: tl.tensor
    inner_stride: tl.tensor


class Logits(NamedTuple):
    """Rows and what is done to them: x -> softcap * tanh(scale * x / softcap)."""

    rows: Rows
    scale: tl.tensor
    softcap: tl.tensor
    TRANSFORM: tl.constexpr


class Far(NamedTuple):
    """What tells far rows, and their functions: see Functions of divergences.py."""

    threshold: tl.tensor
    kl_threshold: tl.tensor  # of the KL divergences that the first sweep adds up
    forward: tl.tensor  # weights of KL(p || q) and KL(q || p)
    reverse: tl.tensor
    FORWARD: tl.constexpr  # which of them the first sweep adds up
    REVERSE: tl.constexpr
    ENTROPY: tl.constexpr
    IS_KL: tl.constexpr  # needs neither value nor slope
    value: tl.constexpr
    slope: tl.constexpr


class Divergence(NamedTuple):
    """See Functions of divergences.py."""

    value: tl.constexpr
    slope: tl.constexpr
    far: Far | None  # None: no row is far
    a: tl.tensor
    b: tl.tensor
    PARAMETERS: tl.constexpr
    SLOPE_SUMS_TO_ZERO: tl.constexpr
    FEELS_SHIFT: tl.constexpr
    SLOPES_CANCEL: tl.constexpr


class Wanted(NamedTuple):
    """Which terms and outputs a call has."""

    DIVERGENCE: tl.constexpr  # evaluated, for the loss or the metrics
    CROSS_ENTROPY: tl.constexpr  # likewise
    METRICS: tl.constexpr
    GRADIENT: tl.constexpr
    KD_GRADIENT: tl.constexpr
    CE_GRADIENT: tl.constexpr
    ROW_SCALE: tl.constexpr  # the gradient is float16


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


class RowPair(NamedTuple):
    """The whole of it.

    Neither it nor a struct in it is assigned to a name: Triton would make tensors of what is known
    when a kernel is compiled.
    """

    student: Logits
    teacher: Logits
    gradient: Rows | None  # out, may be the student's
    per_row: PerRow
    vocab: tl.tensor
    end: tl.tensor  # of columns that are there to be read, at or after that of the vocabulary
    weights: Weights
    divergence: Divergence
    wanted: Wanted
    PADDED: tl.constexpr  # the two ends differ: 16 divides this one only, see launch.end_of
    ALIGNED: tl.constexpr  # a thread's columns lie side by side, see launch.aligned
    BLOCK: tl.constexpr  # columns that a program holds at a time
    FOLD: tl.constexpr  # of them what a thread loads at once, and adds up before it adds to a sum
