"""Distillation from a sparse teacher: a few tokens and their log-probabilities per row.

Only log-sum-exps of the student need the whole vocabulary (:mod:`kdkernels.tail`). The rest depends
on the listed tokens alone: the divergence is that of rows as short as the lists
(:mod:`kdkernels.sparse_terms`), everything around it plain PyTorch in float64.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import checks, reference
from .divergences import Divergence, as_divergence
from .dtensors import Where, is_distributed, local_tensors, overwritten
from .options import LogitsOptions, Metrics, TailOptions, with_metrics
from .sharded_sparse import ShardedStudent
from .sparse_entries import MOST_PROBABILITY, check_entries, check_tail, entries, listed_twice
from .sparse_terms import few_tokens, values_of
from .tail import LogitsStudent, Student
from .top import Top

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .keywords import SparseKDKeywords


@overload
def sparse_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_metrics: Literal[False] = ...,
    **keywords: Unpack[SparseKDKeywords],
) -> Tensor: ...


@overload
def sparse_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_metrics: Literal[True],
    **keywords: Unpack[SparseKDKeywords],
) -> tuple[Tensor, Metrics]: ...


@overload
def sparse_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
    return_metrics: bool,
    **keywords: Unpack[SparseKDKeywords],
) -> Tensor | tuple[Tensor, Metrics]: ...


def sparse_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_logprobs: Tensor,
    *,
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
    inplace_grad: bool = False,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Metrics]:
    r"""Distillation loss from k tokens per row whose log-probabilities in the teacher are known.

    They may be its top k, stored on disk or returned by a server, or k samples. The student's
    logits are read once in the forward, and once in the backward, which writes their gradient.

    ``tail`` says what becomes of the tokens that the teacher does not list:

    - ``"bucket"``: they count as one more token, of probability 1 - sum p in the teacher and of the
      sum of their probabilities in the student. Two distributions over k + 1 tokens are compared,
      so the divergence is a lower bound of the full one (``alpha_beta`` may be above it where its
      parameters sum to more than 1), and 0 where the student equals the teacher.
      Where rounding makes sum p 1 or more, the teacher's tail counts as 2^-24.
    - ``"renormalize"``: they do not count. Both models are renormalised over the listed tokens; the
      student's other logits get no gradient.
    - ``"drop"``: their terms are left out of the sum, with p and q as they are. Not a divergence: a
      student that equals its teacher gets a gradient towards the listed tokens if sum p < 1.
    - ``"sampled"``: they are not needed. The listed tokens were drawn from the teacher, or from a
      proposal, and ``teacher_logprobs`` are logarithms of their importance weights (0 for all if
      drawn from p itself), normalised here to sum to 1. A token drawn more than once may be listed
      as often. The gradient is an unbiased estimate of the full one for equal weights
      (Anshumann et al. 2025, arXiv:2503.16870); only for ``forward_kl`` and
      ``soft_cross_entropy``, which are linear in p except for the teacher's entropy.

    Args:
        student_logits: ``(..., vocab)``, float32, bfloat16 or float16 (float64 runs on the
            reference backend). Leading dimensions may have any strides, the last one is contiguous.
        teacher_indices: ``(..., k)`` int64 or int32 token ids, different ones in a row, in any
            order; -1 marks an empty slot.
        teacher_logprobs: ``(..., k)``, of a logits dtype, at ``temperature``:
            log softmax(teacher / T) at the listed tokens. That of an empty slot may be anything.
        tail: ``"bucket"``, ``"renormalize"``, ``"drop"`` or ``"sampled"``.
        divergence: as for :func:`kdkernels.kd_loss`; every one works on every backend.
        temperature: T > 0, dividing the student's logits in the divergence.
        labels, kd_weight, ce_weight, ...: the other options of :func:`kdkernels.kd_loss`. The
            cross-entropy is over the whole vocabulary, of ``vocab_size`` columns.
        group: a process group over which the vocabulary is sharded, see :func:`kdkernels.kd_loss`;
            tokens are numbered in the whole vocabulary, and the same everywhere.
        vocab_start: see :func:`kdkernels.kd_loss`.
        inplace_grad: the backward overwrites ``student_logits`` with its gradient. Not for leaves.
        return_metrics: also return per-token metrics as :func:`kdkernels.kd_loss` does: divergence
            and entropies of what ``tail`` compares; ``agreement`` is 1.0 where the student's top
            token is the teacher's most probable listed one.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        The loss, float32 (float64 for float64 logits), a scalar or ``(...)`` for ``"none"``; with
        ``return_metrics``, the pair of loss and metrics.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, a token listed twice, or listed probabilities
            that sum to more than 1. On a GPU, where checking would wait for the device, and under
            torch.compile the last two, and tokens outside the vocabulary, make their row NaN.
        RuntimeError: in a second backward with ``inplace_grad``, or with ``create_graph``.

    Example:
        >>> import torch
        >>> from kdkernels import sparse_kd_loss
        >>> student = torch.tensor([[2.0, 1.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> logprobs, indices = teacher.log_softmax(-1).topk(2)
        >>> loss = sparse_kd_loss(student, indices, logprobs)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in student.grad[0].tolist()]
        (0.4161, [0.3099, -0.4137, 0.0758, 0.0279])
    """
    where, given = Where(group, vocab_start, vocab_size), student_logits
    if is_distributed(student_logits):
        tensors, where = local_tensors(
            (
                ("student_logits", student_logits, -1),
                ("teacher_indices", teacher_indices, None),
                ("teacher_logprobs", teacher_logprobs, None),
                ("labels", labels, None),
                ("token_weight", token_weight, None),
            ),
            where,
        )
        student_logits, teacher_indices, teacher_logprobs, labels, token_weight = tensors
        checks.inplace_grad(inplace_grad, given)
    checks.logits_tensor("student_logits", student_logits, least=1 if where.group is None else 0)
    lead = student_logits.shape[:-1]
    check_entries("student_logits", student_logits, teacher_indices, teacher_logprobs)
    divergence = as_divergence(divergence)
    check_tail(tail, divergence)
    checks.inplace_grad(inplace_grad, student_logits)
    call = checks.call(
        student_logits,
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
        vocab_size=where.vocab_size,
        student_scale=student_scale,
        student_softcap=student_softcap,
        inplace_grad=inplace_grad,
        return_metrics=return_metrics,
        backend=backend,
        group=where.group,
        vocab_start=where.vocab_start,
    )
    student = LogitsStudent(student_logits, inplace_grad, call.backend)
    result = loss_of(student, teacher_indices, teacher_logprobs, labels, call, tail)
    if inplace_grad and given is not student_logits:
        overwritten(given)
    return result


def loss_of(
    student: Student,
    indices: Tensor,  # (..., k)
    logprobs: Tensor,  # (..., k)
    labels: Tensor | None,  # (...)
    call: checks.Call,
    tail: str,
) -> Tensor | tuple[Tensor, Metrics]:
    """The result of :func:`sparse_kd_loss`, for any kind of student."""
    with reference.without_autocast(student.like.device):
        loss, stacked = _loss(student, indices, logprobs, labels, call, tail)
    return with_metrics(loss, stacked, labels) if call.options.metrics else loss


def _loss(
    student: Student,
    indices: Tensor,
    logprobs: Tensor,
    labels: Tensor | None,
    call: checks.Call,
    tail: str,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, with ``options.metrics``, the stacked metrics ``(5, ...)``."""
    o = call.options
    rows = reference.rows_that_take_part(student.like, labels, call.token_weight, o)
    indices, log_p, total, bad = entries(indices, logprobs, rows, tail, o.vocab_size)
    with_divergence = o.kd_weight != 0 or o.metrics
    if o.ce_weight == 0 and not o.metrics:
        labels = None  # which served to tell the rows that take part
    if o.group:
        share = rows.weight / reference.normalizer_of(rows, call.normalizer, o)
        label = torch.zeros_like(share) if labels is None else torch.where(rows.kept, labels, 0)
        same_everywhere = torch.cat([log_p, share.unsqueeze(-1), label.unsqueeze(-1)], -1)
        student = ShardedStudent(student, o, same_everywhere, (call.divergence, tail))
    in_range = None
    if labels is not None and rows.outside is not None:
        in_range = torch.where(rows.kept & ~rows.outside, labels, -1)
    logits = _Logits(
        student,
        indices,
        in_range,
        rows,
        with_tails=labels is not None or (with_divergence and tail != "renormalize"),
        options=o,
    )
    values: dict[str, Tensor] = {}
    if with_divergence:
        rounding = min(16 * torch.finfo(logprobs.dtype).eps, MOST_PROBABILITY - 1)
        bad = bad | logits.listed_twice
        log_p = log_p.masked_fill(bad.unsqueeze(-1), math.nan)
        of_student = logits.listed(), None if tail == "renormalize" else logits.tail()
        has_term = rows.kept if tail == "bucket" else rows.kept & (indices >= 0).any(-1)
        few = few_tokens(tail, log_p, *of_student, has_term, total, rounding)
        of_rows = values_of(few, call.divergence, o.metrics, call.backend)
        values["divergence"] = value = of_rows[0]
        if o.metrics:
            values["teacher_entropy"], values["student_entropy"] = of_rows[1:]
            undefined = torch.where(value.isnan(), math.nan, 1.0)
            values["agreement"] = undefined * _agreement(logits.top, indices, log_p)
    if labels is not None and rows.outside is not None:
        values["cross_entropy"] = logits.cross_entropy() * torch.where(rows.outside, math.nan, 1.0)
    loss = reference.weighted_sum(values, o)
    if loss is None:
        loss = logits.no_loss()
    out = torch.float64 if student.like.dtype == torch.float64 else torch.float32
    metrics = reference.stacked_metrics(values, rows.kept) if o.metrics else None
    return reference.reduced(loss, rows, call.normalizer, o).to(out), metrics


class _Logits:
    """The student's logits at the listed tokens and labels, and log-sum-exps of the others."""

    def __init__(
        self,
        student: Student,
        indices: Tensor,  # (..., k), -1: none
        labels: Tensor | None,  # (...), -1: none
        rows: reference.RowsThatTakePart,
        *,
        with_tails: bool,
        options: LogitsOptions,
    ) -> None:
        o = options
        listed = indices
        if labels is not None:  # a label gets a slot of its own unless the teacher lists it
            self._is_label = indices == labels.unsqueeze(-1)
            apart = labels.masked_fill(self._is_label.any(-1), -1)
            listed = torch.cat([indices, apart.unsqueeze(-1)], -1)
        ascending, order = listed.sort(-1)
        self.listed_twice = listed_twice(ascending)
        at_1 = labels is not None and o.temperature != 1
        stored, tails, self.top = student.listed_and_tails(
            ascending,
            rows.kept,
            TailOptions(o.temperature, at_1, o.student_scale, o.student_softcap, o.vocab),
            with_tails=with_tails,
            with_top=o.metrics,
        )
        stored = torch.zeros_like(stored).scatter(-1, order, stored)
        if not rows.all_kept:  # masked first: 0 * NaN in a backward would be NaN
            stored = stored.masked_fill(~rows.kept.unsqueeze(-1), 0.0)
            tails = tails.masked_fill(~rows.kept, 0.0)
        logits = reference.transform(stored, o.student_scale, o.student_softcap)
        self._logits = logits.masked_fill(listed < 0, -math.inf)  # (..., k) or (..., k + 1)
        self._tails = tails  # (1 or 2, ...)
        self._k = indices.shape[-1]
        self._temperature = o.temperature

    def no_loss(self) -> Tensor:
        """Zeros ``(...)`` whose gradient is zeros, for a loss without terms."""
        nothing = torch.ones_like(self._logits, dtype=torch.bool)
        return self._logits.masked_fill(nothing, 0.0).sum(-1)

    def listed(self) -> Tensor:
        """Logits ``(..., k)`` of the listed tokens over the temperature, -inf in empty slots."""
        logits = self._logits[..., : self._k]
        return logits if self._temperature == 1 else logits / self._temperature

    def tail(self) -> Tensor:
        """Log-sum-exp ``(...)`` of all tokens that the teacher does not list."""
        if self._logits.shape[-1] == self._k:
            return self._tails[0]
        label = self._logits[..., self._k :] / self._temperature
        return reference.log_sum_exp(torch.cat([label, self._tails[0].unsqueeze(-1)], -1))

    def cross_entropy(self) -> Tensor:
        """Cross-entropy ``(...)`` against the labels, at temperature 1."""
        log_normalizer = torch.cat([self._logits, self._tails[-1].unsqueeze(-1)], -1).logsumexp(-1)
        log_normalizer = log_normalizer * torch.where(log_normalizer == math.inf, math.nan, 1.0)
        is_listed = self._is_label.any(-1)
        at_label = torch.where(self._is_label, self._logits[..., : self._k], 0.0).sum(-1)
        return log_normalizer - torch.where(is_listed, at_label, self._logits[..., -1])


def _agreement(student_top: Top | None, indices: Tensor, log_p: Tensor) -> Tensor:
    """(...), 1.0 where the student's top token is the first most probable listed one."""
    assert student_top is not None
    log_p = log_p[..., : indices.shape[-1]]
    is_top = log_p == log_p.amax(-1, keepdim=True)
    top = torch.where(is_top, indices, torch.iinfo(torch.int64).max).amin(-1)
    return (student_top.token == top).to(log_p.dtype)
