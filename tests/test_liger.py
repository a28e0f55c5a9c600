"""Liger's loss, where it is installed, beside what docs/replacing.md has in its place."""

from __future__ import annotations

import pytest
import torch

from .cases import normal
from .test_trainers import need, page

ROWS, VOCAB, TEACHER_WIDTH = 12, 41, 6


@pytest.mark.filterwarnings("ignore")  # of Liger's dependencies
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_jsd(beta, weights, bias):
    need("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.arange(ROWS).index_fill(0, torch.tensor([0, 5]), -1)
    student = [normal(ROWS, 8, seed=0), normal(VOCAB, 8, seed=1)]
    student += [normal(VOCAB, seed=2)] * bias
    student = [x.requires_grad_() for x in student]
    teacher = [normal(ROWS, TEACHER_WIDTH, seed=3), normal(VOCAB, TEACHER_WIDTH, seed=4)]
    options = {"beta": beta, "ignore_index": -1, "temperature": 2.0}
    ours = page("Liger")["FusedLinearJSDLoss"](*weights, **options)
    theirs = LigerFusedLinearJSDLoss(*weights, **options, compiled=False, chunk_size=5)
    results = []
    for loss in (ours, theirs):
        value = loss(*student[:2], *teacher, labels, *student[2:])
        results.append([value, *torch.autograd.grad(value, student)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
