"""What a case is: inputs of one level, their answer in float64, and which error is allowed.

``step`` makes what is timed of a loss function; ``errors`` compares its result with float64, and
``allowed`` says how large they may be.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdkernels import kd_loss
from kdkernels.divergences import Divergence

from . import dense

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOSS, LOSS_AND_GRADIENT = WHAT = ("loss", "loss+gradient")

#: What the loss of one row of float16 is scaled by, as a GradScaler would find, and of all at most.
FLOAT16_SCALE = 64, 2.0**13
#: Errors that no dtype has to answer for: exponentials approximated as GPUs do.
APPROXIMATE = 1e-4

Result = tuple[Tensor, tuple[Tensor, ...]]  # the loss and its gradients, none for a loss alone


@dataclass
class Step:
    """``prepare`` runs untimed before every timed ``run``."""

    run: Callable[[], Result]
    prepare: Callable[[], None] = lambda: None


def relative(got: Tensor, expected: Tensor) -> float:
    """The error in the Euclidean norm; NaN where anything is."""
    return float((got.double() - expected).norm() / expected.norm())


def some(count: int, of: int, device: torch.device) -> Tensor:
    """Up to ``count`` positions, increasing: the first, the last and others between at random."""
    generator = torch.Generator().manual_seed(1)
    chosen = {0, of - 1, *torch.randperm(of, generator=generator)[: count - 2].tolist()}
    return torch.tensor(sorted(chosen), device=device)


@dataclass(eq=False, repr=False, kw_only=True)
class Case(ABC):
    """What all levels have in common."""

    level: ClassVar[str]
    unit: ClassVar[str]  # what ``work`` counts
    of_logits: ClassVar[Callable[..., Tensor]] = staticmethod(kd_loss)

    name: str
    rows: int
    vocab: int
    dtype: torch.dtype
    divergence: str = "forward_kl"
    what: str = LOSS_AND_GRADIENT
    temperature: float = 2.0

    @property
    def instance(self) -> Divergence:
        return dense.instance(self.divergence)

    @property
    def with_gradient(self) -> bool:
        return self.what == LOSS_AND_GRADIENT

    @property
    def grad_scale(self) -> float:
        per_row, most = FLOAT16_SCALE
        return min(per_row * self.rows, most) if self.dtype == torch.float16 else 1.0

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        name = "" if self.name[:1].isdigit() else f"{self.name}, "
        return f"{name}{self.rows} x {self.vocab} {dtype} {self.divergence} {self.what}"

    def variant(self, divergence: str, what: str) -> Case:
        """The same inputs for another setting."""
        return dataclasses.replace(self, divergence=divergence, what=what)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def work(self) -> int:
        """Bytes or FLOPs that a fused loss cannot do without."""

    @property
    @abstractmethod
    def floor_work(self) -> int:
        """Those of the floor."""

    @abstractmethod
    def step(self, function: Callable[..., Tensor]) -> Step:
        """Loss, and gradients if the case has them, of ``function`` on the case's inputs."""

    @abstractmethod
    def errors(self, result: Result) -> dict[str, float]:
        """Relative errors of loss and gradients against float64."""

    @abstractmethod
    def textbook_errors(self) -> tuple[float, float]:
        """Those of the textbook loss in the case's dtype, on a few rows."""

    @functools.cached_property
    def allowed(self) -> tuple[float, float]:
        """Errors of loss and gradient beyond which something else than the loss was computed.

        Twice those of the textbook formula in PyTorch on the same inputs in the same dtype, which
        rounds every intermediate to it. At least 1e-4, as exponentials may be approximated, and of
        the gradient one rounding to the dtype, of the loss 8, since its terms may be rounded too.
        """
        loss, gradient = self.textbook_errors()
        eps = torch.finfo(self.dtype).eps
        return max(APPROXIMATE, 8 * eps, 2 * loss), max(APPROXIMATE, eps, 2 * gradient)

    @property
    def allowed_of_ours(self) -> tuple[float, float] | None:
        """What our kernels, which round nothing but the gradient, have to keep to beside it.

        None where other roundings are PyTorch's.
        """
        return APPROXIMATE, max(APPROXIMATE, torch.finfo(self.dtype).eps)

    def backward(self, loss: Tensor, share: float = 1.0) -> None:
        scale = self.grad_scale * share
        loss.backward(None if scale == 1 else torch.full_like(loss, scale))

    def reference(self, student: Tensor, *teacher: Tensor) -> Tensor:
        """Losses of the rows in float64, differentiable."""
        return self.of_logits(
            student,
            *teacher,
            divergence=self.instance,
            temperature=self.temperature,
            reduction="none",
            backend="reference",
        )

    def describe(self) -> dict[str, object]:
        return {
            "level": self.level,
            "shape": self.name,
            "rows": self.rows,
            "vocab": self.vocab,
            "dtype": str(self.dtype).removeprefix("torch."),
            "divergence": self.divergence,
            "what": self.what,
            "temperature": self.temperature,
            f"model_{self.unit}": self.work,
            "tensor_mib": round(self.rows * self.vocab * self.dtype.itemsize / 2**20, 4),
        }
