"""The logits level where processes share a vocabulary, each with a shard of its columns.

Each sweep of the row kernels is a launch of its own here. In between, the processes exchange a few
numbers per row: first the softmax states of their shards, then the sums of their terms. Logits and
gradients stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import collectives, reference, watchers
from .backends.row_plan import row_plan
from .backends.rows import has_row_scale
from .constants import FAR_FROM, LOWEST_LOGIT, MOST_CANCELLED
from .divergences import DIVERGENCES, AlphaBeta, SoftCrossEntropy, kl_weights
from .options import METRICS, SHARD_STATES, SHARD_SUMS, LogitsOptions
from .top import Top

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max

_LARGEST_SLOPE = SHARD_SUMS.index("largest_slope")

#: Columns of states, in pairs of student and teacher.
_BASES, _SUMS = slice(0, 2), slice(2, 4)


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
    lead = student.shape[:-1]
    plan = row_plan(labels, token_weight, normalizer, o, lead.numel(), torch.float64)
    divisor = plan.divisor if plan.normalizer is None else plan.normalizer
    weight = _weights(plan.weight, divisor, student)
    masked = weight == 0
    outside = None
    if labels is not None:
        labels = labels.flatten().masked_fill(masked, 0)
        outside = reference.are_outside(labels, o)
        if o.ce_weight == 0 and not o.metrics:
            labels = None  # which served to tell the rows that take part
    local = None if labels is None else _local(labels, o)
    row_scale = torch.zeros_like(weight).view(lead) if has_row_scale(gradient) else None

    def run(phase: str, states: Tensor, sums: Tensor | None) -> bool:
        if weight.numel() == 0 or o.vocab == 0:
            return False
        arguments = student, teacher, local, weight, states, sums, o, gradient, row_scale
        return shard(phase, *arguments)

    states = weight.new_empty((weight.numel(), len(SHARD_STATES)), dtype=torch.float64)
    if o.vocab == 0:
        states.zero_()[:, _BASES] = LOWEST_LOGIT
    run("states", states, None)
    whole, values = _of_whole(student, teacher, labels, local, outside, weight, states, o)
    written = gradient is None
    sums = states.new_zeros((len(states), len(SHARD_SUMS)))
    if o.kd_weight != 0 or o.metrics:
        written |= run("sums", whole.states, sums)
        own = sums
        sums = collectives.all_gather(own, o.group).sum(0)
        values["divergence"] = _divergence(sums, o)
        if whole.of_far is not None:
            values["divergence"] = torch.where(*whole.of_far, values["divergence"])
        if o.metrics:
            named = _named(SHARD_SUMS, sums)
            values |= {name: named[name] for name in ("student_entropy", "teacher_entropy")}
        if row_scale is not None:
            sums[:, _LARGEST_SLOPE] = own[:, _LARGEST_SLOPE]
    if not written:
        run("gradient", whole.states, sums)
    if gradient is not None and o.vocab == 0:
        gradient.zero_()

    loss = reference.weighted_sum(values, o)
    if loss is None:
        loss = torch.zeros_like(weight)
    if plan.weight is not None:
        loss = loss * plan.weight
    loss = loss.masked_fill_(masked, 0.0)
    loss = loss.view(lead) if o.reduction == "none" else loss.sum() / divisor
    metrics = None
    if o.metrics:
        metrics = reference.stacked_metrics(values, ~masked).view(len(METRICS), *lead)
    return loss.to(torch.float32), metrics, row_scale


def _weights(given: Tensor | None, divisor: float | Tensor, student: Tensor) -> Tensor:
    """(rows,) factors of the rows' gradients, 0 for rows that take no part."""
    if given is None:
        return student.new_ones(student.shape[:-1].numel(), dtype=torch.float32) / divisor
    return torch.where(given == 0, given, given / divisor).to(torch.float32)  # not 0 / 0


def _named(names: Iterable[str], numbers: Tensor) -> dict[str, Tensor]:
    """The numbers of the last dimension by their names."""
    return dict(zip(names, numbers.unbind(-1), strict=True))


class _WholeStates(NamedTuple):
    """Softmax states of the whole vocabulary."""

    states: Tensor  # (rows, 8), for kernels
    of_far: tuple[Tensor, Tensor] | None = None  # (rows,) each: which are far, their divergence


def _of_whole(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,  # (rows,), 0 of rows that take no part
    local: Tensor | None,  # (rows,), of this shard
    outside: Tensor | None,  # (rows,), labels outside the vocabulary: NaN
    weight: Tensor,  # (rows,)
    states: Tensor,  # (rows, 8), of this shard
    o: LogitsOptions,
) -> tuple[_WholeStates, dict[str, Tensor]]:
    """Exchanges states: those of the whole vocabulary, and cross-entropy and agreement ``(rows,)``.

    NaN where processes pass different values or their shards do not fit; on a CPU raises instead.
    """
    own = {"header": collectives.header_of(states, o), "states": states}
    same = [weight] if labels is None else [weight, labels]
    own["same"] = torch.stack([x.double() for x in same])
    if local is not None:
        own["label_logit"] = _at_labels(student, local, o)
    if o.metrics:
        for model, logits in (("student", student), ("teacher", teacher)):
            top = Top.of(logits, o.vocab)
            own[f"{model}_top_logit"] = top.logit.flatten()
            own[f"{model}_top_token"] = top.token.flatten() + o.vocab_start
    told = collectives.told_by_all(own, o.group)

    bits = told["same"].view(torch.int64)  # of which NaN equals itself
    bad = (bits[1:] != bits[0]).flatten(0, 1).any(0)
    bad |= collectives.do_not_fit(told["header"], o)
    if outside is not None:
        bad |= outside
    if watchers.may_look(bad) and bool(bad.any()):
        raise ValueError(collectives.ROWS_DIFFER)
    shards = told["states"]
    shards[..., _BASES.stop :].masked_fill_(bad.unsqueeze(-1), math.nan)
    whole = _merged(shards, labels is not None, o)
    values = {}
    if labels is not None:
        values["cross_entropy"] = _cross_entropy(whole.states, told["label_logit"].sum(0))
    if o.metrics:
        student_top, teacher_top = (
            Top(told[f"{model}_top_logit"], told[f"{model}_top_token"]).of_all().token
            for model in ("student", "teacher")
        )
        sums = whole.states[:, _SUMS]
        defined = ((sums > 0) & (sums <= _LARGEST_FLOAT32)).all(-1)
        agreement = (student_top == teacher_top).double()
        values["agreement"] = torch.where(defined, agreement, math.nan)
    return whole, values


def _merged(shards: Tensor, with_labels: bool, o: LogitsOptions) -> _WholeStates:
    """Merges the states of all shards, ``(processes, rows, 8)``, which it overwrites.

    Student and teacher stay together, in pairs, for half the launches.
    """
    bases, sums, gaps, entropy, at_1 = shards.split([2, 2, 2, 1, 1], -1)
    base = bases.amax(0)
    fall = bases - base
    nan = base.new_full((len(base), 1), math.nan)
    at_1 = (at_1 * fall[..., :1].exp()).sum(0) if with_labels else nan
    fall = fall / o.temperature
    factor = fall.exp()
    weights = None if o.kd_weight == 0 else kl_weights(o.divergence, o.parameter_0)
    if weights is None:
        sums = (sums * factor).sum(0)
        return _WholeStates(torch.cat([base, sums, nan.expand(-1, 3), at_1], -1))

    # Relative to the base of the whole vocabulary x is x + fall, and e is e factor.
    s_fall, t_fall = fall.split(1, -1)
    gaps.addcmul_(sums, s_fall - t_fall)
    with_entropy = o.divergence == SoftCrossEntropy.name
    if with_entropy:
        entropy = (torch.addcmul(entropy, sums[..., 1:], t_fall) * factor[..., 1:]).sum(0)
    sums_and_gaps = shards[..., 2:6].unflatten(-1, (2, 2)) * factor.unsqueeze(-2)
    sums, gaps = sums_and_gaps.sum(0).unbind(-2)

    log_sum = sums.log()
    offset = log_sum[:, 1:] - log_sum[:, :1]
    reverse, minus_forward = torch.addcdiv(offset, gaps, sums).split(1, -1)
    kl = torch.sub(weights[1] * reverse, minus_forward, alpha=weights[0])
    least = (offset.abs() / MOST_CANCELLED).clamp(min=FAR_FROM)
    far = (kl > least) & (kl <= _LARGEST_FLOAT32)
    if with_entropy:
        kl = torch.addcdiv(kl + log_sum[:, 1:], entropy, sums[:, 1:], value=-1)
    reverse = torch.where(far, reverse, nan)
    states = torch.cat([base, sums, reverse.expand(-1, 3), at_1], -1)
    return _WholeStates(states, (far.squeeze(-1), kl.squeeze(-1)))


def _local(labels: Tensor, o: LogitsOptions) -> Tensor:
    """The labels as columns of this shard, -1 where another shard has the label."""
    column = labels - o.vocab_start
    nearest = column.clamp(0, o.vocab - 1)
    return nearest.masked_fill_(nearest != column, -1)


def _at_labels(student: Tensor, local: Tensor, o: LogitsOptions) -> Tensor:
    """Logits ``(rows,)`` at those labels that are in this shard, 0 elsewhere."""
    if o.vocab == 0:
        return torch.zeros_like(local)
    index = local.clamp(min=0).view(*student.shape[:-1], 1)
    # In float32, as in the kernels, since it is subtracted from their log-sum-exp.
    logits = student.gather(-1, index).flatten().float()
    logits = reference.transform(logits, o.student_scale, o.student_softcap)
    return logits.masked_fill_(local < 0, 0.0)


def _divergence(sums: Tensor, o: LogitsOptions) -> Tensor:
    """The divergence ``(rows,)`` from the sums over the whole vocabulary."""
    named = _named(SHARD_SUMS, sums)
    value = named["value"]
    if o.divergence == AlphaBeta.name:
        # sum (q - p) should be 0: what it is instead tells how far rounding moved all log q.
        slope = named["slope"].nan_to_num(0.0, 0.0, 0.0)
        value = torch.addcmul(value, named["shift"], slope, value=-1)
    # Rounding may fall below 0, as a divergence of a user's own may; NaN stays.
    return value.clamp(min=0) if o.divergence in DIVERGENCES else value


def _cross_entropy(states: Tensor, label_logit: Tensor) -> Tensor:
    """(rows,); NaN where a row has no softmax: its sum is 0, infinite or NaN."""
    named = _named(SHARD_STATES, states)
    log_sum = named["student_sum_at_1"].log().nan_to_num(math.nan, math.nan, math.nan)
    return (named["student_base"] + log_sum - label_logit).clamp(min=0)
