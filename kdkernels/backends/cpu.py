"""The compiled CPU backend: addresses and strides of tensors for ``kdkernels._C``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergences import Divergence
from ..extension import _C, missing
from ..options import METRICS, LogitsOptions, TailOptions
from .rows import (
    address,
    extension_refusals,
    has_row_scale,
    logits_params,
    scale_params,
    shard_params,
    tail_params,
)

_CPU = torch.device("cpu")


def why_not(student: Tensor, teacher: Tensor, divergence: Divergence) -> list[str]:
    """Why this backend cannot serve a call; empty if it can."""
    reasons = [missing] if missing else []
    if not student.is_cpu:
        reasons.append(f"the tensors are on {student.device}")
    return reasons + extension_refusals(student, teacher, divergence)


def logits_loss(
    student: Tensor,  # (..., width), in rows
    teacher: Tensor,  # (..., width), in rows
    labels: Tensor | None,  # (...), contiguous
    token_weight: Tensor | None,  # (...), contiguous
    normalizer: Tensor | None,  # ()
    o: LogitsOptions,
    gradient: Tensor | None,  # (..., width), may be the student
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, metrics and row scales; the gradient, if any, is written into ``gradient``."""
    lead = student.shape[:-1]
    loss = _floats(lead) if o.reduction == "none" else _float()
    metrics = _floats((len(METRICS), *lead)) if o.metrics else None
    row_scale = _floats(lead) if has_row_scale(gradient) else None
    params = logits_params(
        student,
        teacher,
        labels,
        token_weight,
        normalizer,
        o,
        gradient,
        row_scale,
        loss,
        metrics,
        o.reduction,
    )
    _C.logits_cpu(params, torch.get_num_threads())
    return loss, metrics, row_scale


def shard(
    phase: str,
    student: Tensor,  # (..., width), in rows
    teacher: Tensor,  # (..., width), in rows
    labels: Tensor | None,  # (...), contiguous
    weight: Tensor,  # (...), contiguous
    states: Tensor,  # (rows, 8) float64, contiguous
    sums: Tensor | None,  # (rows, 6) float64, contiguous
    o: LogitsOptions,
    gradient: Tensor | None,  # (..., width)
    row_scale: Tensor | None,  # (...)
) -> bool:
    """Runs one phase of a shard of the vocabulary; returns whether it wrote the gradient.

    See ``ShardParams`` of csrc/core/params.h.
    """
    tensors = student, teacher, labels, weight, states, sums
    params = shard_params(phase, *tensors, o, gradient, row_scale)
    return _C.shard_cpu(params, torch.get_num_threads())


def _floats(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised float32 on the CPU, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device=_CPU)


def _float() -> Tensor:
    """The same for a single number, faster."""
    return torch.empty_strided((), (), dtype=torch.float32, device=_CPU)


def tails(
    student: Tensor,  # (..., vocab), in rows
    listed: Tensor,  # (..., m), contiguous
    kept: Tensor | None,  # (...), contiguous
    o: TailOptions,
) -> Tensor:
    """References and log-sum-exps ``(o.results, ...)`` of the columns that are not listed."""
    result = _floats((o.results, *student.shape[:-1]))
    params = tail_params(student, listed, kept, o, result)
    _C.tail_cpu(params, torch.get_num_threads())
    return result


def tails_gradient(
    student: Tensor,  # (..., vocab), in rows
    listed: Tensor,  # (..., m), contiguous as all below
    tails: Tensor,  # (o.results, ...)
    grad_tails: Tensor,  # (o.results - 1, ...)
    grad_listed: Tensor,  # (..., m)
    o: TailOptions,
    gradient: Tensor,  # (..., vocab), may be the student
) -> None:
    """The gradient of the log-sum-exps and of the listed logits, written into ``gradient``."""
    gradients = gradient, grad_tails, grad_listed
    params = tail_params(student, listed, None, o, tails, gradients)
    _C.tail_cpu(params, torch.get_num_threads())


def scale_gradient(gradient: Tensor, grad_output: Tensor, row_scale: Tensor | None) -> None:
    """gradient *= grad_output * row_scale, in place; one number or one per row each."""
    if grad_output.dim() == 0 and not address(row_scale) and grad_output.item() == 1:
        return
    _C.scale_cpu(scale_params(gradient, grad_output, row_scale), torch.get_num_threads())
