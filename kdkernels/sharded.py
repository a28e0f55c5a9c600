"""The logits level where processes share a vocabulary, each with a shard of its columns.

The sweeps of the row kernels are launches of their own here. In between the processes tell each
other a few numbers a row: first the softmax states of their shards, then the sums over their terms.
Logits and gradients stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import collectives, reference, watchers
from .backends.rows import has_row_scale, in_rows
from .options import SHARD_STATES, SHARD_SUMS, LogitsOptions
from .reference import RowsThatTakePart
from .top import Top

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max

_LARGEST_SLOPE = SHARD_SUMS.index("largest_slope")

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
    weight = (part.weight / reference.normalizer_of(part, normalizer, o)).to(torch.float32)
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

    states = _empty_states(weight)
    run("states", states, None)
    states, label_logit, agreement = _of_whole(student, teacher, labels, weight, states, part, o)
    written = gradient is None
    values: dict[str, Tensor] = {}
    sums = states.new_zeros((len(states), len(SHARD_SUMS)))
    if o.kd_weight != 0 or o.metrics:
        written |= run("sums", states, sums)
        own = sums
        sums = collectives.all_gather(own, o.group).sum(0)
        values["divergence"] = _divergence(sums)
        if agreement is not None:
            named = _named(SHARD_SUMS, sums)
            values |= {name: named[name] for name in ("student_entropy", "teacher_entropy")}
            values["agreement"] = agreement
        sums[:, _LARGEST_SLOPE] = own[:, _LARGEST_SLOPE]
    if not written:
        run("gradient", states, sums)
    if gradient is not None and o.vocab == 0:
        gradient.zero_()
    if labels is not None:
        values["cross_entropy"] = _cross_entropy(states, label_logit)

    values = {name: value.view(weight.shape) for name, value in values.items()}
    loss = torch.zeros_like(part.weight)
    if o.kd_weight != 0:
        loss = loss + o.kd_weight * values["divergence"]
    if o.ce_weight != 0:
        loss = loss + o.ce_weight * values["cross_entropy"]
    metrics = reference.stacked_metrics(values, part) if o.metrics else None
    loss = reference.reduced(loss, part, normalizer, o).to(torch.float32)
    return loss, metrics, row_scale


def _named(names: Iterable[str], numbers: Tensor) -> dict[str, Tensor]:
    """The last dimension's numbers by their names."""
    return dict(zip(names, numbers.unbind(-1), strict=True))


def _empty_states(weight: Tensor) -> Tensor:
    """(rows, 5), those of a shard without columns, for kernels to write over."""
    empty = {"student_base": _LOWEST_LOGIT, "teacher_base": _LOWEST_LOGIT}
    columns = [
        torch.full_like(weight, empty.get(name, 0.0), dtype=torch.float64).flatten()
        for name in SHARD_STATES
    ]
    return torch.stack(columns, -1)


def _of_whole(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor,  # (...)
    states: Tensor,  # (rows, 5), of this shard
    part: RowsThatTakePart,
    o: LogitsOptions,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """States of the whole vocabulary ``(rows, 5)``, logits at the labels and agreement ``(rows,)``.

    NaN where processes do not pass the same, or their shards are no whole; on a CPU that raises.
    """
    told = _named(SHARD_STATES, states)  # (rows,) or (...) each
    told["weight"] = weight.nan_to_num()
    if labels is not None:
        told |= {"label_logit": _at_labels(student, labels, o), "label": labels}
    if o.metrics:
        for model, logits in (("student", student), ("teacher", teacher)):
            top = Top.of(logits, o.vocab)
            told |= {f"{model}_top_logit": top.logit, f"{model}_top": top.token + o.vocab_start}
    message = torch.stack([x.double().flatten() for x in told.values()], -1)
    header = collectives.header_of(message, o)
    everyone = collectives.all_gather(torch.cat([message, header]), o.group)
    bad = part.outside.flatten() | ~collectives.is_whole(everyone[:, -1], o)
    shards = _named(told, everyone[:, :-1])  # (processes, rows) each
    bad |= (shards["weight"] != shards["weight"][0]).any(0)
    label_logit = agreement = None
    if labels is not None:
        label_logit, label = shards["label_logit"].sum(0), shards["label"]
        bad |= part.kept.flatten() & (label != label[0]).any(0)
    if watchers.may_look(bad) and bool(bad.any()):
        raise ValueError(collectives.ROWS_DIFFER)
    whole = _merged(shards, o)
    for name in ("student_sum", "student_sum_at_1"):
        whole[name] = whole[name] * torch.where(bad, math.nan, 1.0)
    if o.metrics:
        student_top, teacher_top = (
            Top(shards[f"{model}_top_logit"], shards[f"{model}_top"]).of_all()
            for model in ("student", "teacher")
        )
        agreement = (student_top.token == teacher_top.token).double()
        defined = _is_valid(whole["student_sum"]) & _is_valid(whole["teacher_sum"])
        agreement = torch.where(defined, agreement, math.nan)
    return torch.stack([whole[name] for name in SHARD_STATES], -1), label_logit, agreement


def _merged(shards: dict[str, Tensor], o: LogitsOptions) -> dict[str, Tensor]:
    """States ``(rows,)`` of the whole vocabulary from all shards' ``(processes, rows)``."""
    student_base, teacher_base = shards["student_base"], shards["teacher_base"]

    def total(sums: Tensor, base: Tensor, temperature: float) -> Tensor:
        return (sums * ((base - base.amax(0)) / temperature).exp()).sum(0)

    return {
        "student_base": student_base.amax(0),
        "student_sum": total(shards["student_sum"], student_base, o.temperature),
        "student_sum_at_1": total(shards["student_sum_at_1"], student_base, 1.0),
        "teacher_base": teacher_base.amax(0),
        "teacher_sum": total(shards["teacher_sum"], teacher_base, o.temperature),
    }


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


def _divergence(sums: Tensor) -> Tensor:
    """(rows,) from the sums over the whole vocabulary."""
    named = _named(SHARD_SUMS, sums)
    value, slope, shift = named["value"], named["slope"], named["shift"]
    # sum q - p is 0; what it comes to is how far rounding of the softmax sums moved all log q.
    value = value - torch.where(slope.abs() <= _LARGEST_FLOAT32, shift * slope, 0.0)
    return torch.where(value < 0, 0.0, value)


def _cross_entropy(states: Tensor, label_logit: Tensor | None) -> Tensor:
    assert label_logit is not None
    named = _named(SHARD_STATES, states)
    base, at_1 = named["student_base"], named["student_sum_at_1"]
    value = base + at_1.log() - label_logit
    value = torch.where(value < 0, 0.0, value)
    return torch.where(_is_valid(at_1), value, math.nan)
