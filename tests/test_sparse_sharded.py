"""Sparse teachers of a student whose vocabulary several processes share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kdkernels import linear_sparse_kd_loss, watchers

from . import harness
from .cases import DTYPES, correlated_pair, labels_for, normal
from .harness import assert_close, assert_gradient
from .sparse_cases import PAIRS, oracle, run, top
from .tolerances import OTHER_LOSS, gradient_tolerance, loss_tolerance

VOCAB = 90
ENDS = {"uneven": [40, 41, VOCAB], "padding": [40, VOCAB, VOCAB]}


def _sharded(three, function, ends=ENDS["uneven"]) -> harness.Result:
    """Results of ``function(first and last column, options)`` put together."""

    def one(rank):
        start = [0, *ends][rank]
        stop = 96 if rank == 2 else ends[rank]
        return function(
            slice(start, stop), {"group": three.group, "vocab_start": start, "vocab_size": VOCAB}
        )

    return three.put_together(one)


def _run(three, backend, student, indices, logprobs, ends=ENDS["uneven"], **options):
    """What :func:`run` gives for shards of the student."""

    def one(columns, where):
        return run(backend, student[..., columns], indices, logprobs, **where, **options)

    return _sharded(three, one, ends)


def _check(actual, expected, divergence, dtype) -> None:
    assert_close(actual.loss, expected.loss, loss_tolerance(divergence))
    assert_gradient(actual.gradient, expected.gradient, gradient_tolerance(divergence, dtype))


@pytest.mark.parametrize(("tail", "divergence"), PAIRS, ids=str)
def test_a_shared_vocabulary(backend, three, tail, divergence):
    student, teacher = correlated_pair(4, 96)
    listed = top(teacher[:, :VOCAB], 7, 1.5)
    options = {"tail": tail, "divergence": divergence, "temperature": 1.5}
    actual = _run(three, backend, student, *listed, **options)
    expected = oracle(student, *listed, vocab_size=VOCAB, **options)
    _check(actual, expected, divergence.name, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_labels_weights_and_metrics(kernel, three, dtype, ends, inplace):
    student, teacher = correlated_pair(6, 96, seed=2)
    student = student.to(dtype)
    indices, logprobs = top(teacher[:, :VOCAB], 5)
    indices[1, 2:] = -1
    labels = labels_for(6, vocab=VOCAB)
    labels[0], labels[1], labels[2] = 89, 40, -100
    options: dict[str, Any] = {
        "labels": labels,
        "ce_weight": 0.4,
        "temperature": 2.0,
        "student_softcap": 9.0,
        "token_weight": torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 1.0]),
    }
    beside = {"return_metrics": True, "inplace_grad": inplace}
    entries = indices, logprobs
    actual = _run(three, kernel, student, *entries, ENDS[ends], **beside, **options)
    options["vocab_size"] = VOCAB
    expected = oracle(student, *entries, **options)
    _check(actual, expected, "forward_kl", dtype)
    whole = run(harness.REFERENCE, student.double(), *entries, return_metrics=True, **options)
    harness.assert_metrics(actual.metrics, whole.metrics, "forward_kl")


def test_agreement(backend, three):
    """Of top tokens in every shard, and of equal ones in two."""
    student, teacher = correlated_pair(4, 96)
    for row, token in enumerate((7, 40, 80, 60)):
        student[row, token] = teacher[row, token] = 30.0
    student[3, 5] = 30.0
    indices, logprobs = top(teacher[:, :VOCAB], 5)
    options = {"return_metrics": True, "reduction": "none"}
    actual = _run(three, backend, student, indices, logprobs, **options)
    assert actual.metrics["agreement"].tolist() == [1, 1, 1, 0]


def test_masked_shards(backend, three):
    """-inf in a whole shard, and where the teacher lists something."""
    student, teacher = correlated_pair(3, 96)
    indices, logprobs = top(teacher[:, :VOCAB], 5)
    student[0, :40] = -math.inf
    student[1, 41:] = -math.inf
    options = {"divergence": "jsd", "reduction": "none"}
    actual = _run(three, backend, student, indices, logprobs, **options)
    expected = oracle(student, indices, logprobs, vocab_size=VOCAB, **options)
    _check(actual, expected, "jsd", torch.float32)


def test_a_single_row_without_dimensions(backend, three):
    student, teacher = correlated_pair(96)
    listed = top(teacher[:VOCAB], 5)
    actual = _run(three, backend, student, *listed)
    _check(actual, oracle(student, *listed, vocab_size=VOCAB), "forward_kl", torch.float32)


def test_no_rows(backend, three):
    student, indices, logprobs = torch.empty(0, 96), torch.empty(0, 5).long(), torch.empty(0, 5)
    actual = _run(three, backend, student, indices, logprobs)
    assert actual.loss.item() == 0
    assert actual.gradient.shape == (0, 96)


@pytest.mark.parametrize("look", [True, False], ids=["raises", "nan"])
@pytest.mark.parametrize("what", ["lists", "labels"])
def test_what_differs_between_processes(backend, monkeypatch, three, what, look):
    student, teacher = correlated_pair(3, 96)
    indices, logprobs = top(teacher[:, :VOCAB], 5)
    if not look:
        monkeypatch.setattr(watchers, "may_look", lambda tensor: False)

    def one(columns, where):
        mine, labels = indices.clone(), indices[:, 1].clone()
        if what == "lists":
            mine[0, 0] = (indices[0, 0] + 1 + where["vocab_start"]) % VOCAB
        else:  # that the teacher lists: what is listed does not tell them apart
            labels[0] = indices[0, where["vocab_start"] % 2]
        options = where | {"labels": labels, "ce_weight": 0.5, "reduction": "none"}
        return run(backend, student[:, columns], mine, logprobs, **options)

    if look and backend.device == "cpu":
        with pytest.raises(ValueError, match=r"they differ|lists \d+ twice"):
            _sharded(three, one)
        return
    result = _sharded(three, one)
    assert result.loss.isnan().tolist() == [True, False, False]
    assert result.gradient[0, :VOCAB].isnan().all()
    assert not result.gradient[1:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 2 * 4 * VOCAB])
def test_heads(linear_backend, three, dtype, chunk_bytes):
    if linear_backend.device != "cpu":
        pytest.skip("threads share the one that runs backwards on a GPU: they cannot meet there")
    hidden, weight, bias = normal(5, 12), normal(96, 12, seed=1) / 3, normal(96, seed=2)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    indices, logprobs = top(correlated_pair(5, VOCAB)[1], 6)
    options = {"divergence": "jsd", "labels": labels_for(5, vocab=VOCAB), "ce_weight": 0.5}

    def one(columns, where):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[columns], bias[columns])]
        loss = linear_sparse_kd_loss(
            *leaves[:2],
            indices,
            logprobs,
            student_bias=leaves[2],
            chunk_bytes=chunk_bytes,
            backend=linear_backend.backend,
            **where,
            **options,
        )
        loss.backward()
        gradients = [x.grad for x in leaves]
        return harness.Result(loss.detach(), gradients[1].T, {"hidden": gradients[0]})

    actual = _sharded(three, one)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    loss = linear_sparse_kd_loss(
        *leaves,
        indices,
        logprobs,
        student_bias=bias.double(),
        vocab_size=VOCAB,
        backend="reference",
        **options,
    )
    loss.backward()
    rounding = 4 * torch.finfo(dtype).eps  # of logits, gradients and their products
    assert_close(
        actual.loss, loss.detach(), OTHER_LOSS if dtype == torch.float32 else (rounding, 0)
    )
    tolerance = max(rounding, 2 * gradient_tolerance("jsd", dtype))
    assert_gradient(actual.gradient.T, leaves[1].grad, tolerance)
    assert_gradient(actual.metrics["hidden"], leaves[0].grad, tolerance)
