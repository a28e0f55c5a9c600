"""Row weights and normalizer, computed in PyTorch without waiting for a device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import LogitsOptions


class RowPlan(NamedTuple):
    """Per-row inputs of a call: the gradient is multiplied by weight / (normalizer * divisor)."""

    weight: Tensor | None  # (rows,), 0: the row takes no part; None: all 1
    normalizer: Tensor | None  # (); None: 1
    divisor: float  # what the host knows of the normalizer


def row_weights(
    labels: Tensor | None, token_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor | None:
    """Weights of the rows ``(...)``, 0 where a row takes no part; None: all 1."""
    weight = None if token_weight is None else token_weight.to(dtype)
    if labels is None:
        return weight
    kept = labels != ignore_index
    return kept.to(dtype) if weight is None else torch.where(kept, weight, 0.0)


def row_plan(
    labels: Tensor | None,  # (...), contiguous
    token_weight: Tensor | None,  # (...) float32, contiguous
    normalizer: Tensor | None,  # () float32
    o: LogitsOptions,
    rows: int,
    dtype: torch.dtype = torch.float32,  # of weights
) -> RowPlan:
    """Weights of the rows, 0 for ignored ones, and what the reduction divides by."""
    weight = row_weights(labels, token_weight, o.ignore_index, dtype)
    weight = None if weight is None else weight.view(-1)
    if o.reduction != "mean":
        return RowPlan(weight, None, 1.0)
    if normalizer is not None:
        return RowPlan(weight, normalizer, 1.0)
    if weight is None:
        return RowPlan(None, None, float(max(1, rows)))
    total = weight.sum()
    return RowPlan(weight, total.masked_fill_(total <= 0, 1.0), 1.0)
