"""The definition of the loss in plain PyTorch: readable, slow, on any device, in float64.

It is the oracle of the tests and the fallback of ``backend="auto"``. Its gradient is autograd's.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import collectives, watchers
from .backends.row_plan import row_weights
from .divergences import Divergence, is_built_in
from .options import METRICS, LogitsOptions


def transform(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """x -> softcap tanh(scale x / softcap), or scale x without a softcap; -inf stays -inf."""
    if not softcap:
        return logits if scale == 1 else logits * scale
    masked = logits == -math.inf
    capped = softcap * torch.tanh(torch.where(masked, 0.0, logits) * (scale / softcap))
    return torch.where(masked, -math.inf, capped)


def kd_loss(
    student: Tensor,  # (..., vocab_s)
    teacher: Tensor,  # (..., vocab_t)
    labels: Tensor | None,  # (...)
    token_weight: Tensor | None,  # (...)
    normalizer: Tensor | None,  # ()
    divergence: Divergence,
    o: LogitsOptions,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, with ``o.metrics``, the stacked metrics ``(5, ...)``."""
    with without_autocast(student.device):
        if o.group:
            rows = rows_that_take_part(student, labels, token_weight, o)
            share = rows.weight / normalizer_of(rows, normalizer, o)
            target = torch.zeros_like(share) if labels is None else labels
            per_row = [share, torch.where(rows.kept, target, 0)]
            columns = collectives.columns_of_all(per_row, o, divergence)
            student = collectives.whole_logits(student, columns, o)
            teacher = collectives.whole_logits(teacher.detach(), columns, o)
            o = o._replace(vocab=o.vocab_size)
        return _kd_loss(student, teacher, labels, token_weight, normalizer, divergence, o)


def _kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    divergence: Divergence,
    o: LogitsOptions,
) -> tuple[Tensor, Tensor | None]:
    compute = compute_dtype(student.device)
    out = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    rows = rows_that_take_part(student, labels, token_weight, o)
    kept, outside = rows.kept, rows.outside

    # Masked before the softmax: 0 * NaN in its backward would be NaN.
    s = torch.where(kept.unsqueeze(-1), student[..., : o.vocab].to(compute), 0.0)
    t = torch.where(kept.unsqueeze(-1), teacher[..., : o.vocab].detach().to(compute), 0.0)
    s_logits = transform(s, o.student_scale, o.student_softcap)
    t_logits = transform(t, o.teacher_scale, o.teacher_softcap)

    values: dict[str, Tensor] = {}
    if o.kd_weight != 0 or o.metrics:
        log_q = F.log_softmax(s_logits / o.temperature, dim=-1)
        log_p = F.log_softmax(t_logits / o.temperature, dim=-1)
        values["divergence"] = settled(divergence, sum_of_terms(divergence, log_p, log_q))
        if o.metrics:
            values["teacher_entropy"] = entropy(log_p)
            values["student_entropy"] = entropy(log_q)
            values["agreement"] = _agreement(s, t, log_p.sum(-1) + log_q.sum(-1))
    if labels is not None and outside is not None and (o.ce_weight != 0 or o.metrics):
        values["cross_entropy"] = _cross_entropy(s_logits, labels, kept, outside)
    loss = weighted_sum(values, o)
    if loss is None:  # zeros with a gradient of zeros
        loss = torch.where(torch.zeros_like(s, dtype=torch.bool), s, 0.0).sum(-1)
    metrics = stacked_metrics(values, kept) if o.metrics else None
    return reduced(loss, rows, normalizer, o).to(out), metrics


def weighted_sum(values: dict[str, Tensor], o: LogitsOptions) -> Tensor | None:
    """The losses ``(...)`` of divergence and cross-entropy; None where neither has a weight."""
    weights = {"divergence": o.kd_weight, "cross_entropy": o.ce_weight}
    # What has a weight of 0 may be infinite.
    terms = [weight * values[name] for name, weight in weights.items() if weight != 0]
    return sum(terms[1:], terms[0]) if terms else None


def sum_of_terms(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The divergence ``(...)`` of log-probabilities ``(..., n)``."""
    # A NaN makes the whole row and its gradient NaN, whatever the divergence does with it.
    bad = (log_p.isnan() | log_q.isnan()).any(-1, keepdim=True)
    terms = divergence.value(log_p, log_q * torch.where(bad, math.nan, 1.0))
    if terms.shape != log_p.shape:
        raise ValueError(
            f"divergence: value of {type(divergence).__name__} has shape {tuple(terms.shape)}, "
            f"expected a term for each logit, {tuple(log_p.shape)}: their sum is taken here"
        )
    return terms.sum(-1)


def settled(divergence: Divergence, value: Tensor) -> Tensor:
    """Clamps a built-in divergence at 0, below which only rounding falls; the gradient passes."""
    if not is_built_in(divergence):
        return value
    return torch.where(value < 0, value - value.detach(), value)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Disables autocast: the definition chooses its own dtypes."""
    if watchers.has_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def compute_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


class RowsThatTakePart(NamedTuple):
    """Weights of the rows and which of them take part, each ``(...)``."""

    weight: Tensor
    kept: Tensor  # bool
    outside: Tensor | None  # bool, kept with a label outside the vocabulary: NaN; None: no labels
    all_kept: bool  # surely, as there are neither labels nor weights


def rows_that_take_part(
    student: Tensor, labels: Tensor | None, token_weight: Tensor | None, o: LogitsOptions
) -> RowsThatTakePart:
    """Weights of the rows; on the CPU raises for a label outside the vocabulary."""
    compute = compute_dtype(student.device)
    weight = row_weights(labels, token_weight, o.ignore_index, compute)
    all_kept = weight is None
    if weight is None:
        weight = torch.ones(student.shape[:-1], dtype=compute, device=student.device)
    kept = weight != 0
    outside = None if labels is None else are_outside(torch.where(kept, labels, 0), o)
    return RowsThatTakePart(weight, kept, outside, all_kept)


def are_outside(labels: Tensor, o: LogitsOptions) -> Tensor:
    """Whether labels are outside the vocabulary, ``(...)``; on the CPU raises for one."""
    outside = labels != labels.clamp(0, o.vocab_size - 1)
    if watchers.may_look(labels) and bool(outside.any()):
        raise ValueError(
            f"labels: a row holds {int(labels[outside][0])}, expected 0 to {o.vocab_size - 1} or "
            f"ignore_index ({o.ignore_index})"
        )
    return outside


def reduced(
    loss: Tensor, rows: RowsThatTakePart, normalizer: Tensor | None, o: LogitsOptions
) -> Tensor:
    """The weighted losses ``(...)``, or their sum or mean."""
    if rows.outside is not None:
        loss = loss * torch.where(rows.outside, math.nan, 1.0)
    if not rows.all_kept:
        loss = torch.where(rows.kept, loss, 0.0) * rows.weight
    if o.reduction == "none":
        return loss
    return loss.sum() / normalizer_of(rows, normalizer, o)


def normalizer_of(rows: RowsThatTakePart, normalizer: Tensor | None, o: LogitsOptions) -> Tensor:
    """What the loss is divided by, (); 1 unless the reduction is a mean."""
    if o.reduction != "mean":
        return torch.ones_like(rows.weight.sum())
    if normalizer is None:
        normalizer = rows.weight.sum()
        normalizer = torch.where(normalizer <= 0, 1.0, normalizer)
    return normalizer.to(rows.weight.dtype)


def stacked_metrics(values: dict[str, Tensor], kept: Tensor) -> Tensor:
    """Metrics ``(5, ...)`` as kernels write them, 0 where not among the values or not kept."""
    zero = torch.zeros_like(values["divergence"])
    stacked = torch.stack([values.get(name, zero) for name in METRICS])
    return torch.where(kept, stacked, 0.0).detach().to(torch.float32)


def log_sum_exp(x: Tensor) -> Tensor:
    """torch.logsumexp over the last dimension, with a gradient of 0, not NaN, where all is -inf."""
    nothing = (x == -math.inf).all(-1)
    some = torch.where(nothing.unsqueeze(-1), 0.0, x).logsumexp(-1)
    return torch.where(nothing, x.nan_to_num(neginf=0.0).sum(-1) - math.inf, some)


def entropy(log_p: Tensor) -> Tensor:
    """-sum p log p, ``(...)``."""
    p = log_p.exp()
    return -torch.where(p == 0, 0.0, p * log_p).sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor, kept: Tensor, outside: Tensor) -> Tensor:
    """(...), NaN, gradient included, for a label outside the vocabulary."""
    index = torch.where(kept & ~outside, labels, 0).unsqueeze(-1)
    log_q = F.log_softmax(logits, dim=-1).gather(-1, index).squeeze(-1)
    return -log_q * torch.where(outside, math.nan, 1.0)


def _agreement(s: Tensor, t: Tensor, undefined: Tensor) -> Tensor:
    agree = (s.argmax(-1) == t.argmax(-1)).to(s.dtype)  # the first of equal ones
    return torch.where(undefined.isnan(), math.nan, agree)
