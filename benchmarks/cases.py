"""The cases of all levels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import sparse_kd_loss

from . import dense
from .case import Case, Result, Step, relative, some
from .shapes import Shape

#: Tokens a sparse teacher lists.
LISTED = 64
#: Rows whose gradient is compared; all rows take part in the loss that is.
CHECKED_ROWS = {"cpu": 32, "cuda": 1024}
#: Rows of which the linear level asks how exact the textbook is.
TEXTBOOK_ROWS = 32
#: Tokens whose weight gradient is; all rows' hidden gradients are.
CHECKED_TOKENS = 1024
#: Logits in float64 at a time: on a CPU few enough that their memory is used again and again.
BLOCK = {"cpu": 2**20, "cuda": 2**24}
#: Where heads are multiplied in float64: logits, and entries of a head.
LINEAR_BLOCK, HEAD_BLOCK = 2**25, 2**23


@dataclass(eq=False, repr=False, kw_only=True)
class LogitsCase(Case):
    """Logits of a student that has learnt something, or next to all, and of a teacher."""

    level = "logits"
    unit = "bytes"

    student: Tensor  # (rows, vocab)
    teacher: Tensor  # (rows, vocab)
    close: bool = False

    @classmethod
    def make(
        cls,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        close: bool = False,
        **options,
    ) -> LogitsCase:
        generator = torch.Generator(device).manual_seed(0)
        student = torch.empty(shape.rows, shape.vocab, dtype=dtype, device=device)
        teacher = torch.empty_like(student)
        block = max(1, BLOCK[device.type] // shape.vocab)
        learnt, guessed = (1.0, 0.1) if close else (0.6, 1.2)
        for s, t in zip(student.split(block), teacher.split(block), strict=True):
            logits = 2 * torch.randn(t.shape, device=device, generator=generator)
            noise = torch.randn(t.shape, device=device, generator=generator)
            t.copy_(logits)
            s.copy_(learnt * logits + guessed * noise)
        return cls(
            name=shape.name,
            rows=shape.rows,
            vocab=shape.vocab,
            dtype=dtype,
            student=student,
            teacher=teacher,
            close=close,
            **options,
        )

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def work(self) -> int:
        """3U, U the bytes of one tensor: read both, write the gradient; 2U for the loss alone."""
        return (3 if self.with_gradient else 2) * self.student.nbytes

    @property
    def floor_work(self) -> int:
        return 3 * self.student.nbytes

    def of_teacher(self, rows: slice | Tensor = slice(None)) -> tuple[Tensor, ...]:
        """What a loss takes of the teacher, of some rows."""
        return (self.teacher[rows],)

    def describe(self) -> dict[str, object]:
        return super().describe() | ({"close": True} if self.close else {})

    def step(self, function: Callable[..., Tensor]) -> Step:
        others = *self.of_teacher(), self.temperature

        def run() -> Result:
            student = self.student.detach().requires_grad_()
            loss = function(student, *others)
            self.backward(loss)
            return loss.detach(), (student.grad,)

        def run_loss() -> Result:
            with torch.no_grad():
                return function(self.student, *others), ()

        return Step(run if self.with_gradient else run_loss)

    @functools.cached_property
    def checked(self) -> Tensor:
        """Rows whose gradient is compared."""
        return some(CHECKED_ROWS[self.device.type], self.rows, self.device)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """In float64: the losses of all rows, and the gradients of the checked ones."""
        losses, gradients = [], []
        block = max(1, BLOCK[self.device.type] // self.vocab)
        with torch.no_grad():
            for begin in range(0, self.rows, block):
                rows = slice(begin, begin + block)
                losses.append(self.reference(self.student[rows].double(), *self.of_teacher(rows)))
        for some_rows in self.checked.split(block):
            student = self.student[some_rows].double().requires_grad_()
            loss = self.reference(student, *self.of_teacher(some_rows)).sum() / self.rows
            loss.backward()
            gradients.append(student.grad)
        return torch.cat(losses), torch.cat(gradients)

    def errors(self, result: Result) -> dict[str, float]:
        loss, gradients = result
        losses, expected = self.expected
        errors = {"loss_error": relative(loss, losses.mean())}
        for gradient in gradients:
            got = gradient[self.checked].double() / self.grad_scale
            errors["gradient_error"] = relative(got, expected)
            if not bool(gradient.sum(dtype=torch.float32).isfinite()):  # any row's
                errors["gradient_error"] = float("nan")
        return errors

    def textbook_errors(self) -> tuple[float, float]:
        losses, gradient = self.expected
        student = self.student[self.checked].requires_grad_()
        textbook = dense.LOSSES[self.level](self.divergence)
        loss = textbook(student, *self.of_teacher(self.checked), self.temperature)
        self.backward(loss, len(self.checked) / self.rows)
        return (
            relative(loss.detach(), losses[self.checked].mean()),
            relative(student.grad.double() / self.grad_scale, gradient),
        )


@dataclass(eq=False, repr=False, kw_only=True)
class SparseCase(LogitsCase):
    """The same student beside the teacher's most probable tokens alone."""

    level = "sparse"
    of_logits = staticmethod(sparse_kd_loss)

    indices: Tensor  # (rows, k) int64
    # teacher: (rows, k) float32, their log-probabilities

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device, **options) -> SparseCase:
        case = LogitsCase.make(shape, dtype, device, **options)
        k = min(LISTED, shape.vocab // 2)
        block = max(1, BLOCK[device.type] // shape.vocab)
        tops = [
            (teacher.float() / case.temperature).log_softmax(-1).topk(k)
            for teacher in case.teacher.split(block)
        ]
        indices = torch.cat([top.indices for top in tops])
        return cls(
            **vars(case) | {"teacher": torch.cat([top.values for top in tops])}, indices=indices
        )

    @property
    def work(self) -> int:
        """2U: read the student's logits, write their gradient; U for the loss alone."""
        return (2 if self.with_gradient else 1) * self.student.nbytes

    @property
    def floor_work(self) -> int:
        return 2 * self.student.nbytes

    def of_teacher(self, rows: slice | Tensor = slice(None)) -> tuple[Tensor, ...]:
        return self.indices[rows], self.teacher[rows]

    def describe(self) -> dict[str, object]:
        return super().describe() | {"listed": self.indices.shape[1]}


@dataclass(eq=False, repr=False, kw_only=True)
class LinearCase(Case):
    """Hidden states and LM heads whose logits are correlated, as in training."""

    level = "linear"
    unit = "flops"

    student_hidden: Tensor  # (rows, student_hidden), requires grad, like the weight
    student_weight: Tensor  # (vocab, student_hidden)
    teacher_hidden: Tensor  # (rows, teacher_hidden)
    teacher_weight: Tensor  # (vocab, teacher_hidden)

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device, **options) -> LinearCase:
        generator = torch.Generator(device).manual_seed(0)
        d_s, d_t = shape.student_hidden, shape.teacher_hidden

        def pair(count: int, student_size: float, size: float) -> tuple[Tensor, Tensor]:
            """The student's vectors and the teacher's, of which they are the first part."""
            student = torch.empty(count, d_s, dtype=dtype, device=device)
            teacher = torch.empty(count, d_t, dtype=dtype, device=device)
            block = max(1, HEAD_BLOCK // d_t)
            for s, t in zip(student.split(block), teacher.split(block), strict=True):
                values = torch.randn(t.shape, device=device, generator=generator)
                t.copy_(size * values)
                s.copy_(student_size * values[:, :d_s])
            return student, teacher

        student_hidden, teacher_hidden = pair(shape.rows, 1.0, 1.0)
        size = 2 * d_t**-0.5  # logits of size 2
        student_weight, teacher_weight = pair(shape.vocab, 1.2 * size, size)
        return cls(
            name=shape.name,
            rows=shape.rows,
            vocab=shape.vocab,
            dtype=dtype,
            student_hidden=student_hidden.requires_grad_(),
            student_weight=student_weight.requires_grad_(),
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            **options,
        )

    @property
    def device(self) -> torch.device:
        return self.student_hidden.device

    @property
    def work(self) -> int:
        """Of the products: both models' logits, and the student's two gradients."""
        d_s, d_t = self.student_hidden.shape[1], self.teacher_hidden.shape[1]
        gradients = 2 * d_s if self.with_gradient else 0
        return 2 * self.rows * self.vocab * (d_s + d_t + gradients)

    @property
    def floor_work(self) -> int:
        return self.work

    @property
    def allowed_of_ours(self) -> None:
        """Products are PyTorch's, in the inputs' dtype."""
        return None

    def step(self, function: Callable[..., Tensor]) -> Step:
        student = self.student_hidden, self.student_weight
        inputs = *student, self.teacher_hidden, self.teacher_weight, self.temperature

        def drop_gradients() -> None:
            for tensor in student:
                tensor.grad = None

        def run() -> Result:
            loss = function(*inputs)
            self.backward(loss)
            return loss.detach(), tuple(tensor.grad for tensor in student)

        def run_loss() -> Result:
            with torch.no_grad():
                return function(*inputs), ()

        return Step(run if self.with_gradient else run_loss, drop_gradients)

    @functools.cached_property
    def checked(self) -> Tensor:
        """Tokens of the vocabulary whose weight gradient is compared."""
        return some(CHECKED_TOKENS, self.vocab, self.device)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """In float64: losses and hidden gradients of all rows, weight gradient of some tokens."""
        student_weight = self.student_weight.detach()
        losses, hidden_gradients, weight_gradients = [], [], []
        for hidden, teacher_hidden in zip(
            self.student_hidden.detach().split(self._block),
            self.teacher_hidden.split(self._block),
            strict=True,
        ):
            student = self._logits(hidden, student_weight).requires_grad_()
            loss = self.reference(student, self._logits(teacher_hidden, self.teacher_weight))
            (gradient,) = torch.autograd.grad(loss.sum() / self.rows, student)
            losses.append(loss.detach())
            hidden_gradients.append(
                sum(
                    part @ weight.double()
                    for part, weight in zip(
                        gradient.split(self._slice, dim=1),
                        student_weight.split(self._slice),
                        strict=True,
                    )
                )
            )
            weight_gradients.append(gradient[:, self.checked].t() @ hidden.double())
        return torch.cat(losses), torch.cat(hidden_gradients), sum(weight_gradients)

    @property
    def _block(self) -> int:
        """Rows whose logits are in float64 at a time."""
        return max(1, LINEAR_BLOCK // self.vocab)

    @property
    def _slice(self) -> int:
        """Tokens of the heads that are."""
        return max(1, HEAD_BLOCK // self.teacher_hidden.shape[1])

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        parts = weight.split(self._slice)
        return torch.cat([hidden.double() @ part.double().t() for part in parts], dim=1)

    def errors(self, result: Result) -> dict[str, float]:
        loss, gradients = result
        losses, hidden, weight = self.expected
        errors = {"loss_error": relative(loss, losses.mean())}
        if gradients:
            got = gradients[0].double(), gradients[1][self.checked].double()
            for name, part, exact in zip(("hidden", "weight"), got, (hidden, weight), strict=True):
                errors[f"{name}_gradient_error"] = relative(part / self.grad_scale, exact)
            if not bool(gradients[1].sum(dtype=torch.float32).isfinite()):  # any token's
                errors["weight_gradient_error"] = float("nan")
        return errors

    def textbook_errors(self) -> tuple[float, float]:
        losses, hidden_gradient, _ = self.expected
        rows = slice(0, TEXTBOOK_ROWS)
        hidden = self.student_hidden.detach()[rows].requires_grad_()
        loss = dense.linear_loss(self.divergence)(
            hidden,
            self.student_weight.detach(),
            self.teacher_hidden[rows],
            self.teacher_weight,
            self.temperature,
        )
        self.backward(loss, len(hidden) / self.rows)
        return (
            relative(loss.detach(), losses[rows].mean()),
            relative(hidden.grad.double() / self.grad_scale, hidden_gradient[rows]),
        )

    def describe(self) -> dict[str, object]:
        d_s, d_t = self.student_hidden.shape[1], self.teacher_hidden.shape[1]
        gradients = (self.vocab + self.rows) * d_s * self.dtype.itemsize
        return super().describe() | {
            "hidden": d_s,
            "teacher_hidden": d_t,
            "gradients_mib": round(gradients / 2**20, 1),
        }


CASES: dict[str, type[LogitsCase] | type[LinearCase]] = {
    case.level: case for case in (LogitsCase, SparseCase, LinearCase)
}
