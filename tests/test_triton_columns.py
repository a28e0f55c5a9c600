"""Columns as the Triton backend's threads take them: side by side, apart, beyond the vocabulary."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import AlphaBeta

from . import interpreter, tolerances
from .cases import ONE_OF_EACH, close_pair, correlated_pair, labels_for
from .harness import TRITON, assert_as_oracle, assert_close, loss_of, oracle, run
from .test_compile import options as operator_options

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
    rows = [launch._rows(student), launch._rows(teacher)]
    ends = {992: 992, 993: 1008, vocab: 1008, 1009: 1009}
    assert {end: launch.end_of(end, rows) for end in ends} == ends
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


def pair_of(vocab, student, teacher, gradient=None):
    """What a kernel is given for two rows, on an H100."""
    from kdkernels.triton import launch, schedule

    o = operator_options("forward_kl", metrics=False, ce_weight=0.0, vocab=vocab)
    call = launch.Call(student, teacher, gradient, None, None, None, torch.empty(2), None, None, o)
    (pair, _), _ = launch.arguments_of(call, schedule.Device(132, 50 * 2**20, 32, 65536))
    return pair


@pytest.mark.parametrize("which", range(3), ids=["student", "teacher", "gradient"])
def test_rows_of_every_tensor_have_to_be_aligned_and_wide(which):
    def with_one(rows):
        tensors = [torch.zeros(2, 1008) for _ in range(3)]
        tensors[which] = rows
        pair = pair_of(1001, *tensors)
        return pair.ALIGNED.value, pair.end, pair.PADDED.value

    assert with_one(torch.zeros(2, 1008)) == (True, 1008, True)
    assert with_one(torch.zeros(2, 1008)[:, :1001]) == (True, 1001, False)
    assert with_one(torch.zeros(2, 1009)[:, :1008]) == (False, 1001, False)
    assert pair_of(1001, torch.zeros(2, 1008), torch.zeros(2, 1008)).end == 1008


@pytest.mark.parametrize("student", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16], ids=str)
def test_a_thread_adds_up_what_it_loads_at_once(student, teacher):
    # 16 bytes of the wider dtype, of a block that has as many for each.
    logits = (torch.empty(2, 32000, dtype=dtype) for dtype in (student, teacher))
    pair = pair_of(32000, *logits)
    assert pair.FOLD.value == (8 if student == teacher == torch.bfloat16 else 4)


@pytest.mark.parametrize("divergence", [AlphaBeta(1, 1), AlphaBeta(2, 0.5)], ids=str)
def test_rounding_of_a_sum_over_many_blocks(monkeypatch, divergence):
    """It moves all log q alike, which alpha-beta feels at first order, unlike the others."""
    from kdkernels.triton import schedule

    monkeypatch.setattr(schedule, "choose", lambda *_: schedule.Schedule(128, 1))
    student, teacher = close_pair(2, 2503, kl=1e-9)
    student += 3
    options = {"divergence": divergence, "reduction": "none"}
    with torch.no_grad():
        loss = loss_of(TRITON, student, teacher, **options)
    # Without what takes it back it is off by 1e-4 and more.
    assert_close(loss, oracle(student, teacher, **options).loss, (3e-5, 0.0))


def test_log1p_for_divergences_of_users():
    from .triton_functions import log1p_of

    x = torch.tensor([-1.0, -1 + 2.0**-24, -0.5, -1e-6, 0.0, 1e-6, 1.0, 1e30])
    logs = torch.empty_like(x, device=interpreter.DEVICE)
    log1p_of[(1,)](x.to(interpreter.DEVICE), logs, len(x))
    assert_close(logs, x.double().log1p(), (2e-7, 0.0))
