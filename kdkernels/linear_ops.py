"""The operator of the fused-linear level: hidden states and heads in, loss and gradients out.

For each block of rows, matrix products write both models' logits into buffers, the logits operator
overwrites the student's by their gradient, and another product makes the hidden gradient of it. For
each chunk of one or more blocks one more product adds to the weight gradient. The operator carries
no autograd formula; :mod:`kdkernels.autograd` wraps it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .linear_models import Rows, StudentHead, TeacherHead, TeacherLogits, gradient_dtypes
from .ops import fake_outputs, library
from .options import METRICS, LinearOptions, LogitsOptions, Options, schema_of

_ops = torch.ops.kdkernels

library.define(
    "linear_loss(Tensor[] student_hidden, Tensor[] student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_logits, Tensor? labels, Tensor? token_weight, Tensor? normalizer, "
    f"Tensor? row_index, bool[] needs_grad, {schema_of(LinearOptions)}, {schema_of(LogitsOptions)})"
    " -> (Tensor loss, Tensor metrics, Tensor[] gradients)"
)


def _run(
    student: StudentHead,
    teacher: TeacherHead | TeacherLogits,
    rows: Rows,
    with_gradient: bool,
    linear: LinearOptions,
    o: LogitsOptions,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics of the rows that take part; gradients stay with the student."""
    split = student.plan(teacher, linear.chunk_bytes, o)
    student.allocate(split)
    spans = split.spans(rows.count)
    lent = student.memory_of_a_weight_gradient() if split.lend else None

    # Not of torch.get_default_dtype().
    floats = functools.partial(torch.empty, dtype=torch.float32, device=student.device)
    losses = floats(rows.count if o.reduction == "none" else 0)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    metrics = floats((len(METRICS), rows.count) if o.metrics else 0)
    for (begin, end), teacher_logits in zip(spans, teacher.blocks(spans, lent), strict=True):
        logits = student.logits_of(begin, end)
        labels, token_weight = rows.per_token(begin, end)
        arguments = (logits, teacher_logits, labels, token_weight, rows.normalizer, linear.backend)
        if with_gradient:
            loss, block_metrics, row_scale = _ops.logits_loss_and_grad_.default(*arguments, *o)
        else:
            loss, block_metrics = _ops.logits_loss.default(*arguments, *o)
        if o.metrics:
            metrics[:, begin:end] = block_metrics
        if o.reduction == "none":
            losses[begin:end] = loss
        else:
            total += loss
        if with_gradient:
            student.take(begin, end, row_scale)
    return losses if o.reduction == "none" else total.float(), metrics


def _linear_loss(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    teacher_logits,
    labels,
    token_weight,
    normalizer,
    row_index,
    needs_grad,
    *scalars,
):
    linear, o = split_options(scalars, LogitsOptions)
    memory = *student_hidden, *student_weight, teacher_hidden, teacher_weight
    check_memory(
        "linear_kd_loss",
        "reduction='none' reads heads again; weight tokens by token_weight with reduction='sum' "
        "instead",
        *memory,
    )
    lead, device = student_hidden[0].shape[:-1], student_hidden[0].device
    with torch.autocast(device.type, enabled=False):
        rows = Rows(lead, device, labels, token_weight, normalizer, row_index, o)
        student = StudentHead(
            student_hidden, student_weight, student_bias, rows, linear, needs_grad
        )
        teacher = (
            TeacherLogits(teacher_logits, rows, device, linear)
            if teacher_logits is not None
            else TeacherHead(teacher_hidden, teacher_weight, teacher_bias, rows, linear)
        )
        loss, metrics = _run(student, teacher, rows, any(needs_grad), linear, o)
        gradients = student.gradients(o.group) if any(needs_grad) else []
        loss = rows.everywhere(loss) if o.reduction == "none" else loss
        return loss, rows.everywhere(metrics, dim=1) if o.metrics else metrics, gradients


def check_memory(name: str, in_a_backward: str, *tensors: Tensor | None) -> None:
    """Raises if an input's memory was released."""
    for tensor in tensors:
        if tensor is not None and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                f"{name}: the memory of an input was released, as that of a sharded head is "
                f"outside its module's call. In a backward: {in_a_backward}"
            )


library.impl("linear_loss", _linear_loss, "CompositeExplicitAutograd")


def split_options(scalars: tuple, kind: type[Options]) -> tuple[LinearOptions, Options]:
    """The options of a fused-linear operator, and those of the operator it runs."""
    count = len(LinearOptions._fields)
    return LinearOptions(*scalars[:count]), kind(*scalars[count:])


@torch.library.register_fake("kdkernels::linear_loss", lib=library)
def _(
    hidden,
    weight,
    bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    teacher_logits,
    labels,
    token_weight,
    normalizer,
    row_index,
    needs_grad,
    *scalars,
):
    linear, o = split_options(scalars, LogitsOptions)
    gradients = fake_gradients(hidden, weight, bias, needs_grad, linear.student_dtype)
    return *fake_outputs(hidden[0], o), gradients


def fake_gradients(
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    needs_grad: list[bool],
    product_dtype: torch.dtype,
) -> list[Tensor]:
    """Tensors like those of :meth:`StudentHead.gradients`."""
    if not any(needs_grad):
        return []
    of_hidden, of_weights = gradient_dtypes(product_dtype, weight)
    dtypes = [*(of_hidden for _ in hidden), *of_weights]
    gradients = [
        x.new_empty(x.shape if needed else 0, dtype=dtype)
        for x, needed, dtype in zip((*hidden, *weight), needs_grad, dtypes, strict=False)
    ]
    shape = bias.shape if bias is not None and needs_grad[-1] else 0
    return [*gradients, hidden[0].new_empty(shape, dtype=torch.float32)]
