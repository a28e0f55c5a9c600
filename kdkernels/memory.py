"""Memory for large tensors on the CPU, kept for the next call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .extension import _C

#: Memory of at least this many bytes is kept. Below 32 MiB malloc may reuse its own, above never.
LARGE = 2**22


def empty_strided(
    shape: Sequence[int], strides: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """torch.empty_strided, but a large tensor on the CPU reuses the memory of an earlier one.

    PyTorch maps new memory for every large CPU tensor, and the system zeroes its pages when they
    are first written, which takes longer than computing what is written. The storage of a tensor
    made here cannot be resized.
    """
    large = math.prod(shape) * dtype.itemsize >= LARGE
    if large and device.type == "cpu" and _C is not None:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        with contextlib.suppress(MemoryError):  # for PyTorch's own, clearer error
            block = torch.frombuffer(_C.Memory(extent * dtype.itemsize), dtype=dtype)
            return block.as_strided(shape, strides)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty with the memory of :func:`empty_strided`."""
    return empty_strided(shape, dense_strides(shape), dtype=dtype, device=device)


def dense_strides(shape: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * max(1, shape[i + 1])
    return strides


def release_memory() -> int:
    """Returns the memory that kdkernels keeps for its next call to the system, at once.

    Large gradients and buffers on the CPU keep their pages when they are freed, so that the next
    call need not wait for the system to find and zero others. What is kept and what is in use never
    exceed what was in use at one time. The system takes kept pages by itself where memory runs
    short (``MADV_FREE``); until then they count as resident. Call this where the process is limited
    in address space instead (``ulimit -v``, strict overcommit), or before measuring memory.

    Returns:
        The bytes given back.

    Example:
        >>> import torch, kdkernels
        >>> student = torch.randn(64, 32000, requires_grad=True)
        >>> kdkernels.kd_loss(student, torch.randn(64, 32000)).backward()
        >>> student.grad = None
        >>> kdkernels.release_memory() >= 64 * 32000 * 4
        True
    """
    return 0 if _C is None else _C.release_kept_memory()
