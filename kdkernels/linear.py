"""The fused-linear level: hidden states and LM heads in, loss and gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import autograd, checks, collectives, linear_checks, reference, scalars
from .divergences import Divergence
from .options import LinearOptions, Metrics, with_metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .keywords import LinearKDKeywords


@overload
def linear_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_hidden: Tensor | np.ndarray | None = ...,
    teacher_weight: Tensor | None = ...,
    *,
    return_metrics: Literal[False] = ...,
    **keywords: Unpack[LinearKDKeywords],
) -> Tensor: ...


@overload
def linear_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_hidden: Tensor | np.ndarray | None = ...,
    teacher_weight: Tensor | None = ...,
    *,
    return_metrics: Literal[True],
    **keywords: Unpack[LinearKDKeywords],
) -> tuple[Tensor, Metrics]: ...


@overload
def linear_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_hidden: Tensor | np.ndarray | None = ...,
    teacher_weight: Tensor | None = ...,
    *,
    return_metrics: bool,
    **keywords: Unpack[LinearKDKeywords],
) -> Tensor | tuple[Tensor, Metrics]: ...


def linear_kd_loss(
    student_hidden: Tensor | Sequence[Tensor],
    student_weight: Tensor | Sequence[Tensor],
    teacher_hidden: Tensor | np.ndarray | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | np.ndarray | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    row_index: Tensor | None = None,
    chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
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
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Metrics]:
    """Distillation loss between two LM heads; their logits never exist beyond a chunk of rows.

    Computes ``kd_loss(F.linear(student_hidden, student_weight, student_bias),
    F.linear(teacher_hidden, teacher_weight, teacher_bias), ...)``. The gradients of hidden states,
    weight and bias are computed in the forward: four matrix products in all. With
    ``reduction="none"`` the backward computes the two products of the logits again, since a weight
    gradient can't be weighted per token afterwards.

    Under autocast both heads run in its dtype, as :func:`torch.nn.functional.linear` does.

    Args:
        student_hidden: ``(..., hidden_s)``, float32, bfloat16 or float16 (float64 runs on the
            reference backend).
        student_weight: ``(vocab_s, hidden_s)``, such as ``model.lm_head.weight``. No work is done
            for its gradient where it needs none, nor for that of ``student_hidden``. Sequences of
            hidden states and weights mean the sum of their products, such as a frozen head and a
            low-rank adapter. A head that FSDP, DeepSpeed or an adapter wraps is best reached
            through :class:`kdkernels.LinearKDHead`.
        teacher_hidden: ``(..., hidden_t)``, the same leading shape; a tensor or NumPy array on the
            student's device or, also memory-mapped, on the host, from which it is streamed in
            blocks; float32, bfloat16, float16 or float64, cast to the weight's dtype. A constant,
            like all of the teacher: it must not require grad.
        teacher_weight: ``(vocab_t, hidden_t)``, on the student's device.
        teacher_logits: ``(..., vocab_t)`` instead of hidden states and weight, also on the host.
            A float64 teacher, NumPy's default, counts as float32 beside a student of another dtype,
            block by block.
        student_bias: ``(vocab_s,)``.
        teacher_bias: ``(vocab_t,)``.
        row_index: int64 ``(kept,)`` positions in the flattened leading shape, increasing; on the
            host. Other rows take no part, as if ignored, and cost nothing. Needed on GPUs only,
            where to find the rows that labels or weights mask would mean to wait for the device;
            on a CPU they are skipped anyway.
        chunk_bytes: what both models' logits may take at a time. Default: on a GPU 1 GiB; on a CPU
            a quarter of all of them, but at least 128 rows and at most 1 GiB. With a 16-bit weight
            whose gradient is needed, more than one chunk also takes ``4 * vocab_s * hidden_s``
            bytes for float32 sums; all of the student's logits are kept where that takes less.
        logits_dtype: ``torch.float32`` keeps the logits of 16-bit heads in float32, for a lower
            floor of the loss. Default: the dtype of the product. Not for float16.
        divergence, temperature, labels, ...: the other options of :func:`kdkernels.kd_loss`.
        group: as in :func:`kdkernels.kd_loss`. Weights and biases hold this process's rows of the
            heads, and ``teacher_logits`` its columns; hidden states are the same everywhere, and
            their gradient is summed over the group.
        backend: as in :func:`kdkernels.kd_loss`; ``"reference"`` computes all logits at once.

    Returns:
        As :func:`kdkernels.kd_loss`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, or a backend that cannot serve the call.
        RuntimeError: in a second backward through the same loss, or with ``create_graph``.

    Example:
        >>> import torch
        >>> from kdkernels import linear_kd_loss
        >>> student_head, teacher_head = torch.eye(3, 2).requires_grad_(), torch.eye(3)
        >>> student, teacher = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> loss = linear_kd_loss(student, student_head, teacher, teacher_head, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), student_head.grad.shape
        (0.3986, torch.Size([3, 2]))
    """
    hidden, weight = linear_checks.terms(student_hidden), linear_checks.terms(student_weight)
    lead, device = linear_checks.check_student(hidden, weight, student_bias)
    teacher_hidden = linear_checks.as_tensor("teacher_hidden", teacher_hidden)
    teacher_logits = linear_checks.as_tensor("teacher_logits", teacher_logits)
    teacher = teacher_hidden, teacher_weight, teacher_bias, teacher_logits
    teacher_dtype, teacher_vocab = linear_checks.check_teacher(*teacher, lead, device)
    linear_checks.check_row_index(row_index)
    chunk_bytes = scalars.option("chunk_bytes", chunk_bytes)
    student_dtype = linear_checks.product_dtype(weight[0])
    if teacher_dtype == torch.float64 and student_dtype != torch.float64:
        teacher_dtype = torch.float32  # float64 is NumPy's default: no reason for slow paths
    linear_checks.check_logits_dtype(logits_dtype, student_dtype)
    # Logits without rows: their dtype, device and width are checked.
    student_like = weight[0].new_empty(0, weight[0].shape[0], dtype=logits_dtype or student_dtype)
    teacher_like = student_like.new_empty(
        0,
        teacher_vocab,
        dtype=teacher_dtype if teacher_logits is not None else logits_dtype or teacher_dtype,
    )
    call = checks.call(
        student_like,
        teacher_like,
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
        teacher_scale=teacher_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        return_metrics=return_metrics,
        backend=backend,
        group=group,
        vocab_start=vocab_start,
    )
    if call.backend == "reference":
        token_weight = _only(row_index, call.token_weight, lead, device)
        hidden = [collectives.summed_in_backward(h, call.options) for h in hidden]
        s = logits_of(hidden, weight, student_bias, logits_dtype)
        t = _teacher_logits(*teacher, logits_dtype, device)
        loss, stacked = reference.kd_loss(
            s, t, labels, token_weight, call.normalizer, call.divergence, call.options
        )
    else:
        wide = logits_dtype is not None
        linear = LinearOptions(student_dtype, teacher_dtype, wide, chunk_bytes, call.backend)
        loss, stacked = autograd.linear_loss(
            hidden,
            weight,
            student_bias,
            teacher,
            (labels, call.token_weight),
            call.normalizer,
            row_index,
            linear,
            call.options,
        )
    return with_metrics(loss, stacked, labels) if return_metrics else loss


def logits_of(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """The sum of products as PyTorch computes it; the definition of what the operator computes."""
    if dtype is not None:
        hidden, weight = [h.to(dtype) for h in hidden], [w.to(dtype) for w in weight]
        bias = None if bias is None else bias.to(dtype)
    logits = F.linear(hidden[0], weight[0], bias)
    for h, w in zip(hidden[1:], weight[1:], strict=True):
        logits = logits + F.linear(h, w)
    return logits


def _teacher_logits(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    logits: Tensor | None,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    if logits is not None:
        return logits.to(device)
    assert hidden is not None
    assert weight is not None
    with torch.no_grad():
        return logits_of([hidden.to(device, weight.dtype)], [weight], bias, dtype)


def _only(
    row_index: Tensor | None, token_weight: Tensor | None, lead: torch.Size, device: torch.device
) -> Tensor | None:
    """The token weights, 0 outside the index."""
    if row_index is None:
        return token_weight
    if not torch.compiler.is_compiling():
        linear_checks.check_positions(row_index, lead.numel())
    kept = torch.zeros(lead.numel(), dtype=torch.bool, device=device)
    kept = kept.index_fill(0, row_index.to(device), True).view(lead)
    return kept if token_weight is None else torch.where(kept, token_weight, 0)
