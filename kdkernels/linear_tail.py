"""A student of hidden states and a head beside a sparse teacher.

Logits exist for a block of rows at a time: in the forward until their log-sum-exps are known, and
again in the backward, where their gradient overwrites them. What is kept in between is as small as
the teacher's lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import payload
from .autograd import check_backward, check_no_transform, each_once
from .backends import IMPLEMENTATIONS
from .linear_models import SomeRows, StudentHead
from .linear_ops import check_memory, fake_gradients, split_options
from .ops import library
from .options import LinearOptions, TailOptions, schema_of
from .tail import log_sum_exps
from .top import Top

_HEAD = "Tensor[] hidden, Tensor[] weight, Tensor? bias, Tensor listed, Tensor kept"
_SCALARS = f"{schema_of(LinearOptions)}, {schema_of(TailOptions)}"

library.define(
    f"linear_tails({_HEAD}, bool with_top, {_SCALARS})"
    " -> (Tensor listed_logits, Tensor tails, Tensor top_logit, Tensor top)"
)
library.define(
    f"linear_tails_gradient({_HEAD}, Tensor tails, Tensor grad_tails, Tensor grad_listed, "
    f"bool[] needs_grad, {_SCALARS}) -> Tensor[]"
)


def _rows(kept: Tensor) -> SomeRows:
    """The kept rows; on a GPU all rows, as finding those kept would wait for the device."""
    index = None
    if kept.device.type == "cpu" and not bool(kept.all()):
        index = kept.reshape(-1).nonzero().squeeze(1)
    return SomeRows(kept.shape, index)


def _pick(rows: SomeRows, values: Tensor) -> Tensor:
    """(n, rows) of ``(n, ...)``; :func:`payload.take` has rows first."""
    values = values.reshape(values.shape[0], -1)  # not flatten(1), which refuses (n,)
    return values if rows.index is None else values[:, rows.index]


def _linear_tails(hidden, weight, bias, listed, kept, with_top, *scalars):
    linear, o = split_options(scalars, TailOptions)
    _check_memory(hidden, weight)
    run = IMPLEMENTATIONS[linear.backend].tails
    rows = _rows(kept)
    with torch.autocast(listed.device.type, enabled=False):
        student = StudentHead(hidden, weight, bias, rows, linear)
        listed = payload.take(listed, rows.index).contiguous()
        split = student.plan(None, linear.chunk_bytes)
        student.allocate(split)
        logits_of = student.logits.new_empty(listed.shape)
        tails = logits_of.new_empty((o.results, rows.count), dtype=torch.float32)
        top = Top(*(x.new_empty(rows.count if with_top else 0) for x in (student.logits, listed)))
        for begin, end in split.spans(rows.count):
            logits, here = student.logits_of(begin, end), listed[begin:end]
            tails[:, begin:end] = run(logits, here, None, o)
            logits_of[begin:end] = logits.gather(-1, here.clamp(min=0))
            if with_top:
                top.logit[begin:end], top.token[begin:end] = Top.of(logits, o.vocab)
        if with_top:
            top = Top(*(rows.everywhere(x) for x in top))
        return rows.everywhere(logits_of), rows.everywhere(tails, dim=1), *top


def _linear_tails_gradient(
    hidden, weight, bias, listed, kept, tails, grad_tails, grad_listed, needs_grad, *scalars
):
    linear, o = split_options(scalars, TailOptions)
    _check_memory(hidden, weight)
    run = IMPLEMENTATIONS[linear.backend].tails_gradient
    rows = _rows(kept)
    with torch.autocast(listed.device.type, enabled=False):
        student = StudentHead(hidden, weight, bias, rows, linear, needs_grad)
        lists = listed, grad_listed
        listed, grad_listed = (payload.take(x, rows.index).contiguous() for x in lists)
        tails, grad_tails = (_pick(rows, x) for x in (tails, grad_tails))
        row_scale = None
        if student.half:
            row_scale = _row_scale(grad_tails, grad_listed, o)
            grad_tails, grad_listed = grad_tails / row_scale, grad_listed / row_scale.unsqueeze(1)
        split = student.plan(None, linear.chunk_bytes)
        student.allocate(split)
        for begin, end in split.spans(rows.count):
            here, logits = slice(begin, end), student.logits_of(begin, end)
            of_tails = tails[:, here].contiguous(), grad_tails[:, here].contiguous()
            run(logits, listed[here], *of_tails, grad_listed[here], o, logits)
            student.take(begin, end, None if row_scale is None else row_scale[here])
        return student.gradients()


def _row_scale(grad_tails: Tensor, grad_listed: Tensor, o: TailOptions) -> Tensor:
    """Powers of two ``(rows,)``; divided by them, a gradient's largest entries are about 2^12."""
    tails = grad_tails.abs().unbind(0)
    largest = grad_listed.abs().amax(1)
    for of_tail, temperature in zip(tails, o.temperatures(), strict=True):
        largest = torch.maximum(largest, of_tail * (o.scale / temperature))  # of one certain token
    # Rows of zeros and of no size get a small one: scales are taken relative to the largest.
    largest = largest.nan_to_num(0.0, 0.0).clamp(min=2.0**-89)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 12)


def _check_memory(hidden: list[Tensor], weight: list[Tensor]) -> None:
    check_memory("linear_sparse_kd_loss", "it reads the head again", *hidden, *weight)


library.impl("linear_tails", _linear_tails, "CompositeExplicitAutograd")
library.impl("linear_tails_gradient", _linear_tails_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("kdkernels::linear_tails", lib=library)
def _(hidden, weight, bias, listed, kept, with_top, *scalars):
    linear, o = split_options(scalars, TailOptions)
    dtype = torch.float32 if linear.float32_logits else linear.student_dtype
    listed_logits = listed.new_empty(listed.shape, dtype=dtype)
    tails = listed.new_empty((o.results, *kept.shape), dtype=torch.float32)
    top = (x.new_empty(kept.shape if with_top else 0) for x in (listed_logits, listed))
    return listed_logits, tails, *top


@torch.library.register_fake("kdkernels::linear_tails_gradient", lib=library)
def _(hidden, weight, bias, listed, kept, tails, grad_tails, grad_listed, needs_grad, *scalars):
    linear, _ = split_options(scalars, TailOptions)
    return fake_gradients(hidden, weight, bias, needs_grad, linear.student_dtype)


_ops = torch.ops.kdkernels


class _LinearListedAndTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, linear, options, with_top, listed, kept, *student):
        hidden, weight, bias = student[:count], student[count:-1], student[-1]
        head = list(hidden), list(weight), bias
        stored, tails, *top = _ops.linear_tails.default(
            *head, listed, kept, with_top, *linear, *options
        )
        ctx.save_for_backward(listed, kept, tails, *student)
        ctx.mark_non_differentiable(*top)
        ctx.arguments = count, linear, options
        return stored.double(), log_sum_exps(tails, options), *top

    @staticmethod
    def backward(ctx, grad_listed, grad_tails, *_):
        check_backward(ctx, "linear_sparse_kd_loss", consumes=False)
        count, linear, options = ctx.arguments
        listed, kept, tails, *student = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[6:])
        gradients = _ops.linear_tails_gradient.default(
            student[:count],
            student[count:-1],
            student[-1],
            listed,
            kept,
            tails,
            grad_tails.to(torch.float32),
            grad_listed.to(torch.float32),
            needs,
            *linear,
            *options,
        )
        results = [
            gradient.to(x.dtype) if needed else None
            for gradient, x, needed in zip(gradients, student, needs, strict=True)
        ]
        return *(None,) * 6, *results


@dataclass(frozen=True)
class LinearStudent:
    """A student of hidden states and heads, whose logits are the sum of their products."""

    hidden: list[Tensor]  # each (..., hidden)
    weight: list[Tensor]  # each (vocab, hidden)
    bias: Tensor | None  # (vocab,)
    linear: LinearOptions

    @property
    def like(self) -> Tensor:
        """See :attr:`kdkernels.tail.Student.like`."""
        return self.hidden[0]

    def listed_and_tails(
        self,
        listed: Tensor,
        kept: Tensor,
        options: TailOptions,
        *,
        with_tails: bool,
        with_top: bool,
    ) -> tuple[Tensor, Tensor, Top | None]:
        """See :meth:`kdkernels.tail.Student.listed_and_tails`."""
        check_no_transform("linear_sparse_kd_loss")
        student = each_once((*self.hidden, *self.weight, self.bias))
        arguments = len(self.hidden), self.linear, options, with_top, listed, kept
        listed_logits, tails, *top = _LinearListedAndTails.apply(*arguments, *student)
        return listed_logits, tails, Top(*top) if with_top else None
