"""A sparse teacher beside infinities, NaN, masks, extreme values, and tails that rounding hides."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import ForwardKL, kd_loss
from kdkernels.options import TAILS

from . import tolerances
from .cases import BOUNDED, correlated_pair, labels_for, normal
from .harness import assert_close, assert_gradient, default_dtype
from .sparse_cases import oracle, run, top

INF = math.inf


@pytest.mark.parametrize("tail", TAILS)
def test_rows_that_take_no_part_give_exact_zeros(backend, tail):
    student, teacher = correlated_pair(4, 80)
    indices, logprobs = top(teacher, 5)
    expected = oracle(student[:2], indices[:2], logprobs[:2], tail=tail, reduction="sum")
    student[2] = math.nan
    student[3] = -INF
    logprobs[2] = math.nan
    indices[3] = 10**6
    options = {"tail": tail, "reduction": "sum", "student_softcap": 1e4}
    for masked in (
        {"token_weight": torch.tensor([1.0, 1.0, 0.0, 0.0])},
        {"labels": torch.tensor([1, 1, -100, -100])},
    ):
        actual = run(backend, student, indices, logprobs, **options, **masked)
        assert not actual.gradient[2:].any()
        assert_close(actual.loss, expected.loss, (1e-4, 1e-4))  # but for the softcap
    nothing = run(backend, student, indices, logprobs, tail=tail, token_weight=torch.zeros(4))
    assert nothing.loss == 0
    assert not nothing.gradient.any()


@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_a_bad_row_of_capped_logits_is_nan(backend, kd_weight):
    """Also where the cap has no derivative."""
    student, teacher = correlated_pair(3, 80)
    listed = top(teacher, 5, 2.0)
    student[1, teacher[1].argsort()[:2]] = torch.tensor([math.nan, -1e4])
    options = {"labels": labels_for(3, vocab=80), "ce_weight": 1.0, "kd_weight": kd_weight}
    options |= {"student_softcap": 5.0, "temperature": 2.0, "reduction": "none"}
    actual = run(backend, student, *listed, **options)
    assert actual.loss.isnan().tolist() == [False, True, False]
    assert actual.gradient.isnan().all(-1).tolist() == [False, True, False]
    assert actual.gradient.isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("tail", TAILS)
def test_bad_rows_are_nan_alone(backend, tail):
    student, teacher = correlated_pair(6, 600)
    indices, logprobs = top(teacher, 5)
    good = run(backend, student, indices, logprobs, tail=tail, reduction="none")
    outside = next(i for i in range(600) if i not in indices[1])
    student[0, indices[0, 2]] = math.nan
    student[1, outside] = math.nan
    student[2, indices[2, 1]] = INF
    student[3] = -INF
    logprobs[4, 1] = math.nan
    actual = run(backend, student, indices, logprobs, tail=tail, reduction="none")
    # Renormalised over what the teacher lists, the rest is not looked at.
    bad = [0, 2, 3, 4] if tail == "renormalize" else [0, 1, 2, 3, 4]
    assert actual.loss[bad].isnan().all()
    for row in bad:
        gradient = actual.gradient[row]
        assert gradient[indices[row]].isnan().all()
        assert tail == "renormalize" or gradient.isnan().all()
    rest = [i for i in range(6) if i not in bad]
    assert torch.equal(actual.loss[rest], good.loss[rest])
    assert torch.equal(actual.gradient[5], good.gradient[5])


def test_infinite_logits(backend):
    """-inf in the tail is left out of it; in a listed token it makes the divergence infinite."""
    student, teacher = correlated_pair(3, 90)
    indices, logprobs = top(teacher, 6)
    others = torch.ones_like(student, dtype=torch.bool).scatter(-1, indices, False)
    student[0][others[0]] = -INF  # no tail at all
    student[1][others[1].nonzero()[::2, 0]] = -INF
    student[2, indices[2, 0]] = -INF
    for divergence in [ForwardKL(), *BOUNDED[:3]]:
        options = {"divergence": divergence, "reduction": "none"}
        actual = run(backend, student, indices, logprobs, **options)
        expected = oracle(student, indices, logprobs, **options)
        assert_close(actual.loss, expected.loss, tolerances.OTHER_LOSS)
        finite = expected.gradient.isfinite().all(-1)
        assert finite[1]
        assert_gradient(actual.gradient[finite], expected.gradient[finite], 5e-6)
    actual = run(backend, student, indices, logprobs, reduction="none")
    assert actual.loss[[0, 2]].isposinf().all()


@pytest.mark.parametrize("tail", ["bucket", "drop", "sampled"])
@pytest.mark.parametrize("with_labels", [False, True])
def test_a_tail_of_masked_columns_has_no_gradient(backend, tail, with_labels):
    """All that the teacher does not list is -inf, as where a mask allows few tokens."""
    student, teacher = correlated_pair(3, 90)
    indices, logprobs = top(teacher, 6)
    logprobs = logprobs.log_softmax(-1)
    masked = torch.ones_like(student, dtype=torch.bool).scatter(-1, indices, False)
    student[masked] = -INF
    student[2] = -INF  # which is no softmax at all
    options = {"temperature": 2.0, "return_metrics": True} if with_labels else {}
    options |= {"labels": indices[:, 1], "ce_weight": 0.5} if with_labels else {}
    actual = run(backend, student, indices, logprobs, tail=tail, reduction="none", **options)
    listed = student.gather(-1, indices)[:2]
    leaf = listed.double().requires_grad_()
    temperature = options.get("temperature", 1.0)
    log_q = (leaf / temperature).log_softmax(-1)
    expected = temperature**2 * ForwardKL().value(logprobs[:2].double(), log_q).sum(-1)
    if with_labels:
        expected = expected - 0.5 * leaf.log_softmax(-1)[:, 1]
    expected.sum().backward()
    assert_close(actual.loss[:2], expected.detach(), tolerances.OTHER_LOSS)
    assert not actual.gradient[:2][masked[:2]].any()
    assert_gradient(actual.gradient[:2].gather(-1, indices[:2]), leaf.grad, 5e-6)
    assert actual.loss[2].isnan()
    assert actual.gradient[2].isnan().all()


def test_a_tail_that_rounding_hides_costs_little(backend):
    """Stored in 16 bits, a certain teacher's probabilities sum to 1 or more."""
    student, teacher = correlated_pair(5, 400)
    teacher.scatter_add_(-1, teacher.topk(3).indices, torch.full((5, 3), 25.0))
    indices, logprobs = top(teacher, 8)
    for rounded in (logprobs, (logprobs + 1e-3).half(), logprobs.bfloat16() * 0.99):
        whole = rounded.double().exp().sum(-1) >= 1
        for divergence in ("forward_kl", "reverse_kl", "symmetric_kl", "jsd"):
            options = {"divergence": divergence, "reduction": "none"}
            actual = run(backend, student, indices, rounded, **options)
            exact = kd_loss(student.double(), teacher.double(), **options)
            assert actual.loss.isfinite().all()
            assert actual.gradient.isfinite().all()
            assert (actual.loss <= exact * 1.01 + 0.05).all()
        assert whole.any() or rounded.dtype == torch.float32
    with default_dtype(torch.bfloat16):
        coarse = run(backend, student, indices, rounded, divergence="reverse_kl", reduction="none")
    fine = run(backend, student, indices, rounded, divergence="reverse_kl", reduction="none")
    assert torch.equal(coarse.loss, fine.loss)
    # Where the student has no tail either, there is none.
    student = torch.full_like(student, -INF).scatter(-1, indices, normal(5, 8))
    certain = (logprobs.double().softmax(-1) * (1 + 1e-6)).log()
    loss = run(backend, student, indices, certain).loss
    assert loss.isfinite()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_near_the_teacher(backend, tail, divergence):
    """Log-probabilities err by some 2^-22, and a divergence D by that times sqrt(D)."""
    rows = 3 if backend.interpreted else 8
    teacher = 3 * normal(rows, 700)
    indices, logprobs = top(teacher, 20)
    options = {"tail": tail, "divergence": divergence, "reduction": "none"}
    for distance in (0.1, 1e-2, 1e-3, 1e-4):
        student = teacher + distance * normal(rows, 700, seed=1)
        actual = run(backend, student, indices, logprobs, **options).loss.double()
        expected = oracle(student, indices, logprobs, **options).loss
        assert ((actual - expected).abs() <= 1e-6 * expected + 5e-7 * expected.sqrt()).all()


@pytest.mark.parametrize("tail", TAILS)
def test_rows_without_entries_have_no_term(backend, tail):
    student, teacher = correlated_pair(2, 30)
    indices, logprobs = top(teacher, 4)
    indices[0] = -1
    logprobs[0] = math.nan
    actual = run(backend, student, indices, logprobs, tail=tail, reduction="none")
    assert actual.loss[0] == 0
    assert actual.gradient[0].abs().max() < 1e-7
    assert actual.loss[1] > 0 or tail == "drop"


@pytest.mark.parametrize("temperature", [0.05, 100.0])
def test_extreme_values(backend, temperature):
    student, teacher = correlated_pair(4, 500)
    student[1] += 1e4
    student[2] -= 1e4
    student[3] = torch.linspace(-1e4, 1e4, 500)[torch.randperm(500)]
    indices, logprobs = top(teacher, 9, temperature)
    labels = labels_for(4, vocab=500)
    options = {"temperature": temperature, "labels": labels, "ce_weight": 0.1, "reduction": "none"}
    actual = run(backend, student, indices, logprobs, **options)
    expected = oracle(student, indices, logprobs, **options)
    assert_close(actual.loss, expected.loss, (2e-6, 2e-6 * max(1.0, temperature**2)))
    assert_gradient(actual.gradient, expected.gradient, 1e-5)


def test_a_temperature_below_the_spacing_of_logits(backend):
    """What is listed must not count as tail where logits cannot be told apart from less by it."""
    student, teacher = correlated_pair(2, 500)
    student = (student + 1e4).round()
    indices, logprobs = top(teacher, 9)
    options = {"temperature": 1e-5, "temperature_squared": False, "tail": "drop"}
    actual = run(backend, student, indices, logprobs, **options)
    expected = oracle(student, indices, logprobs, tail="drop", temperature=1e-5)
    assert_close(actual.loss, expected.loss * 1e10, (1e-6, 0.0))


def test_a_certain_teachers_tail_is_unknown(backend):
    student, _ = correlated_pair(2, 40)
    indices, logprobs = torch.tensor([[3], [7]]), torch.zeros(2, 1)
    actual = run(backend, student, indices, logprobs, divergence="reverse_kl", reduction="none")
    assert actual.loss.isfinite().all()
    assert actual.gradient.isfinite().all()
