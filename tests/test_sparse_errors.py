"""What sparse_kd_loss and its modules refuse, and what they say."""

from __future__ import annotations

import math
import re

import pytest
import torch

import kdkernels
from kdkernels import sparse_kd_loss

S, IDS, P = torch.zeros(2, 3, 8), torch.arange(2).repeat(2, 3, 1), torch.full((2, 3, 2), -1.0)
ERRORS = [
    # student, indices, logprobs, options, exception, the message
    (None, IDS, P, {}, TypeError, "student_logits is a NoneType, expected a torch.Tensor"),
    (S.long(), IDS, P, {}, TypeError, "student_logits is torch.int64, expected float32"),
    (S, None, P, {}, TypeError, "teacher_indices is NoneType, expected an int64 or int32"),
    (S, IDS.float(), P, {}, TypeError, r"teacher_indices is torch\.float32, expected an int64"),
    (S, IDS.to_sparse(), P, {}, TypeError, "teacher_indices is torch.sparse_coo, expected a plain"),
    (S, IDS, P, {"group": torch.ones(2)}, TypeError, "group is a Tensor, expected a torch.dist"),
    (S, IDS[0], P, {}, ValueError, r"teacher_indices has shape \(3, 2\), expected .* \(2, 3\)"),
    (S, IDS[:1], P, {}, ValueError, r"teacher_indices has shape \(1, 3, 2\), expected .* \(2, 3\)"),
    (S, IDS[..., :0], P, {}, ValueError, r"teacher_indices has shape \(\.\.\., 0\), expected at"),
    (S, IDS, P[..., :1], {}, ValueError, r"teacher_logprobs has shape .*1\), expected .*2\)"),
    (S, IDS, P.long(), {}, TypeError, "teacher_logprobs is torch.int64, expected float32"),
    (S, IDS, P.clone().requires_grad_(), {}, ValueError, r"teacher_logprobs requires grad.*detach"),
    (S, IDS.to("meta"), P, {}, ValueError, "teacher_indices is on meta, expected the device of"),
    (S, IDS, P.to("meta"), {}, ValueError, "teacher_logprobs is on meta, expected the device of"),
    (S, IDS + 7, P, {}, ValueError, r"teacher_indices: got 8, expected -1 .* or 0 to 7"),
    (S, IDS - 2, P, {}, ValueError, r"teacher_indices: got -2, expected -1 .* or 0 to 7"),
    (S, IDS, P, {"vocab_size": 1}, ValueError, r"teacher_indices: got 1, expected .* 0 to 0"),
    (S, IDS * 0, P, {}, ValueError, "teacher_indices: a row lists 0 twice"),
    (S, IDS, P + 3, {}, ValueError, r"teacher_logprobs: probabilities of a row sum to 14\.77"),
    (S, IDS, P, {"tail": "top"}, ValueError, "tail is 'top', expected one of bucket, renormalize"),
    (
        S,
        IDS,
        P,
        {"tail": "sampled", "divergence": "jsd"},
        ValueError,
        "divergence is jsd, expected forward_kl or soft_cross_entropy",
    ),
    (S, IDS, P, {"temperature": 0.0}, ValueError, "temperature is 0.0, expected positive"),
    (S, IDS, P, {"ce_weight": 1.0}, ValueError, "ce_weight is 1.0, which needs labels"),
    (S, IDS, P, {"vocab_size": 9}, ValueError, "vocab_size is 9, expected 1 to 8"),
    (S, IDS, P, {"backend": "tpu"}, ValueError, "backend is 'tpu', expected 'auto'"),
    (
        S,
        IDS,
        P,
        {"labels": IDS[..., 0] + 8, "ce_weight": 1.0},
        ValueError,
        "labels: a row holds 8, expected",
    ),
    (
        S.clone().requires_grad_(),
        IDS,
        P,
        {"inplace_grad": True},
        ValueError,
        "inplace_grad: student_logits is a leaf",
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: re.sub(r"\W+", "-", case[-1])[:50])
def test_bad_input_raises(case):
    student, indices, logprobs, options, exception, message = case
    with pytest.raises(exception, match=message):
        sparse_kd_loss(student, indices, logprobs, **options)


@pytest.mark.parametrize("make", [kdkernels.SparseKDLoss, kdkernels.LinearSparseKDLoss])
def test_modules_check_their_options_when_made(make):
    for options, message in (
        ({"tail": "top"}, "tail is 'top', expected one of"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"tail": "sampled", "divergence": "jsd"}, "divergence is jsd, expected forward_kl"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(TypeError, match=f"{make.__name__} got 'bucket' by position, expected"):
        make("bucket")
    for option, problem in (
        ("teacher_softcap", "not an option, expected divergence"),
        ("labels", r"an argument of each call, expected loss\(\.\.\., labels=labels\)"),
        ("teacher_indices", "an argument of each call"),
    ):
        with pytest.raises(TypeError, match=f"{option} is {problem}"):
            make(**{option: 1.0})


def test_what_is_masked_may_be_bad():
    indices, logprobs = IDS.clone(), P.clone()
    indices[0, 0], logprobs[0, 0] = 99, 50.0
    weight = torch.ones(2, 3)
    weight[0, 0] = 0
    loss = sparse_kd_loss(S, indices, logprobs, token_weight=weight)
    assert math.isfinite(loss)
