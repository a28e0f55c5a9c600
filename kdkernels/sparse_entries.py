"""What a sparse teacher lists: checks, and clean tokens and log-probabilities."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, reference, scalars, watchers
from .divergences import Divergence, ForwardKL, SoftCrossEntropy
from .reference import RowsThatTakePart

#: Listed probabilities may sum to this much: those in bfloat16 are rounded to 3 digits.
MOST_PROBABILITY = 1.05


class Entries(NamedTuple):
    """What a sparse teacher lists, rows that take no part listing nothing."""

    indices: Tensor  # (..., k) int64, -1: none
    log_p: Tensor  # (..., k), -inf: none
    total: Tensor | None  # (...), sum p, where it is to be at most 1
    bad: Tensor  # (...), rows that make no sense


def entries(
    indices: Tensor, logprobs: Tensor, rows: RowsThatTakePart, tail: str, vocab: int
) -> Entries:
    """What the teacher lists; on a CPU raises where it makes no sense."""
    indices = indices.to(torch.int64)
    if not rows.all_kept:
        indices = torch.where(rows.kept.unsqueeze(-1), indices, -1)
    inside = indices.clamp(-1, vocab - 1)
    outside = inside != indices
    if watchers.may_look(indices) and bool(outside.any()):
        raise ValueError(
            f"teacher_indices: got {int(indices[outside][0])}, expected -1 (an empty slot) or 0 to "
            f"{vocab - 1}"
        )
    bad = outside.any(-1)
    indices = inside.masked_fill_(outside, -1)
    log_p = logprobs.detach().to(reference.compute_dtype(indices.device), copy=True)
    log_p.masked_fill_(indices < 0, -math.inf)
    total = None
    if tail in ("bucket", "drop"):
        total = log_p.exp().sum(-1)
        excess = total > MOST_PROBABILITY
        if watchers.may_look(indices) and bool(excess.any()):
            raise ValueError(
                f"teacher_logprobs: probabilities of a row sum to "
                f"{float(total[excess][0]):.6g}, expected at most 1: pass "
                "log-probabilities, not logits, or tail='renormalize'"
            )
        bad = bad | excess
    if tail == "sampled":
        indices, log_p = _merged(indices, log_p)
    return Entries(indices, log_p, total, bad)


def _merged(indices: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Samples with each token once; weights of repeated tokens are added up."""
    ascending, order = indices.sort(dim=-1, stable=True)
    largest = log_weights.amax(-1, keepdim=True).clamp(min=torch.finfo(log_weights.dtype).min)
    weights = (log_weights - largest).exp().gather(-1, order)
    # The last of equal tokens gets the sum; not by scatter_add, whose order varies on a GPU.
    step = 1
    while step < ascending.shape[-1]:
        same = ascending[..., step:] == ascending[..., :-step]
        before = torch.where(same, weights[..., :-step], 0.0)
        weights = torch.cat([weights[..., :step], weights[..., step:] + before], -1)
        step *= 2
    last = ascending.diff(dim=-1, append=torch.full_like(ascending[..., :1], -2)) != 0
    merged = torch.where(last, ascending, -1)
    return merged, torch.where(merged < 0, -math.inf, weights.log())


def listed_twice(ascending: Tensor) -> Tensor:
    """Whether rows ``(...)`` list a token twice; on a CPU raises instead."""
    twice = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)
    if watchers.may_look(ascending) and bool(twice.any()):
        token = int(ascending[..., 1:][twice][0])
        raise ValueError(
            f"teacher_indices: a row lists {token} twice, expected different tokens; -1 marks an "
            "empty slot"
        )
    return twice.any(-1)


def check_entries(name: str, student: Tensor, indices: Tensor, logprobs: Tensor) -> None:
    """Checks a sparse teacher against the student's logits or hidden states, called ``name``."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int64, torch.int32):
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"teacher_indices is {kind}, expected an int64 or int32 torch.Tensor")
    checks.strided("teacher_indices", indices)
    if indices.dim() != student.dim() or indices.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"teacher_indices has shape {tuple(indices.shape)}, expected (..., k) with the leading "
            f"shape of {name}, {tuple(student.shape[:-1])}"
        )
    if indices.shape[-1] == 0:
        raise ValueError("teacher_indices has shape (..., 0), expected at least one slot per row")
    checks.float_tensor("teacher_logprobs", logprobs)
    if logprobs.shape != indices.shape:
        raise ValueError(
            f"teacher_logprobs has shape {tuple(logprobs.shape)}, expected that of "
            f"teacher_indices, {tuple(indices.shape)}"
        )
    if logprobs.requires_grad:
        raise ValueError(
            "teacher_logprobs requires grad, expected a constant: pass teacher_logprobs.detach()"
        )
    for which, tensor in (("teacher_indices", indices), ("teacher_logprobs", logprobs)):
        if tensor.device != student.device:
            raise ValueError(
                f"{which} is on {tensor.device}, expected the device of {name}, {student.device}"
            )


def check_tail(tail: str, divergence: Divergence) -> None:
    """Checks that the tail is known and works with the divergence."""
    scalars.option("tail", tail)
    if tail == "sampled" and not isinstance(divergence, (ForwardKL, SoftCrossEntropy)):
        raise ValueError(
            f"divergence is {divergence.name}, expected forward_kl or soft_cross_entropy with "
            "tail='sampled': samples give no unbiased estimate of another"
        )
