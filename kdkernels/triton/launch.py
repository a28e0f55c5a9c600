"""From tensors and options to kernel launches."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..backends.device import row_plan
from ..backends.rows import gradient_scale, row_strides
from ..divergences import REGISTERED
from ..options import LogitsOptions
from . import schedule
from .divergences import FUNCTIONS, Functions
from .rows import PerRow, Weights, loss_kernel, scale_kernel
from .sweeps import AS_IS, SCALED, SOFTCAPPED, Divergence, Logits, Rows, Wanted


def _rows(tensor: Tensor) -> Rows:
    return Rows(tensor, tensor.shape[-1], *row_strides(tensor))


def _logits(tensor: Tensor, scale: float, softcap: float) -> Logits:
    kind = SOFTCAPPED if softcap else SCALED if scale != 1 else AS_IS
    return Logits(_rows(tensor), scale, softcap, kind)


def _divergence(o: LogitsOptions) -> Divergence:
    functions = FUNCTIONS.get(o.divergence)
    if functions is None:
        registered = REGISTERED[o.divergence]
        functions = Functions(registered.value, registered.slope)
    return Divergence(
        functions.value,
        functions.slope,
        o.parameter_0,
        o.parameter_1,
        tl.constexpr(functions.parameters),
        tl.constexpr(functions.slope_sums_to_zero),
        tl.constexpr(functions.feels_shift),
    )


def _options(chosen: schedule.Schedule) -> dict[str, Any]:
    limit = {"maxnreg": chosen.registers} if chosen.registers else {}
    return {
        "BLOCK": chosen.block,
        "num_warps": chosen.num_warps,
        "enable_fp_fusion": True,
        **limit,
    }


def _on(tensor: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be the tensor's."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return getattr(torch, tensor.device.type).device(tensor.device)


def loss_arguments(
    student: Tensor,  # (..., vocab_s)
    teacher: Tensor,  # (..., vocab_t)
    gradient: Tensor | None,  # (..., vocab_s), may be the student
    labels: Tensor | None,  # (...)
    token_weight: Tensor | None,  # (...)
    normalizer: Tensor | None,  # ()
    row_loss: Tensor,  # (...), out
    row_scale: Tensor | None,  # (...), out
    metrics: Tensor | None,  # (5, ...), out
    o: LogitsOptions,
    device: schedule.Device | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``loss_kernel`` takes to write every row's loss, with all its weights, and the rest.

    Kernels can be compiled for a ``device`` that is not here, from tensors without memory.
    """
    rows = math.prod(student.shape[:-1])
    plan = row_plan(labels, token_weight, normalizer, o, rows)
    weights = Weights(
        o.temperature,
        o.kd_weight,
        o.ce_weight,
        plan.divisor,
        1.0 if row_scale is None else gradient_scale(o),
    )
    wanted = Wanted(
        *(
            tl.constexpr(bool(flag))
            for flag in (
                o.kd_weight != 0 or o.metrics,
                labels is not None and (o.ce_weight != 0 or o.metrics),
                o.metrics,
                gradient is not None,
                gradient is not None and o.kd_weight != 0,
                gradient is not None and o.ce_weight != 0,
                row_scale is not None,
            )
        )
    )
    per_row = PerRow(
        None if labels is None else labels.contiguous(),
        plan.weight,
        plan.normalizer,
        row_loss,
        row_scale,
        metrics,
    )
    arguments = (
        _logits(student, o.student_scale, o.student_softcap),
        _logits(teacher, o.teacher_scale, o.teacher_softcap),
        None if gradient is None else _rows(gradient),
        per_row,
        rows,
        o.vocab,
        weights,
        _divergence(o),
        wanted,
    )
    pair_bytes = o.vocab * (student.element_size() + teacher.element_size())
    plain = (
        o.divergence in FUNCTIONS
        and not FUNCTIONS[o.divergence].feels_shift
        and labels is None
        and not (o.metrics or o.student_softcap or o.teacher_softcap)
    )
    device = device or schedule.device_of(student.device)
    chosen = schedule.choose(o.vocab, pair_bytes, plain, device)
    return arguments, _options(chosen)


def loss(*tensors_and_options: Any) -> None:
    """Launches ``loss_kernel`` for the arguments of ``loss_arguments``."""
    row_loss = tensors_and_options[6]
    if row_loss.numel() == 0:
        return
    arguments, options = loss_arguments(*tensors_and_options)
    with _on(row_loss):
        loss_kernel[(row_loss.numel(),)](*arguments, **options)


def scale(gradient: Tensor, grad_output: Tensor, row_scale: Tensor | None) -> None:
    """gradient *= grad_output * row_scale, in place; grad_output is () or (...)."""
    rows = math.prod(gradient.shape[:-1])
    if rows == 0:
        return
    width, device = gradient.shape[-1], schedule.device_of(gradient.device)
    options = _options(schedule.choose(width, width * gradient.element_size(), True, device))
    with _on(gradient):
        scale_kernel[(min(rows, schedule.SCALING_PROGRAMS),)](
            _rows(gradient),
            grad_output,
            row_scale,
            rows,
            PER_ROW=grad_output.dim() > 0,
            **options,
        )
