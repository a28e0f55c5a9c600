"""The few tokens of a row that a sparse loss compares, and their divergence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .divergences import Divergence, is_built_in
from .options import METRICS, LogitsOptions

#: The log tail of a teacher where rounding hides it: half a unit in the last place of 1.0f.
_UNKNOWN_TAIL = math.log(2.0**-24)

_ops = torch.ops.kdkernels


class FewTokens(NamedTuple):
    """Logits of both models over the tokens that ``tail`` compares, float64."""

    tail: str
    teacher: Tensor  # (..., k), or (..., k + 1) with a last one for all that are not listed
    student: Tensor  # likewise
    kept: Tensor  # (...), bool, rows that have a term


def few_tokens(
    tail: str,
    log_p: Tensor,  # (..., k)
    student: Tensor,  # (..., k)
    student_tail: Tensor | None,  # (...), log-sum-exp of the others; None for "renormalize"
    kept: Tensor,  # (...), rows that have a term
    total: Tensor | None,  # (...), sum p, for "bucket"
    rounding: float,  # how far it may take sum p from 1
) -> FewTokens:
    """The tokens that are compared, according to ``tail`` of :func:`kdkernels.sparse_kd_loss`."""
    if student_tail is None:
        return FewTokens(tail, log_p, student, kept)
    q_tail = student_tail.unsqueeze(-1)
    if tail == "bucket":
        assert total is not None
        p_tail = _tail_of(total.unsqueeze(-1), q_tail == -math.inf, rounding)
    else:
        p_tail = torch.full_like(q_tail, -math.inf)
    both = torch.cat([log_p, p_tail], -1), torch.cat([student, q_tail], -1)
    return FewTokens(tail, *both, kept)


def _tail_of(total: Tensor, no_tail: Tensor, rounding: float) -> Tensor:
    """log(1 - total), ``(..., 1)``; ``no_tail`` ``(..., 1)`` says where the student has none."""
    # Rounded probabilities may sum to 1 or more. The tail is unknown then, and taken for 0 it would
    # make a student's tail cost infinitely much. And where there are no other tokens, or they are
    # all masked in the student, what rounding leaves to 1 is no tail.
    none = no_tail & (total >= 1 - rounding)
    return torch.log1p(-total).masked_fill(total >= 1, _UNKNOWN_TAIL).masked_fill(none, -math.inf)


def values_of(
    few: FewTokens, divergence: Divergence, entropies: bool, backend: str
) -> tuple[Tensor, ...]:
    """The divergence ``(...)`` and, if asked for, the entropies of teacher and student."""
    compiled = backend != "reference" and is_built_in(divergence)
    # The kernels compare whole distributions, which "drop" does not.
    if compiled and few.tail != "drop":
        return _by_kernel(few, divergence, entropies, backend)
    return _by_definition(few, divergence, entropies)


def _by_definition(few: FewTokens, divergence: Divergence, entropies: bool) -> tuple[Tensor, ...]:
    kept = few.kept.unsqueeze(-1)
    log_p, log_q = (torch.where(kept, x, 0.0) for x in (few.teacher, few.student))
    log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    if few.tail == "drop":
        log_p, log_q = log_p[..., :-1], log_q[..., :-1]
    else:
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    value = reference.sum_of_terms(divergence, log_p, log_q)
    of_rows = [value if few.tail == "drop" else reference.settled(divergence, value)]
    if entropies:
        of_rows += [reference.entropy(log_p), reference.entropy(log_q)]
    return tuple(torch.where(few.kept, x, 0.0) for x in of_rows)


def _by_kernel(
    few: FewTokens, divergence: Divergence, entropies: bool, backend: str
) -> tuple[Tensor, ...]:
    options = LogitsOptions(
        *divergence.kernel(),
        temperature=1.0,
        kd_weight=1.0,
        ce_weight=0.0,
        ignore_index=0,
        reduction="none",
        vocab=few.student.shape[-1],
        student_scale=1.0,
        student_softcap=0.0,
        teacher_scale=1.0,
        teacher_softcap=0.0,
        metrics=entropies,
        group="",
        rank=0,
        processes=1,
        vocab_start=0,
        vocab_size=few.student.shape[-1],
    )
    # Relative to the most probable token, which float32 then holds with most digits.
    teacher, student = (
        (x - x.detach().amax(-1, keepdim=True)).to(torch.float32)
        for x in (few.teacher, few.student)
    )
    arguments = student, teacher, few.kept.to(torch.float32), options, backend
    value, metrics = _OfFewTokens.apply(*arguments)
    if not entropies:
        return (value,)
    return value, *(metrics[METRICS.index(f"{whose}_entropy")] for whose in ("teacher", "student"))


class _OfFewTokens(torch.autograd.Function):
    """The logits level; the small gradient is kept, so that the backward can run again."""

    @staticmethod
    def forward(ctx, student, teacher, weight, options, backend):
        value, metrics, _, gradient = _ops.logits_loss_and_grad.default(
            student, teacher, None, weight, None, backend, *options
        )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(metrics)
        return value, metrics

    @staticmethod
    def backward(ctx, grad_value, _):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_value.unsqueeze(-1), None, None, None, None
