"""The first largest logit of a row, for the metrics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1024  # columns


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
        logits = logits.detach()[..., :vocab]
        # PyTorch's max that tells where is several times slower than amax: it reads one chunk only.
        chunk = min(_CHUNK, vocab)
        whole = logits.unfold(-1, chunk, chunk).amax(-1)
        last = logits[..., -chunk:].amax(-1, keepdim=True)
        start = torch.cat([whole, last], -1).argmax(-1, keepdim=True) * chunk
        start = start.clamp(max=vocab - chunk)
        logit, place = logits.gather(-1, start + torch.arange(chunk, device=start.device)).max(-1)
        return cls(logit, start.squeeze(-1) + place)

    def of_all(self) -> Top:
        """The top of all processes, ``(...)``, from ``(processes, ...)``."""
        top = self.logit.amax(0)
        return Top(top, torch.where(self.logit == top, self.token, math.inf).amin(0))
