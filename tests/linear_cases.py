"""Inputs of the fused-linear tests, one way to run them, and what they are compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import Divergence, kd_loss, linear_kd_loss

from . import tolerances
from .cases import labels_for, normal
from .harness import DEVICES, move

VOCAB, TEACHER_VOCAB = 203, 210
LEAD = (3, 7)
#: Several chunks of several rows.
CHUNK = 5 * (VOCAB + TEACHER_VOCAB) * 4


class Case(NamedTuple):
    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None

    def to(self, *args: Any) -> Case:
        return Case(*(None if x is None else x.to(*args) for x in self))

    def logits(self) -> tuple[Tensor, Tensor]:
        return F.linear(*self[:3]), F.linear(*self[3:])


def make_case(dtype: torch.dtype = torch.float32, lead=LEAD, bias: bool = True, seed=0) -> Case:
    """Heads whose logits are of size 2, student and teacher correlated as in training."""
    shared = normal(*lead, 24, seed=seed)
    return Case(
        shared[..., :16] + 0.3 * normal(*lead, 16, seed=seed + 1),
        normal(VOCAB, 16, seed=seed + 2) / 2,
        normal(VOCAB, seed=seed + 3) if bias else None,
        shared,
        normal(TEACHER_VOCAB, 24, seed=seed + 4) / 2,
        normal(TEACHER_VOCAB, seed=seed + 5) if bias else None,
    ).to(dtype)


class Result(NamedTuple):
    """What a call gave."""

    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    metrics: dict[str, Tensor | None] | None


def fused(case: Case, backend: str = "auto", **options: Any) -> Any:
    """On the backend's device; a row_index stays on the host."""
    device = DEVICES.get(backend, "cpu")
    case = case.to(device)
    options = {n: x if n == "row_index" else move(x, device) for n, x in options.items()}
    return linear_kd_loss(
        case.student_hidden,
        case.student_weight,
        case.teacher_hidden,
        case.teacher_weight,
        student_bias=case.student_bias,
        teacher_bias=case.teacher_bias,
        backend=backend,
        **options,
    )


def dense(case: Case, backend: str = "reference", **options: Any) -> Any:
    """The definition: kd_loss of all logits, in the case's dtype."""
    return kd_loss(*case.logits(), backend=backend, **options)


def plain(case: Case, divergence: Divergence, temperature: float) -> Tensor:
    """The same in plain PyTorch, every step in the case's dtype."""
    student, teacher = case.logits()
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher[..., :VOCAB] / temperature, dim=-1)
    return divergence.value(log_p, log_q).sum(-1).mean() * temperature**2


def run(function, case: Case, grad_output: Tensor | None = None, **options: Any) -> Result:
    """Loss and gradients of ``fused`` or ``dense``."""
    student = [None if x is None else x.detach().requires_grad_() for x in case[:3]]
    result = function(Case(*student, *case[3:]), **options)
    loss, metrics = result if options.get("return_metrics") else (result, None)
    loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(loss))
    gradients = [None if x is None else x.grad.cpu() for x in student]
    return Result(loss.detach().cpu(), *gradients, metrics)


def oracle(case: Case, **options: Any) -> Result:
    """float64 throughout, from the same inputs."""
    for name in ("token_weight", "normalizer", "grad_output"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].double()
    return run(dense, case.to(torch.float64), **options)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def assert_as_good_as_dense(
    actual: Result, rival: Result, exact: Result, dtype: torch.dtype, floor: float | None = None
) -> None:
    """Gradients within twice the error of dense PyTorch, both against float64.

    Or within ``floor``: dense may be luckier than the rounding of a result, and :func:`dense` has
    exact arithmetic between the logits and their gradient.
    """
    if floor is None:
        floor = tolerances.gradient_tolerance("jsd", dtype)
    for name in ("hidden", "weight", "bias"):
        got, dense, wanted = (getattr(result, name) for result in (actual, rival, exact))
        if wanted is None:
            continue
        assert got.dtype == dtype
        error, bound = relative_error(got, wanted), relative_error(dense, wanted)
        assert error <= max(2 * bound, floor), (name, error, bound)


def some_labels(lead=LEAD) -> Tensor:
    """Some of them ignored."""
    labels = labels_for(*lead, vocab=VOCAB)
    labels.view(-1)[1::4] = -100
    return labels
