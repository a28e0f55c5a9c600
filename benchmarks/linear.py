"""The fused-linear level: what is timed and how it is verified.

``floor`` is no loss: the four matrix products that any loss with gradients needs, over all rows at
once, into logits that are there already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import ForwardKL, kd_loss, linear_kd_loss

from .providers import Step, dense_forward_kl

#: rows, vocabulary, hidden sizes of student and teacher.
LINEAR_SHAPES = ((1024, 32000, 256, 512), (256, 128256, 512, 1024))

#: Of hidden and weight gradient, as for the logits level.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
LOSS_TOLERANCE = 5e-2


@dataclass
class LinearCase:
    """One setting: two heads whose logits are correlated, as in training."""

    rows: int
    vocab: int
    hidden: int
    teacher_hidden_size: int
    dtype: torch.dtype
    divergence: str = "forward_kl"
    temperature: float = 2.0
    student_hidden: Tensor = field(init=False, repr=False)  # (rows, hidden)
    student_weight: Tensor = field(init=False, repr=False)  # (vocab, hidden)
    teacher_hidden: Tensor = field(init=False, repr=False)  # (rows, teacher_hidden_size)
    teacher_weight: Tensor = field(init=False, repr=False)  # (vocab, teacher_hidden_size)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        teacher, weight = (
            normal(self.rows, self.teacher_hidden_size),
            normal(self.vocab, self.teacher_hidden_size),
        )
        size = 2 * self.teacher_hidden_size**-0.5  # logits of size 2
        self.teacher_hidden, self.teacher_weight = (
            teacher.to(self.dtype),
            (weight * size).to(self.dtype),
        )
        self.student_hidden = teacher[:, : self.hidden].to(self.dtype).requires_grad_()
        student = weight[:, : self.hidden] * 1.2 * size
        self.student_weight = student.to(self.dtype).requires_grad_()

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.rows} x {self.vocab}, hidden {self.hidden}/{self.teacher_hidden_size} {dtype}"
        )

    def describe(self) -> dict[str, object]:
        gradients = (self.vocab + self.rows) * self.hidden * self.dtype.itemsize
        return {
            "rows": self.rows,
            "vocab": self.vocab,
            "hidden": self.hidden,
            "teacher_hidden": self.teacher_hidden_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "divergence": self.divergence,
            "temperature": self.temperature,
            "tensor_mib": round(self.rows * self.vocab * self.dtype.itemsize / 2**20, 1),
            "gradients_mib": round(gradients / 2**20, 1),
        }

    def step(self, loss: Callable[[], Tensor]) -> Step:
        def drop_gradients() -> None:
            self.student_hidden.grad = self.student_weight.grad = None

        def run() -> tuple[Tensor, tuple[Tensor, Tensor]]:
            result = loss()
            result.backward()
            return result.detach(), (self.student_hidden.grad, self.student_weight.grad)

        return Step(run, drop_gradients)


def floor(case: LinearCase) -> Step:
    student = torch.empty(case.rows, case.vocab, dtype=case.dtype)
    teacher = torch.empty_like(student)
    hidden, weight = case.student_hidden.detach(), case.student_weight.detach()
    gradient = torch.full_like(student, 0.5)

    def run():
        torch.mm(hidden, weight.t(), out=student)
        torch.mm(case.teacher_hidden, case.teacher_weight.t(), out=teacher)
        return torch.zeros(()), (gradient @ weight, gradient.t() @ hidden)

    return Step(run)


def kdkernels(case: LinearCase) -> Step:
    return case.step(
        lambda: linear_kd_loss(
            case.student_hidden,
            case.student_weight,
            case.teacher_hidden,
            case.teacher_weight,
            divergence=case.divergence,
            temperature=case.temperature,
        )
    )


def _dense(student_hidden, student_weight, teacher_hidden, teacher_weight, temperature):
    student = F.linear(student_hidden, student_weight)
    teacher = F.linear(teacher_hidden, teacher_weight)
    return dense_forward_kl(student, teacher, temperature)


def _dense_step(case: LinearCase, function: Callable) -> Step:
    return case.step(
        lambda: function(
            case.student_hidden,
            case.student_weight,
            case.teacher_hidden,
            case.teacher_weight,
            case.temperature,
        )
    )


LINEAR_PROVIDERS: dict[str, Callable[[LinearCase], Step]] = {
    "floor": floor,
    "kdkernels": kdkernels,
    "eager": lambda case: _dense_step(case, _dense),
    "torch.compile": lambda case: _dense_step(case, torch.compile(_dense)),
}


def exact(case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, by blocks of rows."""
    weight = case.student_weight.detach().double().requires_grad_()
    teacher_weight = case.teacher_weight.double()
    hidden = case.student_hidden.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(0, case.rows, 64):
        block = slice(i, i + 64)
        loss = kd_loss(
            hidden[block] @ weight.t(),
            case.teacher_hidden[block].double() @ teacher_weight.t(),
            divergence=ForwardKL(),
            temperature=case.temperature,
            normalizer=case.rows,
            backend="reference",
        )
        loss.backward()
        total += loss.detach()
    return total, hidden.grad, weight.grad


def verify_linear(case: LinearCase, step: Step) -> dict[str, float]:
    """Relative errors of loss and gradients against float64; raises where they are wrong."""
    if not hasattr(case, "_exact"):
        case._exact = exact(case)
    step.prepare()
    loss, gradients = step.run()
    wanted_loss, *wanted = case._exact
    errors = {"loss_error": float((loss.double() - wanted_loss).abs() / wanted_loss)}
    for name, got, gradient in zip(("hidden", "weight"), gradients, wanted, strict=True):
        error = float((got.double() - gradient).norm() / gradient.norm())
        errors[f"{name}_gradient_error"] = error
        if error > GRADIENT_TOLERANCE[case.dtype]:
            raise ArithmeticError(f"the {name} gradient is off by {error:.1e}")
    if errors["loss_error"] > LOSS_TOLERANCE:
        raise ArithmeticError(f"the loss is off by {errors['loss_error']:.1e}")
    step.prepare()
    return errors
