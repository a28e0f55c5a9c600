"""Columns as the Triton backend's threads take them: side by side, apart, beyond the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from . import interpreter, tolerances
from .cases import ONE_OF_EACH, close_pair, correlated_pair, labels_for
from .harness import TRITON, assert_as_oracle, assert_close, run

pytestmark = pytest.mark.skipif(not interpreter.INSTALLED, reason="Triton is not installed")


@pytest.mark.parametrize("rows", ["far", "close", "labelled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [12304, 12305], ids=["side by side", "apart"])
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_a_threads_columns(divergence, vocab, dtype, rows):
    # A GPU's threads add up columns that lie side by side where rows are aligned, and else apart.
    from kdkernels.triton import launch

    close = rows == "close"
    student, teacher = (close_pair if close else correlated_pair)(2, vocab)
    student, teacher = student.to(dtype), teacher.to(dtype)
    assert launch.aligned(launch._rows(student)) == (vocab % 16 == 0)
    options = {"divergence": divergence, "temperature": 2.0}
    if rows == "labelled":
        options |= {"labels": labels_for(2, vocab=vocab), "ce_weight": 0.5}
    actual = run(TRITON, student, teacher, **options)
    assert_as_oracle(actual, student, teacher, close=close, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=str)
def test_rows_padded_with_anything(divergence, dtype):
    """Such are read beyond the vocabulary, to where 16 bytes are loaded at once."""
    from kdkernels.triton import launch

    vocab, widths = 1001, (1008, 1040)
    student, teacher = (
        torch.nn.functional.pad(x.to(dtype), (0, width - vocab), value=math.nan)
        for x, width in zip(correlated_pair(2, vocab), widths, strict=True)
    )
    assert launch.end_of(vocab, [launch._rows(student), launch._rows(teacher)]) == 1008
    assert launch.end_of(vocab + 8, [launch._rows(student), launch._rows(teacher)]) == vocab + 8
    options = {
        "divergence": divergence,
        "labels": labels_for(2, vocab=vocab),
        "ce_weight": 0.5,
        "reduction": "none",
    }
    expected = run(TRITON, student[:, :vocab], teacher[:, :vocab], **options)
    for inplace in (False, True):
        actual = run(TRITON, student, teacher, vocab_size=vocab, inplace_grad=inplace, **options)
        assert not actual.gradient[:, vocab:].any()
        assert_close(actual.loss, expected.loss, tolerances.OTHER_LOSS)
        torch.testing.assert_close(actual.gradient[:, :vocab], expected.gradient)
