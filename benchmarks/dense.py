"""The textbook losses in PyTorch, as users write them: log-probabilities, then the formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import AlphaBeta
from kdkernels.divergences import DIVERGENCES, Divergence

#: Of the one divergence without defaults.
ALPHA_BETA = (0.3, 0.7)


def instance(name: str) -> Divergence:
    """The divergence with its default parameters."""
    return AlphaBeta(*ALPHA_BETA) if name == "alpha_beta" else DIVERGENCES[name]()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Terms of KL(p || q)."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none")


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = mixture(log_p, log_q, 0.5)
    return 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))


def alpha_beta(log_p: Tensor, log_q: Tensor) -> Tensor:
    a, b = ALPHA_BETA
    p, q = log_p.exp(), log_q.exp()
    both = a / (a + b) * p ** (a + b) + b / (a + b) * q ** (a + b)
    return -(p**a * q**b - both) / (a * b)


#: Terms for log p (teacher) and log q (student), whose sum over the vocabulary is the divergence.
TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "jsd": jsd,
    "skew_forward_kl": lambda log_p, log_q: kl(log_p, mixture(log_p, log_q, 0.1)),
    "skew_reverse_kl": lambda log_p, log_q: kl(log_q, mixture(log_q, log_p, 0.1)),
    "symmetric_kl": lambda log_p, log_q: 0.5 * (kl(log_p, log_q) + kl(log_q, log_p)),
    "tvd": lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs(),
    "alpha_beta": alpha_beta,
    "soft_cross_entropy": lambda log_p, log_q: -log_p.exp() * log_q,
}


def logits_loss(divergence: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The loss of ``(rows, vocab)`` logits at a temperature T: the mean over rows, times T²."""
    terms = TERMS[divergence]

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        log_q = F.log_softmax(student / temperature, dim=-1)
        log_p = F.log_softmax(teacher / temperature, dim=-1)
        return terms(log_p, log_q).sum(-1).mean() * temperature**2

    return loss


def linear_loss(divergence: str) -> Callable[..., Tensor]:
    """The same of hidden states ``(rows, hidden)`` and heads ``(vocab, hidden)``."""
    loss_of_logits = logits_loss(divergence)

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        temperature: float,
    ) -> Tensor:
        student = F.linear(student_hidden, student_weight)
        teacher = F.linear(teacher_hidden, teacher_weight)
        return loss_of_logits(student, teacher, temperature)

    return loss


def sparse_loss(divergence: str) -> Callable[..., Tensor]:
    """The same of logits beside the tokens ``(rows, k)`` that a teacher lists; the rest is one."""
    terms = TERMS[divergence]

    def with_tail(listed: Tensor) -> Tensor:
        tail = (1 - listed.exp().sum(-1, keepdim=True)).clamp(min=1e-8).log()
        return torch.cat([listed, tail], -1)

    def loss(student: Tensor, indices: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
        log_q = F.log_softmax(student.float() / temperature, dim=-1).gather(-1, indices)
        pair = with_tail(logprobs), with_tail(log_q)
        return terms(*pair).sum(-1).mean() * temperature**2

    return loss


LOSSES = {"logits": logits_loss, "sparse": sparse_loss, "linear": linear_loss}
