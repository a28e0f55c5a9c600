"""Operators of the logits level: a schema and a fake each; the backend is an argument.

They carry no autograd formula; :mod:`kdkernels.autograd` wraps them, through :func:`loss`,
:func:`loss_and_grad` and :func:`scale_gradient`. Operators that write into an argument are separate
ones and do not return it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import memory, sharded
from .backends import IMPLEMENTATIONS
from .backends.rows import check_in_place, gradient_like, has_row_scale, in_rows
from .options import METRICS, LogitsOptions, schema_of
from .watchers import goes_straight

_TENSORS = "Tensor teacher, Tensor? labels, Tensor? token_weight, Tensor? normalizer, str backend"
_SCALARS = schema_of(LogitsOptions)

library = torch.library.Library("kdkernels", "DEF")
library.define(
    f"logits_loss(Tensor student, {_TENSORS}, {_SCALARS}) -> (Tensor loss, Tensor metrics)"
)
library.define(
    f"logits_loss_and_grad(Tensor student, {_TENSORS}, {_SCALARS})"
    " -> (Tensor loss, Tensor metrics, Tensor row_scale, Tensor gradient)"
)
library.define(
    f"logits_loss_and_grad_(Tensor(a!) student, {_TENSORS}, {_SCALARS})"
    " -> (Tensor loss, Tensor metrics, Tensor row_scale)"
)
library.define("touch_(Tensor(a!) x) -> ()")
library.define(
    "scale_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor row_scale, str backend) -> ()"
)

_ops = torch.ops.kdkernels


def _by_kernels(tensors, backend, options, gradient):
    """Loss, metrics and row scales (each None if there is none), after copies where needed."""
    student, teacher, labels, token_weight, normalizer = tensors
    if not (student.is_contiguous() and teacher.is_contiguous()):  # in_rows takes longer to see it
        student, teacher = in_rows(student), in_rows(teacher)
    labels = None if labels is None else labels.contiguous()
    token_weight = None if token_weight is None else token_weight.contiguous()
    arguments = student, teacher, labels, token_weight, normalizer, options, gradient
    if options.group:
        return sharded.logits_loss(IMPLEMENTATIONS[backend].shard, *arguments)
    return IMPLEMENTATIONS[backend].logits_loss(*arguments)


def _logits_loss(student, teacher, labels, token_weight, normalizer, backend, *scalars):
    tensors = student, teacher, labels, token_weight, normalizer
    loss, metrics, _ = _by_kernels(tensors, backend, LogitsOptions(*scalars), None)
    return loss, _or_empty(metrics, loss)


def _logits_loss_and_grad(student, teacher, labels, token_weight, normalizer, backend, *scalars):
    tensors = student, teacher, labels, token_weight, normalizer
    outputs = _run(tensors, backend, LogitsOptions(*scalars), inplace=False)
    loss, metrics, row_scale, gradient = outputs
    return loss, _or_empty(metrics, loss), _or_empty(row_scale, loss), gradient


def _logits_loss_and_grad_(student, teacher, labels, token_weight, normalizer, backend, *scalars):
    tensors = student, teacher, labels, token_weight, normalizer
    loss, metrics, row_scale, _ = _run(tensors, backend, LogitsOptions(*scalars), inplace=True)
    return loss, _or_empty(metrics, loss), _or_empty(row_scale, loss)


def _scale_gradient_(gradient, grad_output, row_scale, backend):
    if gradient.numel() > 0:  # a shard may have no columns
        # Autograd's tensors of zeros arrive expanded.
        IMPLEMENTATIONS[backend].scale_gradient(gradient, grad_output.contiguous(), row_scale)
    # Even if nothing changed: the gradient is handed out, and a second backward must not reuse it.
    torch.autograd.graph.increment_version(gradient)


def _run(tensors, backend, options, inplace):
    """:func:`loss_and_grad` by the implementation itself."""
    student, teacher, *_ = tensors
    if inplace:
        check_in_place(student)
        storage, other = student.untyped_storage(), teacher.untyped_storage()
        if storage.data_ptr() == other.data_ptr() and storage.nbytes() > 0:
            raise ValueError("inplace_grad: student_logits and teacher_logits share their memory")
        gradient = student
    elif student.nbytes < memory.LARGE and student.is_contiguous():
        gradient = torch.empty_like(student)  # the same as gradient_like, faster
    else:
        gradient = gradient_like(student, memory.empty_strided)
    return *_by_kernels(tensors, backend, options, gradient), gradient


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def impl_overwriting(name: str, implementation: Callable) -> None:
    """Implements an operator that overwrites its first argument.

    Autograd has to know while AOTAutograd traces too, where implementations do not run: otherwise
    an argument that another operator had saved would silently be the overwritten one.
    """
    operator = getattr(_ops, name).default

    def overwrite(keyset, student, *rest):
        below = keyset & torch._C._after_ADInplaceOrView_keyset
        results = operator.redispatch(below, student, *rest)
        if not isinstance(student, FakeTensor):  # Dynamo's, which nobody saves
            torch.autograd.graph.increment_version(student)
        return results

    library.impl(name, implementation, "CompositeExplicitAutograd")
    library.impl(name, overwrite, "ADInplaceOrView", with_keyset=True)


library.impl("logits_loss", _logits_loss, "CompositeExplicitAutograd")
library.impl("logits_loss_and_grad", _logits_loss_and_grad, "CompositeExplicitAutograd")
impl_overwriting("logits_loss_and_grad_", _logits_loss_and_grad_)
library.impl("scale_gradient_", _scale_gradient_, "CompositeExplicitAutograd")
library.impl("touch_", lambda x: None, "CompositeExplicitAutograd")
torch.library.register_fake("kdkernels::touch_", lambda x: None, lib=library)


def finish_reads_of(tensor: Tensor) -> None:
    """Has Inductor order what reads a tensor before the operator that overwrites it.

    When it meets such an operator it schedules unfinished reads behind it (torch 2.13), so it has
    to meet another one first, which changes nothing.
    """
    if torch.compiler.is_compiling():
        _ops.touch_.default(tensor)


def fake_outputs(student: Tensor, options: LogitsOptions) -> tuple[Tensor, Tensor]:
    """Empty loss and metrics for a student's ``(..., width)`` logits or hidden states."""
    lead = student.shape[:-1]
    loss = student.new_empty(lead if options.reduction == "none" else (), dtype=torch.float32)
    stacked = (len(METRICS), *lead) if options.metrics else 0
    return loss, student.new_empty(stacked, dtype=torch.float32)


def _fake_row_scale(student):
    shape = student.shape[:-1] if has_row_scale(student) else 0
    return student.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("kdkernels::logits_loss", lib=library)
def _(student, *rest):
    return fake_outputs(student, LogitsOptions(*rest[5:]))


@torch.library.register_fake("kdkernels::logits_loss_and_grad", lib=library)
def _(student, *rest):
    outputs = fake_outputs(student, LogitsOptions(*rest[5:]))
    return *outputs, _fake_row_scale(student), gradient_like(student)


@torch.library.register_fake("kdkernels::logits_loss_and_grad_", lib=library)
def _(student, *rest):
    return *fake_outputs(student, LogitsOptions(*rest[5:])), _fake_row_scale(student)


@torch.library.register_fake("kdkernels::scale_gradient_", lib=library)
def _(gradient, grad_output, row_scale, backend):
    return None


def loss(
    student: Tensor,
    constants: tuple[Tensor | None, ...],
    backend: str,
    options: LogitsOptions,
    straight: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss and metrics (None or empty where there are none), as in :func:`loss_and_grad`."""
    tensors = student, *constants
    if straight:
        return _by_kernels(tensors, backend, options, None)[:2]
    return _ops.logits_loss.default(*tensors, backend, *options)


def loss_and_grad(
    student: Tensor,
    constants: tuple[Tensor | None, ...],
    backend: str,
    options: LogitsOptions,
    inplace: bool,
    straight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Loss, metrics and row scales (None or empty where there are none), and the gradient.

    ``constants``: teacher, labels, token_weight and normalizer. ``straight``: whether the tensors
    need no dispatching (:func:`watchers.goes_straight`).
    """
    tensors = student, *constants
    if straight:
        results = _run(tensors, backend, options, inplace)
        if inplace:
            torch.autograd.graph.increment_version(student)
        return results
    if inplace:
        finish_reads_of(student)
        return *_ops.logits_loss_and_grad_.default(*tensors, backend, *options), student
    return _ops.logits_loss_and_grad.default(*tensors, backend, *options)


def scale_gradient(
    gradient: Tensor, grad_output: Tensor, row_scale: Tensor | None, backend: str
) -> None:
    """gradient *= grad_output * row_scale, in place; one number or one per row each."""
    if goes_straight(gradient, grad_output):
        _scale_gradient_(gradient, grad_output, row_scale, backend)
    else:
        row_scale = _or_empty(row_scale, grad_output)
        _ops.scale_gradient_.default(gradient, grad_output, row_scale, backend)
