"""The student's side of a sparse loss: listed logits, and log-sum-exps of all the others.

Only this reads the whole vocabulary, so it has kernels: one pass over the logits in the forward,
and one in the backward that writes their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import memory, reference
from .autograd import check_backward, check_no_transform
from .backends import IMPLEMENTATIONS
from .backends.rows import check_in_place, gradient_like, in_rows
from .ops import finish_reads_of, impl_overwriting, library
from .options import TailOptions, schema_of
from .top import Top

_SCALARS = schema_of(TailOptions)
_GRADIENTS = "Tensor tails, Tensor grad_tails, Tensor grad_listed"

library.define(
    f"tails(Tensor student, Tensor listed, Tensor? kept, {_SCALARS}, str backend) -> Tensor"
)
library.define(
    f"tails_gradient(Tensor student, Tensor listed, {_GRADIENTS}, {_SCALARS}, str backend)"
    " -> Tensor"
)
library.define(
    f"tails_gradient_(Tensor(a!) student, Tensor listed, {_GRADIENTS}, {_SCALARS}, str backend)"
    " -> ()"
)


def _tails(student, listed, kept, *scalars):
    *options, backend = scalars
    kept = None if kept is None else kept.contiguous()
    run = IMPLEMENTATIONS[backend].tails
    return run(in_rows(student), listed.contiguous(), kept, TailOptions(*options))


def _tails_gradient(student, listed, tails, grad_tails, grad_listed, *scalars):
    gradient = gradient_like(student, memory.empty_strided)
    _write_gradient(gradient, student, listed, tails, grad_tails, grad_listed, *scalars)
    return gradient


def _tails_gradient_(student, listed, tails, grad_tails, grad_listed, *scalars):
    check_in_place(student)
    _write_gradient(student, student, listed, tails, grad_tails, grad_listed, *scalars)


def _write_gradient(gradient, student, listed, tails, grad_tails, grad_listed, *scalars):
    *options, backend = scalars
    tensors = (x.contiguous() for x in (listed, tails, grad_tails, grad_listed))
    run = IMPLEMENTATIONS[backend].tails_gradient
    run(in_rows(student), *tensors, TailOptions(*options), gradient)


library.impl("tails", _tails, "CompositeExplicitAutograd")
library.impl("tails_gradient", _tails_gradient, "CompositeExplicitAutograd")
impl_overwriting("tails_gradient_", _tails_gradient_)


@torch.library.register_fake("kdkernels::tails", lib=library)
def _(student, listed, kept, *scalars):
    options = TailOptions(*scalars[:-1])
    return student.new_empty((options.results, *student.shape[:-1]), dtype=torch.float32)


@torch.library.register_fake("kdkernels::tails_gradient", lib=library)
def _(student, *rest):
    return gradient_like(student)


@torch.library.register_fake("kdkernels::tails_gradient_", lib=library)
def _(student, *rest):
    return None


_ops = torch.ops.kdkernels


class _ListedAndTails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, listed, kept, options, inplace, backend):
        tails = _ops.tails.default(student, listed, kept, *options, backend)
        ctx.save_for_backward(student, listed, tails)
        ctx.arguments = options, inplace, backend
        return student.gather(-1, listed.clamp(min=0)).double(), log_sum_exps(tails, options)

    @staticmethod
    def backward(ctx, grad_listed, grad_tails):
        check_backward(ctx, "sparse_kd_loss", consumes=False)
        student, listed, tails = ctx.saved_tensors
        options, inplace, backend = ctx.arguments
        arguments = (
            student,
            listed,
            tails,
            grad_tails.to(torch.float32),
            grad_listed.to(torch.float32),
            *options,
            backend,
        )
        if inplace:
            gradient = student.detach()
            finish_reads_of(gradient)
            _ops.tails_gradient_.default(gradient, *arguments[1:])
        else:
            gradient = _ops.tails_gradient.default(*arguments)
        return gradient, None, None, None, None, None


def log_sum_exps(tails: Tensor, options: TailOptions) -> Tensor:
    """Log-sum-exps ``(1 + at_1, ...)`` from what the kernels write."""
    origin, *log_sums = tails.double().unbind(0)
    return torch.stack(
        [
            origin / temperature + log_sum
            for temperature, log_sum in zip(options.temperatures(), log_sums, strict=True)
        ]
    )


class Student(Protocol):
    """Logits, or hidden states and a head, or a shard of either."""

    @property
    def like(self) -> Tensor:
        """A tensor of the same leading shape, device and precision."""
        ...

    def listed_and_tails(
        self,
        listed: Tensor,
        kept: Tensor,
        options: TailOptions,
        *,
        with_tails: bool,
        with_top: bool,
    ) -> tuple[Tensor, Tensor, Top | None]:
        """Listed logits, log-sum-exps of the others, and the top token.

        Args:
            listed: ``(..., m)`` int64, ascending: -1, then different columns.
            kept: ``(...)``, rows that take part.
            options: temperature and transform of the logits.
            with_tails: whether the second result is needed.
            with_top: whether the third one is.

        Returns:
            Listed logits ``(..., m)`` as stored, and anything where -1 is listed; log-sum-exps
            ``(1 + at_1, ...)`` of all other transformed logits at ``options.temperatures()``, and
            anything where ``kept`` is False; both float64 and differentiable. And the top token.
        """
        ...


@dataclass(frozen=True)
class LogitsStudent:
    """A student of logits ``(..., vocab)``."""

    logits: Tensor
    inplace: bool
    backend: str

    @property
    def like(self) -> Tensor:
        """See :attr:`Student.like`."""
        return self.logits

    def listed_and_tails(
        self,
        listed: Tensor,
        kept: Tensor,
        options: TailOptions,
        *,
        with_tails: bool,
        with_top: bool,
    ) -> tuple[Tensor, Tensor, Top | None]:
        """See :meth:`Student.listed_and_tails`."""
        student, backend = self.logits, self.backend
        top = Top.of(student, options.vocab) if with_top else None
        if student.shape[-1] == 0:  # as a shard may be
            nothing = student.sum(-1).double()
            tails = (nothing - torch.inf).expand(len(options.temperatures()), *kept.shape)
            return nothing.unsqueeze(-1).expand(listed.shape), tails, top
        if not with_tails:
            kept = torch.zeros_like(kept)
        if backend == "reference":
            return *_reference(student, listed, kept, options), top
        check_no_transform("sparse_kd_loss")
        arguments = student, listed, kept, options, self.inplace, backend
        return *_ListedAndTails.apply(*arguments), top


def _reference(
    student: Tensor, listed: Tensor, kept: Tensor, options: TailOptions
) -> tuple[Tensor, Tensor]:
    compute = reference.compute_dtype(student.device)
    logits = student[..., : options.vocab].to(compute)
    nothing = torch.zeros(
        (*logits.shape[:-1], options.vocab + 1), dtype=torch.bool, device=student.device
    )
    is_listed = nothing.scatter(-1, torch.where(listed < 0, options.vocab, listed), True)
    tail = torch.where(kept.unsqueeze(-1), logits, 0.0)
    tail = reference.transform(tail, options.scale, options.softcap)
    tail = torch.where(is_listed[..., :-1], -torch.inf, tail)
    # There is no softmax over +inf.
    tail = torch.where(tail == torch.inf, torch.nan, tail)
    log_sum_exps = [reference.log_sum_exp(tail / t) for t in options.temperatures()]
    listed_logits = student.gather(-1, listed.clamp(min=0)).to(compute)
    return listed_logits, torch.stack(log_sum_exps)
