"""The first largest logit of a row."""

import math

import pytest
import torch

from kdkernels.top import Top


@pytest.mark.parametrize("vocab", [1, 7, 1023, 1024, 1025, 2048, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_of_the_largest(vocab: int, dtype: torch.dtype) -> None:
    """Of few different values, so that the largest stands in several places."""
    torch.manual_seed(0)
    logits = torch.randint(-3, 4, (3, 17, vocab + 5)).to(dtype)[..., : vocab + 1]
    logits[..., vocab] = 9.0  # beyond the columns that take part
    logits[0, 0, :vocab] = -math.inf
    logits[0, 1, vocab // 2] = math.nan
    logits[0, 2, vocab - 1] = 5.0
    top = Top.of(logits, vocab)
    expected = logits[..., :vocab].max(-1)
    torch.testing.assert_close(top.logit, expected.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(top.token, expected.indices)


def test_no_columns() -> None:
    top = Top.of(torch.empty(4, 3), 0)
    assert torch.equal(top.logit, torch.full((4,), -math.inf))
    assert torch.equal(top.token, torch.zeros(4, dtype=torch.int64))
