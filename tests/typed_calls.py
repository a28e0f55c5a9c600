"""Calls as type checkers see them: not run, but checked by mypy, unused ignores included."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from kdkernels import (
    JSD,
    KDLoss,
    LinearKDHead,
    LinearSparseKDHead,
    LinearSparseKDLoss,
    kd_loss,
    linear_kd_loss,
    linear_sparse_kd_loss,
    sparse_kd_loss,
)
from kdkernels.options import Metrics

Pair = tuple[Tensor, Metrics]


def results(x: Tensor, indices: Tensor, flag: bool) -> None:
    """A loss is a tensor; with metrics, a pair."""
    assert_type(kd_loss(x, x, divergence=JSD(0.1), temperature=2), Tensor)
    assert_type(linear_kd_loss([x, x], [x, x], x, x, student_bias=x), Tensor)
    assert_type(sparse_kd_loss(x, indices, x, tail="drop", return_metrics=False), Tensor)
    assert_type(linear_sparse_kd_loss(x, x, indices, x, chunk_bytes=1 << 20), Tensor)
    assert_type(kd_loss(x, x, return_metrics=True), Pair)
    assert_type(linear_kd_loss(x, x, teacher_logits=x, return_metrics=True), Pair)
    assert_type(sparse_kd_loss(x, indices, x, return_metrics=True), Pair)
    assert_type(linear_sparse_kd_loss(x, x, indices, x, return_metrics=True), Pair)
    assert_type(kd_loss(x, x, return_metrics=flag), Tensor | Pair)
    metrics = kd_loss(x, x, return_metrics=True)[1]
    assert_type(metrics["divergence"], Tensor)
    assert_type(metrics["cross_entropy"], Tensor | None)


def mistakes(x: Tensor, head: nn.Linear) -> None:
    """Arguments that do not exist, or of another type."""
    kd_loss(x, x, temprature=2.0)  # type: ignore[call-overload]
    kd_loss(x, x, temperature="2")  # type: ignore[call-overload]
    kd_loss(x, x, inplace_grad=True, tail="drop")  # type: ignore[call-overload]
    KDLoss(labels=x)  # type: ignore[call-arg]
    LinearSparseKDLoss(teacher_scale=2.0)  # type: ignore[call-arg]
    LinearKDHead(head, logits_dtype=torch.float32, tail="drop")  # type: ignore[call-arg]
    LinearSparseKDHead(head, inplace_grad=True)  # type: ignore[call-arg]
