"""The Triton backend: tensors and options as arguments of the kernels in kdkernels.triton."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from ..divergences import REGISTERED, Divergence, is_built_in
from ..options import METRICS, LogitsOptions, TailOptions
from .rows import address, dtype_refusals, has_row_scale


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # something stands in for it, as in programs that mock Triton
        return False


_INSTALLED = _installed()


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(student: Tensor, teacher: Tensor, divergence: Divergence) -> list[str]:
    """Why this backend cannot serve a call; empty if it can."""
    reasons = []
    if not _INSTALLED:
        reasons.append("Triton is not installed")
    if student.device.type == "cpu" and not _interpreted():
        reasons.append("the tensors are on cpu and TRITON_INTERPRET is not set")
    elif student.device.type not in ("cpu", "cuda", "xpu"):
        reasons.append(f"the tensors are on {student.device}")
    reasons += dtype_refusals(student, teacher)
    registered = REGISTERED.get(divergence.name)
    is_registered = registered is not None and type(registered.divergence) is type(divergence)
    if not (is_registered or is_built_in(divergence)):
        reasons.append(
            f"divergence {type(divergence).__name__} has no Triton functions; "
            "kdkernels.register_divergence gives it some"
        )
    return reasons


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
    from ..triton import launch

    lead = student.shape[:-1]
    floats = functools.partial(student.new_empty, dtype=torch.float32)
    row_loss = floats(lead)
    metrics = floats((len(METRICS), *lead)) if o.metrics else None
    row_scale = floats(lead) if has_row_scale(gradient) else None
    per_row = labels, token_weight, normalizer, row_loss, row_scale, metrics
    launch.loss(launch.Call(student, teacher, gradient, *per_row, o))
    return row_loss if o.reduction == "none" else row_loss.sum(), metrics, row_scale


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
    from ..triton import launch

    per_row = labels, weight, states, sums, row_scale
    return launch.shard(launch.ShardCall(phase, student, teacher, gradient, *per_row, o))


def tails(student: Tensor, listed: Tensor, kept: Tensor | None, o: TailOptions) -> Tensor:
    """References and log-sum-exps ``(o.results, ...)`` of the columns that are not listed."""
    from ..triton import launch

    result = student.new_empty((o.results, *student.shape[:-1]), dtype=torch.float32)
    launch.tails(student, listed, kept, o, result)
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
    from ..triton import launch

    launch.tails_gradient(student, gradient, listed, tails, grad_tails, grad_listed, o)


def scale_gradient(gradient: Tensor, grad_output: Tensor, row_scale: Tensor | None) -> None:
    """gradient *= grad_output * row_scale, in place; one number or one per row each."""
    from ..triton import launch

    launch.scale(gradient, grad_output, row_scale if address(row_scale) else None)
