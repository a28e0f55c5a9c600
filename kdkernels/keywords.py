"""Keyword arguments of losses and modules, as types for editors and type checkers.

The functions document them and hold their defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from .divergences import Divergence


class _Options(TypedDict, total=False):
    divergence: str | Divergence
    temperature: float
    kd_weight: float
    ce_weight: float
    ignore_index: int
    reduction: str
    temperature_squared: bool
    vocab_size: int | None
    student_scale: float
    student_softcap: float | None
    group: ProcessGroup | None
    vocab_start: int | None
    backend: str


class _Dense(_Options, total=False):
    teacher_scale: float
    teacher_softcap: float | None


class _Sparse(_Options, total=False):
    tail: str


class _Logits(TypedDict, total=False):
    inplace_grad: bool


class _Linear(TypedDict, total=False):
    chunk_bytes: int | None
    logits_dtype: torch.dtype | None


class _Module(TypedDict, total=False):
    return_metrics: bool


class _Call(TypedDict, total=False):
    labels: Tensor | None
    token_weight: Tensor | None
    normalizer: float | Tensor | None


class KDOptions(_Dense, _Logits, _Module, total=False):
    """Options of :class:`kdkernels.KDLoss`."""


class LinearKDOptions(_Dense, _Linear, _Module, total=False):
    """Options of :class:`kdkernels.LinearKDLoss`."""


class SparseKDOptions(_Sparse, _Logits, _Module, total=False):
    """Options of :class:`kdkernels.SparseKDLoss`."""


class LinearSparseKDOptions(_Sparse, _Linear, _Module, total=False):
    """Options of :class:`kdkernels.LinearSparseKDLoss`."""


class KDKeywords(_Dense, _Logits, _Call, total=False):
    """Keywords of :func:`kdkernels.kd_loss` but ``return_metrics``, which overloads part."""


class LinearKDKeywords(_Dense, _Linear, _Call, total=False):
    """The same of :func:`kdkernels.linear_kd_loss`."""

    teacher_logits: Tensor | np.ndarray | None
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    row_index: Tensor | None


class SparseKDKeywords(_Sparse, _Logits, _Call, total=False):
    """The same of :func:`kdkernels.sparse_kd_loss`."""


class LinearSparseKDKeywords(_Sparse, _Linear, _Call, total=False):
    """The same of :func:`kdkernels.linear_sparse_kd_loss`."""

    student_bias: Tensor | None
