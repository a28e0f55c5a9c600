"""FLOPs as PyTorch counts them, of the fused-linear level as of the products it stands for."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kdkernels.flops  # noqa: F401  registers what is tested
from kdkernels import kd_loss, linear_kd_loss, linear_sparse_kd_loss, sparse_kd_loss

from .cases import normal

ROWS, VOCAB, HIDDEN, TEACHER_HIDDEN = 24, 97, 16, 32


def flops(function, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = function(*arguments, **options)
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("needs_grad", [(True, True), (True, False), (False, True), (False, False)])
def test_products_are_counted(needs_grad):
    hidden = normal(2, ROWS // 2, HIDDEN).requires_grad_(needs_grad[0])
    head = normal(VOCAB, HIDDEN).requires_grad_(needs_grad[1])
    teacher = normal(2, ROWS // 2, TEACHER_HIDDEN), normal(VOCAB, TEACHER_HIDDEN)

    def of_logits():
        return kd_loss(hidden @ head.T, teacher[0] @ teacher[1].T)

    assert flops(linear_kd_loss, hidden, head, *teacher) == flops(of_logits) > 0


def test_rows_of_an_index_are_counted():
    hidden, head = normal(ROWS, HIDDEN), normal(VOCAB, HIDDEN)
    index = torch.arange(0, ROWS, 3)
    teacher = normal(ROWS, VOCAB)
    counted = flops(linear_kd_loss, hidden, head, teacher_logits=teacher, row_index=index)
    assert counted == 2 * len(index) * VOCAB * HIDDEN


@pytest.mark.parametrize("needs_grad", [True, False])
def test_products_beside_a_sparse_teacher(needs_grad):
    hidden = normal(ROWS, HIDDEN).requires_grad_()
    head = normal(VOCAB, HIDDEN).requires_grad_(needs_grad)
    logprobs, indices = normal(ROWS, VOCAB).log_softmax(-1).topk(5)

    def of_logits():
        return sparse_kd_loss(hidden @ head.T, indices, logprobs)

    # Logits are computed anew in the backward.
    again = 2 * ROWS * VOCAB * HIDDEN
    counted = flops(linear_sparse_kd_loss, hidden, head, indices, logprobs)
    assert counted == flops(of_logits) + again
