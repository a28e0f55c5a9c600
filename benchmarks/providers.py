"""What is timed: the same distillation loss and gradient, each as a user would write it.

``floor`` is no loss: ``torch.add(s, t, out=g)`` reads both logits tensors and writes one, exactly
what a fused loss with gradient has to move.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import AlphaBeta, kd_loss
from kdkernels.divergences import DIVERGENCES, Divergence


@dataclass
class Case:
    """One setting: logits of a student that has learnt something, and a teacher."""

    rows: int
    vocab: int
    dtype: torch.dtype
    divergence: str = "forward_kl"
    temperature: float = 2.0
    student: Tensor = field(init=False, repr=False)  # (rows, vocab)
    teacher: Tensor = field(init=False, repr=False)  # (rows, vocab)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(self.rows, self.vocab, generator=generator) * 2
        noise = torch.randn(self.rows, self.vocab, generator=generator)
        self.student = (teacher * 0.6 + noise * 1.2).to(self.dtype)
        self.teacher = teacher.to(self.dtype)

    @property
    def instance(self) -> Divergence:
        return (
            AlphaBeta(0.3, 0.7)
            if self.divergence == "alpha_beta"
            else DIVERGENCES[self.divergence]()
        )

    @property
    def label(self) -> str:
        return f"{self.rows} x {self.vocab} {str(self.dtype).removeprefix('torch.')}"

    def describe(self) -> dict[str, object]:
        return {
            "rows": self.rows,
            "vocab": self.vocab,
            "dtype": str(self.dtype).removeprefix("torch."),
            "divergence": self.divergence,
            "temperature": self.temperature,
            "tensor_mib": round(self.rows * self.vocab * self.dtype.itemsize / 2**20, 1),
        }


@dataclass
class Step:
    """``prepare`` runs untimed before every timed ``run``; run returns loss and gradient."""

    run: Callable[[], tuple[Tensor, Tensor | None]]
    prepare: Callable[[], None] = lambda: None


class _Produce(torch.autograd.Function):
    """Hands out a tensor as if a layer had computed it, so that it is no leaf."""

    @staticmethod
    def forward(ctx, _, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(()), None


def floor(case: Case) -> Step:
    out = torch.empty_like(case.student)

    def run():
        return torch.add(case.student, case.teacher, out=out), None

    return Step(run)


def kdkernels(case: Case, *, inplace: bool = False, gradient: bool = True) -> Step:
    divergence, temperature = case.instance, case.temperature
    buffer = case.student.clone() if inplace else case.student
    anchor = torch.zeros((), requires_grad=True)

    def restore():
        buffer.copy_(case.student)

    def run():
        student = buffer.detach()
        if inplace:
            student = _Produce.apply(anchor, buffer)
        elif gradient:
            student.requires_grad_()
        loss = kd_loss(
            student,
            case.teacher,
            divergence=divergence,
            temperature=temperature,
            inplace_grad=inplace,
        )
        if gradient:
            loss.backward()
        return loss.detach(), buffer if inplace else student.grad

    return Step(run, restore if inplace else lambda: None)


def dense_forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * temperature**2


def _dense(case: Case, function: Callable) -> Step:
    if case.divergence != "forward_kl":
        raise ValueError(f"no dense formula of {case.divergence} here")

    def run():
        student = case.student.detach().requires_grad_()
        loss = function(student, case.teacher, case.temperature)
        loss.backward()
        return loss.detach(), student.grad

    return Step(run)


def eager(case: Case) -> Step:
    return _dense(case, dense_forward_kl)


def compiled(case: Case) -> Step:
    return _dense(case, torch.compile(dense_forward_kl))


PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "floor": floor,
    "kdkernels": kdkernels,
    "kdkernels in place": lambda case: kdkernels(case, inplace=True),
    "kdkernels loss only": lambda case: kdkernels(case, gradient=False),
    "eager": eager,
    "torch.compile": compiled,
}
