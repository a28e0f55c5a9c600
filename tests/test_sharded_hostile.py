"""A vocabulary that several processes share: hostile logits, and calls that make no sense."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import kd_loss, watchers
from kdkernels.divergences import JSD, ForwardKL

from . import cases, harness, tolerances
from .cases import correlated_pair, labels_for
from .processes import CUTS, Processes, sharded


@pytest.mark.parametrize("divergence", cases.BOUNDED, ids=repr)
def test_masked_columns(backend, three, divergence):
    """-inf in a whole shard of either model, and in single columns."""
    student, teacher = correlated_pair(4, 96)
    student = cases.without_ties(student, teacher, 1.0, tolerances.TVD_TIE)
    student[0, :50] = teacher[0, :50] = -math.inf
    student[1, 51:] = -math.inf
    teacher[2, :50] = -math.inf
    student[3, 50] = teacher[3, 3] = -math.inf
    options = {"divergence": divergence, "reduction": "none"}
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("divergence", cases.ONE_OF_EACH, ids=repr)
@pytest.mark.parametrize("poison_value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_softmax(backend, three, divergence, poison_value):
    """NaN for that row in every shard, and no other."""
    student, teacher = correlated_pair(4, 96)
    student = cases.without_ties(student, teacher, 1.0, tolerances.TVD_TIE)
    if poison_value == -math.inf:
        student[1], teacher[2] = -math.inf, -math.inf
    else:
        student[1, 10], teacher[2, 80] = poison_value, poison_value
    options = {
        "divergence": divergence,
        "reduction": "none",
        "token_weight": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        "labels": torch.tensor([50, 10, 95, 0]),
        "ce_weight": 0.5,
        "return_metrics": True,
    }
    student[3] = math.nan
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)
    assert actual.gradient[1].isnan().all()
    assert actual.gradient[2].isnan().all()


@pytest.mark.parametrize("divergence", cases.ONE_OF_EACH, ids=repr)
@pytest.mark.parametrize("temperature", [0.05, 50.0])
def test_large_logits_far_apart(backend, three, divergence, temperature):
    """Every shard has its own largest logit, thousands apart."""
    student, teacher = correlated_pair(4, 96, seed=3)
    student[:, :50] += 1e4
    teacher[:, :50] += 1e4
    student[2:, 51:] -= 5e3
    student = cases.without_ties(student, teacher, temperature, tolerances.TVD_TIE)
    options = {
        "divergence": divergence,
        "temperature": temperature,
        "temperature_squared": False,
        "reduction": "none",
    }
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("normalizer", [0.0, math.nan])
def test_masked_rows_get_zeros_whatever_the_normalizer(backend, three, normalizer):
    student, teacher = correlated_pair(4, 96)
    masked = torch.tensor([True, False, True, True])
    labels = torch.where(masked, -100, labels_for(4, vocab=96))
    options = {"labels": labels, "ce_weight": 0.5, "normalizer": torch.tensor(normalizer)}
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    assert not actual.gradient[masked].any()
    assert not actual.loss.isfinite()
    assert not actual.gradient[~masked].isfinite().any()


def _refusals(width):
    """Options beside group, and what is said of them."""
    return {
        "needs vocab_size": ({"vocab_start": 0}, ValueError),
        "expected at least 0": ({"vocab_start": -1, "vocab_size": 64}, ValueError),
        "vocab_start is a float": ({"vocab_start": 1.5, "vocab_size": 64}, TypeError),
        f"expected 1 to {2 * width}": ({"vocab_size": 2 * width + 1}, ValueError),
        "vocab_size is 0": ({"vocab_size": 0, "vocab_start": 0}, ValueError),
    }


@pytest.mark.parametrize("message", _refusals(48))
def test_refused_options(monkeypatch, message):
    two = Processes(2, monkeypatch)
    options, kind = _refusals(48)[message]
    student, teacher = correlated_pair(4, 48)
    with pytest.raises(kind, match=message):
        two.run(lambda rank: kd_loss(student, teacher, group=two.group, **options))


def test_shards_of_unequal_widths_say_where_they_start(monkeypatch):
    two = Processes(2, monkeypatch)
    student, teacher = correlated_pair(4, 48)
    with pytest.raises(ValueError, match=r"have 48 \(student\) and 47 \(teacher\) columns"):
        two.run(lambda rank: kd_loss(student, teacher[:, :47], group=two.group))


def test_no_start_without_a_group_of_several(monkeypatch):
    student, teacher = correlated_pair(4, 48)
    with pytest.raises(ValueError, match="needs group, and group is None"):
        kd_loss(student, teacher, vocab_start=0, vocab_size=48)
    with pytest.raises(TypeError, match=r"expected a torch\.distributed\.ProcessGroup"):
        kd_loss(student, teacher, group="tensor_parallel")
    one = Processes(1, monkeypatch)
    options = {"group": one.group, "vocab_start": 1, "vocab_size": 40}
    with pytest.raises(ValueError, match="expected 0 in a group of one process"):
        one.run(lambda rank: kd_loss(student, teacher, **options))
    with pytest.raises(ValueError, match="a vocabulary of at least 1"):
        one.run(lambda rank: kd_loss(student[:, :0], teacher[:, :0], group=one.group))


def test_in_place_asks_for_rows_as_ever(kernel, three):
    def one(rank):
        leaf = torch.zeros(7, 5, 3, 64, requires_grad=True)
        logits = harness.move(leaf * 1.0, kernel.device)[::2, ::2, ::2, :32]
        teacher = torch.zeros_like(logits)
        harness.loss_of(kernel, logits, teacher, group=three.group, inplace_grad=True)

    with pytest.raises(ValueError, match="do not lie in rows at two strides"):
        three.run(one)


def _differing(rank):
    """Arguments that processes do not share, each in one of them."""
    labels = labels_for(4, vocab=96)
    elsewhere = labels.clone()
    elsewhere[1] = (labels[1] + 48) % 96
    outside = labels.clone()
    outside[1] = 96
    weight = torch.tensor([1.0, 1.0 + rank, 1.0, 1.0])
    with_labels = {"ce_weight": 0.5, "reduction": "none"}
    return {
        "labels": ([1], with_labels | {"labels": elsewhere if rank else labels}),
        "outside": ([1], with_labels | {"labels": outside}),
        "weights": ([1], {"reduction": "none", "token_weight": weight}),
        "options": ([0, 1, 2, 3], {"reduction": "none", "temperature": 1.0 + rank}),
        "shards": ([0, 1, 2, 3], {"reduction": "none", "vocab_start": 47 * rank, "vocab_size": 96}),
    }


@pytest.mark.parametrize("what", _differing(0))
@pytest.mark.parametrize("divergence", [ForwardKL(), JSD()], ids=repr)
def test_where_nobody_may_look_what_differs_is_nan(kernel, monkeypatch, what, divergence):
    """As on a GPU, where looking would wait for it: in every process, and in no other row."""
    monkeypatch.setattr(watchers, "may_look", lambda tensor: False)
    two = Processes(2, monkeypatch)
    student, teacher = correlated_pair(4, 96)

    def one(rank):
        columns = slice(48 * rank, 48 * rank + 48)
        options = {"group": two.group, "divergence": divergence} | _differing(rank)[what][1]
        return harness.run(kernel, student[:, columns], teacher[:, columns], **options)

    wrong = torch.zeros(4, dtype=torch.bool)
    wrong[_differing(0)[what][0]] = True
    for result in two.run(one):
        assert torch.equal(result.loss.isnan(), wrong)
        assert torch.equal(result.gradient.isnan().all(-1), wrong)
        assert torch.equal(result.gradient.isnan().any(-1), wrong)
