"""The operator of the fused-linear level: hidden states and heads in, loss and gradients out.

By blocks of rows: both models' logits by matrix products into buffers, the logits operator in place
over the student's, the hidden gradient from it. By chunks of one or more blocks: the weight
gradient. It carries no autograd formula; :mod:`kdkernels.autograd` wraps it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .linear_models import Rows, Student, TeacherHead, TeacherLogits
from .ops import SCALARS, library
from .options import METRICS, LinearOptions, LogitsOptions

_ops = torch.ops.kdkernels

#: Fewer rows than this make matrix products slow: the whole weight is read for them.
_ROWS_WORTH_A_PRODUCT = 128

#: The default of ``chunk_bytes`` on a GPU, and its limit on a CPU.
_CHUNK_BYTES = 2**30

library.define(
    "linear_loss(Tensor[] student_hidden, Tensor[] student_weight, Tensor? student_bias, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_logits, Tensor? labels, Tensor? token_weight, Tensor? normalizer, "
    "Tensor? row_index, bool[] needs_grad, ScalarType student_dtype, ScalarType teacher_dtype, "
    f"bool float32_logits, SymInt chunk_bytes, str backend, {SCALARS}) "
    "-> (Tensor loss, Tensor metrics, Tensor[] gradients)"
)


class Plan(NamedTuple):
    """How rows are split. Weight gradients are taken once a chunk, all else once a block."""

    chunk: int  # rows of the student's logits held at a time
    block: int  # rows of the teacher's
    lend: bool  # the teacher's logits lie in the weight gradient, which is not there yet


def plan(
    rows: int,
    student_row: int,
    teacher_row: int,
    weight_gradient: int,
    accumulator: int,
    chunk_bytes: int,
    device_type: str,
) -> Plan:
    """Splits rows, from sizes alone.

    Args:
        rows: in all.
        student_row: bytes of a row of the student's logits.
        teacher_row: the same for the teacher's, 0 where they take no memory here.
        weight_gradient: bytes of the largest one, 0 where none is needed.
        accumulator: bytes of float32 memory that more than one chunk takes for them.
        chunk_bytes: what both models' logits may take, 0 for the default: on a GPU 1 GiB, on a CPU
            a quarter of all their logits, but at least 128 rows and at most 1 GiB.
        device_type: such as "cpu".
    """
    row = max(1, student_row + teacher_row)
    if not chunk_bytes:
        chunk_bytes = _CHUNK_BYTES
        if device_type == "cpu":
            chunk_bytes = min(chunk_bytes, max(rows // 4, _ROWS_WORTH_A_PRODUCT) * row)
    most = max(1, chunk_bytes // row)
    if most >= rows:
        return Plan(rows, rows, False)
    # One chunk needs no accumulator, which makes it the better use of the same memory.
    lent = weight_gradient // teacher_row if teacher_row else rows
    one_chunk = weight_gradient and rows * student_row <= chunk_bytes + accumulator
    if one_chunk and lent >= min(rows, _ROWS_WORTH_A_PRODUCT):
        return Plan(rows, _even(rows, lent), teacher_row > 0)
    block = _even(rows, most)
    return Plan(block, block, False)


def _even(rows: int, most: int) -> int:
    """The size of the fewest parts of at most ``most`` rows, all about as large."""
    size = -(-rows // -(-rows // most))
    rounded = -(-size // 64) * 64
    return min(rows, rounded if rounded <= most else size)


def _run(
    student: Student,
    teacher: TeacherHead | TeacherLogits,
    rows: Rows,
    linear: LinearOptions,
    o: LogitsOptions,
) -> tuple[Tensor, Tensor]:
    """Loss and metrics of the rows that take part; gradients stay with the student."""
    with_gradient = any(linear.needs_grad)
    device = student.hidden[0].device
    split = plan(
        rows.count,
        student.row_bytes(),
        teacher.row_bytes(),
        # A gradient that is copied to another dtype exists for a block, not for a longer chunk.
        *(student.weight_gradient_bytes() if student.logits_dtype == student.dtype else (0, 0)),
        linear.chunk_bytes,
        device.type,
    )
    student.allocate(split.chunk)
    spans = [
        (begin, min(begin + split.block, rows.count))
        for begin in range(0, rows.count, split.block or 1)
    ]
    lent = student.memory_of_a_weight_gradient() if split.lend else None

    # Whatever torch.set_default_dtype says.
    floats = functools.partial(torch.empty, dtype=torch.float32, device=device)
    losses = floats(rows.count if o.reduction == "none" else 0)
    total = torch.zeros((), dtype=torch.float64, device=device)
    metrics = floats((len(METRICS), rows.count) if o.metrics else 0)
    scales = []
    for (begin, end), teacher_logits in zip(spans, teacher.blocks(spans, lent), strict=True):
        offset = begin % split.chunk
        logits = student.logits[offset : offset + end - begin]
        student.write_logits(logits, begin, end)
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
        if not with_gradient:
            continue
        gradient = logits.to(student.dtype)
        scales.append(row_scale)
        half = student.half
        student.take_block(gradient, row_scale if half else None, begin, end)
        if offset + end - begin == split.chunk or end == rows.count:
            if split.chunk > split.block:
                gradient = student.logits[: offset + end - begin]
            scale = torch.cat(scales) if half else None
            student.take_chunk(gradient, scale, begin - offset, end)
            scales = []
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
    *scalars,
):
    linear, o = _options(scalars)
    _check_memory(*student_hidden, *student_weight, teacher_hidden, teacher_weight)
    lead, device = student_hidden[0].shape[:-1], student_hidden[0].device
    with torch.autocast(device.type, enabled=False):
        rows = Rows(lead, device, labels, token_weight, normalizer, row_index, o)
        student = Student(student_hidden, student_weight, student_bias, rows, linear)
        teacher = (
            TeacherLogits(teacher_logits, rows, device)
            if teacher_logits is not None
            else TeacherHead(teacher_hidden, teacher_weight, teacher_bias, rows, linear)
        )
        loss, metrics = _run(student, teacher, rows, linear, o)
        gradients = student.gradients(rows) if any(linear.needs_grad) else []
        loss = rows.everywhere(loss) if o.reduction == "none" else loss
        return loss, rows.everywhere(metrics) if o.metrics else metrics, gradients


def _check_memory(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "linear_kd_loss: the memory of an input was released, as that of a sharded head is "
                "outside its module's call. In a backward: reduction='none' reads heads again; "
                "weight tokens by token_weight with reduction='sum' instead"
            )


library.impl("linear_loss", _linear_loss, "CompositeExplicitAutograd")


def _options(scalars: tuple) -> tuple[LinearOptions, LogitsOptions]:
    count = len(LinearOptions._fields)
    return LinearOptions(*scalars[:count]), LogitsOptions(*scalars[count:])


@torch.library.register_fake("kdkernels::linear_loss", lib=library)
def _(hidden, weight, bias, *rest):
    linear, o = _options(rest[8:])
    lead = hidden[0].shape[:-1]
    loss = hidden[0].new_empty(lead if o.reduction == "none" else (), dtype=torch.float32)
    stacked = hidden[0].new_empty((len(METRICS), *lead) if o.metrics else 0, dtype=torch.float32)
    if not any(linear.needs_grad):
        return loss, stacked, []
    half = linear.student_dtype == torch.float16
    dtypes = [
        *(torch.float32 if half else linear.student_dtype for _ in hidden),
        *(torch.float32 if half else w.dtype for w in weight),
    ]
    gradients = [
        x.new_empty(x.shape if needed else 0, dtype=dtype)
        for x, needed, dtype in zip((*hidden, *weight), linear.needs_grad, dtypes, strict=False)
    ]
    return loss, stacked, [*gradients, loss.new_empty(bias.shape if linear.needs_grad[-1] else 0)]
