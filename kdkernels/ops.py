"""Operators of the logits level: one schema each, a fake for tracing, backends behind a name.

They carry no autograd formula; :mod:`kdkernels.autograd` wraps them. Mutating ones are separate and
return no alias.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .backends import cpu, cuda, triton
from .options import METRICS, LogitsOptions

_IMPLEMENTATIONS = {"cpu": cpu, "cuda": cuda, "triton": triton}

_TENSORS = "Tensor teacher, Tensor? labels, Tensor? token_weight, Tensor? normalizer, str backend"
SCALARS = (
    "str divergence, float parameter_0, float parameter_1, float temperature, float kd_weight, "
    "float ce_weight, int ignore_index, str reduction, SymInt vocab, float student_scale, "
    "float student_softcap, float teacher_scale, float teacher_softcap, bool metrics"
)

library = torch.library.Library("kdkernels", "DEF")
library.define(
    f"logits_loss(Tensor student, {_TENSORS}, {SCALARS}) -> (Tensor loss, Tensor metrics)"
)
library.define(
    f"logits_loss_and_grad(Tensor student, {_TENSORS}, {SCALARS})"
    " -> (Tensor loss, Tensor metrics, Tensor row_scale, Tensor gradient)"
)
library.define(
    f"logits_loss_and_grad_(Tensor(a!) student, {_TENSORS}, {SCALARS})"
    " -> (Tensor loss, Tensor metrics, Tensor row_scale)"
)
library.define(
    "scale_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor row_scale, str backend) -> ()"
)


def _implement(name: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


@_implement("logits_loss")
def _logits_loss(student, teacher, labels, token_weight, normalizer, backend, *scalars):
    run = _IMPLEMENTATIONS[backend].logits_loss
    options = LogitsOptions(*scalars)
    return run(student, teacher, labels, token_weight, normalizer, options, None)[:2]


@_implement("logits_loss_and_grad")
def _logits_loss_and_grad(student, teacher, labels, token_weight, normalizer, backend, *scalars):
    run = _IMPLEMENTATIONS[backend].logits_loss
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    options = LogitsOptions(*scalars)
    return *run(student, teacher, labels, token_weight, normalizer, options, gradient), gradient


@_implement("logits_loss_and_grad_")
def _logits_loss_and_grad_(student, teacher, labels, token_weight, normalizer, backend, *scalars):
    _check_inplace(student, teacher)
    run = _IMPLEMENTATIONS[backend].logits_loss
    options = LogitsOptions(*scalars)
    outputs = run(student, teacher, labels, token_weight, normalizer, options, student)
    torch.autograd.graph.increment_version(student)
    return outputs


@_implement("scale_gradient_")
def _scale_gradient_(gradient, grad_output, row_scale, backend):
    _IMPLEMENTATIONS[backend].scale_gradient(gradient, grad_output, row_scale)
    # Also where nothing changed: the gradient is handed out, a second backward must not reuse it.
    torch.autograd.graph.increment_version(gradient)


def _check_inplace(student: Tensor, teacher: Tensor) -> None:
    extent = 1  # of the dimensions inside the one looked at
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1:
            if stride < extent:
                raise ValueError(
                    f"inplace_grad: student_logits of shape {tuple(student.shape)} and strides "
                    f"{student.stride()} overlap themselves; pass a tensor of their own"
                )
            extent = stride * (size - 1) + extent
    storage, other = student.untyped_storage(), teacher.untyped_storage()
    if storage.data_ptr() == other.data_ptr() and storage.nbytes() > 0:
        raise ValueError("inplace_grad: student_logits and teacher_logits share their memory")


def _fake_outputs(student, reduction, metrics):
    lead = student.shape[:-1]
    loss = student.new_empty(lead if reduction == "none" else (), dtype=torch.float32)
    stacked = student.new_empty((len(METRICS), *lead) if metrics else 0, dtype=torch.float32)
    return loss, stacked


def _fake_row_scale(student):
    half = student.dtype == torch.float16
    return student.new_empty(student.shape[:-1] if half else 0, dtype=torch.float32)


@torch.library.register_fake("kdkernels::logits_loss", lib=library)
def _(student, *rest):
    options = LogitsOptions(*rest[5:])
    return _fake_outputs(student, options.reduction, options.metrics)


@torch.library.register_fake("kdkernels::logits_loss_and_grad", lib=library)
def _(student, *rest):
    options = LogitsOptions(*rest[5:])
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    outputs = _fake_outputs(student, options.reduction, options.metrics)
    return *outputs, _fake_row_scale(student), gradient


@torch.library.register_fake("kdkernels::logits_loss_and_grad_", lib=library)
def _(student, *rest):
    options = LogitsOptions(*rest[5:])
    return *_fake_outputs(student, options.reduction, options.metrics), _fake_row_scale(student)


@torch.library.register_fake("kdkernels::scale_gradient_", lib=library)
def _(gradient, grad_output, row_scale, backend):
    return None
