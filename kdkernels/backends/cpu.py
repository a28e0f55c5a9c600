"""The compiled CPU backend: addresses and strides of tensors for ``kdkernels._C``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..divergences import DIVERGENCES, Divergence
from ..options import METRICS, REDUCTIONS, LogitsOptions

try:
    from .. import _C
except ImportError as error:  # a source tree that was not built
    _missing = str(error)
else:
    _missing = ""

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KERNEL = {name: index for index, name in enumerate(DIVERGENCES)}


def why_not(student: Tensor, teacher: Tensor, divergence: Divergence) -> list[str]:
    """Why this backend cannot serve a call; empty if it can."""
    reasons = []
    if _missing:
        reasons.append(f"the extension kdkernels._C is not built ({_missing})")
    if student.device.type != "cpu":
        reasons.append(f"the tensors are on {student.device}")
    for name, tensor in (("student_logits", student), ("teacher_logits", teacher)):
        if tensor.dtype not in DTYPES:
            reasons.append(f"{name} is {tensor.dtype}, it takes float32, bfloat16 or float16")
    # By type: a subclass of a built-in divergence may define another value.
    if DIVERGENCES.get(divergence.name) is not type(divergence):
        reasons.append(f"divergence {type(divergence).__name__} is not compiled")
    return reasons


def _leading(tensor: Tensor) -> list[tuple[int, int]]:
    """Leading dimensions as (size, stride), outermost first, merged where they lie end to end."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _in_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows do not lie at two strides."""
    if tensor.is_contiguous() or len(_leading(tensor)) <= 2:
        return tensor
    return tensor.contiguous()


def _rows(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """Address, dtype, width, inner size, outer stride and inner stride: csrc/core/params.h."""
    head = tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape[-1]
    if tensor.is_contiguous():
        return (*head, max(1, tensor.numel() // max(1, tensor.shape[-1])), 0, tensor.shape[-1])
    (_, outer), (inner_size, inner) = [(1, 0), (1, 0), *_leading(tensor)][-2:]
    return (*head, max(1, inner_size), outer, inner)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _gradient_scale(o: LogitsOptions) -> float:
    """The power of two that puts a float16 gradient's largest entries near 2**12.

    An entry is at most 2 |kd_weight| / temperature + |ce_weight| times the scale where slopes are
    below 1; the kernel lowers a row's power for larger ones, and 2**4 is left for what it misses.
    """
    bound = (2 * abs(o.kd_weight) / o.temperature + abs(o.ce_weight)) * o.student_scale
    return math.ldexp(1.0, max(-100, min(100, 12 - math.frexp(bound)[1]))) if bound else 1.0


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    o: LogitsOptions,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and row scales; the gradient, if any, is written into ``gradient``."""
    lead = student.shape[:-1]
    rows = math.prod(lead)
    in_rows = _in_rows(student)
    if gradient is student and in_rows is not student:
        raise ValueError(
            f"inplace_grad: student_logits of shape {tuple(student.shape)} and strides "
            f"{student.stride()} do not lie in rows at two strides; make them contiguous"
        )
    teacher = _in_rows(teacher)
    with_scale = gradient is not None and gradient.dtype == torch.float16
    gradient_scale = _gradient_scale(o) if with_scale else 1.0
    loss = torch.empty(lead if o.reduction == "none" else ())
    metrics = torch.empty((len(METRICS), *lead) if o.metrics else 0)
    row_scale = torch.empty(lead if with_scale else 0)
    labels = None if labels is None else labels.contiguous()
    token_weight = None if token_weight is None else token_weight.contiguous()
    _C.logits_cpu(
        rows,
        o.vocab,
        _rows(in_rows),
        _rows(teacher),
        None if gradient is None else _rows(gradient),
        _KERNEL[o.divergence],
        o.parameter_0,
        o.parameter_1,
        o.temperature,
        o.student_scale,
        o.student_softcap,
        o.teacher_scale,
        o.teacher_softcap,
        o.kd_weight,
        o.ce_weight,
        _address(labels),
        o.ignore_index,
        _address(token_weight),
        REDUCTIONS.index(o.reduction),
        _address(normalizer),
        gradient_scale,
        _address(row_scale),
        loss.data_ptr(),
        _address(metrics),
        torch.get_num_threads(),
    )
    return loss, metrics, row_scale


def scale_gradient(gradient: Tensor, grad_output: Tensor, row_scale: Tensor) -> None:
    """gradient *= grad_output * row_scale, in place; one number or one per row each."""
    per_row = grad_output.dim() > 0
    _C.scale_cpu(
        math.prod(gradient.shape[:-1]),
        _rows(gradient),
        grad_output.data_ptr(),
        1 if per_row else 0,
        _address(row_scale),
        torch.get_num_threads(),
    )
