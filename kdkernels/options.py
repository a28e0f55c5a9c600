"""The checked options of one call, in the form operators and backends take them."""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Names of the per-token metrics, in the order kernels write them.
METRICS = ("divergence", "cross_entropy", "teacher_entropy", "student_entropy", "agreement")

REDUCTIONS = ("none", "sum", "mean")


class LogitsOptions(NamedTuple):
    """Scalars of the logits level; the fields are the tail of every operator's schema."""

    divergence: str  # the compiled divergence, "" for one only the reference can evaluate
    parameter_0: float
    parameter_1: float
    temperature: float
    kd_weight: float  # includes temperature squared and a host-known normalizer
    ce_weight: float
    ignore_index: int
    reduction: str
    vocab: int
    student_scale: float
    student_softcap: float  # 0: none
    teacher_scale: float
    teacher_softcap: float
    metrics: bool


class LinearOptions(NamedTuple):
    """What the fused-linear level adds, in the order of its operator's schema."""

    needs_grad: list[bool]  # of every student_hidden, every student_weight, and student_bias
    student_dtype: torch.dtype  # of the products
    teacher_dtype: torch.dtype
    float32_logits: bool  # wider than the products' operands
    chunk_bytes: int  # 0: the default
    backend: str
