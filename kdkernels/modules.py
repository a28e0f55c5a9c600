"""Modules that hold a loss's options."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .divergences import as_divergence
from .functional import Metrics, kd_loss

_PER_CALL = ("student_logits", "teacher_logits", "labels", "token_weight", "normalizer")
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(kd_loss).parameters.items()
    if name not in _PER_CALL
}


class KDLoss(nn.Module):
    """:func:`kdkernels.kd_loss` with its options fixed.

    Args:
        **options: any keyword of :func:`kdkernels.kd_loss` but the per-call tensors ``labels``,
            ``token_weight`` and ``normalizer``.

    Example:
        >>> import torch
        >>> from kdkernels import JSD, KDLoss
        >>> criterion = KDLoss(divergence=JSD(beta=0.1), temperature=2.0)
        >>> logits = torch.randn(4, 8)
        >>> criterion(logits, logits.clone()).item()
        0.0
        >>> criterion
        KDLoss(divergence=JSD(beta=0.1), temperature=2.0)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(f"{name} is not an option; expected {', '.join(_OPTIONS)}")
        if "divergence" in options:
            options["divergence"] = as_divergence(options["divergence"])
        self.options = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """See :func:`kdkernels.kd_loss`."""
        return kd_loss(
            student_logits,
            teacher_logits,
            labels=labels,
            token_weight=token_weight,
            normalizer=normalizer,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
