"""FLOPs of the fused-linear level, for ``torch.utils.flop_counter.FlopCounterMode``.

Its products run inside operators, where that mode does not see them: ``import kdkernels.flops``
registers their counts. It is a module of its own since PyTorch's counter imports Triton. Rows that
labels or weights leave out are counted too, as only shapes are known.

Example:
    >>> import torch, kdkernels, kdkernels.flops
    >>> from torch.utils.flop_counter import FlopCounterMode
    >>> student = torch.randn(8, 16), torch.randn(100, 16, requires_grad=True)
    >>> teacher = torch.randn(8, 32), torch.randn(100, 32)
    >>> with FlopCounterMode(display=False) as counter:
    ...     kdkernels.linear_kd_loss(*student, *teacher).backward()
    >>> counter.get_total_flops() == 2 * 8 * 100 * (16 + 16 + 32)
    True
"""

from __future__ import annotations

from itertools import chain
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = torch.Size
_ops = torch.ops.kdkernels


def _product(rows: int, weight: Shape) -> int:
    """FLOPs of a matrix product; a multiply-add counts as two."""
    return 2 * rows * prod(weight)


def _of_student(rows: int, weight: list[Shape], needs_grad: list[bool]) -> int:
    """FLOPs of the logits and of the needed gradients of hidden states and heads."""
    products = [_product(rows, shape) for shape in weight]
    of_gradients = zip(chain(products, products), needs_grad, strict=False)  # a bias has none
    return sum(products) + sum(product for product, needed in of_gradients if needed)


@register_flop_formula(_ops.linear_loss)
def _linear_loss(
    hidden: list[Shape],
    weight: list[Shape],
    bias: Shape | None,
    teacher_hidden: Shape | None,
    teacher_weight: Shape,
    teacher_bias: Shape | None,
    teacher_logits: Shape | None,
    labels: Shape | None,
    token_weight: Shape | None,
    normalizer: Shape | None,
    row_index: Shape | None,
    needs_grad: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    rows = prod(hidden[0][:-1] if row_index is None else row_index)
    of_teacher = 0 if teacher_hidden is None else _product(rows, teacher_weight)
    return of_teacher + _of_student(rows, weight, needs_grad)


@register_flop_formula(_ops.linear_tails)
def _linear_tails(hidden: list[Shape], weight: list[Shape], *_: Any, **__: Any) -> int:
    return _of_student(prod(hidden[0][:-1]), weight, [])


@register_flop_formula(_ops.linear_tails_gradient)
def _linear_tails_gradient(
    hidden: list[Shape],
    weight: list[Shape],
    bias: Shape | None,
    listed: Shape,
    kept: Shape,
    tails: Shape,
    grad_tails: Shape,
    grad_listed: Shape,
    needs_grad: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    return _of_student(prod(hidden[0][:-1]), weight, needs_grad)
