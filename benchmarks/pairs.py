"""Pairs of logits, and what a loss of either level makes of them against float64.

Two heads that yield exactly the same logits stand behind each pair, so that losses of both levels
see one input. What is exact comes from the reference backend in float64 on the very tensors a loss
gets, whatever rounding made them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import kd_loss

from .peers import Loss


class Outcome(NamedTuple):
    """A loss and its gradient to the student, logits or hidden states."""

    loss: float
    gradient: Tensor  # float64


@functools.lru_cache(maxsize=1)
def identity(vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """With one more column, of zeros."""
    return torch.eye(vocab, vocab + 1, dtype=dtype, device=device)


def head(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight that give the logits exactly: the logits, and the identity.

    So the hidden states' gradient is that of the logits. Columns of -inf come from the weight,
    through a hidden state of 1: a hidden state of -inf would make every other logit NaN.
    """
    masked = logits.isneginf().all(0)
    hidden = torch.cat([logits.masked_fill(masked, 0), torch.ones_like(logits[:, :1])], dim=1)
    weight = identity(logits.shape[1], logits.dtype, logits.device)
    if masked.any():
        weight = weight.masked_fill(masked[:, None], 0)
        weight[masked, -1] = -torch.inf
    return hidden, weight


class Pair:
    """Logits of a student and a teacher, ``(rows, vocab)`` each, and the heads behind them."""

    def __init__(
        self, student: Tensor, teacher: Tensor, heads: tuple[Tensor, ...] | None = None
    ) -> None:
        self.student, self.teacher, self._heads = student, teacher, heads
        self._exact: dict[tuple[str, float, str], Outcome] = {}

    def to(self, device: torch.device) -> Pair:
        heads = self._heads and tuple(x.to(device) for x in self._heads)
        return Pair(self.student.to(device), self.teacher.to(device), heads)

    @property
    def heads(self) -> tuple[Tensor, ...]:
        """Hidden states and weight of the student, then of the teacher."""
        if self._heads is None:
            self._heads = (*head(self.student), *head(self.teacher))
        return self._heads

    @functools.cached_property
    def finite(self) -> Tensor:
        """The hidden states that meet no infinite weight."""
        return self.heads[1].isfinite().all(0)

    def exact(self, divergence: str, temperature: float, level: str = "logits") -> Outcome:
        """In float64, with the gradient to the logits or to the finite hidden states."""
        key = divergence, temperature, level
        if key not in self._exact and level == "linear":
            loss, gradient = self.exact(divergence, temperature)
            weight = self.heads[1][:, self.finite].double()
            self._exact[key] = Outcome(loss, gradient @ weight)
        elif key not in self._exact:
            leaf = self.student.double().requires_grad_()
            options = {"divergence": divergence, "temperature": temperature}
            loss = kd_loss(leaf, self.teacher.double(), backend="reference", **options)
            loss.backward()
            self._exact[key] = Outcome(loss.item(), leaf.grad)
        return self._exact[key]


def compare(
    loss: Loss, level: str, pair: Pair, divergence: str, temperature: float, scale: float = 1.0
) -> tuple[Outcome, Outcome]:
    """What a loss gives and what is exact; the backward starts at ``scale``, like a loss scaler's.

    The gradients are those of the logits, or of the hidden states that meet a finite weight.
    """
    student, *others = pair.heads if level == "linear" else (pair.student, pair.teacher)
    student = student.detach().clone().requires_grad_()
    result = loss(student, *others, temperature)
    result.backward(torch.full_like(result, scale))
    gradient = student.grad[:, pair.finite] if level == "linear" else student.grad
    got = Outcome(result.item(), gradient.double() / scale)
    return got, pair.exact(divergence, temperature, level)
