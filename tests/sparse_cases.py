"""A sparse teacher's entries, one way to run a loss of them, and its definition in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import sparse_kd_loss
from kdkernels.divergences import as_divergence
from kdkernels.options import TAILS
from kdkernels.reference import transform

from .cases import ONE_OF_EACH
from .harness import Result, assert_matches, move, run_backward

PAIRS = [
    (tail, divergence)
    for divergence in ONE_OF_EACH
    for tail in TAILS
    if tail != "sampled" or divergence.name in ("forward_kl", "soft_cross_entropy")
]


def top(teacher: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k most probable tokens, shuffled, and their log-probabilities."""
    logprobs, indices = (teacher.double() / temperature).log_softmax(-1).topk(k, -1)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
    return indices[..., order], logprobs[..., order].float()


def run(backend, student, indices, logprobs, **options) -> Result:
    entries = move(indices, backend.device), move(logprobs, backend.device)

    def loss(logits, **options):
        options = {name: move(value, backend.device) for name, value in options.items()}
        return sparse_kd_loss(logits, *entries, backend=backend.backend, **options)

    return run_backward(backend, student, loss, **options)


def compared(log_q, tokens, log_p, tail):
    """What a divergence compares, from a whole row's log q."""
    if tail == "sampled":
        merged = {}
        for token, weight in zip(tokens.tolist(), log_p.exp().tolist(), strict=True):
            merged[token] = merged.get(token, 0.0) + weight
        tokens = torch.tensor(list(merged), dtype=torch.int64)
        log_p = torch.tensor(list(merged.values()), dtype=torch.float64).log()
        return log_p - log_p.logsumexp(-1), log_q[tokens]
    if tail == "drop":
        return log_p, log_q[tokens]
    if tail == "renormalize":
        return log_p.log_softmax(-1), log_q[tokens].log_softmax(-1)
    others = torch.ones_like(log_q, dtype=torch.bool)
    others[tokens] = False
    listed = log_p.exp().sum().clamp(max=1)  # which may round to more
    rest = torch.log1p(-listed) if others.any() else torch.tensor(-torch.inf).double()
    log_p = log_p if others.any() else log_p.log_softmax(-1)
    q = log_q[others].logsumexp(-1) if others.any() else torch.tensor(-torch.inf).double()
    return torch.cat([log_p, rest.reshape(1)]), torch.cat([log_q[tokens], q.reshape(1)])


def oracle(
    student,
    indices,
    logprobs,
    *,
    tail="bucket",
    divergence="forward_kl",
    temperature=1.0,
    labels=None,
    kd_weight=1.0,
    ce_weight=0.0,
    token_weight=None,
    reduction="mean",
    normalizer=None,
    vocab_size=None,
    student_scale=1.0,
    student_softcap=None,
    grad_output=None,
) -> Result:
    """Row by row, without metrics."""
    leaf = student.detach().double().requires_grad_()
    rows = leaf.reshape(-1, leaf.shape[-1])[:, :vocab_size]
    count = rows.shape[0]
    weights = torch.ones(count).double()
    if token_weight is not None:
        weights = token_weight.double().reshape(-1)
    if labels is not None:
        weights = torch.where(labels.reshape(-1) == -100, 0.0, weights)
    flat = indices.reshape(count, -1), logprobs.double().reshape(count, -1)
    losses = []
    for row in range(count):
        if weights[row] == 0:
            losses.append(torch.zeros(()).double())
            continue
        logits = transform(rows[row], student_scale, student_softcap or 0.0)
        used = flat[0][row] >= 0
        log_p, log_q = compared(
            (logits / temperature).log_softmax(-1), flat[0][row][used], flat[1][row][used], tail
        )
        value = as_divergence(divergence).value(log_p, log_q).sum()
        loss = kd_weight * temperature**2 * value
        if labels is not None and ce_weight:
            loss = loss - ce_weight * logits.log_softmax(-1)[labels.reshape(-1)[row]]
        losses.append(weights[row] * loss)
    loss = torch.stack(losses).reshape(leaf.shape[:-1])
    if reduction != "none":
        total = weights.sum() if normalizer is None else normalizer
        loss = loss.sum() / (total if reduction == "mean" else 1)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.double())
    return Result(loss.detach(), leaf.grad, None)


def check(backend, student, indices, logprobs, **options) -> Result:
    """What :func:`run` gives, compared with :func:`oracle`."""
    actual = run(backend, student, indices, logprobs, **options)
    expected = oracle(student, indices, logprobs, **options)
    divergence = as_divergence(options.get("divergence", "forward_kl")).name
    assert_matches(actual, expected, divergence, student.dtype)
    return actual
