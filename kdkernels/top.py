"""The first largest logit of a row, for the metrics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Top(NamedTuple):
    """The first largest logit of every row, ``(...)`` each."""

    logit: Tensor
    token: Tensor

    @classmethod
    def of(cls, logits: Tensor, vocab: int) -> Top:
        """The top among the first ``vocab`` columns; -inf if there are none."""
        if vocab == 0:
            nothing = logits.new_full(logits.shape[:-1], -math.inf)
            return cls(nothing, torch.zeros_like(nothing, dtype=torch.int64))
        return cls(*logits.detach()[..., :vocab].max(-1))

    def of_all(self) -> Top:
        """The top of all processes, ``(...)``, from ``(processes, ...)``."""
        top = self.logit.amax(0)
        return Top(top, torch.where(self.logit == top, self.token, math.inf).amin(0))
