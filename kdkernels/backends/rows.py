"""Tensors as kernels see them: addresses, and rows at two strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..divergences import DIVERGENCES, Divergence, is_built_in
from ..memory import dense_strides
from ..options import REDUCTIONS, SHARD_PHASES, LogitsOptions, TailOptions

if TYPE_CHECKING:
    from .._C import LogitsParams, Rows, ScaleParams, ShardParams, TailParams

#: Dtypes that compiled backends take, as numbered by csrc/core/params.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Divergences of ``kdkernels._C``, as numbered by csrc/core/divergences.h.
_KERNELS = {name: index for index, name in enumerate(DIVERGENCES)}


def dtype_refusals(student: Tensor, teacher: Tensor) -> list[str]:
    """Why compiled backends cannot read the logits; empty if they can."""
    return [
        f"{name} is {tensor.dtype}, it takes float32 (pass {name}.float()), bfloat16 or float16"
        for name, tensor in (("student_logits", student), ("teacher_logits", teacher))
        if tensor.dtype not in DTYPES
    ]


def extension_refusals(student: Tensor, teacher: Tensor, divergence: Divergence) -> list[str]:
    """Why ``kdkernels._C`` cannot serve a call on any device; empty if it can."""
    reasons = dtype_refusals(student, teacher)
    if not is_built_in(divergence):
        reasons.append(f"divergence {type(divergence).__name__} is not compiled")
    return reasons


def _leading(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, outermost first, merged where one stride serves."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _in_two_strides(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or len(_leading(tensor.shape, tensor.stride())) <= 2


def in_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows are not contiguous or do not lie at two strides.

    Autograd's tensors of zeros, whose stride is 0, turn up in operators only.
    """
    fits = tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    return tensor if fits and _in_two_strides(tensor) else tensor.contiguous()


def gradient_like(
    student: Tensor, empty_strided: Callable[..., Tensor] = torch.empty_strided
) -> Tensor:
    """Memory for the gradient, its rows as far apart as the student's modulo 16 entries.

    CUDA kernels move 16 bytes at a time where the rows of student, teacher and gradient have the
    same alignment, Triton's where all strides are multiples of 16. At an odd vocabulary those of
    ``logits[:, :-1]`` or ``logits[..., :vocab]`` and of a contiguous tensor differ; a few unused
    entries between the gradient's rows mend that. A dense student's strides are kept. The storage
    offset is ignored, as tensors lose it under torch.compile.
    """
    strides = _congruent_strides(student)
    return empty_strided(student.shape, strides, dtype=student.dtype, device=student.device)


def _congruent_strides(student: Tensor) -> Sequence[int]:
    if student.is_contiguous():  # as what is empty is
        return student.stride()
    strides, extent = [1] * student.dim(), student.shape[-1]
    inner_first = sorted(range(student.dim() - 1), key=lambda i: (student.stride(i), -i))
    for i in inner_first:
        strides[i] = extent + (student.stride(i) - extent) % 16
        extent += strides[i] * (student.shape[i] - 1)
    in_two = len(_leading(student.shape, strides)) <= 2
    return strides if in_two else dense_strides(student.shape)


def check_in_place(student: Tensor) -> None:
    """Raises where a gradient cannot be written over the rows: they overlap, or would be copied."""
    extent = 1  # of the dimensions inside the one looked at
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"inplace_grad: student_logits of shape {tuple(student.shape)} and strides "
                    f"{student.stride()} overlap themselves; pass a tensor of their own"
                )
            extent = stride * (size - 1) + extent
    if not _in_two_strides(student):
        raise ValueError(
            f"inplace_grad: student_logits of shape {tuple(student.shape)} and strides "
            f"{student.stride()} do not lie in rows at two strides; make them contiguous"
        )


def row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Inner size, outer stride and inner stride: row = outer * inner size + inner."""
    if tensor.is_contiguous():
        width = tensor.shape[-1]
        return max(1, tensor.numel() // width), 0, width
    leading = _leading(tensor.shape, tensor.stride())
    (_, outer), (inner_size, inner) = [(1, 0), (1, 0), *leading][-2:]
    return inner_size, outer, inner


def rows_of(tensor: Tensor) -> Rows:
    """Address, dtype, width and row strides, the fields of Rows in csrc/core/params.h."""
    inner_size, outer, inner = row_strides(tensor)
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape[-1], inner_size, outer, inner


def address(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def has_row_scale(gradient: Tensor | None) -> bool:
    """Whether each row of the gradient is stored times a power of two of its own: float16."""
    return gradient is not None and gradient.dtype == torch.float16


def gradient_scale(o: LogitsOptions) -> float:
    """The power of two that puts a float16 gradient's largest entries near 2**12.

    An entry is at most 2 |kd_weight| / temperature + |ce_weight| times the scale where slopes are
    below 1; the kernel lowers a row's power for larger ones, and 2**4 is left for what it misses.
    """
    bound = (2 * abs(o.kd_weight) / o.temperature + abs(o.ce_weight)) * o.student_scale
    return math.ldexp(1.0, max(-100, min(100, 12 - math.frexp(bound)[1]))) if bound else 1.0


def logits_params(
    student: Tensor,  # (..., width), in rows
    teacher: Tensor,  # (..., width), in rows
    labels: Tensor | None,  # (...) int64, contiguous
    token_weight: Tensor | None,  # (...) float32, contiguous
    normalizer: Tensor | None,  # () float32
    o: LogitsOptions,
    gradient: Tensor | None,  # (..., width)
    row_scale: Tensor | None,  # (...) float32
    loss: Tensor | None,  # (...) or () float32
    metrics: Tensor | None,  # (5, ...) float32
    reduction: str = "none",
) -> LogitsParams:
    """The fields of LogitsParams, see csrc/core/params.h."""
    scale = address(row_scale)
    return (
        math.prod(student.shape[:-1]),
        o.vocab,
        rows_of(student),
        rows_of(teacher),
        None if gradient is None else rows_of(gradient),
        _KERNELS[o.divergence],
        o.parameter_0,
        o.parameter_1,
        o.temperature,
        o.student_scale,
        o.student_softcap,
        o.teacher_scale,
        o.teacher_softcap,
        o.kd_weight,
        o.ce_weight,
        address(labels),
        o.ignore_index,
        address(token_weight),
        REDUCTIONS.index(reduction),
        address(normalizer),
        gradient_scale(o) if scale else 1.0,
        scale,
        address(loss),
        address(metrics),
    )


def shard_params(
    phase: str,
    student: Tensor,  # (..., width), in rows
    teacher: Tensor,  # (..., width), in rows
    labels: Tensor | None,  # (...) int64, contiguous
    weight: Tensor,  # (...) float32, contiguous
    states: Tensor,  # (rows, 8) float64, contiguous
    sums: Tensor | None,  # (rows, 6) float64, contiguous
    o: LogitsOptions,
    gradient: Tensor | None,  # (..., width)
    row_scale: Tensor | None,  # (...) float32
) -> ShardParams:
    """The fields of ShardParams, see csrc/core/params.h."""
    rows = student, teacher, labels, weight
    return (
        logits_params(*rows, None, o, gradient, row_scale, None, None),
        SHARD_PHASES.index(phase),
        o.metrics,
        address(states),
        address(sums),
    )


def tail_params(
    student: Tensor,  # (..., vocab), in rows
    listed: Tensor,  # (..., m) int64, contiguous
    kept: Tensor | None,  # (...) bool
    o: TailOptions,
    tails: Tensor,  # (o.results, ...)
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,  # out, of tails, of what is listed
) -> TailParams:
    """The fields of TailParams, see csrc/core/params.h."""
    gradient, grad_tails, grad_listed = gradients or (None, None, None)
    return (
        math.prod(student.shape[:-1]),
        o.vocab,
        rows_of(student),
        None if gradient is None else rows_of(gradient),
        o.scale,
        o.softcap,
        o.temperature,
        o.at_1,
        address(listed),
        listed.shape[-1],
        address(kept),
        address(tails),
        address(grad_tails),
        address(grad_listed),
    )


def scale_params(
    gradient: Tensor,  # (..., width)
    grad_output: Tensor,  # (...) or () float32
    row_scale: Tensor | None,  # (...) float32
) -> ScaleParams:
    """The fields of ScaleParams, see csrc/core/params.h."""
    return (
        math.prod(gradient.shape[:-1]),
        rows_of(gradient),
        grad_output.data_ptr(),
        1 if grad_output.dim() > 0 else 0,
        address(row_scale),
    )
