"""From tensors and options to kernel launches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..backends.row_plan import row_plan
from ..backends.rows import gradient_scale, row_strides
from ..divergences import REGISTERED, SoftCrossEntropy, kl_weights
from ..options import SHARD_PHASES, LogitsOptions, TailOptions
from . import schedule
from .divergences import FUNCTIONS, Functions
from .row_pair import (
    AS_IS,
    SCALED,
    SOFTCAPPED,
    Divergence,
    Far,
    Logits,
    PerRow,
    RowPair,
    Rows,
    Wanted,
    Weights,
)
from .rows import loss_kernel, scale_kernel
from .shard import Records, shard_kernel
from .tail import Listed, tails_gradient_kernel, tails_kernel


def _rows(tensor: Tensor) -> Rows:
    inner_size, outer, inner = row_strides(tensor)
    if tensor.numel() == inner_size * tensor.shape[-1]:
        # All rows lie at one stride: a size of 1 is compiled in, that of a batch now and then.
        inner_size, outer, inner = 1, inner, 0
    return Rows(tensor, tensor.shape[-1], inner_size, outer, inner)


def aligned(rows: Rows) -> bool:
    """Whether Triton sees that rows begin at multiples of 16, in entries and in bytes.

    It gives a thread columns side by side then, and otherwise columns that lie apart.
    """
    begins = rows.pointer.data_ptr(), rows.outer_stride, rows.inner_stride
    return all(begin % 16 == 0 for begin in begins)


def end_of(vocab: int, tensors: Iterable[Rows]) -> int:
    """The next multiple of 16 where all rows are that wide: Triton loads 16 bytes at once then."""
    end = -(-vocab // 16) * 16
    return end if all(end <= rows.width for rows in tensors) else vocab


def _logits(tensor: Tensor, scale: float, softcap: float) -> Logits:
    kind = SOFTCAPPED if softcap else SCALED if scale != 1 else AS_IS
    return Logits(_rows(tensor), scale, softcap, kind)


def _far(functions: Functions, o: LogitsOptions, *, of_shard: bool) -> Far | None:
    """None where no row can be far."""
    threshold = functions.far_from(o.parameter_0, o.parameter_1)
    weights = kl_weights(o.divergence, o.parameter_0)
    if o.kd_weight == 0 or math.isinf(threshold):
        return None
    if weights is None and (functions.far_value is None or of_shard):
        return None
    forward, reverse = weights or (1.0, 0.0)
    kl_from = functions.kl_from or functions.far_from
    return Far(
        threshold,
        kl_from(o.parameter_0, o.parameter_1),
        forward,
        reverse,
        tl.constexpr(forward != 0),
        tl.constexpr(reverse != 0),
        tl.constexpr(o.divergence == SoftCrossEntropy.name),
        tl.constexpr(weights is not None),
        # No None: Triton up to 3.6 could not compare the whole with None then.
        functions.far_value or functions.value,
        functions.far_slope or functions.slope,
    )


def _divergence(o: LogitsOptions, *, of_shard: bool = False) -> Divergence:
    functions = FUNCTIONS.get(o.divergence)
    if functions is None:
        registered = REGISTERED[o.divergence]
        functions = Functions(registered.value, registered.slope)
    return Divergence(
        functions.value,
        functions.slope,
        _far(functions, o, of_shard=of_shard),
        o.parameter_0,
        o.parameter_1,
        tl.constexpr(functions.parameters),
        tl.constexpr(functions.slope_sums_to_zero),
        tl.constexpr(functions.feels_shift),
        tl.constexpr(functions.slopes_cancel),
    )


def options_of(chosen: schedule.Schedule) -> dict[str, Any]:
    """How a kernel is compiled."""
    limit = {"maxnreg": chosen.registers} if chosen.registers else {}
    return {"num_warps": chosen.num_warps, "enable_fp_fusion": True, **limit}


def _on(tensor: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


class Call(NamedTuple):
    """Tensors and options of one call; what is not wanted is None."""

    student: Tensor  # (..., vocab_s)
    teacher: Tensor  # (..., vocab_t)
    gradient: Tensor | None  # (..., vocab_s), out, may be the student
    labels: Tensor | None  # (...), contiguous
    token_weight: Tensor | None  # (...), contiguous
    normalizer: Tensor | None  # ()
    row_loss: Tensor  # (...), out: with all weights
    row_scale: Tensor | None  # (...), out
    metrics: Tensor | None  # (5, ...), out
    options: LogitsOptions


class ShardCall(NamedTuple):
    """Tensors and options of one phase of a shard of the vocabulary."""

    phase: str  # of SHARD_PHASES
    student: Tensor  # (..., width_s)
    teacher: Tensor  # (..., width_t)
    gradient: Tensor | None  # (..., width_s), out of the phase that can, may be the student
    labels: Tensor | None  # (...), columns of the shard, negative where another has them
    weight: Tensor  # (...)
    states: Tensor  # (rows, 8)
    sums: Tensor | None  # (rows, 6)
    row_scale: Tensor | None  # (...), out with the gradient
    options: LogitsOptions

    @property
    def writes_gradient(self) -> bool:
        """Whether it is this phase that does."""
        if self.gradient is None or self.phase == "states":
            return False
        if self.phase == "gradient":
            return True
        divergence = _divergence(self.options, of_shard=True)
        return self.options.kd_weight != 0 and divergence.SLOPE_SUMS_TO_ZERO.value


def _wanted(call: Call | ShardCall, *, metrics: bool, gradient: bool) -> Wanted:
    o = call.options
    return Wanted(
        DIVERGENCE=tl.constexpr(o.kd_weight != 0 or o.metrics),
        CROSS_ENTROPY=tl.constexpr(call.labels is not None and (o.ce_weight != 0 or o.metrics)),
        METRICS=tl.constexpr(metrics),
        GRADIENT=tl.constexpr(gradient),
        KD_GRADIENT=tl.constexpr(gradient and o.kd_weight != 0),
        CE_GRADIENT=tl.constexpr(gradient and o.ce_weight != 0),
        ROW_SCALE=tl.constexpr(gradient and call.row_scale is not None),
    )


def schedule_of(
    call: Call | ShardCall, side_by_side: bool, device: schedule.Device
) -> schedule.Schedule:
    """How the programs of a call walk its rows."""
    o = call.options
    pair_bytes = o.vocab * (call.student.element_size() + call.teacher.element_size())
    functions = FUNCTIONS.get(o.divergence)
    lean = functions is not None and functions.lean
    cross_entropy = call.labels is not None and o.ce_weight != 0
    rare = o.metrics or o.student_softcap or o.teacher_softcap or (cross_entropy and not lean)
    plain = functions is not None and not functions.feels_shift and not rare
    return schedule.choose(o.vocab, pair_bytes, plain, plain and lean and side_by_side, device)


def _row_pair(
    call: Call | ShardCall,
    per_row: PerRow,
    weights: Weights,
    divergence: Divergence,
    wanted: Wanted,
    device: schedule.Device,
) -> tuple[RowPair, dict[str, Any]]:
    """A row pair as the kernels take it, and their options."""
    o = call.options
    student = _logits(call.student, o.student_scale, o.student_softcap)
    teacher = _logits(call.teacher, o.teacher_scale, o.teacher_softcap)
    gradient = None if call.gradient is None else _rows(call.gradient)
    tensors = [x for x in (student.rows, teacher.rows, gradient) if x is not None]
    side_by_side = all(map(aligned, tensors))
    end = end_of(o.vocab, tensors) if side_by_side else o.vocab
    chosen = schedule_of(call, side_by_side, device)
    of_student, of_teacher = call.student.element_size(), call.teacher.element_size()
    pair = RowPair(
        student,
        teacher,
        gradient,
        per_row,
        o.vocab,
        end,
        weights,
        divergence,
        wanted,
        tl.constexpr(end != o.vocab),
        tl.constexpr(side_by_side),
        tl.constexpr(chosen.block),
        tl.constexpr(min(chosen.entries, 16 // max(of_student, of_teacher))),
    )
    return pair, options_of(chosen)


def arguments_of(call: Call, device: schedule.Device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``loss_kernel`` takes, and its options."""
    o = call.options
    rows = call.row_loss.numel()
    plan = row_plan(call.labels, call.token_weight, call.normalizer, o, rows)
    gradient_factor = 1.0 if call.row_scale is None else gradient_scale(o)
    pair, options = _row_pair(
        call,
        PerRow(
            call.labels,
            plan.weight,
            plan.normalizer,
            call.row_loss,
            call.row_scale,
            call.metrics,
        ),
        Weights(o.temperature, o.kd_weight, o.ce_weight, plan.divisor, gradient_factor),
        _divergence(o),
        _wanted(call, metrics=o.metrics, gradient=call.gradient is not None),
        device,
    )
    return (pair, rows), options


def loss(call: Call) -> None:
    """Every row's loss, with all its weights, and what else is wanted."""
    rows = call.row_loss.numel()
    if rows == 0:
        return
    arguments, options = arguments_of(call, schedule.device_of(call.student.device))
    with _on(call.student):
        loss_kernel[(rows,)](*arguments, **options)


def arguments_of_shard(
    call: ShardCall, device: schedule.Device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``shard_kernel`` takes, and its options."""
    o = call.options
    metrics = o.metrics and call.phase == "sums"
    gradient = call.gradient is not None and call.phase != "states"
    gradient_factor = 1.0 if call.row_scale is None else gradient_scale(o)
    pair, options = _row_pair(
        call,
        PerRow(call.labels, call.weight, None, None, call.row_scale, None),
        Weights(o.temperature, o.kd_weight, o.ce_weight, 1.0, gradient_factor),
        _divergence(o, of_shard=True),
        _wanted(call, metrics=metrics, gradient=gradient),
        device,
    )
    records = Records(call.states, call.sums)
    return (pair, records, SHARD_PHASES.index(call.phase), call.writes_gradient), options


def shard(call: ShardCall) -> bool:
    """One phase of a shard; whether it wrote the gradient."""
    arguments, options = arguments_of_shard(call, schedule.device_of(call.student.device))
    with _on(call.student):
        shard_kernel[(call.weight.numel(),)](*arguments, **options)
    return call.writes_gradient


def schedule_of_scaling(gradient: Tensor, device: schedule.Device) -> schedule.Schedule:
    """How programs walk the rows of a gradient."""
    width = gradient.shape[-1]
    many = aligned(_rows(gradient))
    return schedule.choose(width, width * gradient.element_size(), True, many, device)


def arguments_of_scaling(
    gradient: Tensor, grad_output: Tensor, row_scale: Tensor | None
) -> tuple[Any, ...]:
    """What ``scale_kernel`` takes before its options."""
    rows = math.prod(gradient.shape[:-1])
    per_row = grad_output.dim() > 0
    return _rows(gradient), grad_output, row_scale, rows, per_row


def scale(gradient: Tensor, grad_output: Tensor, row_scale: Tensor | None) -> None:
    """gradient *= grad_output * row_scale, in place; grad_output is () or (...)."""
    if gradient.numel() == 0:
        return
    rows = math.prod(gradient.shape[:-1])
    chosen = schedule_of_scaling(gradient, schedule.device_of(gradient.device))
    with _on(gradient):
        scale_kernel[(min(rows, schedule.SCALING_PROGRAMS),)](
            *arguments_of_scaling(gradient, grad_output, row_scale),
            chosen.block,
            **options_of(chosen),
        )


def schedule_of_tails(
    student: Tensor, o: TailOptions, device: schedule.Device
) -> schedule.Schedule:
    """How programs walk the rows of a sparse teacher's student."""
    row_bytes = o.vocab * student.element_size()
    return schedule.choose(o.vocab, row_bytes, True, aligned(_rows(student)), device)


def arguments_of_tails(
    student: Tensor,  # (..., vocab)
    listed: Tensor,  # (..., m) int64
    between: tuple[Any, ...],
    o: TailOptions,
) -> tuple[Any, ...]:
    """What both kernels of a sparse teacher take before their options."""
    return (
        _logits(student, o.scale, o.softcap),
        Listed(listed, listed.shape[-1]),
        *between,
        math.prod(student.shape[:-1]),
        o.vocab,
        o.temperature,
        tl.constexpr(o.at_1),
    )


def _launch_of_tails(
    kernel: Any, student: Tensor, listed: Tensor, between: tuple[Any, ...], o: TailOptions
) -> None:
    rows = math.prod(student.shape[:-1])
    if rows == 0:
        return
    chosen = schedule_of_tails(student, o, schedule.device_of(student.device))
    with _on(student):
        arguments = arguments_of_tails(student, listed, between, o)
        kernel[(rows,)](*arguments, chosen.block, **options_of(chosen))


def tails(
    student: Tensor, listed: Tensor, kept: Tensor | None, o: TailOptions, result: Tensor
) -> None:
    """Log-sum-exps of the columns that are not listed, into ``result``, (o.results, ...)."""
    _launch_of_tails(tails_kernel, student, listed, (kept, result), o)


def tails_gradient(
    student: Tensor,
    gradient: Tensor,
    listed: Tensor,
    tails: Tensor,
    grad_tails: Tensor,
    grad_listed: Tensor,
    o: TailOptions,
) -> None:
    """Their gradient, and that of the listed columns, into ``gradient``."""
    between = _rows(gradient), tails, grad_tails, grad_listed
    _launch_of_tails(tails_gradient_kernel, student, listed, between, o)
