"""Modules that hold a loss's options."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from . import scalars
from .divergences import ForwardKL, as_divergence
from .functional import kd_loss
from .keywords import KDOptions, LinearKDOptions, LinearSparseKDOptions, SparseKDOptions
from .linear import linear_kd_loss
from .linear_sparse import linear_sparse_kd_loss
from .options import Metrics
from .sparse import sparse_kd_loss
from .sparse_entries import check_tail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack


class LossModule(nn.Module):
    """Base of the modules: the options of a loss, checked."""

    known: tuple[str, ...]

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__()
        if positional:
            raise TypeError(
                f"{type(self).__name__} got {positional[0]!r} by position, expected options by "
                f"name: {', '.join(self.known)}"
            )
        of_a_call = inspect.signature(self.forward).parameters
        for name, value in options.items():
            if name in of_a_call:
                raise TypeError(
                    f"{name} is an argument of each call, expected loss(..., {name}={name})"
                )
            if name not in self.known:
                raise TypeError(f"{name} is not an option, expected {', '.join(self.known)}")
            scalars.option(name, value)
        if "divergence" in options:
            options["divergence"] = as_divergence(options["divergence"])
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class KDLoss(LossModule):
    """:func:`kdkernels.kd_loss` with its options fixed.

    Args:
        **options: any keyword of :func:`kdkernels.kd_loss` but the per-call ``labels``,
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

    known = tuple(KDOptions.__annotations__)

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[KDOptions]) -> None: ...

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


class LinearKDLoss(LossModule):
    """:func:`kdkernels.linear_kd_loss` with its options fixed.

    Args:
        **options: any keyword of :func:`kdkernels.linear_kd_loss` but the arguments of a
            call: tensors, ``normalizer`` and ``row_index``.

    Example:
        >>> import torch
        >>> from kdkernels import LinearKDLoss
        >>> criterion = LinearKDLoss(divergence="reverse_kl", temperature=2.0)
        >>> hidden, head = torch.randn(4, 8), torch.randn(16, 8)
        >>> criterion(hidden, head, hidden.clone(), head.clone()).item()
        0.0
    """

    known = tuple(LinearKDOptions.__annotations__)

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[LinearKDOptions]) -> None: ...

    def forward(
        self,
        student_hidden: Tensor | Sequence[Tensor],
        student_weight: Tensor | Sequence[Tensor],
        teacher_hidden: Tensor | np.ndarray | None = None,
        teacher_weight: Tensor | None = None,
        *,
        teacher_logits: Tensor | np.ndarray | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        row_index: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """See :func:`kdkernels.linear_kd_loss`."""
        return linear_kd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            teacher_logits=teacher_logits,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            labels=labels,
            token_weight=token_weight,
            normalizer=normalizer,
            row_index=row_index,
            **self.options,
        )


class _SparseLoss(LossModule):
    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__(*positional, **options)
        divergence = self.options.get("divergence", ForwardKL())
        check_tail(self.options.get("tail", "bucket"), divergence)


class SparseKDLoss(_SparseLoss):
    """:func:`kdkernels.sparse_kd_loss` with its options fixed.

    Args:
        **options: any keyword of :func:`kdkernels.sparse_kd_loss` but the per-call tensors
            ``labels``, ``token_weight`` and ``normalizer``.

    Example:
        >>> import torch
        >>> from kdkernels import SparseKDLoss
        >>> criterion = SparseKDLoss(tail="bucket", temperature=2.0)
        >>> logits = torch.randn(4, 50)
        >>> logprobs, indices = (logits / 2.0).log_softmax(-1).topk(8)
        >>> criterion(logits, indices, logprobs).item() < 1e-6
        True
    """

    known = tuple(SparseKDOptions.__annotations__)

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[SparseKDOptions]) -> None: ...

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor,
        teacher_logprobs: Tensor,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """See :func:`kdkernels.sparse_kd_loss`."""
        return sparse_kd_loss(
            student_logits,
            teacher_indices,
            teacher_logprobs,
            labels=labels,
            token_weight=token_weight,
            normalizer=normalizer,
            **self.options,
        )


class LinearSparseKDLoss(_SparseLoss):
    """:func:`kdkernels.linear_sparse_kd_loss` with its options fixed.

    Args:
        **options: any keyword of :func:`kdkernels.linear_sparse_kd_loss` but the arguments of a
            call: tensors and ``normalizer``.

    Example:
        >>> import torch
        >>> from kdkernels import LinearSparseKDLoss
        >>> criterion = LinearSparseKDLoss(tail="renormalize")
        >>> hidden, head = torch.randn(4, 8), torch.randn(50, 8)
        >>> logprobs, indices = (hidden @ head.T).log_softmax(-1).topk(8)
        >>> criterion(hidden, head, indices, logprobs).item() < 1e-6
        True
    """

    known = tuple(LinearSparseKDOptions.__annotations__)

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[LinearSparseKDOptions]) -> None: ...

    def forward(
        self,
        student_hidden: Tensor | Sequence[Tensor],
        student_weight: Tensor | Sequence[Tensor],
        teacher_indices: Tensor,
        teacher_logprobs: Tensor,
        *,
        student_bias: Tensor | None = None,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """See :func:`kdkernels.linear_sparse_kd_loss`."""
        return linear_sparse_kd_loss(
            student_hidden,
            student_weight,
            teacher_indices,
            teacher_logprobs,
            student_bias=student_bias,
            labels=labels,
            token_weight=token_weight,
            normalizer=normalizer,
            **self.options,
        )
