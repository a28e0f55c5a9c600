"""Autograd around the operators: the forward computes the gradient, the backward hands it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import ops
from .backends.row_plan import row_weights
from .options import LinearOptions, LogitsOptions, replaced
from .watchers import goes_straight, hides_gradient, is_legacy_batchedtensor, transforms_active

_ops = torch.ops.kdkernels


def check_backward(ctx: Any, name: str, consumes: bool = True) -> None:
    """Raises where the one gradient that the forward computed would be wrong."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: its gradient is computed without a graph and has none of its own; "
            "use create_graph=False or backend='reference'"
        )
    if consumes and ctx.consumed:
        raise RuntimeError(
            f"{name}: a second backward through the same loss; the first one consumed the "
            f"saved gradient. Call {name} again, or use backend='reference'"
        )
    ctx.consumed = True


def each_once(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors of which none is another, as torch.compile wants the arguments of a Function."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    result: list[Tensor | None] = []
    for x in tensors:
        again = x is not None and any(x is other for other in result)
        result.append(x.view_as(x) if x is not None and again else x)
    return result


def _check_no_tangent(name: str, *tensors: Tensor | None) -> None:
    """Raises for a forward-mode derivative; PyTorch itself raises where a Function is applied."""
    if torch.compiler.is_compiling():  # tangents cannot be seen then
        check_no_transform(name)
        return
    for tensor in tensors:
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{name}: it has no forward-mode derivative (jvp); use backend='reference'"
            )


def check_no_transform(name: str) -> None:
    """Raises under a torch.func transform, which the Functions here do not support."""
    if transforms_active():
        raise RuntimeError(f"{name}: torch.func cannot transform it; use backend='reference'")


class LogitsLoss(torch.autograd.Function):
    """Loss and metrics of raw logits; saves only the gradient, so both logits can be freed."""

    @staticmethod
    def forward(ctx, student, others):  # few arguments: each slows a small call
        constants, backend, inplace, options, straight = others
        loss, metrics, row_scale, gradient = ops.loss_and_grad(
            student, constants, backend, options, inplace, straight
        )
        if inplace:
            gradient = gradient.detach()  # a Function's view, such as to_local(), cannot be saved
        left_out = _left_out(constants, options) if options.reduction == "none" else None
        ctx.save_for_backward(gradient, row_scale, left_out)
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.consumed = False
        if not options.metrics:
            return loss
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_output, *_):
        check_backward(ctx, "kd_loss")
        if grad_output is None:
            return None, None
        gradient, row_scale, left_out = ctx.saved_tensors
        gradient = gradient.detach()
        if left_out is not None:  # whose losses may have any gradient, NaN too
            grad_output = grad_output.masked_fill(left_out, 0.0)
        ops.scale_gradient(gradient, _as_scale("kd_loss", grad_output), row_scale, ctx.backend)
        return gradient, None


def _left_out(constants: tuple[Tensor | None, ...], options: LogitsOptions) -> Tensor | None:
    """Which rows take no part, ``(...)``; None where all do."""
    _, labels, token_weight, _ = constants
    weight = row_weights(labels, token_weight, options.ignore_index, torch.float32)
    return None if weight is None else weight == 0


# What Function.apply calls where no transform is active, without its checks.
_apply_logits_loss = super(torch.autograd.Function, LogitsLoss).apply


def _as_scale(name: str, grad_output: Tensor) -> Tensor:
    """grad_output as kernels read it: float32 and contiguous, where sum() gives an expanded one."""
    if not torch.compiler.is_compiling() and is_legacy_batchedtensor(grad_output):
        raise RuntimeError(
            f"{name}: its backward takes no batch of gradients (is_grads_batched); pass one by "
            "one, or use backend='reference'"
        )
    if grad_output.dtype != torch.float32:
        grad_output = grad_output.to(torch.float32)
    return grad_output.contiguous()


def logits_loss(
    student: Tensor,
    constants: tuple[Tensor | None, ...],  # teacher, labels, token_weight, normalizer
    backend: str,
    inplace: bool,
    options: LogitsOptions,
) -> tuple[Tensor, Tensor | None]:
    """The loss and, if asked for, the stacked metrics, by a compiled backend."""
    straight = goes_straight(student, *constants)
    if student.requires_grad and torch.is_grad_enabled():
        if not straight:
            check_no_transform("kd_loss")
        apply = _apply_logits_loss if straight else LogitsLoss.apply
        outputs = apply(student, (constants, backend, inplace, options, straight))
        return outputs if options.metrics else (outputs, None)
    _check_no_tangent("kd_loss", student, constants[0])
    if not straight and torch.is_grad_enabled() and hides_gradient(student):
        check_no_transform("kd_loss")  # grad around vmap; vmap alone works
    loss, metrics = ops.loss(student, constants, backend, options, straight)
    return loss, metrics if options.metrics else None


class LinearLoss(torch.autograd.Function):
    """Loss and metrics of hidden states and heads; saves the gradients of the student's tensors."""

    @staticmethod
    def forward(ctx, count, needs_grad, linear, options, *tensors):
        student = tensors[: 2 * count + 1]  # hidden states, weights and bias
        loss, metrics, gradients = _linear_loss(count, tensors, needs_grad, linear, options)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in student]
        ctx.needs_grad, ctx.backend = needs_grad, linear.backend
        ctx.rest = len(tensors) - len(student)
        ctx.consumed = False
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_output, _):
        check_backward(ctx, "linear_kd_loss")
        if grad_output is None:
            return (None,) * (4 + len(ctx.dtypes) + ctx.rest)
        scale = _as_scale("linear_kd_loss", grad_output)
        results = []
        for gradient, dtype, needed in zip(
            ctx.saved_tensors, ctx.dtypes, ctx.needs_grad, strict=True
        ):
            if needed:
                gradient = gradient.detach()
                ops.scale_gradient(gradient, scale, None, ctx.backend)
            results.append(gradient.to(dtype) if needed else None)
        return None, None, None, None, *results, *(None,) * ctx.rest


class LinearLossPerToken(torch.autograd.Function):
    """The same with one loss per token.

    grad_output then weights the tokens, and a weight gradient, which sums over them, cannot be
    weighted afterwards: the backward computes the loss again, as the sum weighted by grad_output.
    """

    @staticmethod
    def forward(ctx, count, needs_grad, linear, options, *tensors):
        loss, metrics, _ = _linear_loss(count, tensors, [False] * len(needs_grad), linear, options)
        ctx.unsaved = ()
        if not torch.compiler.is_compiling():
            tensors, ctx.unsaved = _without_inference_tensors(tensors)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        ctx.arguments = count, needs_grad, linear, options
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_output, _):
        count, needs_grad, linear, options = ctx.arguments
        tensors = list(ctx.saved_tensors)
        for i, tensor in ctx.unsaved:
            tensors[i] = tensor
        check_backward(ctx, "linear_kd_loss", consumes=False)
        results = [None] * len(tensors)
        if grad_output is None:
            return None, None, None, None, *results
        token_weight = _as_scale("linear_kd_loss", grad_output)
        position = 2 * count + 1 + _TOKEN_WEIGHT
        if tensors[position] is not None:
            weight = tensors[position]
            # Where a row takes no part, its loss may have any gradient.
            token_weight = (token_weight * weight).masked_fill(weight == 0, 0.0)
        tensors[position] = token_weight
        weighted = replaced(options, reduction="sum", metrics=False)
        gradients = _linear_loss(count, tensors, needs_grad, linear, weighted)[2]
        for i, (gradient, needed) in enumerate(zip(gradients, needs_grad, strict=True)):
            results[i] = gradient.to(tensors[i].dtype) if needed else None
        return None, None, None, None, *results


def _without_inference_tensors(tensors):
    """The tensors that autograd can save, and (position, tensor) of those that it cannot."""
    others = [(i, x) for i, x in enumerate(tensors) if x is not None and x.is_inference()]
    tensors = list(tensors)
    for i, _ in others:
        tensors[i] = None
    return tensors, others


#: Where token_weight stands among the tensors after the student's.
_TOKEN_WEIGHT = 5


def _linear_loss(count, tensors, needs_grad, linear, options):
    hidden, weight, rest = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
    head = list(hidden), list(weight)
    return _ops.linear_loss.default(*head, *rest, needs_grad, *linear, *options)


def linear_loss(
    student_hidden: list[Tensor],
    student_weight: list[Tensor],
    student_bias: Tensor | None,
    teacher: tuple[Tensor | None, ...],  # hidden, weight, bias, logits
    per_token: tuple[Tensor | None, ...],  # labels, token_weight
    normalizer: Tensor | None,
    row_index: Tensor | None,
    linear: LinearOptions,
    options: LogitsOptions,
) -> tuple[Tensor, Tensor]:
    """Loss and stacked metrics of student logits sum(hidden @ weight.T) + bias."""
    student = each_once((*student_hidden, *student_weight, student_bias))
    grad = torch.is_grad_enabled()
    needs_grad = [grad and x is not None and x.requires_grad for x in student]
    if torch.compiler.is_compiling():  # likewise: models may share tensors
        teacher = tuple(None if x is None else x.detach() for x in teacher)
    tensors = (*student, *teacher, *per_token, normalizer, row_index)
    count = len(student_hidden)
    if not any(needs_grad):
        _check_no_tangent("linear_kd_loss", *student, *teacher)
    check_no_transform("linear_kd_loss")
    if not any(needs_grad):
        return _linear_loss(count, tensors, needs_grad, linear, options)[:2]
    function = LinearLossPerToken if options.reduction == "none" else LinearLoss
    return function.apply(count, needs_grad, linear, options, *tensors)
