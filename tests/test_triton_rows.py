"""Rows as the programs of the Triton backend share them."""

from __future__ import annotations

import pytest
import torch

from . import interpreter
from .cases import correlated_pair
from .harness import TRITON, assert_same_bits, run

pytestmark = pytest.mark.skipif(not interpreter.INSTALLED, reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_program_scales_several_rows_of_a_gradient(monkeypatch, dtype, per_row):
    from kdkernels.triton import schedule

    student, teacher = (x.to(dtype) for x in correlated_pair(5, 37))
    options = {"grad_output": torch.tensor(3.0)}
    if per_row:
        options = {"grad_output": torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0]), "reduction": "none"}
    expected = run(TRITON, student, teacher, **options)
    monkeypatch.setattr(schedule, "SCALING_PROGRAMS", 2)
    assert_same_bits(run(TRITON, student, teacher, **options), expected)
