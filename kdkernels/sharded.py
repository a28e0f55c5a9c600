"""The logits level where processes share a vocabulary, each with a shard of its columns.

The sweeps of the row kernels are launches of their own here. In between the processes tell each
other a few numbers a row: first the softmax states of their shards, then the sums over their terms.
Logits and gradients stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import collectives, reference, watchers
from .backends.rows import has_row_scale, in_rows
from .divergences import FAR_FROM, MOST_CANCELLED, AlphaBeta, kl_weights
from .options import SHARD_STATES, SHARD_SUMS, LogitsOptions
from .reference import RowsThatTakePart
from .top import Top

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max

_LARGEST_SLOPE = SHARD_SUMS.index("largest_slope")

#: Columns of states.
_BASES, _SUMS, _KLS = slice(0, 2), slice(2, 4), slice(4, 6)
_ENTROPY, _AT_1 = slice(6, 7), slice(7, 8)

#: As in csrc/core/softmax_state.h: what an empty shard's sums are relative to.
_LOWEST_LOGIT = -1e30


def logits_loss(
    shard: Callable[..., bool],
    student: Tensor,  # (..., width)
    teacher: Tensor,  # (..., width)
    labels: Tensor | None,  # (...)
    token_weight: Tensor | None,  # (...)
    normalizer: Tensor | None,  # ()
    o: LogitsOptions,
    gradient: Tensor | None,  # (..., width)
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, metrics and row scales; the gradient, if any, is written into ``gradient``.

    ``shard`` runs one phase of a backend, see ``backends/cpu.py``.
    """
    student, teacher = in_rows(student), in_rows(teacher)
    # What is computed per row keeps their strides, and kernels read one row after the other.
    labels = None if labels is None else labels.contiguous()
    token_weight = None if token_weight is None else token_weight.contiguous()
    part = reference.rows_that_take_part(student, labels, token_weight, o)
    share = part.weight / reference.normalizer_of(part, normalizer, o)
    weight = share.to(torch.float32)
    part = part._replace(kept=weight != 0)
    if o.ce_weight == 0 and not o.metrics:
        labels = None  # they have said which rows take part
    row_scale = torch.zeros_like(weight) if has_row_scale(gradient) else None
    local = None if labels is None else _local(labels, o)

    def run(phase: str, states: Tensor, sums: Tensor | None) -> bool:
        if weight.numel() == 0 or o.vocab == 0:
            return False
        arguments = student, teacher, local, weight, states, sums, o, gradient, row_scale
        return shard(phase, *arguments)

    states = weight.new_empty((weight.numel(), len(SHARD_STATES)), dtype=torch.float64)
    if o.vocab == 0:
        states.zero_()[:, _BASES] = _LOWEST_LOGIT
    run("states", states, None)
    whole, values = _of_whole(student, teacher, labels, weight, states, part, o)
    written = gradient is None
    sums = states.new_zeros((len(states), len(SHARD_SUMS)))
    if o.kd_weight != 0 or o.metrics:
        written |= run("sums", whole.states, sums)
        own = sums
        sums = collectives.all_gather(own, o.group).sum(0)
        divergence = _divergence(sums, o)
        if whole.kl is not None:
            divergence = torch.where(whole.kl.isnan(), divergence, whole.kl)
        values["divergence"] = divergence
        if o.metrics:
            named = _named(SHARD_SUMS, sums)
            values |= {name: named[name] for name in ("student_entropy", "teacher_entropy")}
        if not written:
            sums[:, _LARGEST_SLOPE] = own[:, _LARGEST_SLOPE]
    if not written:
        run("gradient", whole.states, sums)
    if gradient is not None and o.vocab == 0:
        gradient.zero_()

    values = {name: value.view(weight.shape) for name, value in values.items()}
    terms = []  # one of weight 0 may be infinite
    if o.kd_weight != 0:
        terms.append(values["divergence"] * o.kd_weight)
    if o.ce_weight != 0:
        terms.append(values["cross_entropy"] * o.ce_weight)
    loss = sum(terms[1:], start=terms[0]) if terms else torch.zeros_like(share)
    loss = torch.where(part.kept, loss * share, 0.0)
    if o.reduction != "none":
        loss = loss.sum()
    metrics = reference.stacked_metrics(values, part) if o.metrics else None
    return loss.to(torch.float32), metrics, row_scale


def _named(names: Iterable[str], numbers: Tensor) -> dict[str, Tensor]:
    """The last dimension's numbers by their names."""
    return dict(zip(names, numbers.unbind(-1), strict=True))


class _Whole(NamedTuple):
    """Of the whole vocabulary."""

    states: Tensor  # (rows, 8), for kernels
    kl: Tensor | None = None  # (rows,), the divergence of far rows, NaN of others; None: of none


def _of_whole(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor,  # (...)
    states: Tensor,  # (rows, 8), of this shard
    part: RowsThatTakePart,
    o: LogitsOptions,
) -> tuple[_Whole, dict[str, Tensor]]:
    """What all shards' states make, cross-entropy and agreement ``(rows,)``.

    NaN where processes do not pass the same, or their shards are no whole; on a CPU that raises.
    """
    told = {"weight": weight.nan_to_num()}  # (...)
    if labels is not None:
        told["label"] = labels * part.kept
        told["label_logit"] = _at_labels(student, labels, o)
    alike = len(told) if labels is None else len(told) - 1
    if o.metrics:
        for model, logits in (("student", student), ("teacher", teacher)):
            top = Top.of(logits, o.vocab)
            told |= {f"{model}_top_logit": top.logit, f"{model}_top": top.token + o.vocab_start}
    of_row = torch.stack([x.double().flatten() for x in told.values()], -1)
    message = torch.cat([states, of_row], -1)
    header = collectives.header_of(message, o)
    everyone = collectives.all_gather(torch.cat([message, header]), o.group)
    shards, of_row = everyone[:, :-1].tensor_split([states.shape[-1]], -1)
    bad = (of_row[1:, :, :alike] != of_row[0, :, :alike]).any(-1).any(0)
    bad |= part.outside.flatten() | ~collectives.is_whole(everyone[:, -1], o)
    if watchers.may_look(bad) and bool(bad.any()):
        raise ValueError(collectives.ROWS_DIFFER)
    whole = _merged(shards, torch.where(bad, math.nan, 0.0), o)
    named = _named(told, of_row)  # (processes, rows) each
    values = {}
    if labels is not None:
        values["cross_entropy"] = _cross_entropy(whole.states, named["label_logit"].sum(0))
    if o.metrics:
        student_top, teacher_top = (
            Top(named[f"{model}_top_logit"], named[f"{model}_top"]).of_all()
            for model in ("student", "teacher")
        )
        agreement = (student_top.token == teacher_top.token).double()
        defined = _is_valid(whole.states[:, _SUMS]).all(-1)
        values["agreement"] = torch.where(defined, agreement, math.nan)
    return whole, values


def _merged(
    shards: Tensor,  # (processes, rows, 8), their states
    poison: Tensor,  # (rows,), added to sums
    o: LogitsOptions,
) -> _Whole:
    """Pairs are of student and teacher; those of sums by the exponentials of these."""
    base = shards[..., _BASES].amax(0)
    fall = shards[..., _BASES] - base
    factor = (fall / o.temperature).exp()
    sums = (shards[..., _SUMS] * factor).sum(0) + poison.unsqueeze(-1)
    at_1 = (shards[..., _AT_1] * fall[..., :1].exp()).sum(0) + poison.unsqueeze(-1)
    weights = kl_weights(o.divergence, o.parameter_0)
    if weights is None or o.kd_weight == 0:
        nothing = torch.full_like(at_1, math.nan).expand(-1, 3)
        return _Whole(torch.cat([base, sums, nothing, at_1], -1))

    fall = fall / o.temperature
    apart = fall[..., :1] - fall[..., 1:]
    pair = ((shards[..., _KLS] + shards[..., _SUMS] * apart) * factor).sum(0) / sums
    log_sum = sums.log()
    offset = log_sum[:, 1:] - log_sum[:, :1]
    pair = pair + offset  # KL(q || p), -KL(p || q)
    reverse = pair[:, :1]
    kl = weights[1] * reverse - weights[0] * pair[:, 1:]
    far = (kl > FAR_FROM) & (kl <= _LARGEST_FLOAT32) & (offset.abs() <= MOST_CANCELLED * kl)
    if o.divergence == "soft_cross_entropy":
        entropy = shards[..., _ENTROPY] + shards[..., _SUMS][..., 1:] * fall[..., 1:]
        kl = kl + log_sum[:, 1:] - (entropy * factor[..., 1:]).sum(0) / sums[:, 1:]
    reverse, kl = torch.where(far, torch.cat([reverse, kl], -1), math.nan).tensor_split(2, -1)
    return _Whole(torch.cat([base, sums, reverse.expand(-1, 3), at_1], -1), kl.squeeze(-1))


def _local(labels: Tensor, o: LogitsOptions) -> Tensor:
    """Columns of this shard; -1 where another has the label."""
    local = labels - o.vocab_start
    return torch.where((local >= 0) & (local < o.vocab), local, -1)


def _at_labels(student: Tensor, labels: Tensor, o: LogitsOptions) -> Tensor:
    """Logits ``(...)`` at the labels that this shard has, 0 elsewhere."""
    if o.vocab == 0:
        return torch.zeros_like(labels)
    local = _local(labels, o)
    # In float32 as kernels transform them, whose log-sum-exp it is subtracted from.
    logits = student.gather(-1, local.clamp(min=0).unsqueeze(-1)).squeeze(-1).float()
    logits = reference.transform(logits, o.student_scale, o.student_softcap)
    return torch.where(local >= 0, logits, 0.0)


def _is_valid(sums: Tensor) -> Tensor:
    """As in csrc/core/softmax_state.h: whether a row has a softmax."""
    return (sums > 0) & (sums <= _LARGEST_FLOAT32)


def _divergence(sums: Tensor, o: LogitsOptions) -> Tensor:
    """(rows,) from the sums over the whole vocabulary."""
    named = _named(SHARD_SUMS, sums)
    value = named["value"]
    if o.divergence == AlphaBeta.name:
        # sum q - p is 0; what it comes to is how far rounding of the softmax sums moved all log q.
        slope, shift = named["slope"], named["shift"]
        value = value - torch.where(slope.abs() <= _LARGEST_FLOAT32, shift * slope, 0.0)
    return value.clamp(min=0)  # rounding of what nearly cancels; NaN stays


def _cross_entropy(states: Tensor, label_logit: Tensor) -> Tensor:
    named = _named(SHARD_STATES, states)
    base, at_1 = named["student_base"], named["student_sum_at_1"]
    value = (base + at_1.log() - label_logit).clamp(min=0)
    return torch.where(_is_valid(at_1), value, math.nan)
