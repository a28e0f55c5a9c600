"""Distillation of hidden states and an LM head from a sparse teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import checks, collectives, linear, linear_checks, scalars
from .divergences import Divergence, as_divergence
from .linear_tail import LinearStudent
from .options import LinearOptions, Metrics
from .sparse import loss_of
from .sparse_entries import check_entries, check_tail
from .tail import LogitsStudent, Student

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .keywords import LinearSparseKDKeywords


@overload
def linear_sparse_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_metrics: Literal[False] = ...,
    **keywords: Unpack[LinearSparseKDKeywords],
) -> Tensor: ...


@overload
def linear_sparse_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_metrics: Literal[True],
    **keywords: Unpack[LinearSparseKDKeywords],
) -> tuple[Tensor, Metrics]: ...


@overload
def linear_sparse_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_metrics: bool,
    **keywords: Unpack[LinearSparseKDKeywords],
) -> Tensor | tuple[Tensor, Metrics]: ...


def linear_sparse_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    student_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    tail: str = "bucket",
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    temperature_squared: bool = True,
    vocab_size: int | None = None,
    student_scale: float = 1.0,
    student_softcap: float | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Metrics]:
    """:func:`kdkernels.sparse_kd_loss` for an LM head: logits exist only for some rows at a time.

    Computes ``sparse_kd_loss(F.linear(student_hidden, student_weight, student_bias),
    teacher_indices, teacher_logprobs, ...)``. Logits are computed for blocks of rows, in the
    forward and again in the backward: four matrix products in all, of which the forward takes one.
    Between the two, nothing larger than the teacher's lists is kept.

    Args:
        student_hidden: ``(..., hidden)``, float32, bfloat16 or float16 (float64 runs on the
            reference backend).
        student_weight: ``(vocab, hidden)``; no work is done for a gradient that is not needed.
            Sequences of hidden states and weights mean the sum of their products. The backward
            reads it again. A head that is sharded outside its module's call is reached through
            :class:`kdkernels.LinearSparseKDHead`.
        teacher_indices: ``(..., k)``, see :func:`kdkernels.sparse_kd_loss`.
        teacher_logprobs: ``(..., k)``, likewise.
        student_bias: ``(vocab,)``.
        chunk_bytes, logits_dtype: see :func:`kdkernels.linear_kd_loss`.
        tail, divergence, labels, ...: the other options of :func:`kdkernels.sparse_kd_loss`.
        token_weight: likewise. On a CPU rows of weight 0 and ignored ones cost nothing; on a GPU
            finding them would wait for the device: leave them out of all arguments there.
        group: likewise. Weights and bias hold this process's rows of the head; hidden states are
            the same everywhere, and their gradient is summed over the group.
        backend: likewise; ``"reference"`` computes all logits at once.

    Returns:
        As :func:`kdkernels.sparse_kd_loss`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, or a backend that cannot serve the call.
        RuntimeError: with ``create_graph``.

    Example:
        >>> import torch
        >>> from kdkernels import linear_sparse_kd_loss
        >>> head = torch.eye(3, 2).requires_grad_()
        >>> hidden = torch.tensor([[2.0, 1.0]])
        >>> indices, logprobs = torch.tensor([[1]]), torch.tensor([[0.665]]).log()
        >>> loss = linear_sparse_kd_loss(hidden, head, indices, logprobs)
        >>> loss.backward()
        >>> round(loss.item(), 4), head.grad.shape
        (0.3924, torch.Size([3, 2]))
    """
    hidden, weight = linear_checks.terms(student_hidden), linear_checks.terms(student_weight)
    lead, _ = linear_checks.check_student(hidden, weight, student_bias)
    check_entries("student_hidden", hidden[0], teacher_indices, teacher_logprobs)
    divergence = as_divergence(divergence)
    check_tail(tail, divergence)
    chunk_bytes = scalars.option("chunk_bytes", chunk_bytes)
    dtype = linear_checks.product_dtype(weight[0])
    linear_checks.check_logits_dtype(logits_dtype, dtype)
    like = weight[0].new_empty(0, weight[0].shape[0], dtype=logits_dtype or dtype)
    call = checks.call(
        like,
        None,
        lead,
        divergence=divergence,
        temperature=temperature,
        labels=labels,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        normalizer=normalizer,
        temperature_squared=temperature_squared,
        vocab_size=vocab_size,
        student_scale=student_scale,
        student_softcap=student_softcap,
        return_metrics=return_metrics,
        backend=backend,
        group=group,
        vocab_start=vocab_start,
    )
    hidden = [collectives.summed_in_backward(h, call.options) for h in hidden]
    student: Student
    if call.backend == "reference":
        logits = linear.logits_of(hidden, weight, student_bias, logits_dtype)
        student = LogitsStudent(logits, False, "reference")
    else:
        wide = logits_dtype is not None
        options = LinearOptions(dtype, dtype, wide, chunk_bytes, call.backend)
        student = LinearStudent(hidden, weight, student_bias, options)
    return loss_of(student, teacher_indices, teacher_logprobs, labels, call, tail)
