"""The compiled CUDA backend: addresses, strides and the current stream for ``kdkernels._C``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from ..divergences import Divergence
from ..extension import _C, missing
from ..options import METRICS, LogitsOptions, TailOptions
from .rows import (
    extension_refusals,
    has_row_scale,
    logits_params,
    scale_params,
    shard_params,
    tail_params,
)

T = TypeVar("T")

_MAX_VOCAB = 2**30
_built = hasattr(_C, "logits_cuda")
_device_reasons: dict[int, str] = {}


def _device_reason(index: int) -> str:
    if not _built:
        return "kdkernels was built without CUDA"
    if index not in _device_reasons:
        if torch.compiler.is_compiling():
            return ""  # tracing cannot look; a call that cannot be served raises then
        with torch.cuda.device(index) if torch.cuda.is_available() else nullcontext():
            _device_reasons[index] = _C.cuda_why_not(index)
    return _device_reasons[index]


def device_reasons(index: int = 0) -> list[str]:
    """Why no call on CUDA device ``index`` can be served; empty if some can."""
    if missing:
        return [missing]
    reasons = [] if torch.version.cuda else ["this PyTorch is built without CUDA"]
    if reason := _device_reason(index):
        reasons.append(reason)
    return reasons


def why_not(student: Tensor, teacher: Tensor, divergence: Divergence) -> list[str]:
    """Why this backend cannot serve a call; empty if it can."""
    device = student.device
    on_cuda = device.type == "cuda"
    reasons = [] if on_cuda else [f"the tensors are on {device}, not on a CUDA device"]
    # A device that the call does not use is left alone: to ask it would make a context there.
    if on_cuda or not torch.cuda.is_available():
        reasons += device_reasons((device.index if on_cuda else None) or 0)
    reasons += extension_refusals(student, teacher, divergence)
    if min(student.shape[-1], teacher.shape[-1]) > _MAX_VOCAB:
        reasons.append(f"the vocabulary is above 2**{_MAX_VOCAB.bit_length() - 1}")
    return reasons


def _launch(function: Callable[..., T], on: Tensor, *arguments: object) -> T:
    """Calls ``function`` for the device of ``on`` and its current stream."""
    with torch.cuda.device(on.device):
        stream = torch.cuda.current_stream()
        return function(*arguments, stream.device_index, stream.cuda_stream)


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    o: LogitsOptions,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, metrics and row scales, as in ``backends/cpu.py``."""
    lead = student.shape[:-1]
    floats = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    loss = floats(lead if o.reduction == "none" else ())
    metrics = floats((len(METRICS), *lead)) if o.metrics else None
    row_scale = floats(lead) if has_row_scale(gradient) else None
    scratch = floats(2 * math.prod(lead) + 1)
    per_row = labels, token_weight, normalizer
    results = row_scale, loss, metrics
    params = logits_params(student, teacher, *per_row, o, gradient, *results, o.reduction)
    _launch(_C.logits_cuda, student, params, scratch.data_ptr())
    return loss, metrics, row_scale


def shard(
    phase: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    states: Tensor,
    sums: Tensor | None,
    o: LogitsOptions,
    gradient: Tensor | None,
    row_scale: Tensor | None,
) -> bool:
    """Runs one phase of a shard of the vocabulary, as in ``backends/cpu.py``."""
    tensors = student, teacher, labels, weight, states, sums
    params = shard_params(phase, *tensors, o, gradient, row_scale)
    return _launch(_C.shard_cuda, student, params)


def tails(student: Tensor, listed: Tensor, kept: Tensor | None, o: TailOptions) -> Tensor:
    """References and log-sum-exps ``(o.results, ...)`` of the columns that are not listed."""
    shape = o.results, *student.shape[:-1]
    result = torch.empty(shape, dtype=torch.float32, device=student.device)
    if result.numel() > 0:
        _launch(_C.tail_cuda, student, tail_params(student, listed, kept, o, result))
    return result


def tails_gradient(
    student: Tensor,
    listed: Tensor,
    tails: Tensor,
    grad_tails: Tensor,
    grad_listed: Tensor,
    o: TailOptions,
    gradient: Tensor,
) -> None:
    """The gradient of the log-sum-exps and of the listed logits, written into ``gradient``."""
    gradients = gradient, grad_tails, grad_listed
    if gradient.numel() > 0:
        params = tail_params(student, listed, None, o, tails, gradients)
        _launch(_C.tail_cuda, student, params)


def scale_gradient(gradient: Tensor, grad_output: Tensor, row_scale: Tensor) -> None:
    """gradient *= grad_output * row_scale, in place; one number or one per row each."""
    if gradient.numel() > 0:
        _launch(_C.scale_cuda, gradient, scale_params(gradient, grad_output, row_scale))
