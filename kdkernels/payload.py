"""Blocks of rows of a teacher's tensor, on the student's device.

The tensor may be there already, or on the host, also in a memory-mapped file: then only blocks of
its rows are ever on the device, and on a GPU a block is copied while the one before is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Span = tuple[int, int]  # of rows, begin and end


class _Rows:
    """Rows of a (..., width) tensor, all or those of an index, without copying it as a whole."""

    def __init__(self, tensor: Tensor, index: Tensor | None):
        self.lead = tensor.shape[:-1]
        try:
            self.tensor, self.flat = tensor.view(-1, tensor.shape[-1]), True
        except RuntimeError:  # such as hidden[:, :-1]
            self.tensor, self.flat = tensor, False
        self.index = index

    def take(self, begin: int, end: int) -> Tensor:
        if self.index is not None:
            index = self.index[begin:end]
            if self.flat:
                return self.tensor.index_select(0, index)
        elif self.flat:
            return self.tensor[begin:end]
        else:
            index = torch.arange(begin, end, device=self.tensor.device)
        return self.tensor[_unravelled(index, self.lead)]


def _unravelled(index: Tensor, lead: Sequence[int]) -> tuple[Tensor, ...]:
    """torch.unravel_index without waiting for a GPU, to which that copies the shape."""
    places = []
    for size in reversed(lead):
        places.append(index % size)
        index = index // size
    return tuple(reversed(places))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a small tensor from the host, without waiting for the device."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def take(tensor: Tensor, index: Tensor | None) -> Tensor:
    """All rows of a (..., width) tensor, or those of an index, as (rows, width)."""
    rows = tensor.shape[:-1].numel() if index is None else index.numel()
    return _Rows(tensor, index).take(0, rows)


def blocks(
    tensor: Tensor,  # (..., width)
    index: Tensor | None,  # (rows,) where the tensor is; None: all rows
    spans: Sequence[Span],
    device: torch.device,
) -> Iterator[Tensor]:
    """The (rows, width) block of each span on ``device``, valid until the next one is asked for."""
    rows = _Rows(tensor, index)
    if tensor.device != device and device.type == "cuda" and spans:
        yield from _copied_ahead(rows, spans, device)
    else:
        for begin, end in spans:
            yield rows.take(begin, end).to(device)


def _pinned(rows: int, like: Tensor) -> Tensor:
    return torch.empty(rows, like.shape[-1], dtype=like.dtype, pin_memory=True)


def _copied_ahead(
    rows: _Rows, spans: Sequence[Span], device: torch.device, cuda: Any = torch.cuda
) -> Iterator[Tensor]:
    """Copies one block ahead of its use, through two pinned buffers and a stream of its own."""
    most = max(end - begin for begin, end in spans)
    current, side = cuda.current_stream(device), cuda.Stream(device)
    staged = [_pinned(most, rows.tensor) for _ in range(2)]
    arrived = [torch.empty_like(buffer, device=device) for buffer in staged]
    copied, used = [cuda.Event() for _ in range(2)], [cuda.Event() for _ in range(2)]
    side.wait_stream(current)  # whose earlier work may still use the memory of `arrived`

    def fetch(i: int) -> None:
        slot, (begin, end) = i % 2, spans[i]
        copied[slot].synchronize()  # the block before last has left the pinned buffer
        source = staged[slot][: end - begin].copy_(rows.take(begin, end))
        with cuda.stream(side):
            side.wait_event(used[slot])
            arrived[slot][: end - begin].copy_(source, non_blocking=True)
            copied[slot].record(side)

    try:
        fetch(0)
        for i, (begin, end) in enumerate(spans):
            if i + 1 < len(spans):
                fetch(i + 1)
            current.wait_event(copied[i % 2])
            yield arrived[i % 2][: end - begin]
            used[i % 2].record(current)
    finally:  # where a block's user fails, the next one may still be on its way to freed memory
        current.wait_stream(side)
