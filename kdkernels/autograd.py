"""Autograd around the operators: the forward computes the gradient, the backward hands it out."""

from __future__ import annotations

import torch
from torch import Tensor

from .options import LogitsOptions

_ops = torch.ops.kdkernels


class LogitsLoss(torch.autograd.Function):
    """Loss and metrics of raw logits; saves only the gradient, so both logits can be freed."""

    @staticmethod
    def forward(ctx, student, teacher, labels, token_weight, normalizer, backend, inplace, options):
        arguments = (student, teacher, labels, token_weight, normalizer, backend, *options)
        if inplace:
            loss, metrics, row_scale = _ops.logits_loss_and_grad_.default(*arguments)
            gradient = student
        else:
            loss, metrics, row_scale, gradient = _ops.logits_loss_and_grad.default(*arguments)
        ctx.save_for_backward(gradient, row_scale)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.consumed = False
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_output, _):
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "kd_loss: its gradient is computed in the forward and has none of its own; "
                    "use create_graph=False or backend='reference'"
                )
            if ctx.consumed:
                raise RuntimeError(
                    "kd_loss: a second backward through the same loss; the first one consumed the "
                    "saved gradient. Call kd_loss again, or use backend='reference'"
                )
            ctx.consumed = True
        if grad_output is None:
            return (None,) * 8
        gradient, row_scale = ctx.saved_tensors
        gradient = gradient.detach()
        scale = grad_output.to(torch.float32).contiguous()  # from sum() it comes expanded
        _ops.scale_gradient_.default(gradient, scale, row_scale, ctx.backend)
        return gradient, *(None,) * 7


def logits_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    backend: str,
    inplace: bool,
    options: LogitsOptions,
) -> tuple[Tensor, Tensor]:
    """Loss and stacked metrics (empty unless asked for) through a compiled backend."""
    if student.requires_grad and torch.is_grad_enabled():
        return LogitsLoss.apply(
            student, teacher, labels, token_weight, normalizer, backend, inplace, options
        )
    arguments = (student, teacher, labels, token_weight, normalizer, backend, *options)
    return _ops.logits_loss.default(*arguments)
