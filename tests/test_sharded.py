"""A vocabulary that several processes share, on every backend; see processes.py."""

from __future__ import annotations

import math

import pytest
import torch

import kdkernels
from kdkernels import sharded as sharded_losses
from kdkernels.divergences import (
    JSD,
    AlphaBeta,
    ForwardKL,
    ReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
)

from . import cases, harness, tolerances
from .cases import correlated_pair, labels_for
from .processes import CUTS, Processes, sharded


@pytest.mark.parametrize("divergence", cases.ALL, ids=repr)
def test_a_shared_vocabulary(backend, three, divergence):
    student, teacher = correlated_pair(1 if backend.interpreted else 4, 96)
    student = cases.without_ties(student, teacher, 1.5, tolerances.TVD_TIE)
    options = {"divergence": divergence, "temperature": 1.5, "reduction": "sum"}
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("cut", ["uneven", "two", "empty"])
@pytest.mark.parametrize("divergence", cases.ONE_OF_EACH, ids=repr)
def test_labels_weights_and_metrics(backend, monkeypatch, cut, divergence):
    processes = Processes(len(CUTS[cut]), monkeypatch)
    student, teacher = correlated_pair(6, 96, seed=1)
    student = cases.without_ties(student, teacher, 0.7, tolerances.TVD_TIE)
    labels = labels_for(6, vocab=96)
    labels[0], labels[1], labels[2] = 0, 95, -100
    options = {
        "divergence": divergence,
        "temperature": 0.7,
        "labels": labels,
        "ce_weight": 0.4,
        "token_weight": torch.tensor([1.0, 0.5, 1.0, 0.0, 2.0, 1.0]),
        "return_metrics": True,
    }
    actual = sharded(processes, backend, student, teacher, CUTS[cut], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)
    assert processes.gathers == 2 or not backend.kernel


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype", "inplace"),
    [
        (FLOAT, FLOAT, True),
        (FLOAT, BFLOAT, False),
        (BFLOAT, BFLOAT, False),
        (BFLOAT, FLOAT, True),
        (HALF, HALF, True),
        (HALF, BFLOAT, False),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "divergence", [ForwardKL(), ReverseKL(), JSD(), AlphaBeta(2, 0.5)], ids=repr
)
def test_dtypes(kernel, three, dtype, teacher_dtype, inplace, divergence):
    rows = 2 if kernel.interpreted else 5
    student, teacher = correlated_pair(rows, 96)
    student, teacher = student.to(dtype), teacher.to(teacher_dtype)
    options = {
        "divergence": divergence,
        "labels": labels_for(rows, vocab=96),
        "ce_weight": 0.3,
        "student_softcap": 8.0,
    }
    actual = sharded(
        three,
        kernel,
        student,
        teacher,
        CUTS["uneven"],
        inplace_grad=inplace,
        **options,
    )
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(backend, three, kd_weight, reduction):
    student, teacher = correlated_pair(2, 3, 96)
    options = {
        "labels": labels_for(2, 3, vocab=96),
        "kd_weight": kd_weight,
        "ce_weight": 0.7,
        "temperature": 2.0,
        "reduction": reduction,
        "normalizer": torch.tensor(11.0),
    }
    if reduction == "none":
        options["grad_output"] = torch.tensor([[1.0, 0.5, 0.0], [2.0, -1.0, 1.0]])
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("divergence", cases.ONE_OF_EACH, ids=repr)
def test_padding_and_unequal_widths(backend, three, divergence):
    """Columns beyond the vocabulary get gradient 0; the last shards may hold nothing else."""
    student, teacher = correlated_pair(4, 100)
    student = cases.without_ties(student, teacher, 1.0, tolerances.TVD_TIE)
    teacher = teacher[:, :91]
    actual = sharded(three, backend, student, teacher, [40, 80, 90], divergence=divergence)
    harness.assert_as_oracle(actual, student, teacher, divergence=divergence, vocab_size=90)
    assert not actual.gradient[:, 90:].any()


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), SymmetricKL()], ids=repr)
def test_infinite_divergences(backend, three, divergence):
    """Of tokens that only one of the models has masked, in one shard."""
    student, teacher = correlated_pair(3, 96)
    student[0, 3] = teacher[1, 70] = -math.inf
    options = {"reduction": "none", "temperature": 2.0}
    actual = sharded(
        three, backend, student, teacher, CUTS["uneven"], divergence=divergence, **options
    )
    expected = harness.run(backend, student, teacher, divergence=divergence, **options)
    assert expected.loss.isinf().any()
    harness.assert_matches(actual, expected, divergence.name, torch.float32)


@pytest.mark.parametrize(
    "divergence", [ForwardKL(), ReverseKL(), SymmetricKL(), SoftCrossEntropy()], ids=repr
)
def test_far_rows_of_a_kl_divergence_need_no_sums(kernel, three, monkeypatch, divergence):
    """Their value is known from the first message, and their gradient from the second launch."""
    rows, far = 3, torch.tensor([True, False, True])
    student, teacher = correlated_pair(rows, 96)
    student[1] = teacher[1] + 1e-3 * cases.normal(96)
    told, add_up = [], sharded_losses._divergence
    monkeypatch.setattr(
        sharded_losses, "_divergence", lambda sums, o: told.append(sums.clone()) or add_up(sums, o)
    )
    options = {"reduction": "none", "divergence": divergence}
    actual = sharded(three, kernel, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, divergence=divergence, reduction="none")
    assert told
    for sums in told:
        assert sums.any(-1).tolist() == (~far).tolist()


@pytest.mark.parametrize(
    ("divergence", "labels", "most"),
    [(JSD(), False, 66), (JSD(), True, 108), (ForwardKL(), False, 96), (ForwardKL(), True, 138)],
    ids=str,
)
def test_few_operators(monkeypatch, divergence, labels, most):
    """Between the kernels, those of the messages included."""
    two = Processes(2, monkeypatch)
    student, teacher = correlated_pair(4, 96)
    options = {"labels": labels_for(4, vocab=96), "ce_weight": 0.5} if labels else {}

    counts, logits_loss = [], sharded_losses.logits_loss

    def counted(*arguments):
        with harness.Operators() as operators:
            results = logits_loss(*arguments)
        counts.append(len(operators.seen))
        return results

    def loss_of(rank):
        shards = (x[:, 48 * rank : 48 * rank + 48] for x in (student, teacher))
        kdkernels.kd_loss(*shards, group=two.group, divergence=divergence, **options)

    monkeypatch.setattr(sharded_losses, "logits_loss", counted)
    student.requires_grad_()
    two.run(loss_of)
    assert min(counts) > 0
    assert max(counts) <= most


def test_ties_of_top_tokens(backend, three):
    """The first of equal ones counts, whichever shard has it."""
    student, teacher = correlated_pair(3, 96)
    student[:, [20, 50, 90]] = teacher[:, [20, 70]] = 40.0
    student[1, 20] = teacher[2, 20] = 0.0  # then 50 and 20, 20 and 70
    options = {"return_metrics": True, "reduction": "none"}
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    assert actual.metrics["agreement"].tolist() == [1, 0, 0]
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("divergence", [ForwardKL(), JSD()], ids=repr)
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_shards_of_padding_and_of_nothing(kernel, three, inplace, divergence):
    """Beside logits far below 0, with which their softmax states have nothing to do."""
    student, teacher = (x - 1e4 for x in correlated_pair(4, 100))
    actual = sharded(
        three, kernel, student, teacher, [0, 90, 90], divergence=divergence, inplace_grad=inplace
    )
    harness.assert_as_oracle(actual, student, teacher, divergence=divergence, vocab_size=90)
    assert not actual.gradient[:, 90:].any()


@pytest.mark.parametrize("divergence", cases.ONE_OF_EACH, ids=repr)
def test_close_to_the_teacher(backend, three, divergence):
    """No digits are lost on the way."""
    student, teacher = cases.close_pair(4, 3000, kl=1e-6)
    student = cases.without_ties(student, teacher, 1.0, tolerances.TVD_TIE)
    cut = [1000, 1001, 3000]
    actual = sharded(three, backend, student, teacher, cut, divergence=divergence)
    harness.assert_as_oracle(actual, student, teacher, divergence=divergence, close=True)


@pytest.mark.parametrize("divergence", [ReverseKL(), SymmetricKL(), AlphaBeta(0, 0)], ids=repr)
def test_large_float16_gradients(kernel, three, divergence):
    """Each row's power of two follows from slopes of any size."""
    student, teacher = (x.half() for x in correlated_pair(2, 96))
    student[0] *= 8
    teacher[1] *= 8
    student[0, 5:7], teacher[0, 5:7] = 90.0, torch.tensor([0.0, -1000.0])
    actual = sharded(three, kernel, student, teacher, CUTS["uneven"], divergence=divergence)
    harness.assert_as_oracle(actual, student, teacher, divergence=divergence)


@pytest.mark.parametrize("order", ["shifted", "reversed"])
def test_float16_gradients_of_slopes_that_cancel(kernel, monkeypatch, order):
    """The largest slope of a shard, not their sum, is what a row's power of two has to fit."""
    two = Processes(2, monkeypatch)
    student = torch.linspace(-8, 8, 200).expand(2, 200)
    teacher = student.roll(60, -1) if order == "shifted" else -student
    student, divergence = student.half(), AlphaBeta(-0.5, 0)
    options = {"divergence": divergence, "labels": torch.tensor([0, 120]), "ce_weight": 0.5}
    actual = sharded(two, kernel, student, teacher, [100, 200], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


def test_certain_labels_of_scaled_logits(backend, three):
    """Scaled as the log-sum-exp is, or what is left is what rounding makes of them."""
    student, teacher = correlated_pair(4, 96)
    student[:, 60] = 1.2345e4
    options = {"labels": torch.full((4,), 60), "kd_weight": 0.0, "ce_weight": 1.0}
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], student_scale=0.3, **options)
    # The error of exponentials (csrc/cpu/exponent.h); scaled otherwise, rounding leaves 1e-4.
    assert abs(actual.loss.item()) <= 1.3e-7


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_empty_shard_in_a_scaled_loss(backend, three, reduction):
    student, teacher = (x.half() for x in correlated_pair(4, 96))
    options = {"reduction": reduction, "grad_output": torch.tensor(3.0)}
    if reduction == "none":
        options["grad_output"] = torch.tensor([1.0, 0.5, 0.0, -2.0])
    for ends in ([0, 40, 96], [40, 40, 96], [40, 96, 96]):
        actual = sharded(three, backend, student, teacher, ends, **options)
        harness.assert_as_oracle(actual, student, teacher, **options)


def test_identical_logits(backend, three):
    student = 3 * cases.normal(4, 96)
    actual = sharded(three, backend, student, student.clone(), CUTS["uneven"])
    assert abs(actual.loss.item()) <= tolerances.IDENTICAL_LOSS


def test_no_rows(backend, three):
    student = torch.empty(0, 96)
    actual = sharded(three, backend, student, student.clone(), CUTS["even"])
    assert actual.loss.item() == 0
    assert actual.gradient.shape == (0, 96)


def test_a_single_row_without_dimensions(backend, three):
    student, teacher = correlated_pair(96)
    options = {"labels": torch.tensor(40), "ce_weight": 0.5}
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


def test_no_gradient(backend, three):
    """Loss only, where nothing asks for more."""
    student, teacher = correlated_pair(4, 96)

    def loss_of(rank):
        columns = slice(32 * rank, 32 * rank + 32)
        return harness.loss_of(backend, student[:, columns], teacher[:, columns], group=three.group)

    losses = three.run(loss_of)
    expected = harness.oracle(student, teacher).loss
    for loss in losses:
        harness.assert_close(loss, expected, tolerances.PLAIN_LOSS)
        assert not loss.requires_grad


def test_strided_logits(backend, three):
    """Shards of one tensor, all but the last token: no copy is needed, and none changes a bit."""
    student, teacher = (x[:, :-1] for x in correlated_pair(2, 4, 96))
    options = {"temperature": 2.0}
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("name", ["labels", "token_weight"])
def test_transposed_rows(backend, three, name):
    """Of a batch whose first dimension is the sequence: no kernel sees the strides of these."""
    student, teacher = correlated_pair(2, 3, 96)
    values = {"labels": labels_for(3, 2, vocab=96), "token_weight": cases.normal(3, 2).abs()}
    options = {name: values[name].t(), "reduction": "none"}
    if name == "labels":
        options["ce_weight"] = 0.5
    actual = sharded(three, backend, student, teacher, CUTS["uneven"], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


def test_a_group_of_one_is_no_group(backend, monkeypatch):
    one = Processes(1, monkeypatch)
    student, teacher = correlated_pair(4, 96)
    actual = sharded(one, backend, student, teacher, [96])
    alone = harness.run(backend, student, teacher)
    harness.assert_same(actual, alone, "forward_kl", backend)
    assert one.gathers == 0


@pytest.mark.parametrize("vocab", [100, 4097])
def test_more_than_a_block(backend, monkeypatch, vocab):
    """Shards of many blocks and odd widths, whose rows lie at odd addresses."""
    two = Processes(2, monkeypatch)
    student, teacher = correlated_pair(2, vocab)
    options = {"labels": labels_for(2, vocab=vocab), "ce_weight": 1.0}
    actual = sharded(two, backend, student, teacher, [vocab // 2 + 1, vocab], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=repr)
def test_a_late_logit_far_above_a_shards_first(backend, monkeypatch, divergence):
    two = Processes(2, monkeypatch)
    student, teacher = correlated_pair(2, 2400)
    student[0, 1100] = teacher[1, 2300] = 120.0  # beyond what exp of float32 holds
    options = {"divergence": divergence, "labels": torch.tensor([1100, 3]), "ce_weight": 0.5}
    options["reduction"] = "none"
    actual = sharded(two, backend, student, teacher, [1200, 2400], **options)
    harness.assert_as_oracle(actual, student, teacher, **options)


def test_metrics_of_a_divergence_without_weight(backend, three):
    """They need sums, whose launch must leave the gradient to the next one."""
    student, teacher = correlated_pair(3, 96)
    options = {"kd_weight": 0.0, "labels": labels_for(3, vocab=96), "ce_weight": 0.7}
    options["return_metrics"] = True
    for inplace in {False, backend.kernel}:
        beside = options | {"inplace_grad": inplace}
        actual = sharded(three, backend, student, teacher, CUTS["uneven"], **beside)
        harness.assert_as_oracle(actual, student, teacher, **options)
